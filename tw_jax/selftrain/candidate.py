"""A sampled trajectory as a candidate for the training set: read back from its text, and graded.

What is kept will be read from a file, as text. So every rollout goes through its text before it is
judged: decoded, encoded as a response of a file, parsed, validated. That is also how text whose
tags the model wrote as plain characters (sequential sampling with a format prompt) becomes a
trajectory with control tokens.
"""

import dataclasses
from typing import Any

from tw_jax.data.problem_file import ProblemRecord
from tw_jax.data.records import Record, RejectedRecord
from tw_jax.data.statistics import TrajectoryStatistics, trajectory_statistics
from tw_jax.data.trajectory_file import (
    DEFAULT_COLUMNS,
    TrajectoryRecord,
    encode_trajectory,
    require_strict,
    trajectory_record,
)
from tw_jax.rewards.answers import answer_part
from tw_jax.rewards.graders import Grade
from tw_jax.rollout.rollout import Rollout
from tw_jax.trajectory.metrics import acceleration_ratio
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.trajectory import Trajectory

_REPLACEMENT_CHARACTER = "\ufffd"  # what bytes that are no UTF-8 are decoded to


@dataclasses.dataclass(frozen=True)
class FormatBreak:
    """Why a text is no strictly well-formed trajectory.

    Attributes:
      kind: stable identifier, mostly one of the schema's.
      message: what was found, where.
    """

    kind: str
    message: str


@dataclasses.dataclass(frozen=True)
class ReadRollout:
    """A rollout, read back from its text.

    Attributes:
      record: the line that would be written.
      trajectory: what a reader makes of that line; None where it does not parse.
      format_break: what is not strictly well-formed; None where all is.
      answer_text: the part of the response where the answer must stand.
      finish_reason: why sampling ended.
      cut_threads: threads that a budget ended.
    """

    record: TrajectoryRecord
    trajectory: Trajectory | None
    format_break: FormatBreak | None
    answer_text: str
    finish_reason: str
    cut_threads: int


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What the selection knows of a sample.

    Attributes:
      problem: number of its problem.
      sample: its number among the problem's samples.
      grade: how its answer was judged.
      finish_reason: why sampling ended.
      cut_threads: threads that a budget ended.
      format_break: what is not strictly well-formed.
      statistics: counts of its tokens; None where the text does not parse.
      response: its text.
      tokens: ids of the response.
    """

    problem: int
    sample: int
    grade: Grade
    finish_reason: str
    cut_threads: int
    format_break: FormatBreak | None
    statistics: TrajectoryStatistics | None
    response: str
    tokens: tuple[int, ...]

    @property
    def counted(self) -> TrajectoryStatistics:
        """The statistics of a candidate that parses."""
        assert self.statistics is not None
        return self.statistics

    @property
    def has_block(self) -> bool:
        """Whether it has a parallel block."""
        return self.statistics is not None and bool(self.statistics.block_tokens)

    @property
    def acceleration_ratio(self) -> float:
        """Of the whole response."""
        return acceleration_ratio(self.counted.total_tokens, self.counted.critical_path)


def read_rollout(
    rollout: Rollout, problem: ProblemRecord, sample: int, tokenizer: Any, schema: Schema
) -> ReadRollout:
    """Takes a rollout through its text.

    Args:
      rollout: of any request that asked `problem`, in whatever words.
      problem: as it is to be written.
      sample: its number among the problem's samples.
      tokenizer: the one the schema is bound to.
      schema: the language that the text is read in.
    """
    response = rollout.response.tolist()
    if response and response[-1] == schema.eos_id:
        response = response[:-1]
    text = tokenizer.decode(response, skip_special_tokens=False)
    record = TrajectoryRecord(
        prompt=problem.prompt,
        response=text,
        answer=problem.answer,
        id=f"{problem.id}/{sample}",
        chat=problem.chat,
    )
    trajectory, broken = _read(record, tokenizer, schema)
    sampled = rollout.trajectory if trajectory is None else trajectory
    behind = None
    if sampled.blocks:
        tail = sampled.tokens[sampled.blocks[-1].end :].tolist()
        tail = tail[:-1] if tail and tail[-1] == schema.eos_id else tail
        behind = tokenizer.decode(tail, skip_special_tokens=False)
    return ReadRollout(
        record=record,
        trajectory=trajectory,
        format_break=broken,
        answer_text=answer_part(text, behind),
        finish_reason=rollout.finish_reason,
        cut_threads=sum(
            unit.kind == "thread" and unit.finish_reason not in ("thread_stop", "eos")
            for unit in rollout.units
        ),
    )


def judged(problem: int, sample: int, read: ReadRollout, grade: Grade, schema: Schema) -> Candidate:
    """Puts together what the selection needs."""
    trajectory = read.trajectory
    tokens = () if trajectory is None else trajectory.tokens[trajectory.prompt_len :].tolist()
    return Candidate(
        problem=problem,
        sample=sample,
        grade=grade,
        finish_reason=read.finish_reason,
        cut_threads=read.cut_threads,
        format_break=read.format_break,
        statistics=None if trajectory is None else trajectory_statistics(trajectory, schema),
        response=read.record.response,
        tokens=tuple(tokens),
    )


def _read(
    record: TrajectoryRecord, tokenizer: Any, schema: Schema
) -> tuple[Trajectory | None, FormatBreak | None]:
    """What a reader of the written line will make of it."""
    fields: dict[str, Any] = {"prompt": record.prompt, "response": record.response}
    if record.chat:
        fields["prompt"] = [dataclasses.asdict(turn) for turn in record.chat]
    try:
        read = trajectory_record(Record("", 0, fields), DEFAULT_COLUMNS)
        trajectory = encode_trajectory(read, schema, tokenizer)
    except RejectedRecord as rejected:
        return None, FormatBreak(rejected.kind, rejected.message)
    if _REPLACEMENT_CHARACTER in record.response:
        return trajectory, FormatBreak(
            "broken_characters", "the response holds bytes that are no whole character"
        )
    try:
        require_strict(trajectory, schema, tokenizer)
    except RejectedRecord as rejected:
        return trajectory, FormatBreak(rejected.kind, rejected.message)
    return trajectory, None
