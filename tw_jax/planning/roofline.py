"""A bracket of a step's time. Nothing here is calibrated: no run has been timed against it."""

import dataclasses

from tw_jax.planning.chips import GIB, Topology
from tw_jax.planning.config import Assumptions
from tw_jax.planning.facts import ProgramFacts, StepFacts

AGREEMENT = (0.99, 1.01)


@dataclasses.dataclass(frozen=True)
class Bracket:
    """A time at best and at worst, in seconds.

    Attributes:
      best: everything at its best rate, and all of it overlapped.
      worst: everything at its worst rate, one after another.
    """

    best: float
    worst: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step costs.

    Attributes:
      hbm_gib: memory per device that is safely enough.
      hbm_limit_gib: memory per device that there is.
      optimistic_gib: the compiler's own peak; 0 if it gives none.
      flops_agreement: compiled over traced work; 1 means that nothing is replicated or lost. 0
        where nothing was compiled.
      wire_gb: bytes that a device sends per step, in 10^9.
      parts: seconds at best and at worst of matmul, attention, memory and links.
      step: seconds per step.
      tokens_per_s: of all devices, at worst and at best.
      mfu: model FLOP utilisation at worst and at best.
      compile_cpu_s: CPU seconds of compilation.
    """

    hbm_gib: float
    hbm_limit_gib: float
    optimistic_gib: float
    flops_agreement: float
    wire_gb: float
    parts: dict[str, Bracket]
    step: Bracket
    tokens_per_s: tuple[float, float]
    mfu: tuple[float, float]
    compile_cpu_s: float

    @property
    def fits(self) -> bool:
        """Whether the safe number is within the device's memory."""
        return self.hbm_gib <= self.hbm_limit_gib

    @property
    def agrees(self) -> bool:
        """Whether traced and compiled work are the same; true where nothing was compiled."""
        low, high = AGREEMENT
        return not self.flops_agreement or low <= self.flops_agreement <= high


def estimate(facts: StepFacts, topology: Topology, assume: Assumptions) -> Estimate:
    """Puts a step's facts and the chip's peaks together.

    The best case takes the slowest of computing, memory and links; the worst case their sum.
    """
    chip, devices = topology.chip, topology.devices
    matmul = attention = memory = wire_s = wire = 0.0
    for p in facts.programs:
        work = p.compiled_flops or p.traced_flops / devices
        own = p.attention_flops / devices
        attention += p.runs * own * p.attention_imbalance / chip.peak_flops
        matmul += p.runs * max(work - own, 0.0) / chip.peak_flops
        memory += p.runs * p.memory_bytes / chip.hbm_bandwidth
        wire += p.runs * sum(c.wire_bytes for c in p.collectives)
        wire_s += p.runs * link_seconds(p)
    parts = {
        "matmul": Bracket(matmul / assume.matmul_best, matmul / assume.matmul_worst),
        "attention": Bracket(attention / assume.attention_best, attention / assume.attention_worst),
        "memory": Bracket(memory, memory),
        "links": Bracket(wire_s / assume.links_best, wire_s / assume.links_worst),
    }
    best = max(
        parts["matmul"].best + parts["attention"].best, parts["memory"].best, parts["links"].best
    )
    step = Bracket(best, sum(part.worst for part in parts.values()))
    useful = sum(p.runs * p.model_flops for p in facts.programs)
    peak = devices * chip.peak_flops
    fits = all(not p.exceeded for p in facts.programs)
    return Estimate(
        hbm_gib=max(p.total_bytes for p in facts.programs) / GIB,
        hbm_limit_gib=chip.hbm_gib,
        optimistic_gib=max(p.peak + sum(p.resident.values()) for p in facts.programs) / GIB
        if fits and all(p.peak for p in facts.programs)
        else 0.0,
        flops_agreement=_agreement(facts, devices),
        wire_gb=wire / 1e9,
        parts=parts,
        step=step,
        tokens_per_s=(_rate(facts.tokens, step.worst), _rate(facts.tokens, step.best)),
        mfu=(_rate(useful, step.worst) / peak, _rate(useful, step.best) / peak),
        compile_cpu_s=sum(p.compile_cpu_s for p in facts.programs),
    )


def link_seconds(program: ProgramFacts) -> float:
    """Seconds that a program's collectives take at the full rate of their links."""
    rates = dict(program.bandwidths)
    return sum(c.wire_bytes / rates[c.axes] for c in program.collectives)


def _agreement(facts: StepFacts, devices: int) -> float:
    compiled = [p for p in facts.programs if p.compiled_flops and p.traced_flops]
    traced = sum(p.runs * p.traced_flops for p in compiled)
    return sum(p.runs * p.compiled_flops for p in compiled) * devices / traced if traced else 0.0


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
