"""Traffic between a program's instructions and main memory, loops multiplied in.

An instruction reads its operands and writes its results; what a fusion keeps to itself, and what
lies in on-chip memory, moves nothing. Slices and in-place updates move the slice, not the array.
It is an upper estimate: the compiler may keep more on the chip than its text says. A kernel that
fetches blocks again and again says in its metadata how much that is.
"""

from tw_jax.planning.hlo import Computation, Instruction, Module
from tw_jax.planning.hlo_cost import ProgramCost, kernel_cost

# They name or forward data, or wait for what has been counted at its start.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "call-start", "async-start", "after-all", "partition-id", "replica-id", "domain"),
    *("opt-barrier", "add-dependency"),
)
_SLICES = ("dynamic-slice", "slice", "gather")


def memory_bytes(cost: ProgramCost) -> float:
    """Bytes read from and written to main memory in one run on one device."""
    module = cost.module
    fused = {
        called
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "fusion" and (called := instruction.attribute("calls"))
    }
    total = 0.0
    for name, times in cost.executions.items():
        if name not in fused:
            computation = module.computations[name]
            moved = sum(
                _instruction_bytes(module, computation, instruction)
                + kernel_cost(instruction, "bytes_per_tile", cost.scopes)
                for instruction in computation.instructions.values()
            )
            total += moved * times if moved else 0.0
    return total


def _instruction_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "fusion":
        return _fusion_bytes(module, computation, instruction)
    if opcode in _SLICES:
        return 2 * _main(instruction)
    if opcode == "dynamic-update-slice":
        return 2 * _main(computation.operands(instruction)[1])
    if opcode == "copy-start":  # (copy, original, context)
        source = computation.operands(instruction)[0]
        copy = instruction.types[0]
        return _main(source) + (copy.bytes if copy.space == 0 else 0)
    read = sum(_main(operand) for operand in computation.operands(instruction))
    if opcode.endswith("-start"):  # its result repeats the operands
        return 2 * read
    return read + _main(instruction)


def _fusion_bytes(module: Module, caller: Computation, fusion: Instruction) -> int:
    inner = module.computations[fusion.attribute("calls") or ""]
    read = 0
    for number, operand in enumerate(caller.operands(fusion)):
        parameter = inner.parameter(number)
        if parameter is not None:
            read += min(_main(operand), _read_of(module, inner, parameter))
    return read + min(_main(fusion), _written(module, inner, inner.instructions[inner.root]))


def _read_of(module: Module, computation: Computation, value: Instruction) -> int:
    """Bytes of a fusion's parameter that it reads: only slices of it, where all users slice it."""
    whole = sum(array.bytes for array in value.types)
    read = 0
    for user in computation.instructions.values():
        if value.name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == value.name:
            read += sum(array.bytes for array in user.types)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # overwritten in place
        elif user.opcode == "bitcast":
            read += _read_of(module, computation, user)
        elif user.opcode == "fusion":
            inner = module.computations[user.attribute("calls") or ""]
            parameter = inner.parameter(user.operands.index(value.name))
            read += whole if parameter is None else _read_of(module, inner, parameter)
        else:
            return whole
    return min(read, whole)


def _written(module: Module, inner: Computation, root: Instruction) -> int:
    """Bytes that a fusion writes: the update, where its result is an array updated in place."""
    if root.opcode == "tuple":
        return sum(_written(module, inner, operand) for operand in inner.operands(root))
    if root.opcode == "bitcast":
        return _written(module, inner, inner.operands(root)[0])
    if root.opcode == "fusion":
        deeper = module.computations[root.attribute("calls") or ""]
        return _written(module, deeper, deeper.instructions[deeper.root])
    if root.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in inner.operands(root)[1].types)
    return sum(array.bytes for array in root.types)


def _main(instruction: Instruction) -> int:
    """Bytes of a result that lie in main memory."""
    return sum(array.bytes for array in instruction.types if array.space == 0)
