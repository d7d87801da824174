"""A folder that was used before: its own work goes on there, other work is refused."""

import json

import pytest
import yaml

from tests.data.rewrite.chat_server import ChatServer
from tests.data.rewrite.runs import all_records, config, read_jsonl, responses, run, write_jsonl
from tw_jax.config import load_config, to_yaml
from tw_jax.data.rewrite.command import run_rewrite
from tw_jax.data.rewrite.config import RewriteColumns, RewriteConfig
from tw_jax.data.used_folder import require_same_work
from tw_jax.errors import UserError


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_settings_lie_in_the_folder_from_the_start(tmp_path):
    with ChatServer() as server:
        for inputs in (("none.jsonl",), (str(tmp_path / "input.jsonl"),)):
            wanted = config(tmp_path, server.url, max_traces=1, inputs=inputs)
            if inputs == ("none.jsonl",):
                with pytest.raises(UserError, match="cannot read"):
                    run_rewrite(wanted)
            else:
                run_rewrite(wanted)
            assert load_config(RewriteConfig, tmp_path / "out" / "config.yaml") == wanted


@pytest.mark.parametrize("dry_run", [False, True])
def test_other_inputs_and_columns_are_refused_by_name(tmp_path, dry_run):
    other = write_jsonl(tmp_path / "other.jsonl", all_records()[0][5:6])
    with ChatServer() as server:
        run(tmp_path, server.url, max_traces=2)
        before = files_of(tmp_path / "out")
        with pytest.raises(UserError, match=r"inputs was \[.*input.jsonl\], now it is \[.*other"):
            run_rewrite(config(tmp_path, server.url, inputs=(str(other),), dry_run=dry_run))
        columns = RewriteColumns(reasoning="thoughts")
        message = "columns.reasoning was reasoning, now it is thoughts.*Name another output"
        with pytest.raises(UserError, match=message):
            run_rewrite(config(tmp_path, server.url, columns=columns, dry_run=dry_run))
    assert files_of(tmp_path / "out") == before


def test_answers_that_are_paid_for_make_a_folder_used(tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", all_records()[0][5:6])
    with ChatServer() as server:
        run(tmp_path, server.url, max_traces=1)
        (tmp_path / "out" / "trajectories.jsonl").unlink()
        with pytest.raises(UserError, match="inputs was"):
            run(tmp_path, server.url, inputs=(str(other),))


def test_a_folder_without_results_takes_other_inputs(tmp_path):
    """A mistyped name must not make the folder useless."""
    with ChatServer() as server:
        with pytest.raises(UserError, match="cannot read"):
            run(tmp_path, server.url, inputs=(str(tmp_path / "inptu.jsonl"),))
        assert run(tmp_path, server.url, max_traces=1)[0] == 0


def test_inputs_may_be_added_behind_the_old_ones(tmp_path):
    records, expected = all_records()
    source, more = tmp_path / "input.jsonl", tmp_path / "more.jsonl"
    write_jsonl(source, records[:2])
    write_jsonl(more, records[2:3])
    with ChatServer() as server:
        run(tmp_path, server.url)
        asked = len(server.questions)
        run(tmp_path, server.url, inputs=(str(source), str(more)))
        new = {question.sections["PROBLEM"] for question in server.questions[asked:]}
    assert responses(tmp_path) == expected[:3] and new == {records[2]["prompt"]}


@pytest.mark.parametrize(
    "name",
    ["trajectories.jsonl", "provenance.jsonl", "rejects.jsonl", "dry_run_rejects.jsonl"],
)
def test_an_input_that_the_run_would_write_is_refused_before_anything_is_written(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    write_jsonl(out / name, all_records()[0])
    (tmp_path / "link.jsonl").symlink_to(out / name)
    before = files_of(out)
    for source in (out / name, tmp_path / "link.jsonl"):
        for dry_run in (False, True):
            inputs = (str(source),)
            with pytest.raises(UserError, match=f"{name} is what is read as well"):
                run_rewrite(config(tmp_path, "http://x/v1", inputs=inputs, dry_run=dry_run))
    assert files_of(out) == before


def test_settings_of_something_else_and_broken_ones_are_refused(tmp_path):
    settings = tmp_path / "config.yaml"
    wanted = config(tmp_path, "http://127.0.0.1:1/v1")
    for text, message in (
        ("run_dir: runs/sft\n", "settings of something else: it lacks inputs"),
        ("- a list\n", "settings of something else"),
        ("inputs: [\n", "cannot be read"),
    ):
        settings.write_text(text)
        with pytest.raises(UserError, match=message):
            require_same_work(settings, wanted, ["inputs"], is_used=False)


def test_what_means_the_same_is_no_difference(tmp_path):
    settings = tmp_path / "config.yaml"
    wanted = config(tmp_path, "http://127.0.0.1:1/v1")
    settings.write_text(to_yaml(wanted).replace(":1/v1", ":1/v1/"))
    keys = ["inputs", "server.url", "columns"]
    require_same_work(settings, wanted, keys, is_used=True)
    fields = yaml.safe_load(settings.read_text())
    fields["server"] = None
    settings.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="server.url was null, now it is http"):
        require_same_work(settings, wanted, keys, is_used=True)
    fields |= {"server": {"url": "http://127.0.0.1:1/v1"}, "inputs": []}
    settings.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"inputs was \[\], now"):
        require_same_work(settings, wanted, keys, is_used=True)


def test_a_dry_run_tells_the_bad_records_too(tmp_path, capsys):
    write_jsonl(tmp_path / "input.jsonl", [*all_records()[0][:2], {"prompt": ""}])
    run_rewrite(config(tmp_path, "http://127.0.0.1:1/v1", dry_run=True))
    listed = tmp_path / "out" / "dry_run_rejects.jsonl"
    said = f"2 traces to rewrite, 1 rejected (1 empty_field), listed in {listed}"
    assert said in capsys.readouterr().out
    assert [entry["line"] for entry in read_jsonl(listed)] == [3]
    assert not (tmp_path / "out" / "config.yaml").exists()
