"""What remains of the samples that have been looked at: counts in memory, texts on disk."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tw_jax.data.chat import Turn
from tw_jax.data.problem_file import ProblemRecord
from tw_jax.data.statistics import TrajectoryStatistics
from tw_jax.data.trajectory_file import TrajectoryRecord
from tw_jax.selftrain.candidate import Candidate, ReadRollout
from tw_jax.selftrain.selection import (
    NOT_SAMPLED,
    RULES,
    SHAPE_RULES,
    Drop,
    Kept,
    SelectionConfig,
    broken_rules,
    select_of_problem,
)
from tw_jax.selftrain.spool import Spool


class Tally:
    """Takes the samples of one problem after another.

    Attributes:
      kept: what is kept so far.
      dropped: rule -> samples that it left out.
      broken: rule about one sample -> samples that break it.
      grades: how answers were judged -> samples.
      format_breaks: kind of what is not well-formed -> samples.
      pass_rates: of every problem that was answered.
      sampled: statistics of every sample that parses.
      samples: how many were judged.
      failed: how many were not sampled.
    """

    def __init__(self, records: Spool, drops: Spool) -> None:
        """Starts with nothing; lines that may be written, and drops, go to the spools."""
        self.kept: list[Kept] = []
        self.dropped: collections.Counter[str] = collections.Counter()
        self.broken = dict.fromkeys((*RULES, *SHAPE_RULES), 0)
        self.grades: collections.Counter[str] = collections.Counter()
        self.format_breaks: collections.Counter[str] = collections.Counter()
        self.pass_rates: list[float] = []
        self.sampled: list[TrajectoryStatistics] = []
        self.samples = self.failed = 0
        self._records, self._drops = records, drops
        self._number_of: dict[tuple[int, int], int] = {}

    @property
    def correct_share(self) -> float:
        """Of the samples so far."""
        return self.grades["correct"] / self.samples if self.samples else 0.0

    def take(
        self,
        config: SelectionConfig,
        seed: int,
        problem: ProblemRecord,
        reads: Mapping[int, ReadRollout],
        candidates: Sequence[Candidate],
    ) -> None:
        """Selects among all samples of one problem.

        Args:
          config: what is kept.
          seed: of what is drawn.
          problem: as it is written.
          reads: its rollouts, by number of the sample.
          candidates: the same, judged, at least one.
        """
        good = []
        for candidate in candidates:
            self._count(candidate)
            broken = broken_rules(config, candidate)
            for rule in broken:
                self.broken[rule] += 1
            if broken:
                rule, message = next(iter(broken.items()))
                self.drop(problem, Drop(candidate.problem, candidate.sample, rule, message))
            else:
                good.append(candidate)
        pass_rate = sum(c.grade.correct for c in candidates) / len(candidates)
        self.pass_rates.append(pass_rate)
        chosen, drops = select_of_problem(config, seed, good)
        for drop in sorted(drops, key=lambda drop: drop.sample):
            self.drop(problem, drop)
        for candidate in chosen:
            place = (candidate.problem, candidate.sample)
            record = dataclasses.asdict(reads[candidate.sample].record)
            self._number_of[place] = self._records.append(record)
            self.kept.append(Kept(*place, pass_rate, candidate.has_block))

    def fail(self, problem: ProblemRecord, number: int, sample: int, message: str) -> None:
        """Counts and lists a sample that nothing has answered."""
        self.failed += 1
        self.drop(problem, Drop(number, sample, NOT_SAMPLED, message))

    def drop(self, problem: ProblemRecord, drop: Drop) -> None:
        """Counts and lists a sample that is left out."""
        self.dropped[drop.rule] += 1
        said = {
            "file": problem.file,
            "line": problem.line,
            "id": f"{problem.id}/{drop.sample}",
            "kind": drop.rule,
            "message": drop.message,
        }
        self._drops.append(said)

    def record(self, item: Kept) -> TrajectoryRecord:
        """The line of a sample that is kept."""
        fields: dict[str, Any] = self._records[self._number_of[item.problem, item.sample]]
        chat = tuple(Turn(**turn) for turn in fields.pop("chat"))
        return TrajectoryRecord(**fields, chat=chat)

    def _count(self, candidate: Candidate) -> None:
        self.samples += 1
        self.grades[candidate.grade.reason] += 1
        if candidate.format_break is not None:
            self.format_breaks[candidate.format_break.kind] += 1
        if candidate.statistics is not None:
            self.sampled.append(candidate.statistics)
