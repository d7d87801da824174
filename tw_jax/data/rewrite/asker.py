"""One question to the LLM: from the cache, else paid for within the budget; asked again if need be.

Answers are looked up by the content of the request, so a run that goes on asks only what no run
into the same folder has asked before.
"""

import asyncio
import collections
from collections.abc import Callable, Mapping
from typing import Any

from tw_jax.data.rewrite.answers import Answer, BadAnswer, read_answer, strict_json_schema
from tw_jax.data.rewrite.config import ChatServerConfig, RewriteLimits
from tw_jax.data.rewrite.ledger import Ledger, StoredAnswer, request_key
from tw_jax.data.rewrite.prompts import Prompt, Stage
from tw_jax.data.rewrite.spending import Purse
from tw_jax.errors import UserError
from tw_jax.rollout.client_dialect import AnswerError
from tw_jax.rollout.client_http import CallError, RefusedError, Server, ServerDownError

MAX_FAILURES_IN_A_ROW = 3
# Stages that are asked about a whole trace; where one fails, its trace is rejected.
TRACE_STAGES: tuple[Stage, ...] = ("steps", "groups", "verify")
_TEMPLATE_TOKENS = 64  # what chat templates put around two messages, generously


class StageFailed(Exception):
    """A stage got no answer that can be used.

    Attributes:
      stage: which.
      kind: stable identifier of what is wrong.
    """

    def __init__(self, stage: Stage, kind: str, message: str) -> None:
        super().__init__(message)
        self.stage, self.kind = stage, kind


class NotAsked(Exception):
    """A call was not made: it is a dry run, or the run is stopping."""


class Asker:
    """Asks the LLM.

    Attributes:
      fatal: what ended the run for all traces; None while it goes on.
      structured: whether answers are bound to a JSON schema.
    """

    def __init__(
        self,
        config: ChatServerConfig,
        prompts: Mapping[str, Prompt],
        ledger: Ledger,
        purse: Purse,
        server: Server | None,
        limits: RewriteLimits,
    ) -> None:
        """Asks nothing yet.

        Args:
          config: the server's settings.
          prompts: by stage, and `system`.
          ledger: answers so far.
          purse: what may be spent.
          server: None answers from the ledger alone.
          limits: how often an answer is asked for, and when it is given up altogether.
        """
        self.fatal: UserError | None = None
        self.structured = config.structured_output != "never"
        self._config, self._prompts, self._limits = config, prompts, limits
        self._ledger, self._purse, self._server = ledger, purse, server
        self._locks: dict[str, asyncio.Lock] = {}
        self._failures_in_a_row = 0
        self._has_answered = ledger.total().calls > 0
        self._useful: set[Stage] = set()
        self._useless: collections.Counter[Stage] = collections.Counter()

    async def ask(
        self,
        stage: Stage,
        materials: Mapping[str, str],
        model: type[Answer],
        check: Callable[[Answer], str | None] = lambda answer: None,
    ) -> Answer:
        """Asks until an answer can be used.

        Args:
          stage: whose prompt is used.
          materials: what fills its marks.
          model: form of the answer.
          check: says what is wrong with an answer of the right form; None if nothing is.

        Raises:
          StageFailed: every attempt failed, or the server refuses the request.
          BudgetSpent: the call does not fit into the budget.
          NotAsked: the answer is not there, and no call is made.
          CallError: the call failed again and again.
        """
        question = self._prompts[stage].fill(materials)
        complaint, is_new, attempts = "", False, self._limits.attempts
        for attempt in range(1, attempts + 1):
            again = ""
            if complaint:
                # How many there may be is not said: with more of them, these must stay the same.
                again = (
                    f"\n\n# Attempt {attempt}\n\nAn earlier answer could not be used: {complaint}"
                )
            stored, is_new = await self._answer(stage, question + again, model)
            try:
                answer = self._read(stored, model)
                if problem := check(answer):
                    raise BadAnswer(problem)
            except BadAnswer as bad:
                complaint = str(bad)
            else:
                self._useful.add(stage)
                return answer
        if is_new:  # what an earlier run has paid for says nothing of the server as it is now
            self._note_useless(stage, complaint)
        raise StageFailed(
            stage,
            f"{stage}_failed",
            f"{stage}: {attempts} answers could not be used, at last: {complaint}",
        )

    def _note_useless(self, stage: Stage, complaint: str) -> None:
        """Stops the run when a stage fails on one trace after another."""
        most = self._limits.max_useless_traces
        if stage not in TRACE_STAGES or most is None or stage in self._useful:
            return
        self._useless[stage] += 1
        if self._useless[stage] >= most and self.fatal is None:
            self.fatal = UserError(
                f"{most} traces got no usable answer in the stage {stage}, and none got one; at "
                f"last: {complaint}. Is server.model={self._config.model} the right model, "
                "server.max_answer_tokens enough, and the server sound? "
                f"limits.max_useless_traces={most} stops the run before it spends more; raise "
                "limits.attempts to ask again for these traces"
            )

    def _read(self, stored: StoredAnswer, model: type[Answer]) -> Answer:
        if stored.finish_reason == "length":
            raise BadAnswer(
                f"the answer was cut off at {self._config.max_answer_tokens} tokens; be brief"
            )
        return read_answer(stored.text, model)

    async def _answer(
        self, stage: Stage, question: str, model: type[Answer]
    ) -> tuple[StoredAnswer, bool]:
        """An answer, and whether it was not there before."""
        schema = strict_json_schema(model)
        body = self._body(question)
        key = request_key(body, schema)
        # Traces that are equal ask the same; one of them pays.
        async with self._locks.setdefault(key, asyncio.Lock()):
            stored = self._ledger.find(key)
            if stored is not None:
                return stored, False
            stored = await self._call(stage, body, schema)
            self._ledger.store(key, stage, self._config.model, stored)
            return stored, True

    def _body(self, question: str) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [
                {"role": "system", "content": self._prompts["system"].text},
                {"role": "user", "content": question},
            ],
            config.token_limit_name: config.max_answer_tokens,
        }
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if config.reasoning_effort is not None:
            body["reasoning_effort"] = config.reasoning_effort
        return body

    async def _call(
        self, stage: Stage, body: dict[str, Any], schema: Mapping[str, Any]
    ) -> StoredAnswer:
        """Pays for an answer."""
        if self._server is None or self.fatal is not None:
            raise NotAsked
        text = "".join(message["content"] for message in body["messages"])
        # A token is at least one byte, so this bounds what the prompt can cost.
        most_prompt = len(text.encode()) + _TEMPLATE_TOKENS
        most_tokens = most_prompt + self._config.max_answer_tokens
        most_usd = self._config.usd(most_prompt, self._config.max_answer_tokens)
        await self._purse.reserve(most_usd, most_tokens)
        spent_usd, spent_tokens = 0.0, 0
        try:
            stored = await self._post(self._server, stage, body, schema, len(text), most_prompt)
            spent_usd, spent_tokens = stored.usd, stored.prompt_tokens + stored.answer_tokens
        except CallError as error:
            # Before the server has answered anything, a refusal is more likely due to the settings.
            if isinstance(error, RefusedError) and self._has_answered:
                raise StageFailed(stage, "request_refused", f"{stage}: {error.reason}") from error
            self._note_failure(error)
            raise
        except UserError as error:  # concerns all calls: no key, no server, a wrong URL
            self.fatal = error
            raise NotAsked from error
        finally:
            await self._purse.settle(
                most_usd, most_tokens, spent_usd=spent_usd, spent_tokens=spent_tokens
            )
        self._failures_in_a_row, self._has_answered = 0, True
        return stored

    def _note_failure(self, error: CallError) -> None:
        """Stops the run after several failures in a row."""
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW and self.fatal is None:
            url, reason = self._config.url, str(error)
            if isinstance(error, RefusedError):
                reason = f"{url}: {error.reason}"
            self.fatal = ServerDownError(
                f"{self._failures_in_a_row} calls failed one after another, at last: {reason}. "
                f"Is server.url={url} right? It mostly ends in /v1"
            )

    async def _post(
        self,
        server: Server,
        stage: Stage,
        body: dict[str, Any],
        schema: Mapping[str, Any],
        prompt_chars: int,
        most_prompt: int,
    ) -> StoredAnswer:
        def read(answer: Any) -> StoredAnswer:
            text, finish_reason = _choice(answer)
            usage = answer.get("usage")
            # What is not told counts as its worst case: the budget must hold.
            prompt_tokens = _count(usage, "prompt_tokens", most_prompt)
            answer_tokens = _count(usage, "completion_tokens", self._config.max_answer_tokens)
            usd = self._config.usd(prompt_tokens, answer_tokens)
            return StoredAnswer(
                text, finish_reason, prompt_chars, prompt_tokens, answer_tokens, usd
            )

        if not self.structured:
            return await server.chat(body, read)
        json_schema = {"name": stage, "strict": True, "schema": schema}
        response_format = {"type": "json_schema", "json_schema": json_schema}
        try:
            return await server.chat({**body, "response_format": response_format}, read)
        except RefusedError:
            if self._config.structured_output == "always":
                raise
        answer = await server.chat(body, read)
        self.structured = False  # the same request without it was no problem
        return answer


def _choice(answer: Any) -> tuple[str, str]:
    """Text and finish reason of an answer's only choice."""
    try:
        choice = answer["choices"][0]
        text, finish_reason = choice["message"].get("content"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise AnswerError("it holds no choice with a message") from None
    if not isinstance(text, str | None) or not isinstance(finish_reason, str | None):
        raise AnswerError("its choice holds no text")
    # Lone surrogates cannot be stored; whoever reads the answer finds the replacement.
    text = (text or "").encode(errors="replace").decode()
    return text, finish_reason or ""


def _count(usage: Any, name: str, otherwise: int) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else otherwise
