"""`tw-jax data stats`: how parallel trajectories are, as a table, a JSON file and a page."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from tw_jax.config_checks import require_at_least
from tw_jax.data.corpus import Corpus, CorpusConfig, open_corpus
from tw_jax.data.progress import counted
from tw_jax.data.statistics import (
    CorpusStatistics,
    TrajectoryStatistics,
    corpus_statistics,
    distributions,
    trajectory_statistics,
)
from tw_jax.data.statistics_table import statistics_rows, statistics_table
from tw_jax.data.tokenizer import SHIPPED
from tw_jax.data.whole_file import require_other_files, whole_file
from tw_jax.evals.sample import printable, sample_from_trajectory
from tw_jax.view import charts
from tw_jax.view.histogram import Mark, histogram
from tw_jax.view.numbers import number
from tw_jax.view.page import drawn_sample, render_page
from tw_jax.view.svg import Labels

_BARS = " ▁▂▃▄▅▆▇█"
_BAR_COUNT = 24


@dataclasses.dataclass(frozen=True)
class StatsConfig(CorpusConfig):
    """What to count.

    Attributes:
      output: JSON file for the figures; null writes none.
      page: HTML file with histograms, trajectories and what was rejected; null writes none.
      samples: trajectories on the page: those with the highest acceleration ratio first.
      rejects: JSONL file for what cannot be used.
    """

    output: str | None = None
    page: str | None = None
    samples: int = 3
    rejects: str = "rejects.jsonl"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, samples=0)


def run_stats(config: StatsConfig) -> dict[str, Any]:
    """Counts, prints and writes.

    Returns:
      {"all": statistics, "files": {source: statistics}, "rejected": {kind: count}}, as written to
      `config.output`.

    Raises:
      UserError: a source cannot be read or holds no good trajectory; a file cannot be written.
    """
    console = rich.console.Console()
    require_other_files(config.inputs, output=config.output, page=config.page)
    corpus = open_corpus(config, config.rejects)
    by_source: dict[str, list[TrajectoryStatistics]] = {}
    best: list[tuple[float, int, dict[str, Any]]] = []
    for source in corpus.sources:
        counts = by_source.setdefault(source, [])
        for item in counted(corpus.read(source), f"counting {source}"):
            found = trajectory_statistics(item.trajectory, corpus.schema)
            counts.append(found)
            if config.page is not None and found.block_tokens:
                best = _keep_best(best, found, item, corpus, config.samples)
    everything = [item for counts in by_source.values() for item in counts]
    columns = {source: corpus_statistics(counts) for source, counts in by_source.items()}
    named = {printable(source): found for source, found in columns.items()}
    total = corpus_statistics(everything)
    console.print(statistics_table({**named, "all": total} if len(named) > 1 else named))
    console.print(_histogram_table(distributions(everything)))
    if corpus.rejects.total:
        console.print(printable(corpus.rejects.summary()))
    result = {
        "all": total.to_json(),
        "files": {source: found.to_json() for source, found in columns.items()},
        "rejected": dict(corpus.rejects.counts),
    }
    if config.output is not None:
        with whole_file(config.output) as out:
            out.write(json.dumps(result, indent=2) + "\n")
        console.print(printable(config.output))
    if config.page is not None:
        samples = [sample for *_, sample in sorted(best, key=lambda entry: entry[:2])]
        with whole_file(config.page) as out:
            out.write(_page(config, columns, total, everything, samples, corpus))
        console.print(printable(config.page))
    return result


def _histogram_table(values: Mapping[str, Sequence[float]]) -> rich.table.Table:
    table = rich.table.Table(title="Distributions", title_justify="left")
    for name in ("of", "least", "", "most"):
        table.add_column(name, justify="right" if name == "least" else "left")
    for name, found in values.items():
        if found:
            table.add_row(name, number(min(found)), _bars(found), number(max(found)))
    return table


def _bars(values: Sequence[float]) -> str:
    """A histogram in one line of text."""
    low, high = min(values), max(values)
    counts = [0] * _BAR_COUNT
    for value in values:
        share = (value - low) / (high - low) if high > low else 0.5
        counts[min(_BAR_COUNT - 1, int(share * _BAR_COUNT))] += 1
    top = max(counts)
    # Bins that hold anything show it.
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // top)] for count in counts)


def _keep_best(
    best: list[tuple[float, int, dict[str, Any]]],
    found: TrajectoryStatistics,
    item: Any,
    corpus: Corpus,
    count: int,
) -> list[tuple[float, int, dict[str, Any]]]:
    """The trajectories with the highest acceleration ratio; ties go to the first."""
    key = (found.critical_path / found.total_tokens, item.line)
    if len(best) == count and key >= best[-1][:2]:
        return best
    sample = sample_from_trajectory(
        item.trajectory,
        corpus.tokenizer,
        critical_path=found.critical_path,
        answer=item.record.answer,
    )
    return sorted([*best, (*key, sample)], key=lambda entry: entry[:2])[:count]


def _page(
    config: StatsConfig,
    columns: Mapping[str, CorpusStatistics],
    total: CorpusStatistics,
    items: Sequence[TrajectoryStatistics],
    samples: Sequence[Mapping[str, Any]],
    corpus: Corpus,
) -> str:
    shown = {**columns, "all": total} if len(columns) > 1 else columns
    rows = statistics_rows(shown)
    histograms = []
    for name, values in distributions(items).items():
        if values:
            mean = sum(values) / len(values)
            labels = Labels(
                key=name.replace(" ", "-").replace(",", ""),
                title=name.capitalize(),
                description=f"Histogram of {len(values):,} values, mean {number(mean)}.",
                x=name,
                y="count",
            )
            mark = Mark(mean, f"mean {number(mean)}")
            chart = histogram(labels, values, [mark], size=charts.SMALL, low=0.0)
            histograms.append((labels.title, chart))
    problems = [problem for source in corpus.sources for problem in _problems(corpus, source)]
    return render_page(
        "data_stats.html.jinja",
        title=", ".join(config.inputs),
        facts=[("schema", config.schema), ("tokenizer", config.tokenizer or SHIPPED)],
        columns=list(shown),
        rows=rows,
        histograms=histograms,
        samples=[drawn_sample(sample, i) for i, sample in enumerate(samples)],
        rejected=sorted(corpus.rejects.counts.items(), key=lambda kind: -kind[1]),
        problems=problems,
    )


def _problems(corpus: Corpus, source: str) -> list[tuple[str, str]]:
    return [(source, problem) for problem in corpus.rejects.first_of(source)]
