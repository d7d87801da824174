"""Counts of a self-training run: what each rule dropped, pass rates, how parallel the set is."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tw_jax.data.statistics import CorpusStatistics
from tw_jax.selftrain.selection import ALL_RULES, pass_rate_bin


@dataclasses.dataclass(frozen=True)
class RuleYield:
    """What one rule did.

    Attributes:
      rule: its name.
      seen: samples that all rules before it had left.
      dropped: samples of these that it left out.
      broken: of all samples, those that break it, whatever else they break; None for rules that
        look at several samples.
    """

    rule: str
    seen: int
    dropped: int
    broken: int | None

    @property
    def kept(self) -> int:
        """Samples that it left."""
        return self.seen - self.dropped


@dataclasses.dataclass(frozen=True)
class SelfTrainReport:
    """What a run did. It holds nothing that differs when the run is resumed.

    Attributes:
      source: what answered.
      schema: the language of the set.
      problems: asked.
      rejected_problems: kind of reject -> problems of the input.
      samples: trajectories sampled.
      kept: trajectories written.
      problems_kept: problems with at least one of them.
      rules: yields of the rules, in order.
      grades: how answers were judged -> samples.
      format_breaks: kind of what is not well-formed -> samples.
      pass_rates: problems by pass rate: those of 0, then equal parts of (0, 1].
      sampled: how parallel the samples are that parse.
      written: how parallel the set is.
    """

    source: str
    schema: str
    problems: int
    rejected_problems: Mapping[str, int]
    samples: int
    kept: int
    problems_kept: int
    rules: Sequence[RuleYield]
    grades: Mapping[str, int]
    format_breaks: Mapping[str, int]
    pass_rates: Sequence[int]
    sampled: CorpusStatistics
    written: CorpusStatistics

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        fields = dataclasses.asdict(self)
        for entry, rule in zip(fields["rules"], self.rules, strict=True):
            entry["kept"] = rule.kept
        return fields


def rule_yields(
    requests: int, dropped: Mapping[str, int], broken: Mapping[str, int]
) -> tuple[RuleYield, ...]:
    """Yields of all rules in their order.

    Args:
      requests: samples that were asked for.
      dropped: rule -> samples that it left out.
      broken: rule about one sample -> samples that break it.
    """
    yields, seen = [], requests
    for rule in ALL_RULES:
        out = dropped.get(rule, 0)
        yields.append(RuleYield(rule, seen, out, broken.get(rule)))
        seen -= out
    return tuple(yields)


def pass_rate_histogram(pass_rates: Iterable[float], bins: int) -> list[int]:
    """Problems of pass rate 0, then those in each of `bins` equal parts of (0, 1]."""
    counts = collections.Counter(
        0 if rate == 0 else 1 + pass_rate_bin(rate, bins) for rate in pass_rates
    )
    return [counts[place] for place in range(bins + 1)]
