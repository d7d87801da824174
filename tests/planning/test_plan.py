"""`tw-jax plan` from the command line: modelled GPUs here, the TPU compiler in the slow tests."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks.update import sample_group
from tests.libtpu import LIBTPU, needs_libtpu
from tw_jax.cli import main
from tw_jax.config import load_config
from tw_jax.errors import UserError
from tw_jax.models import graphdef, init_params
from tw_jax.parallel.mesh import ParallelConfig, make_layout
from tw_jax.planning.chips import parse_topology
from tw_jax.planning.compiling import cache_key, facts_of
from tw_jax.planning.config import Assumptions, PlanConfig
from tw_jax.planning.flops import count_flops
from tw_jax.planning.hlo import parse_hlo
from tw_jax.planning.hlo_cost import ProgramCost
from tw_jax.planning.programs import live_tiles, model_of, programs
from tw_jax.planning.search import candidates, meshes
from tw_jax.planning.tpu_environment import libtpu_version
from tw_jax.train.optimizer import OptimizerConfig, make_optimizer
from tw_jax.train.placement import place_run, placed_state
from tw_jax.train.policy_sum import policy_sum
from tw_jax.train.rl_batches import make_scorer, micro_batches
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.update import make_update

TINY = ["model=tiny", "row_len=512", "memory.head_chunk=1024", "compute_dtype=float32"]


def plan(capsys, *words: str) -> tuple[int, str, dict]:
    status = main(["plan", *TINY, *words, "json=-"])
    output = capsys.readouterr().out
    table, _, last = output.rstrip("\n").rpartition("\n")
    return status, table, json.loads(last)


def test_modelled_gpus(capsys, tmp_path):
    words = ("topology=h100:8", f"cache_dir={tmp_path}")
    status, table, found = plan(capsys, *words)
    assert status == 0 and found["fits"] and not found["compiled"]
    assert found["mesh"]["fsdp"] == 8 and found["tokens_per_step"] == 8 * 512
    [program] = found["programs"]
    # Float32 parameters and two moments over eight devices; only scales of norms are not split.
    model = model_of(load_config(PlanConfig, None, TINY))
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256
    matrices = model.num_hidden_layers * layer + model.vocab_size * 128
    norms = model.num_hidden_layers * (2 * 128 + 2 * 32) + 128
    assert program["arguments"]["params"] == 4 * (matrices / 8 + norms)
    assert 0 <= program["arguments"]["optimizer"] - 2 * program["arguments"]["params"] < 100
    kinds = {(c["kind"], tuple(c["axes"])) for c in program["collectives"]}
    assert kinds == {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))}
    assert found["step_s"]["best"] < found["step_s"]["worst"]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80
    words_of_table = " ".join(table.split())
    assert "uncalibrated" in words_of_table and "modelled, not compiled" in words_of_table

    # The second time nothing is traced: the facts come from the cache.
    assert len(list(tmp_path.iterdir())) == 1
    again = plan(capsys, *words, "assume.matmul_worst=0.3")[2]
    assert len(list(tmp_path.iterdir())) == 1
    assert again["programs"] == found["programs"]
    assert again["step_s"]["worst"] > found["step_s"]["worst"]


def test_micro_batches_and_rl(capsys):
    words = ("topology=h100:8", "cache_dir=", "program=rl", "micro_batches=3")
    found = plan(capsys, *words, "parallel.tensor=2")[2]
    names = {p["name"]: p["runs"] for p in found["programs"]}
    assert names == {"first micro-batch": 1, "further micro-batch": 2, "optimizer": 1}
    first, further, optimizer = found["programs"]
    assert found["tokens_per_step"] == 3 * 4 * 512
    assert first["traced_flops"] == further["traced_flops"] and not optimizer["traced_flops"]
    assert further["arguments"]["gradients"] == further["arguments"]["params"]
    # While gradients are made, the optimizer's moments lie in memory unused.
    assert first["resident"]["optimizer"] == optimizer["arguments"]["optimizer"]


def test_an_rl_update_is_the_one_that_the_loop_compiles(tokenizer, schema):
    """The same program, of planned shapes and of a batch that the loop packed and scored."""
    words = [*TINY, "program=rl", "rows=2", "topology=h100:1"]
    config = load_config(PlanConfig, None, words)
    layout = make_layout(config.parallel, jax.devices("cpu")[:1], always=True)
    assert layout is not None
    [planned] = programs(config, layout)

    run = RLConfig(prompts=1, rows=2, row_len=512, memory=config.memory)
    model_config = model_of(config)
    model = SimpleNamespace(graphdef=graphdef(model_config), schema=schema)
    rollouts = sample_group(schema, tokenizer, 300)
    ones = np.ones((1, run.group_size), np.float32)
    [batches] = micro_batches(run, model, rollouts, ones, ones > 0).updates
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5), 1000)
    placement = place_run(layout, model_config, optimizer)
    state = placed_state(init_params(model_config, 0), optimizer, placement)
    start = state.params if run.measure_kl_to_start else None
    score = make_scorer(run, model, layout)
    batch = score(state.params, None, start, placement.batch(batches[0]))
    loss = policy_sum(
        model.graphdef,
        run.policy_objective,
        run.memory,
        layout,
        rollouts=run.most_rollouts,
        measure_entropy=run.measure_entropy,
    )
    with jax.set_mesh(layout.mesh):
        traced = make_update(loss, optimizer, placement.state).whole.trace(state, batch)
    assert traced.in_tree == planned.traced.in_tree
    assert traced.in_avals == planned.traced.in_avals
    assert (
        set(planned.traced.out_info[1]) == set(traced.out_info[1]) >= {"kl_start", "entropy/tags"}
    )
    texts = [re.sub("0x[0-9a-f]+", "", str(t.jaxpr)) for t in (planned.traced, traced)]
    assert texts[0] == texts[1]
    # Measuring how far the policy is from the start keeps the start in memory.
    assert planned.resident["params of the start"] == planned.arguments["params"]


def test_mistakes_of_the_worker_are_the_users(capsys):
    assert main(["plan", *TINY, "topology=h100:8", "cache_dir=", "rows=3"]) == 2
    assert "rows=3 do not divide" in capsys.readouterr().err
    assert main(["plan", "model=qwen9", "topology=h100:8", "cache_dir="]) == 2
    assert "no model preset 'qwen9'" in capsys.readouterr().err
    assert main(["plan", *TINY, "topology=h100:8", "cache_dir=", "timeout_s=1"]) == 2
    assert "timeout_s=1" in capsys.readouterr().err


def test_a_missing_compiler_names_the_remedy():
    with pytest.raises(UserError, match=r"pip install 'tw-jax\[plan\]'"):
        libtpu_version({"TPU_LIBRARY_PATH": "/nowhere"} if not LIBTPU else _without_libtpu())


def _without_libtpu():
    pytest.skip("libtpu is installed")


def test_cached_results_belong_to_settings_and_versions():
    config = PlanConfig()
    key = cache_key(config, "libtpu 1")
    assert key == cache_key(dataclasses.replace(config, json="-", search=True), "libtpu 1")
    assert key == cache_key(dataclasses.replace(config, assume=Assumptions(0.1)), "libtpu 1")
    assert key != cache_key(config, "libtpu 2")
    assert key != cache_key(dataclasses.replace(config, row_len=512), "libtpu 1")


def test_visible_share_of_the_tiles():
    config = load_config(PlanConfig, None, ["row_len=40960"])
    assert live_tiles(config, 2, (64, 64)) == 2 * 640 * 641 / 2
    assert live_tiles(config, 1, (256, 512)) == 2 * 80 * 81 / 2
    sparse = dataclasses.replace(config, visible=0.25)
    assert live_tiles(sparse, 2, (64, 64)) == live_tiles(config, 2, (64, 64)) / 4
    # Every query block meets at least its own keys.
    assert live_tiles(dataclasses.replace(config, visible=1e-6), 2, (64, 64)) == 2 * 640


def test_search_candidates_divide_the_model():
    config = PlanConfig(model="qwen3-8b", topology="v5p:4x4x4")
    found = list(meshes(model_of(config), config, 64))
    assert ParallelConfig(data=2, fsdp=32, context=1, tensor=1, expert=1) in found
    assert all(p.tensor in (1, 2, 4, 8) for p in found)
    assert {c.memory.remat for c in candidates(config, parse_topology(config.topology))} == {
        *("none", "dots", "block", "full")
    }


@pytest.mark.slow
def test_search_ranks_what_fits(capsys, tmp_path):
    words = ("topology=h100:2", f"cache_dir={tmp_path}", "search=true", "search_limit=3")
    status, table, found = plan(capsys, *words)
    assert status == 0 and len(found["search"]) == 3
    rates = [c["tokens_per_s"][0] * c["tokens_per_s"][1] for c in found["search"]]
    assert rates == sorted(rates, reverse=True)
    assert "best first" in table


@pytest.mark.slow
def test_a_decoding_step_does_the_work_that_was_traced():
    """On CPU: this compiler of TPU programs breaks down on an engine as small as this."""
    words = [*TINY, "program=decode", "decode_rows=8", "context_len=256"]
    config = load_config(PlanConfig, None, words)
    layout = make_layout(config.parallel, jax.devices("cpu")[:1], always=True)
    assert layout is not None
    [program] = programs(config, layout)
    text = program.traced.lower().compile().as_text()
    assert text is not None
    counted = count_flops(program.traced.jaxpr, program.scopes)
    assert counted.total == ProgramCost(parse_hlo(text), program.scopes).flops > 0
    assert not any(work for scope, work in counted.by_scope.items() if "prefill_lane" in scope)
    assert any("lm_head" in scope for scope in counted.by_scope)
    kv = 2 * 8 * 256 * 2 * 32 * 3 * 4  # keys and values, rows, positions, heads, width, layers
    assert program.arguments["kv cache"] == kv


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "topology", "mesh"),
    [
        ("sft", "v5e:2x2", ("parallel.tensor=2",)),
        ("sft", "v6e:2x4", ("parallel.context=2", "parallel.tensor=2")),
        ("rl", "v5p:2x2x2", ("parallel.data=2",)),
        ("sft", "tpu7x:2x2x1", ()),
    ],
)
def test_tpu_programs_do_the_work_that_was_traced(capsys, program, topology, mesh):
    words = (f"topology={topology}", f"program={program}", "cache_dir=", *mesh)
    status, table, found = plan(capsys, *words)
    assert status == 0, table
    assert 0.99 <= found["flops_agreement"] <= 1.01
    assert found["fits"] and found["compiled"] and found["compile_cpu_s"] > 0
    assert found["wire_gb"] > 0 and f"libtpu {LIBTPU}" in found["compiler"]


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_told_with_its_size(capsys):
    words = ("topology=v5e:2x2", "cache_dir=", "rows=16384", "memory.remat=none")
    status, table, found = plan(capsys, *words)
    assert status == 0 and not found["fits"]
    assert found["hbm_gib"] > found["hbm_limit_gib"] == 15.75
    assert "Does not fit" in table


@needs_libtpu
@pytest.mark.slow
def test_arguments_are_exactly_what_the_program_takes(capsys):
    """The shards that we add up are what the compiler reports as its arguments."""
    words = ["model=qwen3-0.6b", "row_len=1024", "memory.head_chunk=1024"]
    config = load_config(PlanConfig, None, [*words, "topology=v5e:4x4", "cache_dir="])
    [program] = facts_of(config, lambda line: None).programs
    # Vectors are padded to whole tiles, nothing else is.
    assert program.argument_bytes == pytest.approx(sum(program.arguments.values()), rel=1e-3)
