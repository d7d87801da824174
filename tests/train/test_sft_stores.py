"""Fine-tuning on stores: the same as on the same rows in memory, and whole again after a kill."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.train.crash import crashed_and_restarted
from tw_jax.config import to_yaml
from tw_jax.data.columns import ColumnsConfig
from tw_jax.data.export_task import export_task
from tw_jax.data.pack import PackConfig, run_pack
from tw_jax.data.packing import WeightedTrie, best_fit_rows, pack_rows
from tw_jax.data.rejects import Rejects
from tw_jax.data.store_batches import StoresConfig
from tw_jax.data.trajectory_file import read_trajectories
from tw_jax.errors import UserError
from tw_jax.parallel.layout import Layout, ShardingRules
from tw_jax.tasks.registry import TaskConfig, make_task
from tw_jax.train.jsonl_tracker import read_metrics
from tw_jax.train.run_dir import new_model
from tw_jax.train.sft import SFTConfig, SFTDataConfig, run_sft
from tw_jax.train.sft_data import held_rows, training_batches, useful_tokens
from tw_jax.train.tracker import TrackerConfig
from tw_jax.train.update import MemoryConfig, nll_sum

REPOSITORY = pathlib.Path(__file__).parents[2]
ROW_LEN = 320


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A sequential and a parallel store, and the files that they were packed from."""
    folder = tmp_path_factory.mktemp("stores")
    for name, share in (("sequential", 0.0), ("parallel", 1.0)):
        export_task(make_task(TaskConfig()), "train", 60, 0, share, folder / f"{name}.jsonl")
        run_pack(
            PackConfig(
                inputs=(str(folder / f"{name}.jsonl"),),
                output=str(folder / name),
                rejects=str(folder / "rejects.jsonl"),
                row_len=ROW_LEN,
                shard_rows=8,
            )
        )
    return folder


def config_on(stores, run_dir, *names, **changes):
    mixed = {"weights": (1.0, 0.0), "final_weights": (0.0, 1.0), "ramp_rows": 20}
    mixture = StoresConfig(
        paths=tuple(str(stores / name) for name in names), **(mixed if len(names) > 1 else {})
    )
    config = SFTConfig(
        run_dir=str(run_dir),
        steps=12,
        data=SFTDataConfig(stores=mixture, row_len=ROW_LEN, rows=2),
        log_every=1,
        eval_every=6,
        checkpoint_every=4,
        tracker=TrackerConfig(tensorboard=False),
        optimizer=dataclasses.replace(SFTConfig().optimizer, warmup_steps=2),
    )
    return dataclasses.replace(config, **changes)


def losses(folder):
    rows = read_metrics(pathlib.Path(folder) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_loss_and_gradient_are_those_of_the_rows_in_memory(stores, tmp_path):
    config = config_on(stores, tmp_path, "parallel")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, epochs=1, rows=1))
    model = new_model(config.model, 0)
    tries = [
        model.schema.forest([item.trajectory])
        for item in read_trajectories(
            stores / "parallel.jsonl", model.schema, model.tokenizer, Rejects(tmp_path / "r.jsonl")
        )
    ]
    rows = best_fit_rows([len(trie) for trie in tries], ROW_LEN)
    weighted = [WeightedTrie(trie, config.data.loss.of(trie)) for trie in tries]
    in_memory = {}
    for row in rows:
        batch = pack_rows([[weighted[i] for i in row]], ROW_LEN)
        in_memory[batch.tokens.tobytes()] = batch
    sums = nll_sum(model.graphdef, MemoryConfig())
    gradient = jax.jit(jax.value_and_grad(lambda p, b: sums(p, b)[0]))
    batches = list(training_batches(config, model))
    assert len(batches) == len(rows)
    assert useful_tokens(batches) == sum(map(len, tries))
    for batch in batches[:3]:
        ours = gradient(model.params, batch)
        expected = gradient(model.params, in_memory[batch.tokens.tobytes()])
        jax.tree.map(np.testing.assert_array_equal, ours, expected)
        assert float(ours[0]) > 0


def test_a_run_that_crashed_in_mid_epoch_goes_on_bit_for_bit(stores, tmp_path):
    names = ("sequential", "parallel")
    short = {"steps": 8, "checkpoint_every": 3}
    whole = run_sft(config_on(stores, tmp_path / "whole", *names, **short))
    crashed = crashed_and_restarted(config_on(stores, tmp_path / "crashed", *names, **short), 5)
    curve = losses(tmp_path / "whole")
    assert len(curve) == 8 and curve[8] < 0.9 * curve[1]
    assert losses(tmp_path / "crashed") == curve
    jax.tree.map(np.testing.assert_array_equal, crashed.model.params, whole.model.params)


def test_an_epoch_ends_and_held_out_files_are_read(stores, tmp_path, capsys):
    config = config_on(stores, tmp_path / "run", "parallel", steps=100)
    data = dataclasses.replace(
        config.data, epochs=1, rows=4, heldout_files=(str(stores / "parallel.jsonl"),)
    )
    result = run_sft(dataclasses.replace(config, data=data))
    assert result.model.step == 60 // 4  # one trie of 285 tokens per row
    assert "The data ended after 15 of 100 steps" in capsys.readouterr().out


def test_what_a_run_cannot_use_is_refused(stores, tmp_path):
    config = config_on(stores, tmp_path / "run", "parallel", steps=4)
    with pytest.raises(ValueError, match="files or stores, not both"):
        dataclasses.replace(config.data, files=("a.jsonl",))
    with pytest.raises(UserError, match=r"set data\.row_len=320"):
        run_sft(dataclasses.replace(config, data=dataclasses.replace(config.data, row_len=512)))


def test_files_are_cut_and_their_fields_named(tmp_path):
    """What `data.files` reads goes through the same rule for what is too long."""
    source = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": "1=", "response": "12\n" * 200})] * 4
    source.write_text("\n".join(lines) + "\n")
    data = SFTDataConfig(
        files=(str(source),), columns=ColumnsConfig(prompt="question"), too_long="cut",
        row_len=ROW_LEN, rows=1, epochs=1, window=1,
    )  # fmt: skip
    config = SFTConfig(run_dir=str(tmp_path), data=data)
    model = new_model(config.model, 0)
    batches = list(training_batches(config, model))
    assert len(batches) == 4
    for batch in batches:
        cut = len("^1=") + ROW_LEN // 3 * 3 - 3  # whole lines of three tokens
        assert useful_tokens([batch]) == cut
        assert model.schema.eos_id not in batch.tokens
    with pytest.raises(UserError, match="no trajectory fits a row"):
        skip = dataclasses.replace(data, too_long="skip")
        training_batches(dataclasses.replace(config, data=skip), model)


def test_a_store_that_changed_under_a_run_is_refused(stores, tmp_path):
    for count in (60, 40):
        export_task(make_task(TaskConfig()), "train", count, 0, 1.0, tmp_path / "data.jsonl")
        packed = PackConfig(
            inputs=(str(tmp_path / "data.jsonl"),), output=str(tmp_path / f"packed{count}"),
            rejects=str(tmp_path / "rejects.jsonl"), row_len=ROW_LEN,
        )  # fmt: skip
        run_pack(packed)
    (tmp_path / "packed60").rename(tmp_path / "store")
    config = config_on(tmp_path, tmp_path / "run", "store", steps=4)
    run_sft(config)
    (tmp_path / "store").rename(tmp_path / "before")
    (tmp_path / "packed40").rename(tmp_path / "store")
    with pytest.raises(UserError, match="stores"):
        run_sft(dataclasses.replace(config, steps=8))


def test_a_process_reads_the_rows_of_its_own_devices_only():
    """Two of four devices: rows over `fsdp`, their tokens over `context`."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

    class Sharding(jax.sharding.NamedSharding):
        def addressable_devices_indices_map(self, global_shape):
            assert global_shape == (8, ROW_LEN)
            half = slice(0, ROW_LEN // 2), slice(ROW_LEN // 2, ROW_LEN)
            return {"a": (slice(4, 6), half[0]), "b": (slice(4, 6), half[1])}

    class TwoOfFour(Layout):
        def sharding(self, axes):
            assert axes == ("batch", "length")
            return Sharding(mesh, jax.sharding.PartitionSpec())

    assert held_rows(TwoOfFour(mesh, ShardingRules()), 8, ROW_LEN) == [4, 5]


@pytest.mark.slow
def test_kill_9_in_mid_epoch_goes_on_bit_for_bit(stores, tmp_path):
    names = ("sequential", "parallel")
    run_sft(config_on(stores, tmp_path / "whole", *names, steps=40))
    config = config_on(stores, tmp_path / "killed", *names, steps=40)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "tw_jax.cli", "sft", str(tmp_path / "config.yaml")]
    for logged in (6, 21):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        metrics = tmp_path / "killed/metrics.jsonl"
        while not metrics.exists() or len(losses(tmp_path / "killed")) < logged:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_read_their_own_rows_and_train_as_one(stores, tmp_path):
    found = {}
    for name, words, environ in (
        ("one", [sys.executable, "-m", "tw_jax.cli"], {}),
        (
            "two",
            [str(REPOSITORY / "launch/local_multiprocess.sh"), "2", "4"],
            {"TW_JAX": f"{sys.executable} -m tw_jax.cli"},
        ),
    ):
        config = config_on(stores, tmp_path / name, "sequential", "parallel", steps=3)
        data = dataclasses.replace(config.data, rows=8)
        (tmp_path / f"{name}.yaml").write_text(to_yaml(dataclasses.replace(config, data=data)))
        done = subprocess.run(
            [*words, "sft", str(tmp_path / f"{name}.yaml")],
            cwd=REPOSITORY,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environ},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    for one, two in zip(found["one"], found["two"], strict=True):
        for key in ("loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)
