"""Which part of a trajectory a token belongs to, for statistics that tell them apart."""

import enum

import numpy as np
from jaxtyping import Int32

from tw_jax.trajectory.trajectory import Trajectory


class TokenRegion(enum.IntEnum):
    """Parts of a trajectory; tokens that are not sampled have -1 instead."""

    SEQUENTIAL = 0
    OUTLINE = 1  # from a block's beginning to where it forks
    THREAD = 2
    TAGS = 3  # control tokens, wherever they stand


NO_REGION = -1


def source_regions(
    trajectory: Trajectory, tag_ids: Int32[np.ndarray, " tags"]
) -> Int32[np.ndarray, " source"]:
    """The region of every `Trie.source` of a trajectory, tokens that joins replaced included."""
    regions = np.full(len(trajectory.tokens), TokenRegion.SEQUENTIAL, np.int32)
    replaced: list[int] = []
    for block in trajectory.blocks:
        regions[block.start : block.outlines_end] = TokenRegion.OUTLINE
        for thread in block.threads:
            regions[thread.start : thread.end] = TokenRegion.THREAD
            replaced += thread.replaced
    ids = np.concatenate([trajectory.tokens, np.array(replaced, np.int32)])
    regions = np.concatenate([regions, np.full(len(replaced), TokenRegion.THREAD, np.int32)])
    regions[np.isin(ids, tag_ids)] = TokenRegion.TAGS
    return regions
