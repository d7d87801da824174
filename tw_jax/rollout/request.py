"""What a caller asks of the rollout engine."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int32

from tw_jax.errors import UserError
from tw_jax.trajectory.trajectory import Trajectory

Mode = Literal["parallel", "sequential"]
RepetitionScope = Literal["unit", "context"]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when a rollout ends.

    In this order: repetition penalty, bias, temperature, top-k, top-p over what top-k left, min-p.
    Greedy decoding knows the first two. Recorded log-probabilities are those of the model's own
    logits, before any of it.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of tokens whose probability reaches `top_p`; 1 keeps all.
      min_p: keep tokens at least `min_p` times as probable as the likeliest; 0 keeps all.
      repetition_penalty: divides positive logits of tokens that occurred, and multiplies negative
        ones; 1 is off.
      repetition_scope: where they occurred: "context" is all that the unit sees, prompt included;
        "unit" only what the segment or thread has sampled itself.
      logit_bias: pairs of a token id and what is added to its logit; `-.inf` bans it. Tokens that
        the engine writes itself, such as a thread's header, are not touched.
      max_response_tokens: budget of tokens after the prompt, forced and joined tokens included.
      max_thread_tokens: budget of tokens sampled in one thread.
      max_blocks: further spawn triggers are treated as plain text.
      max_threads: outlines beyond this many are not spawned.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_scope: RepetitionScope = "context"
    logit_bias: tuple[tuple[int, float], ...] = ()
    max_response_tokens: int = 512
    max_thread_tokens: int = 256
    max_blocks: int = 16
    max_threads: int = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """One rollout to sample.

    Attributes:
      prompt: prompt token ids.
      seed: sampling keys depend on (seed, thread path, token index) only.
      sampling: see `SamplingParams`.
      mode: "parallel" spawns threads; "sequential" decodes plainly, tags included.
      forced_prefix: first tokens of the response, given instead of sampled; they count as response.
      script: a trajectory of the same prompt whose units' tokens are taken in place of sampled
        ones, with their log-probabilities, as far as they go; needs `engine.scripts`.
      timeout_s: seconds from its submission after which the rollout ends where it is; None: never.
    """

    prompt: Int32[np.ndarray, "prompt"]
    seed: int
    sampling: SamplingParams = SamplingParams()
    mode: Mode = "parallel"
    forced_prefix: tuple[int, ...] = ()
    script: Trajectory | None = None
    timeout_s: float | None = None


def sampling_seed(*key: int) -> int:
    """A 32-bit seed for a `Request` that depends on the given integers alone."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def check_request(name: str, request: Request, context_len: int, context_key: str) -> None:
    """Refuses a request that nothing could serve; how tokens are drawn is not looked at.

    Args:
      name: what messages call it.
      request: the request.
      context_len: prompt and response together never get longer.
      context_key: the setting that says so.

    Raises:
      UserError: names the request, the field and what is expected of it.
    """
    sampling = request.sampling
    prompt_len, prefix_len = len(request.prompt), len(request.forced_prefix)
    if prompt_len == 0:
        raise UserError(f"{name}: the prompt is empty; begin it with a token such as <bos>")
    if min(*map(int, request.prompt), *request.forced_prefix, 0) < 0:
        raise UserError(f"{name}: token ids must not be negative")
    if prompt_len + prefix_len >= context_len:
        raise UserError(
            f"{name}: a prompt of {prompt_len} and a forced prefix of {prefix_len} tokens leave no "
            f"room in {context_key}={context_len}: shorten them or raise it"
        )
    for field in ("max_response_tokens", "max_threads", "max_blocks", "max_thread_tokens"):
        if (value := getattr(sampling, field)) < 1:
            raise UserError(f"{name}: sampling.{field}={value} must be at least 1")
    if prefix_len >= sampling.max_response_tokens:
        raise UserError(
            f"{name}: its forced prefix of {prefix_len} tokens spends the budget of "
            f"max_response_tokens={sampling.max_response_tokens}"
        )
    if request.timeout_s is not None and not request.timeout_s > 0:
        raise UserError(f"{name}: timeout_s={request.timeout_s} must be positive")
    if not 0 <= request.seed < 2**64:
        raise UserError(f"{name}: seed={request.seed} must lie in 0..2**64 - 1")
    if request.mode not in ("parallel", "sequential"):
        raise UserError(f"{name}: mode={request.mode!r} must be 'parallel' or 'sequential'")
