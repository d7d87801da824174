import dataclasses
import pathlib
from typing import Literal

import hypothesis
import pytest
from hypothesis import strategies as st

from tw_jax import config as configs
from tw_jax import config_fields
from tw_jax.config import ConfigError, load_config, to_yaml


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings of the optimizer.

    Attributes:
      learning_rate: peak learning rate,
        reached after the warm-up.
      betas: decay rates of the two moments.
      warmup_steps: steps of linear warm-up.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 10

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError("learning_rate must be positive")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Settings of the evaluation.

    Attributes:
      samples: samples per problem.
    """

    samples: int = 4


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings of a run.

    Attributes:
      name: what to call the run.
      steps: optimizer steps.
      seed: of everything random.
      optimizer: how to step.
      evaluation: how to measure; null not at all.
      normaliser: of advantages.
      out: where to write.
      tags: free words.
      layers: indices of layers, or all.
      use_kl: whether to add the penalty.
      note: anything.

    Example:
      seed: not a field's explanation.
    """

    name: str
    steps: int = 100
    seed: int | None = None
    optimizer: Optimizer = Optimizer(learning_rate=0.5)
    evaluation: Evaluation | None = None
    normaliser: Literal["none", "group_std", "off"] = "none"
    out: pathlib.Path = pathlib.Path("runs")
    tags: tuple[str, ...] = ()
    layers: tuple[int, ...] | Literal["all"] = "all"
    use_kl: bool = False
    note: str | None = None


def load(tmp_path, text: str, *overrides: str) -> Run:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_config(Run, file, overrides)


def error_of(tmp_path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path), "DIR")


def test_defaults_file_and_command_line_merge(tmp_path):
    run = load(
        tmp_path,
        "name: first\noptimizer:\n  warmup_steps: 3\nevaluation: {samples: 2}\ntags: [a, b]\n",
        "optimizer.betas=[0.8, 1]",
        "name=second",
        "evaluation.samples=8",
    )
    # The field's own default (0.5), not the class's (1e-3), holds beside what is overridden.
    assert run.optimizer == Optimizer(learning_rate=0.5, betas=(0.8, 1.0), warmup_steps=3)
    assert (run.name, run.tags, run.evaluation) == ("second", ("a", "b"), Evaluation(8))


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("steps=7", "steps", 7),
        ("--steps=7", "steps", 7),
        ("seed=null", "seed", None),
        ("seed=None", "seed", None),
        ("use_kl=true", "use_kl", True),
        ("normaliser=off", "normaliser", "off"),
        ("out=/a/b: c", "out", pathlib.Path("/a/b: c")),
        ("tags=[]", "tags", ()),
        ("tags=[x, 'null']", "tags", ("x", "null")),
        ("layers=[1, 2]", "layers", (1, 2)),
        ("layers=all", "layers", "all"),
        ("name=12", "name", "12"),
        ("name=", "name", ""),
        ("name=[what is 2: 3? #1", "name", "[what is 2: 3? #1"),
        ("name='quoted'", "name", "quoted"),
        ("note=None", "note", None),
        ("note='None'", "note", "None"),
        ("note=yes", "note", "yes"),
        ("evaluation={samples: 3}", "evaluation", Evaluation(3)),
        ("evaluation=null", "evaluation", None),
    ],
)
def test_command_line_values(word, field, value):
    run = load_config(Run, None, ["name=x", "evaluation.samples=9", word])
    assert getattr(run, field) == value


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-4", ".1e-3"])
def test_exponents_are_numbers(tmp_path, text):
    word = f"optimizer.learning_rate={text}"
    assert load(tmp_path, f"name: x\noptimizer: {{learning_rate: {text}}}") == load_config(
        Run, None, ["name=x", word]
    )
    assert load_config(Run, None, ["name=x", word]).optimizer.learning_rate == 1e-4


def test_integers_become_floats_and_a_heading_may_be_empty(tmp_path):
    run = load(tmp_path, "name: x\noptimizer:\n", "optimizer.learning_rate=2")
    assert type(run.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("nam: x", (), ["DIR/run.yaml:1", "unknown key 'nam'", "'name'"]),
        (
            "name: x\noptimizer:\n  lerning_rate: 1",
            (),
            ["DIR/run.yaml:3", "'optimizer.lerning_rate'", "'optimizer.learning_rate'"],
        ),
        ("name: x", ("learning_rate=1",), ["command line", "'optimizer.learning_rate'"]),
        ("name: x", ("zzz=1",), ["command line", "'zzz'", "known keys here: name, steps"]),
        ("name: x\nsteps: many", (), ["DIR/run.yaml:2", "'steps' must be int, not 'many'"]),
        ("name: x", ("steps=1.5",), ["command line", "'steps' must be int, not 1.5"]),
        ("name: x", ("steps=true",), ["'steps' must be int, not True"]),
        ("name: x", ("use_kl=1",), ["'use_kl' must be bool, not 1"]),
        ("name: x", ("seed=a",), ["'seed' must be int | null, not 'a'"]),
        ("name: x", ("normaliser=std",), ["none | group_std | off", "'std'"]),
        ("name: x", ("optimizer.betas=[1]",), ["[float, float]", "[1]"]),
        ("name: x", ("tags=a",), ["list of text"]),
        ("name: 5", (), ["'name' must be text, not 5"]),
        ("name: x", ("optimizer=3",), ["'optimizer' must be section, not 3"]),
        ("name: x", ("steps.inner=3",), ["'steps' must be int", "inner"]),
        ("name: x", ("steps=null",), ["'steps' must be int, not null"]),
        ("steps: 3", (), ["'name' is required (text)", "name=..."]),
        ("name: x\nname: y", (), ["DIR/run.yaml:2", "'name' is given twice (first on line 1)"]),
        ("name: x\n1: y", (), ["DIR/run.yaml:2", "keys must be text"]),
        ("name: [x", (), ["DIR/run.yaml:1", "not valid YAML"]),
        ("name: !!python/object:os.system x", (), ["not valid YAML"]),
        ("- x", (), ["DIR/run.yaml", "key: value"]),
        ("name: x\ntags: &t [*t]", (), ["DIR/run.yaml:2: not valid YAML"]),
        ("name: x", ("steps",), ["'steps' is not of the form key=value"]),
        ("name: x", ("a..b=1",), ["not of the form key=value"]),
        ("name: x", ("tags=[a",), ["command line", "not valid YAML"]),
        (
            "name: x\noptimizer:\n  learning_rate: 1",
            ("optimizer.learning_rate=-1",),
            ["command line", "'optimizer'", "learning_rate must be positive"],
        ),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, parts):
    message = error_of(tmp_path, text, *overrides)
    for part in parts:
        assert part in message


def test_class_checks_see_merged_values_only(tmp_path):
    run = load(tmp_path, "name: x\noptimizer: {learning_rate: -1}", "optimizer.learning_rate=1")
    assert run.optimizer.learning_rate == 1


def test_class_checks_name_where_their_field_was_written(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: x\noptimizer:\n  betas: [0.8, 0.9]\n  warmup_steps: 3\n")
    with pytest.raises(ConfigError) as raised:
        load_config(Run, path, ["optimizer.learning_rate=-1"])
    assert str(raised.value).startswith("command line: 'optimizer': learning_rate must be")
    path.write_text("name: x\noptimizer:\n  betas: [0.8, 0.9]\n  learning_rate: -1\n")
    with pytest.raises(ConfigError) as raised:
        load_config(Run, path)
    assert str(raised.value).startswith(f"{path}:4: 'optimizer'")


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="no such file; did you mean .*quickstart.yaml"):
        load_config(Run, tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match="not a UTF-8 text file"):
        load_config(Run, tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Run, tmp_path)


_WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8)
_TRICKY = st.sampled_from(
    ["None", "null", "1e-4", "yes", "012", "1:30", "~", "#", "- a", "2024-01-01"]
)
_FLOATS = st.floats(min_value=1e-30, allow_nan=False)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    st.builds(
        Run,
        name=_WORDS | _TRICKY,
        seed=st.none() | st.integers(),
        optimizer=st.builds(Optimizer, _FLOATS, st.tuples(_FLOATS, _FLOATS), st.integers()),
        evaluation=st.none() | st.builds(Evaluation, st.integers()),
        normaliser=st.sampled_from(["none", "group_std", "off"]),
        out=(_TRICKY | _WORDS).map(pathlib.Path),
        tags=st.lists(_WORDS | _TRICKY).map(tuple),
        layers=st.just("all") | st.lists(st.integers()).map(tuple),
        note=st.none() | _WORDS | _TRICKY,
    )
)
def test_yaml_reads_back_to_the_same(tmp_path_factory, run):
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_text(to_yaml(run), encoding="utf-8")
    assert load_config(Run, file) == run


def test_describe_tells_every_field():
    rows = {row.key: row for row in configs.describe(Run)}
    assert rows["name"].default == "required"
    assert rows["optimizer"].is_section
    assert rows["optimizer"].explanation == "how to step."
    rate = rows["optimizer.learning_rate"]
    assert (rate.type_name, rate.default) == ("float", "0.5")
    assert rate.explanation == "peak learning rate, reached after the warm-up."
    assert rows["evaluation"].default == "null"
    assert rows["evaluation.samples"].default == "4"
    assert rows["layers"].type_name == "list of int | all"
    assert rows["seed"].explanation == "of everything random."
    assert all(row.explanation for row in rows.values())


def test_explanations_are_inherited_and_absent_ones_show():
    @dataclasses.dataclass(frozen=True)
    class Longer(Evaluation):
        """More settings."""

        extra: int = 0

    rows = configs.describe(Longer)
    assert [(row.key, row.explanation) for row in rows] == [
        ("samples", "samples per problem."),
        ("extra", ""),
    ]


def test_unsupported_field_types_are_a_programming_error():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        """Odd."""

        table: dict[str, int] = dataclasses.field(default_factory=dict)

    with pytest.raises(TypeError, match="cannot hold fields of type"):
        load_config(Odd, None, ["table={}"])


# --- shorthands and earlier names -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """Settings of a model.

    Attributes:
      source: what to load.
      width: of something.
    """

    source: str = dataclasses.field(default="tiny", metadata={config_fields.SHORTHAND: True})
    width: int = 1


@dataclasses.dataclass(frozen=True)
class WithModel:
    """Settings of a run.

    Attributes:
      model: which one.
      judge: another one; null for none.
    """

    model: Model = Model()
    judge: Model | None = None


def load_model(tmp_path, text: str, *overrides: str) -> WithModel:
    file = tmp_path / "model.yaml"
    file.write_text(text)
    return load_config(WithModel, file, overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("model: Qwen/Qwen3-8B", [], Model("Qwen/Qwen3-8B")),
        ("model: {source: a, width: 2}", [], Model("a", 2)),
        ("model: {width: 2}", ["model=gs://b/c: #d"], Model("gs://b/c: #d", 2)),
        ("model: a", ["model.width=3"], Model("a", 3)),
        ("model: a", ["model={width: 3}"], Model("a", 3)),
        ("model: a", ["model=7"], Model("7")),
        ("model:\n", [], Model()),
    ],
)
def test_a_plain_value_means_the_shorthand_field(tmp_path, text, overrides, expected):
    config = load_model(tmp_path, text, *overrides)
    assert config == WithModel(expected)
    assert load_model(tmp_path, to_yaml(config)) == config


def test_null_turns_a_section_off_that_has_a_shorthand(tmp_path):
    assert load_model(tmp_path, "judge: a").judge == Model("a")
    assert load_model(tmp_path, "judge: a", "judge=null").judge is None
    assert load_model(tmp_path, "judge: a", "judge='null'").judge == Model("null")


def test_a_wrong_shorthand_names_its_place(tmp_path):
    with pytest.raises(ConfigError, match=r"model.yaml:2: 'model.source' must be text, not 3"):
        load_model(tmp_path, "\nmodel: 3")
    with pytest.raises(ConfigError, match=r"model.yaml:1: 'model.width' must be int, not 'x'"):
        load_model(tmp_path, "model: {width: x}")


def test_a_lone_value_for_a_list_is_answered_with_the_list():
    @dataclasses.dataclass(frozen=True)
    class Files:
        """Settings.

        Attributes:
          inputs: files.
        """

        inputs: tuple[str, ...] = ()

    with pytest.raises(configs.ConfigError, match=r"list of text, not 'a.jsonl'; write .a.jsonl."):
        configs.load_config(Files, None, ["inputs=a.jsonl"])
