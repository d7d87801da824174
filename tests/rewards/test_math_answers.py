"""Graders: a table of answers, and answers that would hang whoever compares them."""

import os
import pathlib
import signal
import sys
import time

import pytest

from tw_jax.rewards.answers import answer_part, choice_letter, last_boxed, stated_choice
from tw_jax.rewards.graders import (
    GradingConfig,
    grade_answers,
    grade_choice,
    grade_exact,
    math_grader,
    open_grader,
)
from tw_jax.rewards.grading_pool import ComparisonPool

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def grade_math():
    with open_grader(GradingConfig(workers=1)) as grader:
        yield grader


SAME = [
    (r"\frac{1}{2}", "1/2"),
    (r"\frac12", "0.5"),
    (r"\dfrac{3}{4}", "0.75"),
    (r"1\frac12", "3/2"),
    ("1,000", "1000"),
    (r"2{,}025", "2025"),
    (r"50\%", "0.5"),
    ("50%", r"\frac{1}{2}"),
    (r"5\text{ cm}", "5"),
    (r"5\ \mathrm{cm}^2", "5"),
    (r"12^\circ", "12"),
    (r"\$3.50", "3.5"),
    (r"x = 5", "5"),
    (r"\{3, 2, 1\}", r"\{1,2,3\}"),
    ("2, 1", "1,2"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    ("[1,2)", "[1, 2)"),
    (r"x \in [0,1]", "[0,1]"),
    (r"2\sqrt2", r"\sqrt{8}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("3!", "6"),
    (r"10^{10}", "10000000000"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\text{even}", "even"),
    (r"\frac{\sqrt{\frac{1}{4}}}{2}", "0.25"),
    ("5", r"\boxed{5}"),
    ("9^{9^{9^9}}", "9^{9^{9^9}}"),  # equal text needs no arithmetic
]
OTHER = [
    ("3", "-3"),
    ("8", "7"),
    ("0.333", "1/3"),
    ("5x", "5"),
    ("[1,2]", "[1,2)"),
    ("(1,2)", "[1,2]"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("1,2", "2"),
    (r"\frac{1}{3}", r"\frac{1}{2}"),
    ("x^2+1", "x^2-1"),
    (r"\text{odd}", "even"),
    (r"\frac{1}{0}", "1"),
    (r"\left(\left(", "1"),
    ("the answer", "17"),
]


@pytest.mark.parametrize(("stated", "reference"), SAME)
def test_the_same_mathematics_is_correct(grade_math, stated, reference):
    graded = grade_math(f"So we get \\boxed{{{stated}}}.", reference)
    assert graded.correct and graded.reason == "correct"
    assert graded.extracted == stated


@pytest.mark.parametrize(("stated", "reference"), OTHER)
def test_other_mathematics_is_wrong(grade_math, stated, reference):
    graded = grade_math(f"\\boxed{{{stated}}}", reference)
    assert not graded.correct and graded.reason == "wrong"


@pytest.mark.parametrize("text", ["", "the answer is 5", r"\boxed{}", r"\boxed{5", r"\boxed"])
def test_no_answer(grade_math, text):
    graded = grade_math(text, "5")
    assert (graded.correct, graded.extracted, graded.reason) == (False, None, "no_answer")


def test_an_unreadable_reference_is_said(grade_math):
    assert grade_math(r"\boxed{5}", "").reason == "unreadable_reference"


def test_an_answer_that_hangs_costs_its_time_limit_and_nothing_else():
    started_s = time.monotonic()
    with ComparisonPool(1, 2.0) as pool:
        assert pool.equal("1", "1.0") is True
        assert pool.equal("9^{9^{9^9}}", "7") == "grading_timeout"
        assert pool.equal("2", "2.0") is True  # by another process
        assert pool.replaced == 1
    assert time.monotonic() - started_s < 60


@pytest.mark.parametrize(
    "stated",
    [
        "{" * 100 + "}" * 100,
        "\\sqrt" * 300 + "2",
        "a\0b",
        "\ud800",
        "\n\n",
        "\\end{pmatrix}",
        "__import__('os')._exit(1)",
        "1" * 100_000,
    ],
)
def test_whatever_a_model_writes_is_graded(grade_math, stated):
    assert not grade_math(f"\\boxed{{{stated}}}", "7").correct
    assert grade_math("\\boxed{7}", "7.0").correct


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_that_dies_is_replaced(grade_math):
    before = set(comparing_processes())  # that of the other tests' grader
    with ComparisonPool(1, 20.0) as pool:
        assert pool.equal("1", "1.0") is True
        (child,) = set(comparing_processes()) - before
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert pool.equal("1", "1.0") is True and pool.replaced == 0
        assert child not in comparing_processes()
    assert set(comparing_processes()) == before


def comparing_processes():
    """Processes that compare for this one."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if b"tw_jax.rewards.math_worker" in words and int(parent) == os.getpid():
            found.append(int(folder.name))
    return found


def test_threads_share_a_pool():
    with ComparisonPool(2, 20.0) as pool:
        grader = math_grader(pool.equal)
        pairs = [(f"\\boxed{{{i}/2}}", f"{i // 2}") for i in range(8)]
        grades = grade_answers(grader, pairs, at_once=4)
    assert [grade.correct for grade in grades] == [True, False] * 4


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed 7.", "7"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{1} \boxed{2", "1"),  # cut off by a budget
        (r"\boxed{\boxed{3}}", "3"),
        ("none", None),
        ("\\boxed{\\", None),
    ],
)
def test_the_last_whole_box(text, content):
    assert last_boxed(text) == content


def test_the_answer_stands_behind_the_reasoning():
    assert answer_part("<think>a</think>b") == "b"
    assert answer_part("<think>a</think>b</think>c", "b") == "c"
    assert answer_part("<Parallel></Parallel>b", "b") == "b"
    assert answer_part("plain") == "plain"


def test_exact_grading():
    assert grade_exact("work\n\n 12  apples \n", "12 apples").correct
    assert grade_exact(r"so \boxed{x} or so", "x").correct
    assert grade_exact("1/2", "0.5").reason == "wrong"
    assert grade_exact(" \n", "1").reason == "no_answer"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        ("The answer is (D).", "D"),
        ("Answer: A\nNo: the answer is **B**", "B"),
        ("thinking\nC.", "C"),
        ("The answer is Apples", None),
        (r"\boxed{12}", None),
        ("", None),
    ],
)
def test_choices(text, letter):
    assert stated_choice(text) == letter
    assert grade_choice(text, "(B)").correct == (letter == "B")


def test_a_reference_that_is_no_letter():
    assert choice_letter("42") is None
    assert grade_choice("B", "42").reason == "unreadable_reference"
