"""Requests for the native and APR worlds, and what their oracles make of them."""

import functools

import numpy as np

from tests.rollout.gather_oracle import GatherOracle
from tests.rollout.message_oracle import MessageOracle
from tests.rollout.sister_worlds import World, apr_world, native_world
from tw_jax.rollout.request import Request, SamplingParams

CONTEXT_LEN = 144
MAX_DIGITS = 2
BASE = SamplingParams(max_response_tokens=90, max_thread_tokens=12, max_blocks=3, max_threads=4)


def request(
    world: World, seed: int, prefix="", prompt="<bos>ab", mode="parallel", **sampling
) -> Request:
    return Request(
        prompt=np.array(world.ids(prompt), np.int32),
        seed=seed,
        sampling=SamplingParams(**{**vars(BASE), **sampling}),
        mode=mode,
        forced_prefix=tuple(world.ids(prefix)),
    )


def native_plans(*numbers: str) -> str:
    """A list of plans as text, closed by the spawn trigger."""
    plans = "".join(f"<plan>{number}: a</plan>\n" for number in numbers)
    return f"<guideline>\n{plans}</guideline>"


def apr_messages(*texts: str) -> str:
    """A list of messages as text, closed by the spawn trigger."""
    messages = "".join(f"<Message>{text}</Message>\n" for text in texts)
    return f"<Spawn>\n{messages}</Spawn>"


def native_requests() -> dict[str, Request]:
    """One request per case of the policy, and free-running ones."""
    make = functools.partial(request, native_world())
    three = native_plans("1", "2", "3")
    room = len(native_world().ids(three))
    named = {
        "free": make(1),
        "greedy after a block": make(3, native_plans("1", "2"), temperature=0.0),
        "one thread": make(4, native_plans("1")),
        "four threads": make(5, native_plans("1", "2", "3", "0"), max_response_tokens=140),
        "duplicates": make(6, native_plans("1", "1", "2", "1")),
        "two digits": make(7, native_plans("12", "1", "30")),
        "no number": make(10, native_plans("a", "")),
        "no list": make(11, "a</guideline>"),
        "too many plans": make(13, three, max_threads=2),
        "second list wins": make(14, "<guideline><plan>1:" + three),
        "trigger in the middle of the prefix": make(15, three + "\nab"),
        "in the prompt": make(17, prompt="<bos>" + native_plans("1", "2")),
        "sequential": make(18, three, mode="sequential"),
        "no block allowed beyond the first": make(19, three, max_blocks=1),
        "short threads": make(20, three, max_thread_tokens=1),
        "threads end by themselves": make(21, three, max_thread_tokens=60),
        "budget ends in a thread": make(22, three, max_response_tokens=room + 40),
        "budget ends in thread 1": make(23, three, max_response_tokens=room + 10),
        "no room to spawn": make(24, three, max_response_tokens=room + 7),
        "context ends in a thread": make(
            33, three, "<bos>" + "ab" * 35, max_response_tokens=200, max_thread_tokens=60
        ),
        "context ends at a join": make(
            27, three, "<bos>" + "ab" * 35, max_response_tokens=200, max_thread_tokens=20
        ),
        "both, warm": make(30, native_plans("1", "2"), top_k=6, top_p=0.8, temperature=1.5),
        "seed of 64 bits": make(2**63 + 5, native_plans("1", "2")),
        "long prompt": make(32, native_plans("2", "1"), "<bos>" + "abc " * 15),
    }
    named |= {
        f"room to join {extra}": make(25, native_plans("1"), max_response_tokens=11 + extra)
        for extra in range(8, 24, 3)
    }
    named |= {f"three threads {seed}": make(seed, three) for seed in range(60, 70)}
    return named | _random(native_world())


def apr_requests() -> dict[str, Request]:
    """One request per case of the policy, and free-running ones."""
    make = functools.partial(request, apr_world())
    three = apr_messages("a", "b1", "c 2")
    room = len(apr_world().ids(three))
    named = {
        "free": make(1),
        "greedy after a block": make(3, three, temperature=0.0),
        "one thread": make(4, apr_messages("a")),
        "four threads": make(5, apr_messages("a", "b", "c", "d"), max_response_tokens=140),
        "equal and empty messages": make(6, apr_messages("a", "a", "")),
        "no message": make(10, apr_messages()),
        "no list": make(11, "<Message>a</Message></Spawn>"),
        "message still open": make(12, "<Spawn><Message>a</Message><Message>b</Spawn>"),
        "message begun anew": make(26, "<Spawn><Message>a<Message>b</Message></Spawn>"),
        "tags in a message": make(8, "<Spawn><Message><Join>1\n</Message></Spawn>"),
        "too many messages": make(13, three, max_threads=2),
        "second list wins": make(14, "<Spawn><Message>d</Message>" + three),
        "trigger in the middle of the prefix": make(15, three + "\nab"),
        "in the prompt": make(17, prompt="<bos>" + three),
        "sequential": make(18, three, mode="sequential"),
        "no block allowed beyond the first": make(19, three, max_blocks=1),
        "short threads": make(20, three, max_thread_tokens=1),
        "threads end by themselves": make(21, three, max_thread_tokens=60),
        "no room to spawn": make(24, three, max_response_tokens=room + 2),
        "room for one empty answer": make(24, three, max_response_tokens=room + 3),
        "context ends at a join": make(
            27, three, "<bos>" + "ab" * 55, max_response_tokens=200, max_thread_tokens=40
        ),
        "both, warm": make(30, three, top_k=6, top_p=0.8, temperature=1.5),
        "seed of 64 bits": make(2**63 + 5, three),
        "long prompt": make(32, three, "<bos>" + "abc " * 15),
    }
    named |= {
        f"room to join {extra}": make(25, three, max_response_tokens=room + extra)
        for extra in range(4, 20, 3)
    }
    long = apr_messages("ab" * 63)
    named |= {
        f"context ends in a thread {seed}": make(
            seed, long, "<bos>", max_response_tokens=200, max_thread_tokens=90
        )
        for seed in range(40, 60)
    }
    named |= {f"three threads {seed}": make(seed, three) for seed in range(60, 66)}
    return named | _random(apr_world())


def _random(world: World, count: int = 15) -> dict[str, Request]:
    """Free-running requests: the model opens blocks by itself."""
    rng = np.random.default_rng(0)
    return {
        f"random {i}": request(
            world,
            100 + i,
            prompt="<bos>" + "abc"[: rng.integers(4)],
            temperature=float(rng.choice([0.7, 1.0])),
            max_response_tokens=int(rng.integers(20, 120)),
            max_thread_tokens=int(rng.integers(2, 20)),
        )
        for i in range(count)
    }


@functools.cache
def native_scenarios():
    """(requests, (oracle rollout, trajectory)), both by name."""
    oracle = GatherOracle(native_world(), CONTEXT_LEN, MAX_DIGITS)
    requests = native_requests()
    return requests, {name: oracle.rollout(r) for name, r in requests.items()}


@functools.cache
def apr_scenarios():
    """(requests, (oracle rollout, trajectory)), both by name."""
    oracle = MessageOracle(apr_world(), CONTEXT_LEN)
    requests = apr_requests()
    return requests, {name: oracle.rollout(r) for name, r in requests.items()}
