"""A task's endless stream of trajectories, by index."""

from typing import Any

import numpy as np

from tw_jax.data.text import encode_prompt, encode_response
from tw_jax.errors import UserError
from tw_jax.tasks.task import Problem, Split, Style, Task, choose_style
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory

# Grain wants a length; no run draws this many problems.
_ENDLESS = 2**40


class TaskTrajectories:
    """A task's problems as trajectories, each in sequential or parallel style."""

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        schema: Schema,
        *,
        split: Split,
        seed: int,
        parallel_share: float,
    ) -> None:
        """Item i is problem i of the split, in a style drawn from (seed, i) alone.

        Raises:
          UserError: the tasks write their parallel solutions in another schema's language.
        """
        if schema.name != "threadweaver":
            raise UserError(
                f"model.schema={schema.name}: the task {task.name!r} writes its parallel solutions "
                "in ThreadWeaver's tags; train on files (data.files, data.heldout_files), or take "
                "model.schema=threadweaver"
            )
        self._task, self._tokenizer, self._schema = task, tokenizer, schema
        self._split: Split = split
        self._seed, self._parallel_share = seed, parallel_share

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Trajectory:
        problem = self._task.problem(self._split, int(index), self._seed)
        style = choose_style(self._split, int(index), self._seed, self._parallel_share)
        return self._trajectory(problem, style)

    def longest_trie_len(self) -> int:
        """Tokens of the longest trie that an item can give."""
        problem = self._task.longest_problem()
        styles: tuple[Style, Style] = ("sequential", "parallel")
        tries = [self._schema.forest([self._trajectory(problem, style)]) for style in styles]
        return max(len(trie) for trie in tries)

    def _trajectory(self, problem: Problem, style: Style) -> Trajectory:
        prompt = encode_prompt(self._tokenizer, problem.prompt)
        response = encode_response(self._tokenizer, problem.response(style), self._schema.eos_id)
        parsed = self._schema.parse(np.concatenate([prompt, response]), len(prompt))
        if isinstance(parsed, tuple):
            raise ValueError(f"the task {self._task.name!r} wrote a malformed block: {parsed[0]}")
        return parsed
