"""Shapes of the models that several benchmarks run: both are Qwen3 with random weights."""

from tw_jax.models import preset

# 3.3 million parameters.
TINY = preset(
    "tiny",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    rope_theta=1_000_000.0,
    tie_word_embeddings=True,
)
# 100 million: large enough that a decoding step on CPU is bound by reading the weights.
SMALL = preset(
    "tiny",
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    rope_theta=1_000_000.0,
    tie_word_embeddings=True,
    initializer_range=0.02,
)
