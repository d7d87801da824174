"""A tokenizer, its schema and a task, made once."""

import dataclasses

import pytest

from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS
from tw_jax.tasks.character_tokenizer import build_tokenizer
from tw_jax.tasks.multiplication import Multiplication, MultiplicationConfig
from tw_jax.train.run_dir import LoadedModel
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


@pytest.fixture(scope="session")
def small_model(tokenizer, schema):
    config = dataclasses.replace(PRESETS["tiny"], hidden_size=32, intermediate_size=64,
                                 num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1, head_dim=16)  # fmt: skip
    return LoadedModel(
        graphdef=qwen3.graphdef(config),
        params=qwen3.init_params(config, 0),
        config=config,
        tokenizer=tokenizer,
        schema=schema,
        step=5,
    )
