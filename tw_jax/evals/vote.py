"""Self-consistency: the answer on which most samples of one problem agree (Wang et al. 2023)."""

import collections
from collections.abc import Sequence

SHOWN_RIVALS = 4


def count_votes(answers: Sequence[str | None]) -> dict[str, int]:
    """Answer -> number of samples that state it, most votes first, ties by first occurrence.

    A sample that states no answer has no vote.
    """
    # most_common keeps the order of first occurrence among equal counts.
    return dict(collections.Counter(a for a in answers if a is not None).most_common())


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The answer that most samples state.

    Ties go to the answer that occurs first: samples are drawn alike, so their order favours none.

    Args:
      answers: of all samples of one problem, None where a sample states none. Two answers are the
        same where their texts are, as in grading.

    Returns:
      The winner; None where no sample states an answer.

    Raises:
      ValueError: there are no samples.
    """
    if not answers:
        raise ValueError("no answers to vote on: pass those of at least one sample")
    return next(iter(count_votes(answers)), None)


def describe_votes(answers: Sequence[str | None]) -> str:
    """The vote in words: "408 by 5 of 8 votes; 407: 2; no answer: 1".

    Args:
      answers: of all samples of one problem, at least one.
    """
    votes = list(count_votes(answers).items())
    if not votes:
        return f"none of {len(answers)} samples states an answer"
    winner, most = votes[0]
    rivals = votes[1 : 1 + SHOWN_RIVALS]
    others = sum(count for _, count in votes[1 + SHOWN_RIVALS :])
    silent = sum(answer is None for answer in answers)
    parts = [f"{winner} by {most} of {len(answers)} votes"]
    parts += [f"{answer}: {count}" for answer, count in rivals]
    parts += [f"{name}: {n}" for name, n in (("others", others), ("no answer", silent)) if n]
    return "; ".join(parts)
