"""The RL loop on the real model and engine: sampler = trainer, resuming, objectives."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from tests.train.live_copies import copies_counter
from tw_jax.errors import UserError
from tw_jax.models import qwen3
from tw_jax.models.config import PRESETS
from tw_jax.rewards.graders import GradingConfig
from tw_jax.rewards.reward import RewardConfig
from tw_jax.rewards.terms import FormatTerm
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import SamplingParams
from tw_jax.train.checkpoint import Checkpointer
from tw_jax.train.jsonl_tracker import read_metrics
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.policy_learner import PolicyLearner
from tw_jax.train.reference import ReferenceConfig
from tw_jax.train.rl import run_rl, settings_digest
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.rl_health import HealthConfig
from tw_jax.train.rollout_samples import RolloutSamplesConfig, read_samples
from tw_jax.train.run_dir import ModelConfig, load_run, new_model, only_run, save_model
from tw_jax.view.run_page import RunViewConfig, view_run

# A random model solves nothing, but some of its short responses are free of broken tags.
SMALL = RLConfig(
    steps=3,
    prompts=4,
    group_size=4,
    reward=RewardConfig(format=FormatTerm(1.0)),
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
    samples=RolloutSamplesConfig(every=1, rollouts=2),
)


def saved_start(folder):
    """A model that emits every token often: uniform but for a random twist."""
    model = new_model(ModelConfig(), 0)
    save_model(folder, model, model.params)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return saved_start(tmp_path_factory.mktemp("runs") / "start")


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
    first, second = (
        [(s["step"], s["response"], s["reward"], s["advantage"]) for s in read_samples(path)]
        for path in (whole / "rollouts.jsonl", folder / "rollouts.jsonl")
    )
    assert first == second
    assert [step for step, *_ in first] == [1, 1, 2, 2, 3, 3]


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


@pytest.mark.slow
def test_a_reference_that_moves_is_kept_in_checkpoints(start, tmp_path):
    objective = ObjectiveConfig(
        kl_coefficient=0.5, reference=ReferenceConfig("average", decay=0.5), drop_zero_variance=True
    )
    whole = run_rl(config_in(tmp_path / "whole", start, steps=3, objective=objective))
    for steps in (2, 3):  # the first stops behind a checkpoint
        resumed = run_rl(config_in(tmp_path / "parts", start, steps=steps, objective=objective))
    jax.tree.map(np.testing.assert_array_equal, resumed.model.params, whole.model.params)
    first, second, _ = read_metrics(tmp_path / "whole/metrics.jsonl")
    # Before the first update the policy is the start; afterwards the average lags behind it.
    assert first["kl_reference"] == pytest.approx(0, abs=1e-6)
    assert 0 < second["kl_reference"] < second["kl_start"]


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


def test_a_run_that_can_train_on_nothing_stops_and_says_what_to_do(start, tmp_path):
    folder, health = tmp_path / "run", HealthConfig(patience_steps=2)
    config = config_in(folder, start, row_len=2, steps=9, health=health)
    with pytest.raises(UserError, match=r"stopped after step 2 of 9, saved\..*row_len=2 .*Raise"):
        run_rl(config)
    assert [row["left_out/too_long"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 1]
    with pytest.raises(UserError, match="stopped after step 4 of 9"):  # two more steps of patience
        run_rl(config)
    stopped = load_run(folder)
    assert stopped.step == 4
    jax.tree.map(np.testing.assert_array_equal, stopped.params, load_run(start).params)


@pytest.mark.parametrize("measured", [True, False])
def test_the_start_is_in_memory_only_where_something_compares_with_it(
    start, tmp_path, monkeypatch, measured
):
    found, learn, copies = [], PolicyLearner.learn, copies_counter()

    def counted(self, *arguments):
        learned = learn(self, *arguments)
        found.append(copies(learned.state.params))
        return learned

    monkeypatch.setattr(PolicyLearner, "learn", counted)
    run_rl(config_in(tmp_path / "run", start, steps=2, measure_kl_to_start=measured))
    # Parameters and two moments, perhaps the start; batches are small.
    assert found == pytest.approx([4 if measured else 3] * 2, abs=0.2)


def test_rewards_that_are_all_equal_change_nothing(start, tmp_path):
    """No answer is right and the format is not rewarded: nothing can be learned, nothing breaks."""
    result = run_rl(config_in(tmp_path / "run", start, steps=2, reward=RewardConfig()))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [(row["reward"], row["groups_without_variance"]) for row in rows] == [(0, 1)] * 2
    assert [(row["loss"], row["grad_norm"], row["skipped_updates"]) for row in rows] == [
        (0, 0, 0)
    ] * 2
    jax.tree.map(np.testing.assert_array_equal, result.model.params, load_run(start).params)


def test_several_passes_are_further_updates_off_policy(start, tmp_path):
    objective = ObjectiveConfig("group_std", "ppo_clip")
    config = config_in(tmp_path / "run", start, steps=1, passes_per_step=2, objective=objective)
    result = run_rl(config)
    (row,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert row["kl_old"] > 0
    with Checkpointer(tmp_path / "run/checkpoints") as checkpointer:
        assert checkpointer.latest_step() == 1
    assert result.model.step == 1


def test_a_run_goes_on_from_its_own_start_alone_and_says_what_has_changed(
    start, uninterrupted, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[0], folder)
    other = new_model(ModelConfig(), 1)
    save_model(tmp_path / "other", other, other.params)
    with pytest.raises(UserError, match=r"start \(checkpoint: "):
        run_rl(config_in(folder, tmp_path / "other", steps=4))
    moved = shutil.copytree(start, tmp_path / "moved")  # the same model elsewhere will do
    objective = ObjectiveConfig("group_std")
    run_rl(config_in(folder, moved, steps=4, objective=objective))
    said = capsys.readouterr().out
    assert "going on from step 3 of 4" in said
    assert "settings have changed: " in said and "steps: 3 -> 4" in said
    assert "objective.normalizer: None -> group_std" in said


def test_settings_that_rollouts_and_grades_depend_on_have_a_name_of_their_own(tmp_path):
    file = tmp_path / "grade.py"
    file.write_text("def grade(answer, reference): return True")
    config = dataclasses.replace(SMALL, grading=GradingConfig("python", file=file))
    name = settings_digest(config)
    assert name == settings_digest(dataclasses.replace(config, checkpoint_every=7, run_dir="x"))
    assert name != settings_digest(dataclasses.replace(config, preset="grpo"))
    file.write_text("def grade(answer, reference): return False")
    assert name != settings_digest(config)


def test_a_folder_is_used_by_one_command_at_a_time(start, tmp_path):
    with (
        only_run(tmp_path / "run"),
        pytest.raises(UserError, match="another process is training in this folder"),
    ):
        run_rl(config_in(tmp_path / "run", start))


def test_sampling_is_checked_before_anything_is_read(start, tmp_path):
    sampling = dataclasses.replace(SMALL.sampling, top_p=0.0)
    with pytest.raises(UserError, match="^sampling: .*top_p"):
        run_rl(config_in(tmp_path / "run", start, sampling=sampling, problems=("nowhere.jsonl",)))


def test_the_start_is_not_changed_by_training(start, uninterrupted):
    fresh = qwen3.init_params(PRESETS[ModelConfig().source], 0)
    jax.tree.map(np.testing.assert_array_equal, load_run(start).params, fresh)


def test_a_step_logs_whether_it_can_be_trusted_and_keeps_whole_rollouts(uninterrupted):
    folder, _ = uninterrupted
    for row in read_metrics(folder / "metrics.jsonl"):
        for name in (
            "logprob_abs_diff_mean", "logprob_abs_diff_max", "logprob_correlation", "kl_start",
            "entropy", "grad_norm", "reward/accuracy", "acceleration_ratio", "critical_path",
            "activation_ratio", "format_valid_rate", "blocks_per_rollout", "finish/length",
            "total_tokens/p90", "rollout_tokens_per_s", "update_tokens_per_s", "time/rollout_s",
            "time/update_s",
        ):  # fmt: skip
            assert np.isfinite(row[name]), name
        kinds = [name for name in row if name.startswith("entropy/")]
        assert "entropy/sequential" in kinds
        assert all(0 <= row[name] <= np.log(512) for name in kinds)
        assert row["logprob_correlation"] > 0.999
        assert abs(row["kl_start"]) < 1e-6 if row["step"] == 1 else row["kl_start"] > 0
    samples = list(read_samples(folder / "rollouts.jsonl"))
    assert [(s["step"], s["problem"], s["member"]) for s in samples] == [
        (step, p, 0) for step in (1, 2, 3) for p in range(2)
    ]
    tags = ("<Parallel>", "<Outline>", "<Thread>", "</Thread>")
    assert any(tag in s["response"] for s in samples for tag in tags)
    assert view_run(RunViewConfig(run_dir=str(folder))).stat().st_size > 10_000
