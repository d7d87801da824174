"""Between text and ids, control tags included."""

import numpy as np


def ids_of(tokenizer, text):
    return np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int32)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)
