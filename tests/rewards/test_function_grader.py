"""A user's grading function: whatever it does, the run goes on and the failure has a name."""

import textwrap
import threading
import time

import pytest

from tw_jax.config import load_config
from tw_jax.errors import UserError
from tw_jax.rewards.graders import Grade, GradingConfig, grade_answers, open_grader
from tw_jax.rewards.grading import require_graded
from tw_jax.rewards.grading_queue import GradingQueue
from tw_jax.selftrain.config import SelfTrainConfig

FUNCTIONS = """
    import os, sys, time
    import numpy as np

    def grade(answer, reference):
        print("words on standard output are no answer", flush=True)
        sys.stdin.read(1)  # neither are questions on standard input
        return answer.strip() == reference

    def partial(answer, reference):
        return len(set(answer) & set(reference)) / len(set(reference))

    def ill(answer, reference):
        if answer == "raise": raise KeyError("no such key")
        if answer == "exit": sys.exit(3)
        if answer == "_exit": os._exit(3)
        if answer == "loop":
            while True: pass
        if answer == "sleep": time.sleep(1e6)
        if answer == "abort": os.abort()
        return {
            "nan": float("nan"), "inf": float("-inf"), "huge": 10**400, "two": 2, "minus": -0.1,
            "none": None, "text": "1", "complex": 1j, "array": np.ones(2), "list": [1],
            "numpy true": np.bool_(True), "numpy half": np.float32(0.5), "int": 1, "true": True,
        }[answer]

    def needs_none(answer, reference):
        return reference is None and "because" in answer

    not_a_function = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(textwrap.dedent(FUNCTIONS))
    return path


def config(file, function="grade", **more):
    settings = {"timeout_s": 20.0, "workers": 1} | more
    return GradingConfig("python", file=file, function=function, **settings)


def test_a_function_is_asked(file):
    with open_grader(config(file)) as grader:
        assert grader(" 7", "7") == Grade(True, "7", "correct", 1.0)
        assert grader("so 8", "7") == Grade(False, "so 8", "wrong", 0.0)
        assert grader("x" * 300_000, "7").reason == "wrong"  # more than a pipe holds
    with open_grader(config(file, "partial")) as grader:
        grade = grader("ab", "abcd")
        assert (grade.correct, grade.score, grade.reason) == (False, 0.5, "wrong")


@pytest.mark.parametrize(
    ("answer", "reason", "said"),
    [
        ("raise", "grading_raised", "KeyError: 'no such key'"),
        ("exit", "grading_raised", "SystemExit"),
        ("nan", "grading_not_finite", "nan"),
        ("inf", "grading_not_finite", "-inf"),
        ("huge", "grading_not_finite", "inf"),
        ("two", "grading_out_of_range", "returned 2"),
        ("minus", "grading_out_of_range", "-0.1"),
        ("none", "grading_wrong_type", "NoneType"),
        ("text", "grading_wrong_type", "str"),
        ("complex", "grading_wrong_type", "complex"),
        ("array", "grading_wrong_type", "ndarray"),
        ("list", "grading_wrong_type", "list"),
        ("_exit", "grading_died", "ended its process"),
        ("abort", "grading_died", "ended its process"),
    ],
)
def test_failures_have_a_kind_and_score_nothing(one_ill_grader, answer, reason, said):
    grade = one_ill_grader(answer, "7")
    assert (grade.correct, grade.score) == (False, 0.0)
    assert grade.reason == grade.failure == reason and said in grade.message
    assert one_ill_grader("true", "7").correct  # the next answer is graded


@pytest.fixture(scope="module")
def one_ill_grader(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "my_rewards.py"
    path.write_text(textwrap.dedent(FUNCTIONS))
    with open_grader(config(path, "ill")) as grader:
        yield grader


@pytest.mark.parametrize(
    ("answer", "score"), [("numpy true", 1), ("numpy half", 0.5), ("int", 1), ("true", 1)]
)
def test_scores_of_any_kind_of_number(one_ill_grader, answer, score):
    assert one_ill_grader(answer, "7").score == score


@pytest.mark.parametrize("answer", ["loop", "sleep"])
def test_a_function_that_hangs_costs_its_limit(file, answer):
    with open_grader(config(file, "ill", timeout_s=1.0)) as grader:
        began_s = time.monotonic()
        assert grader(answer, "7").reason == "grading_timeout"
        assert time.monotonic() - began_s < 10
        assert grader("nan", "7").reason in ("grading_not_finite", "grading_timeout")


def test_leaving_does_not_wait_for_what_hangs(file):
    before = threading.active_count()
    with (
        open_grader(config(file, "ill", timeout_s=600.0)) as grader,
        GradingQueue(grader, 1) as queue,
    ):
        queue.submit(0, "sleep", "7")
        queue.submit(1, "true", "7")
        began_s = time.monotonic()
        grades = queue.collect(0.5)
        assert time.monotonic() - began_s < 10
    assert time.monotonic() - began_s < 20
    assert [grades[key].reason for key in (0, 1)] == ["grading_backlog"] * 2
    while threading.active_count() > before and time.monotonic() - began_s < 20:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_queue_grades_again_after_a_backlog():
    held = threading.Event()

    def grader(text, reference):
        if text == "hold":
            held.wait(60)
        return Grade(text == reference, text, "correct" if text == reference else "wrong")

    with GradingQueue(grader, 1) as queue:
        queue.submit(0, "hold", "7")
        assert queue.collect(0.05)[0].reason == "grading_backlog"
        held.set()
        queue.submit(5, "7", "7")
        assert queue.collect(60) == {5: Grade(True, "7", "correct")}
        assert queue.collect(0) == {}


def test_several_processes_share_the_work(file):
    with open_grader(config(file, "partial", workers=2)) as grader:
        grades = grade_answers(grader, [("ab"[: i % 3], "ab") for i in range(9)], at_once=4)
    assert [grade.score for grade in grades] == [0.0, 0.5, 1.0] * 3


def test_no_reference_is_needed_where_the_function_says_so(file):
    with open_grader(config(file, "needs_none", needs_answers=False)) as grader:
        assert grader("because", None).correct


@pytest.mark.parametrize(
    ("text", "function", "said"),
    [
        (None, "grade", "no such file"),
        ("def grade(:", "grade", "SyntaxError"),
        ("import nowhere_to_be_found", "grade", "ModuleNotFoundError"),
        ("raise SystemExit(1)", "grade", "SystemExit"),
        ("def other(a, r): return 1", "grade", "it holds other"),
        ("grade = 3", "grade", "it holds none"),
        ("import os; os._exit(1)", "grade", "does not start"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_once(tmp_path, text, function, said):
    path = tmp_path / "my_rewards.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said), open_grader(config(path, function)):
        raise AssertionError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grader=python"], "needs one"),
        (["file=a.py"], "belongs to grader=python"),
        (["needs_answers=false"], "grader=math compares"),
        (["timeout_s=0"], "timeout_s"),
        (["timeout_s=.inf"], "timeout_s"),
    ],
)
def test_unusable_settings_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        load_config(GradingConfig, None, words)


def test_too_many_failures_stop_the_run_with_what_was_said():
    good, bad = Grade(True, "1", "correct"), Grade(False, "1", "grading_raised", 0.0, "it raised X")
    slow = Grade(False, None, "grading_timeout")
    require_graded([good, bad, slow, good], 0.5)
    require_graded([Grade(False, None, "no_answer")] * 4, 0.0)
    with pytest.raises(UserError) as stopped:
        require_graded([good, bad, slow, bad], 0.5)
    message = str(stopped.value)
    assert "3 of 4" in message and "2 grading_raised, 1 grading_timeout" in message
    assert message.count("it raised X") == 1


def test_the_accelerator_is_not_the_functions(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text("import os\ndef grade(a, r): return os.environ['JAX_PLATFORMS'] == 'cpu'\n")
    with open_grader(config(path)) as grader:
        assert grader("", "").correct


def test_a_training_set_cannot_do_without_answers(file):
    with pytest.raises(ValueError, match="needs_answers"):
        SelfTrainConfig(grading=config(file, needs_answers=False))
