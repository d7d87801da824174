"""The command line: `tw-jax VERB [config.yaml] [a.b=value ...] [--print-config] [--help]`.

A verb is a configuration class and a function of it; its name is one word or two (`data pack`).
Their modules are imported only when the verb is used, so that help and mistakes answer at once.
"""

import dataclasses
import difflib
import importlib
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import tw_jax
from tw_jax import config as configs
from tw_jax.config_fields import fields_of
from tw_jax.errors import UserError

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # what a shell reports for a process that SIGINT ended


@dataclasses.dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
      module: where its configuration class and its function live.
      config_class: name of the dataclass that holds all its settings.
      function: name of the function that takes one and runs; an int that it returns is the
        process's exit status.
      summary: one line for the list of verbs.
      folder_key: the setting that a folder on the command line stands for; "" for none.
      folder_name: what that folder is, for the help text.
    """

    module: str
    config_class: str
    function: str
    summary: str
    folder_key: str = ""
    folder_name: str = "folder of a run"

    def load(self) -> tuple[type, Callable[[Any], Any]]:
        """Imports the configuration class and the function."""
        module = importlib.import_module(self.module)
        return getattr(module, self.config_class), getattr(module, self.function)


VERBS = {
    "quickstart": Verb(
        "tw_jax.quickstart",
        "QuickstartConfig",
        "run_quickstart",
        "train a small model from scratch to think in parallel, and report",
    ),
    "sft": Verb("tw_jax.train.sft", "SFTConfig", "run_sft", "fine-tune on parallel trajectories"),
    "rl": Verb("tw_jax.train.rl", "RLConfig", "run_rl", "reinforcement learning with P-GRPO"),
    "generate": Verb(
        "tw_jax.evals.generate",
        "GenerateConfig",
        "run_generate",
        "sample answers to prompts",
        folder_key="checkpoint",
    ),
    "eval": Verb(
        "tw_jax.evals.evaluate",
        "EvalConfig",
        "run_eval",
        "measure accuracy, latency and speedup",
        folder_key="checkpoint",
    ),
    "serve": Verb(
        "tw_jax.serve.command",
        "ServeConfig",
        "run_serve",
        "answer OpenAI's clients over HTTP, threads streamed as they are written",
        folder_key="model",
        folder_name="folder of a run or of weights, hub id or URL",
    ),
    "data rewrite": Verb(
        "tw_jax.data.rewrite.command",
        "RewriteConfig",
        "run_rewrite",
        "make parallel trajectories of sequential reasoning, by a language model",
    ),
    "data selftrain": Verb(
        "tw_jax.selftrain.command",
        "SelfTrainConfig",
        "run_selftrain",
        "sample trajectories, keep the best, write the next training set",
        folder_key="checkpoint",
    ),
    "data pack": Verb(
        "tw_jax.data.pack",
        "PackConfig",
        "run_pack",
        "pack trajectories into rows, as a store that training reads",
    ),
    "data task": Verb(
        "tw_jax.data.export_task",
        "TaskFileConfig",
        "run_task_file",
        "write solved problems of a task as trajectories",
    ),
    "data stats": Verb(
        "tw_jax.view.data_stats",
        "StatsConfig",
        "run_stats",
        "how parallel trajectories are: table, histograms, page",
    ),
    "data validate": Verb(
        "tw_jax.view.data_validate",
        "ValidateConfig",
        "run_validate",
        "check every trajectory strictly; say where each bad one breaks",
    ),
    "data inspect": Verb(
        "tw_jax.view.data_inspect",
        "InspectConfig",
        "run_inspect",
        "show single trajectories, threads side by side",
    ),
    "view": Verb(
        "tw_jax.view.browse",
        "ViewConfig",
        "run_view",
        "build the report of a quickstart",
        folder_key="run_dir",
    ),
    "view run": Verb(
        "tw_jax.view.run_page",
        "RunViewConfig",
        "view_run",
        "a page of a run's metrics and sampled rollouts",
        folder_key="run_dir",
    ),
    "plan": Verb(
        "tw_jax.planning.plan",
        "PlanConfig",
        "run_plan",
        "memory, work, traffic and a bracket of the step time, before anything runs",
    ),
    "import": Verb(
        "tw_jax.train.import_export",
        "ImportConfig",
        "run_import",
        "make a run's folder of published weights",
        folder_key="model",
        folder_name="folder, hub id or URL of weights",
    ),
    "export": Verb(
        "tw_jax.train.import_export",
        "ExportConfig",
        "run_export",
        "write a run's model as safetensors that other libraries load",
        folder_key="run_dir",
    ),
    "doctor": Verb(
        "tw_jax.doctor", "DoctorConfig", "run_doctor", "say what this machine has and lacks"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the process's exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except UserError as error:
        if os.environ.get("TW_JAX_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"tw-jax: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("\ntw-jax: interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    except BrokenPipeError:  # the reader of our output has gone (`tw-jax sft --help | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview(list(VERBS)))
        return 0
    if words[0] == "--version":
        print(f"tw-jax {tw_jax.__version__}")
        return 0
    name, *rest = words
    group = [verb for verb in VERBS if verb.startswith(f"{name} ")]
    if name in VERBS and not (rest and f"{name} {rest[0]}" in VERBS):
        group = []  # a verb that is one word and the beginning of others
    if group:
        if not rest or rest[0] in ("-h", "--help"):
            print(_overview(group))
            return 0
        name, *rest = (f"{name} {rest[0]}", *rest[1:])
    if name not in VERBS:
        close = difflib.get_close_matches(name, group or VERBS, 1)
        known = ", ".join(group or VERBS)
        hint = f"did you mean {close[0]!r}?" if close else f"known verbs: {known}"
        raise UserError(f"unknown verb {name!r}; {hint}")
    config_class, function = _load(VERBS[name])
    if {"-h", "--help"} & set(rest):
        print(verb_help(name, VERBS[name], config_class), flush=True)
        return 0
    wants_print = "--print-config" in rest
    settings = [_flag(config_class, word) for word in rest if word != "--print-config"]
    path, overrides = _split(name, settings)
    config = configs.load_config(config_class, path, overrides)
    if wants_print:
        print(configs.to_yaml(config), end="", flush=True)
        return 0
    # Here, since it imports JAX, which help and mistakes do not wait for.
    from tw_jax.parallel.processes import join_processes

    join_processes(os.environ)
    result = function(config)
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _load(verb: Verb) -> tuple[type, Callable[[Any], Any]]:
    try:
        return verb.load()
    except ModuleNotFoundError as error:
        if (error.name or "tw_jax").partition(".")[0] == "tw_jax":
            raise  # a bug of ours keeps its traceback
        raise UserError(
            f"the Python package {error.name!r} is not installed; "
            "`tw-jax doctor` lists what is missing and how to install it"
        ) from error


def _split(verb: str, words: list[str]) -> tuple[str | None, list[str]]:
    """Parts the words behind a verb into an optional YAML file and `key=value` overrides."""
    if folder_key := VERBS[verb].folder_key:
        words = [f"{folder_key}={w}" if _names_folder(w) else w for w in words]
    paths = [word for word in words if "=" not in word]
    for word in paths:
        if word.startswith("-"):
            raise UserError(
                f"unknown option {word!r}; settings are written key=value, see `tw-jax {verb} -h`"
            )
    if len(paths) > 1:
        raise UserError(f"one config file at most, but got {' and '.join(paths)}")
    return (paths[0] if paths else None), [word for word in words if "=" in word]


def _flag(config_class: type, word: str) -> str:
    """`--dry-run` is short for `dry_run=true`, for every setting that is true or false."""
    name = word.removeprefix("--").replace("-", "_")
    field = fields_of(config_class).get(name)
    is_flag = word.startswith("--") and field is not None and field.hint is bool
    return f"{name}=true" if is_flag else word


def _names_folder(word: str) -> bool:
    """Whether a word is neither option, setting nor YAML file."""
    return not (word.startswith("-") or "=" in word or word.endswith((".yaml", ".yml")))


def _overview(names: Sequence[str]) -> str:
    lines = ["usage: tw-jax VERB [config.yaml] [a.b=value ...] [--print-config] [--help]", ""]
    lines += ["Train and run language models that think in parallel.", "", "verbs:"]
    lines += [f"  {name:<16}{VERBS[name].summary}" for name in names]
    lines += ["", "`tw-jax VERB --help` explains every setting of a verb."]
    return "\n".join(lines)


def verb_help(name: str, verb: Verb, config_class: type) -> str:
    """The help text of a verb: its usage and every field of its configuration, explained."""
    folder = f" | {verb.folder_name}" if verb.folder_key else ""
    lines = [
        f"usage: tw-jax {name} [config.yaml{folder}] [a.b=value ...] [--print-config] [--help]",
        "",
        f"{verb.summary[0].upper()}{verb.summary[1:]}.",
        "",
        "Settings, in the YAML file or as key=value (the command line wins):",
    ]
    for row in configs.describe(config_class):
        if row.is_section:
            null = f" (default: {row.default})" if row.default else ""
            lines += ["", f"[{row.key}]{null}"]
        else:
            lines.append(f"  {row.key}: {row.type_name} = {row.default}")
        indent = "" if row.is_section else "      "
        lines += textwrap.wrap(
            row.explanation, 100, initial_indent=indent, subsequent_indent=indent
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
