"""What a caller asks of the rollout engine."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int32

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
      timeout_s: seconds from its submission after which the rollout ends where it is; None: never.
    """

    prompt: Int32[np.ndarray, "prompt"]
    seed: int
    sampling: SamplingParams = SamplingParams()
    mode: Mode = "parallel"
    forced_prefix: tuple[int, ...] = ()
    timeout_s: float | None = None


def sampling_seed(*key: int) -> int:
    """A 32-bit seed for a `Request` that depends on the given integers alone."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])
