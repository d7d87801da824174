"""What servers take and give beyond OpenAI's own `/v1/completions`, as values.

Prompts are always sent as token ids. Text would be encoded again by the server, and a literal
`<Parallel>` that a user wrote would turn into a control token there.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from tw_jax.errors import UserError
from tw_jax.rollout.request import RepetitionScope, SamplingParams

DialectName = Literal["generic", "vllm", "sglang", "tw_jax"]
# stop: at the asked stop token; eos: the model ended its text; unknown: at one of the two, and the
# server does not say which; length: at a budget.
Ending = Literal["stop", "eos", "unknown", "length"]


class AnswerError(Exception):
    """An answer with status 200 that holds no completion; asking again may help."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What one kind of server understands.

    Attributes:
      extra: fields sent with every call. Tags are special tokens, which servers leave out of text
        unless told; the same goes for what stopped it. Ids and log-probabilities are asked for.
      stop_ids: stops are sent as `stop_token_ids`; else as text.
      matched: field of a choice that says which stop was hit; "" where there is none.
      eos_matches: whether that field is filled at an end of text too; where not, null means it.
      options: ways of drawing tokens, beyond OpenAI's, that the server takes: names of fields of
        `SamplingParams`.
      repetition_scopes: what its repetition penalty can look at.
    """

    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stop_ids: bool = False
    matched: str = ""
    eos_matches: bool = False
    options: frozenset[str] = frozenset()
    repetition_scopes: tuple[RepetitionScope, ...] = ()


DIALECTS: Mapping[DialectName, Dialect] = {
    "generic": Dialect(),
    "vllm": Dialect(
        extra={
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # for versions that do not know the former
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
        },
        stop_ids=True,
        matched="stop_reason",
        options=frozenset({"top_k", "min_p", "repetition_penalty"}),
        repetition_scopes=("context",),
    ),
    "sglang": Dialect(
        extra={
            "logprobs": 1,
            "return_token_ids": True,
            "skip_special_tokens": False,
            "no_stop_trim": True,
        },
        stop_ids=True,
        matched="matched_stop",
        eos_matches=True,
        options=frozenset({"top_k", "min_p", "repetition_penalty"}),
        repetition_scopes=("unit",),
    ),
    # Our own server would spawn by itself; here the caller does. Its ids hold what stopped it.
    "tw_jax": Dialect(
        extra={"logprobs": 0, "return_token_ids": True, "parallel_thinking": False},
        options=frozenset({"top_k", "min_p", "repetition_penalty", "repetition_scope"}),
        repetition_scopes=("unit", "context"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one call wrote.

    Attributes:
      tokens: sampled ids, with the stop or end-of-text token that ended them if it is known.
      logprobs: of each token; NaN where the server does not say.
      ending: why it ended.
    """

    tokens: list[int]
    logprobs: list[float]
    ending: Ending


def payload(
    dialect: Dialect,
    *,
    model: str,
    context: list[int],
    max_tokens: int,
    stop_id: int | None,
    stop_text: str,
    sampling: SamplingParams,
    seed: int,
) -> dict[str, Any]:
    """The body of one call.

    Args:
      dialect: of the server.
      model: the name under which it serves the model.
      context: token ids to continue.
      max_tokens: budget of the call.
      stop_id: token that ends it, included; None for none but the end of text.
      stop_text: the same as text.
      sampling: how tokens are drawn.
      seed: 31 bits, for servers that take one.

    Raises:
      UserError: the dialect cannot say what is asked.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": context,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "n": 1,
        "seed": seed,
        **dialect.extra,
    }
    body |= _options(dialect, sampling)
    if stop_id is not None:
        body |= {"stop_token_ids": [stop_id]} if dialect.stop_ids else {"stop": [stop_text]}
    return body


def _options(dialect: Dialect, sampling: SamplingParams) -> dict[str, Any]:
    """Ways of drawing tokens beyond temperature and top-p, those that are off left out.

    Raises:
      UserError: the server cannot do what is asked.
    """
    plain = SamplingParams()
    asked = {
        name: getattr(sampling, name)
        for name in ("top_k", "min_p", "repetition_penalty")
        if getattr(sampling, name) != getattr(plain, name)
    }
    for name, value in asked.items():
        if name not in dialect.options:
            raise UserError(
                f"sampling.{name}={value}: OpenAI's own completions API has no such field; set it "
                f"to {getattr(plain, name)}, or server.dialect to what the server is"
            )
    if "repetition_penalty" in asked:
        if sampling.repetition_scope not in dialect.repetition_scopes:
            raise UserError(
                f"sampling.repetition_scope={sampling.repetition_scope!r}: this kind of server "
                f"penalises {' or '.join(map(repr, dialect.repetition_scopes))} only"
            )
        if "repetition_scope" in dialect.options:
            asked["repetition_scope"] = sampling.repetition_scope
    if sampling.logit_bias:
        # JSON has no infinity; OpenAI bans by -100.
        asked["logit_bias"] = {str(id): max(-100.0, bias) for id, bias in sampling.logit_bias}
    return asked


def read_completion(
    dialect: Dialect,
    answer: Any,
    *,
    max_tokens: int,
    stop_id: int | None,
    stop_text: str,
    eos_id: int,
    encode: Callable[[str], list[int]],
) -> Completion:
    """Reads an answer, whatever the server did with stop and end-of-text tokens.

    Where it left them out they are put back, with an unknown log-probability.

    Args:
      dialect: of the server.
      answer: the decoded JSON.
      max_tokens: budget of the call; what goes beyond is cut.
      stop_id: the stop token that was asked for.
      stop_text: the same as text.
      eos_id: the end-of-text token.
      encode: text to ids, tags to control tokens; used only where the server names no ids.

    Raises:
      AnswerError: the answer holds no completion.
    """
    choice = _choice(answer)
    tokens, logprobs = _ids(choice, encode)
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length", None):
        raise AnswerError(f"the server ended the text by {finish!r}")
    # A server may write on behind the end of the text.
    if eos_id in tokens:
        end = tokens.index(eos_id) + 1
        tokens, logprobs, ending = tokens[:end], logprobs[:end], "eos"
    elif stop_id is not None and tokens and tokens[-1] == stop_id:
        ending = "stop"
    elif finish == "stop" and len(tokens) < max_tokens:
        ending = _stopped_by(dialect, choice, stop_id, stop_text)
        if ending != "unknown":
            assert stop_id is not None or ending == "eos"
            tokens = [*tokens, stop_id if ending == "stop" and stop_id is not None else eos_id]
            logprobs = [*logprobs, math.nan]
    else:
        ending = "length"
    if len(tokens) > max_tokens:
        tokens, logprobs, ending = tokens[:max_tokens], logprobs[:max_tokens], "length"
    if not tokens and ending == "length":
        raise AnswerError("the server wrote no token and does not say that it stopped")
    return Completion(tokens, logprobs, ending)


def _choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise AnswerError(f"the answer holds no choices: {str(answer):.200}")
    return choices[0]


def _ids(
    choice: Mapping[str, Any], encode: Callable[[str], list[int]]
) -> tuple[list[int], list[float]]:
    """Token ids and their log-probabilities, from the best source that the answer holds."""
    detail = choice.get("logprobs") or {}
    named, found = detail.get("tokens") or [], detail.get("token_logprobs") or []
    tokens = choice.get("token_ids")
    if not tokens and named and all(str(name).startswith("token_id:") for name in named):
        tokens = [int(str(name).removeprefix("token_id:")) for name in named]
    if not tokens:
        text = choice.get("text")
        if not isinstance(text, str):
            raise AnswerError("the answer holds neither token ids nor text")
        tokens, found = encode(text), []
    if not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise AnswerError("the answer's token_ids are no list of token ids")
    if len(found) != len(tokens):  # then no number can be told to belong to its token
        found = [None] * len(tokens)
    return list(tokens), [math.nan if value is None else float(value) for value in found]


def _stopped_by(
    dialect: Dialect, choice: Mapping[str, Any], stop_id: int | None, stop_text: str
) -> Ending:
    """Which token ended a text that does not hold it."""
    if stop_id is None:
        return "eos"
    matched = choice.get(dialect.matched) if dialect.matched else None
    if matched is not None:
        return "stop" if matched in (stop_id, stop_text) else "eos"
    return "eos" if dialect.matched and not dialect.eos_matches else "unknown"
