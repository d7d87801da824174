"""Names of topologies, and how fast groups of devices can talk."""

import pytest

from tw_jax.errors import UserError
from tw_jax.planning.chips import CHIPS, parse_topology
from tw_jax.planning.links import gpu_bandwidth, torus_bandwidth


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v5e:4x4", 16), ("v5p:4x4x4", 64), ("v6e:8x8", 64), ("tpu7x:2x2x2", 16), ("h200:32", 32)],
)
def test_devices(name, devices):
    assert parse_topology(name).devices == devices


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5q:4x4", "did you mean v5"),
        ("v5p:4x4", "v5p takes 3 sizes, as in v5p:4x4x4"),
        ("v5e:3x3", "must be even"),
        ("v5e", "takes 2 sizes"),
        ("h100:12", "whole nodes"),
        ("h100:0", "whole nodes"),
        ("h100:-8", "takes 1 size, as in h100:8"),
    ],
)
def test_mistakes_name_the_remedy(name, words):
    with pytest.raises(UserError, match=words):
        parse_topology(name)


def test_every_chip_is_complete():
    for chip in CHIPS.values():
        assert chip.peak_flops > 1e14 and chip.hbm_bandwidth > 5e11 and chip.hbm_gib > 10
        assert (chip.torus_dims > 0) == (chip.kind == "tpu")
        assert (chip.network_bandwidth > 0) == (chip.kind == "gpu")


def line(length: int, dim: int, dims: int = 3) -> list[tuple[int, ...]]:
    return [tuple(i if d == dim else 0 for d in range(dims)) for i in range(length)]


def test_rings_use_the_dimensions_that_they_span():
    v5p = parse_topology("v5p:4x4x8")
    link = v5p.chip.link_bandwidth
    assert torus_bandwidth(v5p, line(4, 0)) == 2 * link  # closed
    assert torus_bandwidth(v5p, line(4, 2)) == link  # half of a dimension is open
    plane = [(x, y, 0) for x in range(4) for y in range(4)]
    assert torus_bandwidth(v5p, plane) == 4 * link
    open_plane = [(x, y, 0) for x in range(8) for y in range(8)]
    assert torus_bandwidth(parse_topology("v6e:8x8"), open_plane) == 2 * 90e9
    pod = [(x, y, 0) for x in range(16) for y in range(16)]
    assert torus_bandwidth(parse_topology("v6e:16x16"), pod) == 4 * 90e9


def test_gpus_leave_the_node_or_not():
    cluster = parse_topology("h100:32")
    sizes = {"data": 4, "fsdp": 4, "tensor": 2}
    assert gpu_bandwidth(cluster, sizes, ("fsdp", "tensor")) == cluster.chip.link_bandwidth
    assert gpu_bandwidth(cluster, sizes, ("data",)) == cluster.chip.network_bandwidth
    assert gpu_bandwidth(cluster, {"fsdp": 32}, ("fsdp",)) == cluster.chip.network_bandwidth
