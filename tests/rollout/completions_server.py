"""A completions server on the loopback: the small world's model behind OpenAI's API, with faults.

It samples with the same noise as the engine: a call's seed says which unit of which request it is,
so what a client builds from its answers must equal the engine's rollouts token for token.
"""

import collections
import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable

import numpy as np

from tests.loopback_server import LoopbackHandler, LoopbackServer
from tests.rollout.host_oracle import HostOracle
from tests.rollout.scenarios import CONTEXT_LEN, MAX_DIGITS, request
from tests.rollout.small_world import ID, ids, make_model, text_of
from tw_jax.rollout.request import Request, sampling_seed
from tw_jax.rollout.sampling import unit_number

EOS = ID["<eos>"]


class SmallWorldCodec:
    def encode(self, text):
        return ids(text)

    def decode(self, tokens):
        return text_of(tokens)


@functools.cache
def _oracle() -> HostOracle:
    return HostOracle(*make_model(), CONTEXT_LEN, MAX_DIGITS)


_one_at_a_time = threading.Lock()


@functools.cache
def _sample(seed, sampling, unit, start, *context):
    asked = Request(np.zeros(1, np.int32), seed, sampling)  # the prompt is part of the context
    with _one_at_a_time:
        return _oracle().sample(asked, unit, list(context), start)


class Writer:
    """Continues contexts as the engine would for the given requests."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = {r.seed: r for r in requests}
        self._units = functools.cache(self._units_of)

    def _units_of(self, length: int) -> dict[int, tuple[int, int]]:
        """(request seed, unit) by call seed, for contexts of a length."""
        units = [unit_number(block, ordinal) for block in range(5) for ordinal in range(6)]
        return {
            sampling_seed(seed, unit, length) >> 1: (seed, unit)
            for seed in self.requests
            for unit in units
        }

    def write(self, body: dict, stop_id: int | None) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities up to a stop, end of text or budget, stops included."""
        context, written, logprobs = list(body["prompt"]), [], []
        start = len(context)
        seed, unit = self._units(len(context))[body["seed"]]
        while len(written) < body["max_tokens"]:
            token, logprob = _sample(seed, self.requests[seed].sampling, unit, start, *context)
            context.append(token)
            written.append(token)
            logprobs.append(logprob)
            if token in (stop_id, EOS):
                break
        return written, logprobs


def _finish(body, written, stop_id):
    stopped = bool(written) and written[-1] in (stop_id, EOS)
    return "stop" if stopped else "length"


def as_vllm(body, write) -> dict:
    stop_id = body.get("stop_token_ids", [None])[0]
    written, logprobs = write(body, stop_id)
    return {
        "text": text_of(written),
        "token_ids": written,
        "logprobs": {
            "tokens": [f"token_id:{t}" for t in written],
            "token_logprobs": logprobs,
        },
        "finish_reason": _finish(body, written, stop_id),
        "stop_reason": stop_id if written[-1] == stop_id else None,
    }


def as_old_vllm(body, write) -> dict:
    """Names ids within the log-probabilities only."""
    return as_vllm(body, write) | {"token_ids": None}


def as_sglang(body, write) -> dict:
    choice = as_vllm(body, write)
    last = choice["token_ids"][-1]
    matched = last if choice["finish_reason"] == "stop" else None
    return {**choice, "stop_reason": None, "matched_stop": matched}


def as_sglang_trimmed(body, write) -> dict:
    """Leaves the token that stopped it out, of ids as well."""
    choice = as_sglang(body, write)
    if choice["finish_reason"] == "stop":
        choice["token_ids"] = choice["token_ids"][:-1]
        choice["text"] = text_of(choice["token_ids"])
        choice["logprobs"] = {"tokens": [], "token_logprobs": choice["logprobs"]["token_logprobs"]}
        choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:-1]
    return choice


def as_tw_jax(body, write) -> dict:
    """Stops at text, which is left out; ids keep it."""
    assert body["logprobs"] == 0 and body["parallel_thinking"] is False
    stop_id = ids(body["stop"][0])[0] if "stop" in body else None
    choice = as_vllm({**body, "stop_token_ids": [stop_id]}, write)
    return {**choice, "text": "", "stop_reason": None}


def as_generic(body, write) -> dict:
    """Text alone, without what stopped it."""
    stop_id = ids(body["stop"][0])[0] if "stop" in body else None
    written, _ = write(body, stop_id)
    finish = _finish(body, written, stop_id)
    return {"text": text_of(written[:-1] if finish == "stop" else written), "finish_reason": finish}


def as_endless(body, write) -> dict:
    """Ignores stops and ends of text."""
    written, logprobs = write(body, None)
    more = body["max_tokens"] - len(written)
    written, logprobs = written + ids("a") * more, logprobs + [-1.0] * more
    logprobs = {"token_logprobs": logprobs}
    return {"token_ids": written, "logprobs": logprobs, "finish_reason": "length"}


@dataclasses.dataclass
class Fault:
    """What goes wrong with one call: a status, a pause, or half an answer."""

    status: int = 200
    headers: dict = dataclasses.field(default_factory=dict)
    pause_s: float = 0.0
    cut: bool = False
    drop: bool = False
    body: str = '{"error": {"message": "no such luck"}}'


class CompletionsServer(LoopbackServer):
    """Serves `answer(body, write)` as the only choice; `with CompletionsServer(...) as server`."""

    def __init__(
        self,
        answer: Callable = as_vllm,
        requests: tuple[Request, ...] = (),
        *,
        pause_s: float = 0.0,
        models: tuple[dict, ...] = ({"id": "small", "max_model_len": CONTEXT_LEN},),
    ) -> None:
        self.answer, self.writer = answer, Writer(list(requests) or [request(0)])
        self.pause_s, self.models = pause_s, models
        self.faults: collections.deque[Fault] = collections.deque()
        self.always: Fault | None = None
        self.bodies: list[dict] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def handler(self):
        outer = self

        class Handler(LoopbackHandler):
            def do_GET(self):
                self.send(200, json.dumps({"data": list(outer.models)}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    outer.bodies.append(body)
                    outer.times.append(time.monotonic())
                    outer.keys.append(self.headers["Authorization"])
                    fault = outer.faults.popleft() if outer.faults else outer.always
                try:
                    self.serve(body, fault or Fault())
                finally:
                    with outer._lock:
                        outer.at_once -= 1

            def serve(self, body, fault):
                time.sleep(outer.pause_s + fault.pause_s)
                if fault.drop:
                    self.close_connection = True
                elif fault.status != 200:
                    self.send(fault.status, fault.body, fault.headers)
                else:
                    choice = outer.answer(body, outer.writer.write)
                    text = json.dumps({"choices": [choice]})
                    self.send(200, text[: len(text) // 2] if fault.cut else text)

        return Handler
