"""From a request's body to what the engine is asked: the one place where fields are mapped."""

import dataclasses
import re
import secrets
from typing import Any

import numpy as np
from jaxtyping import Int32

from tw_jax.errors import UserError
from tw_jax.rollout.engine import EngineConfig, RolloutEngine
from tw_jax.rollout.request import Request, SamplingParams, sampling_seed
from tw_jax.serve.bodies import GenerationBody
from tw_jax.serve.config import ServeConfig
from tw_jax.serve.errors import ApiError


def sampling_params(
    body: GenerationBody, defaults: SamplingParams, engine: EngineConfig
) -> SamplingParams:
    """What the body says, and the server's defaults where it says nothing.

    Budgets beyond the context are the context: the engine counts in 32 bits.
    """
    asked: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "repetition_scope": body.repetition_scope,
        "logit_bias": _logit_bias(body),
        "top_k": _at_most(body.top_k, 2**31 - 1),
        "max_response_tokens": _at_most(body.token_limit, engine.context_len),
        "max_thread_tokens": _at_most(body.max_thread_tokens, engine.context_len),
        "max_blocks": body.max_blocks,
        "max_threads": body.max_threads,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return dataclasses.replace(defaults, **given)


def engine_requests(
    body: GenerationBody,
    prompts: list[Int32[np.ndarray, "prompt"]],
    engine: RolloutEngine,
    config: ServeConfig,
) -> list[Request]:
    """One request per choice: `n` for each prompt, in order.

    The first choice of each prompt takes the seed as it is, so that it gives the same tokens as
    `RolloutEngine.generate`; choice i the seed `sampling_seed(seed, i)`.

    Raises:
      ApiError: the engine cannot serve them; names the field.
    """
    if body.n * len(prompts) > config.max_choices:
        raise ApiError(
            400,
            f"n: {len(prompts)} prompts with n={body.n} are {body.n * len(prompts)} answers; this "
            f"server gives {config.max_choices} to a request, so send several",
            param="n",
            code="invalid_value",
        )
    seed = secrets.randbits(32) if body.seed is None else body.seed
    sampling = sampling_params(body, config.sampling, config.engine)
    timeout_s = min(config.timeout_s, body.timeout_s or config.timeout_s)
    requests = []
    for prompt in prompts:
        for choice in range(body.n):
            request = Request(
                prompt=prompt,
                seed=sampling_seed(seed, choice) if choice else seed,
                sampling=sampling,
                mode="parallel" if body.parallel_thinking else "sequential",
                timeout_s=timeout_s,
            )
            requests.append(request)
        _check(engine, requests[-1])
    return requests


def _check(engine: RolloutEngine, request: Request) -> None:
    try:
        engine.check("the request", request)
    except UserError as error:
        message = str(error)
        code = "context_length_exceeded" if "leave no room" in message else "invalid_value"
        # Fields of SamplingParams keep their names in bodies, all that can be refused here.
        named = re.search(r"sampling\.(\w+)", message)
        param = named[1] if named else "prompt"
        raise ApiError(400, message, param=param, code=code) from error


def _logit_bias(body: GenerationBody) -> tuple[tuple[int, float], ...] | None:
    if body.logit_bias is None:
        return None
    return tuple((int(token), bias) for token, bias in body.logit_bias.items())


def _at_most(value: int | None, limit: int) -> int | None:
    return None if value is None else min(value, limit)
