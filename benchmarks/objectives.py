"""Published objectives from the same start, under the same budget, over seeds.

The multiplication task of `make quickstart`: for every seed its SFT stage gives the model that RL
starts from, and RL runs its 60 steps under each objective, everything else equal. `std` is P-GRPO
with advantages divided by the group's standard deviation: what ThreadWeaver (arXiv 2512.07843)
compares mean-centred advantages with. Measured on 512 held-out problems, sampled at temperature 1,
style free.

    python -m benchmarks objectives    # goes on where it was stopped; about an hour on 2 cores
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tw_jax.config import load_config
from tw_jax.evals.evaluate import evaluate
from tw_jax.evals.metrics import summarize
from tw_jax.quickstart import QuickstartConfig, run_first_stage
from tw_jax.rollout.engine import RolloutEngine
from tw_jax.tasks.registry import make_task
from tw_jax.train.objective import ObjectiveConfig
from tw_jax.train.rl import run_rl
from tw_jax.train.rl_config import RLConfig
from tw_jax.train.run_dir import LoadedModel, load_run

SEEDS = (0, 1, 2)
PROBLEMS = 512
FOLDER = pathlib.Path("runs/objectives")
# Seeds and settings. The question is that of the first two; the others show that they work.
OBJECTIVES: dict[str, tuple[Sequence[int], dict[str, Any]]] = {
    "pgrpo": (SEEDS, {}),
    "std": (SEEDS, {"objective": ObjectiveConfig(normalizer="group_std")}),
    "papo": (SEEDS[:1], {"preset": "papo"}),
    "dapo": (SEEDS[:1], {"preset": "dapo"}),
}
MEASURED = ("accuracy", "critical_path", "activation_ratio")


def run() -> dict[str, Any]:
    """Measurements by objective and seed, and their means."""
    stages = {seed: _start(seed) for seed in SEEDS}
    found = {
        "start": {
            seed: _kept(FOLDER / f"seed_{seed}/start.json", lambda rl=rl: _measured(rl, None))
            for seed, rl in stages.items()
        }
    }
    for name, (seeds, changes) in OBJECTIVES.items():
        found[name] = {}
        for seed in seeds:
            rl = stages[seed]
            folder = FOLDER / f"seed_{seed}"
            ours = dataclasses.replace(rl, run_dir=str(folder / name), **changes)
            found[name][seed] = _kept(
                folder / f"{name}.json", lambda ours=ours: _measured(ours, _trained(ours))
            )
    return {
        "seeds": SEEDS,
        "steps": stages[SEEDS[0]].steps,
        "problems": PROBLEMS,
        "by_seed": found,
        "mean": {name: _means(list(by_seed.values())) for name, by_seed in found.items()},
    }


def _start(seed: int) -> RLConfig:
    """Makes the model that RL starts from, if it is not there, and says how RL goes on."""
    folder = FOLDER / f"seed_{seed}"
    config = load_config(
        QuickstartConfig, "configs/quickstart.yaml", [f"run_dir={folder}", f"seed={seed}"]
    )
    done = folder / "first_stage_is_done"
    if not done.exists():
        run_first_stage(config)
        done.touch()
    return dataclasses.replace(
        config.rl, init_from=str(folder / "rl_start"), task=config.sft.task, seed=seed
    )


def _trained(rl: RLConfig) -> LoadedModel:
    result = run_rl(rl)
    if result.interrupted:
        raise SystemExit("stopped; the same command goes on")
    return result.model


def _kept(path: pathlib.Path, measure: Any) -> dict[str, float]:
    """What a file holds, measured first if need be."""
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


def _measured(rl: RLConfig, model: LoadedModel | None) -> dict[str, float]:
    """What a model, or the one that RL starts from, does on held-out problems."""
    model = load_run(rl.init_from) if model is None else model
    engine = RolloutEngine(model.graphdef, model.schema, rl.engine)
    records, _ = evaluate(
        engine,
        model.params,
        model.schema,
        model.tokenizer,
        make_task(rl.task),
        split="heldout",
        count=PROBLEMS,
        style="free",
        sampling=rl.sampling,
        seed=rl.seed,
    )
    summary = summarize(records).to_json()
    return {name: summary[name] for name in (*MEASURED, "format_valid_rate")}


def _means(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(m[name] for m in measured) for name in measured[0]}
