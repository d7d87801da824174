"""The clients of the benchmark `serve`, in a process of their own.

Usage: python -m benchmarks.serve_clients URL CLIENTS WARM_UP_S MEASURE_S

Prints one line when they begin, and what they saw as JSON when they have ended.
"""

import asyncio
import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from typing import Any

import httpx

from tw_jax.tasks.character_tokenizer import load_tokenizer

# Pieces of a list of plans, and the end of a thread: a random model seldom writes them by itself.
LIKELY = ("<Outlines>", "<Outline>", "</Outlines>", "</Thread>", "1", "2", ":")
BIAS = 6.0


@dataclasses.dataclass
class Seen:
    """What the clients saw of requests that ended in the measured time."""

    requests: int = 0
    tokens: int = 0
    threads: int = 0
    errors: int = 0
    first_token_s: list[float] = dataclasses.field(default_factory=list)
    latency_s: list[float] = dataclasses.field(default_factory=list)
    kinds: Counter = dataclasses.field(default_factory=Counter)


async def client(
    http: httpx.AsyncClient,
    index: int,
    bias: dict[str, float],
    start: float,
    stop: float,
    all: Seen,
) -> None:
    """Sends one request after another until it is time to stop."""
    count = 0
    while time.monotonic() < stop:
        count += 1
        one, begun = Seen(), time.monotonic()
        body = {
            "prompt": f"{index}*{count}=",
            "seed": index * 100_000 + count,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": bias,
        }
        try:
            await request(http, body, begun, one)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            one.errors += 1
            one.kinds[repr(error)[:200]] += 1
        # Those in flight at the end of the measured time are complete, too.
        if begun >= start:
            all.requests += 1
            all.tokens += one.tokens
            all.threads += one.threads
            all.errors += one.errors
            all.first_token_s += one.first_token_s
            all.latency_s.append(time.monotonic() - begun)
            all.kinds += one.kinds


async def request(http: httpx.AsyncClient, body: dict[str, Any], begun: float, one: Seen) -> None:
    """Reads one stream to its end.

    Raises:
      ValueError: it is not what it should be.
    """
    done, ends = False, 0
    async with http.stream("POST", "completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"{response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line:
                continue
            if line == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            for choice in chunk["choices"]:
                if not one.first_token_s:
                    one.first_token_s.append(time.monotonic() - begun)
                ends += choice["finish_reason"] is not None
                news = choice.get("thread_events", ())
                one.threads += sum(event["ended"] for event in news)
            if chunk.get("usage"):
                one.tokens = chunk["usage"]["completion_tokens"]
    if not done or ends != 1 or not one.tokens:
        raise ValueError(f"a stream without a proper end: {done=} {ends=} {one.tokens=}")


async def run(url: str, clients: int, warm_up_s: float, measure_s: float) -> dict[str, Any]:
    """All clients, and what they saw."""
    tokenizer = load_tokenizer()
    bias = {str(tokenizer.convert_tokens_to_ids(piece)): BIAS for piece in LIKELY}
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    seen = Seen()
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        print("begin", flush=True)
        begin = time.monotonic()
        start, stop = begin + warm_up_s, begin + warm_up_s + measure_s
        await asyncio.gather(
            *(client(http, index, bias, start, stop, seen) for index in range(clients))
        )
        elapsed_s = time.monotonic() - start
    first = statistics.quantiles(seen.first_token_s, n=20)
    latency = statistics.quantiles(seen.latency_s, n=20)
    for kind, times in seen.kinds.most_common(5):
        print(f"{times} x {kind}", file=sys.stderr)
    return {
        "errors": seen.errors,
        "requests": seen.requests,
        "tokens": seen.tokens,
        "threads": seen.threads,
        "tokens_per_s": seen.tokens / elapsed_s,
        "p50_first_token_s": first[9],
        "p95_first_token_s": first[18],
        "p50_latency_s": latency[9],
        "p95_latency_s": latency[18],
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    print(json.dumps(asyncio.run(run(words[0], int(words[1]), float(words[2]), float(words[3])))))
