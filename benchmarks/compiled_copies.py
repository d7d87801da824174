"""Which arrays an optimised program copies: silent copies of a whole cache ruin a decoding loop."""

import re

from tw_jax.planning.hlo import parse_hlo

# A copy behind a gather is part of it, and no copy of what was gathered from.
_GATHER = re.compile(r"(?<!all-)(?<!all_)gather")


def compiled_copies(text: str) -> list[tuple[int, ...]]:
    """Dimensions of every array that is copied, but for those that have just been gathered.

    Args:
      text: of a compiled program, `jax.jit(f).lower(...).compile().as_text()`.
    """
    module = parse_hlo(text)
    fusions = {
        instruction.attribute("calls"): instruction
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "fusion"
    }
    copied = []
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode not in ("copy", "copy-start"):
                continue
            fusion = fusions.get(computation.name, instruction)
            origin = " ".join((instruction.op_name, *instruction.operands, *fusion.operands))
            if not _GATHER.search(origin):
                copied.append(instruction.types[0].dims)
    return copied
