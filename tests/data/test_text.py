"""Encoding: user text never becomes a control token, response tags always do."""

import concurrent.futures
import pathlib
import unicodedata
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.small_tokenizer import bpe_tokenizer
from tw_jax.data.text import encode_prompt, encode_response, encode_user_text
from tw_jax.errors import UserError
from tw_jax.tasks.character_tokenizer import build_tokenizer, load_tokenizer
from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS
from tw_jax.trajectory.vocabulary import add_control_tokens

QWEN3_DIR = pathlib.Path(__file__).parents[3] / "shared" / "qwen3_tokenizer"
OTHER_CONTROL = ("<eos>", "<bos>", "<pad>", "<unk>", "<think>", "</think>", "<|im_end|>")
OTHER_CONTROL += ("<|im_start|>", "<|endoftext|>")

# Texts made of tags, pieces of tags and anything else.
pieces = st.one_of(
    st.sampled_from(THREADWEAVER_TAGS + OTHER_CONTROL),
    st.sampled_from(
        ["<", "</", ">", "Thread", "<Thread", "Parallel>", "<|", "|>", "\n", " ", "1:"]
    ),
    st.text(max_size=8),
    st.text(alphabet="0123456789+*=#,;:>\n <", max_size=8),
)
texts = st.lists(pieces, max_size=8).map("".join)


@pytest.fixture(scope="module", params=["characters", "built", "qwen3"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shipped tokenizer, and published ones as a run's folder holds them after an import."""
    if request.param == "characters":
        return load_tokenizer()
    if request.param == "built":
        published = bpe_tokenizer()
    elif QWEN3_DIR.exists():
        published = transformers.AutoTokenizer.from_pretrained(str(QWEN3_DIR))
    else:
        pytest.skip(f"no Qwen3 tokenizer at {QWEN3_DIR}")
    folder = tmp_path_factory.mktemp("tokenizer")
    add_control_tokens(published, THREADWEAVER_TAGS)[0].save_pretrained(str(folder))
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def added_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}


def represented(tokenizer: Any, text: str) -> str:
    """The text as far as the tokenizer can represent it."""
    if tokenizer.backend_tokenizer.normalizer is not None:
        return unicodedata.normalize("NFC", text)
    known = set(tokenizer.get_vocab())
    return "".join(c if c in known else "<unk>" for c in text)


def decoded(tokenizer: Any, ids: np.ndarray) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # A combining mark behind a control token stays apart from it in the ids only.
    return unicodedata.normalize("NFC", text)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_user_text_is_plain_and_comes_back(tokenizer: Any, text: str) -> None:
    ids = encode_user_text(tokenizer, text)
    assert ids.dtype == np.int32
    assert added_ids(tokenizer).isdisjoint(ids.tolist())
    assert decoded(tokenizer, ids) == represented(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_a_prompt_is_the_leading_tokens_and_the_user_text(tokenizer: Any, text: str) -> None:
    ids = encode_prompt(tokenizer, text)
    leading = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert ids.dtype == np.int32
    assert ids.tolist() == leading + encode_user_text(tokenizer, text).tolist()


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(max_size=40), texts))
def test_text_without_control_tokens_is_encoded_as_the_tokenizer_does(
    tokenizer: Any, text: str
) -> None:
    plain = tokenizer(text, add_special_tokens=False).input_ids
    assume(added_ids(tokenizer).isdisjoint(plain) and "<unk>" not in text)
    assert encode_user_text(tokenizer, text).tolist() == plain
    assert encode_prompt(tokenizer, text).tolist() == tokenizer(text).input_ids


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(pieces, max_size=8))
def test_response_tags_become_control_tokens(tokenizer: Any, parts: list[str]) -> None:
    text = "".join(parts)
    eos = tokenizer.eos_token_id
    *body, last = encode_response(tokenizer, text, eos).tolist()
    assert last == eos
    tag_ids = tokenizer.convert_tokens_to_ids(list(THREADWEAVER_TAGS))
    for tag, tag_id in zip(THREADWEAVER_TAGS, tag_ids, strict=True):
        assert body.count(tag_id) == text.count(tag)
    boundary = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    assert boundary.isdisjoint(body)
    assert decoded(tokenizer, np.array(body, np.int32)) == represented(tokenizer, text)


def test_a_canonical_block_is_encoded_piece_by_piece(tokenizer: Any) -> None:
    text = "<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n</Outlines>\n<Thread>\n1: b\n</Thread>"
    ids = encode_response(tokenizer, text, tokenizer.eos_token_id)
    expected = []
    for piece in [
        "<Parallel>",
        "\n",
        "<Outlines>",
        "\n",
        "<Outline>",
        "1",
        ":",
        " a",
        "</Outline>",
    ]:
        expected += tokenizer(piece, add_special_tokens=False).input_ids
    assert ids[: len(expected)].tolist() == expected


def test_half_a_character_is_a_user_error(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        encode_prompt(tokenizer, "ab\ud800")
    with pytest.raises(UserError, match="lone surrogate at character 0"):
        encode_response(tokenizer, "\udc00", 1)


def test_the_tokenizers_own_settings_do_not_matter() -> None:
    tokenizer = build_tokenizer()
    tokenizer.split_special_tokens = True
    ids = encode_response(tokenizer, "<Thread>", tokenizer.eos_token_id)
    assert ids.tolist() == [tokenizer.convert_tokens_to_ids("<Thread>"), tokenizer.eos_token_id]


def test_a_vocabulary_that_holds_tags_as_plain_words_is_refused() -> None:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "<Thread>": 2}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<Thread>"]})
    assert encode_user_text(tokenizer, "a").tolist() == [1]
    with pytest.raises(UserError, match=r"control tokens \[2\]"):
        encode_user_text(tokenizer, "a <Thread>")


def test_encoding_from_several_threads(tokenizer: Any) -> None:
    """Prompts and responses encoded at once do not disturb each other."""
    text = "a<Thread>b</Thread>" * 20
    prompt = encode_prompt(tokenizer, text).tolist()
    response = encode_response(tokenizer, text, 1).tolist()

    def work(i: int) -> bool:
        if i % 2:
            return encode_prompt(tokenizer, text).tolist() == prompt
        return encode_response(tokenizer, text, 1).tolist() == response

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(400)))
