"""Worker of `python -m benchmarks sft`: tunix's PeftTrainer, all parameters, as its users run it.

Runs in the environment `benchmarks/peers/tunix`, from the repository, with the folder that
`benchmarks.sft` prepared: weights, token ids and settings.
"""

import importlib.metadata
import json
import pathlib
import sys
import time

import jax
import numpy as np
from flax import nnx
from tunix.sft import utils as tunix_inputs
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from benchmarks.blocks import answer, asked_blocks
from benchmarks.peers.tunix_model import load_model
from benchmarks.peers.tunix_optimizer import make_optimizer


def model_input(batch: TrainingInput) -> dict:
    """What tunix's guide passes to the model: positions and a dense causal mask."""
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": tunix_inputs.build_positions_from_mask(batch.input_mask),
        "attention_mask": tunix_inputs.make_causal_attn_mask(batch.input_mask),
    }


def main(folder: pathlib.Path) -> None:
    """Trains in blocks as asked on standard input."""
    shape = json.loads((folder / "shape.json").read_text())
    settings = json.loads((folder / "optimizer.json").read_text())
    tokens = np.load(folder / "tokens.npy")
    model = load_model(folder / "weights", shape)
    optimizer = make_optimizer(settings)
    trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=10**9))
    trainer = trainer.with_gen_model_input_fn(model_input)

    def batches():
        # The trainer asks for a batch ahead of time; a block ends when its last update is done.
        step = 0
        for count in asked_blocks():
            start = time.perf_counter()
            for _ in range(count):
                row = tokens[step % len(tokens)]
                step += 1
                yield TrainingInput(input_tokens=row, input_mask=np.ones(row.shape, bool))
            jax.block_until_ready(nnx.state(trainer.model))
            answer(seconds=time.perf_counter() - start)

    trainer.train(batches())
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    names = ("google-tunix", "jax", "flax", "optax")
    answer(
        losses=[float(loss) for loss in losses],
        remat=model.config.remat_config.name.lower(),
        versions={name: importlib.metadata.version(name) for name in names},
    )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
