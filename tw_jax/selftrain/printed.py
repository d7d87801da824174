"""The report of a self-training run as tables in a terminal."""

import rich.console
import rich.table

from tw_jax.data.statistics_table import statistics_table
from tw_jax.selftrain.yields import SelfTrainReport

_BAR_WIDTH = 40


def print_report(console: rich.console.Console, report: SelfTrainReport) -> None:
    """Prints yields, pass rates, and the statistics of ThreadWeaver's Table 8 before and after."""
    console.print(
        f"{report.kept:,} of {report.samples:,} samples kept, of {report.problems_kept:,} of "
        f"{report.problems:,} problems; answered by {report.source}",
        markup=False,
        highlight=False,
    )
    console.print(_yields(report))
    console.print(_pass_rates(report))
    console.print(statistics_table({"sampled": report.sampled, "written": report.written}))
    for what, counts in (
        ("answers", report.grades),
        ("broken formats", report.format_breaks),
        ("rejected problems", report.rejected_problems),
    ):
        if counts:
            said = ", ".join(f"{kind} {count:,}" for kind, count in counts.items())
            console.print(f"{what}: {said}", markup=False, highlight=False)


def print_drops(console: rich.console.Console, report: SelfTrainReport) -> None:
    """Prints, of a run that keeps nothing, which rules dropped how many samples."""
    drops = ", ".join(f"{rule.rule} {rule.dropped:,}" for rule in report.rules if rule.dropped)
    console.print(f"dropped: {drops}", markup=False, highlight=False, soft_wrap=True)
    if rejected := report.rejected_problems:
        said = ", ".join(f"{kind} {count:,}" for kind, count in rejected.items())
        console.print(f"rejected problems: {said}", markup=False, highlight=False, soft_wrap=True)


def _yields(report: SelfTrainReport) -> rich.table.Table:
    table = _table("rule", "in", "dropped", "kept", "break it")
    for rule in report.rules:
        broken = "" if rule.broken is None else f"{rule.broken:,}"
        table.add_row(rule.rule, f"{rule.seen:,}", f"{rule.dropped:,}", f"{rule.kept:,}", broken)
    return table


def _pass_rates(report: SelfTrainReport) -> rich.table.Table:
    table = _table("pass rate", "problems")
    table.add_column("", justify="left")
    bins, most = len(report.pass_rates) - 1, max(report.pass_rates)
    for place, count in enumerate(report.pass_rates):
        name = "0" if place == 0 else f"({(place - 1) / bins:g}, {place / bins:g}]"
        table.add_row(name, f"{count:,}", "█" * round(_BAR_WIDTH * count / most) if most else "")
    return table


def _table(first: str, *numbers: str) -> rich.table.Table:
    table = rich.table.Table(box=None, pad_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
