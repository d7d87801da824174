"""Copies between published matrices and ours: transposed, converted and placed on the way."""

import numpy as np

# Of a transposed copy, in the target's memory order: as much as the second-level cache holds, since
# fewer and longer copies let threads wait less for each other.
_TILE_ROWS, _TILE_COLUMNS = 2048, 128
_BITS = {2: np.uint16, 4: np.uint32}


def copy_rows(target: np.ndarray, source: np.ndarray) -> None:
    """Writes `source` into `target` of the same shape, converting its dtype.

    Either of the two may be the transposed view of an array in memory order; then the copy goes
    tile by tile, several times faster than NumPy's own.
    """
    if source.dtype != target.dtype:
        source = source.astype(target.dtype)
    elif target.dtype.itemsize in _BITS:  # NumPy copies bfloat16 as slowly as objects
        bits = _BITS[target.dtype.itemsize]
        source, target = source.view(bits), target.view(bits)
    if target.ndim < 2 or source.flags.c_contiguous == target.flags.c_contiguous:
        target[...] = source
        return
    if target.strides[0] < target.strides[1]:
        target, source = target.T, source.T
    for row in range(0, target.shape[0], _TILE_ROWS):
        rows = slice(row, row + _TILE_ROWS)
        for column in range(0, target.shape[1], _TILE_COLUMNS):
            columns = slice(column, column + _TILE_COLUMNS)
            target[rows, columns] = source[rows, columns]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes, which JAX on CPU takes without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)
