"""Long multiplication: one thread per digit of the second factor, the join adds them up.

`313*192=` asks for 313 * 291 (numbers are written least-significant digit first, see
`worked_arithmetic`). The three partial products are independent of each other:

    1: 3*1+0=30,1*1+0=10,3*1+0=30>313000
    2: 3*9+0=72,1*9+2=11,3*9+1=82>071820
    3: 3*2+0=60,1*2+0=20,3*2+0=60>006260
    313000+071820=384820
    384820+006260=380190
    #380190
"""

import dataclasses
from typing import ClassVar

from tw_jax.errors import UserError
from tw_jax.tasks import worked_arithmetic
from tw_jax.tasks.operands import check_heldout_fraction, draw_pair
from tw_jax.tasks.task import Problem, Split, Style, random_words
from tw_jax.tasks.worked_arithmetic import reversed_digits


@dataclasses.dataclass(frozen=True)
class MultiplicationConfig:
    """Configures `Multiplication`.

    Attributes:
      digits: digits of each factor; as many threads.
      heldout_fraction: share of the unordered factor pairs that training never shows.
    """

    digits: int = 3
    heldout_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.digits < 2:
            raise UserError(f"multiplication needs digits >= 2 to fork, got {self.digits}")
        check_heldout_fraction(self.heldout_fraction)


@dataclasses.dataclass(frozen=True)
class Multiplication:
    """Products of two numbers with equally many digits. Implements `Task`."""

    config: MultiplicationConfig

    name: ClassVar[str] = "multiplication"

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """See `Task.problem`."""
        digits = self.config.digits
        words = random_words(self.name, split, seed, index)
        first, second = draw_pair(words, digits, split, self.config.heldout_fraction)
        values, workings = worked_arithmetic.partial_products(first, second, digits)
        second_digits = reversed_digits(second, digits)
        return worked_arithmetic.worked_problem(
            prompt=f"{reversed_digits(first, digits)}*{second_digits}=",
            answer=reversed_digits(first * second, 2 * digits),
            plans=second_digits,
            bodies=workings,
            join_lines=worked_arithmetic.running_sums(values, 2 * digits),
        )

    def longest_problem(self) -> Problem:
        """See `Task.longest_problem`; all of them are equally long."""
        return self.problem("train", 0, 0)

    def extract_answer(self, response_text: str) -> str | None:
        """See `Task.extract_answer`."""
        return worked_arithmetic.stated_answer(response_text)

    def style_prefix(self, style: Style, problem: Problem) -> str:
        """See `Task.style_prefix`."""
        return worked_arithmetic.forcing_prefix(style, problem)
