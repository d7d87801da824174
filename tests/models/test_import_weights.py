"""Published safetensors become exactly our parameters, wherever they lie; bad files are refused."""

import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.published import EXPERTS, fused, named_tensors, random_params, write_shards
from tests.models.qwen3_reference import CASES, SMALL, seeded_params
from tw_jax.errors import UserError
from tw_jax.models.config import PRESETS
from tw_jax.models.import_weights import load_params
from tw_jax.models.qwen3 import abstract_params
from tw_jax.models.safetensors_file import list_tensors
from tw_jax.models.weight_location import LocalFolder, open_folder
from tw_jax.models.weight_names import RULES, pieces_of

BFLOAT16 = np.dtype(jnp.bfloat16)


def same(loaded, expected) -> None:
    def check(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)

    jax.tree.map(check, loaded, expected)


@pytest.fixture
def published(tmp_path: pathlib.Path) -> pathlib.Path:
    """The small tied model in three shards."""
    return write_shards(tmp_path / "model", named_tensors(seeded_params(SMALL)), shards=3)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_parameters_come_back(name: str, shards: int, tmp_path: pathlib.Path) -> None:
    config, params = CASES[name], seeded_params(CASES[name])
    folder = write_shards(tmp_path / "model", named_tensors(params), shards)
    same(load_params(str(folder), config), params)


@pytest.mark.parametrize("layout", ["published", "fused", "mixed"])
def test_experts_are_stacked(layout: str, tmp_path: pathlib.Path) -> None:
    """One tensor per expert as published, fused ones as in memory, or a layer of each."""
    params = random_params(EXPERTS)
    tensors = named_tensors(params)
    if layout == "fused":
        tensors = fused(tensors, EXPERTS)
    elif layout == "mixed":
        second = {n: t for n, t in fused(tensors, EXPERTS).items() if "layers.1.mlp.exp" in n}
        tensors = {n: t for n, t in tensors.items() if "layers.1.mlp.exp" not in n} | second
    folder = write_shards(tmp_path / "model", tensors, shards=2)
    same(load_params(str(folder), EXPERTS), params)


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_knows_every_parameter_and_no_tensor_twice(name: str) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params(PRESETS[name]))[0]
    tensors = []
    for path, leaf in leaves:
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        assert key in RULES
        tensors += [piece.tensor for piece in pieces_of(key, leaf.shape)]
    assert len(tensors) == len(set(tensors))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16"])
def test_a_file_may_mix_dtypes(param_dtype: str, tmp_path: pathlib.Path) -> None:
    """One matrix in float32, one scale in float16, the rest in bfloat16."""
    tensors = {
        name: tensor.astype(BFLOAT16)
        for name, tensor in named_tensors(seeded_params(SMALL)).items()
    }
    wide = "model.layers.1.self_attn.k_proj.weight"
    half = "model.layers.0.input_layernorm.weight"
    tensors[wide] = np.random.default_rng(0).standard_normal((32, 48), dtype=np.float32)
    tensors[half] = (np.arange(48) / 64).astype(np.float16)
    folder = write_shards(tmp_path / "model", tensors)
    loaded = load_params(str(folder), dataclasses.replace(SMALL, param_dtype=param_dtype))
    dtype = np.dtype(param_dtype) if param_dtype != "bfloat16" else BFLOAT16
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {dtype}
    expected = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    found = named_tensors(jax.tree.map(np.asarray, loaded))
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_large_matrices_are_read_in_blocks(tmp_path: pathlib.Path) -> None:
    """Rows of several blocks and tiles, and a last block that is not full."""
    config = dataclasses.replace(SMALL, vocab_size=3001, hidden_size=700, intermediate_size=1999)
    params = seeded_params(config)
    folder = write_shards(tmp_path / "model", named_tensors(params))
    same(load_params(str(folder), config), params)


def test_a_repeated_head_is_ignored_and_a_different_one_refused(tmp_path: pathlib.Path) -> None:
    params = seeded_params(SMALL)
    tensors = named_tensors(params)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    same(load_params(str(write_shards(tmp_path / "same", tensors)), SMALL), params)
    tensors["lm_head.weight"][-1, -1] += 1
    other = write_shards(tmp_path / "other", tensors)
    with pytest.raises(UserError, match="tie_word_embeddings: true, but 'lm_head.weight'"):
        load_params(str(other), SMALL)


# --- places ---------------------------------------------------------------------------------------


def test_weights_behind_a_url(published: pathlib.Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{published}/", "/weights_test/model/", recursive=True)
    try:
        same(load_params("memory://weights_test/model", SMALL), seeded_params(SMALL))
        with pytest.raises(UserError, match="memory://weights_test/none: no such folder"):
            load_params("memory://weights_test/none", SMALL)
    finally:
        memory.rm("/weights_test", recursive=True)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed here")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=r"gs:// needs gcsfs: `pip install gcsfs`.*tw-jax\[gcs\]"):
        open_folder("gs://bucket/model")


def test_places_without_weights(tmp_path: pathlib.Path) -> None:
    for place, message in (
        ("nowhere://bucket", "fsspec knows no nowhere:// addresses"),
        (str(tmp_path / "absent"), "no such folder; give a folder with safetensors"),
        (__file__, "is a file; give the folder"),
        (str(tmp_path), "holds neither model.safetensors nor"),
    ):
        with pytest.raises(UserError, match=message):
            load_params(place, SMALL)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pytorch_model.bin cannot be read, convert to safetensors"):
        load_params(str(tmp_path), SMALL)


HUB_SCRIPT = """
import sys
from tw_jax.errors import UserError
from tw_jax.models.weight_location import open_folder
print(sorted(open_folder("someone/model").files()))
try:
    open_folder("someone/else")
except UserError as error:
    print(error)
"""


def test_hub_ids_are_looked_up_in_the_hubs_cache(
    published: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Offline, with the cache laid out as the hub's client lays it out."""
    repository = tmp_path / "cache" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    published.rename(repository / "snapshots" / ("a" * 40))
    environment = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = run_script(HUB_SCRIPT, **environment)
    assert done.returncode == 0, done.stderr
    files, error = done.stdout.splitlines()[:2]
    assert "model-00002-of-00003.safetensors" in files
    assert error.startswith("someone/else: no such folder here, and not to be had from the Hugging")


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        timeout=600,
    )


# --- many devices ---------------------------------------------------------------------------------

SHARDED_SCRIPT = """
import collections, dataclasses, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.models.published import EXPERTS, random_params
from tests.models.qwen3_reference import CASES, seeded_params
from tw_jax.models.import_weights import load_params
from tw_jax.models.qwen3 import abstract_params
from tw_jax.models.safetensors_file import list_tensors
from tw_jax.models.weight_location import LocalFolder, open_folder

class Recording(LocalFolder):
    taken = collections.defaultdict(list)

    def read(self, file, start, stop):
        self.taken[file].append((start, stop))
        return super().read(file, start, stop)

config = dataclasses.replace(CASES["untied"], vocab_size=64, num_hidden_layers=4)
expected = seeded_params(config)
if "experts" in sys.argv[1]:
    moe = dataclasses.replace(EXPERTS.moe, num_experts=4)
    config = dataclasses.replace(EXPERTS, vocab_size=64, num_hidden_layers=4, moe=moe)
    expected = random_params(config)
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3)
specs = {1: P(None), 2: P("fsdp", "tensor"), 3: P("data", "fsdp", "tensor"),
    4: P(None, "data", "fsdp", "tensor")}
place = lambda leaf: NamedSharding(mesh, specs[len(leaf.shape)])
shardings = jax.tree.map(place, abstract_params(config))
shardings["layers"]["self_attn"]["q_proj"]["kernel"] = NamedSharding(mesh, P(None, None, "tensor"))
folder = Recording(open_folder(sys.argv[1]).path)
loaded = load_params(folder, config, shardings)
jax.tree.map(np.testing.assert_array_equal, loaded, expected)
assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding == s, loaded, shardings)))
for entry in list_tensors(open_folder(sys.argv[1])).values():
    inside = sorted(r for r in folder.taken[entry.file] if entry.start <= r[0] < entry.stop)
    assert inside[0][0] == entry.start and inside[-1][1] == entry.stop, entry
    assert all(a[1] == b[0] for a, b in zip(inside, inside[1:])), entry  # each byte once
print("same")
"""


@pytest.mark.parametrize("kind", ["dense", "experts", "experts_fused"])
def test_every_byte_is_read_once_for_all_devices(kind: str, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CASES["untied"], vocab_size=64, num_hidden_layers=4)
    tensors = named_tensors(seeded_params(config))
    if kind != "dense":
        moe = dataclasses.replace(EXPERTS.moe, num_experts=4)
        config = dataclasses.replace(EXPERTS, vocab_size=64, num_hidden_layers=4, moe=moe)
        tensors = named_tensors(random_params(config))
    if kind == "experts_fused":
        tensors = fused(tensors, config)
    folder = write_shards(tmp_path / kind, tensors, 2)
    done = run_script(f"import sys; sys.argv = ['', {str(folder)!r}]\n{SHARDED_SCRIPT}")
    assert done.stdout.endswith("same\n"), done.stderr


TWO_PROCESSES_SCRIPT = """
import collections, dataclasses, sys
import jax, numpy as np
folder, port, index = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.models.published import EXPERTS, named_tensors, random_params
from tw_jax.models.import_weights import load_params
from tw_jax.models.qwen3 import abstract_params
from tw_jax.models.safetensors_file import list_tensors
from tw_jax.models.weight_location import LocalFolder, open_folder

class Recording(LocalFolder):
    taken = collections.Counter()

    def read(self, file, start, stop):
        self.taken.update(range(start, stop))
        return super().read(file, start, stop)

moe = dataclasses.replace(EXPERTS.moe, num_experts=4)
config = dataclasses.replace(EXPERTS, vocab_size=64, moe=moe)
mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
whole, split = NamedSharding(mesh, P()), lambda *spec: NamedSharding(mesh, P(*spec))
shardings = jax.tree.map(lambda leaf: whole, abstract_params(config))
shardings["embed_tokens"]["embedding"] = split("x", None)
attention = shardings["layers"]["self_attn"]
attention["q_proj"]["kernel"] = split(None, None, "x")  # rows as published
attention["k_proj"]["kernel"] = split("x")  # layers
for part in ("gate_proj", "up_proj", "down_proj"):
    shardings["layers"]["mlp"]["experts"][part]["kernel"] = split(None, "x")
loaded = load_params(Recording(open_folder(folder).path), config, shardings)

def check(array, expected):
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[shard.index])

jax.tree.map(check, loaded, random_params(config))
for entry in list_tensors(open_folder(folder)).values():
    counts = [Recording.taken[byte] for byte in range(entry.start, entry.stop)]
    assert max(counts) <= 1, entry
    share = sum(counts) / len(counts)
    if ".experts." in entry.name or ".k_proj." in entry.name:
        assert share in (0, 1), entry  # an expert, a layer of this process or not
    else:
        assert share == (0.5 if "embed" in entry.name or "q_proj" in entry.name else 1), entry
print("same")
"""


def test_a_process_reads_only_what_its_devices_hold(tmp_path: pathlib.Path) -> None:
    moe = dataclasses.replace(EXPERTS.moe, num_experts=4)
    config = dataclasses.replace(EXPERTS, vocab_size=64, moe=moe)
    folder = write_shards(tmp_path / "model", named_tensors(random_params(config)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    scripts = [
        f"import sys; sys.argv = ['', {str(folder)!r}, {port!r}, '{i}']\n{TWO_PROCESSES_SCRIPT}"
        for i in range(2)
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in pool.map(run_script, scripts):
            assert done.stdout.endswith("same\n"), done.stderr


# --- bad input ------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(published: pathlib.Path) -> None:
    (published / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 3 weight files .* missing: model-00002-of-00003"):
        load_params(str(published), SMALL)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file_is_named(left: int, published: pathlib.Path) -> None:
    file = published / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors: is truncated.*again"):
        load_params(str(published), SMALL)


def with_header(file: pathlib.Path, header: bytes, data: bytes = b"") -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not JSON", "malformed"),
        (b"[]", "malformed"),
        (b'{"a": 1}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "malformed.*data_offsets"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "cannot take 8 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', r"shape \[-2\]"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "'a' does not begin"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "no tensor owns"),
    ],
)
def test_a_bad_header_is_told(header: bytes, message: str, tmp_path: pathlib.Path) -> None:
    with_header(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(UserError, match=f"model.safetensors: .*{message}"):
        list_tensors(open_folder(str(tmp_path)))


def test_a_file_that_is_no_safetensors(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="has no safetensors header"):
        list_tensors(open_folder(str(tmp_path)))


def test_an_index_that_names_an_absent_tensor(published: pathlib.Path) -> None:
    file = published / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    message = "says that model-00001-of-00003.safetensors holds tensor 'model.extra.weight', but it"
    with pytest.raises(UserError, match=message):
        load_params(str(published), SMALL)
    file.write_text('{"metadata": {}}')
    with pytest.raises(UserError, match="index.json: has no `weight_map`"):
        load_params(str(published), SMALL)
    file.write_text("{")
    with pytest.raises(UserError, match="index.json: is not JSON"):
        load_params(str(published), SMALL)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {Q_PROJ: t[Q_PROJ].astype(np.int8)}, "is I8; F32, BF16, F16 can be read"),
        (lambda t: t | {Q_PROJ: t[Q_PROJ].T.copy()}, r"has shape \[48, 64\], .* for \[64, 48\]"),
        (lambda t: {n: a for n, a in t.items() if n != Q_PROJ}, r"\[64, 48\] is missing; config"),
        (
            lambda t: t | {"model.layers.2.mlp.up_proj.weight": t[Q_PROJ].copy()},
            "'model.layers.2.mlp.up_proj.weight' and 0 more are no part of this architecture",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message: str, tmp_path: pathlib.Path) -> None:
    folder = write_shards(tmp_path / "model", change(named_tensors(seeded_params(SMALL))))
    with pytest.raises(UserError, match=message) as raised:
        load_params(str(folder), SMALL)
    assert str(folder) in str(raised.value)
    if "layers.2" not in message:
        assert Q_PROJ in str(raised.value)


def test_a_missing_head_is_explained(tmp_path: pathlib.Path) -> None:
    folder = write_shards(tmp_path / "model", named_tensors(seeded_params(SMALL)))
    untied = dataclasses.replace(SMALL, tie_word_embeddings=False)
    with pytest.raises(UserError, match="'lm_head.weight' .* missing; config.json says tie_word"):
        load_params(str(folder), untied)


class HeadersOnly(LocalFolder):
    """A folder whose tensors must not be read."""

    def read(self, file: str, start: int, stop: int) -> np.ndarray:
        header = (self.path / file).read_bytes()[:8]
        assert stop <= 8 + int.from_bytes(header, "little"), "a weight was read"
        return super().read(file, start, stop)


def test_nothing_is_read_of_weights_that_do_not_fit(published: pathlib.Path) -> None:
    folder = HeadersOnly(published)
    with pytest.raises(AssertionError, match="a weight was read"):
        load_params(folder, SMALL)
    with pytest.raises(UserError, match="has shape"):
        load_params(folder, dataclasses.replace(SMALL, intermediate_size=81))
