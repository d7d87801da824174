"""A 24-token language, and a model that speaks it: it opens blocks, threads and ends by itself.

The model's head holds a table of which token likes to follow which; random layers perturb it, so
every logit depends on the whole context and a wrong cache entry or position shows at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.models import Qwen3Config, graphdef, init_params
from tw_jax.trajectory.schema import ForkJoinTokens, TokenClasses
from tw_jax.trajectory.threadweaver import THREADWEAVER_TAGS, ThreadWeaverSchema

PIECES = ("<bos>", "<eos>", *THREADWEAVER_TAGS, "\n", " ", ":", ".", *"0123", *"abcdef")
ID = {piece: i for i, piece in enumerate(PIECES)}
VOCAB = len(PIECES)

CONFIG = Qwen3Config(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=100.0,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    max_position_embeddings=512,
    initializer_range=0.17,
    moe=None,
    param_dtype="float32",
    compute_dtype="float32",
)


def ids(text: str) -> list[int]:
    """Encodes text of this language."""
    out = []
    while text:
        piece = next(p for p in PIECES if text.startswith(p))
        out.append(ID[piece])
        text = text[len(piece) :]
    return out


def text_of(tokens) -> str:
    return "".join(PIECES[int(t)] for t in tokens)


@functools.cache
def make_schema() -> ThreadWeaverSchema:
    tag = np.full(VOCAB, -1, np.int8)
    tag_ids = np.array([ID[t] for t in THREADWEAVER_TAGS], np.int32)
    tag[tag_ids] = np.arange(len(tag_ids))
    pieces = np.array(PIECES)
    return ThreadWeaverSchema(
        tag_ids=tag_ids,
        eos_id=ID["<eos>"],
        classes=TokenClasses(
            digit=np.array([int(p) if p in "0123" else -1 for p in PIECES], np.int8),
            dot=pieces == ".",
            colon=pieces == ":",
            space=(pieces == " ") | (pieces == "\n"),
            line_break=pieces == "\n",
            line_end=pieces == "\n",
            space_start=pieces == " ",
            tag=tag,
        ),
        fork_join=ForkJoinTokens(
            spawn_trigger=ID["</Outlines>"],
            plans_open=ID["<Outlines>"],
            plan_open=ID["<Outline>"],
            thread_stop=ID["</Thread>"],
            fork=(ID["\n"],),
            header_prefix=(ID["<Thread>"], ID["\n"]),
            header_suffix=(ID[":"],),
            thread_close=(ID["\n"], ID["</Thread>"]),
            join=(ID["\n"],),
        ),
    )


def _follows() -> np.ndarray:
    """Which token likes to follow which, `[before, after]` in logits."""
    table = np.zeros((VOCAB, VOCAB), np.float32)
    likes = {
        "\n": {"</Parallel>": 3, "<Outline>": 2, "a": 2, "<Outlines>": 1},
        " ": {"a": 3, "b": 3, "c": 2, "</Thread>": 2},
        ":": {" ": 3, "</Outlines>": 3.5, "<Outline>": 4.5, "a": 2},
        "<Outlines>": {"<Outline>": 6, "\n": 4},
        "<Outline>": {"1": 5, "2": 5, "3": 4, " ": 3},
        "</Outline>": {"<Outline>": 4, "</Outlines>": 5},
        "</Outlines>": {"\n": 3, "a": 2},
        "</Parallel>": {"a": 4, "<Outlines>": 4, "\n": 2},
        "</Thread>": {"\n": 2, "<eos>": 1},
        ".": {"1": 4, "2": 2, "a": 2},
    }
    for digit in "0123":
        likes[digit] = {":": 5, "1": 2, "2": 2, ".": 2, " ": 2}
    for letter in "abcdef":
        likes[letter] = {"</Thread>": 3.5, "<Outlines>": 3.5, "<eos>": 2.5, "</Outlines>": 0.5}
        likes[letter] |= {" ": 2, "a": 1, "b": 1, "\n": 1}
    for before, row in likes.items():
        for after, value in row.items():
            table[ID[before], ID[after]] = 1.5 * value
    return table


@functools.cache
def make_model():
    """(graphdef, params) of a model that follows the table, loosely."""
    params = init_params(CONFIG, seed=3)
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(VOCAB, CONFIG.hidden_size)).astype(np.float32)
    embedding[:, :VOCAB] = 16 * np.eye(VOCAB)
    head = rng.normal(size=(CONFIG.hidden_size, VOCAB)).astype(np.float32) * 0.3
    # The final norm leaves a one-hot of about sqrt(hidden); the table is scaled to logits.
    head[:VOCAB] += _follows() / np.sqrt(CONFIG.hidden_size)
    params["embed_tokens"]["embedding"] = jnp.asarray(embedding)
    params["lm_head"]["kernel"] = jnp.asarray(head)
    return graphdef(CONFIG), jax.tree.map(jnp.asarray, params)
