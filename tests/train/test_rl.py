"""The RL loop on the real model and engine: sampler = trainer, resuming, objectives."""

import dataclasses

import jax
import numpy as np
import pytest

from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS
from tw_jax.rewards.reward import RewardConfig
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import SamplingParams
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.rl import run_rl
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.run_dir import ModelConfig, load_run, new_model, save_model
from tw_jax.train.tracker import read_metrics

# A random model solves nothing, but some of its short responses are free of broken tags.
SMALL = RLConfig(
    steps=3,
    prompts=4,
    group_size=4,
    reward=RewardConfig(format=1.0),
    row_len=512,
    rows=1,
    checkpoint_every=2,
    sampling=SamplingParams(
        max_response_tokens=24, max_thread_tokens=20, max_blocks=2, max_threads=3
    ),
    engine=EngineConfig(
        context_len=96, rows=8, requests=4, max_blocks=2, max_threads=3, prefill_rows=2
    ),
    optimizer=dataclasses.replace(RLConfig().optimizer, warmup_steps=1),
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that emits every token often: uniform but for a random twist."""
    folder = tmp_path_factory.mktemp("runs") / "start"
    model = new_model(ModelConfig(), 0)
    save_model(folder, model, model.params)
    return folder


def config_in(folder, start, **changes):
    return dataclasses.replace(SMALL, run_dir=str(folder), init_from=str(start), **changes)


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run_rl(config_in(folder, start))


def test_sampler_and_trainer_agree_on_every_sampled_token(uninterrupted):
    folder, result = uninterrupted
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["logprob_abs_diff_max"] <= 1e-4 for row in rows)
    assert all(row["reward_std_in_group"] > 0 for row in rows), "the test would learn nothing"
    assert result.max_logprob_abs_diff <= 1e-4


def test_a_resumed_run_repeats_the_uninterrupted_one(uninterrupted, start, tmp_path, monkeypatch):
    whole, expected = uninterrupted
    folder = tmp_path / "resumed"
    calls = 0
    from tw_jax.train import rl

    original = rl.group_advantages

    def crash_in_step_three(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("power cut")
        return original(*arguments)

    monkeypatch.setattr(rl, "group_advantages", crash_in_step_three)
    with pytest.raises(RuntimeError, match="power cut"):
        run_rl(config_in(folder, start))
    monkeypatch.setattr(rl, "group_advantages", original)
    result = run_rl(config_in(folder, start))
    for name in ("reward", "loss", "critical_path", "nll"):
        a, b = (
            [row[name] for row in read_metrics(run / "metrics.jsonl")] for run in (whole, folder)
        )
        assert a == b
    jax.tree.map(np.testing.assert_array_equal, result.model.params, expected.model.params)


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig("group_std", "ppo_clip", aggregation="sequence_mean", kl_coefficient=0.1),
        ObjectiveConfig("batch_std", "detached", aggregation="rollout_mean"),
    ],
)
def test_other_objectives_run_with_several_updates_per_step(objective, start, tmp_path):
    result = run_rl(
        config_in(tmp_path / "run", start, steps=2, updates_per_step=2, objective=objective)
    )
    assert result.model.step == 2
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run/metrics.jsonl"))
    loaded = load_run(tmp_path / "run")
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(loaded.params), jax.tree.leaves(load_run(start).params), strict=True
        )
    )


def test_micro_batches_and_rows_do_not_change_the_update(start, tmp_path):
    # A large eps makes Adam's first step proportional to the gradient instead of to its sign.
    optimizer = dataclasses.replace(
        SMALL.optimizer, warmup_steps=0, eps=0.1, learning_rate=1.0, clip_norm=float("inf")
    )
    results = [
        run_rl(
            config_in(
                tmp_path / str(row_len),
                start,
                steps=1,
                row_len=row_len,
                rows=rows,
                optimizer=optimizer,
            )
        )
        for row_len, rows in ((512, 1), (1024, 2))
    ]
    before = jax.tree.leaves(load_run(start).params)
    moved = max(
        float(np.abs(a - b).max())
        for a, b in zip(before, jax.tree.leaves(results[0].model.params), strict=True)
    )
    assert moved > 1e-3
    for a, b in zip(*(jax.tree.leaves(r.model.params) for r in results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * moved)


def test_unusable_configurations(start, tmp_path):
    with pytest.raises(ValueError, match="group_size"):
        dataclasses.replace(SMALL, group_size=1)
    with pytest.raises(ValueError, match="off-policy"):
        dataclasses.replace(SMALL, updates_per_step=2)
    with pytest.raises(UserError, match="no run at"):
        run_rl(config_in(tmp_path / "run", tmp_path / "nowhere"))
    with pytest.raises(UserError, match="row_len=16 is too short"):
        run_rl(config_in(tmp_path / "run", start, row_len=16))


def test_the_start_is_not_changed_by_training(start, uninterrupted):
    fresh = qwen3.init_params(PRESETS[ModelConfig().source], 0)
    jax.tree.map(np.testing.assert_array_equal, load_run(start).params, fresh)
