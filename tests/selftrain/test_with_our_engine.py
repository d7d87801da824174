"""From a checkpoint to the next training set and on: our engine, our server, our trainer."""

import dataclasses
import json
import subprocess
import sys

import pytest

from tw_jax.config import to_yaml
from tw_jax.data.trajectory_file import TrajectoryRecord, write_trajectories
from tw_jax.rollout.client import ClientConfig
from tw_jax.rollout.engine import EngineConfig
from tw_jax.rollout.request import SamplingParams
from tw_jax.selftrain.command import run_selftrain
from tw_jax.selftrain.config import SelfTrainConfig
from tw_jax.selftrain.selection import SelectionConfig
from tw_jax.serve.config import ServeConfig
from tw_jax.tasks.multiplication import MultiplicationConfig
from tw_jax.tasks.registry import TaskConfig, make_task
from tw_jax.train.run_dir import ModelConfig
from tw_jax.train.sft import SFTConfig, SFTDataConfig, run_sft

pytestmark = pytest.mark.slow

TASK = TaskConfig(multiplication=MultiplicationConfig(digits=2))
LEARNT, UNKNOWN = 6, 2
# The stream of a small task repeats itself: problem 3 is problem 0.
NEW = (0, 1, 2, 4, 5)
PARALLEL = (0, 1)
WRONG = 5
SAMPLING = SamplingParams(
    temperature=0.0,
    max_response_tokens=200,
    max_thread_tokens=60,
    max_threads=2,
    max_blocks=2,
)
ENGINE = EngineConfig(
    context_len=256, rows=8, requests=4, max_threads=2, max_blocks=2, prefill_rows=2
)


def sft(folder, file, steps):
    return SFTConfig(
        run_dir=str(folder),
        steps=steps,
        data=SFTDataConfig(files=(str(file),), row_len=1024, rows=1, heldout_batches=0),
        optimizer=dataclasses.replace(SFTConfig().optimizer, warmup_steps=10),
        log_every=10,
        checkpoint_every=steps,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that knows a few solutions by heart, half of them parallel, and one wrong one."""
    folder = tmp_path_factory.mktemp("learnt")
    task = make_task(TASK)
    records = []
    for index in NEW:
        problem = task.problem("train", index, 0)
        text = problem.response("parallel" if index in PARALLEL else "sequential")
        if index == WRONG:
            text = text[:-1] + str((int(text[-1]) + 1) % 10)
        records.append(TrajectoryRecord(problem.prompt, text))
    write_trajectories(folder / "solutions.jsonl", records)
    run_sft(sft(folder / "run", folder / "solutions.jsonl", 240))
    return folder / "run"


def config_in(out, checkpoint, **changes):
    config = SelfTrainConfig(
        checkpoint=str(checkpoint),
        output=out,
        task=TASK,
        count=LEARNT + UNKNOWN,
        samples_per_problem=1,
        problems_per_round=3,
        sampling=SAMPLING,
        engine=ENGINE,
        selection=SelectionConfig(),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def in_process(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "engine"
    return out, run_selftrain(config_in(out, checkpoint))


def test_what_the_model_knows_is_kept(in_process):
    out, report = in_process
    written = [json.loads(line) for line in (out / "trajectories.jsonl").open()]
    task = make_task(TASK)
    by_id = {line["id"]: line for line in written}
    for index in NEW[:-1]:
        problem = task.problem("train", index, 0)
        line = by_id[f"multiplication/train/0/{index}/0"]
        style = "parallel" if index in PARALLEL else "sequential"
        assert line["response"] == problem.response(style) and line["answer"] == problem.answer
    assert f"multiplication/train/0/{WRONG}/0" not in by_id
    assert report.problems == len(NEW) + UNKNOWN and report.grades["wrong"] >= 1
    assert report.kept == len(written) and report.written.format_valid_rate == 1


def test_a_server_gives_the_same_set(checkpoint, in_process, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pytest.importorskip("uvicorn")
    path = tmp_path / "serve.yaml"
    serve = ServeConfig(
        model=ModelConfig(source=str(checkpoint)), port=0, engine=ENGINE, sampling=SAMPLING
    )
    path.write_text(to_yaml(serve))
    code = "import sys; from tw_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "serve", str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split(" at ")[1].strip()
            client = ClientConfig(url, dialect="tw_jax")
            out = tmp_path / "out"
            report = run_selftrain(config_in(out, checkpoint, server=client))
        finally:
            server.terminate()
    expected, ours = in_process
    assert (out / "trajectories.jsonl").read_bytes() == (
        expected / "trajectories.jsonl"
    ).read_bytes()
    assert report.rules == ours.rules and report.written == ours.written


def test_rollouts_that_were_lost_are_sampled_again_the_same(checkpoint, tmp_path):
    """As a kill leaves them: a part of the first round, its last line torn, and nothing behind."""
    warm = dataclasses.replace(SAMPLING, temperature=0.7)
    config = config_in(tmp_path / "whole", checkpoint, sampling=warm, samples_per_problem=3)
    run_selftrain(config)
    again = dataclasses.replace(config, output=tmp_path / "again")
    first = (config.output / "rollouts" / "00000.jsonl").read_bytes()
    part = again.output / "rollouts" / "00000.jsonl"
    part.parent.mkdir(parents=True)
    part.write_bytes(first[: len(first) // 2])
    run_selftrain(again)
    for name in ("trajectories.jsonl", "dropped.jsonl", "report.json"):
        assert (again.output / name).read_bytes() == (config.output / name).read_bytes(), name


def test_the_set_trains_the_next_model(in_process, checkpoint, tmp_path):
    out, _ = in_process
    config = sft(tmp_path / "next", out / "trajectories.jsonl", 12)
    model = ModelConfig(source=str(checkpoint))
    result = run_sft(dataclasses.replace(config, model=model))
    assert result.model.step == 12
    assert not (tmp_path / "next" / "rejects.jsonl").exists()
