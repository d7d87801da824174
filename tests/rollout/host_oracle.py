"""A plain host-driven fork-join controller: one unit at a time, no cache, numbers read from text.

Every token comes from a full causal forward of its unit's context. What it shares with the engine
is the model, and the noise of a token as a function of (seed, block, thread, position).
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.rollout.small_world import ID, PIECES, VOCAB, text_of
from tw_jax.rollout.request import Request, SamplingParams

NUMBER = re.compile(r"<Outline>\s*(\d+(?:\.\d+)*)\s*:")
FORK, CLOSE, JOIN = [ID["\n"]], [ID["\n"], ID["</Thread>"]], [ID["\n"]]


@dataclasses.dataclass
class OracleUnit:
    kind: str
    block: int
    thread: int
    context: list[int]
    completion: list[int]
    logprobs: list[float]
    reason: str


@dataclasses.dataclass
class OracleRollout:
    tokens: list[int]
    units: list[OracleUnit]
    reason: str
    duplicates: int
    critical_path: int


class HostOracle:
    """Samples requests the slow way."""

    def __init__(self, graphdef, params, context_len: int, max_digits: int) -> None:
        self.context_len, self.max_digits = context_len, max_digits

        @jax.jit
        def last_logits(tokens, length):
            model = nnx.merge(graphdef, params)
            n = tokens.shape[0]
            causal = jnp.tril(jnp.ones((n, n), bool))

            def attend(q, k, v, layer, carry):
                k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
                scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
                weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
                return jnp.einsum("hqk,khd->qhd", weights, v), carry

            hidden, _ = model.hidden_states(tokens, jnp.arange(n), attend)
            return model.logits(hidden[length - 1])

        @jax.jit
        def noise(seed_words, unit, position):
            # The words are those of jax.random.PRNGKey(seed).
            key = jax.random.fold_in(jax.random.wrap_key_data(seed_words), unit)
            return jax.random.gumbel(jax.random.fold_in(key, position), (VOCAB,))

        self._last_logits, self._noise = last_logits, noise

    def rollout(self, request: Request) -> OracleRollout:
        """Runs one request."""
        return _Run(self, request).run()

    def sample(
        self, request: Request, unit: int, context: list[int], start: int
    ) -> tuple[int, float]:
        """The next token of a unit, which has sampled from `start` on, and its log-probability.

        The latter is that of the raw logits.
        """
        padded = np.zeros(self.context_len, np.int32)
        padded[: len(context)] = context
        logits = np.asarray(self._last_logits(padded, len(context)), np.float64)
        s = request.sampling
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        logits = changed_logits(logits, s, context, start)
        if s.temperature == 0:
            token = int(logits.argmax())
        else:
            words = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32)
            noise = np.asarray(self._noise(words, unit, len(context)))
            scaled = logits / s.temperature
            allowed = self._allowed(scaled, s.top_k, s.top_p, s.min_p)
            token = int(np.where(allowed, scaled + noise, -np.inf).argmax())
        return token, float(logprobs[token])

    @staticmethod
    def _allowed(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
        order = np.argsort(-scaled)
        if top_k:
            order = order[:top_k]
        probability = np.exp(scaled[order] - scaled[order].max())
        probability /= probability.sum()
        if top_p < 1:
            keep = int(np.searchsorted(np.cumsum(probability), top_p)) + 1
            order = order[:keep]
        allowed = np.zeros(VOCAB, bool)
        allowed[order] = True
        return allowed & (np.exp(scaled - scaled.max()) >= min_p)


def changed_logits(
    logits: np.ndarray, sampling: SamplingParams, context: list[int], start: int
) -> np.ndarray:
    """Repetition penalty, then bias."""
    logits = logits.copy()
    counted = context if sampling.repetition_scope == "context" else context[start:]
    for token in set(counted):
        if logits[token] > 0:
            logits[token] /= sampling.repetition_penalty
        else:
            logits[token] *= sampling.repetition_penalty
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    return logits


class _Run:
    def __init__(self, oracle: HostOracle, request: Request) -> None:
        self.oracle, self.request, self.s = oracle, request, request.sampling
        self.tokens = [*map(int, request.prompt), *request.forced_prefix]
        budget = len(request.prompt) + self.s.max_response_tokens
        self.limit = min(budget, oracle.context_len)
        self.limit_reason = "length" if budget <= oracle.context_len else "context"
        self.units: list[OracleUnit] = []
        self.duplicates = self.block = self.saved = 0

    def run(self) -> OracleRollout:
        text_start = len(self.request.prompt)
        reason = None
        forced = bool(self.request.forced_prefix)
        while reason is None:
            start = len(self.tokens)
            reason, logprobs, numbers = self._segment(text_start, forced)
            forced = False
            done = self.tokens[start:]
            if reason != "spawn":
                if done:
                    self._note("segment", 0, self.tokens[:start], done, logprobs, reason)
                break
            self._note("segment", 0, self.tokens[:start], done, logprobs, reason)
            reason = self._spawn(numbers)
            self.block += 1
            text_start = len(self.tokens)
        total = len(self.tokens) - len(self.request.prompt)
        return OracleRollout(self.tokens, self.units, reason, self.duplicates, total - self.saved)

    def _note(self, kind, thread, context, completion, logprobs, reason):
        unit = OracleUnit(
            kind, self.block, thread, list(context), list(completion), list(logprobs), reason
        )
        self.units.append(unit)

    def _segment(self, text_start: int, forced: bool):
        """Decodes sequential text until it spawns or ends: (reason, logprobs, numbers)."""
        logprobs: list[float] = []
        fresh = not forced  # a forced prefix may end with the trigger already
        start = len(self.tokens)
        while True:
            if fresh:
                token, logprob = self.oracle.sample(
                    self.request, self.block * 1024, self.tokens, start
                )
                self.tokens.append(token)
                logprobs.append(logprob)
                if token == ID["<eos>"]:
                    self._count_duplicates(text_start)
                    return "eos", logprobs, None
                if len(self.tokens) >= self.limit:
                    self._count_duplicates(text_start)
                    return self.limit_reason, logprobs, None
            fresh = True
            numbers = self._numbers(text_start)
            if numbers and self.block < self.s.max_blocks:
                self._count_duplicates(text_start)
                header = len(FORK) + len(self._header(numbers[0]))
                if len(self.tokens) + header + 1 + len(CLOSE) > self.limit:
                    return self.limit_reason, logprobs, None
                return "spawn", logprobs, numbers

    def _list_numbers(self, text: str) -> list[str]:
        numbers = NUMBER.findall(text)
        return [n for n in numbers if len(n) <= self.oracle.max_digits]

    def _numbers(self, text_start: int) -> list[str] | None:
        """Numbers to spawn if the text ends with a usable trigger."""
        text = text_of(self.tokens[text_start:])
        if self.request.mode == "sequential" or not text.endswith("</Outlines>"):
            return None
        opened = text.rfind("<Outlines>")
        inside = text[opened : -len("</Outlines>")]
        if opened < 0 or "</Outlines>" in inside:
            return None
        distinct = list(dict.fromkeys(self._list_numbers(inside)))
        return distinct[: self.s.max_threads]

    def _count_duplicates(self, text_start: int) -> None:
        """Repeats in any list of the segment that just ended."""
        if self.request.mode == "sequential":
            return
        text = text_of(self.tokens[text_start:])
        for piece in text.split("<Outlines>")[1:]:
            held: list[str] = []
            for number in self._list_numbers(piece.split("</Outlines>")[0]):
                if number in held:
                    self.duplicates += 1
                elif len(held) < self.s.max_threads:
                    held.append(number)

    @staticmethod
    def _header(number: str) -> list[int]:
        return [ID["<Thread>"], ID["\n"], *(PIECES.index(c) for c in number), ID[":"]]

    def _spawn(self, numbers: list[str]) -> str | None:
        """Runs the threads one after another and joins them; a reason if the rollout ends."""
        context = [*self.tokens, *FORK]
        inside = []
        self.tokens += FORK
        for ordinal, number in enumerate(numbers, start=1):
            header = self._header(number)
            room = self.limit - len(self.tokens) - len(header) - len(CLOSE)
            if room < 1:
                self.saved += sum(inside) - max(inside)
                return self.limit_reason
            body, logprobs, reason = self._thread(ordinal, [*context, *header], room)
            self._note("thread", ordinal, [*context, *header], body, logprobs, reason)
            text = body if reason == "thread_stop" else [*body, *CLOSE]
            if reason == "eos":
                text = [*body[:-1], *CLOSE]
            self.tokens += [*header, *text]
            inside.append(len(header) + len(text) - 2)
        self.saved += sum(inside) - max(inside)
        if len(self.tokens) + len(JOIN) + 1 > self.limit:
            return self.limit_reason
        self.tokens += JOIN
        return None

    def _thread(self, ordinal: int, context: list[int], room: int):
        """One thread in its own context; `room` is what fits into the joined text."""
        body: list[int] = []
        logprobs: list[float] = []
        while True:
            token, logprob = self.oracle.sample(
                self.request, self.block * 1024 + ordinal, [*context, *body], len(context)
            )
            body.append(token)
            logprobs.append(logprob)
            if token == ID["</Thread>"]:
                return body, logprobs, "thread_stop"
            if token == ID["<eos>"]:
                return body, logprobs, "eos"
            if len(body) == self.s.max_thread_tokens:
                return body, logprobs, "length"
            if len(body) == room:
                return body, logprobs, self.limit_reason
