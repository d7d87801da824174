"""Objectives as values: names, and settings that contradict each other."""

import pytest

from tw_jax.errors import UserError
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.objective_presets import PRESETS, objective_preset
from tw_jax.train.reference import ReferenceConfig
from tw_jax.train.rl_config import RLConfig


def test_presets_by_name():
    assert objective_preset("pgrpo") == ObjectiveConfig()
    assert set(PRESETS) == {
        "pgrpo",
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "papo",
        "apr_grpo",
        "parallel_r1",
    }
    with pytest.raises(UserError, match="pgrpo"):
        objective_preset("ppo")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dual_clip": 3.0}, "ratio=ppo_clip"),
        ({"dual_clip": 1.0, "ratio": "ppo_clip"}, "above 1"),
        ({"ratio_level": "sequence"}, "ratio_level"),
        ({"importance_cap": 0.0}, "importance_cap"),
        ({"token_budget": 100}, "token_sum"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"reference": ReferenceConfig("average")}, "kl_coefficient"),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


def test_a_run_takes_a_preset_or_settings():
    assert RLConfig(preset="dapo").policy_objective == PRESETS["dapo"]
    own = ObjectiveConfig("batch_std")
    assert RLConfig(objective=own).policy_objective == own
    with pytest.raises(ValueError, match="give one"):
        RLConfig(preset="dapo", objective=own)
    with pytest.raises(ValueError, match="preset=grpo excludes"):
        RLConfig(preset="grpo", objective=ObjectiveConfig())  # what is P-GRPO's is no less a choice
    assert RLConfig().policy_objective == PRESETS["pgrpo"] == ObjectiveConfig()


@pytest.mark.parametrize("field", ["updates_per_step", "passes_per_step"])
def test_more_than_one_update_of_the_same_rollouts_needs_a_ratio(field):
    with pytest.raises(ValueError, match=f"{field} > 1 is off-policy"):
        RLConfig(preset="papo", **{field: 2})
    assert RLConfig(preset="apr_grpo", **{field: 2}).optimizer_steps_per_step == 2


def test_optimizer_steps_of_a_step():
    assert RLConfig().optimizer_steps_per_step == 1
    config = RLConfig(preset="grpo", updates_per_step=4, passes_per_step=3)
    assert config.optimizer_steps_per_step == 12
    with pytest.raises(ValueError, match="passes_per_step"):
        RLConfig(passes_per_step=0)
