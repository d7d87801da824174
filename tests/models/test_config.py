import dataclasses
import json

import pytest

from tw_jax.errors import UserError
from tw_jax.models import PRESETS, Qwen3Config, RopeScaling, preset

YARN = RopeScaling("yarn", 4.0, 512, 32.0, 1.0, None, None, None, True)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("scaling", [None, YARN])
def test_a_record_gives_the_configuration_back(name, scaling):
    config = dataclasses.replace(PRESETS[name], rope_scaling=scaling)
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    assert Qwen3Config.from_dict(record, origin="checkpoint 7") == config


def test_records_from_before_rope_scaling_and_experts_are_read():
    record = dataclasses.asdict(PRESETS["tiny"])
    del record["rope_scaling"], record["moe"]
    assert Qwen3Config.from_dict(record, origin="checkpoint 7") == PRESETS["tiny"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, "checkpoint 7: unknown fields: depth"),
        ({"moe": {"num_experts": 4}}, "missing fields: moe.moe_intermediate_size"),
        ({"moe": 4}, "moe=4: expected a record"),
        ({"head_dim": 7}, "checkpoint 7: head_dim=7"),
    ],
)
def test_bad_records_name_the_field(change, message):
    with pytest.raises(UserError, match=message):
        Qwen3Config.from_dict(dataclasses.asdict(PRESETS["tiny"]) | change, origin="checkpoint 7")
    bare = dataclasses.asdict(PRESETS["tiny"])
    del bare["head_dim"]
    with pytest.raises(UserError, match="missing fields: head_dim"):
        Qwen3Config.from_dict(bare, origin="checkpoint 7")


def test_no_field_has_a_default():
    for kind in (Qwen3Config, RopeScaling, type(PRESETS["tiny-moe"].moe)):
        for field in dataclasses.fields(kind):
            assert field.default is dataclasses.MISSING
            assert field.default_factory is dataclasses.MISSING


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "ntk"}, "kind='ntk'"),
        ({"factor": 0.5}, "factor=0.5: must be at least 1"),
        ({"beta_fast": None}, "beta_fast: yarn needs a value"),
        ({"kind": "linear"}, "linear scaling reads none"),
        ({"attention_factor": -1.0}, "attention_factor=-1.0: must be positive"),
    ],
)
def test_bad_rope_scaling_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(YARN, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "moe.num_experts=0"),
        ({"num_experts_per_tok": 9}, "moe.num_experts_per_tok=9 exceeds"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1"),
    ],
)
def test_bad_experts_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(preset("tiny-moe").moe, **change)
