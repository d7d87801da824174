r"""The process that compares mathematical answers: `python -m tw_jax.rewards.math_worker`.

It reads lines `{"stated", "reference", "limit_s"}` and answers each with a line, one of `true`,
`false`, `"unreadable_reference"`. Its own limits end it when a comparison takes too much time or
memory, also when whoever started it is gone; `tw_jax.rewards.grading_pool` then starts another.
"""

import json
import logging
import math
import os
import resource
import sys
import time
from typing import Literal

_MEMORY_BYTES = 4 * 2**30  # of address space; sympy itself takes a tenth


def main() -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    logging.disable(logging.WARNING)  # math-verify warns at every call that it sets no time limit
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES)
    compare("1", "1")  # what is imported at first use is imported now
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + asked["limit_s"]) + 1)
        print(json.dumps(compare(asked["stated"], asked["reference"])), file=answers, flush=True)


def compare(stated: str, reference: str) -> bool | Literal["unreadable_reference"]:
    """Whether two answers, written as LaTeX or plainly, are the same mathematics.

    Units, percent signs, thousands separators and `x =` are overlooked as math-verify does. It sets
    no time limit.
    """
    import math_verify

    try:
        expected = _parsed(reference)
        if not expected:
            return "unreadable_reference"
        return bool(
            math_verify.verify(expected, _parsed(stated), timeout_seconds=None)
        )  # False for an answer that cannot be parsed
    except MemoryError:
        raise
    except Exception:  # whatever sympy makes of it, it is not the reference
        return False


def _parsed(answer: str) -> list:
    import math_verify

    return math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _limit(what: int, amount: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        amount = min(amount, hard)
    resource.setrlimit(what, (amount, hard))


if __name__ == "__main__":
    main()
