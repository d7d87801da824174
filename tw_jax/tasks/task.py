"""What a task is: checkable problems, each with a sequential and a parallel solution.

Problems are a pure function of (task, split, index, seed): any of them is made in O(1) from a keyed
hash, so a data pipeline resumes from a position alone, and every process and machine agrees.
"""

import dataclasses
import hashlib
import itertools
import struct
from collections.abc import Iterator
from typing import ClassVar, Literal, Protocol

Split = Literal["train", "heldout"]
Style = Literal["sequential", "parallel"]

_HASH_WORDS = struct.Struct("<8Q")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem with its solutions as text.

    Attributes:
      prompt: the question.
      answer: what `Task.extract_answer` finds in a correct response.
      sequential: a correct response that works line by line.
      parallel: a correct response that does the independent lines in the threads of one parallel
        block. Neither response holds the end-of-text token.
    """

    prompt: str
    answer: str
    sequential: str
    parallel: str

    def response(self, style: Style) -> str:
        """The response text of one style."""
        return self.parallel if style == "parallel" else self.sequential


class Task(Protocol):
    """A source of problems whose answers can be checked.

    Attributes:
      name: of the task in configs and reports.
    """

    name: ClassVar[str]

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """Problem number `index` of a split's endless stream; the splits share no problem."""
        ...

    def longest_problem(self) -> Problem:
        """A problem whose texts are at least as long as any other's: it sizes rows and budgets."""
        ...

    def extract_answer(self, response_text: str) -> str | None:
        """The answer that a response states, None if it states none in the task's form."""
        ...

    def style_prefix(self, style: Style, problem: Problem) -> str:
        """The first characters of a response that force a style."""
        ...


def random_words(*key: str | int) -> Iterator[int]:
    """Yields uniform 64-bit integers that depend on the key alone.

    BLAKE2b in counter mode: per problem it costs a tenth of setting up a NumPy bit generator, and
    its values are fixed by RFC 7693 whatever library versions are installed.
    """
    name = "/".join(map(str, key))
    for block in itertools.count():
        yield from _HASH_WORDS.unpack(hashlib.blake2b(f"{name}/{block}".encode()).digest())


def draw_below(words: Iterator[int], bound: int) -> int:
    """Draws from 0..bound-1; the bias is below bound / 2**64."""
    return next(words) * bound >> 64


def choose_style(split: Split, index: int, seed: int, parallel_share: float) -> Style:
    """The style in which to show a problem when `parallel_share` of all are to be parallel."""
    chosen = next(random_words("style", split, seed, index)) < parallel_share * 2**64
    return "parallel" if chosen else "sequential"
