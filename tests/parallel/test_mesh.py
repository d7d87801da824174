import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from tw_jax.errors import UserError
from tw_jax.parallel import MESH_AXES, Layout, ParallelConfig, ShardingRules, make_layout
from tw_jax.parallel.processes import join_processes


def abstract_layout(**sizes) -> Layout:
    """A layout on a mesh without devices, for what can be decided from sizes alone."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return Layout(jax.sharding.AbstractMesh(shape, MESH_AXES, axis_types), ShardingRules())


@pytest.mark.parametrize(
    "config, devices, expected",
    [
        (ParallelConfig(), 8, {"fsdp": 8}),
        (ParallelConfig("fsdp", fsdp=4), 8, {"data": 2, "fsdp": 4}),
        (ParallelConfig("fsdp_tensor"), 8, {"fsdp": 4, "tensor": 2}),
        (ParallelConfig("fsdp_tensor", tensor=4, data=2), 16, {"data": 2, "fsdp": 2, "tensor": 4}),
        (ParallelConfig("tensor"), 4, {"tensor": 4}),
        (ParallelConfig("expert", tensor=2), 8, {"expert": 4, "tensor": 2}),
        (ParallelConfig("context", fsdp=2), 8, {"context": 4, "fsdp": 2}),
    ],
)
def test_sizes(config, devices, expected):
    assert {a: n for a, n in config.sizes(devices).items() if n > 1} == expected


@pytest.mark.parametrize(
    "config", [ParallelConfig("fsdp", tensor=3), ParallelConfig("tensor", tensor=16)]
)
def test_sizes_that_do_not_fit_are_refused(config):
    with pytest.raises(UserError, match="does not use the 8 devices.*product is 8"):
        config.sizes(8)


def test_one_device_needs_no_mesh():
    assert make_layout(ParallelConfig()) is None
    layout = make_layout(ParallelConfig(), always=True)
    assert layout is not None and layout.describe() == "1 device"


def test_a_mesh_axis_is_used_once_by_the_first_that_asks():
    layout = abstract_layout(fsdp=4, tensor=2)
    assert layout.spec(("embed", "heads")) == P("fsdp", "tensor")
    assert layout.spec(("batch", "residual_length", "embed")) == P("fsdp", None, None)
    assert layout.spec(("norm",)) == P(None)


def test_weights_are_spread_over_context_and_expert_too():
    layout = abstract_layout(fsdp=2, context=2, expert=2)
    assert layout.spec(("embed", "mlp")) == P(("fsdp", "context", "expert"), None)
    assert layout.spec(("experts", "embed", "mlp")) == P("expert", ("fsdp", "context"), None)


def test_a_parameter_that_does_not_divide_is_named():
    layout = abstract_layout(tensor=4)
    axes = {"layers": {"q_proj": {"kernel": ("embed", "heads")}}}
    shapes = {"layers": {"q_proj": {"kernel": jax.ShapeDtypeStruct((8, 6), np.float32)}}}
    with pytest.raises(UserError, match=r"layers/q_proj/kernel has 6 along its axis 'heads'.*4"):
        layout.param_shardings(axes, shapes)


@pytest.mark.parametrize(
    "rows, row_len, match",
    [(6, 64, "rows=6 .* multiple of 4"), (4, 65, "row_len=65 .* multiple of 2")],
)
def test_a_batch_that_does_not_divide_is_refused(rows, row_len, match):
    with pytest.raises(UserError, match=match):
        abstract_layout(fsdp=4, context=2).check_rows(rows, row_len)


def test_a_batch_is_spread_without_changing_it():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape((1,) * 5), MESH_AXES)
    layout = Layout(mesh, ShardingRules())
    batch = {"tokens": np.arange(6).reshape(2, 3), "hidden": np.arange(12).reshape(2, 2, 3)}
    placed = layout.place_batch(batch)
    assert all((np.asarray(placed[key]) == batch[key]).all() for key in batch)


@pytest.mark.parametrize(
    "environ, match",
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "not JAX_COORDINATOR_ADDRESS"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            r"JAX_PROCESS_ID=2: must lie in 0\.\.1",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            "must be numbers",
        ),
    ],
)
def test_half_told_processes_are_refused(environ, match):
    with pytest.raises(UserError, match=match):
        join_processes(environ)


def test_a_lone_process_joins_nothing():
    assert not join_processes({})
    assert not join_processes({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1"})
