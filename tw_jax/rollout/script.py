"""Scripted rollouts: units that take given tokens in place of sampled ones.

The engine then does all that it does for sampled text, forks and joins included. It is how speed is
measured without a trained model, and how a known trajectory gets its sampler's log-probabilities.
"""

import numpy as np
from jaxtyping import Int32

from tw_jax.errors import UserError
from tw_jax.rollout.request import Request
from tw_jax.trajectory.schema import Schema


def check_script(name: str, request: Request, schema: Schema, room: bool) -> None:
    """Checks that a request's script can be played.

    Args:
      name: what messages call it.
      request: the request.
      schema: the engine's.
      room: the engine has room for scripts.

    Raises:
      UserError: it cannot; says why.
    """
    script = request.script
    if script is None:
        return
    if not room:
        raise UserError(f"{name}: has a script, which needs engine.scripts=true")
    if schema.join_rule != "reencode":
        raise UserError(f"{name}: scripts are played by schemas that re-encode at the join only")
    if not np.array_equal(script.tokens[: script.prompt_len], request.prompt):
        raise UserError(f"{name}: its script is for another prompt")


def script_areas(
    request: Request, schema: Schema, areas: int, store_len: int
) -> Int32[np.ndarray, "areas store"]:
    """The script of a request as the token store holds it; -1 where there is none.

    Tokens lie at their positions in their unit's own context, threads from the second on in areas
    of their own.
    """
    lines = np.full((areas, store_len), -1, np.int32)
    script = request.script
    if script is None:
        return lines
    if request.mode == "sequential":
        lines[0, script.prompt_len : len(script.tokens)] = script.tokens[script.prompt_len :]
        return lines
    for unit in schema.units(script):
        area, start = max(unit.thread - 1, 0), len(unit.context)
        lines[area, start : start + len(unit.completion)] = unit.completion
    return lines
