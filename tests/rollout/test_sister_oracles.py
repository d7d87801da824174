"""The oracles of the native and APR joins agree with their schemas, and with the trainer's scores.

So what the engine is compared with is what training sees: units, critical paths and the
log-probability of every sampled token.
"""

import jax
import numpy as np
import pytest

from tests.rollout.sister_scenarios import apr_scenarios, native_scenarios
from tests.rollout.sister_worlds import apr_world, native_world
from tw_jax.data.packing import WeightedTrie, pack_rows
from tw_jax.train.scoring import token_logprobs
from tw_jax.trajectory.trie import TokenKind

ROW_LEN = 512


@pytest.fixture(scope="module", params=["native", "apr"])
def run(request):
    """(world, requests, oracle rollouts and their trajectories by name)."""
    if request.param == "native":
        return native_world(), *native_scenarios()
    return apr_world(), *apr_scenarios()


def test_units_and_critical_paths_are_those_of_the_schema(run):
    world, _, rollouts = run
    for name, (rollout, trajectory) in rollouts.items():
        units = world.schema.units(trajectory)
        assert len(units) == len(rollout.units), name
        for ours, theirs in zip(units, rollout.units, strict=True):
            assert (ours.kind, ours.block, ours.thread) == (
                theirs.kind,
                theirs.block,
                theirs.thread,
            )
            assert ours.context.tolist() == theirs.context, name
            assert ours.completion.tolist() == theirs.completion, name
        assert world.schema.critical_path(trajectory) == rollout.critical_path, name


def test_the_trainer_scores_what_was_sampled(run):
    world, _, rollouts = run
    score = jax.jit(
        lambda batch: token_logprobs(
            world.graphdef, world.params, batch, head_chunk=4096, remat="none"
        )
    )
    for name, (rollout, trajectory) in rollouts.items():
        trie = world.schema.forest([trajectory])
        scored = np.asarray(score(pack_rows([[WeightedTrie(trie, np.zeros(len(trie)))]], ROW_LEN)))
        sampled = np.flatnonzero(trie.kind == TokenKind.SAMPLED)
        by_source = {int(trie.source[i]): (scored[0, i], int(trie.tokens[i])) for i in sampled}
        expected = _by_source(rollout, trajectory)
        assert by_source.keys() == expected.keys(), name
        for source, (logprob, token) in expected.items():
            assert by_source[source][1] == token, name
            np.testing.assert_allclose(by_source[source][0], logprob, atol=1e-4, err_msg=name)


def _by_source(rollout, trajectory):
    """(log-probability, token) of every sampled token by its `Trie.source`."""
    table, replaced_at = {}, len(trajectory.tokens)
    start = trajectory.response_start
    for unit in rollout.units:
        sources = range(start, start + len(unit.completion))
        if unit.kind == "thread":
            block = trajectory.blocks[unit.block]
            span = block.threads[unit.thread - 1]
            sources = [*range(span.body, span.sampled_end)]
            sources += range(replaced_at, replaced_at + len(span.replaced))
            replaced_at += len(span.replaced)
            start = block.join_end
        table |= dict(zip(sources, zip(unit.logprobs, unit.completion, strict=True), strict=True))
    return table


def test_a_first_block_that_parses_has_the_same_spans(run):
    world, _, rollouts = run
    closing = world.ids("</takeaway>") if world.schema.name == "native" else []
    compared = 0
    for _, trajectory in rollouts.values():
        for theirs in trajectory.blocks[:1]:
            text = [*trajectory.tokens[: theirs.join_end].tolist(), *closing]
            parsed = world.schema.parse(np.array(text, np.int32), trajectory.prompt_len)
            if isinstance(parsed, tuple):
                continue  # the model wrote tags where they do not belong, or never joined
            (ours,) = parsed.blocks
            assert (ours.outlines_end, ours.join_end) == (theirs.outlines_end, theirs.join_end)
            for a, b in zip(ours.threads, theirs.threads, strict=True):
                assert (a.start, a.body, a.end) == (b.start, b.body, b.end)
                compared += 1
    assert compared > 5


def test_the_scenarios_reach_every_branch(run):
    _, _, rollouts = run
    done = [rollout for rollout, _ in rollouts.values()]
    blocks = {len({u.block for u in r.units if u.kind == "thread"}) for r in done}
    threads = {max((u.thread for u in r.units), default=0) for r in done}
    ends = {u.reason for r in done for u in r.units if u.kind == "thread"}
    assert blocks >= {0, 1, 2}
    assert threads >= {0, 1, 2, 3, 4}
    assert ends >= {"thread_stop", "eos", "length", "context"}
    assert {r.reason for r in done} == {"eos", "length", "context"}
    in_block = [r for r in done if r.units and r.units[-1].kind == "thread"]
    assert len(in_block) >= 3, "rollouts that end inside a block"
