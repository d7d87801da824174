"""Which samples become training data: every rule a value of `SelectionConfig`, every drop counted.

In this order: rules that look at one sample (`RULES`); then per problem duplicates, and the best
few (`select_of_problem`); then the balance of the whole set (`balance`). All of it is a pure
function of the candidates, the configuration and the seed.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Literal

from tw_jax.config_checks import require_at_least, require_share
from tw_jax.selftrain.candidate import Candidate
from tw_jax.selftrain.near_duplicates import jaccard, shingles

Preference = Literal["shortest_critical_path", "highest_acceleration", "random"]


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """What is kept. Kept samples are always correct, ended by the model and strictly well-formed.

    Attributes:
      allow_cut_threads: keep samples with threads that a budget ended.
      require_block: keep only samples with a parallel block.
      min_total_tokens: fewest tokens of a response.
      max_total_tokens: most tokens of a response.
      max_critical_path: most tokens on its longest chain of dependent tokens.
      min_acceleration_ratio: least `1 - critical path / total tokens` of samples with a block;
        those without are not held to it.
      min_threads: fewest threads of each block.
      max_threads: most threads of each block.
      min_blocks: fewest blocks of samples that have any.
      max_blocks: most blocks.
      near_duplicate_jaccard: of samples of one problem that share at least this part of their
        runs of eight tokens, one stays; null keeps near duplicates. Equal texts never stay.
      keep_per_problem: most samples of one problem; null keeps all.
      prefer: which of a problem's samples: those of the shortest critical path, of the highest
        acceleration ratio, or drawn by the seed.
      parallel_share: share of samples with a block in the set, reached by leaving out samples of
        the larger part, drawn by the seed; null leaves the shares as they are.
      max_per_pass_rate_bin: most samples of each bin of difficulty (the problem's pass rate over
        its samples), drawn by the seed; null keeps all.
      pass_rate_bins: equal parts of (0, 1] that the pass rate is binned into.
    """

    allow_cut_threads: bool = False
    require_block: bool = False
    min_total_tokens: int | None = None
    max_total_tokens: int | None = None
    max_critical_path: int | None = None
    min_acceleration_ratio: float | None = None
    min_threads: int | None = None
    max_threads: int | None = None
    min_blocks: int | None = None
    max_blocks: int | None = None
    near_duplicate_jaccard: float | None = 0.9
    keep_per_problem: int | None = 1
    prefer: Preference = "shortest_critical_path"
    parallel_share: float | None = None
    max_per_pass_rate_bin: int | None = None
    pass_rate_bins: int = 10

    def __post_init__(self) -> None:
        require_at_least(
            self,
            min_total_tokens=0,
            max_total_tokens=1,
            max_critical_path=1,
            min_threads=1,
            max_threads=1,
            min_blocks=1,
            max_blocks=0,
            keep_per_problem=1,
            max_per_pass_rate_bin=1,
            pass_rate_bins=1,
        )
        shares = ("min_acceleration_ratio", "near_duplicate_jaccard", "parallel_share")
        require_share(self, *(name for name in shares if getattr(self, name) is not None))
        for what in ("total_tokens", "threads", "blocks"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if least is not None and most is not None and least > most:
                raise ValueError(
                    f"min_{what}={least} is more than max_{what}={most}: keeps nothing"
                )
        if self.require_block and self.max_blocks == 0:
            raise ValueError("require_block=true with max_blocks=0 keeps nothing")


@dataclasses.dataclass(frozen=True)
class Drop:
    """A candidate that is left out.

    Attributes:
      problem: number of its problem.
      sample: its number among the problem's samples.
      rule: what left it out.
      message: why.
    """

    problem: int
    sample: int
    rule: str
    message: str


@dataclasses.dataclass(frozen=True)
class Kept:
    """What the balance needs to know of a candidate that is kept so far.

    Attributes:
      problem: number of its problem.
      sample: its number among the problem's samples.
      pass_rate: share of the problem's samples that are correct.
      has_block: whether it has a parallel block.
    """

    problem: int
    sample: int
    pass_rate: float
    has_block: bool


# Says why a candidate breaks a rule; None where it does not.
Rule = Callable[[SelectionConfig, Candidate], str | None]


def _correct(config: SelectionConfig, candidate: Candidate) -> str | None:
    grade = candidate.grade
    if grade.correct:
        return None
    return grade.reason if grade.extracted is None else f"{grade.reason}: {grade.extracted!r}"


def _finished(config: SelectionConfig, candidate: Candidate) -> str | None:
    reason = candidate.finish_reason
    return None if reason == "eos" else f"ended by {reason}, not by the model"


def _threads_finished(config: SelectionConfig, candidate: Candidate) -> str | None:
    if config.allow_cut_threads or not candidate.cut_threads:
        return None
    return f"{candidate.cut_threads} threads were ended by a budget"


def _well_formed(config: SelectionConfig, candidate: Candidate) -> str | None:
    broken = candidate.format_break
    return None if broken is None else f"{broken.kind}: {broken.message}"


def _has_block(config: SelectionConfig, candidate: Candidate) -> str | None:
    return "no parallel block" if config.require_block and not candidate.has_block else None


def _total_tokens(config: SelectionConfig, candidate: Candidate) -> str | None:
    found = candidate.counted.total_tokens
    return _outside(found, config.min_total_tokens, config.max_total_tokens, "tokens")


def _critical_path(config: SelectionConfig, candidate: Candidate) -> str | None:
    found = candidate.counted.critical_path
    return _outside(found, None, config.max_critical_path, "tokens of critical path")


def _acceleration(config: SelectionConfig, candidate: Candidate) -> str | None:
    least = config.min_acceleration_ratio
    if least is None or not candidate.has_block or candidate.acceleration_ratio >= least:
        return None
    return f"acceleration ratio {candidate.acceleration_ratio:.3f}, at least {least:g} is asked for"


def _blocks(config: SelectionConfig, candidate: Candidate) -> str | None:
    least = config.min_blocks if candidate.has_block else None
    return _outside(len(candidate.counted.block_tokens), least, config.max_blocks, "blocks")


def _threads(config: SelectionConfig, candidate: Candidate) -> str | None:
    found = (
        _outside(len(threads), config.min_threads, config.max_threads, "threads in a block")
        for threads in candidate.counted.thread_tokens
    )
    return next((message for message in found if message), None)


def _outside(found: int, least: int | None, most: int | None, what: str) -> str | None:
    if least is not None and found < least:
        return f"{found:,} {what}, at least {least:,} are asked for"
    if most is not None and found > most:
        return f"{found:,} {what}, at most {most:,} are admitted"
    return None


# No rule, but counted like one: what answers has failed for good on this sample.
NOT_SAMPLED = "sampled"
RULES: dict[str, Rule] = {
    "correct": _correct,
    "finished": _finished,
    "threads_finished": _threads_finished,
    "well_formed": _well_formed,
}
# These need a candidate that parses: they come behind `well_formed`.
SHAPE_RULES: dict[str, Rule] = {
    "has_block": _has_block,
    "total_tokens": _total_tokens,
    "critical_path": _critical_path,
    "acceleration_ratio": _acceleration,
    "blocks": _blocks,
    "threads": _threads,
}
# What is left out for other samples' sake, in this order.
AMONG_SAMPLES = ("duplicate", "near_duplicate", "keep_per_problem", "pass_rate", "parallel_share")
ALL_RULES = (NOT_SAMPLED, *RULES, *SHAPE_RULES, *AMONG_SAMPLES)


def broken_rules(config: SelectionConfig, candidate: Candidate) -> dict[str, str]:
    """Every rule about one sample that a candidate breaks, in order, with the reason."""
    rules = RULES if candidate.statistics is None else {**RULES, **SHAPE_RULES}
    said = {name: rule(config, candidate) for name, rule in rules.items()}
    return {name: message for name, message in said.items() if message is not None}


def select_of_problem(
    config: SelectionConfig, seed: int, candidates: Sequence[Candidate]
) -> tuple[list[Candidate], list[Drop]]:
    """Selects among the samples of one problem that break no rule.

    Returns:
      What is kept, in the order of the samples, and what is not.
    """
    drops: list[Drop] = []
    unique: list[Candidate] = []
    texts: dict[str, Candidate] = {}
    runs: list[frozenset[bytes]] = []
    least = config.near_duplicate_jaccard
    # The best first, so that of duplicates the better one stays.
    for candidate in sorted(candidates, key=lambda c: _preference(config, seed, c)):
        text = " ".join(candidate.response.split())
        if (first := texts.get(text)) is not None:
            drops.append(_drop(candidate, "duplicate", f"of sample {first.sample}"))
            continue
        texts[text] = candidate
        own = shingles(candidate.tokens)
        near = None
        if least is not None and runs:
            near = next((i for i, other in enumerate(runs) if jaccard(own, other) >= least), None)
        if near is not None:
            message = f"of sample {unique[near].sample}: {jaccard(own, runs[near]):.3f} in common"
            drops.append(_drop(candidate, "near_duplicate", message))
            continue
        unique.append(candidate)
        runs.append(own)
    most = len(unique) if config.keep_per_problem is None else config.keep_per_problem
    for candidate in unique[most:]:
        better = ", ".join(str(kept.sample) for kept in unique[:most])
        drops.append(_drop(candidate, "keep_per_problem", f"preferred: sample {better}"))
    return sorted(unique[:most], key=lambda c: c.sample), drops


def balance(
    config: SelectionConfig, seed: int, kept: Sequence[Kept]
) -> tuple[list[Kept], list[Drop]]:
    """Balances the whole set, first by difficulty, then by the share of parallel samples."""
    drops: list[Drop] = []
    chosen = list(kept)
    if config.max_per_pass_rate_bin is not None:
        bins: dict[int, list[Kept]] = {}
        for item in chosen:
            bins.setdefault(pass_rate_bin(item.pass_rate, config.pass_rate_bins), []).append(item)
        chosen = []
        for number, items in sorted(bins.items()):
            low, high = (edge / config.pass_rate_bins for edge in (number, number + 1))
            drawn, left = _draw(items, config.max_per_pass_rate_bin, seed)
            chosen += drawn
            message = f"enough samples of pass rates in ({low:g}, {high:g}]"
            drops += [_drop(item, "pass_rate", message) for item in left]
    if config.parallel_share is not None:
        parts = [[item for item in chosen if item.has_block is flag] for flag in (True, False)]
        sizes = shares_reached(len(parts[0]), len(parts[1]), config.parallel_share)
        chosen = []
        for items, size in zip(parts, sizes, strict=True):
            drawn, left = _draw(items, size, seed)
            chosen += drawn
            drops += [
                _drop(item, "parallel_share", "enough samples of this style") for item in left
            ]
    return sorted(chosen, key=_place), sorted(drops, key=_place)


def pass_rate_bin(pass_rate: float, bins: int) -> int:
    """Number of the bin, from 0, among equal parts of (0, 1]; a rate of 0 falls into the first."""
    return max(0, math.ceil(round(pass_rate * bins, 9)) - 1)


def shares_reached(parallel: int, sequential: int, share: float) -> tuple[int, int]:
    """The most samples of both styles that can be kept at a share of parallel ones.

    Where both styles occur and neither is to vanish, one of them is kept whole.
    """
    if share in (0, 1):
        return (parallel, 0) if share == 1 else (0, sequential)
    if parallel * (1 - share) > sequential * share:
        return round(sequential * share / (1 - share)), sequential
    return parallel, round(parallel * (1 - share) / share)


def _preference(config: SelectionConfig, seed: int, candidate: Candidate) -> tuple[float, int]:
    if config.prefer == "shortest_critical_path":
        return candidate.counted.critical_path, candidate.sample
    if config.prefer == "highest_acceleration":
        return -candidate.acceleration_ratio, candidate.sample
    return _drawn_number(seed, candidate), candidate.sample


def _draw(items: Sequence[Kept], most: int, seed: int) -> tuple[list[Kept], list[Kept]]:
    """Draws `most` of the items; what is drawn of one item does not depend on the others."""
    drawn = sorted(items, key=lambda item: (_drawn_number(seed, item), *_place(item)))
    return drawn[:most], drawn[most:]


def _drawn_number(seed: int, item: Candidate | Kept) -> int:
    key = f"selftrain/{seed}/{item.problem}/{item.sample}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def _place(item: Kept | Drop) -> tuple[int, int]:
    return item.problem, item.sample


def _drop(item: Candidate | Kept, rule: str, message: str) -> Drop:
    return Drop(item.problem, item.sample, rule, message)
