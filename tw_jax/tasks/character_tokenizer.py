"""The character-level tokenizer that the small tasks share, in Hugging Face's format.

Printable ASCII and the line break are one token each, so digits never merge; the control tags of
the ThreadWeaver schema are special tokens, as they are after being added to a Qwen3 vocabulary.
The files in `tokenizer/` are what `python -m tw_jax.tasks.character_tokenizer DIR` writes; a test
keeps the two equal.
"""

import pathlib
import string
import sys

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS

TOKENIZER_DIR = pathlib.Path(__file__).parent / "tokenizer"
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
_CHARACTERS = "\n " + string.digits + string.ascii_letters + string.punctuation


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Builds the tokenizer: 4 special tokens, 8 control tags, 96 characters."""
    pieces = [*_SPECIAL, *THREADWEAVER_TAGS, *_CHARACTERS]
    backend = tokenizers.Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    every_character = pre_tokenizers.Split(tokenizers.Regex(r"(.|\n)"), behavior="isolated")
    backend.pre_tokenizer = every_character  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", special_tokens=[("<bos>", pieces.index("<bos>"))]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": list(THREADWEAVER_TAGS)})
    return tokenizer


def load_tokenizer(
    path: str | pathlib.Path = TOKENIZER_DIR,
) -> transformers.PreTrainedTokenizerFast:
    """Loads a tokenizer folder the way any Hugging Face tokenizer is loaded."""
    return transformers.AutoTokenizer.from_pretrained(str(path))


if __name__ == "__main__":
    build_tokenizer().save_pretrained(sys.argv[1])
