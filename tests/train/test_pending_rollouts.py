"""What is kept of steps that no checkpoint covers: taken for the same request and policy only."""

import dataclasses

import pytest

from tests.rollout.scenarios import ENGINE, small_requests
from tests.rollout.small_world import make_model, make_schema
from tw_jax.rewards.graders import Grade
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.train.pending_rollouts import PendingRollouts

REQUESTS = small_requests(6)
GRADES = {i: Grade(i % 2 == 0, str(i), "correct" if i % 2 == 0 else "wrong") for i in range(6)}


@pytest.fixture(scope="module")
def rollouts():
    engine = RolloutEngine(make_model()[0], make_schema(), ENGINE)
    return engine.generate(make_model()[1], REQUESTS)


class Recorded:
    """Hands out the known rollouts and notes which were asked for."""

    def __init__(self, rollouts, fail_behind=None):
        self.by_seed = {r.seed: rollout for r, rollout in zip(REQUESTS, rollouts, strict=True)}
        self.asked, self.fail_behind = [], fail_behind

    def __call__(self, requests, on_finish):
        found = []
        for index, request in enumerate(requests):
            if index == self.fail_behind:
                raise KeyboardInterrupt
            self.asked.append(request.seed)
            found.append(self.by_seed[request.seed])
            on_finish(index, found[-1])
        return found


def sampled(step, rollouts, *, version=3, keep_parts=True, fail_behind=None):
    """Seeds that were asked for, indices that were handed over, and the rollouts."""
    recorded, seen = Recorded(rollouts, fail_behind), []
    found = None
    try:
        found = step.generate(
            step.keys(REQUESTS, version),
            REQUESTS,
            recorded,
            on_finish=lambda index, rollout: seen.append(index),
            parts=keep_parts,
        )
    except KeyboardInterrupt:
        pass
    return recorded.asked, seen, found


def texts(rollouts):
    return [rollout.trajectory.tokens.tolist() for rollout in rollouts]


@pytest.mark.parametrize("keep_parts", [True, False])
def test_what_was_sampled_is_not_sampled_again(tmp_path, rollouts, keep_parts):
    pending = PendingRollouts(tmp_path, "settings", process=0)
    asked, seen, first = sampled(pending.step(3), rollouts, keep_parts=keep_parts)
    assert (len(asked), seen) == (6, list(range(6)))
    asked, seen, again = sampled(pending.step(3), rollouts, keep_parts=keep_parts)
    assert (asked, seen) == ([], list(range(6)))
    assert texts(again) == texts(first)
    pending.step(3).keep_grades(pending.step(3).keys(REQUESTS, 3), GRADES)
    assert pending.step(3).grades(pending.step(3).keys(REQUESTS, 3)) == GRADES
    assert pending.step(3).is_whole(pending.step(3).keys(REQUESTS, 3))


def test_only_parts_that_may_be_kept_are(tmp_path, rollouts):
    seeds = [request.seed for request in REQUESTS]
    for keep_parts, rest in ((True, seeds[4:]), (False, seeds)):
        step = PendingRollouts(tmp_path / str(keep_parts), "settings", process=0).step(0)
        sampled(step, rollouts, keep_parts=keep_parts, fail_behind=4)
        assert not step.is_whole(step.keys(REQUESTS, 3))
        asked, seen, found = sampled(step, rollouts, keep_parts=keep_parts)
        assert asked == rest
        assert sorted(seen) == list(range(6))
        assert texts(found) == texts(rollouts)


@pytest.mark.parametrize("change", ["version", "settings", "process", "step", "temperature"])
def test_rollouts_of_anything_else_are_not_taken(tmp_path, rollouts, change):
    pending = PendingRollouts(tmp_path, "settings", process=0)
    sampled(pending.step(3), rollouts)
    pending.step(3).keep_grades(pending.step(3).keys(REQUESTS, 3), GRADES)
    requests, version, step = REQUESTS, 3, 3
    if change == "version":
        version = 2
    elif change == "settings":
        pending = PendingRollouts(tmp_path, "others", process=0)
    elif change == "process":
        pending = PendingRollouts(tmp_path, "settings", process=1)
    elif change == "step":
        step = 4
    else:
        sampling = dataclasses.replace(REQUESTS[0].sampling, temperature=0.5)
        requests = [dataclasses.replace(r, sampling=sampling) for r in REQUESTS]
    keys = pending.step(step).keys(requests, version)
    assert not pending.step(step).is_whole(keys)
    assert pending.step(step).grades(keys) == {}


@pytest.mark.parametrize("torn", [b'{"key": "x", "gra', b"\xff\xfe", b"{}\n"])
def test_torn_grades_are_given_again_and_spoil_no_others(tmp_path, rollouts, torn):
    step = PendingRollouts(tmp_path, "settings", process=0).step(0)
    sampled(step, rollouts)
    step.keep_grades(step.keys(REQUESTS, 3), {i: GRADES[i] for i in range(3)})
    with (tmp_path / "pending/000000/grades.0.jsonl").open("ab") as file:
        file.write(torn)
    assert step.grades(step.keys(REQUESTS, 3)) == {i: GRADES[i] for i in range(3)}
    step.keep_grades(step.keys(REQUESTS, 3), {i: GRADES[i] for i in range(3, 6)})
    assert step.grades(step.keys(REQUESTS, 3)) == GRADES
    assert step.is_whole(step.keys(REQUESTS, 3))


def test_a_file_that_cannot_be_read_is_put_aside_and_sampled_anew(tmp_path, rollouts, caplog):
    step = PendingRollouts(tmp_path, "settings", process=0).step(0)
    folder = tmp_path / "pending/000000"
    for keep_parts in (True, False):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rollouts.0.jsonl").write_text("no rollout\n")
        assert not step.is_whole(step.keys(REQUESTS, 3))
        (folder / "rollouts.0.jsonl").write_text("no rollout\n")
        asked, _, found = sampled(step, rollouts, keep_parts=keep_parts)
        assert len(asked) == 6 and texts(found) == texts(rollouts)
        assert (folder / "rollouts.0.unreadable").read_text() == "no rollout\n"
    assert "not a rollout" in caplog.text


def test_what_a_checkpoint_covers_is_removed(tmp_path, rollouts):
    pending = PendingRollouts(tmp_path, "settings", process=0)
    pending.forget_before(3)  # nothing there yet
    for number in range(5):
        sampled(pending.step(number), rollouts)
    (tmp_path / "pending/notes").mkdir()
    pending.forget_before(3)
    left = sorted(path.name for path in (tmp_path / "pending").iterdir())
    assert left == ["000003", "000004", "notes"]
