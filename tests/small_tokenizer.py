"""A small byte-level BPE tokenizer of Qwen's kind, without control tags."""

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

_TEXT = (
    "Parallel threads outline what they think; the Thread outlines lines in Parallel. 1: 2: " * 4
)


def bpe_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """300 pieces at most, of which three are special."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([_TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
