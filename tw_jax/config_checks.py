"""Range checks that configuration classes share; `tw_jax.config` turns failures into messages."""

from typing import Any


def require_at_least(config: Any, **minimums: int) -> None:
    """Checks fields of a configuration against their least values; null passes.

    Raises:
      ValueError: a value is too small; the message names the field.
    """
    for name, least in minimums.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")


def require_share(config: Any, *names: str) -> None:
    """Checks that fields lie in 0..1.

    Raises:
      ValueError: one does not; the message names it.
    """
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must lie in [0, 1]")


def require_seed(config: Any) -> None:
    """Checks that `seed` fits 32 bits.

    Raises:
      ValueError: it does not.
    """
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed}: must lie in 0..2**32 - 1")
