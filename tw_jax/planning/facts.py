"""What is known of a program after tracing and compiling it; as JSON between processes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tw_jax.planning.collectives import Collective


@dataclasses.dataclass(frozen=True)
class ProgramFacts:
    """One program of a step. Bytes and compiled work are those of one device.

    Attributes:
      name: what it does.
      runs: how often a step runs it.
      compiled: by the accelerator's compiler; otherwise modelled.
      traced_flops: work of all devices, counted before compilation.
      compiled_flops: work of one device, read from the compiled program; 0 if there is none.
      attention_flops: the part of `traced_flops` in tree attention.
      attention: backend of tree attention; "" where there is none.
      attention_imbalance: attention of the busiest device over the mean of all.
      model_flops: the part of `traced_flops` that recomputation does not repeat; the U in MFU.
      arguments: bytes of what the program is given, by category.
      resident: bytes of what lies beside it in memory, by category.
      argument_bytes: the compiler's own count of the arguments, tiling included; 0 if none.
      temporaries: bytes of everything between arguments and results.
      results: bytes of results that do not take an argument's place.
      code: bytes of the program itself.
      peak: largest sum that the compiler says is alive at once; 0 if it does not say.
      host: bytes of temporaries in the host's memory.
      exceeded: bytes that the compiler could not find room for; 0 where it fits.
      memory_bytes: bytes between main memory and the chip, tiles of tree attention left out.
      attention_bytes: those of the tiles.
      collectives: see `Collective`.
      bandwidths: bytes per second that a device can send, for each combination of mesh axes.
      compile_cpu_s: CPU seconds of lowering and compiling.
      compile_s: seconds of it by the clock.
    """

    name: str
    runs: int
    compiled: bool
    traced_flops: float
    attention_flops: float
    model_flops: float
    arguments: Mapping[str, int]
    resident: Mapping[str, int]
    attention: str = ""
    attention_imbalance: float = 1.0
    compiled_flops: float = 0.0
    argument_bytes: int = 0
    temporaries: int = 0
    results: int = 0
    code: int = 0
    peak: int = 0
    host: int = 0
    exceeded: int = 0
    memory_bytes: float = 0.0
    attention_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    bandwidths: tuple[tuple[tuple[str, ...], float], ...] = ()
    compile_cpu_s: float = 0.0
    compile_s: float = 0.0

    @property
    def total_bytes(self) -> int:
        """Device memory that is safely enough: everything, as if all of it were alive at once."""
        taken = max(sum(self.arguments.values()), self.argument_bytes)
        known = taken + sum(self.resident.values())
        if self.exceeded:
            return max(self.exceeded, known)
        return known + self.temporaries + self.results + self.code


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """A step, and the mesh it runs on.

    Attributes:
      mesh: sizes of the mesh axes.
      tokens: tokens that a step works on, all devices together.
      parameters: of the model.
      programs: what a step runs.
      jax: version.
      compiler: version of the compiler; "" where none was used.
    """

    mesh: Mapping[str, int]
    tokens: int
    parameters: int
    programs: tuple[ProgramFacts, ...]
    jax: str
    compiler: str


def to_json(facts: StepFacts) -> dict[str, Any]:
    """Plain values for `json.dumps`."""
    return dataclasses.asdict(facts)


def from_json(values: Mapping[str, Any]) -> StepFacts:
    """The inverse of `to_json`."""
    return StepFacts(**{**values, "programs": tuple(_program(p) for p in values["programs"])})


def _program(values: Mapping[str, Any]) -> ProgramFacts:
    found = tuple(Collective(**{**c, "axes": tuple(c["axes"])}) for c in values["collectives"])
    bandwidths = tuple((tuple(axes), rate) for axes, rate in values["bandwidths"])
    return ProgramFacts(**{**values, "collectives": found, "bandwidths": bandwidths})
