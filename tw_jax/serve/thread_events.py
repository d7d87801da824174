"""What the threads of a request write, while they write it."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tw_jax.rollout.live_text import LiveText, LiveThread
from tw_jax.serve.text_stream import TextStream
from tw_jax.trajectory.schema import Schema

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast as Tokenizer


@dataclasses.dataclass(frozen=True)
class ThreadEvent:
    """News of one thread.

    Attributes:
      block: index of its parallel block: 0, 1, ...
      thread: its place in the block: 1, 2, ...
      number: the number of its outline, as the model wrote it.
      delta: text that it has written since its last event; header and closing tag left out.
      token_ids: ids that it has sampled since then, its stop token included.
      ended: it writes no more.
    """

    block: int
    thread: int
    number: str
    delta: str
    token_ids: tuple[int, ...]
    ended: bool


class ThreadWatcher:
    """Compares what is seen of a request's threads with what was seen before."""

    def __init__(self, tokenizer: "Tokenizer", schema: Schema) -> None:
        """Starts with a request that has no threads yet."""
        self._tokenizer, self._schema = tokenizer, schema
        self._watched: dict[tuple[int, int], _Watched] = {}
        self._closed = 0  # blocks that hold no more news

    def events(self, text: LiveText, finished: bool) -> tuple[ThreadEvent, ...]:
        """News since the last call, in order of blocks and threads.

        Args:
          text: what is seen now.
          finished: nothing more will come: threads that never joined have ended, too.
        """
        found = []
        for block, thread in _threads(text, self._closed):
            key = block, thread.ordinal
            if key not in self._watched:
                number = self._number(thread)
                self._watched[key] = _Watched(TextStream(self._tokenizer), number)
            found.append(self._news(key, thread))
        self._closed = len(text.closed)
        if finished:
            for (block, ordinal), watched in self._watched.items():
                if not watched.ended:
                    found.append(ThreadEvent(block, ordinal, watched.number, "", (), True))
                    watched.ended = True
        # Of closed blocks, nothing is asked again.
        self._watched = {key: w for key, w in self._watched.items() if key[0] >= self._closed}
        return tuple(event for event in found if event is not None)

    def _news(self, key: tuple[int, int], thread: LiveThread) -> ThreadEvent | None:
        watched = self._watched[key]
        sampled = thread.tokens[thread.header_len :]
        new = tuple(sampled[watched.seen :].tolist())
        if watched.ended or (watched.begun and not new and not thread.ended):
            return None
        ends = (self._schema.fork_join.thread_stop, self._schema.eos_id)
        delta = "".join(watched.stream.step(token) for token in new if token not in ends)
        watched.seen, watched.begun = max(watched.seen, len(sampled)), True
        watched.ended = thread.ended
        return ThreadEvent(*key, watched.number, delta, new, thread.ended)

    def _number(self, thread: LiveThread) -> str:
        fork_join = self._schema.fork_join
        start, end = len(fork_join.header_prefix), thread.header_len - len(fork_join.header_suffix)
        return str(self._tokenizer.decode(thread.tokens[start:end].tolist()))


@dataclasses.dataclass
class _Watched:
    """What is known of one thread; changes with every look."""

    stream: TextStream
    number: str
    seen: int = 0
    begun: bool = False
    ended: bool = False


def _threads(text: LiveText, first: int) -> Iterator[tuple[int, LiveThread]]:
    """(block, thread) of the blocks from `first` on."""
    for block, threads in enumerate(text.closed[first:], first):
        for thread in threads:
            yield block, thread
    for thread in text.threads:
        yield text.block, thread
