"""Requests that lead the engine through every branch of its policy, and their oracle rollouts."""

import dataclasses
import functools
import math

import numpy as np

from tests.rollout.host_oracle import HostOracle, OracleRollout
from tests.rollout.small_world import ID, ids, make_model
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import Request, SamplingParams

CONTEXT_LEN = 144  # two cache blocks
MAX_DIGITS = 2
ENGINE = EngineConfig(
    context_len=CONTEXT_LEN,
    rows=8,
    requests=5,
    max_threads=4,
    max_blocks=3,
    max_number_digits=MAX_DIGITS,
    prefill_rows=2,
    prefill_chunk=8,
    steps_per_dispatch=40,
)
# Rows and areas have sizes that nothing else has: compiled programs are searched for them.
LOOP = dataclasses.replace(ENGINE, context_len=130, rows=11, requests=7, steps_per_dispatch=16)
BASE = SamplingParams(max_response_tokens=90, max_thread_tokens=12, max_blocks=3, max_threads=4)


def plans(*numbers: str) -> str:
    """A list of plans as text, closed by the spawn trigger."""
    outlines = "".join(f"<Outline>{number}: a</Outline>\n" for number in numbers)
    return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>"


def request(seed: int, prefix: str = "", prompt: str = "<bos>ab", mode="parallel", **sampling):
    values = {**vars(BASE), **sampling}
    return Request(
        prompt=np.array(ids(prompt), np.int32),
        seed=seed,
        sampling=SamplingParams(**values),
        mode=mode,
        forced_prefix=tuple(ids(prefix)),
    )


def small_requests(count: int = 12, **sampling) -> list[Request]:
    """Every other one begins with a list of plans."""
    return [
        request(i, plans("1", "2", "3") if i % 2 else "", max_response_tokens=70, **sampling)
        for i in range(count)
    ]


def named_requests() -> dict[str, Request]:
    """One request per case of the policy."""
    three = plans("1", "2", "3")
    return {
        "free": request(1),
        "greedy": request(2, temperature=0.0),
        "greedy after a block": request(3, plans("1", "2"), temperature=0.0),
        "one thread": request(4, plans("1")),
        "four threads": request(5, plans("1", "2", "3", "0"), max_response_tokens=140),
        "duplicates": request(6, plans("1", "1", "2", "1")),
        "two digits": request(7, plans("12", "1", "30")),
        "dotted number does not fit two tokens": request(8, plans("1.2", "2")),
        "three digits are no number": request(9, plans("123", "2")),
        "no number": request(10, plans("a", "")),
        "no list": request(11, "a</Outlines>"),
        "space around the number": request(12, plans(" 1", " 2 ")),
        "too many outlines": request(13, plans("1", "2", "3"), max_threads=2),
        "second list wins": request(14, "<Outlines><Outline>1:" + three),
        "trigger in the middle of the prefix": request(15, three + "\nab"),
        "outlines begun in the prefix": request(16, "<Outlines><Outline>1:<Outline>2:"),
        "in the prompt": request(17, prompt="<bos>" + plans("1", "2")),
        "sequential": request(18, three, mode="sequential"),
        "no block allowed beyond the first": request(19, three, max_blocks=1),
        "short threads": request(20, three, max_thread_tokens=1),
        "threads end by themselves": request(21, three, max_thread_tokens=60),
        "budget ends in a thread": request(22, three, max_response_tokens=len(ids(three)) + 40),
        "budget ends in thread 1": request(23, three, max_response_tokens=len(ids(three)) + 9),
        "no room to spawn": request(24, three, max_response_tokens=len(ids(three)) + 6),
        "no room to join": request(25, plans("1", "22"), max_response_tokens=len(ids(three)) + 15),
        "context ends": request(235, prompt="<bos>" + "ab" * 45, max_response_tokens=200),
        "context ends in a thread": request(
            33, three, "<bos>" + "ab" * 35, max_response_tokens=200, max_thread_tokens=60
        ),
        "context ends at a join": request(
            27, three, "<bos>" + "ab" * 35, max_response_tokens=200, max_thread_tokens=20
        ),
        "top-k": request(28, three, top_k=2),
        "top-p": request(29, three, top_p=0.5),
        "both, warm": request(30, plans("1", "2"), top_k=6, top_p=0.8, temperature=1.5),
        "min-p": request(36, three, min_p=0.2),
        "everything, warm": request(
            37, three, temperature=1.4, top_k=8, top_p=0.9, min_p=0.05, repetition_penalty=1.2
        ),
        "penalty on the context": request(38, three, repetition_penalty=1.5),
        "penalty on the unit": request(
            39, three, repetition_penalty=1.5, repetition_scope="unit", max_thread_tokens=20
        ),
        "penalty, greedy": request(40, three, temperature=0.0, repetition_penalty=1.3),
        "penalty that rewards": request(41, plans("2", "1"), repetition_penalty=0.8),
        "penalty behind a joined block": request(
            42, plans("1", "2"), repetition_penalty=2.0, max_thread_tokens=8, max_blocks=1
        ),
        "bias": request(43, three, logit_bias=((ID["a"], 2.5), (ID["\n"], -4.0))),
        "ban": request(44, three, logit_bias=((ID["<eos>"], -math.inf), (ID["b"], -math.inf))),
        "ban, greedy": request(45, temperature=0.0, logit_bias=((ID["<eos>"], -math.inf),)),
        "penalty and bias": request(
            46, three, repetition_penalty=1.3, logit_bias=((ID["a"], 1.0),), min_p=0.1
        ),
        "seed of 64 bits": request(2**63 + 5, plans("1", "2")),
        "prompt of one token": request(31, prompt="<bos>"),
        "long prompt": request(32, plans("2", "1"), "<bos>" + "abc " * 15),
    }


def random_requests(count: int) -> dict[str, Request]:
    """Free-running requests: the model opens blocks by itself."""
    rng = np.random.default_rng(0)
    return {
        f"random {i}": request(
            100 + i,
            prompt="<bos>" + "abc"[: rng.integers(4)],
            temperature=float(rng.choice([0.7, 1.0])),
            max_response_tokens=int(rng.integers(20, 120)),
            max_thread_tokens=int(rng.integers(2, 20)),
        )
        for i in range(count)
    }


@functools.cache
def scenarios() -> tuple[dict[str, Request], dict[str, OracleRollout]]:
    """Requests and what the oracle makes of them, by name."""
    requests = named_requests() | random_requests(15)
    oracle = HostOracle(*make_model(), CONTEXT_LEN, MAX_DIGITS)
    return requests, {name: oracle.rollout(r) for name, r in requests.items()}
