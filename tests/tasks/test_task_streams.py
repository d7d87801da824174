"""Streams of problems: splits, random access, style choice, answers, configs."""

import dataclasses
import re
import subprocess
import sys
import time

import pytest

from tw_jax.errors import UserError
from tw_jax.tasks.multiplication import Multiplication, MultiplicationConfig
from tw_jax.tasks.operands import draw_pair, pair_split
from tw_jax.tasks.registry import TaskConfig, make_task
from tw_jax.tasks.sum_of_products import SumOfProducts, SumOfProductsConfig
from tw_jax.tasks.task import Problem, Split, Task, choose_style, draw_below, random_words

TASKS: list[Task] = [
    Multiplication(MultiplicationConfig()),
    SumOfProducts(SumOfProductsConfig()),
]
by_name = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def ordered_pairs(problem: Problem) -> list[tuple[int, int]]:
    """All ordered pairs of factors in the prompt."""
    found = re.findall(r"(\d+)\*(\d+)", problem.prompt)
    return [(int(a[::-1]), int(b[::-1])) for a, b in found]


@pytest.mark.parametrize(
    "task",
    [
        *TASKS,
        Multiplication(MultiplicationConfig(digits=2)),
        SumOfProducts(SumOfProductsConfig(digits=1, heldout_fraction=0.4)),
    ],
    ids=str,
)
def test_splits_share_no_pair_in_either_order(task: Task) -> None:
    seen: dict[str, set[tuple[int, int]]] = {}
    # Different seeds: the split must not depend on them.
    for split, seed in (("train", 0), ("heldout", 1)):
        pairs = [p for i in range(4000) for p in ordered_pairs(task.problem(split, i, seed))]
        seen[split] = {*pairs, *((b, a) for a, b in pairs)}
    assert len(seen["train"]) > 20 and len(seen["heldout"]) > 10
    assert not seen["train"] & seen["heldout"]


def test_the_two_tasks_hold_out_the_same_pairs() -> None:
    held_out = {
        pair
        for i in range(2000)
        for pair in ordered_pairs(SumOfProducts(SumOfProductsConfig()).problem("heldout", i, 0))
    }
    multiplication = Multiplication(MultiplicationConfig(digits=2))
    trained = {p for i in range(2000) for p in ordered_pairs(multiplication.problem("train", i, 0))}
    assert not held_out & trained


def test_heldout_share_and_its_nesting() -> None:
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    small = {p for p in pairs if pair_split(*p, 0.1) == "heldout"}
    large = {p for p in pairs if pair_split(*p, 0.2) == "heldout"}
    assert small < large
    assert 0.08 < len(small) / len(pairs) < 0.12
    assert all(pair_split(b, a, 0.1) == "heldout" for a, b in small)


def test_values_are_fixed_for_all_time() -> None:
    """A change here changes everyone's data and held-out sets: it needs a very good reason."""
    multiplication, sums = TASKS
    assert multiplication.problem("train", 0, 0).prompt == "521*359="
    assert multiplication.problem("heldout", 12345, 6).prompt == "063*184="
    assert sums.problem("train", 0, 0).prompt == "A51*41+B32*68="
    assert sums.problem("heldout", 12345, 6).prompt == "A97*74+B88*23+C89*18="
    assert next(random_words("style", "train", 0, 0)) == 13616802330197120922


@by_name
def test_problems_are_a_function_of_split_index_and_seed(task: Task) -> None:
    forwards = [task.problem("train", i, 3) for i in range(50)]
    backwards = [task.problem("train", i, 3) for i in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert len({p.prompt for p in forwards}) > 45
    assert forwards != [task.problem("train", i, 4) for i in range(50)]
    far = 10**12
    assert task.problem("train", far, 3) == task.problem("train", far, 3)


def test_problems_do_not_depend_on_the_process() -> None:
    program = (
        "from tw_jax.tasks.registry import *; "
        "print(make_task(TaskConfig('sum_of_products')).problem('heldout', 5, 9).prompt)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert outputs == {TASKS[1].problem("heldout", 5, 9).prompt}


@by_name
def test_no_problem_is_longer_than_the_longest(task: Task) -> None:
    longest = task.longest_problem()
    lengths = [
        [len(text) for text in (p.prompt, p.answer, p.sequential, p.parallel)]
        for p in (task.problem("train", i, 0) for i in range(300))
    ]
    bound = [len(t) for t in (longest.prompt, longest.answer, longest.sequential, longest.parallel)]
    assert [max(column) for column in zip(*lengths, strict=True)] == bound


@by_name
def test_style_prefixes_begin_the_responses_and_tell_them_apart(task: Task) -> None:
    for index in range(100):
        problem = task.problem("train", index, 0)
        sequential = task.style_prefix("sequential", problem)
        parallel = task.style_prefix("parallel", problem)
        assert (sequential, parallel) == ("1", "<Parallel>")
        assert problem.response("sequential").startswith(sequential)
        assert problem.response("parallel").startswith(parallel)


@by_name
def test_answers_are_found_in_correct_responses(task: Task) -> None:
    for index in range(100):
        problem = task.problem("heldout", index, 0)
        for text in (problem.sequential, problem.parallel):
            assert task.extract_answer(text) == problem.answer
            assert task.extract_answer(text + "<eos>") == problem.answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", None),
        ("380190", None),
        ("#", None),
        ("#380190", "380190"),
        ("#1\n#380190", "380190"),
        ("#380190<eos>", "380190"),
        ("#380190<eos>#7<pad>", "380190"),
        ("<eos>#380190", None),
        ("#380190\n", None),
        ("# 380190", None),
        ("#38019o", None),
        ("#380190#", None),
        ("#٣٤", None),
        ("#-5", None),
    ],
)
@by_name
def test_extract_answer(task: Task, response: str, answer: str | None) -> None:
    assert task.extract_answer(response) == answer


def test_choose_style_meets_its_share_and_is_repeatable() -> None:
    for share in (0.0, 0.25, 0.5, 1.0):
        chosen = [choose_style("train", i, 0, share) for i in range(4000)]
        assert chosen == [choose_style("train", i, 0, share) for i in range(4000)]
        assert abs(chosen.count("parallel") / 4000 - share) < 0.03


def test_draws_are_uniform() -> None:
    words = random_words("test")
    counts = [0] * 7
    for _ in range(70_000):
        counts[draw_below(words, 7)] += 1
    assert all(abs(count - 10_000) < 500 for count in counts)


def test_tasks_by_name() -> None:
    config = TaskConfig(
        multiplication=MultiplicationConfig(digits=4),
        sum_of_products=SumOfProductsConfig(digits=3),
    )
    assert make_task(config) == Multiplication(config.multiplication)
    config = dataclasses.replace(config, name="sum_of_products")
    assert make_task(config) == SumOfProducts(config.sum_of_products)


@pytest.mark.parametrize(
    "build",
    [
        lambda: MultiplicationConfig(digits=1),
        lambda: MultiplicationConfig(heldout_fraction=0.0),
        lambda: MultiplicationConfig(heldout_fraction=1.0),
        lambda: SumOfProductsConfig(min_products=1),
        lambda: SumOfProductsConfig(min_products=3, max_products=2),
        lambda: SumOfProductsConfig(max_products=27),
        lambda: SumOfProductsConfig(digits=0),
        lambda: SumOfProductsConfig(heldout_fraction=-1),
    ],
)
def test_bad_configs_are_user_errors(build: object) -> None:
    with pytest.raises(UserError, match="digits|heldout_fraction|min_products"):
        build()


def test_an_empty_split_is_a_user_error_not_an_endless_search() -> None:
    with pytest.raises(UserError, match="found no heldout pair"):
        draw_pair(random_words("test"), 1, "heldout", 1e-6)


@by_name
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_generation_keeps_up_with_training(task: Task, split: Split) -> None:
    # Measured 12,000 to 34,000 a second on one quiet core; training eats a few hundred.
    start = time.process_time()
    for index in range(2000):
        task.problem(split, index, 0)
    assert 2000 / (time.process_time() - start) > 1000
