"""The bracket of a step's time."""

import dataclasses

import pytest

from tw_jax.config import ConfigError, load_config
from tw_jax.planning.chips import GIB, parse_topology
from tw_jax.planning.collectives import Collective
from tw_jax.planning.config import Assumptions, PlanConfig
from tw_jax.planning.facts import ProgramFacts, StepFacts, from_json, to_json
from tw_jax.planning.report import warnings
from tw_jax.planning.roofline import estimate

V5P = parse_topology("v5p:4x4x4")
PEAK = V5P.chip.peak_flops
SURE = Assumptions(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def facts(**changes) -> StepFacts:
    program = ProgramFacts(
        name="update",
        runs=2,
        compiled=True,
        traced_flops=64 * 3 * PEAK,
        compiled_flops=3 * PEAK,
        attention_flops=64 * 1 * PEAK,
        model_flops=64 * 2 * PEAK,
        arguments={"params": 10 * GIB},
        resident={"optimizer": 5 * GIB},
        temporaries=20 * GIB,
        peak=12 * GIB,
        memory_bytes=0.5 * V5P.chip.hbm_bandwidth,
        collectives=(Collective("all-gather", int(90e9 * 4), 4, ("fsdp",), 1.0),),
        bandwidths=((("fsdp",), 90e9),),
    )
    return StepFacts(
        {"fsdp": 64}, 1000, 1, (dataclasses.replace(program, **changes),), "0", "libtpu 0"
    )


def test_best_is_the_slowest_part_and_worst_is_the_sum():
    found = estimate(facts(), V5P, SURE)
    # Twice: 2 s of products, 1 s of attention, half a second of memory, 3 s of links.
    assert found.parts["matmul"].best == pytest.approx(4)
    assert found.parts["attention"].worst == pytest.approx(2)
    assert found.parts["memory"].best == pytest.approx(1)
    assert found.parts["links"].best == pytest.approx(6)
    assert found.step.best == pytest.approx(6)
    assert found.step.worst == pytest.approx(4 + 2 + 1 + 6)
    assert found.tokens_per_s == pytest.approx((1000 / 13, 1000 / 6))
    assert found.mfu == pytest.approx((4 / 13, 4 / 6))
    assert found.wire_gb == pytest.approx(2 * 3 * 90)


def test_the_busiest_device_sets_the_pace_of_attention():
    found = estimate(facts(attention_imbalance=1.75), V5P, SURE)
    assert found.parts["attention"].best == pytest.approx(2 * 1.75)
    assert found.parts["matmul"].best == pytest.approx(4)


def test_assumptions_widen_the_bracket():
    sure = estimate(facts(), V5P, SURE)
    unsure = estimate(facts(), V5P, Assumptions())
    assert unsure.step.best > sure.step.best and unsure.step.worst > sure.step.worst


def test_memory_counts_what_lies_beside_the_program():
    found = estimate(facts(), V5P, SURE)
    assert (found.hbm_gib, found.optimistic_gib) == (35, 17)
    assert found.fits
    assert not estimate(facts(temporaries=85 * GIB), V5P, SURE).fits
    # The compiler names what it could not place; the arguments may be even more.
    assert estimate(facts(exceeded=100 * GIB), V5P, SURE).hbm_gib == 100
    assert not estimate(facts(exceeded=100 * GIB), V5P, SURE).fits


def test_disagreement_is_loud():
    found = estimate(facts(compiled_flops=3.2 * PEAK), V5P, SURE)
    assert not found.agrees
    assert "do not trust" in warnings(facts(), found, V5P)[0]
    assert estimate(facts(), V5P, SURE).agrees


def test_gathers_over_three_dimensions_are_warned_of():
    wide = (Collective("all-reduce", 8, 64, ("fsdp",), 1.0),)
    narrow = estimate(facts(), V5P, SURE)
    assert warnings(facts(), narrow, V5P) == []
    assert "parallel.data" in warnings(facts(collectives=wide), narrow, V5P)[0]


def test_facts_survive_json():
    assert from_json(to_json(facts())) == facts()


@pytest.mark.parametrize("word", ["visible=0", "rows=0", "assume.matmul_worst=0.9"])
def test_refused_settings(word):
    with pytest.raises(ConfigError, match=word.split("=")[0].split(".")[-1]):
        load_config(PlanConfig, None, [word])
