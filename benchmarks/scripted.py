"""Trajectories written beforehand, which the engine decodes as if the model had chosen them.

So the schedule is known, while every token costs what a sampled one costs.
"""

import dataclasses
from typing import Any

import numpy as np

from tw_jax.rollout.request import Request, SamplingParams
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory

PLAN = "part"
_LETTERS = "abcdefghijklmnopqrstuvwxyz "


@dataclasses.dataclass(frozen=True)
class Plot:
    """How a scripted trajectory runs, in tokens (of the character tokenizer).

    Attributes:
      blocks: lengths of the threads' bodies, block by block.
      segment: length of the sequential text before each block and behind the last.
    """

    blocks: tuple[tuple[int, ...], ...]
    segment: int

    @property
    def threads(self) -> int:
        """Most threads of a block."""
        return max(map(len, self.blocks))


def scripted_trajectory(
    plot: Plot, schema: Schema, tokenizer: Any, seed: int, *, prompt_len: int = 32
) -> Trajectory:
    """A well-formed trajectory of that course with random letters, closed by end of text."""
    rng = np.random.default_rng(seed)

    def letters(count: int) -> str:
        return "".join(rng.choice(list(_LETTERS), count))

    text = ""
    for lengths in plot.blocks:
        numbers = range(1, len(lengths) + 1)
        outlines = "".join(f"<Outline>{n}: {PLAN}</Outline>\n" for n in numbers)
        threads = "".join(
            f"<Thread>\n{n}: {letters(length)}\n</Thread>"
            for n, length in zip(numbers, lengths, strict=True)
        )
        text += f"{letters(plot.segment)}\n<Parallel>\n<Outlines>\n{outlines}</Outlines>\n"
        text += f"{threads}\n</Parallel>\n"
    text += letters(plot.segment)
    prompt = tokenizer(letters(prompt_len - 1)).input_ids  # begins with <bos>
    response = tokenizer(text, add_special_tokens=False).input_ids
    tokens = np.array([*prompt, *response, schema.eos_id], np.int32)
    trajectory = schema.parse(tokens, len(prompt))
    assert isinstance(trajectory, Trajectory) and not schema.validate(trajectory), trajectory
    return trajectory


def response_len(trajectory: Trajectory) -> int:
    """Tokens behind the prompt."""
    return len(trajectory.tokens) - trajectory.prompt_len


def scripted_request(trajectory: Trajectory, *, parallel: bool, max_threads: int) -> Request:
    """Asks for the trajectory, in parallel or as one sequential text."""
    budget = response_len(trajectory)
    return Request(
        trajectory.tokens[: trajectory.prompt_len],
        seed=0,
        sampling=SamplingParams(
            temperature=0.0,
            max_response_tokens=budget,
            max_thread_tokens=budget,
            max_threads=max_threads if parallel else 1,
            max_blocks=max(1, len(trajectory.blocks)),
        ),
        mode="parallel" if parallel else "sequential",
        script=trajectory,
    )
