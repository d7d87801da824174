import dataclasses
import importlib
import subprocess
import sys
import time
import types

import pytest
import yaml

from tw_jax import cli
from tw_jax import config as configs
from tw_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Greeting:
    """Settings of a greeting.

    Attributes:
      name: whom to greet.
      times: how often.
    """

    name: str = "world"
    times: int = 1


@pytest.fixture
def greet(monkeypatch):
    """A verb `greet`; the returned list holds the configurations it ran with."""
    seen = []

    def run(config):
        seen.append(config)
        if config.name == "nobody":
            raise UserError("nobody is there")
        if config.name == "bug":
            raise ZeroDivisionError
        if config.name == "ctrl-c":
            raise KeyboardInterrupt
        return {"three": 3, "true": True}.get(config.name)

    module = types.ModuleType("greeting_verb")
    module.__dict__.update(Greeting=Greeting, run=run)
    monkeypatch.setitem(sys.modules, "greeting_verb", module)
    monkeypatch.setitem(cli.VERBS, "greet", cli.Verb("greeting_verb", "Greeting", "run", "greet"))
    return seen


def test_overview_lists_every_verb(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    for name in ("quickstart", "sft", "rl", "generate", "eval", "view", "doctor"):
        assert f"\n  {name} " in out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tw-jax 0.")


def test_verbs_of_two_words(monkeypatch, greet, capsys):
    verb = cli.Verb("greeting_verb", "Greeting", "run", "greet politely")
    monkeypatch.setitem(cli.VERBS, "meet politely", verb)
    assert cli.main(["meet", "politely", "times=2"]) == 0
    assert greet == [Greeting("world", 2)]
    for words in (["meet"], ["meet", "--help"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert "meet politely" in out and "quickstart" not in out
    assert cli.main(["meet", "politly"]) == 2
    assert "unknown verb 'meet politly'; did you mean 'meet politely'?" in capsys.readouterr().err


def test_a_switch_is_short_for_true(monkeypatch, greet):
    @dataclasses.dataclass(frozen=True)
    class Switch:
        """Settings.

        Attributes:
          dry_run: says so.
        """

        dry_run: bool = False

    monkeypatch.setattr(sys.modules["greeting_verb"], "Switch", Switch, raising=False)
    seen = []
    monkeypatch.setattr(sys.modules["greeting_verb"], "switch", seen.append, raising=False)
    monkeypatch.setitem(cli.VERBS, "go", cli.Verb("greeting_verb", "Switch", "switch", "go"))
    assert cli.main(["go", "--dry-run"]) == cli.main(["go", "--dry_run"]) == 0
    assert seen == [Switch(True), Switch(True)]


def test_runs_with_file_and_overrides(greet, tmp_path):
    file = tmp_path / "greet.yaml"
    file.write_text("name: file\ntimes: 2\n")
    assert cli.main(["greet", str(file), "times=3"]) == 0
    assert greet == [Greeting("file", 3)]


def test_printed_config_loads_again(greet, capsys, tmp_path):
    assert cli.main(["greet", "name=a: b", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out) == {"name": "a: b", "times": 1}
    file = tmp_path / "again.yaml"
    file.write_text(out)
    assert configs.load_config(Greeting, file) == Greeting("a: b")
    assert not greet


def test_help_explains_every_field(greet, capsys):
    assert cli.main(["greet", "--help"]) == 0
    out = capsys.readouterr().out
    assert "times: int = 1\n      how often." in out
    assert not greet


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["greet", "name=nobody"], 2, "tw-jax: nobody is there"),
        (["greet", "tims=2"], 2, "did you mean 'times'?"),
        (["greet", "times=x"], 2, "'times' must be int"),
        (["greet", "nowhere.yaml"], 2, "nowhere.yaml: there is no such file"),
        (["greet", "a.yaml", "b.yaml"], 2, "one config file at most"),
        (["greet", "--fast"], 2, "unknown option '--fast'"),
        (["gret"], 2, "did you mean 'greet'?"),
        (["xyzzy"], 2, "known verbs: quickstart"),
        (["greet", "name=ctrl-c"], 130, "interrupted"),
    ],
)
def test_mistakes_print_one_message(greet, capsys, words, status, message):
    assert cli.main(words) == status
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_bugs_keep_their_traceback(greet):
    with pytest.raises(ZeroDivisionError):
        cli.main(["greet", "name=bug"])


def test_traceback_on_request(greet, capsys, monkeypatch):
    monkeypatch.setenv("TW_JAX_TRACEBACK", "1")
    assert cli.main(["greet", "name=nobody"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_int_is_the_exit_status(greet):
    assert cli.main(["greet", "name=three"]) == 3
    assert cli.main(["greet", "name=true"]) == 0


def test_a_missing_package_is_named(monkeypatch, capsys):
    verb = cli.Verb("no_such_package_anywhere", "Config", "run", "fail")
    monkeypatch.setitem(cli.VERBS, "fail", verb)
    assert cli.main(["fail"]) == 2
    assert "'no_such_package_anywhere' is not installed" in capsys.readouterr().err


def test_help_is_quick_and_loads_no_jax():
    code = (
        "import sys; from tw_jax import cli; status = cli.main(['--help']); "
        "sys.exit(status or 'jax' in sys.modules or 'transformers' in sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert seconds < 5  # 0.2 s on an idle machine; the bound only catches a heavy import


def test_a_closed_pipe_is_no_error():
    code = "import sys; from tw_jax import cli; sys.exit(cli.main(['doctor', '--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout and child.stderr
        child.stdout.close()
        err = child.stderr.read()
    assert (child.returncode, err) == (0, b"")


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_field_of_every_verb_is_explained(name):
    verb = cli.VERBS[name]
    try:
        importlib.import_module(verb.module)
    except ModuleNotFoundError as error:
        if not verb.module.startswith(error.name or "?"):
            raise
        pytest.skip(f"{verb.module} does not exist yet")
    config_class, _ = verb.load()
    silent = [row.key for row in configs.describe(config_class) if not row.explanation]
    assert not silent, f"fields without an entry under Attributes: {silent}"
