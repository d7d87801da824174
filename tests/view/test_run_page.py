"""The page of a run: everything that was logged, safe with hostile text, clear when it cannot."""

import json
import re
import shutil
import subprocess

import pytest

from tests.evals.written_rollouts import written_rollout
from tests.train.test_rl_metrics import FACTS, PARALLEL, REWARDS, ROLLOUTS, some_logprobs, sums_of
from tests.view.test_report import HOSTILE, Tags
from tests.view.test_report_in_browser import BROWSER, QUIET
from tw_jax import cli
from tw_jax.errors import UserError
from tw_jax.tasks.character_tokenizer import build_tokenizer
from tw_jax.train.jsonl_tracker import JsonlTracker
from tw_jax.train.rl_metrics import step_metrics, time_metrics
from tw_jax.train.rollout_samples import Judged, RolloutSamples, RolloutSamplesConfig
from tw_jax.trajectory.schemas import make_schema
from tw_jax.view.run_curves import sections
from tw_jax.view.run_page import RunViewConfig, view_run

TOKENIZER = build_tokenizer()
SCHEMA = make_schema("threadweaver", TOKENIZER)


def write_run(folder, steps=12, prompt="1+1=", answer="7", metric="mine/first"):
    """What `tw-jax rl` leaves in a run's folder, as far as the page reads it."""
    folder.mkdir(exist_ok=True)
    TOKENIZER.save_pretrained(folder / "tokenizer")
    (folder / "config.yaml").write_text("steps: 12\nlearning_rate: 0.003\n")
    rollout = written_rollout(prompt, PARALLEL, TOKENIZER, SCHEMA)
    judged = [Judged(1.19, {"accuracy": 1.0, "acceleration": 0.19}, 0.25, answer, True, False)]
    tracker = JsonlTracker(folder / "metrics.jsonl")
    entropy = {"entropy/outline": 1.0, "tokens/outline": 4.0, "entropy/tags": 1.0}
    with RolloutSamples(folder / "rollouts.jsonl", TOKENIZER) as samples:
        for step in range(1, steps + 1):
            sums = sums_of(
                *some_logprobs(step, 30), kl_start=0.1 * step, grad_norm=1.0,
                clipped_tokens=3.0, **entropy, **{"tokens/tags": 5.0},
            )  # fmt: skip
            seconds = {"rollout": 1.0 + 30.0 * (step == 1), "update": 2.0}
            metrics = step_metrics(ROLLOUTS, FACTS, REWARDS, sums)
            metrics |= time_metrics(
                seconds, sampled_tokens=90, sampling_s=seconds["rollout"], update_tokens=80.0
            )
            metrics |= {"reward/accuracy": 0.5, "reward/acceleration": 0.1, metric: step / 2}
            tracker.log(step, metrics)
            samples.write_step(RolloutSamplesConfig(every=3), step, [rollout], judged, 1)
    tracker.close()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture(scope="module")
def page(run) -> str:
    return view_run(RunViewConfig(run_dir=str(run))).read_text(encoding="utf-8")


def test_everything_is_there(page):
    for words in (
        "From beginning to end", "Reward terms", "Time split", "How rollouts end", "thread stop",
        "Entropy", "KL", "Gradient norm", "Sampler and trainer apart", "Clipped tokens",
        "Everything else that was logged", "Sampled rollouts", "long body",
        "accuracy 1 + acceleration 0.19", "+0.250", "format breaks", "learning_rate: 0.003",
        "&lt;Parallel&gt;\n&lt;Outlines&gt;", "Step 12", "Rollout timeline",
    ):  # fmt: skip
        assert words in page, words


def test_it_is_one_file_without_requests_or_scripts(page):
    assert not re.search(r"https?:|@import|url\(", page)
    found = Tags(page).found
    assert not {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in found}
    assert any("default-src 'none'" in (a.get("content") or "") for _, a in found)
    ids = [a["id"] for _, a in found if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {i for _, a in found for i in (a.get("aria-labelledby") or "").split()}
    assert wanted <= set(ids)


def test_text_of_models_and_names_of_metrics_are_escaped(tmp_path):
    run = write_run(tmp_path / "hostile", 3, prompt="<script>x", answer=HOSTILE, metric=HOSTILE)
    page = view_run(RunViewConfig(run_dir=str(run))).read_text(encoding="utf-8")
    assert not {"script", "img"} & {tag for tag, _ in Tags(page).found}
    assert "&lt;script&gt;x" in page
    assert "\x1b" not in page and "\u202e" not in page
    assert "{{ 7*7 }}" in page


def test_steps_may_be_chosen(run, tmp_path):
    out = tmp_path / "page.html"
    view_run(RunViewConfig(run_dir=str(run), steps=(6, 9), rollouts=1, output=str(out)))
    assert re.findall(r"<summary>Step (\d+)", out.read_text(encoding="utf-8")) == ["6", "9"]
    with pytest.raises(UserError, match=r"no rollouts of step 7, but of 1, 3, 6, 9, 12"):
        view_run(RunViewConfig(run_dir=str(run), steps=(6, 7)))


def test_a_fine_tuning_run_has_curves_without_rollouts(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for step in range(10):
        tracker.log(step, {"loss": 1.0 / (step + 1), "tokens_per_s": 100.0})
        tracker.log(step, {"heldout_loss": float("nan") if step else 1.0})
        tracker.log_text(step, "sample", "a text is no metric")
    page = view_run(RunViewConfig(run_dir=str(tmp_path))).read_text(encoding="utf-8")
    assert "Held-out loss" in page and "Sampled rollouts" not in page
    Tags(page)
    with pytest.raises(UserError, match="only runs of `tw-jax rl` keep rollouts"):
        view_run(RunViewConfig(run_dir=str(tmp_path), steps=(1,)))


def test_a_folder_without_metrics_is_one_clear_message(tmp_path):
    with pytest.raises(UserError, match=r"cannot read metrics from .*metrics\.jsonl"):
        view_run(RunViewConfig(run_dir=str(tmp_path)))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no metrics yet"):
        view_run(RunViewConfig(run_dir=str(tmp_path)))


def test_rollouts_that_cannot_be_read_are_named(run, tmp_path):
    broken = write_run(tmp_path / "broken", 1)
    line = json.loads((broken / "rollouts.jsonl").read_text())
    del line["rollout"]["units"]
    (broken / "rollouts.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"rollouts\.jsonl: a rollout of step 1 cannot be read"):
        view_run(RunViewConfig(run_dir=str(broken)))


def test_the_page_never_takes_the_place_of_what_is_read(run):
    with pytest.raises(UserError, match="output=.*is what is read as well"):
        view_run(RunViewConfig(run_dir=str(run), output=str(run / "rollouts.jsonl")))


def test_every_metric_is_in_exactly_one_place():
    rows = [{"step": s, "reward": 1.0, "unheard/a": 1.0, "unheard/b": 2.0, "x": s} for s in (1, 2)]
    found = sections(rows)
    assert [section.title for section in found] == ["Reward", "Everything else that was logged"]
    others = found[-1].figures
    assert [figure.title for figure in others] == ["Unheard", "X"]
    assert [name for name, _ in others[0].key] == ["a", "b"]


def test_a_step_that_compiled_does_not_flatten_the_time_split(page, run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["time/step_s"] == 33.0
    times = next(section for section in sections(rows) if section.title == "Time")
    split = times.figures[0]
    assert split.title == "Time split"
    assert not re.search(r">(20|30|40)<", split.svg), "its axis would reach the first step"


def test_both_verbs_of_view_are_found(run, tmp_path, capsys):
    assert cli.main(["view", "run", str(run), f"output={tmp_path / 'run.html'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run.html")
    assert cli.main(["view", str(tmp_path)]) == cli.USER_ERROR_STATUS
    assert "report.json" in capsys.readouterr().err, "still the report of a quickstart"
    for words in (["view", "--help"], ["view", "run", "--help"]):
        assert cli.main(words) == 0
        assert "usage: tw-jax " + " ".join(words[:-1]) + " [" in capsys.readouterr().out


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_a_browser_opens_it_without_a_complaint(page, run, tmp_path):
    command = [str(BROWSER), *QUIET, f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run(
        [*command, (run / "run.html").resolve().as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "</footer>" in done.stdout
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    shutil.rmtree(tmp_path, ignore_errors=True)
