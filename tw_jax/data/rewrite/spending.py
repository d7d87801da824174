"""The budget: before a call its worst case is set aside, behind it what it cost is booked."""

import asyncio
import dataclasses

from tw_jax.data.rewrite.config import RewriteBudget


class BudgetSpent(Exception):
    """A call that could exceed the budget was not made."""


@dataclasses.dataclass
class _Sum:
    usd: float = 0.0
    tokens: int = 0


class Purse:
    """What may still be spent.

    Attributes:
      usd: spent so far, earlier runs included.
      tokens: spent so far, earlier runs included.
    """

    def __init__(self, budget: RewriteBudget, usd: float, tokens: int) -> None:
        """Begins with what earlier runs have spent."""
        self._budget = budget
        self._spent, self._reserved = _Sum(usd, tokens), _Sum()
        self._in_flight = 0
        self._changed = asyncio.Condition()

    @property
    def usd(self) -> float:
        """See the class."""
        return self._spent.usd

    @property
    def tokens(self) -> int:
        """See the class."""
        return self._spent.tokens

    async def reserve(self, usd: float, tokens: int) -> None:
        """Sets the worst case of a call aside, if need be after other calls have come back.

        Raises:
          BudgetSpent: it does not fit, whatever calls in flight cost.
        """
        async with self._changed:
            while not self._fits(usd, tokens):
                if not self._in_flight:
                    raise BudgetSpent
                await self._changed.wait()
            self._reserved.usd += usd
            self._reserved.tokens += tokens
            self._in_flight += 1

    async def settle(self, usd: float, tokens: int, *, spent_usd: float, spent_tokens: int) -> None:
        """Books a call that has come back.

        Args:
          usd: what was set aside.
          tokens: what was set aside.
          spent_usd: what it cost.
          spent_tokens: what it cost.
        """
        async with self._changed:
            self._in_flight -= 1
            self._reserved.usd = self._reserved.usd - usd if self._in_flight else 0.0
            self._reserved.tokens -= tokens
            self._spent.usd += spent_usd
            self._spent.tokens += spent_tokens
            self._changed.notify_all()

    def _fits(self, usd: float, tokens: int) -> bool:
        max_usd, max_tokens = self._budget.max_usd, self._budget.max_tokens
        usd += self._spent.usd + self._reserved.usd
        tokens += self._spent.tokens + self._reserved.tokens
        # Sums of rounded prices: a budget of 0.3 admits three calls of 0.1.
        return (max_usd is None or usd <= max_usd + 1e-9) and (
            max_tokens is None or tokens <= max_tokens
        )
