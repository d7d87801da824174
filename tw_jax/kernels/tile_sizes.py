"""Tile sizes of tree attention, for each backend."""

# CPU. In short rows larger tiles are no faster per pair and cover more dead pairs; in long ones
# they are, by a quarter on packed tries and twofold on causal rows, and the list stays short.
_SHORT_ROW, _SHORT_TILE, _LONG_TILE = 2048, 64, 256
_SMALLEST_TILE = 16

# TPU. Keys lie on the 128 lanes of a register. A tile's scores are float32 in on-chip memory
# beside its operands: more of them than this and the compiler runs out of its default share.
_LANES = 128
_TPU_SCORES = 2**20
_TPU_TILE = (256, 512)


def tile_sizes(
    backend: str, *, row_len: int, q_len: int | None = None, group: int = 1
) -> tuple[int, int]:
    """`(q_tile, k_tile)` by default.

    Args:
      backend: name of a backend of `tree_attention`.
      row_len: keys per row.
      q_len: queries per row where they are a part of it, which their tile must divide.
      group: query heads per key head; a TPU tile holds those of one key head.

    Raises:
      ValueError: no tile of this backend divides `q_len`.
    """
    if backend == "tpu":
        return _tpu_tiles(row_len, q_len, group)
    q_tile = k_tile = default_tile(row_len)
    while q_len is not None and q_len % q_tile and q_tile > _SMALLEST_TILE:
        q_tile //= 2
    return q_tile, k_tile


def default_tile(row_len: int) -> int:
    """Tile edge on CPU for rows of this length; in short rows no more than holds one of them."""
    if row_len > _SHORT_ROW:
        return _LONG_TILE
    return _power_of_two(row_len, _SMALLEST_TILE, _SHORT_TILE)


def _tpu_tiles(row_len: int, q_len: int | None, group: int) -> tuple[int, int]:
    q_tile, k_tile = (_power_of_two(row_len, _LANES, most) for most in _TPU_TILE)
    if q_len is not None:
        q_tile = min(q_tile, q_len & -q_len)
    if q_tile < _SMALLEST_TILE:
        raise ValueError(
            f"q_len={q_len}: a TPU needs a multiple of {_SMALLEST_TILE} queries per device "
            f"(best of {_TPU_TILE[0]}); choose another row length, or fewer devices per row"
        )
    while group * q_tile * k_tile > _TPU_SCORES and q_tile > _SMALLEST_TILE:
        if q_tile > _LANES or k_tile == _LANES:
            q_tile //= 2
        else:
            k_tile //= 2
    return q_tile, k_tile


def _power_of_two(enough: int, least: int, most: int) -> int:
    """The smallest power of two between the bounds that is enough, or the largest."""
    tile = least
    while tile < min(enough, most):
        tile *= 2
    return tile
