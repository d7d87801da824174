"""`tw-jax data pack`: what the store holds, what is refused, and that a kill changes nothing."""

import dataclasses
import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.random_trajectories import BLOCKS
from tw_jax.config import to_yaml
from tw_jax.data.export_task import export_task
from tw_jax.data.only_process import only_process
from tw_jax.data.pack import PackConfig, run_pack
from tw_jax.data.packing import PADDING_KIND, best_fit_rows
from tw_jax.data.rejects import Rejects
from tw_jax.data.store import PackedStore
from tw_jax.data.trajectory_file import TrajectoryRecord, read_trajectories, write_trajectories
from tw_jax.errors import UserError
from tw_jax.tasks.registry import TaskConfig, make_task

BAD_LINES = (
    "not json",
    json.dumps({"prompt": 1}),
    json.dumps({"prompt": "1=", "response": "<Parallel>"}),
    json.dumps({"prompt": "1=", "response": "\N{SNOWMAN}"}),
)


def write_source(path, count, *, bad_every=0, seed=0):
    """Solved problems with ids; now and then a bad line or an id that came before."""
    export_task(make_task(TaskConfig()), "train", count, seed, 0.5, path)
    if bad_every:
        lines = path.read_text().splitlines()
        mixed = []
        for number, line in enumerate(lines):
            mixed.append(line)
            if number % bad_every == bad_every - 1:
                mixed += [BAD_LINES[number // bad_every % len(BAD_LINES)], lines[number // 2]]
        path.write_text("\n".join(mixed) + "\n")
    return path


def config_of(tmp_path, *sources, **changes):
    return dataclasses.replace(
        PackConfig(
            inputs=tuple(map(str, sources)),
            output=str(tmp_path / "store"),
            rejects=str(tmp_path / "rejects.jsonl"),
            row_len=600,
            window=40,
            shard_rows=8,
        ),
        **changes,
    )


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file()
    }


def stored_tries(store, schema_depth=0):
    """(tokens, positions, parent, visible_end, kind) of every trie, found by its root prompt."""
    found = []
    for start in range(0, len(store), 64):
        rows = store.read_rows(range(start, min(start + 64, len(store))))
        for r in range(len(rows["tokens"])):
            used = np.flatnonzero(rows["kind"][r] != PADDING_KIND)
            own = np.arange(rows["tokens"].shape[1])
            roots = [i for i in used if rows["parent"][r, i] == own[i]]
            for begin in roots:
                end = rows["visible_end"][r, begin]
                span = slice(begin, end)
                found.append(
                    (
                        tuple(rows["tokens"][r, span]),
                        tuple(rows["positions"][r, span]),
                        tuple(rows["parent"][r, span] - begin),
                        tuple(rows["visible_end"][r, span] - begin),
                        tuple(rows["kind"][r, span]),
                    )
                )
    return sorted(found)


def test_the_store_holds_every_good_trajectory_once(tmp_path, tokenizer, schema, capsys):
    source = write_source(tmp_path / "data.jsonl", 150, bad_every=10)
    manifest = run_pack(config_of(tmp_path, source))
    store = PackedStore(str(tmp_path / "store"))
    rejects = Rejects(tmp_path / "expected.jsonl")
    tries = [
        schema.forest([item.trajectory])
        for item in read_trajectories(source, schema, tokenizer, rejects)
    ]
    expected = sorted(
        tuple(map(tuple, (t.tokens, t.positions, t.parent, t.visible_end, t.kind))) for t in tries
    )
    assert stored_tries(store) == expected
    assert manifest.rejects == dict(rejects.counts)
    assert set(rejects.counts) == {
        "malformed_json", "wrong_type", "unclosed_block", "unknown_characters", "duplicate_id",
    }  # fmt: skip
    assert (tmp_path / "rejects.jsonl").read_text() == (tmp_path / "expected.jsonl").read_text()
    assert manifest.counts["trie_tokens"] == sum(map(len, tries))
    assert manifest.efficiency == sum(map(len, tries)) / (manifest.rows * 600)
    assert manifest.statistics["blocks_per_trajectory"] == pytest.approx(0.5, abs=0.1)
    assert manifest.inputs[0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    files = hashes(tmp_path / "store")
    del files["manifest.json"]
    assert manifest.sha256 == files
    assert "150 of 180 records" in capsys.readouterr().out


def test_waiting_tries_make_rows_fuller(tmp_path):
    lengths = np.random.default_rng(0).integers(50, 500, 400).tolist()
    source = tmp_path / "data.jsonl"
    write_trajectories(source, [TrajectoryRecord("1=", "2" * n) for n in lengths])
    packed = run_pack(config_of(tmp_path, source, window=20))
    trie_lens = [n + len("^1=$") for n in lengths]
    windows = [trie_lens[i : i + 20] for i in range(0, 400, 20)]
    each_by_itself = sum(len(best_fit_rows(window, 600)) for window in windows)
    assert packed.counts["trie_tokens"] == sum(trie_lens)
    assert packed.rows < 0.97 * each_by_itself


@pytest.mark.parametrize("name", ["threadweaver", "native", "apr"])
def test_every_schema_over_long_included(tmp_path, languages, name):
    tokenizer, schema = languages[name]
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(str(folder))
    block = BLOCKS[name]((("a", "x+1"), ("b", "y+22")))
    source = tmp_path / "data.jsonl"
    write_trajectories(
        source,
        [TrajectoryRecord(f"{i}=", f"q\n{block}\n" * (i % 9 + 1) + f"z#{i}") for i in range(60)],
    )
    config = config_of(tmp_path, source, schema=name, tokenizer=str(folder), row_len=300)
    kept = {}
    for how in ("skip", "cut", "split"):
        manifest = run_pack(dataclasses.replace(config, too_long=how, output=str(tmp_path / how)))
        store, counts = PackedStore(str(tmp_path / how)), manifest.counts
        assert manifest.hidden_depth == (1 if name == "native" else 0)
        assert ("hidden_end" in store.read_rows([0])) == (name == "native")
        kept[how] = counts["trie_tokens"]
        over_long = counts["skipped" if how == "skip" else how]
        assert over_long > 0
        assert manifest.rejects.get("too_long", 0) == (over_long if how == "skip" else 0)
        assert (counts["dropped_tokens"] > 0) == (how == "cut")
    assert kept["skip"] < kept["cut"] < kept["split"]


def test_a_run_that_stopped_goes_on_to_the_same_bytes(tmp_path):
    """It stops at a run of bad lines, goes on when they are admitted, and forgets nothing."""
    sources = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_source(sources[0], 170, bad_every=20)
    write_source(sources[1], 150, seed=1)
    lines = sources[1].read_text().splitlines()
    # A bad record takes no id: the one behind may have it. A good one does.
    broken, mended = (
        json.dumps({"prompt": "1=", "response": response, "id": "x"})
        for response in ("<Parallel>", "1")
    )
    lines = [broken, *lines[:90], *["bad"] * 400, *lines[90:], mended, lines[3], mended]
    sources[1].write_text("\n".join(lines) + "\n")
    whole = config_of(tmp_path, *sources, max_reject_share=1.0)
    manifest = run_pack(dataclasses.replace(whole, output=str(tmp_path / "whole")))
    assert [item["trajectories"] for item in manifest.inputs] == [170, 151]
    expected_rejects = (tmp_path / "rejects.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"max_reject_share=0\.5"):
        run_pack(dataclasses.replace(whole, max_reject_share=0.5))
    assert not (tmp_path / "store/manifest.json").exists()
    assert len(list((tmp_path / "store/journal").glob("*.json"))) > 5
    with pytest.raises(UserError, match=r"run the same command again"):
        PackedStore(str(tmp_path / "store"))
    with pytest.raises(UserError, match=r"begun with other settings \(window\)"):
        run_pack(dataclasses.replace(whole, window=41))
    run_pack(whole)
    assert hashes(tmp_path / "store") == hashes(tmp_path / "whole")
    assert (tmp_path / "rejects.jsonl").read_bytes() == expected_rejects


def test_a_finished_store_is_verified_and_never_overwritten(tmp_path, capsys):
    source = write_source(tmp_path / "data.jsonl", 60)
    config = config_of(tmp_path, source)
    run_pack(config)
    before = hashes(tmp_path / "store")
    run_pack(config)
    assert "every file is what its manifest says" in capsys.readouterr().out
    assert hashes(tmp_path / "store") == before
    with pytest.raises(UserError, match=r"finished store of other settings \(too_long\)"):
        run_pack(dataclasses.replace(config, too_long="cut"))
    source.write_text(source.read_text() + '{"prompt": "1=", "response": "1"}\n')
    with pytest.raises(UserError, match=r"finished store of other settings \(inputs\)"):
        run_pack(config)
    write_source(source, 60)
    shard = tmp_path / "store/tokens/c/1/0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="tokens/c/1/0 is not what its manifest says"):
        run_pack(config)


def test_bad_input_and_bad_places_are_refused(tmp_path):
    good = write_source(tmp_path / "good.jsonl", 5)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    with pytest.raises(UserError, match=r"bad\.jsonl holds no trajectory.*malformed_json"):
        run_pack(config_of(tmp_path, good, bad))
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl"):
        run_pack(config_of(tmp_path, tmp_path / "none.jsonl"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and no store"):
        run_pack(config_of(tmp_path, good, output=str(tmp_path / "full")))
    with pytest.raises(UserError, match="cannot open the store nowhere://x"):
        run_pack(config_of(tmp_path, good, output="nowhere://x"))
    with pytest.raises(UserError, match="no usable Hugging Face tokenizer"):
        run_pack(config_of(tmp_path, good, tokenizer=str(tmp_path / "full")))
    with pytest.raises(ValueError, match="inputs"):
        PackConfig()
    for field, value in (("window", 0), ("shard_rows", 0), ("workers", 0), ("row_len", 0)):
        with pytest.raises(ValueError, match=field):
            config_of(tmp_path, good, **{field: value})


def test_a_store_is_packed_by_one_process_at_a_time(tmp_path):
    source = write_source(tmp_path / "data.jsonl", 4)
    with only_process(tmp_path / "store", setting="output", work="packing this store"):
        with pytest.raises(UserError, match="another process is packing this store"):
            run_pack(config_of(tmp_path, source))
    assert run_pack(config_of(tmp_path, source)).counts["trajectories"] == 4
    assert not (tmp_path / "store" / "journal").exists()
    with pytest.raises(UserError, match="no folder can be made there"):
        run_pack(config_of(tmp_path, source, output=str(source)))


def test_statistics_are_those_of_what_rows_hold(tmp_path, capsys):
    source = tmp_path / "data.jsonl"
    export_task(make_task(TaskConfig()), "train", 30, 0, 1.0, source)
    manifest = run_pack(config_of(tmp_path, source, row_len=150, too_long="split"))
    assert manifest.counts["dropped_blocks"] == 30
    assert manifest.statistics["parallel_ratio"] == manifest.statistics["activation_ratio"] == 0
    assert "30 parallel blocks are not in the store" in capsys.readouterr().out
    whole = run_pack(config_of(tmp_path, source, output=str(tmp_path / "whole")))
    assert whole.statistics["activation_ratio"] == 1
    assert "are not in the store" not in capsys.readouterr().out


def test_what_is_not_canonical_is_packed_only_on_request(tmp_path):
    source = write_source(tmp_path / "data.jsonl", 20)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    place = next(i for i, line in enumerate(lines) if "<Thread>" in line["response"])
    loose = lines[place]["response"].replace("<Outline>2:", "<Outline>3:", 1)
    loose = loose.replace("<Thread>\n2:", "<Thread>\n3:", 1)
    lines[place]["response"] = loose
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = run_pack(config_of(tmp_path, source))
    assert manifest.rejects == {"outline_numbering": 1} and manifest.counts["trajectories"] == 19
    (entry,) = [json.loads(line) for line in (tmp_path / "rejects.jsonl").open()]
    assert entry["line"] == place + 1 and "'3'" in entry["message"]
    free = config_of(tmp_path, source, strict=False, output=str(tmp_path / "free"))
    assert run_pack(free).counts["trajectories"] == 20


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tmp_path):
    source = write_source(tmp_path / "data.jsonl", 300, bad_every=7)
    one = config_of(tmp_path, source, output=str(tmp_path / "one"))
    run_pack(one)
    rejects = (tmp_path / "rejects.jsonl").read_bytes()
    run_pack(dataclasses.replace(one, output=str(tmp_path / "two"), workers=2))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert (tmp_path / "rejects.jsonl").read_bytes() == rejects


COMMAND = """
import sys
from tw_jax.config import load_config
from tw_jax.data.pack import PackConfig, run_pack
run_pack(load_config(PackConfig, sys.argv[1], []))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_no_byte(tmp_path):
    source = write_source(tmp_path / "data.jsonl", 2500, bad_every=50)
    config = config_of(tmp_path, source, too_long="cut", row_len=256, window=100)
    run_pack(dataclasses.replace(config, output=str(tmp_path / "whole")))
    expected_rejects = (tmp_path / "rejects.jsonl").read_bytes()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "config.yaml")]
    store, killed = tmp_path / "store", 0
    # What exists at the moment of the kill; a run goes on for some milliseconds behind each.
    for sign, delay_s in (
        ("journal/settings.json", 0.0),
        ("tokens/zarr.json", 0.0),
        ("journal/00000001.npz", 0.0),
        ("visible_end/c/25/0", 0.002),
        ("journal/00000006.json", 0.005),
        ("tokens/c/60/0", 0.0),
    ):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and not (store / sign).exists():
            time.sleep(0.0005)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        killed += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), output.decode()
    assert killed >= 5
    assert not (store / "manifest.json").exists()
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "going on behind" in finished.stdout
    assert hashes(store) == hashes(tmp_path / "whole")
    assert (tmp_path / "rejects.jsonl").read_bytes() == expected_rejects
