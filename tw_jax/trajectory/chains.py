"""Builds tries out of chains of tokens and flattens them in depth-first preorder.

A chain is a run of tokens without branching; it hangs on one token of an earlier chain. Preorder
with the chain's own continuation first makes every subtree contiguous: behind a chain come the
chains that hang on it, the deepest first. A 40,000-token trajectory is a few dozen chains, so the
Python work is per chain and never per token.
"""

import dataclasses

import numpy as np
from jaxtyping import Int8, Int32

from tw_jax.trajectory.trie import TokenKind, Trie


@dataclasses.dataclass(frozen=True)
class Node:
    """One token of a forest under construction: offset in a chain."""

    chain: int
    offset: int


@dataclasses.dataclass(frozen=True)
class _Chain:
    parent: Node | None
    depth: int
    tokens: Int32[np.ndarray, "len"]
    kind: Int8[np.ndarray, "len"]
    source: Int32[np.ndarray, "len"]
    rollout: int


class ForestBuilder:
    """Collects chains; `flatten` lays them out."""

    def __init__(self) -> None:
        """Starts an empty forest."""
        self._chains: list[_Chain] = []
        self._children: list[list[int]] = []

    def add_prompt(self, tokens: Int32[np.ndarray, "len"]) -> Node:
        """Plants the prompt that all rollouts share as a root; returns its last token."""
        kind = np.full(len(tokens), TokenKind.PROMPT, np.int8)
        root = self.add_chain(None, tokens, kind, np.arange(len(tokens), dtype=np.int32), -1)
        return Node(root.chain, len(tokens) - 1)

    def add_chain(
        self,
        parent: Node | None,
        tokens: Int32[np.ndarray, "len"],
        kind: Int8[np.ndarray, "len"],
        source: Int32[np.ndarray, "len"],
        rollout: int,
    ) -> Node:
        """Hangs a non-empty run of tokens on `parent` (None: a new root); returns its first token.

        Leading forced tokens that an earlier chain already holds at the same place are shared; the
        returned node is where the unshared rest begins. Tokens the model sampled never merge.
        """
        shared = 0
        while parent is not None and shared < len(tokens) - 1:
            step = self._shared_child(parent, int(tokens[shared]), int(kind[shared]), rollout)
            if step is None:
                break
            parent, shared = step, shared + 1
        depth = 0 if parent is None else self._chains[parent.chain].depth + parent.offset + 1
        chain = len(self._chains)
        self._chains.append(
            _Chain(parent, depth, tokens[shared:], kind[shared:], source[shared:], rollout)
        )
        self._children.append([])
        if parent is not None:
            self._children[parent.chain].append(chain)
        return Node(chain, 0)

    def _shared_child(self, node: Node, token: int, kind: int, rollout: int) -> Node | None:
        """The existing forced child of `node` that equals `token`, if the new one is forced too."""
        if kind != TokenKind.FORCED:
            return None
        candidates = [Node(node.chain, node.offset + 1)]
        for child in self._children[node.chain]:
            if self._chains[child].parent == node:
                candidates.append(Node(child, 0))
        for candidate in candidates:
            chain = self._chains[candidate.chain]
            if (
                chain.rollout == rollout
                and candidate.offset < len(chain.tokens)
                and chain.tokens[candidate.offset] == token
                and chain.kind[candidate.offset] == TokenKind.FORCED
            ):
                return candidate
        return None

    def flatten(self) -> Trie:
        """Lays the forest out in preorder: parents before children, subtrees contiguous."""
        starts, ends, order = self._layout()
        total = sum(len(chain.tokens) for chain in self._chains)
        tokens, positions, parent, visible_end, source, rollout = (
            np.empty(total, np.int32) for _ in range(6)
        )
        kind = np.empty(total, np.int8)
        for index in order:
            chain, start = self._chains[index], starts[index]
            n = len(chain.tokens)
            span = slice(start, start + n)
            tokens[span], kind[span], source[span] = chain.tokens, chain.kind, chain.source
            rollout[span] = chain.rollout
            positions[span] = np.arange(chain.depth, chain.depth + n)
            parent[span] = np.arange(start - 1, start + n - 1)
            parent[start] = (
                start if chain.parent is None else starts[chain.parent.chain] + chain.parent.offset
            )
            visible_end[span] = start + n
            for child in self._by_depth(index):
                node = self._chains[child].parent
                assert node is not None
                visible_end[start : start + node.offset + 1] = ends[child]
        no_intervals = np.zeros((0, total), np.int32)
        return Trie(
            tokens=tokens,
            positions=positions,
            parent=parent,
            visible_end=visible_end,
            hidden_start=no_intervals,
            hidden_end=no_intervals,
            kind=kind,
            source=source,
            rollout=rollout,
        )

    def _by_depth(self, index: int) -> list[int]:
        """Chains that hang on a chain in preorder: deepest first, then in order of insertion."""

        def depth(child: int) -> int:
            node = self._chains[child].parent
            return -node.offset if node is not None else 0

        return sorted(self._children[index], key=depth)

    def _layout(self) -> tuple[list[int], list[int], list[int]]:
        """Start of every chain, end of its subtree, and the chains in preorder."""
        starts, ends = [0] * len(self._chains), [0] * len(self._chains)
        order: list[int] = []
        cursor = 0
        roots = [i for i, chain in enumerate(self._chains) if chain.parent is None]
        stack = [(root, False) for root in reversed(roots)]
        while stack:
            index, subtree_done = stack.pop()
            if subtree_done:
                ends[index] = cursor
                continue
            order.append(index)
            starts[index] = cursor
            cursor += len(self._chains[index].tokens)
            stack.append((index, True))
            stack.extend((child, False) for child in reversed(self._by_depth(index)))
        return starts, ends, order
