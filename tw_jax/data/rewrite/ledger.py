"""Every answer that was paid for, in one SQLite file: the cache, the ledger and the way to resume.

An answer is stored, synced, before anything is decided from it. A run that was killed finds the
same answers again and so decides the same.
"""

import dataclasses
import hashlib
import json
import pathlib
import sqlite3
from collections.abc import Mapping
from typing import Any

from tw_jax.errors import UserError

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
  key TEXT PRIMARY KEY,
  stage TEXT NOT NULL,
  model TEXT NOT NULL,
  text TEXT NOT NULL,
  finish_reason TEXT NOT NULL,
  prompt_chars INTEGER NOT NULL,
  prompt_tokens INTEGER NOT NULL,
  answer_tokens INTEGER NOT NULL,
  usd REAL NOT NULL
) WITHOUT ROWID
"""
_COLUMNS = "text, finish_reason, prompt_chars, prompt_tokens, answer_tokens, usd"


@dataclasses.dataclass(frozen=True)
class StoredAnswer:
    """An answer of the LLM.

    Attributes:
      text: what it wrote.
      finish_reason: why it stopped, as the server calls it.
      prompt_chars: characters of the messages it answers.
      prompt_tokens: tokens of the prompt, as the server counts them.
      answer_tokens: tokens of the answer, as the server counts them.
      usd: what it cost.
    """

    text: str
    finish_reason: str
    prompt_chars: int
    prompt_tokens: int
    answer_tokens: int
    usd: float


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What the calls of a stage have cost, over all runs.

    Attributes:
      calls: answers.
      prompt_chars: characters of the messages.
      prompt_tokens: tokens of the prompts.
      answer_tokens: tokens of the answers.
      usd: money.
    """

    calls: int = 0
    prompt_chars: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    usd: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self.prompt_tokens + self.answer_tokens


def request_key(body: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Names a request by its content.

    Args:
      body: what is sent, without `response_format`: whether a server admits that may change.
      schema: JSON schema of the answer.
    """
    said = json.dumps({"body": body, "schema": schema}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


class Ledger:
    """The file; use it as `with Ledger(path) as ledger`."""

    def __init__(self, path: str | pathlib.Path, *, read_only: bool = False) -> None:
        """Opens the file, or makes it.

        Args:
          path: the file.
          read_only: nothing is made; a file that is not there is taken for an empty one.

        Raises:
          UserError: the file cannot be opened, or is no ledger.
        """
        self._path = pathlib.Path(path)
        try:
            if read_only and not self._path.exists():
                self._database = sqlite3.connect(":memory:")
            else:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._database = sqlite3.connect(self._path, isolation_level=None)
                self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(_TABLE)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    def find(self, key: str) -> StoredAnswer | None:
        """The answer to a request, if it was asked before."""
        row = self._run(f"SELECT {_COLUMNS} FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else StoredAnswer(*row)

    def store(self, key: str, stage: str, model: str, answer: StoredAnswer) -> None:
        """Keeps an answer for good.

        Raises:
          UserError: the file cannot be written.
        """
        self._run(
            f"INSERT INTO answers (key, stage, model, {_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)",
            (key, stage, model, *dataclasses.astuple(answer)),
        )

    def costs(self) -> dict[str, StageCost]:
        """What each stage has cost."""
        rows = self._run(
            "SELECT stage, COUNT(*), SUM(prompt_chars), SUM(prompt_tokens), SUM(answer_tokens), "
            "SUM(usd) FROM answers GROUP BY stage ORDER BY stage"
        )
        return {stage: StageCost(*values) for stage, *values in rows}

    def total(self) -> StageCost:
        """What all stages have cost together."""
        costs = self.costs().values()
        return StageCost(
            *(sum(getattr(c, f.name) for c in costs) for f in dataclasses.fields(StageCost))
        )

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"the answers in {self._path} cannot be read or written ({error}); is another run "
            "using the folder, or the disk full? Otherwise choose another output"
        )
