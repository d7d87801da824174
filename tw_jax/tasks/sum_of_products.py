"""Sums of products: one thread per product, as many as the problem has; the join adds them up.

`A12*77+B39*27=` asks for 21 * 77 + 93 * 72 (numbers are written least-significant digit first, see
`worked_arithmetic`). A thread first copies its own product and then works from that copy:

    1: A12*77:1*7+0=70,2*7+0=41>7410;1*7+0=70,2*7+0=41>0741;7410+0741=7161
    2: B39*27:3*2+0=60,9*2+0=81>6810;3*7+0=12,9*7+2=56>0156;6810+0156=6966
    71610+69660=31380
    #31380
"""

import dataclasses
import string
from typing import ClassVar

from tw_jax.errors import UserError
from tw_jax.tasks import worked_arithmetic
from tw_jax.tasks.operands import check_heldout_fraction, draw_pair
from tw_jax.tasks.task import Problem, Split, Style, draw_below, random_words
from tw_jax.tasks.worked_arithmetic import reversed_digits

_LABELS = string.ascii_uppercase


@dataclasses.dataclass(frozen=True)
class SumOfProductsConfig:
    """Configures `SumOfProducts`.

    Attributes:
      min_products: fewest products in a problem.
      max_products: most products in a problem; fixes the width of the sums.
      digits: digits of each factor.
      heldout_fraction: share of the unordered factor pairs that training never shows; every
        product of a held-out problem is made of such a pair.
    """

    min_products: int = 2
    max_products: int = 4
    digits: int = 2
    heldout_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 2 <= self.min_products <= self.max_products <= len(_LABELS):
            raise UserError(
                f"sum_of_products needs 2 <= min_products <= max_products <= {len(_LABELS)}, "
                f"got {self.min_products} and {self.max_products}"
            )
        if self.digits < 1:
            raise UserError(f"sum_of_products needs digits >= 1, got {self.digits}")
        check_heldout_fraction(self.heldout_fraction)

    @property
    def sum_digits(self) -> int:
        """Width at which sums are written: digits of the largest possible one."""
        return len(str(self.max_products * (10**self.digits - 1) ** 2))


@dataclasses.dataclass(frozen=True)
class SumOfProducts:
    """Sums of a varying number of products. Implements `Task`."""

    config: SumOfProductsConfig

    name: ClassVar[str] = "sum_of_products"

    def problem(self, split: Split, index: int, seed: int) -> Problem:
        """See `Task.problem`."""
        config = self.config
        words = random_words(self.name, split, seed, index)
        choices = config.max_products - config.min_products + 1
        products = config.min_products + draw_below(words, choices)
        pairs = [
            draw_pair(words, config.digits, split, config.heldout_fraction) for _ in range(products)
        ]
        return self._worked(pairs)

    def longest_problem(self) -> Problem:
        """See `Task.longest_problem`; only the number of products matters."""
        largest = 10**self.config.digits - 1
        return self._worked([(largest, largest)] * self.config.max_products)

    def extract_answer(self, response_text: str) -> str | None:
        """See `Task.extract_answer`."""
        return worked_arithmetic.stated_answer(response_text)

    def style_prefix(self, style: Style, problem: Problem) -> str:
        """See `Task.style_prefix`."""
        return worked_arithmetic.forcing_prefix(style, problem)

    def _worked(self, pairs: list[tuple[int, int]]) -> Problem:
        digits, sum_digits = self.config.digits, self.config.sum_digits
        questions, bodies = [], []
        for label, (first, second) in zip(_LABELS, pairs, strict=False):
            question = f"{label}{reversed_digits(first, digits)}*{reversed_digits(second, digits)}"
            values, workings = worked_arithmetic.partial_products(first, second, digits)
            sums = worked_arithmetic.running_sums(values, 2 * digits)
            questions.append(question)
            bodies.append(f"{question}:{';'.join([*workings, *sums])}")
        results = [first * second for first, second in pairs]
        return worked_arithmetic.worked_problem(
            prompt=f"{'+'.join(questions)}=",
            answer=reversed_digits(sum(results), sum_digits),
            plans=_LABELS[: len(pairs)],
            bodies=bodies,
            join_lines=worked_arithmetic.running_sums(results, sum_digits),
        )
