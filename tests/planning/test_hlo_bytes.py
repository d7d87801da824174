"""Memory traffic read from compiled programs."""

import jax
import jax.numpy as jnp

from tw_jax.planning.hlo import parse_hlo
from tw_jax.planning.hlo_bytes import memory_bytes
from tw_jax.planning.hlo_cost import ProgramCost

HEADER = "HloModule test, num_partitions=1\n\n"


def traffic(text: str) -> float:
    return memory_bytes(ProgramCost(parse_hlo(HEADER + text)))


def test_a_product_reads_its_inputs_and_writes_its_result():
    text = jax.jit(jnp.dot).lower(jnp.ones((32, 64)), jnp.ones((64, 16))).compile().as_text()
    assert text is not None
    assert memory_bytes(ProgramCost(parse_hlo(text))) == 4 * (32 * 64 + 64 * 16 + 32 * 16)


def test_loops_multiply_and_sliced_stacks_count_once():
    def f(stack, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    stack, x = jnp.ones((6, 64, 64)), jnp.ones((64, 64))
    text = jax.jit(f).lower(stack, x).compile().as_text()
    assert text is not None
    moved = memory_bytes(ProgramCost(parse_hlo(text)))
    one = 4 * 64 * 64
    # Per layer: slice out the weights (read and write), multiply (two inputs, one result). What
    # the compiler fuses or copies besides is at most as much again; the stack never counts whole.
    assert 6 * 3 * one <= moved <= 6 * 9 * one


def test_nested_fusions_read_slices_and_update_in_place():
    text = """%inner (p: f32[8,100], i: s32[]) -> f32[1,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,100}
}

%outer (p: f32[8,100], i: s32[], into: f32[8,100]) -> f32[8,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %into = f32[8,100]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} fusion(%p, %i), kind=kLoop, calls=%inner
  ROOT %set = f32[8,100]{1,0} dynamic-update-slice(%into, %row, %i, %zero)
}

ENTRY %main (a: f32[8,100], i: s32[], b: f32[8,100]) -> f32[8,100] {
  %a = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,100]{1,0} parameter(2)
  ROOT %fused = f32[8,100]{1,0} fusion(%a, %i, %b), kind=kLoop, calls=%outer
}
"""
    assert traffic(text) == 400 + 400 + 4  # one row read, one written, and the index


def test_what_lies_on_the_chip_moves_nothing():
    text = """ENTRY %main (a: f32[100]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %near = f32[100]{0:T(128)S(1)} copy(%a)
  %twice = f32[100]{0:T(128)S(1)} add(%near, %near)
  ROOT %far = f32[100]{0:T(128)} copy(%twice)
}
"""
    assert traffic(text) == 400 + 400
