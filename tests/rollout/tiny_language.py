"""Tiny languages, a token a piece, and models that speak them.

A model's head holds a table of which token likes to follow which; random layers perturb it, so
every logit depends on the whole context and a wrong cache entry or position shows at once.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.models import graphdef, init_params, preset
from tw_jax.trajectory.schema import TokenClasses

CONFIG = preset(
    "tiny",
    vocab_size=24,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    head_dim=8,
    rope_theta=100.0,
    tie_word_embeddings=False,
    max_position_embeddings=512,
    initializer_range=0.17,
)


def pieces_with(tags) -> tuple[str, ...]:
    return ("<bos>", "<eos>", *tags, "\n", " ", ":", ".", *"0123", *"abcdef")


def ids_among(pieces, tags) -> np.ndarray:
    return np.array([pieces.index(tag) for tag in tags], np.int32)


def classes_of(names, tags) -> TokenClasses:
    tag = np.full(len(names), -1, np.int8)
    tag[ids_among(names, tags)] = np.arange(len(tags))
    pieces = np.array(names)
    return TokenClasses(
        digit=np.array([int(p) if p in "0123" else -1 for p in names], np.int8),
        dot=pieces == ".",
        colon=pieces == ":",
        space=(pieces == " ") | (pieces == "\n"),
        line_break=pieces == "\n",
        line_end=pieces == "\n",
        space_start=pieces == " ",
        tag=tag,
    )


def model_that_likes(pieces, likes) -> tuple[Any, Any]:
    """(graphdef, params) of a model that follows the table of likes, loosely."""
    vocab = len(pieces)
    config = dataclasses.replace(CONFIG, vocab_size=vocab)
    table = np.zeros((vocab, vocab), np.float32)
    for before, row in likes.items():
        for after, value in row.items():
            table[pieces.index(before), pieces.index(after)] = 1.5 * value
    params = init_params(config, seed=3)
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(vocab, config.hidden_size)).astype(np.float32)
    embedding[:, :vocab] = 16 * np.eye(vocab)
    head = rng.normal(size=(config.hidden_size, vocab)).astype(np.float32) * 0.3
    # The final norm leaves a one-hot of about sqrt(hidden); the table is scaled to logits.
    head[:vocab] += table / np.sqrt(config.hidden_size)
    params["embed_tokens"]["embedding"] = jnp.asarray(embedding)
    params["lm_head"]["kernel"] = jnp.asarray(head)
    return graphdef(config), jax.tree.map(jnp.asarray, params)
