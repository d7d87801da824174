"""Evaluation on problem files: every problem asked in every style, graded like in training."""

import json

import pytest

from tw_jax.errors import UserError
from tw_jax.evals.evaluate import EvalConfig, run_eval
from tw_jax.rewards.graders import GradingConfig
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import SamplingParams
from tw_jax.train.run_dir import save_model


@pytest.fixture(scope="module")
def checkpoint(small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "model"
    save_model(folder, small_model, small_model.params)
    return folder


def config(checkpoint, tmp_path, records, **changes):
    source = tmp_path / "problems.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "styles": ("sequential", "free"),
        "samples_per_problem": 2,
        "sampling": SamplingParams(max_response_tokens=8),
        "engine": EngineConfig(context_len=64, rows=4, requests=4),
        "output": str(tmp_path / "eval.json"),
    }
    return EvalConfig(checkpoint=str(checkpoint), problems=(str(source),), **settings | changes)


def test_all_problems_are_asked_and_graded(checkpoint, tmp_path):
    grader = tmp_path / "g.py"
    grader.write_text(
        "def grade(answer, reference):\n"
        "  if reference == 'raise': raise ValueError(reference)\n"
        "  return reference == 'yes'\n"
    )
    records = [{"prompt": f"{i}?", "answer": a} for i, a in enumerate(["yes", "no", "raise"])]
    grading = GradingConfig("python", workers=1, file=grader)
    results = run_eval(config(checkpoint, tmp_path, records, grading=grading))
    assert results == json.loads((tmp_path / "eval.json").read_text())
    assert results["ungraded"] == {"grading_raised": 4}
    for style in ("sequential", "free"):
        found = results["records"][style]
        assert [r["problem"] for r in found] == [0, 0, 1, 1, 2, 2]
        assert [r["correct"] for r in found] == [True] * 2 + [False] * 4
        assert results["summaries"][style]["accuracy"] == pytest.approx(1 / 3)
    assert results["token_latency_speedup"] is not None


def test_what_cannot_be_measured_on_files_is_refused(checkpoint, tmp_path):
    records = [{"prompt": "1?", "answer": "1"}]
    with pytest.raises(ValueError, match="styles=parallel"):
        config(checkpoint, tmp_path, records, styles=("parallel",))
    with pytest.raises(ValueError, match="wall_clock_problems"):
        config(checkpoint, tmp_path, records, wall_clock_problems=1)
    with pytest.raises(UserError, match=r"problems\.jsonl: no usable problem"):
        run_eval(config(checkpoint, tmp_path, [{"prompt": "1?"}]))
