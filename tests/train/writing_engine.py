"""A step of RL whose rollouts are written by hand."""

import dataclasses
import pathlib
import tempfile

import numpy as np

from tests.evals.written_rollouts import written_rollout
from tw_jax.data.text import encode_prompt
from tw_jax.rewards.grading_queue import GradingQueue
from tw_jax.rollout.session import RolloutsStopped
from tw_jax.train.pending_rollouts import PendingRollouts
from tw_jax.train.rl_problems import RLProblem, RLProblems
from tw_jax.train.rl_sampling import StepSampler


class WritingEngine:
    """Finishes rollouts one by one, in an order of its own, with the texts that it is given."""

    def __init__(self, model, texts, order=None, after_each=None):
        self.model, self.texts, self.after_each, self.order = model, texts, after_each, order
        self.requests = []
        self.taken = []

    def take(self, params):
        self.taken.append(params)

    def release(self):
        self.taken.append("released")

    def generate(self, requests, *, on_finish=None, should_stop=None):
        assert on_finish is not None
        self.requests = list(requests)
        rollouts = {}
        order = range(len(requests)) if self.order is None else self.order
        for number, index in enumerate(order):
            if should_stop is not None and should_stop():
                raise RolloutsStopped(f"{number} finished")
            rollouts[index] = self.rollout(requests[index].prompt, self.texts[index])
            on_finish(index, rollouts[index])
            if self.after_each is not None:
                self.after_each(number)
        return [rollouts[index] for index in range(len(requests))]

    def rollout(self, prompt, text):
        written = written_rollout("", text, self.model.tokenizer, self.model.schema)
        old = written.trajectory
        shift = len(prompt) - old.prompt_len
        moved = dataclasses.replace(
            old,
            tokens=np.concatenate([prompt, old.tokens[old.prompt_len :]]),
            prompt_len=len(prompt),
            blocks=tuple(
                dataclasses.replace(
                    block, **{f: getattr(block, f) + shift for f in ("start", "join_end", "end")}
                )
                for block in old.blocks
            ),
        )
        return dataclasses.replace(written, trajectory=moved)


def sample_step(config, model, engine, problems, step):
    """Rollouts and grades of one step, with nothing kept from before."""
    with (
        tempfile.TemporaryDirectory() as folder,
        StepSampler(
            config,
            model,
            engine,
            problems,
            PendingRollouts(pathlib.Path(folder), "a test", 0),
            lambda: False,
        ) as sampler,
    ):
        sample = sampler.sample(step, step * config.prompts, {})
    assert sample is not None
    return sample.rollouts, sample.grades


def problems_of(model, questions, grader, at_once=2):
    """Problems at positions 0, 1, ... from pairs of (prompt, answer)."""
    asked = [RLProblem(encode_prompt(model.tokenizer, q), a) for q, a in questions]
    return RLProblems(lambda i: asked[i % len(asked)], GradingQueue(grader, at_once), {})
