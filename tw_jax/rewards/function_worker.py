"""The process that calls a user's grading function: `python -m ... FILE FUNCTION`.

It reads lines `{"answer", "reference", "limit_s"}` and answers each with a line, `{"score"}` or
`{"failure", "message"}`. What the function prints goes nowhere. The kernel ends the process when a
call takes too long, also when whoever started it is gone; `tw_jax.rewards.worker_pool` then starts
another.
"""

import importlib.util
import json
import math
import numbers
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

_GRACE_S = 2  # whoever asked ends this process first
_LONGEST_MESSAGE_CHARS = 300


def main(arguments: list[str]) -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    questions = os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    file, name = arguments
    try:
        function = load_function(pathlib.Path(file), name)
    except ValueError as error:
        print(str(error).replace("\n", " "), file=answers, flush=True)
        return
    print("ready", file=answers, flush=True)
    for line in questions:
        asked = json.loads(line)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # its default action ends the process
        signal.alarm(math.ceil(asked["limit_s"]) + _GRACE_S)
        reply = called(function, asked["answer"], asked["reference"])
        signal.alarm(0)
        print(json.dumps(reply), file=answers, flush=True)


def load_function(file: pathlib.Path, name: str) -> Callable[..., Any]:
    """The function of that name in a Python file.

    Raises:
      ValueError: no such file or function, or the file raises when it is imported.
    """
    if not file.is_file():
        raise ValueError(f"grading.file={file}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"grading.file={file}: is no Python file; its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses and pickles look there
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"grading.file={file}: cannot be imported: {_said(error)}") from error
    function = vars(module).get(name)
    if not callable(function):
        here = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"grading.function={name}: {file} holds no such function; it holds "
            f"{', '.join(here) or 'none'}"
        )
    return function


def called(function: Callable[..., Any], answer: str, reference: str | None) -> dict[str, Any]:
    """Calls the function: its score, or what is wrong with it."""
    try:
        value = function(answer, reference)
    except (Exception, SystemExit) as error:  # also KeyboardInterrupt would end this process only
        return _failure("raised", f"raised {_said(error)}")
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()  # a NumPy scalar
    if isinstance(value, bool):
        return {"score": float(value)}
    if not isinstance(value, numbers.Real):
        returned = f"returned {type(value).__name__}; expected a truth value or a number in 0..1"
        return _failure("wrong_type", returned)
    try:
        score = float(value)
    except (ValueError, OverflowError):
        score = math.inf
    if not math.isfinite(score):
        return _failure("not_finite", f"returned {score}")
    if not 0 <= score <= 1:
        return _failure("out_of_range", f"returned {score:g}; expected a number in 0..1")
    return {"score": score}


def _failure(kind: str, message: str) -> dict[str, Any]:
    return {"failure": kind, "message": message[:_LONGEST_MESSAGE_CHARS]}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE_CHARS]


if __name__ == "__main__":
    main(sys.argv[1:])
