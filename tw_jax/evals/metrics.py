"""Evaluation metrics, defined once, as pure functions on plain records (DESIGN section 11).

Every mean here is taken over a problem's samples first and over problems second, so that a problem
counts once however many samples it has. Intervals are 95% bootstrap intervals over problems:
problems are what was drawn at random, samples of one problem are not independent of each other.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from tw_jax.evals.vote import majority_vote

Style = Literal["sequential", "parallel", "free"]
Interval = tuple[float, float]
_Value = TypeVar("_Value")

CONFIDENCE = 0.95
BOOTSTRAP_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class RolloutRecord:
    """What evaluation keeps of one rollout.

    Attributes:
      problem: index of the problem in its split.
      style: the style that was forced; "free" where the model chose.
      answer: what the response states; None if it states nothing.
      correct: the answer equals the problem's.
      total_tokens: tokens appended after the prompt, each once.
      critical_path: tokens on the longest chain of dependent tokens, prompt excluded.
      acceleration_ratio: `1 - critical_path / total_tokens`.
      has_block: the rollout holds at least one parallel block.
      format_valid: every block of the text parses strictly.
      finish_reason: why the rollout ended.
      seconds: wall-clock time of the rollout run alone; None where it was not measured.
    """

    problem: int
    style: Style
    answer: str | None
    correct: bool
    total_tokens: int
    critical_path: int
    acceleration_ratio: float
    has_block: bool
    format_valid: bool
    finish_reason: str
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class StyleSummary:
    """The metrics of one style over a set of problems.

    Attributes:
      n: rollouts.
      problems: distinct problems among them.
      accuracy: share of correct samples per problem, then mean over problems (avg@n).
      accuracy_interval: 95% interval of `accuracy`.
      pass_at_k: k -> chance that at least one of k samples of a problem is correct, for k = 1, 2,
        4, ... up to the smallest number of samples of any problem.
      majority_accuracy: share of problems where the answer on which most samples agree is correct
        (maj@n, see `tw_jax.evals.vote`); None where a problem has one sample only.
      majority_accuracy_interval: 95% interval of `majority_accuracy`; None where that is.
      total_tokens: mean tokens appended after the prompt.
      critical_path: mean tokens on the critical path.
      critical_path_interval: 95% interval of `critical_path`, tokens.
      acceleration_ratio: mean of `1 - critical / total`.
      activation_ratio: share of rollouts with a parallel block.
      activation_ratio_interval: 95% interval of `activation_ratio`.
      format_valid_rate: share of rollouts whose every block parses strictly.
    """

    n: int
    problems: int
    accuracy: float
    accuracy_interval: Interval
    pass_at_k: Mapping[int, float]
    majority_accuracy: float | None
    majority_accuracy_interval: Interval | None
    total_tokens: float
    critical_path: float
    critical_path_interval: Interval
    acceleration_ratio: float
    activation_ratio: float
    activation_ratio_interval: Interval
    format_valid_rate: float

    def to_json(self) -> dict[str, Any]:
        """The summary as a JSON object; the keys of `pass_at_k` become strings."""
        fields = dataclasses.asdict(self)
        fields["pass_at_k"] = {str(k): value for k, value in self.pass_at_k.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


@dataclasses.dataclass(frozen=True)
class Speedup:
    """How many times shorter (or faster) one style is than a baseline, on the same problems.

    Attributes:
      mean: per-problem ratio of means (baseline / style), then mean over problems.
      interval: 95% interval of `mean`.
      correct_only: the same over correct rollouts; None where no problem was solved on both sides.
      max: the largest per-problem ratio.
      per_problem: problem index -> ratio.
    """

    mean: float
    interval: Interval
    correct_only: float | None
    max: float
    per_problem: Mapping[int, float]

    def to_json(self) -> dict[str, Any]:
        """The speedup as a JSON object; the keys of `per_problem` become strings."""
        return {
            "mean": self.mean,
            "interval": list(self.interval),
            "correct_only": self.correct_only,
            "max": self.max,
            "per_problem": {str(k): value for k, value in self.per_problem.items()},
        }


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """95% percentile bootstrap interval of the mean of per-problem values.

    Args:
      values: one value per problem.
      seed: of the resampling; the same values and seed give the same interval.

    Returns:
      (low, high); both equal the value where there is only one.

    Raises:
      ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values to bootstrap: pass at least one per problem")
    scores = np.asarray(values, np.float64)
    # Chunks of resamples keep the index matrix small for large benchmarks.
    generator = np.random.default_rng(seed)
    chunk = max(1, 1_000_000 // scores.size)
    means = [
        scores[generator.integers(scores.size, size=(resamples, scores.size))].mean(axis=1)
        for start in range(0, BOOTSTRAP_RESAMPLES, chunk)
        if (resamples := min(chunk, BOOTSTRAP_RESAMPLES - start))
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def rate_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """`bootstrap_interval` for shares, honest where every problem scored 0 or every one 1.

    Resampling identical values gives an interval of width zero, which would claim certainty from a
    handful of problems; there the exact binomial (Clopper-Pearson) bound is given instead.
    """
    if set(values) in ({0.0}, {1.0}):
        reach = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(values))
        return (1 - reach, 1.0) if values[0] else (0.0, reach)
    return bootstrap_interval(values, seed)


def difference_interval(
    before: float, before_interval: Interval, after: float, after_interval: Interval
) -> Interval:
    """95% interval of `after - before` from the two sides' own intervals.

    The method of variance estimates recovery (Zou and Donner 2008; Newcombe 1998 for shares). It
    treats the sides as independent, so it is wide rather than narrow when both sides met the same
    problems.
    """
    difference = after - before
    down = math.hypot(after - after_interval[0], before_interval[1] - before)
    up = math.hypot(after_interval[1] - after, before - before_interval[0])
    return difference - down, difference + up


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct: `1 - C(n-c,k) / C(n,k)`.

    Args:
      samples: samples drawn for the problem (n).
      correct: how many of them are correct (c).
      k: at most `samples`.

    Raises:
      ValueError: the numbers do not fit together.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(
            f"pass@{k} of {samples} samples with {correct} correct: need 0 <= correct <= samples "
            "and 1 <= k <= samples; draw more samples per problem or ask for a smaller k"
        )
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def summarize(records: Iterable[RolloutRecord], *, seed: int = 0) -> StyleSummary:
    """The metrics of one style.

    Args:
      records: of one style and one policy; any number of samples per problem, in the order in
        which they were drawn, since a vote's ties go to the first.
      seed: of the bootstrap.

    Raises:
      ValueError: there are no records, or they mix styles.
    """
    records = tuple(records)
    if not records:
        raise ValueError("no rollout records to summarize: the evaluation produced none")
    styles = {record.style for record in records}
    if len(styles) > 1:
        raise ValueError(f"records mix the styles {sorted(styles)}: summarize one at a time")
    samples = _by_problem(records, lambda record: float(record.correct))
    accuracy = _problem_means(records, lambda record: float(record.correct))
    critical = _problem_means(records, lambda record: record.critical_path)
    activation = _problem_means(records, lambda record: float(record.has_block))

    def mean(value: Callable[[RolloutRecord], float]) -> float:
        return float(np.mean(list(_problem_means(records, value).values())))

    fewest = min(map(len, samples.values()))
    ks = [2**i for i in range(fewest.bit_length())]
    # A vote of one is the sample itself: maj@1 would only repeat the accuracy.
    votes = [_vote_score(s) for s in _by_problem(records, lambda r: r).values()]
    voted = fewest > 1
    return StyleSummary(
        n=len(records),
        problems=len(samples),
        accuracy=mean(lambda record: float(record.correct)),
        accuracy_interval=rate_interval(list(accuracy.values()), seed),
        pass_at_k={
            k: float(np.mean([pass_at_k(len(s), round(sum(s)), k) for s in samples.values()]))
            for k in ks
        },
        majority_accuracy=float(np.mean(votes)) if voted else None,
        majority_accuracy_interval=rate_interval(votes, seed) if voted else None,
        total_tokens=mean(lambda record: record.total_tokens),
        critical_path=mean(lambda record: record.critical_path),
        critical_path_interval=bootstrap_interval(list(critical.values()), seed),
        acceleration_ratio=mean(lambda record: record.acceleration_ratio),
        activation_ratio=mean(lambda record: float(record.has_block)),
        activation_ratio_interval=rate_interval(list(activation.values()), seed),
        format_valid_rate=mean(lambda record: float(record.format_valid)),
    )


def token_latency_speedup(
    baseline: Iterable[RolloutRecord], parallel: Iterable[RolloutRecord], *, seed: int = 0
) -> Speedup:
    """Speedup in tokens on the critical path, over the problems that both sides attempted.

    Raises:
      ValueError: the sides share no problem, or a problem's mean critical path is zero.
    """
    return _speedup(baseline, parallel, lambda record: record.critical_path, seed)


def wall_clock_speedup(
    baseline: Iterable[RolloutRecord], parallel: Iterable[RolloutRecord], *, seed: int = 0
) -> Speedup:
    """Speedup in seconds; depends on machine, batch and engine, unlike `token_latency_speedup`.

    Raises:
      ValueError: the sides share no problem, or a record carries no seconds.
    """

    def seconds(record: RolloutRecord) -> float:
        if record.seconds is None:
            raise ValueError(
                f"problem {record.problem} ({record.style}) has no wall-clock time: "
                "measure with tw_jax.evals.evaluate.measure_wall_clock"
            )
        return record.seconds

    return _speedup(baseline, parallel, seconds, seed)


def _speedup(
    baseline: Iterable[RolloutRecord],
    parallel: Iterable[RolloutRecord],
    cost: Callable[[RolloutRecord], float],
    seed: int,
) -> Speedup:
    """Per-problem ratio of mean costs, then its mean, interval and maximum."""
    baseline, parallel = tuple(baseline), tuple(parallel)
    ratios = _ratios(_problem_means(baseline, cost), _problem_means(parallel, cost))
    if not ratios:
        raise ValueError(
            "no problem was attempted by both the baseline and the parallel style: "
            "evaluate both on the same split, count and seed"
        )
    correct = _ratios(
        _problem_means((r for r in baseline if r.correct), cost),
        _problem_means((r for r in parallel if r.correct), cost),
    )
    values = list(ratios.values())
    return Speedup(
        mean=float(np.mean(values)),
        interval=bootstrap_interval(values, seed),
        correct_only=float(np.mean(list(correct.values()))) if correct else None,
        max=max(values),
        per_problem=ratios,
    )


def _ratios(baseline: Mapping[int, float], parallel: Mapping[int, float]) -> dict[int, float]:
    """Problem -> baseline / parallel, for problems on both sides, in ascending order."""
    shared = sorted(baseline.keys() & parallel.keys())
    for problem in shared:
        if parallel[problem] <= 0:
            raise ValueError(
                f"problem {problem} has a mean cost of {parallel[problem]}: a rollout without "
                "tokens has no latency to compare; raise max_response_tokens"
            )
    return {problem: baseline[problem] / parallel[problem] for problem in shared}


def _vote_score(samples: Sequence[RolloutRecord]) -> float:
    """1 where the samples of one problem vote for its answer, else 0."""
    winner = majority_vote([sample.answer for sample in samples])
    # Grading compares texts, so whoever states the winner is graded like all others who do.
    return float(next(sample.correct for sample in samples if sample.answer == winner))


def _by_problem(
    records: Iterable[RolloutRecord], value: Callable[[RolloutRecord], _Value]
) -> dict[int, list[_Value]]:
    """Problem -> the values of its samples; ascending, so that the bootstrap knows no order."""
    groups: dict[int, list[_Value]] = collections.defaultdict(list)
    for record in records:
        groups[record.problem].append(value(record))
    return dict(sorted(groups.items()))


def _problem_means(
    records: Iterable[RolloutRecord], value: Callable[[RolloutRecord], float]
) -> dict[int, float]:
    """Problem -> mean over its samples."""
    return {problem: float(np.mean(v)) for problem, v in _by_problem(records, value).items()}
