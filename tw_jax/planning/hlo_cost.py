"""How often each computation of a compiled program runs, and the floating-point work it does.

XLA's own analysis counts a loop's body once. Here every loop is multiplied by its trip count,
which is read from the program: start, step and limit of the counter that the condition compares.
The trip count of a loop whose limit is data (tree attention visits as many tiles as are live) is
given by the caller, for a named scope. So is that of a Pallas kernel whose grid has such a limit;
the kernel itself says, in its metadata, what one trip costs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from tw_jax.planning.hlo import Computation, Instruction, Module

# Key of `scopes` for the share of a ragged product's rows that belong to any of its groups.
RAGGED_DOT = "ragged_dot_general"
# Opcodes that run another computation as a whole. The scalar functions of reductions, sorts and
# scatters are none of them; `-done` repeats what `-start` named.
_CALLS = ("fusion", "call", "call-start", "async-start", "custom-call")
_FUNCTION_ATTRIBUTES = ("calls", "to_apply")


@dataclasses.dataclass(frozen=True)
class Loop:
    """One `while` of a program.

    Attributes:
      name: of the instruction.
      op_name: JAX's path to it.
      body: name of the computation.
      trips: iterations; NaN where the program does not say and no scope of the caller matches.
    """

    name: str
    op_name: str
    body: str
    trips: float


def loop_of(
    module: Module, caller: Computation, loop: Instruction, scopes: Mapping[str, float]
) -> Loop:
    """Reads the trip count of a `while` instruction.

    Args:
      module: the program.
      caller: the computation that holds the loop.
      loop: the `while`.
      scopes: trips of data-dependent loops by a part of their `op_name`.
    """
    body = loop.attribute("body") or ""
    trips = _static_trips(module, caller, loop)
    if trips is None:
        trips = _given(loop, scopes)
    return Loop(loop.name, loop.op_name, body, trips)


def _given(instruction: Instruction, scopes: Mapping[str, float]) -> float:
    """Trips that the caller gave for the scope of an instruction; NaN if none."""
    return next((n for scope, n in scopes.items() if scope in instruction.op_name), math.nan)


def ragged_dot_flops(
    computation: Computation, instruction: Instruction, scopes: Mapping[str, float]
) -> float:
    """Work of the TPU compiler's own kernel for `jax.lax.ragged_dot`; 0 for anything else.

    The kernel skips rows behind the last group: `scopes[RAGGED_DOT]` is the share that it
    does not skip.
    """
    if instruction.opcode != "custom-call" or "ragged_dot_tiling" not in instruction.attributes:
        return 0.0
    rows = computation.operands(instruction)[-2].types[0].dims
    share = scopes.get(RAGGED_DOT, 1.0)
    return 2 * math.prod(rows) * instruction.types[0].dims[-1] * share


def kernel_cost(instruction: Instruction, name: str, scopes: Mapping[str, float]) -> float:
    """What a Pallas kernel says that one of its tiles costs, times the tiles given for its scope.

    Args:
      instruction: any; those that are no such kernel cost 0.
      name: `flops_per_tile` or `bytes_per_tile`, a key of the `metadata` of its `pallas_call`.
      scopes: tiles by a part of the `op_name`.
    """
    if instruction.opcode != "custom-call" or name not in instruction.attributes:
        return 0.0
    per_tile = re.search(rf"{name}\W+(\d+)", instruction.attributes)
    return float(per_tile.group(1)) * _given(instruction, scopes) if per_tile else 0.0


def _static_trips(module: Module, caller: Computation, loop: Instruction) -> float | None:
    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    bound = _bound(module, condition)
    if bound is None:
        return None
    index, limit, direction = bound
    start = _initial(caller, loop, index)
    step = _step(module, body, index)
    if start is None or not step:
        return None
    distance = limit - start if direction in ("LT", "LE") else start - limit
    distance += direction in ("LE", "GE")
    return max(0, math.ceil(distance / abs(step)))


def _bound(module: Module, condition: Computation) -> tuple[int, int, str] | None:
    """(element of the loop's state, limit, direction) that the condition compares."""
    root = condition.instructions[condition.root]
    inside, compare = _unwrap(module, condition, root)
    direction = compare.attribute("direction")
    if compare.opcode != "compare" or direction not in ("LT", "LE", "GT", "GE"):
        return None
    sides = [_outside(inside, name, condition, root) for name in compare.operands]
    counter, limit = (_source(condition, side) for side in sides)
    index, bound = _element(counter), _number(limit)
    if index is None or bound is None:
        return None
    return index, bound, direction


def _unwrap(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[Computation, Instruction]:
    """Looks into a fusion or call: the computation and instruction that give its result."""
    if instruction.opcode in ("fusion", "call"):
        inner = module.computations[_functions(instruction)[0]]
        return inner, inner.instructions[inner.root]
    return computation, instruction


def _outside(
    inside: Computation, name: str, computation: Computation, call: Instruction
) -> Instruction:
    """What an operand inside a fusion stands for in the computation that calls it."""
    instruction = inside.instructions[name]
    if inside is not computation and instruction.opcode == "parameter":
        return computation.instructions[call.operands[int(instruction.arguments)]]
    return instruction


def _source(computation: Computation, instruction: Instruction) -> Instruction:
    """Follows copies back to where a value comes from."""
    while instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _number(instruction: Instruction) -> int | None:
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments):
        return int(instruction.arguments)
    return None


def _element(instruction: Instruction) -> int | None:
    if instruction.opcode != "get-tuple-element":
        return None
    index = instruction.attribute("index")
    return int(index) if index else None


def _initial(caller: Computation, loop: Instruction, index: int) -> int | None:
    state = _source(caller, caller.instructions[loop.operands[0]])
    if state.opcode != "tuple":
        return None
    return _number(_source(caller, caller.instructions[state.operands[index]]))


def _step(module: Module, body: Computation, index: int) -> int | None:
    """By how much an iteration advances element `index` of the loop's state."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    update = _source(body, body.instructions[root.operands[index]])
    inside, add = _unwrap(module, body, update)
    if add.opcode not in ("add", "subtract"):
        return None
    sides = [_source(body, _outside(inside, name, body, update)) for name in add.operands]
    steps = [number for side in sides if (number := _number(side)) is not None]
    counters = [side for side in sides if _element(side) == index]
    return steps[0] if len(steps) == 1 and counters else None


def _functions(instruction: Instruction) -> tuple[str, ...]:
    """Computations that an instruction runs once."""
    named = [instruction.attribute(name) for name in _FUNCTION_ATTRIBUTES]
    return tuple(name for name in named if name) + instruction.names_in("called_computations")


def _branches(instruction: Instruction) -> tuple[str, ...]:
    named = [instruction.attribute(f"{side}_computation") for side in ("true", "false")]
    return instruction.names_in("branch_computations") + tuple(name for name in named if name)


class ProgramCost:
    """Floating-point work and executions of a program's computations."""

    def __init__(self, module: Module, scopes: Mapping[str, float] | None = None) -> None:
        """Prepares the analysis.

        Args:
          module: the program.
          scopes: trips of data-dependent loops by a part of their `op_name`.
        """
        self.module, self.scopes = module, dict(scopes or {})

    @functools.cached_property
    def flops(self) -> float:
        """Floating-point operations of matrix products and convolutions on one device.

        Of Pallas kernels those count that give `flops_per_tile` in their metadata, of a
        conditional's branches the most expensive one. NaN where the trip count of a loop with such
        work is unknown.
        """
        return self.subtree_flops(self.module.entry)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Every loop of the program, in the order of the text."""
        return [
            loop_of(self.module, computation, instruction, self.scopes)
            for computation in self.module.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "while"
        ]

    @functools.cached_property
    def executions(self) -> dict[str, float]:
        """How often each computation runs; those that never run are absent."""
        counts: dict[str, float] = {}

        def visit(name: str, times: float) -> None:
            counts[name] = counts.get(name, 0.0) + times
            for callee, per_run in self._callees(name):
                visit(callee, times * per_run)

        visit(self.module.entry, 1.0)
        return counts

    @functools.cached_property
    def _flops_of(self) -> dict[str, float]:
        return {}

    def subtree_flops(self, name: str) -> float:
        """Work of one run of a computation, with all that it calls."""
        if name not in self._flops_of:
            computation = self.module.computations[name]
            own = sum(
                instruction_flops(computation, instruction)
                + kernel_cost(instruction, "flops_per_tile", self.scopes)
                + ragged_dot_flops(computation, instruction, self.scopes)
                for instruction in computation.instructions.values()
            )
            # A loop without work adds nothing, however often it runs.
            called = sum(
                work * times
                for callee, times in self._callees(name)
                if (work := self.subtree_flops(callee))
            )
            self._flops_of[name] = own + called
        return self._flops_of[name]

    def _callees(self, name: str) -> list[tuple[str, float]]:
        """(computation, runs) of everything that one run of a computation starts."""
        computation = self.module.computations[name]
        callees: list[tuple[str, float]] = []
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                loop = loop_of(self.module, computation, instruction, self.scopes)
                callees.append((loop.body, loop.trips))
            elif instruction.opcode == "conditional":
                branches = _branches(instruction)
                callees.append((max(branches, key=self.subtree_flops), 1.0))
            elif instruction.opcode in _CALLS:
                known = self.module.computations
                callees += [(called, 1.0) for called in _functions(instruction) if called in known]
        return callees


def instruction_flops(computation: Computation, instruction: Instruction) -> int:
    """Multiplications and additions of one `dot` or `convolution`; 0 for anything else."""
    if instruction.opcode == "dot":
        lhs = computation.operands(instruction)[0].types[0]
        return 2 * math.prod(instruction.types[0].dims) * _contracted(instruction, lhs.dims)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return 0


def _contracted(dot: Instruction, lhs: tuple[int, ...]) -> int:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    dims = [int(d) for d in found.group(1).split(",") if d] if found else []
    return math.prod(lhs[d] for d in dims)


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Work of a convolution; the TPU compiler writes every matrix product as one.

    Positions of the window that fall into padding or between dilated elements do no work.
    """
    image, kernel = (operand.types[0].dims for operand in computation.operands(convolution)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise ValueError(f"convolution {convolution.name!r} has no dim_labels")
    image_labels, kernel_labels, out_labels = labels.groups()
    out = convolution.types[0].dims
    window = _window(convolution)
    positions = 1
    for spatial in [label for label in out_labels if label.isdigit()]:
        dim = int(spatial)
        positions *= valid_positions(
            image=image[image_labels.index(spatial)],
            kernel=kernel[kernel_labels.index(spatial)],
            out=out[out_labels.index(spatial)],
            stride=int(window["stride"][dim]) if "stride" in window else 1,
            spread=int(window["lhs_dilate"][dim]) if "lhs_dilate" in window else 1,
            reach=int(window["rhs_dilate"][dim]) if "rhs_dilate" in window else 1,
            low=int(window["pad"][dim].split("_")[0]) if "pad" in window else 0,
        )
    batch_groups = int(convolution.attribute("batch_group_count") or 1)
    pairs = kernel[kernel_labels.index("i")] * kernel[kernel_labels.index("o")]
    batch = image[image_labels.index("b")] // batch_groups
    return 2 * positions * pairs * batch


def _window(convolution: Instruction) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(part.split("=", 1) for part in found.group(1).split()) if found else {}
    return {name: value.split("x") for name, value in fields.items()}


def valid_positions(
    *, image: int, kernel: int, out: int, stride: int, spread: int, reach: int, low: int
) -> int:
    """(output, kernel) positions of one spatial dimension that meet an element of the image.

    Args:
      image: size of the image.
      kernel: size of the kernel.
      out: size of the result.
      stride: image positions between outputs.
      spread: dilation of the image.
      reach: dilation of the kernel.
      low: padding before the image.
    """
    valid = 0
    for place in range(out):
        for tap in range(kernel):
            at = place * stride + tap * reach - low
            valid += at % spread == 0 and 0 <= at // spread < image
    return valid
