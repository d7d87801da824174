"""A completions server in the engine's place."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tw_jax.data.text import encode_response
from tw_jax.data.tokenizer import open_tokenizer, tokenizer_in
from tw_jax.errors import UserError
from tw_jax.evals.answerer import Answerer, OnFinish
from tw_jax.rollout.client import ClientConfig, RolloutClient
from tw_jax.rollout.client_http import key_in
from tw_jax.rollout.request import Request
from tw_jax.rollout.rollout import Rollout
from tw_jax.trajectory.schema import Schema
from tw_jax.trajectory.schemas import make_schema


class TokenizerCodec:
    """`Codec` of a Hugging Face tokenizer: tags that a model wrote become control tokens."""

    def __init__(self, tokenizer: Any, eos_id: int) -> None:
        """Of the tokenizer of the model that writes."""
        self._tokenizer, self._eos_id = tokenizer, eos_id

    def encode(self, text: str) -> list[int]:
        """See `Codec.encode`."""
        return encode_response(self._tokenizer, text, self._eos_id)[:-1].tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Codec.decode`."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)


def remote_answerer(
    config: ClientConfig,
    tokenizer: str | None,
    checkpoint: str,
    schema_name: str,
    environment: Mapping[str, str],
    *,
    sequential_only: bool = False,
) -> Answerer:
    """An answerer on a completions server.

    Args:
      config: the server.
      tokenizer: folder or hub id of its model's tokenizer; None takes that of `checkpoint`.
      checkpoint: a run's folder.
      schema_name: the language of parallel thought that the model speaks.
      environment: variables, among them the one with the server's key.
      sequential_only: no request will spawn. Then any schema will do, and a tokenizer without its
        tags too: the model writes them as plain text.

    Raises:
      UserError: no tokenizer, one without the schema's tags, or no key where one is named.
    """
    folder = pathlib.Path(checkpoint, "tokenizer") if tokenizer is None else tokenizer
    if tokenizer is None and not pathlib.Path(folder).is_dir():
        raise UserError(
            f"no tokenizer at {folder}: with a server, set tokenizer=FOLDER|HUB_ID to that of its "
            "model, or checkpoint to a run that has it"
        )
    if sequential_only:
        loaded, schema = open_tokenizer(str(folder), schema_name)
    else:
        loaded = tokenizer_in(folder)
        schema = make_schema(schema_name, loaded)
    api_key = key_in(environment, config.api_key_env)
    codec = TokenizerCodec(loaded, schema.eos_id)
    # Sequential text has no joins, so the client need not know how the schema joins.
    asked = _joining_by_text(schema) if sequential_only else schema
    client = RolloutClient(config, asked, codec, api_key=api_key)

    def generate(requests: Sequence[Request], on_finish: OnFinish | None) -> list[Rollout]:
        return client.generate(requests, on_finish=on_finish)

    return Answerer(loaded, schema, f"server model {config.model or config.url}", generate)


def _joining_by_text(schema: Schema) -> Schema:
    """The schema with the one join rule that servers can follow."""
    assert dataclasses.is_dataclass(schema)
    return dataclasses.replace(schema, join_rule="reencode")
