"""Benchmarks: `python -m benchmarks NAME [--json FILE]`, run from the repository.

| name | what it measures |
|---|---|
| trie | from token ids to a trie, 40,000 tokens |
| train | SFT at the quickstart's shape, useful tokens per second |
| sft --peer tunix | the same SFT update in tw_jax and in a peer, in turns |
| rollout --peer tunix, --peer hf | decoding against a peer, in turns: fixed and mixed lengths |
| update | a P-GRPO update of a group as one forest against one row per model call |
| forkjoin | what threads gain in time at batch 1, and what the engine promises, counted |
| parity | logits and gradients against transformers |
| checkpoint-io | import and export of weights against a file copy |
| attention | tree attention on CPU against dense masks: exactness, memory, time |
| attention-gpu | on a GPU: time per live tile of tree attention against cuDNN's causal one |
| paged-attention | a decoding step over pages against one over dense slots |
"""
