"""Gradients against transformers, and the numbers that `python -m benchmarks parity` reports."""

import pytest

from benchmarks.parity import MODELS, compare, gradient_error
from tests.models.qwen3_reference import CASES, case_tokens, seeded_params

pytest.importorskip("torch", reason="the reference model needs torch")


@pytest.mark.parametrize("name", ["yarn", "moe"])
def test_gradients_match_torch(name):
    config = CASES[name]
    assert gradient_error(config, seeded_params(config, seed=2), case_tokens(config)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_matches_torch(name):
    found = compare(MODELS[name])
    assert found["max_abs_diff"] <= 2e-5
    assert found["gradient_max_rel_diff"] <= 1e-4
    assert found["max_abs_logit"] > 1, "the comparison would prove little"
