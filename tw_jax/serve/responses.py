"""What clients get, in OpenAI's shapes: whole answers, and the pieces of a stream."""

import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tw_jax.serve.bodies import GenerationBody
from tw_jax.serve.choice import Choice, Piece, TokenPiece
from tw_jax.serve.thread_events import ThreadEvent

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
END_OF_STREAM = "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class Writer:
    """Writes the answer to one request."""

    def __init__(
        self,
        tokenizer: "Tokenizer",
        model: str,
        body: GenerationBody,
        prompts: Sequence[np.ndarray],
        is_chat: bool,
    ) -> None:
        """An answer to `body` in the shapes of chats or of completions."""
        self._tokenizer, self._body, self._prompts = tokenizer, body, prompts
        self._is_chat = is_chat
        kind = "chat.completion" if is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._whole = {**self._head, "object": kind}
        self._chunk = {**self._head, "object": f"{kind}.chunk" if is_chat else kind}

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer to a request that does not stream; one piece per choice."""
        shown = []
        for index, (choice, piece) in enumerate(zip(choices, pieces, strict=True)):
            one: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason}
            if self._is_chat:
                one["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
            else:
                one["text"] = piece.text
            one["logprobs"] = self._logprobs(piece.tokens)
            if self._body.return_token_ids:
                one["token_ids"] = [token.id for token in piece.tokens]
                one["prompt_token_ids"] = self._prompts[index // self._body.n].tolist()
            one["rollout"] = _rollout(choice)
            shown.append(one)
        return {**self._whole, "choices": shown, "usage": self._usage(choices)}

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that opens a choice: the role of a chat, and a prompt's ids if asked for."""
        one: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": None}
        if self._body.return_token_ids:
            one["prompt_token_ids"] = self._prompts[index // self._body.n].tolist()
        elif not self._is_chat:
            return None
        one |= {"delta": {"role": "assistant", "content": ""}} if self._is_chat else {"text": ""}
        return {**self._chunk, "choices": [one]}

    def piece(self, index: int, choice: Choice, piece: Piece) -> dict[str, Any]:
        """The chunk for what a choice has gained."""
        one: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason}
        if self._is_chat:
            one["delta"] = {"content": piece.text} if piece.text else {}
        else:
            one["text"] = piece.text
        one["logprobs"] = self._logprobs(piece.tokens) if piece.tokens else None
        with_ids = self._body.return_token_ids
        if with_ids:
            one["token_ids"] = [token.id for token in piece.tokens]
        if piece.threads:
            one["thread_events"] = [_thread_event(news, with_ids) for news in piece.threads]
        if piece.finish_reason is not None:
            one["rollout"] = _rollout(choice)
        return {**self._chunk, "choices": [one]}

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last chunk of a stream that counts its tokens."""
        return {**self._chunk, "choices": [], "usage": self._usage(choices)}

    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each once."""
        return sum(map(len, self._prompts))

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        completion = sum(choice.token_count for choice in choices)
        prompt = self.prompt_tokens()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _logprobs(self, tokens: Sequence[TokenPiece]) -> dict[str, Any] | None:
        if not self._body.wants_logprobs:
            return None
        texts = [self._token_text(token.id) for token in tokens]
        logprobs = [token.logprob for token in tokens]
        if not self._is_chat:
            return {
                "tokens": texts,
                "token_logprobs": logprobs,
                "top_logprobs": None,
                "text_offset": [token.offset for token in tokens],
            }
        content = [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in zip(texts, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token_text(self, token: int) -> str:
        """One token as text; one that is part of a character as its vocabulary spells it."""
        text = str(self._tokenizer.decode([token]))
        if _REPLACEMENT not in text:
            return text
        return str(self._tokenizer.convert_ids_to_tokens(token))


def _rollout(choice: Choice) -> dict[str, Any] | None:
    """What the engine says of a whole rollout; None where a stop string cut it."""
    rollout = choice.rollout
    if rollout is None or choice.hit_stop:
        return None
    return {
        "finish_reason": rollout.finish_reason,
        "critical_path": rollout.critical_path,
        "total_tokens": rollout.total_tokens,
        "blocks": len(rollout.trajectory.blocks),
    }


def _thread_event(news: ThreadEvent, with_ids: bool) -> dict[str, Any]:
    shown = dataclasses.asdict(news)
    ids = shown.pop("token_ids")
    return {**shown, "token_ids": list(ids)} if with_ids else shown
