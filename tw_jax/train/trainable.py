"""What of a model a run trains: all of it, or an adapter on a frozen base."""

import dataclasses
from typing import Any

import jax

from tw_jax.models.lora import Adapter, AdapterConfig, bind_adapter
from tw_jax.models.param_shardings import adapter_shardings, base_shardings
from tw_jax.models.qwen3 import Params
from tw_jax.parallel.layout import Layout
from tw_jax.train.adapter_record import ADAPTER, BASE, adapter_meta
from tw_jax.train.run_dir import LoadedModel, ModelConfig


@dataclasses.dataclass(frozen=True)
class Trainable:
    """How a model is parted into what is trained and what is not.

    Attributes:
      frozen: the base under an adapter; None where all is trained.
      adapter: None where all is trained.
      settings: entries of a checkpoint's meta that a run must share to go on from it.
      origin: further entries, which say where the base was found.
    """

    frozen: Params | None
    adapter: Adapter | None
    settings: dict[str, Any]
    origin: dict[str, Any]

    def assemble(self, params: Params, frozen: Params | None) -> Params:
        """Parameters for a forward pass; for use inside jit, with `frozen` as an argument."""
        if self.adapter is None or frozen is None:
            return params
        return self.adapter.assemble(params, frozen)

    def model_params(self, params: Params) -> Params:
        """The same for params of a later step; makes no copy of the base."""
        return self.assemble(params, self.frozen)


def part(
    model: LoadedModel,
    config: AdapterConfig | None,
    source: ModelConfig,
    seed: int,
    layout: Layout | None,
) -> tuple[LoadedModel, Trainable, Params]:
    """Parts a model.

    Args:
      model: the model that a run starts from.
      config: the adapter; None trains all of the model.
      source: where the model came from.
      seed: of the source, if that is random, and of the adapter.
      layout: the mesh; None on one device.

    Returns:
      The model, whose parameters are now what `Trainable.model_params` gives before the first step;
      its parts; and what is trained, as it is then. Nothing refers any more to matrices that have
      been quantised. Who trains must not hold on to the parameters of the start, which would be a
      second copy of the model.

    Raises:
      UserError: the adapter does not fit the model or the mesh.
    """
    if config is None:
        return model, Trainable(None, None, {ADAPTER: None}, {}), model.params
    adapter = bind_adapter(config, model.config, model.schema.tag_ids)
    init = jax.jit(adapter.init, static_argnums=1, out_shardings=adapter_shardings(layout, adapter))
    params = init(model.params, seed)
    trainable = Trainable(
        frozen=adapter.freeze(model.params, base_shardings(layout, adapter)),
        adapter=adapter,
        settings={ADAPTER: adapter_meta(adapter, model.params)},
        origin={
            BASE: {
                "model": dataclasses.asdict(source),
                "seed": seed,
                "step": model.source_step,
            }
        },
    )
    model = dataclasses.replace(model, params=trainable.model_params(params))
    return model, trainable, params
