"""The strict check of what is written: the tokens that training will see, parsed."""

from typing import Any

from tw_jax.data.records import RejectedRecord
from tw_jax.data.rewrite.control_text import control_tags
from tw_jax.data.text import encode_prompt, unknown_characters
from tw_jax.data.trajectory_file import TrajectoryRecord, encode_trajectory, require_strict
from tw_jax.trajectory.schema import Schema

SCHEMA = "threadweaver"  # the language that rewriting writes


class Validator:
    """A tokenizer and the schema bound to it.

    Attributes:
      control_tags: what no source text may spell out.
    """

    def __init__(self, tokenizer: Any, schema: Schema) -> None:
        """Of a tokenizer that has the schema's control tags."""
        self._tokenizer, self._schema = tokenizer, schema
        self.control_tags = control_tags(tokenizer, schema.tags)

    def unknown_characters(self, text: str) -> list[str]:
        """Characters that the tokenizer has no token for."""
        unknown = self._tokenizer.unk_token_id
        if unknown is None or unknown not in encode_prompt(self._tokenizer, text):
            return []
        return unknown_characters(self._tokenizer, text)

    def problem(self, record: TrajectoryRecord, blocks: int) -> str | None:
        """What is wrong with a rewritten trace; None if it is canonical.

        Args:
          record: what would be written.
          blocks: how many parallel blocks it must have.
        """
        try:
            trajectory = encode_trajectory(record, self._schema, self._tokenizer)
            require_strict(trajectory, self._schema, self._tokenizer)
        except RejectedRecord as rejected:
            return f"{rejected.kind}: {rejected}"
        if len(trajectory.blocks) != blocks:
            return f"{len(trajectory.blocks)} blocks were read, {blocks} were written"
        return None


def load_validator(tokenizer: str | None) -> Validator:
    """Loads a tokenizer.

    Args:
      tokenizer: folder or hub id; None: the small one that tw_jax brings.

    Raises:
      UserError: there is no usable tokenizer.
    """
    # Here, since it imports transformers, which help and mistakes do not wait for.
    from tw_jax.data.tokenizer import open_tokenizer

    return Validator(*open_tokenizer(tokenizer, SCHEMA))
