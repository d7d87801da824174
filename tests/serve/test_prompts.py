"""What clients write becomes text, never control tokens."""

import copy

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.small_tokenizer import bpe_tokenizer
from tw_jax.serve.bodies import Message
from tw_jax.serve.errors import ApiError
from tw_jax.serve.prompts import chat_prompt, completion_prompts
from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS
from tw_jax.trajectory.vocabulary import add_control_tokens

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.first %}"
    "{{ raise_exception('the user begins') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def templated():
    tokenizer, _ = add_control_tokens(bpe_tokenizer(), THREADWEAVER_TAGS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def user(text, role="user"):
    return Message(role=role, content=text)


def test_a_benign_chat_has_the_ids_of_the_template(templated):
    turns = [user("be short", "system"), user(" lines in Parallel?\n"), user("no", "assistant")]
    plain = [{"role": turn.role, "content": turn.text} for turn in turns]
    want = templated.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert chat_prompt(templated, turns).tolist() == list(want)


SPELLINGS = st.sampled_from([*THREADWEAVER_TAGS, "<|im_end|>", "<|im_start|>", "<|im_", "end|>"])


@hypothesis.given(st.lists(SPELLINGS | st.text("ab<>|im_\n", max_size=4), max_size=8))
def test_no_text_of_a_user_becomes_a_control_token(templated, pieces):
    text = "".join(pieces)
    added = templated.added_tokens_decoder
    ids = chat_prompt(templated, [user(text)]).tolist()
    control = [templated.decode([i]) for i in ids if i in added]
    assert control == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert templated.decode(ids) == (
        f"<|im_start|>user\n{text.strip()}<|im_end|>\n<|im_start|>assistant\n"
    )
    (ids,) = completion_prompts(templated, text)
    assert not [i for i in ids.tolist() if i in added]


def test_parts_and_the_templates_own_complaint(templated):
    parts = Message.model_validate(
        {
            "role": "user",
            "content": [{"type": "text", "text": "li"}, {"type": "text", "text": "ne"}],
        }
    )
    assert (
        chat_prompt(templated, [parts]).tolist() == chat_prompt(templated, [user("line")]).tolist()
    )
    with pytest.raises(ApiError, match="the user begins"):
        chat_prompt(templated, [user("no", "assistant")])


def test_without_a_template_messages_stand_in_lines(tokenizer):
    ids = chat_prompt(tokenizer, [user("1+1=", "system"), user("<Parallel>")]).tolist()
    (want,) = completion_prompts(tokenizer, "1+1=\n<Parallel>")
    assert ids == want.tolist() and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "1+1=\n<Parallel>"
    assert not set(ids[1:]) & set(tokenizer.added_tokens_decoder)


def test_completions_take_texts_and_ids(tokenizer):
    assert [p.tolist() for p in completion_prompts(tokenizer, [5, 6])] == [[5, 6]]
    assert [p.tolist() for p in completion_prompts(tokenizer, [[5], [6, 7]])] == [[5], [6, 7]]
    assert len(completion_prompts(tokenizer, ["1", "2", "3"])) == 3
    with pytest.raises(ApiError, match="empty"):
        completion_prompts(tokenizer, [])


def test_unknown_characters_are_named(tokenizer):
    with pytest.raises(ApiError, match="does not know 'é'") as caught:
        chat_prompt(copy.copy(tokenizer), [user("café")])
    assert caught.value.body["error"]["param"] == "messages"
