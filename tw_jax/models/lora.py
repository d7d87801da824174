"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen, perhaps quantised base (2305.14314).

    y = x @ W + alpha / rank * (x @ A) @ B        A [in, rank] random, B [rank, out] zero at first

1. `Adapter.freeze` takes the model's parameters and gives the base: what stays as it is.
2. `Adapter.init` makes what is trained: A and B of every adapted matrix, and rows of the embedding
   and the head, in a pure nested dict as all parameters are.
3. `Adapter.assemble` puts both together, inside jit, into a tree that has a `StoredMatrix` in an
   array's place wherever there is more than one array. The model's forward takes that tree as it
   takes any other; W + A @ B is never made.
4. `merged` makes ordinary parameters of it.

Libraries for this (qwix) rewrite modules or intercept their calls; here the model is a pure tree of
arrays under `lax.scan`, where a leaf with a product of its own is all that it takes.
"""

import dataclasses
import functools
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tw_jax.config_checks import require_at_least
from tw_jax.errors import UserError
from tw_jax.models.config import Qwen3Config
from tw_jax.models.matrices import AdaptedMatrix, StoredMatrix
from tw_jax.models.quantized import QuantizedMatrix, quantize
from tw_jax.models.qwen3 import Params, abstract_params, param_axes

_GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_PARENTS = {name: "self_attn" for name in _GROUPS["attention"]}
_PARENTS |= {name: "mlp" for name in _GROUPS["mlp"]}
_A, _B, _CONTROL = "lora_a", "lora_b", "control_rows"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What is trained in place of the whole model.

    Attributes:
      rank: inner width of every adapter.
      alpha: adapters are scaled by alpha / rank.
      targets: which matrices have one: attention, mlp, or single projections (q_proj, k_proj,
        v_proj, o_proj, gate_proj, up_proj, down_proj).
      embeddings: which rows of the embedding, and of the head where it is a matrix of its own, are
        trained: those of the schema's control tokens (control), which a published model has never
        seen, all of them (all), or none (frozen).
      base: how the frozen matrices of the layers are held: in model.param_dtype (same), in 8 bits
        (int8) or in 4 (nf4). Norms, routers, embedding and head are never quantised.
      block_size: rows of a quantised matrix that share a scale.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention", "mlp")
    embeddings: Literal["control", "all", "frozen"] = "control"
    base: Literal["same", "int8", "nf4"] = "same"
    block_size: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, rank=1, block_size=2)
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha}: must be positive and finite")
        if self.block_size % 2:
            raise ValueError(f"block_size={self.block_size}: must be even")
        known = (*_GROUPS, *_PARENTS)
        unknown = [name for name in self.targets if name not in known]
        if unknown or not self.targets:
            found = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"targets: {found} given, choose from {', '.join(known)}")

    @property
    def projections(self) -> tuple[str, ...]:
        """The adapted projections by name, groups spelled out, in the order of the model."""
        named = {p for target in self.targets for p in _GROUPS.get(target, (target,))}
        return tuple(name for name in _PARENTS if name in named)

    @property
    def scale(self) -> float:
        """What A @ B is multiplied by."""
        return self.alpha / self.rank


def merged(params: Params, shardings: Any = None) -> Params:
    """Ordinary parameters: every `StoredMatrix` as one array, everything else as it is.

    Args:
      params: what `Adapter.assemble` returns, or ordinary parameters already.
      shardings: a tree like ordinary parameters, of where they shall lie; None: as they come.
    """

    def whole(leaf: Any, sharding: Any) -> Any:
        if not isinstance(leaf, StoredMatrix):
            return leaf
        return jax.jit(_dense, out_shardings=sharding)(leaf)

    leaves, tree = jax.tree.flatten(params, is_leaf=_is_stored)
    places = [None] * len(leaves) if shardings is None else tree.flatten_up_to(shardings)
    return tree.unflatten([whole(*pair) for pair in zip(leaves, places, strict=True)])


def _dense(matrix: StoredMatrix) -> Array:
    """Layer by layer, so that no stack exists in float32."""
    if jax.tree.leaves(matrix)[0].ndim < 3:
        return matrix.dense()
    return jax.lax.map(lambda layer: layer.dense(), matrix)


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, StoredMatrix)


# --- what is trained, and what is not -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's configuration bound to a model; hashable. Make it with `bind_adapter`.

    Attributes:
      config: see `AdapterConfig`.
      model: the architecture.
      control_ids: ids of the control tokens.
    """

    config: AdapterConfig
    model: Qwen3Config
    control_ids: tuple[int, ...]

    def freeze(self, params: Params, shardings: Params | None = None) -> Params:
        """The base: the model's parameters, quantised if so configured, without trained tables.

        Args:
          params: the model's parameters, which stay as they are and are shared where not quantised.
          shardings: a tree like the base; None: as they come.
        """
        config = self.config
        base = dict(params)
        if config.embeddings == "all":
            base = {name: part for name, part in base.items() if name not in self._tables}
        if config.base == "same":
            return base
        leaves, tree = jax.tree_util.tree_flatten_with_path(params["layers"])
        places = [None] * len(leaves)
        if shardings is not None:
            places = tree.flatten_up_to(shardings["layers"])
        convert = functools.partial(quantize, kind=config.base, block_size=config.block_size)
        frozen = [
            jax.jit(convert, out_shardings=place)(leaf) if _is_quantized(path) else leaf
            for (path, leaf), place in zip(leaves, places, strict=True)
        ]
        return {**base, "layers": tree.unflatten(frozen)}

    def init(self, params: Params, seed: int) -> Params:
        """What is trained, before the first step: it changes nothing yet.

        All of it is float32, whatever the model's `param_dtype`.

        Args:
          params: the model's own parameters, of which trained tables start.
          seed: of the random halves, which do not depend on where they lie.
        """
        trained: Params = {"layers": {}}
        for name in self.config.projections:
            layers, inner, out = params["layers"][_PARENTS[name]][name]["kernel"].shape
            rank = self.config.rank
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            # Entries of x @ A are then as large as those of x.
            a = jax.random.normal(key, (layers, inner, rank), jnp.float32) * inner**-0.5
            b = jnp.zeros((layers, rank, out), jnp.float32)
            trained["layers"].setdefault(_PARENTS[name], {})[name] = {_A: a, _B: b}
        for table, leaf in self._tables.items():
            if self.config.embeddings == "all":
                trained[table] = {leaf: params[table][leaf].astype(jnp.float32)}
            elif self.config.embeddings == "control":
                shape = (len(self.control_ids), self.model.hidden_size)
                trained[table] = {_CONTROL: jnp.zeros(shape, jnp.float32)}
        return trained

    def assemble(self, trained: Params, base: Params) -> Params:
        """Parameters for the model's forward pass; costs nothing, inside jit or outside.

        Args:
          trained: a tree like that of `init`.
          base: what `freeze` returned.
        """
        params = {**base, "layers": {**base["layers"]}}
        for name in self.config.projections:
            parent = _PARENTS[name]
            own, kernel = trained["layers"][parent][name], base["layers"][parent][name]["kernel"]
            adapted = AdaptedMatrix(kernel, own[_A], own[_B], self.config.scale)
            params["layers"][parent] = {**params["layers"][parent], name: {"kernel": adapted}}
        for table, leaf in self._tables.items():
            if self.config.embeddings == "all":
                params[table] = trained[table]
            elif self.config.embeddings == "control":
                # A row is changed by the low-rank sum whose one half picks that row.
                pick = jax.nn.one_hot(jnp.asarray(self.control_ids), self.model.vocab_size)
                change = AdaptedMatrix(base[table][leaf], pick.T, trained[table][_CONTROL], 1.0)
                if table == "lm_head":
                    change = AdaptedMatrix(change.base, change.b.T, change.a.T, 1.0)
                params[table] = {leaf: change}
        return params

    def axes(self) -> Params:
        """Names of the axes of what is trained, in a tree like that of `init`."""
        of_model = param_axes(self.model)
        axes: Params = {"layers": {}}
        for name in self.config.projections:
            layers, inner, out = of_model["layers"][_PARENTS[name]][name]["kernel"]
            pair = {_A: (layers, inner, "lora_rank"), _B: (layers, "lora_rank", out)}
            axes["layers"].setdefault(_PARENTS[name], {})[name] = pair
        for table, leaf in self._tables.items():
            if self.config.embeddings == "all":
                axes[table] = {leaf: of_model[table][leaf]}
            elif self.config.embeddings == "control":
                axes[table] = {_CONTROL: (None, "embed")}
        return axes

    def abstract(self) -> Params:
        """Shapes and dtypes of what is trained."""
        return jax.eval_shape(lambda params: self.init(params, 0), abstract_params(self.model))

    def base_axes(self) -> Params:
        """Names of the axes of the base, in a tree like that of `freeze`."""
        base = self.abstract_base()
        of_model = {name: part for name, part in param_axes(self.model).items() if name in base}

        def one(leaf: Any, names: tuple[str, ...]) -> Any:
            if not isinstance(leaf, QuantizedMatrix):
                return names
            # Blocks and pairs of rows lie where their rows do.
            return dataclasses.replace(leaf, codes=names, scales=names)

        return jax.tree.map(one, base, of_model, is_leaf=_is_stored)

    def abstract_base(self) -> Params:
        """Shapes and dtypes of the base."""
        return jax.eval_shape(self.freeze, abstract_params(self.model))

    @property
    def _tables(self) -> dict[str, str]:
        """Parameters with a row for each token, the name of each one's leaf."""
        tables = {"embed_tokens": "embedding"}
        return tables if self.model.tie_word_embeddings else {**tables, "lm_head": "kernel"}


def _is_quantized(path: Any) -> bool:
    return path[-1].key == "kernel" and path[-2].key != "router"


def bind_adapter(config: AdapterConfig, model: Qwen3Config, control_ids: Any) -> Adapter:
    """Binds a configuration to a model.

    Args:
      config: what is trained.
      model: the architecture.
      control_ids: ids of the schema's control tokens.

    Raises:
      UserError: the model has no such matrix, a rank is larger than a matrix, or a quantised one
        does not divide into blocks.
    """
    adapter = Adapter(config, model, tuple(int(i) for i in control_ids))
    if model.moe and set(config.projections) & set(_GROUPS["mlp"]):
        raise UserError(
            "adapter.targets: the experts of a mixture cannot be adapted so far; set "
            "adapter.targets=[attention], or train the whole model"
        )
    layers = abstract_params(model)["layers"]
    for name in config.projections:
        smallest = min(layers[_PARENTS[name]][name]["kernel"].shape[1:])
        if config.rank > smallest:
            raise UserError(
                f"adapter.rank={config.rank} exceeds {smallest}, the smaller side of {name}: "
                "choose a smaller rank, or train the whole model"
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
        if config.base == "same" or not _is_quantized(path):
            continue
        if leaf.shape[-2] % config.block_size:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"adapter.block_size={config.block_size} does not divide the {leaf.shape[-2]} "
                f"rows of layers/{name}: choose a divisor, or adapter.base=same"
            )
    return adapter
