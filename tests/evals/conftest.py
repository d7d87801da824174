"""A tokenizer, its schema and a task, made once."""

import pytest

from tw_jax.tasks.character_tokenizer import build_tokenizer
from tw_jax.tasks.multiplication import Multiplication, MultiplicationConfig
from tw_jax.trajectory.schemas import make_schema


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def schema(tokenizer):
    return make_schema("threadweaver", tokenizer)


@pytest.fixture(scope="session")
def task():
    return Multiplication(MultiplicationConfig(digits=2))
