"""`tw-jax data validate`: every trajectory checked strictly; where each bad one breaks first."""

import contextlib
import dataclasses
import json

import rich.console
import rich.table

from tw_jax.config_checks import require_at_least
from tw_jax.data.corpus import CorpusConfig, open_corpus
from tw_jax.data.progress import counted
from tw_jax.data.trajectory_file import NoGoodTrajectory
from tw_jax.evals.sample import printable

INVALID_STATUS = 1


@dataclasses.dataclass(frozen=True)
class ValidateConfig(CorpusConfig):
    """What to check.

    Attributes:
      shown: bad records that are printed.
      rejects: JSONL file for all of them.
    """

    shown: int = 20
    rejects: str = "rejects.jsonl"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, shown=0)


def run_validate(config: ValidateConfig) -> int:
    """Checks the records of all inputs: readable, and every block strictly canonical.

    Returns:
      The exit status: 0, or 1 where a record is bad.

    Raises:
      UserError: a source cannot be read.
    """
    console = rich.console.Console()
    corpus = open_corpus(config, config.rejects)
    good = 0
    for source in corpus.sources:
        with contextlib.suppress(NoGoodTrajectory):  # that is what is to be found out
            for _ in counted(corpus.read(source, strict=True), f"checking {source}"):
                good += 1
    total = good + corpus.rejects.total
    console.print(f"{good:,} of {total:,} records are valid", end="")
    if not corpus.rejects.total:
        console.print()
        return 0 if total else INVALID_STATUS
    console.print(f"; {printable(config.rejects)} lists the others")
    kinds = rich.table.Table("kind", rich.table.Column("records", justify="right"))
    for kind, count in corpus.rejects.counts.most_common():
        kinds.add_row(kind, f"{count:,}")
    console.print(kinds)
    if config.shown:
        console.print(_shown(config.rejects, config.shown))
    return INVALID_STATUS


def _shown(path: str, count: int) -> rich.table.Table:
    """The first bad records, in the order in which they were found."""
    table = rich.table.Table("file", rich.table.Column("line", justify="right"), "kind", "what")
    with open(path, encoding="utf-8") as lines:
        for _, line in zip(range(count), lines, strict=False):
            entry = json.loads(line)
            message = printable(entry["message"])
            table.add_row(printable(entry["file"]), str(entry["line"]), entry["kind"], message)
    return table
