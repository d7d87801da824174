"""The report of a run, as a page (`tw_jax.view.page`)."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tw_jax.data.whole_file import whole_file
from tw_jax.errors import UserError
from tw_jax.evals.sample import printable
from tw_jax.evals.sample import sample_from_rollout as sample_from_rollout
from tw_jax.view import charts
from tw_jax.view.histogram import Mark, histogram
from tw_jax.view.numbers import interval_of, lookup, number, percent, times, value_of
from tw_jax.view.page import drawn_sample, render_page
from tw_jax.view.story import before_after_rows, headline_tiles, run_facts
from tw_jax.view.svg import Labels
from tw_jax.view.verdict import rl_verdict

_JSON_NAMES = {str: "string", list: "array", dict: "object"}

# Plotted policies: label, keys of the summary of which the first that is there counts, colour
# class, marker. With RL, all four are the model that RL improves, measured in the same way.
_POLICIES = (
    ("sequential", ("rl.before_sequential", "sft.sequential"), "c-sequential", "square"),
    ("parallel", ("rl.before_parallel", "sft.parallel"), "c-parallel", "circle"),
    ("free, before RL", ("rl.before",), "c-before", "ring"),
    ("free, after RL", ("rl.after",), "c-after", "diamond"),
)


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything that a report shows, as plain JSON; any part may be missing or empty.

    Attributes:
      title: name of the run.
      summary: the run's `summary.json`. Keys that are shown, where a "style summary" is
        `StyleSummary.to_json()`: `sft.sequential`, `sft.parallel` (style summaries of the forced
        styles), `sft.token_latency_speedup`, `sft.token_latency_speedup_details.interval`,
        `rl.before`, `rl.after` (style summaries of the free style), `rl.before_sequential`,
        `rl.before_parallel`, `rl.after_sequential`, `rl.after_parallel` (of the forced styles),
        `rl.start_step` (SFT step that RL starts from), `wall_clock_speedup`,
        `wall_clock.sequential.tokens_per_second`, `wall_clock.parallel.tokens_per_second`,
        `minutes`, `seed`, `logprob_max_abs_diff`.
      curves: `{"sft": [...], "rl": [...]}`, each a list of rows in ascending "step". Read from
        SFT rows: "loss", "heldout_loss" (nats per token), "tokens_per_s"; from RL rows: "reward",
        "accuracy", "activation_ratio", "critical_path" (tokens). A row may lack any of them; null
        is a value that was not finite. The lines of `metrics.jsonl` are such rows.
      points: policies of the accuracy-latency plot; see `points_from_summary`.
      speedups: per-problem ratio of sequential to parallel critical path.
      samples: results of `tw_jax.evals.sample.sample_from_rollout`.
      config_yaml: the run's configuration as text.
    """

    title: str
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    points: Sequence[Mapping[str, Any]] = ()
    speedups: Sequence[float] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    config_yaml: str = ""

    def to_json(self) -> dict[str, Any]:
        """The data as a JSON object, for `report.json`."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_json(cls, fields: Any, origin: str = "report data") -> "ReportData":
        """Reads what `to_json` wrote.

        Raises:
          UserError: not an object, an unknown key, or no title; the message names `origin`.
        """
        if not isinstance(fields, Mapping):
            raise UserError(f"{origin}: must hold a JSON object, not {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown or "title" not in fields:
            problem = f"unknown key {unknown[0]!r}" if unknown else "the key 'title' is missing"
            raise UserError(f"{origin}: {problem}; known keys: {', '.join(sorted(known))}")
        for name, value in fields.items():
            wanted = str if name in ("title", "config_yaml") else list
            wanted = dict if name in ("summary", "curves") else wanted
            if not isinstance(value, wanted):
                raise UserError(
                    f"{origin}: {name!r} must be a JSON {_JSON_NAMES[wanted]}, "
                    f"not {type(value).__name__}"
                )
        return cls(**fields)


def points_from_summary(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The policies of the accuracy-latency plot that a summary holds.

    Returns:
      For each of sequential, parallel (style forced; of the model that RL starts from, else after
      SFT), free before and after RL: {"label", "color", "shape", "accuracy", "accuracy_interval",
      "critical_path", "critical_path_interval"}; intervals are (low, high) or None. "color" is a
      class of the report's style sheet, "shape" one of "square", "circle", "ring", "diamond".
    """
    points = []
    for label, paths, color, shape in _POLICIES:
        path = next((path for path in paths if lookup(summary, path)), paths[-1])
        accuracy = value_of(summary, f"{path}.accuracy")
        critical_path = value_of(summary, f"{path}.critical_path")
        if accuracy is not None and critical_path is not None:
            points.append(
                {
                    "label": label,
                    "color": color,
                    "shape": shape,
                    "accuracy": accuracy,
                    "accuracy_interval": interval_of(summary, f"{path}.accuracy_interval"),
                    "critical_path": critical_path,
                    "critical_path_interval": interval_of(
                        summary, f"{path}.critical_path_interval"
                    ),
                }
            )
    return points


def render_report(data: ReportData) -> str:
    """The report as one HTML page."""
    rl = data.summary.get("rl") or {}
    return render_page(
        "report.html.jinja",
        title=data.title,
        tiles=headline_tiles(data.summary),
        facts=run_facts(data.summary),
        rows=before_after_rows(rl),
        rl_start_step=value_of(rl, "start_step"),
        verdict=rl_verdict(rl),
        plots=[plot for plot in (_accuracy_latency(data), _speedups(data)) if plot],
        curves=_curves(data.curves),
        samples=[drawn_sample(sample, i) for i, sample in enumerate(data.samples)],
        config_yaml=data.config_yaml,
    )


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Writes the page; a reader never sees half of it."""
    with whole_file(path) as out:
        out.write(render_report(data))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart and the words around it."""

    title: str
    svg: str
    caption: str
    eyebrow: str = ""


def _accuracy_latency(data: ReportData) -> Figure | None:
    if not data.points:
        return None
    points = [
        charts.Point(
            label=printable(p["label"]),
            css=p["color"],
            shape=p["shape"],
            x=p["critical_path"],
            y=p["accuracy"],
            x_interval=p["critical_path_interval"],
            y_interval=p["accuracy_interval"],
        )
        for p in data.points
    ]
    position = {point.label: i for i, point in enumerate(points)}
    before, after = position.get("free, before RL"), position.get("free, after RL")
    labels = Labels(
        key="accuracy-latency",
        title="Accuracy against critical path",
        description="; ".join(
            f"{p.label}: {percent(p.y)} at {number(round(p.x, 1))} tokens" for p in points
        ),
        x="critical path (tokens, mean)",
        y="accuracy",
    )
    arrow = None if before is None or after is None else (before, after)
    caption = "Up and to the left is better. Bars are 95% bootstrap intervals over problems."
    if before is not None:
        caption += " Sequential and parallel: the model before RL with its style forced."
    return Figure(labels.title, charts.scatter_chart(labels, points, arrow), caption)


def _speedups(data: ReportData) -> Figure | None:
    if not data.speedups:
        return None
    mean = sum(data.speedups) / len(data.speedups)
    labels = Labels(
        key="speedups",
        title="Token-latency speedup per problem",
        description=f"Histogram of {len(data.speedups)} problems, mean {mean:.2f}.",
        x="critical path, sequential / parallel",
        y="problems",
    )
    caption = (
        f"How many times shorter the chain of dependent tokens is, on each of "
        f"{len(data.speedups):,} held-out problems."
    )
    marks = (Mark(1.0, "no gain", "rule faint"), Mark(mean, f"mean {times(mean)}"))
    chart = histogram(labels, data.speedups, marks, tick=times, low=0.95)
    return Figure(labels.title, chart, caption)


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Figure]:
    """SFT loss and throughput, then RL's reward, accuracy, activation and critical path."""
    plans = (
        ("sft", "SFT", "Loss", "nats per token", (("training", "loss", "c-parallel"),
                                                   ("held out", "heldout_loss", "c-sequential"))),
        ("sft", "SFT", "Throughput", "training tokens per second",
         (("throughput", "tokens_per_s", "c-parallel"),)),
        ("rl", "RL", "Reward", "mean reward per rollout", (("reward", "reward", "c-after"),)),
        ("rl", "RL", "Accuracy", "share of rollouts correct",
         (("accuracy", "accuracy", "c-after"),)),
        ("rl", "RL", "Activation ratio", "share of rollouts with a parallel block",
         (("activation ratio", "activation_ratio", "c-after"),)),
        ("rl", "RL", "Critical path", "tokens, mean",
         (("critical path", "critical_path", "c-after"),)),
    )  # fmt: skip
    figures = []
    for stage, eyebrow, title, unit, lines in plans:
        rows = curves.get(stage, ())
        # A row without the key did not measure it; null is a measurement that was not finite.
        measured = [(line, [row for row in rows if line[1] in row]) for line in lines]
        series = [
            charts.Series(
                name=name,
                css=css,
                x=[float(row["step"]) for row in found],
                y=[row[key] for row in found],
                smooth=key != "heldout_loss",
            )
            for (name, key, css), found in measured
            if found
        ]
        if not series:
            continue
        axis = "share" if "share of" in unit else "log" if title == "Loss" else "linear"
        write = percent if axis == "share" else number
        labels = Labels(
            key=f"{stage}-{lines[0][1].replace('_', '-')}",
            title=f"{eyebrow}: {title.lower()} by step",
            description=charts.ends(series, write),
            x="step",
            y=unit,
        )
        chart = charts.line_chart(labels, series, tick=write, axis=axis)
        figures.append(Figure(title, chart, "", eyebrow))
    return figures
