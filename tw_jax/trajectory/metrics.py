"""Numbers of one trajectory, defined once (DESIGN section 11)."""

from tw_jax.trajectory.trajectory import Trajectory


def total_tokens(trajectory: Trajectory) -> int:
    """Tokens appended after the prompt, each once; joined copies are not counted twice."""
    return len(trajectory.tokens) - trajectory.prompt_len


def critical_path(trajectory: Trajectory) -> int:
    """Tokens on the longest chain of dependent tokens after the prompt.

    Sequential tokens, plus per block the outlines, every wrapper tag and the longest thread
    (ThreadWeaver, arXiv 2512.07843, "token latency"). A thread's length is what lies strictly
    between its tags, forced header included.
    """
    saved = 0
    for block in trajectory.blocks:
        inside = [max(0, thread.end - thread.start - 2) for thread in block.threads]
        saved += sum(inside) - max(inside, default=0)
    return total_tokens(trajectory) - saved


def acceleration_ratio(total: int, critical: int) -> float:
    """`eta = 1 - critical_path / total_tokens`; 0 for an empty response."""
    return 1.0 - critical / total if total else 0.0


def self_parallelism(total: int, critical: int) -> float:
    """`total_tokens / critical_path`; 1 for an empty response."""
    return total / critical if critical else 1.0
