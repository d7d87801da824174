"""Damaged, unwritable and interrupted checkpoints."""

import errno
import logging
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.small_state import META, assert_same_bits, make_state, save_steps
from tw_jax.errors import UserError
from tw_jax.train import checkpoint_record, checkpoint_storage
from tw_jax.train.checkpoint import Checkpointer, restore_params
from tw_jax.train.state import init_train_state

# Reading damaged files, orbax leaves unfinished coroutines behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# --- damage -------------------------------------------------------------------------------------

BIG = 256  # wide enough for weights to be stored apart from the index


def truncate(path: pathlib.Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip_bit(path: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def delete(path: pathlib.Path, rng: random.Random) -> None:
    del rng
    path.unlink()


def largest_file(directory: pathlib.Path, step: int, item: str) -> pathlib.Path:
    files = (directory / f"{step:08d}" / item).rglob("*")
    return max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    return directory, save_steps(directory, [10, 20], width=BIG)


@pytest.mark.parametrize("hurt", [truncate, flip_bit, delete])
@pytest.mark.parametrize("item", ["params", "training", "record"])
def test_a_damaged_newest_step_is_reported_and_the_one_before_used(
    two_steps, tmp_path, caplog, hurt, item
):
    source, states = two_steps
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    hurt(largest_file(tmp_path, 20, item), random.Random(0))
    with Checkpointer(tmp_path) as checkpointer, caplog.at_level(logging.WARNING):
        restored = checkpointer.restore(make_state(BIG), expected_meta=META)
        assert_same_bits(restored.state, states[10])
        assert restored.data_state == {"next": 10}
        assert re.search(
            r"checkpoint of step 20 in .* is damaged \(.+\); using step 10 instead", caplog.text
        )
        assert (tmp_path / "00000020.corrupt").exists()
        # Training reaches step 20 again and can save it.
        checkpointer.save(20, states[20], data_state={"next": 20}, meta=META)
        assert_same_bits(checkpointer.restore(make_state(BIG)).state, states[20])


@pytest.mark.parametrize("seed", range(8))
def test_damage_anywhere_never_goes_unseen(two_steps, tmp_path, seed):
    source, states = two_steps
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    rng = random.Random(seed)
    files = sorted(p for p in (tmp_path / "00000020").rglob("*") if p.is_file())
    rng.choice([truncate, flip_bit, delete])(rng.choice(files), rng)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(make_state(BIG), expected_meta=META)
    # Either the file holds nothing that matters, or the step before is used.
    assert_same_bits(restored.state, states[restored.data_state["next"]])


def test_damaged_newer_steps_are_skipped_by_readers_and_left_in_place(two_steps, tmp_path, caplog):
    source, states = two_steps
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    flip_bit(largest_file(tmp_path, 20, "params"), random.Random(0))
    assert_same_bits(restore_params(tmp_path).params, states[10].params)
    assert "using step 10 instead" in caplog.text
    assert (tmp_path / "00000020").exists()


def test_a_damaged_step_asked_for_by_name_is_an_error(two_steps, tmp_path):
    source, _ = two_steps
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    flip_bit(largest_file(tmp_path, 20, "params"), random.Random(0))
    with pytest.raises(
        UserError,
        match=r"step 20: array params/\S+ does not match its checksum. "
        r"Remedy: choose another step \(10\)",
    ):
        restore_params(tmp_path, 20)


def test_all_steps_damaged(two_steps, tmp_path):
    source, _ = two_steps
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    for step in (10, 20):
        truncate(largest_file(tmp_path, step, "record"), random.Random(0))
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError) as error:
        checkpointer.restore(make_state(BIG))
    assert "no usable checkpoint" in str(error.value)
    assert "step 20: JSONDecodeError" in str(error.value)
    assert "step 10: JSONDecodeError" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000010", "00000020"]


def test_lack_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2])

    def out_of_memory(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(checkpoint_storage, "check_content", out_of_memory)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(jax.errors.JaxRuntimeError):
        checkpointer.restore(make_state())
    assert (tmp_path / "00000002").exists()


@given(
    dtype=st.sampled_from(["float32", "bfloat16", "int32", "uint8", "bool"]),
    shape=st.sampled_from([(), (1,), (3, 5), (2, 2, 3)]),
    data=st.data(),
)
@settings(max_examples=30)
def test_checksum_sees_every_single_change_and_every_swap(dtype, shape, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = rng.integers(0, 2 if dtype == "bool" else 200, shape).astype(jnp.dtype(dtype))
    flat = values.reshape(-1)
    i, j = (data.draw(st.integers(0, flat.size - 1)) for _ in range(2))
    changed = flat.copy()
    changed[i] = not changed[i] if dtype == "bool" else changed[i] + changed.dtype.type(1)
    swapped = flat.copy()
    swapped[[i, j]] = swapped[[j, i]]
    sums = {
        name: checkpoint_record.describe_arrays({"x": jnp.asarray(v.reshape(shape))})["x"].checksum
        for name, v in {"values": values, "changed": changed, "swapped": swapped}.items()
    }
    assert sums["values"] != sums["changed"]
    assert (sums["values"] == sums["swapped"]) == (flat[i] == flat[j])


# --- disks and signals --------------------------------------------------------------------------


def test_a_full_disk_is_one_message_and_earlier_steps_stay(tmp_path, monkeypatch):
    states = save_steps(tmp_path, [10, 20])

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", no_space)
            with pytest.raises(UserError) as error:
                checkpointer.save(30, make_state(), meta=META)
        assert str(error.value) == (
            f"cannot write the checkpoint of step 30 (about 0.0 MB) to {tmp_path}: No space left "
            "on device. Checkpoints of steps 10, 20 are intact; once the cause is mended, the same "
            "command goes on from step 20"
        )
        assert_same_bits(checkpointer.restore(make_state()).state, states[20])
        checkpointer.save(30, states[10])
        assert checkpointer.latest_step() == 30


def test_a_failed_last_save_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, caplog):
    wait = ocp.CheckpointManager.wait_until_finished
    failures = iter([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])

    def fail_once(self):
        for failure in failures:
            raise failure
        wait(self)

    with pytest.raises(KeyboardInterrupt), Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(checkpoint_storage, "start_save", lambda *args: None)
        monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fail_once)
        checkpointer.save(2, make_state())
        raise KeyboardInterrupt
    assert "cannot write the checkpoint of step 2" in caplog.text


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        raise ValueError("not of the file system's making")

    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(ocp.CheckpointManager, "save", bug)
        with pytest.raises(ValueError, match="not of the file system's making"):
            checkpointer.save(1, make_state())


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints to .*/file/checkpoints: "):
        Checkpointer(tmp_path / "file" / "checkpoints")


PROGRAM = """
import resource, sys
import jax.numpy as jnp
import numpy as np
import optax
from tw_jax.errors import UserError
from tw_jax.train.checkpoint import Checkpointer
from tw_jax.train.state import init_train_state

def state(step):
    w = np.random.default_rng(step).normal(size=(300, 1000))
    return init_train_state({"w": jnp.asarray(w, jnp.float32)}, optax.identity())

"""


def run_program(text: str, directory: pathlib.Path, **kwargs):
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + text, str(directory)],
        cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_a_file_size_limit_is_one_message_and_earlier_steps_stay(tmp_path):
    program = run_program(
        """
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, state(1))
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
    checkpointer.save(2, state(2))
    try:
        checkpointer.wait()
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    restored = checkpointer.restore(state(0)).state
    assert np.array_equal(restored.params["w"], state(1).params["w"])
    checkpointer.save(2, state(2))
""",
        tmp_path,
    )
    out, err = program.communicate(timeout=60)
    assert program.returncode == 0, err
    assert out == (
        f"cannot write the checkpoint of step 2 (about 1.2 MB) to {tmp_path}: File too large. "
        "Checkpoints of steps 1 are intact; once the cause is mended, the same command goes on "
        "from step 1\n"
    )
    assert "File too large" not in err  # orbax's threads do not tell it again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002"]


def test_kill_9_leaves_whole_steps(tmp_path):
    program = run_program(
        """
with Checkpointer(sys.argv[1], keep=2) as checkpointer:
    for step in range(1, 10_000):
        checkpointer.save(step, state(step))
        print(step, flush=True)
""",
        tmp_path,
    )
    assert program.stdout is not None
    for line in program.stdout:
        if int(line) == 8:
            break
    time.sleep(0.03)  # into the background write
    program.kill()
    program.communicate(timeout=60)
    wanted = init_train_state({"w": jnp.zeros((300, 1000))}, optax.identity())
    with Checkpointer(tmp_path) as checkpointer:
        latest = checkpointer.latest_step()
        assert latest is not None and latest >= 6
        params = checkpointer.restore(wanted).state.params
        values = np.random.default_rng(latest).normal(size=(300, 1000)).astype(np.float32)
        assert np.array_equal(params["w"], values)
    assert not list(tmp_path.glob("*tmp*"))
