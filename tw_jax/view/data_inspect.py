"""`tw-jax data inspect`: single trajectories, threads side by side, and where bad ones break."""

import dataclasses

import rich.console

from tw_jax.config_checks import require_at_least
from tw_jax.data.corpus import Corpus, CorpusConfig, open_corpus
from tw_jax.data.records import Record, RejectedRecord, read_records
from tw_jax.data.trajectory_file import encode_trajectory, require_strict, trajectory_record
from tw_jax.errors import UserError
from tw_jax.evals.generate import print_sample
from tw_jax.evals.sample import printable, sample_from_trajectory


@dataclasses.dataclass(frozen=True)
class InspectConfig(CorpusConfig):
    """What to show.

    Attributes:
      line: number of the first record to show, from 1; in a file of lines, the line.
      count: records to show.
    """

    line: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, line=1, count=1)


def run_inspect(config: InspectConfig) -> None:
    """Prints records of the first input, good or bad.

    Raises:
      UserError: the source cannot be read, or ends before the record.
    """
    console = rich.console.Console()
    corpus = open_corpus(config, rejects=None)
    left = config.count
    for record in read_records(corpus.sources[0], corpus.rejects):
        if record.line < config.line:
            continue
        console.rule(f"{printable(record.file)} line {record.line}", align="left")
        _show(console, record, corpus)
        left -= 1
        if not left:
            return
    if left == config.count:
        raise UserError(
            f"{corpus.sources[0]} has no record at line {config.line} or behind it "
            f"({corpus.rejects.summary()})"
        )


def _show(console: rich.console.Console, record: Record, corpus: Corpus) -> None:
    try:
        item = trajectory_record(record, corpus.columns)
        trajectory = encode_trajectory(item, corpus.schema, corpus.tokenizer)
    except RejectedRecord as rejected:
        field = f" (field {rejected.field!r})" if rejected.field else ""
        console.print(
            printable(f"bad: {rejected.kind}{field}: {rejected.message}"), style="red", markup=False
        )
        return
    critical_path = corpus.schema.critical_path(trajectory)
    sample = sample_from_trajectory(
        trajectory, corpus.tokenizer, critical_path=critical_path, answer=item.answer
    )
    print_sample(console, sample)
    try:
        require_strict(trajectory, corpus.schema, corpus.tokenizer)
    except RejectedRecord as rejected:
        message = printable(f"not strict: {rejected.kind}: {rejected.message}")
        console.print(message, style="red", markup=False)
