"""The native schema's positions and mask, read from text by a scanner of its own.

Follows the words of NPR's paper and the ids of a published worked example, not the library's code:
every token gets the block and the step that it belongs to, and two tokens of one block do not see
each other if they belong to different steps.
"""

import numpy as np


def positions_and_steps(pieces):
    """(positions, block, step) of a text given as one string per token; ids are -1 outside steps.

    The text may stop anywhere, and may hold some of a block's steps only.
    """
    positions, blocks, steps = [], [], []
    block = step = -1
    start = furthest = here = 0
    in_steps = False
    for piece in pieces:
        if piece == "<step>":
            if not in_steps:
                in_steps, block, furthest = True, block + 1, 0
            step, here = step + 1, start
        elif piece == "<takeaway>" and in_steps:
            in_steps, here = False, furthest + 1
        positions.append(here)
        blocks.append(block if in_steps else -1)
        steps.append(step if in_steps else -1)
        if piece == "</guideline>":
            start = here + 1
        elif piece == "</step>":
            furthest = max(furthest, here)
        here += 1
    return np.array(positions), np.array(blocks), np.array(steps)


def visible_pairs(blocks, steps):
    """Boolean [len, len]: does query i see key j?"""
    index = np.arange(len(blocks))
    same_block = (blocks[:, None] == blocks[None, :]) & (blocks[:, None] >= 0)
    siblings = same_block & (steps[:, None] != steps[None, :])
    return (index[None, :] <= index[:, None]) & ~siblings
