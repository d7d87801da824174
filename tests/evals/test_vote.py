"""Votes counted by hand, and the laws of a vote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.evals.vote import count_votes, describe_votes, majority_vote


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["7"], "7"),
        (["7", "8", "8"], "8"),
        (["9", "8", "8", "9"], "9"),  # a tie: 9 occurs first
        (["7", "8", "9"], "7"),
        ([None, None, None, "8"], "8"),  # silence has no vote
        ([None, "9", "8", None, "8", "9"], "9"),
        ([None, None], None),
        (["7", "07", "07"], "07"),  # texts are compared, not numbers
    ],
)
def test_winner_by_hand(answers, winner):
    assert majority_vote(answers) == winner


def test_votes_are_counted_most_first_and_ties_by_occurrence():
    votes = count_votes(["5", None, "3", "4", "3", None, "4", "6"])
    assert list(votes.items()) == [("3", 2), ("4", 2), ("5", 1), ("6", 1)]


def test_nothing_to_vote_on_is_an_error():
    with pytest.raises(ValueError, match="no answers to vote on"):
        majority_vote([])


def test_vote_in_words():
    answers = ["408"] * 5 + ["407"] * 2 + [None]
    assert describe_votes(answers) == "408 by 5 of 8 votes; 407: 2; no answer: 1"
    assert describe_votes([None, None]) == "none of 2 samples states an answer"
    scattered = ["a", *"abcdefg"]
    assert describe_votes(scattered) == "a by 2 of 8 votes; b: 1; c: 1; d: 1; e: 1; others: 2"


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1))
def test_nobody_beats_the_winner_and_ties_came_later(answers):
    winner = majority_vote(answers)
    if winner is None:
        assert set(answers) == {None}
        return
    for rival in set(answers) - {winner, None}:
        assert answers.count(rival) <= answers.count(winner)
        if answers.count(rival) == answers.count(winner):
            assert answers.index(winner) < answers.index(rival)
