"""Settings of `tw-jax data rewrite`."""

import dataclasses
import pathlib
from typing import Literal

from tw_jax import config_fields
from tw_jax.config_checks import require_at_least, require_share
from tw_jax.rollout.client_http import RetryPolicy


@dataclasses.dataclass(frozen=True)
class ChatServerConfig:
    """An OpenAI-compatible chat server. `server=URL` is short for `server.url`.

    Attributes:
      url: base URL, usually http://HOST:PORT/v1.
      model: name of the model that finds the structure.
      api_key_env: environment variable with the key, which is sent to the server; null sends none.
      concurrency: most calls in flight.
      call_timeout_s: of one attempt.
      retry: when a failed call is repeated.
      temperature: of the sampling; null leaves it to the server.
      max_answer_tokens: most tokens of one answer, hidden reasoning included.
      token_limit_name: what the server calls that limit.
      reasoning_effort: sent as it is; null sends none.
      structured_output: whether answers are bound to a JSON schema; auto asks for it and goes
        without from the first refusal on.
      price_in_usd_per_million: of prompt tokens.
      price_out_usd_per_million: of answer tokens.
    """

    url: str = dataclasses.field(metadata={config_fields.SHORTHAND: True})
    model: str
    api_key_env: str | None = None
    concurrency: int = 16
    call_timeout_s: float = 600.0
    retry: RetryPolicy = RetryPolicy()
    temperature: float | None = 0.2
    max_answer_tokens: int = 16384
    token_limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    reasoning_effort: str | None = None
    structured_output: Literal["auto", "always", "never"] = "auto"
    price_in_usd_per_million: float = 0.0
    price_out_usd_per_million: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(
            self,
            concurrency=1,
            max_answer_tokens=1,
            temperature=0,
            price_in_usd_per_million=0,
            price_out_usd_per_million=0,
        )
        if self.call_timeout_s <= 0:
            raise ValueError(f"call_timeout_s={self.call_timeout_s}: must be positive")

    def usd(self, prompt_tokens: int, answer_tokens: int) -> float:
        """Price of a call."""
        return (
            prompt_tokens * self.price_in_usd_per_million
            + answer_tokens * self.price_out_usd_per_million
        ) / 1e6


@dataclasses.dataclass(frozen=True)
class RewriteColumns:
    """Names of the fields of a record.

    Attributes:
      prompt: the problem.
      reasoning: the sequential trace of thought; where it is missing, `response` is read.
      final: what was written behind the reasoning; may be missing.
      response: reasoning and final text in one, split at `</think>`.
      answer: the reference answer.
      id: names the trace; where it is missing, the source and the record's number do.
    """

    prompt: str = "prompt"
    reasoning: str = "reasoning"
    final: str = "final"
    response: str = "response"
    answer: str = "answer"
    id: str = "id"


@dataclasses.dataclass(frozen=True)
class RewriteLimits:
    """What a rewritten trace may be, and how often an answer is asked for.

    Attributes:
      min_saved_chars: a block saves at least this: its threads' characters less the longest's.
      max_changed_share: largest share of a thread that replacements may touch.
      max_rounds: rounds of replacements in a thread; what refers to siblings still is given up.
      attempts: answers that are asked for until one can be used; raised later, it asks again for
        what no answer could be used for.
      max_useless_traces: the run stops when a stage that sees whole traces (steps, groups, verify)
        has failed on so many, and never succeeded; null goes on.
      max_outline_chars: longest plan.
      context_chars: most characters of the text before a block that its calls show.
      max_trace_chars: longer traces are rejected before anything is spent.
    """

    min_saved_chars: int = 200
    max_changed_share: float = 0.2
    max_rounds: int = 2
    attempts: int = 3
    max_useless_traces: int | None = 10
    max_outline_chars: int = 300
    context_chars: int = 8_000
    max_trace_chars: int = 200_000

    def __post_init__(self) -> None:
        require_at_least(
            self,
            min_saved_chars=0,
            max_rounds=1,
            attempts=1,
            max_useless_traces=1,
            max_outline_chars=1,
            context_chars=0,
            max_trace_chars=1,
        )
        require_share(self, "max_changed_share")


@dataclasses.dataclass(frozen=True)
class RewriteBudget:
    """What may be spent, over all runs into the same folder.

    Attributes:
      max_usd: most money; null: no limit.
      max_tokens: most tokens, prompts and answers together; null: no limit.
    """

    max_usd: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        require_at_least(self, max_usd=0, max_tokens=0)


@dataclasses.dataclass(frozen=True)
class RewriteConfig:
    """Rewrites sequential traces with parallel blocks.

    Attributes:
      inputs: sources of the traces: .jsonl, .parquet, .array_record, a saved dataset, hf://NAME.
      output: folder of the results; the same folder goes on where an earlier run stopped.
      server: the model that finds the structure.
      columns: names of the records' fields.
      limits: what a rewritten trace may be.
      budget: what may be spent.
      tokenizer: folder or hub id of the tokenizer that checks the result; null: the small one.
      max_traces: only the first so many good records are rewritten; null: all.
      think_tags: reasoning and final text from two fields are joined as `<think>`...`</think>`;
        otherwise with a blank line. A whole response keeps the tags that it has.
      answer_required: a record without a reference answer is rejected.
      keep_sequential: traces in which no block was found are written as they are.
      max_reject_share: the run stops before it spends anything when more of the input is bad.
      dry_run: calls nothing; prints yields so far and what the rest will cost.
    """

    inputs: tuple[str, ...]
    output: pathlib.Path
    server: ChatServerConfig
    columns: RewriteColumns = RewriteColumns()
    limits: RewriteLimits = RewriteLimits()
    budget: RewriteBudget = RewriteBudget()
    tokenizer: str | None = None
    max_traces: int | None = None
    think_tags: bool = True
    answer_required: bool = True
    keep_sequential: bool = False
    max_reject_share: float = 0.5
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs: name at least one file, e.g. inputs=[traces.jsonl]")
        require_at_least(self, max_traces=1)
        require_share(self, "max_reject_share")
        budget, server = self.budget, self.server
        free = server.price_in_usd_per_million == server.price_out_usd_per_million == 0
        if budget.max_usd is not None and free:
            raise ValueError(
                "budget.max_usd is set, but server.price_in_usd_per_million and "
                "server.price_out_usd_per_million are 0: give the prices"
            )
