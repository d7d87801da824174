"""The shipped character tokenizer."""

import string

import pytest

from tw_jax.data.text import encode_prompt
from tw_jax.tasks import character_tokenizer
from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS

TOKENIZER = character_tokenizer.load_tokenizer()


def test_shipped_files_are_what_the_builder_writes(tmp_path) -> None:
    character_tokenizer.build_tokenizer().save_pretrained(tmp_path)
    shipped = character_tokenizer.TOKENIZER_DIR
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {file.name for file in shipped.iterdir()}
    for name in names:
        assert (tmp_path / name).read_text() == (shipped / name).read_text(), (
            f"{name} differs: run `python -m tw_jax.tasks.character_tokenizer {shipped}`"
        )


def test_vocabulary() -> None:
    assert len(TOKENIZER) == 108
    special = [TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id]
    assert [*special, TOKENIZER.unk_token_id] == [0, 1, 2, 3]
    assert TOKENIZER.convert_tokens_to_ids(list(THREADWEAVER_TAGS)) == list(range(4, 12))


def test_every_printable_character_is_one_token() -> None:
    text = "\n " + string.digits + string.ascii_letters + string.punctuation
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert ids == list(range(12, 108))
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("tag", THREADWEAVER_TAGS)
def test_a_literal_tag_in_user_text_stays_plain(tag: str) -> None:
    ids = encode_prompt(TOKENIZER, f"3{tag}4")
    characters = [TOKENIZER.convert_tokens_to_ids(c) for c in f"3{tag}4"]
    assert ids.tolist() == [TOKENIZER.bos_token_id, *characters]
