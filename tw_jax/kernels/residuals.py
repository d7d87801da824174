"""Names of what kernels keep for their backward pass, for policies of `jax.checkpoint`."""

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

ATTENTION_OUTPUT = "attention_output"


def attention_residuals(out: Array, log_total: Array) -> tuple[Array, Array]:
    """Names attention's result and log-sum-exp, as a kernel's forward rule keeps them.

    Only what the rule keeps saves work: a policy that saved a copy made outside the kernel would
    still have to run the kernel again.
    """
    return checkpoint_name(out, ATTENTION_OUTPUT), checkpoint_name(log_total, ATTENTION_OUTPUT)
