"""`tw-jax data selftrain` against a server: yields, NPR's recipe, bad input, kill -9."""

import dataclasses
import json
import signal
import subprocess
import sys

import pytest

from tests.random_trajectories import BLOCKS
from tests.rollout.completions_server import Fault
from tests.selftrain.written_answers import WrittenAnswers, wait_for
from tw_jax.config import to_yaml
from tw_jax.data.problem_file import ProblemColumns
from tw_jax.data.rejects import Rejects
from tw_jax.data.tokenizer import open_tokenizer
from tw_jax.data.trajectory_file import read_trajectories
from tw_jax.errors import UserError
from tw_jax.rewards.graders import GradingConfig
from tw_jax.rollout.client import ClientConfig
from tw_jax.rollout.client_http import RetryPolicy
from tw_jax.rollout.request import SamplingParams
from tw_jax.selftrain.command import run_selftrain
from tw_jax.selftrain.config import SelfTrainConfig
from tw_jax.selftrain.selection import SelectionConfig

SAMPLING = SamplingParams(max_response_tokens=300)
FILES = ("config.yaml", "trajectories.jsonl", "dropped.jsonl", "report.json", "rejects.jsonl")
# The verb in a process of its own.
RUN = """
import sys
from tw_jax.config import load_config
from tw_jax.selftrain.command import SelfTrainConfig, run_selftrain

run_selftrain(load_config(SelfTrainConfig, sys.argv[1], []))
"""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def boxed(answer):
    return f"\\boxed{{{answer}}}"


def block(language, *threads):
    return BLOCKS[language](tuple((f"plan {t[:1]}", t) for t in threads))


def texts_of(language):
    """Prompt -> what the model writes: good ones, wrong ones, broken ones."""
    good = block(language, "one and two", "three") + "\nso " + boxed("1/2")
    short = block(language, "one", "three") + " hence " + boxed("1/2")
    return {
        "easy?": [good, short, f"plainly {boxed('0.5')}", good + " "],
        "hard?": [good, f"no {boxed('3')}", "nothing", good.replace("1: ", "7: ")],
        "cut?": [f"{boxed('1/2')}...", f"{boxed('1/2')}..."],
        "hopeless?": [f"no {boxed('8')}", f"no {boxed('9')}"],
    }


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [
        {"prompt": p, "answer": "\\frac{1}{2}", "id": p.strip("?")} for p in texts_of("native")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(server, problems, out, language="threadweaver", **changes):
    config = SelfTrainConfig(
        output=out,
        problems=(str(problems),),
        grading=GradingConfig(workers=1),
        samples_per_problem=8,
        problems_per_round=3,
        style="sequential",
        sampling=SAMPLING,
        selection=SelectionConfig(keep_per_problem=None),
        server=ClientConfig(server.url, model="m", dialect="vllm", context_len=900, concurrency=2),
        tokenizer=str(tokenizer_folder(out)),
        schema=language,
    )
    return dataclasses.replace(config, **changes)


def tokenizer_folder(out):
    folder = out.parent / "tokenizer"
    if not folder.exists():
        open_tokenizer(None, "threadweaver")[0].save_pretrained(folder)
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.open()]


def test_the_set_is_correct_well_formed_and_every_sample_is_accounted_for(tmp_path, problems):
    pytest.importorskip("math_verify")
    tokenizer, schema = open_tokenizer(None, "threadweaver")
    out = tmp_path / "out"
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        config = settings(server, problems, out)
        report = run_selftrain(config)
        written, dropped = lines_of(out / "trajectories.jsonl"), lines_of(out / "dropped.jsonl")
        assert len(server.asked) == 32 == report.samples
        assert run_selftrain(config) == report and sum(server.asked.values()) == 32
    # Every sample is written or listed with a reason, once.
    ids = [line["id"] for line in (*written, *dropped)]
    assert sorted(ids) == sorted(
        f"{p}/{i}" for p in ("easy", "hard", "cut", "hopeless") for i in range(8)
    )
    assert all(line["message"] and line["file"] == str(problems) for line in dropped)
    # Written in the order of the problems, with plain prompts and reference answers.
    assert [line["id"].split("/")[0] for line in written] == sorted(
        line["id"].split("/")[0] for line in written
    )
    assert {line["prompt"] for line in written} == {"easy?", "hard?"}
    assert {line["answer"] for line in written} == {"\\frac{1}{2}"}
    texts = texts_of("threadweaver")
    assert {line["response"] for line in written} <= {*texts["easy?"], texts["hard?"][0]}
    # What the rules did adds up.
    counts = {}
    for line in dropped:
        counts[line["kind"]] = counts.get(line["kind"], 0) + 1
    assert counts == {rule.rule: rule.dropped for rule in report.rules if rule.dropped}
    assert {"correct", "finished", "well_formed", "duplicate"} <= set(counts)
    assert counts["finished"] == 8
    assert report.rules[0].seen == 32 and report.rules[-1].kept == report.kept == len(written)
    assert report.grades["correct"] == round(sum(rate * 8 for rate in pass_rates(dropped, written)))
    assert sum(report.pass_rates) == 4 and report.pass_rates[0] == 1  # hopeless
    assert report.written.format_valid_rate == 1
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    # It is a trajectory file like any other.
    rejects = Rejects(tmp_path / "r.jsonl")
    read = list(read_trajectories(out / "trajectories.jsonl", schema, tokenizer, rejects))
    assert len(read) == len(written) and rejects.total == 0
    assert all(schema.validate(item.trajectory) == () for item in read)
    assert sum(bool(item.trajectory.blocks) for item in read) / len(read) == (
        report.written.activation_ratio
    )


def pass_rates(dropped, written):
    """Of the problems, from what became of each sample: all but those dropped as incorrect."""
    wrong = {}
    for line in (*dropped, *written):
        problem = line["id"].split("/")[0]
        wrong[problem] = wrong.get(problem, 0) + (line.get("kind") == "correct")
    return [1 - count / 8 for count in wrong.values()]


def test_npr_s_recipe_gives_a_warm_up_set_with_control_tokens(tmp_path, problems):
    """Sequential sampling with a format prompt by a model that spells native tags out."""
    tokenizer, schema = open_tokenizer(None, "native")
    prompt = tmp_path / "format.txt"
    prompt.write_text("Think in <guideline>s.\n{problem}")
    out = tmp_path / "out"
    texts = {f"Think in <guideline>s.\n{p}": t for p, t in texts_of("native").items()}
    with WrittenAnswers(texts, tokenizer, plain_tags=True) as server:
        selection = SelectionConfig(require_block=True)
        config = settings(
            server, problems, out, "native", format_prompt=prompt, selection=selection
        )
        report = run_selftrain(config)
    rejects = Rejects(tmp_path / "r.jsonl")
    read = list(read_trajectories(out / "trajectories.jsonl", schema, tokenizer, rejects))
    assert [item.record.prompt for item in read] == ["easy?", "hard?"] and not rejects.total
    for item in read:
        (found,) = item.trajectory.blocks
        assert len(found.threads) == 2
        tags = set(schema.tag_ids.tolist())
        assert tags & set(item.trajectory.tokens.tolist())
        assert not tags & set(item.trajectory.tokens[: item.trajectory.prompt_len].tolist())
    assert report.schema == "native" and report.written.activation_ratio == 1


def test_bad_problems_stop_the_run_before_anything_is_sampled(tmp_path, problems):
    with problems.open("a") as file:
        file.write("{broken\n" + json.dumps({"prompt": "", "answer": "1"}) + "\n")
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    out = tmp_path / "out"
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        config = settings(server, problems, out)
        with pytest.raises(UserError, match="2 of 6 items are bad"):
            run_selftrain(config)
        assert server.bodies == []
        assert [(r["line"], r["field"], r["kind"]) for r in lines_of(out / "rejects.jsonl")] == [
            (5, None, "malformed_json"),
            (6, "prompt", "empty_field"),
        ]
        report = run_selftrain(dataclasses.replace(config, max_reject_share=0.5))
    assert report.rejected_problems == {"malformed_json": 1, "empty_field": 1}


def test_when_nothing_is_kept_the_reasons_are(tmp_path, problems, capsys):
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    out = tmp_path / "out"
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        strict = SelectionConfig(max_total_tokens=1)
        config = settings(server, problems, out, selection=strict)
        with pytest.raises(UserError, match=r"nothing is kept of 32 samples; .*was not written"):
            run_selftrain(config)
    assert len(lines_of(out / "dropped.jsonl")) == 32 and (out / "report.json").exists()
    assert not (out / "trajectories.jsonl").exists()
    # No tables of zeros: which rules dropped how many.
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "dropped" in line)
    rules = json.loads((out / "report.json").read_text())["rules"]
    drops = ", ".join(f"{rule['rule']} {rule['dropped']}" for rule in rules if rule["dropped"])
    assert said == f"dropped: {drops}" and "total_tokens" in drops


def test_when_nothing_is_kept_an_old_set_goes_and_can_be_made_again(tmp_path, problems, capsys):
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    out = tmp_path / "out"
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        config = settings(server, problems, out, samples_per_problem=2)
        run_selftrain(config)
        written = (out / "trajectories.jsonl").read_bytes()
        assert "pass rate" in capsys.readouterr().out
        strict = dataclasses.replace(config, selection=SelectionConfig(max_total_tokens=1))
        with pytest.raises(UserError, match="trajectories.jsonl of an earlier run was removed"):
            run_selftrain(strict)
        assert not (out / "trajectories.jsonl").exists()
        assert json.loads((out / "report.json").read_text())["kept"] == 0
        assert "pass rate" not in capsys.readouterr().out
        run_selftrain(config)
        assert (out / "trajectories.jsonl").read_bytes() == written
        assert sum(server.asked.values()) == 4 * 2


def test_a_hanging_answer_costs_its_time_limit_alone(tmp_path, problems):
    pytest.importorskip("math_verify")
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    texts = texts_of("threadweaver")
    texts["hopeless?"] = [boxed("9^{9^{9^9}}")]
    with WrittenAnswers(texts, tokenizer) as server:
        config = settings(
            server,
            problems,
            tmp_path / "out",
            grading=GradingConfig(workers=2, timeout_s=1.0),
            samples_per_problem=2,
        )
        report = run_selftrain(config)
    assert report.grades["grading_timeout"] == 2 and report.kept > 0


def test_samples_that_a_server_fails_on_are_left_out_and_asked_for_again(tmp_path, problems):
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    out = tmp_path / "out"
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        server.garbled = "hopeless?"
        config = settings(server, problems, out, max_failed_share=0.25, samples_per_problem=2)
        client = dataclasses.replace(config.server, retry=RetryPolicy(1, first_pause_s=0.01))
        config = dataclasses.replace(config, server=client, problems_per_round=4)
        report = run_selftrain(config)
        failed = [line for line in lines_of(out / "dropped.jsonl") if line["kind"] == "sampled"]
        assert {line["id"] for line in failed} == {"hopeless/0", "hopeless/1"}
        assert all("2 attempts failed" in line["message"] for line in failed)
        assert (report.samples, report.rules[0].seen, report.rules[0].kept) == (6, 8, 6)
        kept = (out / "trajectories.jsonl").read_bytes()
        with pytest.raises(UserError, match=r"2 of 8 samples failed, more than max_failed_share"):
            run_selftrain(dataclasses.replace(config, max_failed_share=0.1))
        assert (out / "trajectories.jsonl").read_bytes() == kept
        server.garbled = None
        assert run_selftrain(config).samples == 8


def test_a_server_that_is_gone_stops_the_run_and_what_is_finished_stays(tmp_path, problems):
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        retry = RetryPolicy(retries=1, first_pause_s=0.01)
        client = ClientConfig(
            server.url, model="m", dialect="vllm", context_len=900, concurrency=1, retry=retry
        )
        config = settings(server, problems, tmp_path / "out")
        config = dataclasses.replace(config, server=client)
        server.faults.extend([Fault()] * 5 + [Fault(status=503)] * 20)
        with pytest.raises(UserError, match="503"):
            run_selftrain(config)
        server.faults.clear()
        run_selftrain(config)
        assert sum(server.asked.values()) == 32


def test_balance_is_reported(tmp_path, problems):
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        selection = SelectionConfig(
            keep_per_problem=None, parallel_share=0.5, near_duplicate_jaccard=None
        )
        report = run_selftrain(settings(server, problems, tmp_path / "out", selection=selection))
    assert report.written.activation_ratio == 0.5
    assert {rule.rule: rule.dropped for rule in report.rules}["parallel_share"] > 0


def test_columns_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"question": "easy?", "solution": "1/2"}) + "\n")
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    columns = ProblemColumns(prompt="question", answer="solution")
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        report = run_selftrain(settings(server, path, tmp_path / "out", columns=columns))
    assert report.problems == 1 and report.kept > 0


def test_more_samples_and_more_problems_only_sample_what_is_new(tmp_path, problems):
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    whole = problems.read_text()
    problems.write_text("".join(whole.splitlines(keepends=True)[:3]))
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        config = settings(server, problems, tmp_path / "out", samples_per_problem=2)
        first = run_selftrain(config)
        assert sum(server.asked.values()) == first.samples == 3 * 2
        problems.write_text(whole)
        more = run_selftrain(dataclasses.replace(config, samples_per_problem=5))
        assert sum(server.asked.values()) == more.samples == 4 * 5
        # Another selection of the same samples asks nothing.
        strict = SelectionConfig(require_block=True)
        run_selftrain(dataclasses.replace(config, samples_per_problem=5, selection=strict))
        assert sum(server.asked.values()) == 4 * 5


def test_a_set_is_not_replaced_by_that_of_other_problems_or_another_model(tmp_path, problems):
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    out = tmp_path / "out"
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "easy?", "answer": "1/2", "id": "other"}) + "\n")
    with WrittenAnswers(texts_of("threadweaver"), tokenizer) as server:
        config = settings(server, problems, out, samples_per_problem=2)
        # A mistyped source leaves a folder that any run may use.
        with pytest.raises(UserError, match="cannot read"):
            run_selftrain(dataclasses.replace(config, problems=("none.jsonl",)))
        run_selftrain(config)
        before = {name: (out / name).read_bytes() for name in FILES if (out / name).exists()}
        elsewhere = dataclasses.replace(config.server, url="http://127.0.0.1:1/v1")
        for changes, message in (
            ({"problems": (str(other),)}, r"problems was \[.*\], now it is \[.*other.jsonl\]"),
            ({"problems": ()}, r"problems was \[.*\], now it is \[\]"),
            ({"server": elsewhere}, "server.url was .*, now it is http://127.0.0.1:1/v1"),
            ({"server": None}, "server.url was .*, now it is null"),
            ({"problems": (str(out / "trajectories.jsonl"),)}, "is what is read as well"),
        ):
            with pytest.raises(UserError, match=message):
                run_selftrain(dataclasses.replace(config, **changes))
        assert before == {name: (out / name).read_bytes() for name in before}
        # Problems that come behind the old ones are the same work.
        added = dataclasses.replace(config, problems=(str(problems), str(other)))
        added = dataclasses.replace(added, max_reject_share=0.5)
        assert run_selftrain(added).rejected_problems == {"duplicate_problem": 1}
        assert sum(server.asked.values()) == 4 * 2


def test_a_set_is_not_replaced_by_that_of_another_task_or_checkpoint(tmp_path):
    """These are told apart before a model is loaded: none is there."""
    config = SelfTrainConfig(output=tmp_path / "out", checkpoint=str(tmp_path / "run"))
    (config.output / "rollouts").mkdir(parents=True)
    (config.output / "rollouts" / "00000.jsonl").write_text("{}\n")
    (config.output / "config.yaml").write_text(to_yaml(config))
    task = dataclasses.replace(config.task, name="count_calls")
    for changes, message in (
        ({"task": task}, f"task.name was {config.task.name}, now it is count_calls.*Name another"),
        ({"checkpoint": "runs/other"}, "checkpoint was .*run, now it is runs/other"),
    ):
        with pytest.raises(UserError, match=message):
            run_selftrain(dataclasses.replace(config, **changes))
    selection = SelectionConfig(require_block=True)
    allowed = dataclasses.replace(
        config, selection=selection, samples_per_problem=9, checkpoint=f"{config.checkpoint}/"
    )
    with pytest.raises(UserError) as missing:
        run_selftrain(allowed)
    assert "holds the results of other settings" not in str(missing.value)


def test_chats_stay_chats(tmp_path):
    """The set holds the turns, so that training needs no word of how they are framed."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "easy?"}]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": turns, "answer": "1/2", "id": 1}) + "\n")
    prompt = tmp_path / "format.txt"
    prompt.write_text("Please: {problem}")
    tokenizer, schema = open_tokenizer(None, "threadweaver")
    asked = "Be brief.\nPlease: easy?"  # without a chat template, turns stand line by line
    with WrittenAnswers({asked: texts_of("threadweaver")["easy?"]}, tokenizer) as server:
        config = settings(server, path, tmp_path / "out", format_prompt=prompt)
        report = run_selftrain(config)
        again = dataclasses.replace(config, keep_format_prompt=True, output=tmp_path / "kept")
        run_selftrain(again)
    written = lines_of(tmp_path / "out" / "trajectories.jsonl")
    assert len(written) == report.kept > 0 and all(line["prompt"] == turns for line in written)
    rejects = Rejects(tmp_path / "r.jsonl")
    source = tmp_path / "out" / "trajectories.jsonl"
    for item in read_trajectories(source, schema, tokenizer, rejects):
        head = item.trajectory.tokens[: item.trajectory.prompt_len]
        assert tokenizer.decode(head[1:]) == "Be brief.\neasy?"
    kept = lines_of(tmp_path / "kept" / "trajectories.jsonl")
    assert kept[0]["prompt"] == [turns[0], {"role": "user", "content": "Please: easy?"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problems": ("p.jsonl",), "style": "parallel"}, "only problems of a task"),
        ({"keep_format_prompt": True}, "there is no format_prompt"),
        ({"sampling": SamplingParams(temperature=0.0)}, "all the same"),
        ({"samples_per_problem": 0}, "samples_per_problem"),
        ({"max_reject_share": 2.0}, "max_reject_share"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        SelfTrainConfig(**changes)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_writes_the_same_bytes(tmp_path, problems):
    tokenizer, _ = open_tokenizer(None, "threadweaver")
    with WrittenAnswers(texts_of("threadweaver"), tokenizer, pause_s=0.15) as server:
        whole = settings(server, problems, tmp_path / "whole")
        run_selftrain(whole)
        killed = dataclasses.replace(whole, output=tmp_path / "killed")
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(killed))
        words = [sys.executable, "-c", RUN, str(path)]
        before = sum(server.asked.values())
        for samples in (3, 16, 31):  # in the first round, and in the second
            process = subprocess.Popen(words)
            wait_for(lambda n=samples: sum(server.asked.values()) - before >= n)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not (killed.output / "trajectories.jsonl").exists()
        assert subprocess.run(words).returncode == 0
        # What had been finished was not asked for again: only what was in flight at a kill.
        assert sum(server.asked.values()) - before <= 32 + 2 * 3
    for name in FILES[1:]:
        one, two = whole.output / name, killed.output / name
        assert one.exists() == two.exists()
        if one.exists():
            assert one.read_bytes() == two.read_bytes(), name
