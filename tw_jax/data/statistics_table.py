"""Statistics of corpora side by side, as people read them."""

from collections.abc import Mapping

import rich.table
import rich.text

from tw_jax.data.statistics import CorpusStatistics

_ROWS = (
    # label, field, format
    ("trajectories", "trajectories", "{:,.0f}"),
    ("with a parallel block", "activation_ratio", "{:.1%}"),
    ("strictly well-formed", "format_valid_rate", "{:.1%}"),
    ("parallel ratio (tokens in blocks)", "parallel_ratio", "{:.3f}"),
    ("total tokens", "total_tokens", "{:,.0f}"),
    ("critical path, tokens", "critical_path", "{:,.0f}"),
    ("self-parallelism", "self_parallelism", "{:.3f}"),
    ("acceleration ratio", "acceleration_ratio", "{:.3f}"),
    ("blocks per trajectory", "blocks_per_trajectory", "{:.2f}"),
    ("threads per block", "threads_per_block", "{:.2f}"),
    ("tokens per block", "tokens_per_block", "{:,.0f}"),
    ("tokens per thread", "tokens_per_thread", "{:,.0f}"),
    ("prompt tokens", "prompt_tokens", "{:,.0f}"),
)


def statistics_rows(columns: Mapping[str, CorpusStatistics]) -> list[tuple[str, list[str]]]:
    """What each statistic is called, and its value in every column."""
    return [
        (label, [form.format(getattr(found, field)) for found in columns.values()])
        for label, field, form in _ROWS
    ]


def statistics_table(columns: Mapping[str, CorpusStatistics]) -> rich.table.Table:
    """A column per corpus, a row per statistic."""
    table = rich.table.Table(title="Trajectories", title_justify="left")
    table.add_column("mean of")
    for name in columns:
        table.add_column(rich.text.Text(name), justify="right", overflow="fold")
    for label, values in statistics_rows(columns):
        table.add_row(label, *values)
    return table
