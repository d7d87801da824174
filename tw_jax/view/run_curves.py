"""Which curves a run's page shows: metrics by topic, and all others behind them.

A figure is drawn of what a run has logged: metrics that it lacks leave their figure out, and
metrics that no plan names come last, those with a common beginning (`clip_fraction/low`, `/high`)
in one figure.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tw_jax.evals.sample import printable
from tw_jax.view import charts
from tw_jax.view.numbers import Formatter, number, percent
from tw_jax.view.stacked import stacked_chart
from tw_jax.view.svg import Labels

HUES = 8  # colour classes c-hue-0 .. of the style sheet
Kind = Literal["linear", "log", "share", "stack", "shares"]
Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One figure.

    Attributes:
      title: above it.
      unit: of the vertical axis.
      metrics: names, or patterns with a trailing "*" that stands for all with that beginning.
      kind: "share" is an axis from 0 to 1; "log" one that is logarithmic where values span a factor
        above 20; "stack" piles the metrics up; "shares" does, and they add up to 1.
      complement: 1 minus the metric is drawn, where that is what can be seen.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]
    kind: Kind = "linear"
    complement: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawn chart.

    Attributes:
      title: above it.
      svg: the chart.
      key: (name, colour class) of every line, where there are several.
    """

    title: str
    svg: str
    key: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """Figures under a heading.

    Attributes:
      title: the heading.
      note: one sentence on how to read them.
      figures: at least one.
    """

    title: str
    note: str
    figures: Sequence[Figure]


_TIME = "Time"
_SECTIONS: tuple[tuple[str, str, tuple[Plan, ...]], ...] = (
    (
        "Reward",
        "The reward is the sum of its terms; a group whose rewards are all equal teaches nothing.",
        (
            Plan("Reward", "mean over rollouts", ("reward", "reward_min", "reward_max")),
            Plan("Reward terms", "mean over rollouts", ("reward/*",)),
            Plan("Spread within groups", "standard deviation", ("reward_std_in_group",)),
            Plan("Groups without variance", "share of groups", ("groups_without_variance",),
                 "share"),
            Plan("Ungraded answers", "share of rollouts", ("ungraded", "ungraded/*"), "share"),
        ),
    ),
    (
        "Behaviour",
        "What the sampled rollouts look like.",
        (
            Plan("Accuracy", "share of rollouts", ("accuracy",), "share"),
            Plan("Activation and format", "share of rollouts",
                 ("activation_ratio", "format_valid_rate"), "share"),
            Plan("Length", "tokens, mean", ("critical_path", "total_tokens")),
            Plan("Critical path", "tokens, quantiles", ("critical_path/*",)),
            Plan("Total tokens", "tokens, quantiles", ("total_tokens/*",)),
            Plan("Acceleration ratio", "1 − critical path / total", ("acceleration_ratio",)),
            Plan("Blocks", "per rollout", ("blocks_per_rollout",)),
            Plan("Threads", "per block", ("threads_per_block", "threads_per_block/max")),
        ),
    ),
    (
        "How rollouts end",
        "Share of every finish reason; length and context are budgets that were spent.",
        (
            Plan("Rollouts", "share of rollouts", ("finish/*",), "shares"),
            Plan("Threads", "share of threads", ("thread_finish/*",), "shares"),
        ),
    ),
    (
        "Trust",
        "Whether the update is of the policy that sampled, and how far that policy has moved.",
        (
            Plan("Sampler and trainer apart", "|log-probability difference|",
                 ("logprob_abs_diff_mean", "logprob_abs_diff_max"), "log"),
            Plan("Sampler and trainer unlike", "1 − correlation", ("logprob_correlation",), "log",
                 complement=True),
            Plan("KL to start, reference, sampler", "nats per token",
                 ("kl_start", "kl_reference", "kl_old")),
            Plan("Entropy", "nats per token", ("entropy", "entropy/*")),
            Plan("Clipped tokens", "share of tokens", ("clip_fraction", "clip_fraction/*")),
            Plan("Engine mismatch weights", "per token",
                 ("importance_weight_mean", "importance_capped_fraction")),
            Plan("Gradient norm", "before clipping", ("grad_norm",), "log"),
            Plan("Loss", "per weight", ("loss",)),
            Plan("Negative log-probability", "nats per token", ("nll",)),
            Plan("Trained tokens", "per step", ("update_tokens",)),
            Plan("Age of rollouts", "steps, per token", ("staleness", "staleness/max")),
            Plan("Left out", "share of rollouts", ("left_out/*",)),
            Plan("Skipped updates", "so far, for non-finite gradients", ("skipped_updates",)),
        ),
    ),
    (
        _TIME,
        "Wall time of every part of a step, and tokens per second of the two large ones. Steps "
        "that took more than five times the median, as the first, which compiles, are left out.",
        (
            Plan("Time split", "seconds per step", ("time/*",), "stack"),
            Plan("Rollout", "sampled tokens per second", ("rollout_tokens_per_s",)),
            Plan("Update", "trained tokens per second", ("update_tokens_per_s", "tokens_per_s")),
        ),
    ),
)  # fmt: skip
_STEP_TIME = "time/step_s"  # the whole of the other times
_UNUSUAL = 5.0  # times the median
_NOT_SHOWN = ("step", "time", "text")


def sections(rows: Rows) -> list[Section]:
    """Everything that a run has logged, drawn.

    Args:
      rows: lines of `metrics.jsonl`, in the order of their steps.
    """
    names = _metric_names(rows)
    planned = [(title, note, list(plans)) for title, note, plans in _SECTIONS]
    left = [name for name in names if not _named_by(planned, name)]
    others = [
        Plan(_words(common).capitalize(), "", tuple(group)) for common, group in _by_beginning(left)
    ]
    planned.append(("Everything else that was logged", "", others))
    found = []
    for title, note, plans in planned:
        shown = usual_steps(rows) if title == _TIME else rows
        drawn = [
            figure
            for position, plan in enumerate(plans)
            if (figure := _figure(plan, shown, names, f"{_key(title)}-{position}"))
        ]
        if drawn:
            found.append(Section(title, note, drawn))
    return found


def _metric_names(rows: Rows) -> list[str]:
    """Names in the order in which they appeared first; texts and the clock are left out."""
    names: dict[str, None] = {}
    for row in rows:
        names |= {name: None for name in row if name not in _NOT_SHOWN and name not in names}
    return list(names)


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _named_by(planned: Sequence[tuple[str, str, Sequence[Plan]]], name: str) -> bool:
    patterns = [p for *_, plans in planned for plan in plans for p in plan.metrics]
    return any(_matches(pattern, name) for pattern in patterns)


def _by_beginning(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    return list(groups.items())


def _figure(plan: Plan, rows: Rows, names: Sequence[str], key: str) -> Figure | None:
    wanted = [
        name
        for pattern in plan.metrics
        for name in names
        if _matches(pattern, name) and not (plan.kind == "stack" and name == _STEP_TIME)
    ]
    measured = {name: [row for row in rows if name in row] for name in wanted}
    piled = plan.kind in ("stack", "shares")
    if piled:  # every part at every step; what never was is left out of the key
        steps = [row for row in rows if any(name in row for name in wanted)]
        measured = {name: steps for name, own in measured.items() if any(row[name] for row in own)}
    series = [
        charts.Series(
            name=_words(name.rpartition("/")[2]),
            css=f"c-hue-{index % HUES}",
            x=[float(row["step"]) for row in own],
            y=[_complement(row.get(name)) if plan.complement else row.get(name) for row in own],
        )
        for index, (name, own) in enumerate(measured.items())
        if own
    ]
    if not series:
        return None
    tick: Formatter = percent if plan.kind in ("share", "shares") else number
    labels = Labels(key, plan.title, charts.ends(series, tick), "step", plan.unit)
    if piled:
        chart = stacked_chart(labels, series, tick=tick, share=plan.kind == "shares")
    else:
        axis: charts.Axis = plan.kind if plan.kind in ("share", "log") else "linear"  # pyright: ignore[reportAssignmentType]
        chart = charts.line_chart(labels, series, tick=tick, axis=axis, legend=False)
    shown = [(line.name, line.css) for line in series] if len(series) > 1 else []
    return Figure(plan.title, chart, shown)


def _complement(value: float | None) -> float | None:
    return None if value is None else 1 - value


def usual_steps(rows: Rows) -> Rows:
    """Without steps that took far longer than most: those that compiled."""
    seconds = sorted(row[_STEP_TIME] for row in rows if row.get(_STEP_TIME) is not None)
    if not seconds:
        return rows
    most = _UNUSUAL * seconds[len(seconds) // 2]
    return [row for row in rows if row.get(_STEP_TIME) is None or row[_STEP_TIME] <= most]


def _words(name: str) -> str:
    """A metric's name as it is read: `rollout_s` is `rollout`, `p90` stays."""
    return printable(re.sub(r"_s$", "", name).replace("_", " "))


def _key(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower())
