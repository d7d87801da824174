"""What an RL step logs: sums divided once, shares that add up, quantiles, times."""

import numpy as np
import pytest

from tests.evals.written_rollouts import written_rollout
from tw_jax.rewards.facts import RolloutFacts
from tw_jax.tasks.character_tokenizer import build_tokenizer
from tw_jax.train.rl_metrics import (
    finish_metrics,
    merge_sums,
    sampled_tokens,
    step_metrics,
    time_metrics,
    update_metrics,
)
from tw_jax.train.step_times import StepTimes
from tw_jax.trajectory.schemas import make_schema

TOKENIZER = build_tokenizer()
SCHEMA = make_schema("threadweaver", TOKENIZER)
PARALLEL = (
    "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
    "<Thread>\n1: long body\n</Thread><Thread>\n2: b\n</Thread>\n</Parallel>7"
)
ROLLOUTS = [
    written_rollout("1+1=", text, TOKENIZER, SCHEMA) for text in ("2", "two", PARALLEL, PARALLEL)
]
CORRECT, VALID = (True, False, True, False), (True, True, True, False)
FACTS = [
    RolloutFacts(correct, valid, r.total_tokens, r.critical_path)
    for correct, valid, r in zip(CORRECT, VALID, ROLLOUTS, strict=True)
]
REWARDS = np.array([[1.0, 0.0], [0.5, 0.5]])


def sums_of(trainer: np.ndarray, sampler: np.ndarray, **more: float) -> dict[str, float]:
    """What an update over these log-probabilities hands over."""
    apart = np.abs(trainer - sampler)
    return {
        "tokens": float(len(trainer)),
        "weight": 2.0,
        "loss": 3.0,
        "nll": -float(trainer.sum()),
        "logprob_sq": float((trainer**2).sum()),
        "sampler_logprob": float(sampler.sum()),
        "sampler_logprob_sq": float((sampler**2).sum()),
        "logprob_product": float((trainer * sampler).sum()),
        "logprob_abs_diff": float(apart.sum()),
        "max_logprob_abs_diff": float(apart.max()),
        **more,
    }


def some_logprobs(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    trainer = -rng.exponential(2.0, count)
    return trainer, trainer + rng.normal(0, 0.3, count)


def test_updates_of_a_step_give_what_one_update_over_all_tokens_gives():
    (a, x), (b, y) = some_logprobs(0, 40), some_logprobs(1, 7)
    apart = merge_sums(merge_sums({}, sums_of(a, x)), sums_of(b, y))
    whole = merge_sums({}, sums_of(np.concatenate([a, b]), np.concatenate([x, y])))
    got, wanted = update_metrics(apart), update_metrics(whole)
    for name in set(wanted) - {"loss"}:
        assert got[name] == pytest.approx(wanted[name]), name
    assert got["loss"] == pytest.approx(6.0 / 4.0)
    both = np.concatenate([a, b]), np.concatenate([x, y])
    assert got["logprob_correlation"] == pytest.approx(np.corrcoef(*both)[0, 1])
    assert got["logprob_abs_diff_mean"] == pytest.approx(np.abs(both[0] - both[1]).mean())
    assert got["logprob_abs_diff_max"] == pytest.approx(np.abs(both[0] - both[1]).max())


def test_the_gradient_norm_is_a_mean_over_updates_not_a_sum():
    a, x = some_logprobs(0, 5)
    sums = merge_sums({}, sums_of(a, x, grad_norm=1.0))
    sums = merge_sums(sums, sums_of(a, x, grad_norm=3.0))
    assert update_metrics(sums)["grad_norm"] == 2.0


def test_a_correlation_of_constants_is_one_and_never_leaves_its_range():
    flat = np.full(9, -0.25)
    assert update_metrics(merge_sums({}, sums_of(flat, flat)))["logprob_correlation"] == 1.0
    a, _ = some_logprobs(2, 1000)
    sums = {k: float(np.float32(v)) for k, v in sums_of(a, a).items()}
    assert -1 <= update_metrics(sums)["logprob_correlation"] <= 1
    opposite = update_metrics(merge_sums({}, sums_of(a, -5 - a)))["logprob_correlation"]
    assert opposite == pytest.approx(-1)


def test_sums_that_are_missing_leave_their_metrics_out():
    basic = {"tokens": 4.0, "weight": 4.0, "loss": 1.0, "nll": 2.0, "logprob_abs_diff": 0.4}
    assert set(update_metrics(basic | {"max_logprob_abs_diff": 0.3})) == {
        "loss", "nll", "update_tokens", "logprob_abs_diff_mean", "logprob_abs_diff_max",
    }  # fmt: skip


def test_sums_per_token_are_divided_by_tokens():
    a, x = some_logprobs(3, 8)
    sums = sums_of(a, x, kl_start=4.0, clipped_tokens=2.0, clipped_low=2.0, clipped_high=0.0)
    metrics = update_metrics(sums)
    assert metrics["kl_start"] == 0.5
    assert metrics["clip_fraction"] == metrics["clip_fraction/low"] == 0.25
    assert metrics["clip_fraction/high"] == 0.0


def test_entropy_is_split_by_kind_and_weighted_by_tokens():
    a, x = some_logprobs(4, 10)
    parts = {"entropy/outline": 2.0, "tokens/outline": 1.0, "entropy/thread": 0.0}
    parts |= {"tokens/thread": 0.0, "entropy/sequential": 3.0, "tokens/sequential": 6.0}
    parts |= {"entropy/tags": 1.0, "tokens/tags": 3.0}
    metrics = update_metrics(sums_of(a, x, **parts))
    assert metrics["entropy/outline"] == 2.0
    assert metrics["entropy/sequential"] == 0.5
    assert "entropy/thread" not in metrics, "no such token was sampled"
    assert metrics["entropy"] == pytest.approx(6 / 10)


def test_an_update_without_tokens_has_no_nan():
    empty = {name: 0.0 for name in sums_of(*some_logprobs(5, 3))}
    assert all(np.isfinite(value) for value in update_metrics(empty).values())


def test_a_step_describes_its_rollouts():
    metrics = step_metrics(ROLLOUTS, FACTS, REWARDS, sums_of(*some_logprobs(6, 9)))
    totals = [r.total_tokens for r in ROLLOUTS]
    assert metrics["accuracy"] == 0.5 and metrics["format_valid_rate"] == 0.75
    assert metrics["activation_ratio"] == 0.5 and metrics["blocks_per_rollout"] == 0.5
    assert metrics["threads_per_block"] == metrics["threads_per_block/max"] == 2.0
    assert metrics["total_tokens"] == np.mean(totals)
    assert metrics["total_tokens/p50"] == np.median(totals)
    assert metrics["total_tokens/max"] == max(totals)
    assert metrics["critical_path/max"] < metrics["total_tokens/max"]
    assert metrics["acceleration_ratio"] == pytest.approx(
        np.mean([1 - r.critical_path / r.total_tokens for r in ROLLOUTS])
    )
    assert (metrics["reward_min"], metrics["reward"], metrics["reward_max"]) == (0.0, 0.5, 1.0)
    assert metrics["reward_std_in_group"] == 0.25
    assert metrics["groups_without_variance"] == 0.5


def test_a_step_without_blocks_has_no_widths_and_no_thread_ends():
    metrics = step_metrics(ROLLOUTS[:2], FACTS[:2], REWARDS[:1], sums_of(*some_logprobs(7, 4)))
    assert not [name for name in metrics if name.startswith(("threads_per", "thread_finish"))]
    assert metrics["activation_ratio"] == 0.0


def test_finish_reasons_are_shares_that_add_up():
    metrics = finish_metrics(ROLLOUTS)
    for prefix, wanted in (("finish/", "eos"), ("thread_finish/", "thread_stop")):
        shares = {k: v for k, v in metrics.items() if k.startswith(prefix)}
        assert sum(shares.values()) == pytest.approx(1)
        assert shares[prefix + wanted] == 1.0
        assert prefix + "length" in shares, "a curve has no gaps"


def test_times_split_a_step_and_give_tokens_per_second():
    ticks = iter([0.0, 2.0, 2.0, 3.0, 5.0, 5.5])
    times = StepTimes(clock=lambda: next(ticks))
    for part in ("rollout", "update"):
        with times.of(part):
            pass
    with pytest.raises(RuntimeError), times.of("rollout"):
        raise RuntimeError
    assert times.seconds == {"rollout": 2.5, "update": 1.0}
    metrics = time_metrics(times.seconds, sampled_tokens=50, sampling_s=5.0, update_tokens=30.0)
    assert metrics["time/step_s"] == 3.5
    assert metrics["rollout_tokens_per_s"] == 10.0 and metrics["update_tokens_per_s"] == 30.0
    assert metrics["time/rollout_s"] == 2.5


def test_sampled_tokens_leave_out_what_the_engine_wrote():
    count = sampled_tokens(ROLLOUTS)
    assert count < sum(r.total_tokens for r in ROLLOUTS)  # thread headers and joins are forced
    assert sampled_tokens(ROLLOUTS[:1]) == ROLLOUTS[0].total_tokens
