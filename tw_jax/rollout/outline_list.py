"""Reads outline numbers from token ids, one rollout and one token at a time, on the host.

The grammar is that of `tw_jax.rollout.outlines`, which does the same for a batch inside the jitted
loop; a test holds the two against each other.
"""

from typing import Literal

from tw_jax.trajectory.schema import Schema

_State = Literal["idle", "before", "number", "dot", "after"]


class OutlineList:
    """What has been read of the current list of outlines.

    Attributes:
      numbers: distinct numbers of the list, each as the tokens it was written with.
      duplicates: numbers dropped because they repeated an earlier one of their list.
      open: inside a list.
    """

    def __init__(self, schema: Schema, max_threads: int, max_digits: int) -> None:
        """A reader that has seen nothing.

        Args:
          schema: the language of parallel thought.
          max_threads: further numbers of one list are dropped.
          max_digits: most tokens of a number; longer ones are none.
        """
        self._classes, self._tokens = schema.classes, schema.fork_join
        self._max_threads, self._max_digits = max_threads, max_digits
        self._state: _State = "idle"
        self._current: list[int] = []
        self.numbers: list[tuple[int, ...]] = []
        self.duplicates = 0
        self.open = False

    def read(self, token: int) -> bool:
        """Reads one token; whether it closes a list that holds at least one number."""
        if self._is("colon", token) and self._state in ("number", "after"):
            self._accept(tuple(self._current))
        self._state = self._next_state(token)
        closes = token == self._tokens.spawn_trigger
        spawns = closes and self.open and bool(self.numbers)
        if token == self._tokens.plans_open:
            self.open, self.numbers = True, []
        elif closes:
            self.open = False
        return spawns

    def _accept(self, number: tuple[int, ...]) -> None:
        if number in self.numbers:
            self.duplicates += 1
        elif len(self.numbers) < self._max_threads:
            self.numbers.append(number)

    def _next_state(self, token: int) -> _State:
        """Where in the head of an outline the reader stands behind a token."""
        state = self._state
        if self.open and token == self._tokens.plan_open:
            self._current = []
            return "before"
        digit = self._is("digit", token) and state in ("before", "number", "dot")
        dot = self._is("dot", token) and state == "number"
        if (digit or dot) and len(self._current) < self._max_digits:
            self._current.append(token)
            return "number" if digit else "dot"
        if self._is("space", token):
            if state == "before":
                return "before"
            if state in ("number", "after"):
                return "after"
        return "idle"

    def _is(self, name: Literal["digit", "dot", "colon", "space"], token: int) -> bool:
        """Whether a token belongs to a class; ids beyond the tokenizer belong to none."""
        classes = self._classes
        if token >= len(classes.digit):
            return False
        flags = {
            "digit": classes.digit[token] >= 0,
            "dot": classes.dot[token],
            "colon": classes.colon[token],
            "space": classes.space[token],
        }
        return bool(flags[name])
