"""A made-up run with realistic numbers, and rollouts written by the tasks instead of a model."""

import math
import random

from tests.evals.written_rollouts import written_rollout
from tw_jax.evals.metrics import RolloutRecord, summarize
from tw_jax.evals.sample import sample_from_rollout
from tw_jax.tasks.character_tokenizer import build_tokenizer
from tw_jax.tasks.multiplication import Multiplication, MultiplicationConfig
from tw_jax.tasks.sum_of_products import SumOfProducts, SumOfProductsConfig
from tw_jax.trajectory.schemas import make_schema
from tw_jax.view.report import ReportData, points_from_summary


def records(style, n, accuracy, activation, lengths, seed, samples=2) -> list[RolloutRecord]:
    """Records with the given mean accuracy and share of parallel rollouts."""
    draw = random.Random(seed)
    out = []
    for i in range(n * samples):
        parallel = draw.random() < activation
        critical = draw.gauss(lengths[parallel][0], 4)
        correct = draw.random() < accuracy[parallel]
        total = lengths[parallel][1] if parallel else critical
        out.append(
            RolloutRecord(
                problem=i // samples,
                style=style,
                answer="right" if correct else f"wrong {i}",
                correct=correct,
                total_tokens=int(max(total, critical)),
                critical_path=int(critical),
                acceleration_ratio=1 - critical / max(total, critical),
                has_block=parallel,
                format_valid=draw.random() < 0.99,
                finish_reason="eos",
            )
        )
    return out


def fake_summary() -> dict:
    """A `summary.json`."""
    lengths = {False: (161.0, 161.0), True: (118.0, 187.0)}

    def summary(style, accuracy, activation, seed):
        return summarize(records(style, 128, accuracy, activation, lengths, seed)).to_json()

    return {
        "sft": {
            "sequential": summary("sequential", (0.62, 0.62), 0.0, 1),
            "parallel": summary("parallel", (0.86, 0.86), 1.0, 2),
            "token_latency_speedup": 1.372,
            "token_latency_speedup_details": {"interval": [1.36, 1.39], "max": 1.51},
        },
        "rl": {
            "start_step": 925,
            "before": summary("free", (0.41, 0.68), 0.5, 3),
            "after": summary("free", (0.43, 0.72), 0.95, 4),
            "before_sequential": summary("sequential", (0.41, 0.41), 0.0, 5),
            "before_parallel": summary("parallel", (0.68, 0.68), 1.0, 6),
            "after_sequential": summary("sequential", (0.43, 0.43), 0.0, 7),
            "after_parallel": summary("parallel", (0.72, 0.72), 1.0, 8),
        },
        "wall_clock_speedup": 0.87,
        "wall_clock": {
            "sequential": {"tokens_per_second": 11_200.0},
            "parallel": {"tokens_per_second": 10_900.0},
        },
        "minutes": 11.4,
        "logprob_max_abs_diff": 3.1e-6,
        "seed": 0,
    }


def fake_curves() -> dict:
    """Learning curves with noise, and a held-out loss every 100 steps."""
    draw = random.Random(0)
    sft = []
    for step in range(0, 1500, 5):
        loss = 0.004 + 4.6 * math.exp(-step / 110) + 1.5 / (1 + math.exp((step - 480) / 45))
        row = {"step": step, "loss": loss * draw.uniform(0.85, 1.18)}
        row["tokens_per_s"] = 17_500 * draw.uniform(0.9, 1.05) if step else 900.0
        sft.append(row)
        if step % 100 == 0:
            sft.append({"step": step, "heldout_loss": loss * 1.04})
    rl = []
    for step in range(60):
        shift = 1 / (1 + math.exp(-(step - 14) / 6))
        accuracy = min(1.0, 0.46 + 0.25 * shift + draw.gauss(0, 0.04))
        rl.append(
            {
                "step": step,
                "accuracy": accuracy,
                "reward": accuracy * (1 + 0.17 * shift),
                "activation_ratio": min(1.0, 0.5 + 0.46 * shift + draw.gauss(0, 0.03)),
                "critical_path": 140 - 20 * shift + draw.gauss(0, 1.5),
            }
        )
    return {"sft": sft, "rl": rl}


def fake_samples() -> list[dict]:
    """Three solutions: parallel with three threads, sequential, parallel with four threads."""
    tokenizer = build_tokenizer()
    schema = make_schema("threadweaver", tokenizer)
    mult = Multiplication(MultiplicationConfig(digits=3))
    sums = SumOfProducts(SumOfProductsConfig(min_products=4, max_products=4))
    wanted = [(mult, "parallel", "free"), (mult, "sequential", "sequential")]
    out = []
    for task, written, style in [*wanted, (sums, "parallel", "parallel")]:
        problem = task.problem("heldout", 7, 0)
        rollout = written_rollout(problem.prompt, problem.response(written), tokenizer, schema)
        out.append(
            sample_from_rollout(
                rollout, tokenizer, style=style, answer=problem.answer, correct=style != "free"
            )
        )
    return out


def fake_report() -> ReportData:
    """Everything that a quickstart writes."""
    draw = random.Random(9)
    summary = fake_summary()
    return ReportData(
        title="quickstart",
        summary=summary,
        curves=fake_curves(),
        points=points_from_summary(summary),
        speedups=[draw.gauss(1.37, 0.05) for _ in range(128)],
        samples=fake_samples(),
        config_yaml="model:\n  source: tiny\nsft:\n  steps: 1500\n  learning_rate: 0.003\n",
    )
