"""The whole demonstration, rehearsed in small, with the files and keys that users rely on."""

import json

import pytest

from tw_jax.config import load_config
from tw_jax.quickstart import QuickstartConfig, run_quickstart

SMALL = [
    "sft.steps=60",
    "sft.eval_every=30",
    "sft.data.row_len=512",
    "rl_start.from_step=20",
    "rl_start.every=20",
    "rl_start.problems=4",
    "rl_start.accuracy=0.0",
    "rl_start.min_activation_ratio=0.0",
    "rl_start.max_activation_ratio=1.0",
    "rl.steps=2",
    "rl.prompts=2",
    "rl.group_size=2",
    "rl.row_len=1024",
    "rl.optimizer.warmup_steps=1",
    "rl.engine.rows=8",
    "rl.engine.requests=4",
    "measure.greedy_problems=6",
    "measure.sampled_problems=6",
    "measure.wall_clock_problems=1",
    "measure.wall_clock_repeats=1",
]


def at(summary, path):
    for key in path.split("."):
        summary = summary[key]
    return summary


@pytest.mark.slow
def test_quickstart_writes_summary_and_report_and_resumes(tmp_path):
    config = load_config(
        QuickstartConfig, "configs/quickstart.yaml", [*SMALL, f"run_dir={tmp_path}"]
    )
    run_quickstart(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for path in (
        "sft.sequential.accuracy",
        "sft.parallel.accuracy",
        "sft.token_latency_speedup",
        "rl.before.activation_ratio",
        "rl.after.activation_ratio",
        "rl.critical_path_change",
        "rl.accuracy_change",
        "rl.after.format_valid_rate",
        "rl.after_sequential.accuracy",
        "rl.after_parallel.accuracy",
        "minutes",
        "logprob_max_abs_diff",
        "wall_clock_speedup",
        "seed",
    ):
        assert isinstance(at(summary, path), (int, float)), path
    assert summary["logprob_max_abs_diff"] <= 1e-4
    assert summary["rl"]["start_step"] == 20
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    # A second call trains nothing more and measures the same.
    again = run_quickstart(config)
    assert again["sft"] == summary["sft"]
    assert again["rl"]["after"] == summary["rl"]["after"]
    assert again["minutes"] > summary["minutes"]
