"""Checkpoints come back bit for bit, and only into the run that they belong to."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tests.train.small_state import (
    META,
    TX,
    WIDTH,
    abstract_state,
    assert_same_bits,
    make_state,
    save_steps,
)
from tw_jax.errors import UserError
from tw_jax.train.checkpoint import Checkpointer, restore_params
from tw_jax.train.state import apply_gradients, init_train_state

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


def test_a_reference_is_stored_only_where_there_is_one(tmp_path):
    """Else checkpoints from before there were references could not be read."""
    with_reference = dataclasses.replace(make_state(), reference=make_state(seed=5).params)
    for state, parts in (
        (make_state(), {"opt_state", "params", "skipped_updates", "step"}),
        (with_reference, {"opt_state", "params", "reference", "skipped_updates", "step"}),
    ):
        folder = tmp_path / str(len(parts))
        with Checkpointer(folder) as checkpointer:
            checkpointer.save(1, state)
            assert_same_bits(checkpointer.restore(state).state, state)
        (metadata,) = folder.glob("*/training/_METADATA")
        stored = json.loads(metadata.read_text())["tree_metadata"].values()
        assert {entry["key_metadata"][0]["key"] for entry in stored} == parts


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


def test_params_alone_on_a_mesh(tmp_path):
    states = save_steps(tmp_path, [1])
    asked = []
    place = SingleDeviceSharding(jax.devices()[0])

    def shardings(meta):
        asked.append(meta)
        return jax.tree.map(lambda _: place, states[1].params)

    params = restore_params(tmp_path, None, shardings).params
    assert_same_bits(params, states[1].params)
    assert asked == [META]
    assert all(leaf.sharding == place for leaf in jax.tree.leaves(params))


def test_reading_params_leaves_a_saving_run_alone(tmp_path):
    save_steps(tmp_path, [1])
    unfinished = tmp_path / "00000002.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert restore_params(tmp_path).step == 1
    assert unfinished.exists()


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_there(tmp_path, exists):
    path = tmp_path if exists else tmp_path / "missing"
    with pytest.raises(UserError, match="no checkpoint at .*Train a model there first") as error:
        restore_params(path)
    assert str(path) in str(error.value)
    assert path.exists() == exists


def test_nothing_there_but_runs_inside(tmp_path):
    """The folder of a quickstart holds runs."""
    for run in ("rl", "sft"):
        save_steps(tmp_path / run / "checkpoints", [1])
    with pytest.raises(UserError) as error:
        restore_params(tmp_path / "checkpoints")
    assert f"There are runs at {tmp_path / 'rl'}, {tmp_path / 'sft'}: name one." in str(error.value)


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


def test_a_setting_that_is_null_may_be_newer_than_the_checkpoint(tmp_path):
    save_steps(tmp_path, [1])
    with Checkpointer(tmp_path) as checkpointer:
        meta = {**META, "model": {**META["model"], "moe": None}}
        restored = checkpointer.restore(make_state(), expected_meta=meta)
        assert restored.data_state == {"next": 1}
        meta["model"]["moe"] = {"num_experts": 8}
        with pytest.raises(UserError, match=r"differ: model.moe \(checkpoint: absent, this run: {"):
            checkpointer.restore(make_state(), expected_meta=meta)


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
