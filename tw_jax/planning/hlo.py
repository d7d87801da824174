"""Reads the text of compiled XLA programs: computations, instructions, shapes.

Only what the planner asks for is kept of each line; layouts, metadata and backend settings stay in
`attributes` as text. The text is what `jax.stages.Compiled.as_text()` returns, for CPU and TPU.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[sufc]\d+\w*)\[([\d,<= ]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_ASSIGNMENT = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
# The only attribute that is written over several lines.
_KERNEL_METADATA = re.compile(r"kernel_metadata=\{[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """One array of an instruction's result.

    Attributes:
      dtype: XLA's name, such as `bf16`.
      dims: sizes.
      space: memory that holds it: 0 is the device's main memory, 1 a TPU's on-chip memory.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Size in memory, tiling padding not counted."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.match(r"[a-z]+(\d+)", self.dtype)
            bits = int(digits.group(1)) if digits else 0
        return math.ceil(math.prod(self.dims) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      opcode: such as `dot` or `all-gather-start`.
      types: arrays of the result; a tuple's are flattened.
      operands: names of the instructions it reads.
      arguments: text between the parentheses: the value of a constant, the number of a parameter.
      attributes: text behind the operands.
    """

    name: str
    opcode: str
    types: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @property
    def op_name(self) -> str:
        """The path of named scopes and primitives that JAX gave it; "" where it has none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str | None:
        """The value of a plain attribute, such as `condition` or `direction`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def names_in(self, name: str) -> tuple[str, ...]:
        """The computations in a braced list, such as `branch_computations={%a, %b}`."""
        found = re.search(rf"\b{name}=\{{([^}}]*)\}}", self.attributes)
        return tuple(_OPERAND.findall(found.group(1))) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program.

    Attributes:
      name: unique in the module.
      instructions: by name, in the order of the text.
      root: name of the instruction whose result it returns.
    """

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that produce the operands."""
        return [self.instructions[name] for name in instruction.operands]

    def parameter(self, number: int) -> Instruction | None:
        """The instruction that stands for an argument."""
        for instruction in self.instructions.values():
            if instruction.opcode == "parameter" and instruction.arguments == str(number):
                return instruction
        return None


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: name of the computation that runs.
      partitions: devices that it was partitioned for.
    """

    computations: Mapping[str, Computation]
    entry: str
    partitions: int


def parse_hlo(text: str) -> Module:
    """Parses the text of one compiled program.

    Raises:
      ValueError: there is no entry computation, or a line cannot be read; names the line.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    name, instructions, root = "", {}, ""
    text = _KERNEL_METADATA.sub(lambda found: found.group().replace("\n", ""), text)
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            name, instructions, root = header["name"], {}, ""
            entry = name if header["entry"] else entry
        elif line.startswith("}"):
            if name:
                computations[name] = Computation(name, instructions, root)
            name = ""
        elif name and (found := _ASSIGNMENT.match(line)):
            instruction = _instruction(found["name"], line[found.end() :], number)
            instructions[instruction.name] = instruction
            if found["root"]:
                root = instruction.name
    if entry not in computations:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def _instruction(name: str, text: str, number: int) -> Instruction:
    text = _COMMENT.sub("", text)
    type_end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    opcode = _OPCODE.match(text, type_end)
    if type_end < 0 or opcode is None:
        raise ValueError(f"line {number}: cannot read the instruction {name!r}")
    end = _closing(text, opcode.end() - 1)
    arguments = text[opcode.end() : end - 1]
    return Instruction(
        name=name,
        opcode=opcode.group(1),
        types=tuple(array_types(text[:type_end])),
        operands=tuple(_OPERAND.findall(arguments)),
        arguments=arguments,
        attributes=text[end:],
    )


def array_types(text: str) -> Iterator[ArrayType]:
    """The arrays named in a type, `(bf16[2,3]{1,0}, u32[])`."""
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        # A bounded dynamic size is written `<=8`; its bound is what memory is taken for.
        sizes = tuple(int(size.strip("<= ")) for size in dims.split(",") if size.strip())
        yield ArrayType(dtype, sizes, int(space.group(1)) if space else 0)


def _closing(text: str, start: int) -> int:
    """Position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)
