"""A completions server that answers problems with given texts, one call per rollout."""

import collections
import time

from tests.rollout.completions_server import CompletionsServer
from tw_jax.data.text import encode_prompt, encode_response


class WrittenAnswers(CompletionsServer):
    """Answers prompt p with one of `texts[p]`, by the call's seed alone.

    A text that ends with "..." is cut off by the budget. For rollouts without forks.
    """

    def __init__(self, texts, tokenizer, *, plain_tags=False, pause_s=0.0):
        """Starts no server yet.

        `plain_tags`: the model spells its tags out, as one that has no control tokens does.
        `garbled`, an attribute: the prompt that gets nothing but half an answer.
        """
        super().__init__(self._answer, pause_s=pause_s)
        self._tokenizer, self._plain = tokenizer, plain_tags
        self._texts = {self._ids(prompt): several for prompt, several in texts.items()}
        self.asked = collections.Counter()
        self.garbled: str | None = None

    def _ids(self, prompt):
        return tuple(encode_prompt(self._tokenizer, prompt).tolist())

    def _answer(self, body, write):
        prompt = tuple(body["prompt"])
        if self.garbled is not None and prompt == self._ids(self.garbled):
            return {}
        texts = self._texts[prompt]
        text = texts[body["seed"] % len(texts)]
        self.asked[prompt, body["seed"]] += 1
        whole = text.removesuffix("...")
        if self._plain:
            ids = encode_prompt(self._tokenizer, whole).tolist()[1:]
            ids.append(self._tokenizer.eos_token_id)
        else:
            ids = encode_response(self._tokenizer, whole, self._tokenizer.eos_token_id).tolist()
        if whole == text:
            return {"token_ids": ids, "finish_reason": "stop"}
        room = body["max_tokens"]
        return {"token_ids": (ids[:-1] * room)[:room], "finish_reason": "length"}


def wait_for(condition, timeout_s=60.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
