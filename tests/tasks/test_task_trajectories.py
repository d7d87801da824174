"""The tasks' texts under the ThreadWeaver schema."""

import numpy as np
import pytest

from tw_jax.data.text import encode_prompt, encode_response
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.tasks.multiplication import Multiplication, MultiplicationConfig
from tw_jax.tasks.sum_of_products import SumOfProducts, SumOfProductsConfig
from tw_jax.tasks.task import Problem, Style, Task
from tw_jax.trajectory import metrics
from tw_jax.trajectory.schemas import make_schema
from tw_jax.trajectory.trajectory import Trajectory

TOKENIZER = load_tokenizer()
SCHEMA = make_schema("threadweaver", TOKENIZER)
MULTIPLICATION = Multiplication(MultiplicationConfig())
SUMS = SumOfProducts(SumOfProductsConfig())
# Tokens of prompt, sequential response, parallel response, critical path and trie, by the number of
# products where it varies; every response ends with <eos>.
MULTIPLICATION_COUNTS = (9, 161, 200, 124, 285)
SUMS_COUNTS = {
    2: (15, 167, 196, 124, 283),
    3: (22, 256, 295, 151, 461),
    4: (29, 345, 394, 178, 639),
}
by_name = pytest.mark.parametrize("task", [MULTIPLICATION, SUMS], ids=lambda task: task.name)


def trajectory_of(problem: Problem, style: Style) -> Trajectory:
    prompt = encode_prompt(TOKENIZER, problem.prompt)
    response = encode_response(TOKENIZER, problem.response(style), SCHEMA.eos_id)
    parsed = SCHEMA.parse(np.concatenate([prompt, response]), len(prompt))
    assert isinstance(parsed, Trajectory), parsed
    return parsed


@by_name
def test_parallel_responses_are_strictly_valid(task: Task) -> None:
    for index in range(100):
        problem = task.problem("train", index, 0)
        trajectory = trajectory_of(problem, "parallel")
        assert SCHEMA.validate(trajectory) == ()
        (block,) = trajectory.blocks
        assert block.start == trajectory.prompt_len
        lines = problem.sequential.split("\n")
        for thread, line in zip(block.threads, lines, strict=False):
            header = f"{thread.number}:"
            assert TOKENIZER.decode(trajectory.tokens[thread.body : thread.end]) == (
                line.removeprefix(header) + "\n</Thread>"
            )
        plans = [
            TOKENIZER.decode(trajectory.tokens[span.start : span.end]) for span in block.outlines
        ]
        assert len(plans) == len(block.threads)
        ending = TOKENIZER.decode(trajectory.tokens[block.end :])
        assert ending == "\n" + "\n".join(lines[len(plans) :]) + "<eos>"


@by_name
def test_sequential_responses_hold_no_control_token(task: Task) -> None:
    for index in range(100):
        trajectory = trajectory_of(task.problem("train", index, 0), "sequential")
        assert trajectory.blocks == ()
        assert not np.isin(trajectory.tokens, SCHEMA.tag_ids).any()
        assert SCHEMA.critical_path(trajectory) == metrics.total_tokens(trajectory)


@by_name
def test_texts_come_back_from_their_tokens(task: Task) -> None:
    for index in range(100):
        problem = task.problem("train", index, 0)
        for style in ("sequential", "parallel"):
            tokens = trajectory_of(problem, style).tokens
            assert TOKENIZER.unk_token_id not in tokens
            assert (
                TOKENIZER.decode(tokens) == f"<bos>{problem.prompt}{problem.response(style)}<eos>"
            )


def test_token_counts() -> None:
    """The numbers that row lengths, budgets and expected speed-ups are chosen by."""

    def counts(problem: Problem) -> tuple[int, int, int, int, int]:
        sequential = trajectory_of(problem, "sequential")
        parallel = trajectory_of(problem, "parallel")
        return (
            parallel.prompt_len,
            metrics.total_tokens(sequential),
            metrics.total_tokens(parallel),
            SCHEMA.critical_path(parallel),
            len(SCHEMA.forest([parallel])),
        )

    assert counts(MULTIPLICATION.longest_problem()) == MULTIPLICATION_COUNTS
    by_products = {}
    for index in range(50):
        problem = SUMS.problem("train", index, 0)
        by_products.setdefault(problem.prompt.count("+") + 1, set()).add(counts(problem))
    assert by_products == {products: {counted} for products, counted in SUMS_COUNTS.items()}
