"""Rollouts whose text is given, as if an engine had sampled exactly that."""

import numpy as np

from tw_jax.data.text import encode_prompt, encode_response
from tw_jax.rollout.rollout import Rollout, RolloutUnit
from tw_jax.trajectory import metrics
from tw_jax.trajectory.trajectory import Trajectory


def written_rollout(prompt: str, response: str, tokenizer, schema, *, spawn=True) -> Rollout:
    """One token per step; `spawn=False` reads the tags as plain text, like sequential decoding."""
    head = encode_prompt(tokenizer, prompt)
    tokens = np.concatenate([head, encode_response(tokenizer, response, schema.eos_id)])
    parsed = schema.parse(tokens, len(head))
    trajectory = Trajectory(tokens, len(head))
    if spawn and isinstance(parsed, Trajectory):
        trajectory = parsed
    total, critical = metrics.total_tokens(trajectory), metrics.critical_path(trajectory)
    units, step, longest = [], 0, 0
    for i, unit in enumerate(schema.units(trajectory)):
        thread = unit.kind == "thread"
        if thread:
            longest = max(longest, len(unit.completion))
        else:
            join_steps = 3 if longest else 0
            step, longest = step + longest + join_steps, 0
        units.append(
            RolloutUnit(
                kind=unit.kind,
                parent=-1 if i == 0 else 0,
                block=unit.block,
                thread=unit.thread,
                context_len=len(unit.context),
                start=0,
                completion=unit.completion,
                logprobs=np.zeros(len(unit.completion), np.float32),
                finish_reason="thread_stop" if thread else "eos",
                row=4 + max(0, unit.thread - 1),
                start_step=step,
                end_step=step + len(unit.completion) - 1,
            )
        )
        step += 0 if thread else len(unit.completion)
    return Rollout(trajectory, tuple(units), "eos", critical, total)
