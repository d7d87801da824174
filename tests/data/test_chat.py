"""Chats: the template's ids, published strings, and questions that spell control tokens."""

import json
import pathlib
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_text import QWEN3_DIR
from tests.small_tokenizer import bpe_tokenizer
from tw_jax.data.chat import Turn, encode_chat, read_chat_text, read_turns
from tw_jax.data.columns import ColumnsConfig
from tw_jax.data.records import RejectedRecord
from tw_jax.data.rejects import Rejects
from tw_jax.data.text import encode_response
from tw_jax.data.trajectory_file import TrajectoryRecord, read_trajectories, write_trajectories
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema
from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS
from tw_jax.trajectory.vocabulary import add_control_tokens

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLOCK = (
    "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>\n"
    "<Thread>\n1: x\n</Thread><Thread>\n2: y\n</Thread>\n</Parallel>\n"
)
RESPONSE = f"<think>\nSplit.\n{BLOCK}Done.\n</think>\n\nThe answer is \\boxed{{3}}."


@pytest.fixture(scope="module", params=["small", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "small":
        published: Any = bpe_tokenizer()
        published.add_special_tokens(
            {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
            replace_extra_special_tokens=False,
        )
        published.eos_token = "<|im_end|>"
        published.chat_template = QWEN_TEMPLATE
    elif QWEN3_DIR.exists():
        published = transformers.AutoTokenizer.from_pretrained(str(QWEN3_DIR))
    else:
        pytest.skip(f"no Qwen3 tokenizer at {QWEN3_DIR}")
    return add_control_tokens(published, THREADWEAVER_TAGS)[0]


def chat_text(question: str, response: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"


def test_a_chat_has_the_templates_ids(tokenizer: Any) -> None:
    turns = [Turn("system", "Be brief."), Turn("user", "What is 1+1?")]
    messages = [{"role": t.role, "content": t.content} for t in turns]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    want = tokenizer(rendered, add_special_tokens=False).input_ids
    assert encode_chat(tokenizer, turns).tolist() == want


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(
        st.one_of(
            st.sampled_from(
                [*THREADWEAVER_TAGS, "<|im_start|>", "<|im_end|>", "<think>", "</think>", "\n", "<"]
            ),
            st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=6),
        ),
        max_size=6,
    )
)
def test_no_question_brings_control_tokens(tokenizer: Any, pieces: list[str]) -> None:
    added = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    frame = [i for i in encode_chat(tokenizer, [Turn("user", "q")]).tolist() if i in added]
    ids = encode_chat(tokenizer, [Turn("user", "".join(pieces))]).tolist()
    assert [i for i in ids if i in added] == frame


def test_a_published_set_loads_as_it_is(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    question = "Is a<b when <Parallel>? Let's think step by step"
    rows = [
        {"uuid": "a-0", "question": question, "qwen_text": chat_text(question, RESPONSE)},
        {"uuid": "a-1", "question": question, "qwen_text": "<|im_start|>user\nno end"},
        {"uuid": "a-2", "question": question, "qwen_text": chat_text(question, "")},
    ]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    schema, rejects = make_schema("threadweaver", tokenizer), Rejects(tmp_path / "rejects.jsonl")
    columns = ColumnsConfig(prompt="question", id="uuid")
    (item,) = read_trajectories(path, schema, tokenizer, rejects, columns)
    assert item.record == TrajectoryRecord(
        question, RESPONSE, id="a-0", chat=(Turn("user", question),)
    )
    assert len(item.trajectory.blocks) == 1 and schema.validate(item.trajectory) == ()
    prompt = item.trajectory.tokens[: item.trajectory.prompt_len]
    assert prompt.tolist() == encode_chat(tokenizer, [Turn("user", question)]).tolist()
    rest = item.trajectory.tokens[item.trajectory.prompt_len :]
    assert rest.tolist() == encode_response(tokenizer, RESPONSE, schema.eos_id).tolist()
    assert rejects.counts == {"chat_text": 1, "empty_field": 1}
    # What is written of it is read as the same.
    copy = tmp_path / "copy.jsonl"
    write_trajectories(copy, [item.record])
    (again,) = read_trajectories(copy, schema, tokenizer, rejects)
    assert again.record == item.record
    assert again.trajectory.tokens.tolist() == item.trajectory.tokens.tolist()


def test_columns_name_the_fields(tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer()
    schema, rejects = make_schema("threadweaver", tokenizer), Rejects(tmp_path / "rejects.jsonl")
    path = tmp_path / "data.jsonl"
    lines = [
        {"q": "1+1=", "r": "2", "gold": "2", "key": 7, "prompt": "other", "qwen_text": "other"},
        {"q": [{"role": "user", "content": "1+1="}], "r": "2"},
        {"q": "3+3=", "r": "6", "key": 7},
        {"q": "3+3=", "r": "6", "key": None},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = ColumnsConfig(prompt="q", response="r", answer="gold", id="key")
    items = list(read_trajectories(path, schema, tokenizer, rejects, columns))
    assert [item.record for item in items] == [
        TrajectoryRecord("1+1=", "2", "2", 7),
        TrajectoryRecord("1+1=", "2", chat=(Turn("user", "1+1="),)),
        TrajectoryRecord("3+3=", "6"),
    ]
    assert rejects.counts == {"duplicate_id": 1}
    as_chat = ColumnsConfig(prompt="q", response="r", as_chat=True)
    (first, *_) = read_trajectories(path, schema, tokenizer, rejects, as_chat)
    assert first.record.chat == (Turn("user", "1+1="),)


def test_roles_are_known_and_somebody_asks() -> None:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    for bad in (turns, [{"role": "x", "content": "1+1?"}]):
        with pytest.raises(RejectedRecord) as caught:
            read_turns(bad, "prompt")
        assert (caught.value.kind, caught.value.field) == ("chat_role", "prompt")
    assert len(read_turns([*turns, turns[0]], "prompt")) == 3


def test_chat_text_is_read_turn_by_turn() -> None:
    question = "two\nlines <|im_end|> in <|im_start|>user\n it"
    text = f"<|im_start|>system\nBe brief.<|im_end|>\n{chat_text(question, 'yes')}"
    turns, response = read_chat_text(text, "qwen_text")
    assert turns == (Turn("system", "Be brief."), Turn("user", question))
    assert response == "yes"
    for bad in ("", "hello", "<|im_start|>user\nhello<|im_end|>\n"):
        with pytest.raises(RejectedRecord, match="begins neither"):
            read_chat_text(bad, "qwen_text")
