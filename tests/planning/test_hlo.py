"""The reader of compiled programs, on texts cut from real TPU compiles and on CPU compiles.

The texts in `compiled/` are one small training step (embedding, 4 scanned and recomputed two-matrix
layers, tied head), compiled ahead of time for TPU topologies and reduced to the lines that are
read. Their work is known exactly from the step's sizes.
"""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from tw_jax.planning.hlo import array_types, parse_hlo
from tw_jax.planning.hlo_bytes import memory_bytes
from tw_jax.planning.hlo_cost import ProgramCost

COMPILED = pathlib.Path(__file__).parent / "compiled"
TPU_TEXTS = sorted(path.stem for path in COMPILED.glob("*.hlo"))
LAYERS, WIDTH, HIDDEN, VOCAB, ROWS, ROW_LEN = 4, 512, 1024, 2048, 64, 256


def read(name: str) -> ProgramCost:
    return ProgramCost(parse_hlo((COMPILED / f"{name}.hlo").read_text(encoding="utf-8")))


def compiled(function, *arguments) -> ProgramCost:
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return ProgramCost(parse_hlo(text), {"visit_tiles": 5.0})


@pytest.mark.parametrize("name", TPU_TEXTS)
def test_work_of_a_tpu_program_is_exact(name):
    cost = read(name)
    # Per layer: 2 products forward, 1 recomputed (the second one's result is not needed), 4 for
    # the gradients; the head: 3. Every device of the mesh takes an equal part.
    products = LAYERS * WIDTH * HIDDEN * (2 + 1 + 4) + 3 * WIDTH * VOCAB
    assert cost.flops * cost.module.partitions == 2 * ROWS * ROW_LEN * products


def test_the_texts_hold_what_they_are_here_for():
    assert len(TPU_TEXTS) == 5
    windowed = [loop for loop in read("v5p_2x2x4_1x8x2").loops if "while" not in loop.op_name[-8:]]
    # Eight shards, four steps each way, two per iteration.
    assert [loop.trips for loop in windowed] == [2] * 5
    assert {loop.trips for loop in read("v6e_8x8_2x8x4").loops} == {LAYERS}


def test_loops_multiply_work_on_cpu():
    def nested(x):
        def inner(x, _):
            return jnp.tanh(x @ x), None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0] @ x, None

        return jax.lax.scan(outer, x, length=7)[0]

    cost = compiled(nested, jnp.ones((16, 16)))
    assert cost.flops == 7 * (3 + 1) * 2 * 16**3


def test_counters_that_start_late_or_count_down():
    def loops(x):
        x = jax.lax.fori_loop(2, 9, lambda i, x: jnp.tanh(x @ x), x)
        return jax.lax.while_loop(
            lambda s: s[0] > 3, lambda s: (s[0] - 2, jnp.tanh(s[1] @ s[1])), (10, x)
        )

    cost = compiled(loops, jnp.ones((16, 16)))
    assert sorted(loop.trips for loop in cost.loops) == [4, 7]  # 10, 8, 6, 4 and 2..8
    assert cost.flops == 11 * 2 * 16**3


def test_data_dependent_loops_take_the_callers_count_for_their_scope():
    def live(x, count):
        with jax.named_scope("visit_tiles"):
            x = jax.lax.fori_loop(0, count, lambda i, x: jnp.tanh(x @ x), x)
        with jax.named_scope("other"):
            return jax.lax.fori_loop(0, count, lambda i, x: jnp.tanh(x), x)

    cost = compiled(live, jnp.ones((16, 16)), jnp.int32(3))
    assert cost.flops == 5 * 2 * 16**3  # the other loop does no such work
    unknown = ProgramCost(cost.module)
    assert unknown.flops != unknown.flops  # NaN: nobody said how often


# As the TPU compiler writes it: the metadata of a kernel takes several lines.
KERNEL = """HloModule jit_run, num_partitions=1
ENTRY %main (q: f32[128,32], n: s32[]) -> f32[128,32] {
  %n = s32[] parameter(1)
  %q = f32[128,32]{1,0} parameter(0)
  ROOT %attend.1 = f32[128,32]{1,0} custom-call(%n, %q), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"bytes_per_tile":"700",
"flops_per_tile":"5000"
}}, metadata={op_name="jit(run)/jvp(attention)/attend/pallas_call" stack_frame_id=26}
}
"""


def test_kernels_cost_what_they_say_times_the_callers_tiles():
    cost = ProgramCost(parse_hlo(KERNEL), {"attend": 3.0})
    assert cost.flops == 3 * 5000
    assert memory_bytes(cost) == 4 + 2 * 128 * 32 * 4 + 3 * 700
    unknown = ProgramCost(parse_hlo(KERNEL)).flops
    assert unknown != unknown


def test_the_most_expensive_branch_counts():
    def switch(x, which):
        branches = [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x]
        return jax.lax.switch(which, branches, x)

    assert compiled(switch, jnp.ones((16, 16)), jnp.int32(0)).flops == 2 * 2 * 16**3


def test_padding_and_strides_of_a_convolution_do_no_work():
    image, kernel = jnp.ones((2, 3, 9)), jnp.ones((5, 3, 4))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (2,), [(1, 1)])

    # Five outputs; the first and the last see three of their four taps or fewer.
    taps = sum(0 <= 2 * place + tap - 1 < 9 for place in range(4) for tap in range(4))
    assert compiled(convolve, image, kernel).flops == 2 * 2 * 3 * 5 * taps


def test_types():
    sizes = [a.bytes for a in array_types("(bf16[2,3]{1,0:T(8,128)(2,1)}, u32[], pred[7], s4[3])")]
    assert sizes == [12, 4, 7, 2]


def test_not_a_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_hlo("module @jit_f {}\n")
