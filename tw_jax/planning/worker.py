"""The process that compiles: `python -m tw_jax.planning.worker CONFIG.yaml RESULT.json`.

It is a process of its own because a TPU compiler loads hardware libraries, may take minutes, and
takes its environment at start. Lines it prints are progress; the result is a file.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from tw_jax.config import load_config
from tw_jax.errors import UserError
from tw_jax.models.qwen3 import abstract_params
from tw_jax.parallel.layout import Layout
from tw_jax.parallel.mesh import make_layout
from tw_jax.planning.chips import Topology, parse_topology
from tw_jax.planning.collectives import module_collectives
from tw_jax.planning.config import PlanConfig
from tw_jax.planning.facts import ProgramFacts, StepFacts, to_json
from tw_jax.planning.flops import FlopCount, count_flops
from tw_jax.planning.gpu_model import modelled
from tw_jax.planning.hlo import parse_hlo
from tw_jax.planning.hlo_bytes import memory_bytes
from tw_jax.planning.hlo_cost import ProgramCost
from tw_jax.planning.links import axes_bandwidths
from tw_jax.planning.programs import ATTENTION, Program, model_of, programs, rows_of
from tw_jax.planning.tpu_environment import libtpu_version

# Share of the products in a backward tile that repeat others. Of XLA's five that is the scores; the
# two TPU kernels make seven, the scores twice and the gradient of the weights once too often.
_BACKWARD_REPEATS = {"": 0.0, "xla": 1 / 5, "tpu": 3 / 7}
_EXHAUSTED = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def step_facts(config: PlanConfig) -> StepFacts:
    """Traces the programs of a step, and compiles them where there is a compiler for the chip.

    Raises:
      UserError: the topology cannot be had, or model, rows and mesh do not fit.
    """
    topology = parse_topology(config.topology)
    is_tpu = topology.chip.kind == "tpu"
    if is_tpu:
        devices: Sequence = _tpu_devices(topology)
    else:
        jax.config.update("jax_num_cpu_devices", topology.devices)
        devices = jax.devices("cpu")
    layout = make_layout(config.parallel, devices, always=True)
    assert layout is not None
    sizes = dict(layout.mesh.shape)
    found = []
    for program in programs(config, layout):
        counted = count_flops(program.traced.jaxpr, program.scopes, "tpu" if is_tpu else "cuda")
        if is_tpu:
            print(f"compiling the {program.name} for {layout.describe()}", flush=True)
            found.append(_compiled(program, counted, topology, layout))
        else:
            known = _known(program, counted, compiled=False)
            found.append(modelled(config, known, topology, layout))
    rows = config.decode_rows if config.program == "decode" else rows_of(config, sizes)
    per_row = 1 if config.program == "decode" else config.row_len * config.micro_batches
    return StepFacts(
        mesh=sizes,
        tokens=rows * per_row,
        parameters=_parameters(config),
        programs=tuple(found),
        jax=importlib.metadata.version("jax"),
        compiler=f"libtpu {libtpu_version(os.environ)}" if is_tpu else "",
    )


def _tpu_devices(topology: Topology) -> Sequence:
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(
            f"topology={topology.name!r}: the TPU compiler refuses it: {error}"
        ) from error
    return described.devices


def _parameters(config: PlanConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model_of(config))))


def _known(program: Program, counted: FlopCount, *, compiled: bool) -> ProgramFacts:
    """What tracing alone tells."""
    forward, backward = (counted.within(f"{ATTENTION}_{way}") for way in ("forward", "backward"))
    total, repeats = counted.total, _BACKWARD_REPEATS[program.attention]
    return ProgramFacts(
        name=program.name,
        runs=program.runs,
        compiled=compiled,
        traced_flops=total,
        attention_flops=forward + backward,
        model_flops=total - counted.recomputed - backward * repeats,
        arguments=dict(program.arguments),
        resident=dict(program.resident),
        attention=program.attention,
        attention_imbalance=program.attention_imbalance,
    )


def _compiled(
    program: Program, counted: FlopCount, topology: Topology, layout: Layout
) -> ProgramFacts:
    facts = _known(program, counted, compiled=True)
    cpu, clock = time.process_time(), time.monotonic()
    compiled = None
    try:
        with jax.set_mesh(layout.mesh):
            compiled = program.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = _EXHAUSTED.search(str(error))
        if found is None:
            raise
        exceeded = int(float(found.group(1)) * _UNITS[found.group(2)])
        facts = dataclasses.replace(facts, exceeded=exceeded)
    facts = dataclasses.replace(
        facts,
        compile_cpu_s=time.process_time() - cpu,
        compile_s=time.monotonic() - clock,
    )
    if compiled is None:
        return facts
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    assert memory is not None and text is not None
    module = parse_hlo(text)
    cost = ProgramCost(module, program.scopes)
    talk = tuple(module_collectives(cost, layout.mesh.shape))
    # As an XLA loop, attention moves its tiles through memory; a kernel fetches blocks meanwhile.
    without = ProgramCost(module, {**program.scopes, ATTENTION: 0.0})
    traffic = memory_bytes(without)
    return dataclasses.replace(
        facts,
        compiled_flops=cost.flops,
        argument_bytes=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        host=memory.host_temp_size_in_bytes,
        memory_bytes=traffic,
        attention_bytes=memory_bytes(cost) - traffic,
        collectives=talk,
        bandwidths=tuple(axes_bandwidths(topology, layout.mesh, {c.axes for c in talk}).items()),
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the worker; a mistake of the user becomes the result."""
    config_path, result_path = arguments
    try:
        facts = to_json(step_facts(load_config(PlanConfig, config_path)))
    except UserError as error:
        facts = {"error": str(error)}
    pathlib.Path(result_path).write_text(json.dumps(facts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
