"""The bodies of requests: OpenAI's fields, and ours beside them."""

import abc
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256

# Fields of OpenAI's that this server does not have, and the values that ask for nothing.
_NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
_IGNORED = ("user", "metadata", "parallel_tool_calls", "service_tier", "safety_identifier")

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]

TokenIdText = Annotated[str, Field(pattern=r"^\d{1,9}$")]  # keys of JSON objects are text
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Strict(BaseModel):
    """No unknown fields, and no text where a number is meant."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream brings besides the text."""

    include_usage: bool = False


class GenerationBody(_Strict, abc.ABC):
    """Fields that completions and chats share; None takes the server's default."""

    model: str | None = None
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    repetition_scope: Literal["unit", "context"] | None = None
    logit_bias: dict[TokenIdText, Bias] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_thread_tokens: int | None = Field(None, ge=1)
    max_blocks: int | None = Field(None, ge=1)
    max_threads: int | None = Field(None, ge=1)
    parallel_thinking: bool = True
    return_token_ids: bool = False
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, body: Any) -> Any:
        """Drops fields that ask for nothing.

        Raises:
          ValueError: one asks for something that the server does not have.
        """
        if not isinstance(body, dict):
            return body
        known = {name: value for name, value in body.items() if name not in _IGNORED}
        for name, neutral in _NOT_SERVED.items():
            if name in known and name not in cls.model_fields:
                # `0 == False`, but the one must not pass for the other.
                value = known.pop(name)
                if not any(value == n and isinstance(value, bool) == isinstance(n, bool)
                           for n in neutral):  # fmt: skip
                    raise ValueError(f"{name}: not supported by this server; leave it out")
        return known

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed together with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    @abc.abstractmethod
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""

    @property
    def token_limit(self) -> int | None:
        """Budget of tokens after the prompt."""
        return self.max_tokens


class CompletionBody(GenerationBody):
    """`POST /v1/completions`; token ids as a prompt are taken as they are, control tokens too."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = None

    @field_validator("logprobs")
    @classmethod
    def _only_sampled(cls, count: int | None) -> int | None:
        if count:
            raise ValueError(
                "the engine records the sampled token's log-probability, not those of the "
                "likeliest; ask for 0 of them"
            )
        return count

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self.logprobs is not None


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a chat; `name` is not used."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The whole content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return bool(self.logprobs)

    @property
    def token_limit(self) -> int | None:
        """Budget of tokens after the prompt; the newer name wins."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens
