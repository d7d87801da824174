"""tw_jax: train and run language models that think in parallel, in JAX."""

__version__ = "0.1.0"
