"""From published weights to a run and back, through the command line."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import transformers

from tests.models.published import named_tensors, write_shards
from tests.models.qwen3_reference import SMALL, seeded_params
from tests.models.test_export_weights import our_logits
from tests.models.test_import_weights import run_script
from tests.small_tokenizer import bpe_tokenizer
from tw_jax import cli
from tw_jax.data.text import encode_user_text
from tw_jax.errors import UserError
from tw_jax.models.hf_config import config_to_hf
from tw_jax.train.run_dir import ModelConfig, load_run, new_model
from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS

QWEN3_DIR = pathlib.Path(__file__).parents[3] / "shared" / "qwen3_tokenizer"
ROWS = 300  # more than the tokenizer has; with its tags rounded up to 64 * 5
UNTIED = dataclasses.replace(SMALL, vocab_size=ROWS, tie_word_embeddings=False)


def publish(folder: pathlib.Path, tokenizer: Any, config: Any = UNTIED) -> pathlib.Path:
    """A folder as somebody else would publish it."""
    write_shards(folder, named_tensors(seeded_params(config)), shards=2)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture
def published(tmp_path: pathlib.Path) -> pathlib.Path:
    return publish(tmp_path / "published", bpe_tokenizer())


def test_import_and_export(published: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["import", str(published), f"run_dir={run}"]) == 0
    model = load_run(run)
    size = len(bpe_tokenizer())
    assert model.config == dataclasses.replace(UNTIED, vocab_size=320)
    assert len(model.tokenizer) == size + len(THREADWEAVER_TAGS)
    assert model.schema.tag_ids.tolist() == list(range(size, size + len(THREADWEAVER_TAGS)))

    # Rows of the word pieces' means; everything else as published.
    before, plain = seeded_params(UNTIED), bpe_tokenizer()
    table = np.asarray(model.params["embed_tokens"]["embedding"])
    head = np.asarray(model.params["lm_head"]["kernel"]).T
    old_head = before["lm_head"]["kernel"].T
    for tag, row in zip(THREADWEAVER_TAGS, model.schema.tag_ids, strict=True):
        pieces = plain(tag.strip("<>")).input_ids
        assert len(pieces) > 1 or tag in ("<Parallel>", "<Thread>")
        expected = before["embed_tokens"]["embedding"][pieces].mean(0)
        np.testing.assert_allclose(table[row], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(head[row], old_head[pieces].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(table[:size], before["embed_tokens"]["embedding"][:size])
    jax.tree.map(np.testing.assert_array_equal, model.params["layers"], before["layers"])

    assert cli.main(["export", str(run), f"out={out}", "max_shard_mb=1"]) == 0
    fields = json.loads((out / "config.json").read_text())
    assert fields["vocab_size"] == 320
    assert json.loads((out / "generation_config.json").read_text())["top_k"] == 20
    # What was exported is imported without any further change.
    again = new_model(ModelConfig(str(out)), seed=0)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def test_transformers_loads_the_enlarged_model(
    published: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["import", str(published), f"run_dir={run}"]) == 0
    assert cli.main(["export", str(run), f"out={out}"]) == 0
    model = load_run(run)
    torch.set_num_threads(1)
    theirs, problems = transformers.AutoModelForCausalLM.from_pretrained(
        str(out), output_loading_info=True
    )
    assert not any(problems.values())
    tokens = transformers.AutoTokenizer.from_pretrained(str(out))(
        "think: <Parallel>\n<Outlines>", return_tensors="np"
    ).input_ids
    assert model.schema.tag_ids[0] in tokens[0]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = our_logits(model.config, model.params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not QWEN3_DIR.exists(), reason=f"no Qwen3 tokenizer at {QWEN3_DIR}")
def test_the_real_tokenizer(tmp_path: pathlib.Path) -> None:
    """151,669 tokens in 151,936 rows: the tags take rows that are there, and none is cut off."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(QWEN3_DIR))
    config = dataclasses.replace(
        SMALL, vocab_size=151_936, hidden_size=8, num_hidden_layers=1, intermediate_size=8
    )
    folder = publish(tmp_path / "published", tokenizer, config)
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["import", str(folder), f"run_dir={run}", "model.param_dtype=bfloat16"]) == 0
    model = load_run(run)
    assert model.config.vocab_size == 151_936
    assert model.config.param_dtype == "bfloat16"
    assert model.schema.tag_ids.tolist() == list(range(151_669, 151_677))
    assert model.schema.eos_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = encode_user_text(model.tokenizer, "a <Parallel> and <|im_end|> and <think>")
    assert max(plain) < 151_643
    assert cli.main(["export", str(run), f"out={out}"]) == 0
    again = transformers.AutoTokenizer.from_pretrained(str(out))
    assert again.convert_tokens_to_ids("</Thread>") == 151_676
    chat = [{"role": "user", "content": "2+2?"}]
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(
        chat, tokenize=False
    )


def test_a_run_starts_from_published_weights(
    published: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`model=FOLDER` in fine-tuning, and on from its checkpoint."""
    words = ["sft", f"model={published}", f"run_dir={tmp_path / 'run'}", "data.row_len=512"]
    words += ["data.rows=1", "data.heldout_batches=0", "data.window=4", "tracker.tensorboard=false"]
    words += ["optimizer.warmup_steps=0"]
    assert cli.main([*words, "steps=1"]) == 0, capsys.readouterr().err
    assert cli.main([*words, "steps=2"]) == 0
    assert "going on from step 1 of 2" in capsys.readouterr().out
    model = load_run(tmp_path / "run")
    assert (model.step, model.config.vocab_size) == (2, 320)
    # And another run from this one.
    next_model = new_model(ModelConfig(str(tmp_path / "run"), compute_dtype="bfloat16"), seed=0)
    jax.tree.map(np.testing.assert_array_equal, next_model.params, model.params)
    assert (next_model.step, next_model.config.compute_dtype) == (0, "bfloat16")
    with pytest.raises(UserError, match="brings its own tokenizer"):
        new_model(ModelConfig(str(tmp_path / "run"), tokenizer="character"), seed=0)


MESH_SCRIPT = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from tw_jax.models.qwen3 import param_axes, abstract_params
from tw_jax.parallel.mesh import ParallelConfig, make_layout
from tw_jax.train.run_dir import ModelConfig, new_model

layout = make_layout(ParallelConfig("fsdp_tensor"))
config = ModelConfig(sys.argv[1])
spread, whole = new_model(config, 0, layout), new_model(config, 0)
shardings = layout.param_shardings(param_axes(whole.config), abstract_params(whole.config))
assert spread.config == whole.config
assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, spread.params, shardings))
assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(whole.params))
jax.tree.map(np.testing.assert_array_equal, spread.params["layers"], whole.params["layers"])
for name, kind in (("embed_tokens", "embedding"), ("lm_head", "kernel")):
    ours, theirs = (np.asarray(m.params[name][kind]) for m in (spread, whole))
    if name == "lm_head":
        ours, theirs = ours.T, theirs.T
    old = whole.schema.tag_ids[0]
    np.testing.assert_array_equal(ours[:old], theirs[:old])
    # Means over rows that lie on several devices are summed in another order.
    np.testing.assert_allclose(ours[old:], theirs[old:], rtol=1e-6, atol=1e-8)
print(spread.params["embed_tokens"]["embedding"].addressable_shards[0].data.size)
"""


def test_a_mesh_gets_published_weights_spread(published: pathlib.Path) -> None:
    """300 published rows do not divide by eight devices; the 320 that they become do."""
    done = run_script(f"import sys; sys.argv = ['', {str(published)!r}]\n{MESH_SCRIPT}")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 320 * SMALL.hidden_size / 8


# --- bad input ------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(list(words)) == cli.USER_ERROR_STATUS
    return capsys.readouterr().err


def test_sources_that_are_none(
    published: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    assert "model.source: 'tinny' is no preset (tiny, " in refused(capsys, "import", "tinny", run)
    assert "model.source=tiny: is a preset, which has no weights" in refused(capsys, "import", run)
    assert cli.main(["import", str(published), run]) == 0
    assert "holds a run already" in refused(capsys, "import", str(published), run)
    assert "no run at" in refused(capsys, "export", str(tmp_path / "none"), f"out={tmp_path / 'o'}")
    (published / "config.json").unlink()
    again = f"run_dir={tmp_path / 'again'}"
    assert "there is no config.json" in refused(capsys, "import", str(published), again)
    assert not (tmp_path / "again").exists()


def test_a_tokenizer_larger_than_the_vocabulary(
    published: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(ROWS + 1 - len(tokenizer))])
    tokenizer.save_pretrained(str(published))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    message = refused(capsys, "import", str(published), f"run_dir={tmp_path / 'run'}")
    assert f"the tokenizer has ids up to {ROWS}, but config.json's vocab_size is {ROWS}" in message
    assert "belongs to the weights" in message
    (published / "tokenizer.json").unlink()
    (published / "tokenizer_config.json").unlink()
    message = refused(capsys, "import", str(published), f"run_dir={tmp_path / 'run'}")
    assert "no usable Hugging Face tokenizer there" in message
    assert not (tmp_path / "run").exists()


def test_a_preset_too_small_for_its_tokenizer(tmp_path: pathlib.Path) -> None:
    bpe_tokenizer().save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"'tiny' embeds 128 ids, but the tokenizer .* needs \d+"):
        new_model(ModelConfig("tiny", tokenizer=str(tmp_path)), seed=0)
