"""Control tokens are added behind a vocabulary, with the pieces that their rows start from."""

import pathlib
from typing import Any

import pytest
import transformers

from tests.small_tokenizer import bpe_tokenizer
from tw_jax.errors import UserError
from tw_jax.tasks.character_tokenizer import load_tokenizer
from tw_jax.trajectory.schemas import make_schema, schema_tags
from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS
from tw_jax.trajectory.vocabulary import add_control_tokens, ids_needed

QWEN3_DIR = pathlib.Path(__file__).parents[3] / "shared" / "qwen3_tokenizer"


@pytest.fixture(scope="module", params=["built", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "built":
        return bpe_tokenizer()
    if not QWEN3_DIR.exists():
        pytest.skip(f"no Qwen3 tokenizer at {QWEN3_DIR}")
    return transformers.AutoTokenizer.from_pretrained(str(QWEN3_DIR))


def test_tags_follow_the_vocabulary(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    size, special = len(tokenizer), dict(tokenizer.special_tokens_map)
    added, pieces = add_control_tokens(tokenizer, THREADWEAVER_TAGS)
    assert len(tokenizer) == size, "the tokenizer that was given stays as it is"
    new_ids = list(range(size, size + len(THREADWEAVER_TAGS)))
    assert added.convert_tokens_to_ids(list(THREADWEAVER_TAGS)) == new_ids == list(pieces)
    assert ids_needed(added) == size + len(THREADWEAVER_TAGS)
    for tag, ids in zip(THREADWEAVER_TAGS, pieces.values(), strict=True):
        assert ids and max(ids) < size
        assert tokenizer.decode(list(ids)) == tag.strip("<>")
        assert added(f"a{tag}b", add_special_tokens=False).input_ids.count(new_ids[0]) == (
            tag == "<Parallel>"
        )
        text = f"x\n{tag}y"
        assert added.decode(added(text, add_special_tokens=False).input_ids) == text
    # What was special before still is, and the folder that is written says all of it.
    added.save_pretrained(str(tmp_path))
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for one in (added, again):
        assert special.items() <= dict(one.special_tokens_map).items()
        assert set(tokenizer.all_special_ids) < set(one.all_special_ids)
        assert one.convert_tokens_to_ids(list(THREADWEAVER_TAGS)) == new_ids
        assert one.chat_template == tokenizer.chat_template
    schema = make_schema("threadweaver", again)
    assert schema.tag_ids.tolist() == new_ids


def test_qwen3_pieces(tokenizer: Any) -> None:
    if len(tokenizer) < 1000:
        pytest.skip("the pieces of the published vocabulary")
    _, pieces = add_control_tokens(tokenizer, THREADWEAVER_TAGS)
    words = {i: tokenizer.convert_ids_to_tokens(list(ids)) for i, ids in pieces.items()}
    assert words[151_669] == ["Parallel"]
    assert words[151_672] == ["/", "Out", "lines"]
    assert words[151_676] == ["/", "Thread"]


def test_only_missing_tags_are_added(tokenizer: Any) -> None:
    some, _ = add_control_tokens(tokenizer, THREADWEAVER_TAGS[:3])
    all_tags, pieces = add_control_tokens(some, THREADWEAVER_TAGS)
    assert len(pieces) == len(THREADWEAVER_TAGS) - 3
    assert len(all_tags) == len(tokenizer) + len(THREADWEAVER_TAGS)


def test_a_tokenizer_that_has_them_all_is_returned() -> None:
    tokenizer = load_tokenizer()
    assert add_control_tokens(tokenizer, THREADWEAVER_TAGS) == (tokenizer, {})


def test_tags_of_a_schema() -> None:
    assert schema_tags("threadweaver") == THREADWEAVER_TAGS
    with pytest.raises(UserError, match="unknown schema 'x'; known: apr, native, threadweaver"):
        schema_tags("x")
