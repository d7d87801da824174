"""Compiles the TPU backend's output and gradients ahead of time; no TPU is needed.

    python -m tests.kernels.compile_worker TOPOLOGY CASES    # JSON in, one line of JSON per case

A process of its own, in the environment of `tw_jax.planning.tpu_environment`.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tw_jax.kernels import plan_tiles, tree_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """One program; `parts` splits the queries of a row, and this is the part of one device."""

    dtype: str = "bfloat16"
    depth: int = 0
    dim: int = 128
    heads: int = 16
    kv_heads: int = 4
    rows: int = 1
    row_len: int = 8192
    parts: int = 1


def compile_case(case: Case, device) -> jax.stages.Compiled:
    place = NamedSharding(Mesh(np.array([device]), ("device",)), P())

    def array(*shape: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    q_len = case.row_len // case.parts

    def run(q, k, v, cotangent, end, hidden, start):
        part = {"q_start": start, "q_len": q_len} if case.parts > 1 else {}
        group = case.heads // case.kv_heads
        plan = plan_tiles(end, hidden, backend="tpu", group=group, **part)

        def attend(q, k, v):
            return tree_attention(q, k, v, end, hidden, plan=plan)

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(cotangent)

    q = array(case.rows, q_len, case.heads, case.dim, dtype=case.dtype)
    kv = array(case.rows, case.row_len, case.kv_heads, case.dim, dtype=case.dtype)
    bounds = array(case.depth, case.rows, case.row_len)
    hidden = (bounds, bounds) if case.depth else None
    arguments = (q, kv, kv, q, array(case.rows, case.row_len), hidden, array())
    return jax.jit(run).lower(*arguments).compile()


def main(topology: str, cases: str) -> None:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    for values in json.loads(cases):
        case = Case(**values)
        found: dict = {"case": str(case), "problem": ""}
        try:
            compiled = compile_case(case, described.devices[0])
        except jax.errors.JaxRuntimeError as error:
            found["problem"] = str(error)[:2000]
        else:
            memory = compiled.memory_analysis()
            text = compiled.as_text()
            assert memory is not None and text is not None
            found["temporaries"] = memory.temp_size_in_bytes
            found["kernels"] = text.count('custom_call_target="tpu_custom_call"')
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
