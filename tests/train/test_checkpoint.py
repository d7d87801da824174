"""Checkpoints: exact, verified, and clear about what is wrong."""

import errno
import functools
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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tw_jax.errors import UserError
from tw_jax.train import checkpoint_record, checkpoint_storage
from tw_jax.train.checkpoint import Checkpointer, restore_params
from tw_jax.train.optimizer import OptimizerConfig, make_optimizer
from tw_jax.train.state import TrainState, apply_gradients, init_train_state

# Reading damaged files, orbax leaves unfinished coroutines behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

WIDTH = 8
META = {"model": {"hidden_size": WIDTH, "rope_theta": 1e4, "compute_dtype": "float32"}, "seed": 3}
TX = make_optimizer(OptimizerConfig(learning_rate=1e-2), 100)


@functools.cache
def abstract_state(width: int) -> TrainState:
    params = {
        "embed_tokens": {"embedding": jnp.zeros((16, width))},
        "layers": {
            "mlp": {"kernel": jnp.zeros((2, width, 12), jnp.bfloat16)},
            "norm": {"scale": jnp.zeros((2, width))},
        },
    }
    return jax.eval_shape(lambda p: init_train_state(p, TX), params)


def make_state(width: int = WIDTH, seed: int = 0) -> TrainState:
    """A state whose every array holds random bits, made without compiling anything."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 100, x.dtype), abstract_state(width)
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype and x.shape == y.shape, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def save_steps(directory, steps, *, keep=5, width=WIDTH):
    states = {step: make_state(width, seed=step) for step in steps}
    with Checkpointer(directory, keep=keep) as checkpointer:
        for step, state in states.items():
            checkpointer.save(step, state, data_state={"next": step}, meta=META)
    return states


# --- save and restore ---------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [True, False])
def test_restores_every_bit(tmp_path, abstract):
    state = make_state()
    wanted = abstract_state(WIDTH) if abstract else make_state(seed=9)
    data_state = {"window_start": {"next_index": 12, "exhausted": False}, "rows_taken": 3}
    with Checkpointer(tmp_path / "new" / "run") as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(7, state, data_state=data_state, meta=META)
        assert checkpointer.latest_step() == 7
    with Checkpointer(tmp_path / "new" / "run") as checkpointer:
        restored, position, meta = checkpointer.restore(wanted, expected_meta=META)
    assert_same_bits(restored, state)
    assert position == data_state
    assert meta == META


def test_data_state_may_be_bytes_or_nothing(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(), data_state=b"\x00\xff grain")
        assert checkpointer.restore(make_state()).data_state == b"\x00\xff grain"
        checkpointer.save(2, make_state())
        assert checkpointer.restore(make_state()).data_state is None


def test_training_goes_on_bit_for_bit(tmp_path):
    @jax.jit
    def train_step(state):
        grads = jax.tree.map(lambda p: jnp.sin(p + state.step.astype(p.dtype)), state.params)
        return apply_gradients(state, grads, TX)[0]

    state = make_state()
    for step in range(6):
        if step == 3:
            with Checkpointer(tmp_path) as checkpointer:
                checkpointer.save(3, state)
        state = train_step(state)
    with Checkpointer(tmp_path) as checkpointer:
        again = checkpointer.restore(make_state()).state
    for _ in range(3):
        again = train_step(again)
    assert_same_bits(again, state)


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(512, 1024)), jnp.float32)}
    state = jax.jit(lambda p: init_train_state(p, TX))(params)
    before = jax.tree.map(lambda x: np.array(x, copy=True), state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        for _ in range(3):
            state = overwrite(state)
        restored = checkpointer.restore(state).state
    assert_same_bits(restored, before)


def test_keeps_the_newest(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000003", "00000004"]


def test_an_older_step_can_be_named(tmp_path):
    states = save_steps(tmp_path, [10, 20])
    with Checkpointer(tmp_path) as checkpointer:
        assert_same_bits(checkpointer.restore(make_state(), step=10).state, states[10])
        with pytest.raises(
            UserError, match=r"no checkpoint of step 15 in .*; there are steps 10, 20"
        ):
            checkpointer.restore(make_state(), step=15)


def test_saving_the_current_step_again_does_nothing(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state)
        checkpointer.save(5, state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(state)
        checkpointer.save(5, state)
        assert checkpointer.latest_step() == 5


def test_steps_of_another_run_are_not_mixed_in(tmp_path):
    save_steps(tmp_path, [20])
    with Checkpointer(tmp_path) as checkpointer:
        for step in (10, 20):
            with pytest.raises(UserError, match="already holds a checkpoint of step 20"):
                checkpointer.save(step, make_state())


def test_another_topology_reshards(tmp_path):
    # One device in the plain suite; XLA_FLAGS=--xla_force_host_platform_device_count=8 gives more.
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(len(devices) * 2, 3)))}
    state = init_train_state(state, TX)

    def placed(axis):
        def sharding(x):
            return NamedSharding(mesh, PartitionSpec(axis) if x.ndim else PartitionSpec())

        return jax.tree.map(sharding, state)

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, jax.device_put(state, placed("data")))
        for axis in ("data", None):
            wanted = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed(axis)
            )
            restored = checkpointer.restore(wanted).state
            assert_same_bits(restored, state)
            assert jax.tree.map(lambda x: x.sharding, restored) == placed(axis)
        assert_same_bits(checkpointer.restore(jax.eval_shape(lambda s: s, state)).state, state)


# --- parameters alone ---------------------------------------------------------------------------


def test_params_alone(tmp_path):
    states = save_steps(tmp_path, [1, 2])
    params, meta, step = restore_params(tmp_path)
    assert_same_bits(params, states[2].params)
    assert (meta, step) == (META, 2)
    assert_same_bits(restore_params(tmp_path, 1).params, states[1].params)
    assert_same_bits(
        restore_params(tmp_path, abstract_params=make_state().params).params, states[2].params
    )


def test_reading_params_leaves_a_saving_run_alone(tmp_path):
    save_steps(tmp_path, [1])
    unfinished = tmp_path / "00000002.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert restore_params(tmp_path).step == 1
    assert unfinished.exists()


def test_params_of_other_shapes_are_refused(tmp_path):
    save_steps(tmp_path, [1])
    with pytest.raises(UserError, match=r"params/embed_tokens/embedding \(checkpoint: float32"):
        restore_params(tmp_path, abstract_params=make_state(width=4).params)


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_there(tmp_path, exists):
    path = tmp_path if exists else tmp_path / "missing"
    with pytest.raises(UserError, match="no checkpoint at .*Train a model there first") as error:
        restore_params(path)
    assert str(path) in str(error.value)
    assert path.exists() == exists


def test_restore_without_a_checkpoint(tmp_path):
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UserError, match="no checkpoint at .*holds no complete checkpoint"),
    ):
        checkpointer.restore(make_state())


# --- another model ------------------------------------------------------------------------------


def test_another_width_is_named(tmp_path):
    save_steps(tmp_path, [1])
    meta = {"model": {**META["model"], "hidden_size": 4}, "seed": 3}
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UserError) as error,
    ):
        checkpointer.restore(make_state(width=4), expected_meta=meta)
    assert str(error.value) == (
        f"the checkpoint of step 1 in {tmp_path} does not fit this run. First array that differs: "
        "params/embed_tokens/embedding (checkpoint: float32[16, 8], this run: float32[16, 4]). "
        "Settings that differ: model.hidden_size (checkpoint: 8, this run: 4). Use the settings "
        "that the checkpoint was trained with, or give the new run another directory"
    )


def test_equal_shapes_with_another_meaning_are_refused(tmp_path):
    save_steps(tmp_path, [1])
    meta = {"model": {**META["model"], "rope_theta": 1e6}, "seed": 4}
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(
            UserError,
            match=r"Settings that differ: model.rope_theta \(checkpoint: 1000"
            r"0.0, this run: 1000000.0\); seed \(checkpoint: 3, this run: 4\)",
        ),
    ):
        checkpointer.restore(make_state(), expected_meta=meta)


def test_a_setting_that_is_new_is_refused_and_a_free_one_may_change(tmp_path):
    save_steps(tmp_path, [1])
    model = {**META["model"], "compute_dtype": "bfloat16"}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore(make_state(), expected_meta={"model": model})
        # A field that did not exist then says nothing new when it is null.
        checkpointer.restore(make_state(), expected_meta={"model": {**model, "moe": None}})
        with pytest.raises(UserError, match=r"schema \(checkpoint: absent, this run: apr\)"):
            checkpointer.restore(make_state(), expected_meta={"schema": "apr"})


def test_another_optimizer_is_named(tmp_path):
    save_steps(tmp_path, [1])
    other = init_train_state(make_state().params, optax.sgd(0.1, momentum=0.9))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(UserError, match=r"training/opt_state/\S+ .*The optimizer is another one"),
    ):
        checkpointer.restore(other, expected_meta=META)


def test_a_mismatch_is_not_taken_for_damage(tmp_path):
    save_steps(tmp_path, [1, 2])
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match="step 2"):
        checkpointer.restore(make_state(width=4))
    assert (tmp_path / "00000002").exists()


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
