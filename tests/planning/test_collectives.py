"""Collectives of compiled programs: real TPU texts, and eight virtual CPU devices."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from tw_jax.planning.collectives import Collective, collectives, device_groups, spanned_axes
from tw_jax.planning.hlo import Instruction

COMPILED = pathlib.Path(__file__).parent / "compiled"
LAYERS, WIDTH, HIDDEN, VOCAB, ROWS, ROW_LEN = 4, 512, 1024, 2048, 64, 256


def read(name: str) -> list[Collective]:
    sizes = [int(size) for size in name.rpartition("_")[2].split("x")]
    mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    return collectives((COMPILED / f"{name}.hlo").read_text(encoding="utf-8"), mesh)


def moved(found: list[Collective], kind: str, *axes: str) -> float:
    """Bytes of all executions of the collectives of a kind over these axes."""
    return sum(c.bytes * c.count for c in found if (c.kind, c.axes) == (kind, axes))


MATRICES = 2 * WIDTH * HIDDEN * LAYERS  # elements of all layers' parameters


def test_hsdp_gathers_and_scatters_over_fsdp_and_reduces_over_data():
    found = read("v5p_4x4x4_4x16x1")
    # bfloat16 copies are gathered forward and again for the recomputation.
    layers = [c for c in found if c.kind == "all-gather" and c.count >= LAYERS]
    assert sum(c.bytes * c.count for c in layers) == 2 * 2 * MATRICES
    assert {(c.axes, c.group_size) for c in layers} == {(("fsdp",), 16)}
    # Gradients of layers and table, scattered; then what is left is summed over data.
    assert moved(found, "reduce-scatter", "fsdp") == 2 * (MATRICES + VOCAB * WIDTH)
    assert moved(found, "all-reduce", "data") == 2 * (MATRICES + VOCAB * WIDTH) / 16
    # The embedding's scatter-add makes a whole float32 table, summed over everybody.
    assert moved(found, "all-reduce", "data", "fsdp") == 4 * VOCAB * WIDTH


def test_an_asynchronous_fusion_counts_once():
    found = read("v5e_2x4_1x4x2")
    [gather] = [c for c in found if c.kind == "all-gather" and c.count == 2 * LAYERS]
    # One of the two matrices, forward and recomputed; the other one goes by permutes.
    assert gather == Collective("all-gather", 2 * WIDTH * HIDDEN // 2, 4, ("fsdp",), 2 * LAYERS)


def test_overlapped_products_are_permutes_in_loops():
    found = read("v5p_2x2x4_1x8x2")
    [ring, *_] = [c for c in found if c.kind == "collective-permute"]
    # Per loop two rings of two hops in each of two iterations, and one message before the
    # forward ones: all of it inside the loop over layers.
    assert (ring.axes, ring.group_size) == (("fsdp",), 8)
    assert ring.count % LAYERS == 0 and ring.count > 16 * LAYERS
    assert ring.bytes == 2 * WIDTH * HIDDEN // 2 // 8


def test_sparsecore_calls_are_followed():
    found = read("v5p_4x4x4_sparsecore_1x64x1")
    assert moved(found, "reduce-scatter", "fsdp") == 2 * (MATRICES + VOCAB * WIDTH)
    # Without it, this chip's compiler turns every gather and scatter over 64 into an all-reduce.
    assert moved(found, "all-reduce", "fsdp") > 2 * 2 * MATRICES


def test_ring_traffic():
    def wire(kind: str) -> float:
        return Collective(kind, 800, 4, (), 2.0).wire_bytes

    assert wire("all-gather") == wire("reduce-scatter") == wire("all-to-all") == 1200
    assert wire("all-reduce") == 2400
    assert wire("collective-permute") == 1600


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=4,'b'=2] {'a'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=4,'b'=2] {'a','b'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=4,'b'=2], device_ids=(7,6,5,4,3,2,1,0) {'b'}", ((7, 6), (5, 4), (3, 2), (1, 0))),
        ("mesh['a'=4,'b'=2] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_spellings_of_device_groups(groups, expected):
    line = Instruction("g", "all-gather", (), (), "", f", channel_id=1, replica_groups={groups}, x")
    assert device_groups(line, 8) == expected


def test_axes_that_groups_span():
    mesh = {"data": 2, "fsdp": 1, "tensor": 4}
    assert spanned_axes(((0, 1, 2, 3),), mesh) == ("tensor",)
    assert spanned_axes(((0, 4), (1, 5)), mesh) == ("data",)
    assert spanned_axes(((0, 5),), mesh) == ("data", "tensor")
    assert spanned_axes(((0, 1),), {}) == ()


PROGRAM = """
    import dataclasses, json
    import jax, jax.numpy as jnp
    from jax.sharding import AxisType, PartitionSpec as P
    from tw_jax.planning.collectives import collectives

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def ring(x):
        def hop(_, x):
            return jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)])
        x = jax.lax.fori_loop(0, 3, hop, x)
        whole = jax.lax.all_gather(x, "tensor", tiled=True)
        part = jax.lax.psum_scatter(whole, "data", tiled=True)
        return jax.lax.psum(part, ("data", "tensor"))

    program = jax.jit(jax.shard_map(ring, mesh=mesh, in_specs=P("tensor"), out_specs=P(),
                                    check_vma=False))
    text = program.lower(jnp.ones((64, 8))).compile().as_text()
    found = collectives(text, mesh.shape)
    print(json.dumps([dataclasses.astuple(c) for c in found]))
"""


def test_eight_cpu_devices():
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    code = textwrap.dedent(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    found = {(kind, tuple(axes)): rest for kind, *rest, axes in _moved_last(done.stdout)}
    row = 8 * 4
    assert found == {
        ("collective-permute", ("tensor",)): [16 * row, 4, 3.0],
        ("all-gather", ("tensor",)): [64 * row, 4, 1.0],
        ("reduce-scatter", ("data",)): [64 * row, 2, 1.0],
        ("all-reduce", ("data", "tensor")): [32 * row, 8, 1.0],
    }


def _moved_last(output: str) -> list[list]:
    rows = json.loads(output.splitlines()[-1])
    return [[kind, size, group, count, axes] for kind, size, group, axes, count in rows]


def test_a_collective_in_a_loop_of_unknown_length_is_refused():
    text = (COMPILED / "v6e_8x8_2x8x4.hlo").read_text(encoding="utf-8")
    text = text.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match="trip count"):
        collectives(text)
    given = collectives(text, {"all": 64}, {"/while": 1.0})
    assert {c.axes for c in given} == {("all",)}
