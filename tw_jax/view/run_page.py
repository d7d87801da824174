"""`tw-jax view run`: a run's metrics and sampled rollouts as a page (`tw_jax.view.page`)."""

import dataclasses
import pathlib
import webbrowser
from collections.abc import Mapping, Sequence
from typing import Any

from tw_jax.config_checks import require_at_least
from tw_jax.data.tokenizer import tokenizer_in
from tw_jax.data.whole_file import require_other_files, whole_file
from tw_jax.errors import UserError
from tw_jax.evals.sample import sample_from_rollout
from tw_jax.rollout.rollout_file import rollout_from_json
from tw_jax.train.jsonl_tracker import read_metrics
from tw_jax.train.rollout_samples import FILE_NAME, read_samples
from tw_jax.view.numbers import Formatter, duration, number, percent, signed
from tw_jax.view.page import drawn_sample, render_page
from tw_jax.view.run_curves import sections, usual_steps

_SHOWN_STEPS = 4  # where none are named

# Metrics of the table: name, key, how it is written.
_ROWS: tuple[tuple[str, str, Formatter], ...] = (
    ("Reward", "reward", number),
    ("Accuracy", "accuracy", percent),
    ("Activation ratio", "activation_ratio", percent),
    ("Format valid", "format_valid_rate", percent),
    ("Critical path, tokens", "critical_path", number),
    ("Total tokens", "total_tokens", number),
    ("Acceleration ratio", "acceleration_ratio", number),
    ("KL to the start, nats per token", "kl_start", number),
    ("Entropy, nats per token", "entropy", number),
    ("Largest sampler-trainer difference", "logprob_abs_diff_max", number),
    ("Gradient norm", "grad_norm", number),
    ("Loss", "loss", number),
    ("Held-out loss", "heldout_loss", number),
    ("Seconds per step", "time/step_s", number),
    ("Sampled tokens per second", "rollout_tokens_per_s", number),
    ("Trained tokens per second", "update_tokens_per_s", number),
    ("Tokens per second", "tokens_per_s", number),
)


@dataclasses.dataclass(frozen=True)
class RunViewConfig:
    """Which run to look at, and which of its rollouts.

    Attributes:
      run_dir: folder of a run of `tw-jax rl` or `tw-jax sft`; holds `metrics.jsonl`.
      steps: steps whose sampled rollouts are drawn; empty takes a few from the first to the last.
      rollouts: most rollouts that are drawn of a step.
      output: the page; null writes `run.html` into the run's folder.
      open_browser: also open the page in the web browser.
    """

    run_dir: str = "runs/rl"
    steps: tuple[int, ...] = ()
    rollouts: int = 2
    output: str | None = None
    open_browser: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, rollouts=0)


def view_run(config: RunViewConfig) -> pathlib.Path:
    """Writes the page and prints its path.

    Raises:
      UserError: the folder holds no metrics or none of the named steps, or cannot be read; the page
        cannot be written.
    """
    run_dir = pathlib.Path(config.run_dir)
    metrics, samples = run_dir / "metrics.jsonl", run_dir / FILE_NAME
    page = run_dir / "run.html" if config.output is None else pathlib.Path(config.output)
    require_other_files([str(metrics), str(samples)], output=page)
    rows = [row for row in read_metrics(metrics) if "text" not in row]
    if not rows:
        raise UserError(f"{metrics}: holds no metrics yet; wait for the run's first step")
    groups, sampled_steps = _sampled(config, run_dir, samples)
    content = render_page(
        "run.html.jinja",
        title=run_dir.resolve().name,
        facts=_facts(rows, sampled_steps),
        table=_table(rows),
        sections=sections(rows),
        groups=groups,
        sampled_steps=sampled_steps,
        config_yaml=_text_of(run_dir / "config.yaml"),
    )
    with whole_file(page) as out:
        out.write(content)
    print(page)
    if config.open_browser:
        webbrowser.open(page.resolve().as_uri())
    return page


def _facts(
    rows: Sequence[Mapping[str, Any]], sampled_steps: Sequence[int]
) -> list[tuple[str, str]]:
    facts = [("steps", f"{rows[0]['step']:,} to {rows[-1]['step']:,}")]
    if "time" in rows[0]:
        minutes = (rows[-1]["time"] - rows[0]["time"]) / 60
        facts.append(("from first to last", duration(minutes)))
    skipped = [row["skipped_updates"] for row in rows if "skipped_updates" in row]
    if skipped:
        facts.append(("skipped updates", number(skipped[-1])))
    if sampled_steps:
        facts.append(("steps with rollouts", number(len(sampled_steps))))
    return facts


def _table(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(name, mean of the first tenth, of the last tenth, change) of the main metrics."""
    found, usual = [], usual_steps(rows)
    for name, key, write in _ROWS:
        timed = key.startswith("time/") or key.endswith("tokens_per_s")
        values = [row[key] for row in (usual if timed else rows) if row.get(key) is not None]
        if not values:
            continue
        tenth = max(1, len(values) // 10)
        first, last = (sum(part) / tenth for part in (values[:tenth], values[-tenth:]))
        if write is percent:
            change = f"{signed(100 * (last - first), 1)} points"
        else:
            # A share of next to nothing, such as the KL to the start after one step, says nothing.
            told = 0 < first and last < 100 * first
            change = f"{signed(100 * (last / first - 1), 0)}%" if told else ""
        found.append((name, write(first), write(last), change))
    return found


def _sampled(
    config: RunViewConfig, run_dir: pathlib.Path, path: pathlib.Path
) -> tuple[list[dict[str, Any]], list[int]]:
    """Rollouts to draw, by step, and all steps that have some."""
    if not path.exists():
        if config.steps:
            raise UserError(
                f"{path}: there is no such file; only runs of `tw-jax rl` keep rollouts, where "
                "samples.rollouts is not 0"
            )
        return [], []
    steps = sorted({sample["step"] for sample in read_samples(path)})
    unknown = [step for step in config.steps if step not in steps]
    if unknown:
        raise UserError(
            f"steps={list(config.steps)}: {path} holds no rollouts of step {unknown[0]}, but of "
            f"{_some(steps)}; samples.every of the run says which are kept"
        )
    wanted = list(config.steps) or _spread(steps, _SHOWN_STEPS)
    tokenizer = tokenizer_in(run_dir / "tokenizer")
    by_step: dict[int, list[dict[str, Any]]] = {step: [] for step in wanted}
    for line in read_samples(path, wanted):
        drawn = by_step[line["step"]]
        if len(drawn) < config.rollouts:
            drawn.append(_drawn(line, tokenizer, path))
    count = 0
    groups = []
    for step, lines in by_step.items():
        samples = []
        for line in lines:
            samples.append({**line, "drawn": drawn_sample(line["drawn"], count)})
            count += 1
        groups.append({"step": step, "first": count - len(samples), "samples": samples})
    return groups, steps


def _drawn(line: Mapping[str, Any], tokenizer: Any, path: pathlib.Path) -> dict[str, Any]:
    """A line of the file with its drawing."""
    try:
        sample = sample_from_rollout(
            rollout_from_json(line["rollout"]),
            tokenizer,
            style="free",
            answer=line["answer"],
            correct=line["correct"],
        )
        place = f"problem {line['problem'] + 1}, rollout {line['member'] + 1}"
        terms = " + ".join(
            f"{name} {_signed_term(value)}" for name, value in line["terms"].items() if value
        )
        return {
            "drawn": sample | {"style": place},
            "reward": number(_rounded(line["reward"])),
            "terms": terms,
            "advantage": signed(_rounded(line["advantage"]), 3),
            "format_valid": bool(line["format_valid"]),
            "text": line["prompt"] + line["response"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: a rollout of step {line.get('step')} cannot be read ({type(error).__name__}: "
            f"{error}); it was written by another version, remove the line"
        ) from error


def _rounded(value: float | None) -> float:
    return float("nan") if value is None else round(value, 4)


def _signed_term(value: float | None) -> str:
    return "?" if value is None else number(round(value, 4))


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, from the first to the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _some(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:8]))
    return f"{shown}, ... {steps[-1]}" if len(steps) > 8 else shown


def _text_of(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
