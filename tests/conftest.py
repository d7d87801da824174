"""Fixtures that the whole suite shares."""

import os

import hypothesis
import pytest

from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema, schema_tags
from tw_jax.trajectory.vocabulary import add_control_tokens

# Compilation makes single examples slow; a deadline would only measure the machine. Continuous
# integration judges the same code the same way each time; at a desk every run looks further.
hypothesis.settings.register_profile("tw_jax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("tw_jax")


@pytest.fixture(scope="session")
def tokenizer():
    """The character tokenizer that ships with the tasks."""
    return load_tokenizer()


@pytest.fixture(scope="session")
def schema(tokenizer):
    """The ThreadWeaver schema over it."""
    return make_schema("threadweaver", tokenizer)


@pytest.fixture(scope="session")
def languages():
    """Every schema by name, with the tokenizer that has its tags: name -> (tokenizer, schema)."""
    made, tokenizer = {}, load_tokenizer()
    for name in ("threadweaver", "native", "apr"):
        own, _ = add_control_tokens(tokenizer, schema_tags(name))
        made[name] = (own, make_schema(name, own))
    return made
