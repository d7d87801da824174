"""Random trajectories in every schema's language, for property-based tests.

The canonical texts are written out here independently of the library.
"""

import dataclasses

import numpy as np
from hypothesis import strategies as st

_TEXT = st.text(alphabet="abc123 +=\n", max_size=6)
_BODY = st.text(alphabet="abc123+=", min_size=1, max_size=6)


@dataclasses.dataclass(frozen=True)
class RandomText:
    """Prompt and response as text, and the response cut where blocks begin and end."""

    prompt: str
    segments: tuple[str, ...]  # one more than blocks
    blocks: tuple[tuple[tuple[str, str], ...], ...]  # (plan, body) of every thread

    def response(self, language: str = "threadweaver") -> str:
        """The response in the language of a schema."""
        text = self.segments[0]
        for block, segment in zip(self.blocks, self.segments[1:], strict=True):
            text += BLOCKS[language](block) + segment
        return text


def canonical_block(threads) -> str:
    """The bytes of DESIGN section 5."""
    outlines = "".join(
        f"<Outline>{i}: {plan}</Outline>\n" for i, (plan, _) in enumerate(threads, start=1)
    )
    bodies = "".join(
        f"<Thread>\n{i}: {body}\n</Thread>" for i, (_, body) in enumerate(threads, start=1)
    )
    return f"<Parallel>\n<Outlines>\n{outlines}</Outlines>\n{bodies}\n</Parallel>"


def native_block(threads) -> str:
    """NPR's format; the takeaway repeats the plans."""
    plans = "".join(f"<plan>{i}: {plan}</plan>\n" for i, (plan, _) in enumerate(threads, start=1))
    steps = "".join(f"<step>\n{i}: {body}\n</step>\n" for i, (_, body) in enumerate(threads, 1))
    takeaway = "".join(plan for plan, _ in threads)
    return f"<guideline>\n{plans}</guideline>\n{steps}<takeaway>\n{takeaway}\n</takeaway>"


def answer_of(body: str) -> str:
    """What an APR thread with this private text answers; often nothing."""
    return body.partition("+")[2]


def apr_block(threads) -> str:
    """Messages, then threads with their private text and answer."""
    messages = "".join(f"<Message>{plan}</Message>\n" for plan, _ in threads)
    bodies = "".join(f"<Thread>\n{body}<Join>{answer_of(body)}</Join>" for _, body in threads)
    return f"<Spawn>\n{messages}</Spawn>\n{bodies}\n"


BLOCKS = {"threadweaver": canonical_block, "native": native_block, "apr": apr_block}


@st.composite
def random_texts(draw, max_blocks: int = 3, max_threads: int = 4) -> RandomText:
    """Texts with up to `max_blocks` canonical blocks of up to `max_threads` threads."""
    threads = st.lists(st.tuples(_BODY, _BODY), min_size=1, max_size=max_threads).map(tuple)
    blocks = tuple(draw(st.lists(threads, max_size=max_blocks)))
    segments = tuple(draw(_TEXT) for _ in range(len(blocks) + 1))
    return RandomText(draw(st.text(alphabet="12+=", min_size=1, max_size=4)), segments, blocks)


def encode(text: RandomText, tokenizer, language: str = "threadweaver") -> tuple[np.ndarray, int]:
    """Token ids of prompt, response and end of text, and the prompt's length."""
    prompt = tokenizer(text.prompt).input_ids
    response = tokenizer(text.response(language), add_special_tokens=False).input_ids
    return np.array([*prompt, *response, tokenizer.eos_token_id], np.int32), len(prompt)


@st.composite
def random_trajectories(draw, tokenizer, schema, **limits):
    """Parsed trajectories; some threads are marked as closed by the engine, some after an eos."""
    ids, prompt_len = encode(draw(random_texts(**limits)), tokenizer, schema.name)
    trajectory = schema.parse(ids, prompt_len)
    blocks = []
    for block in trajectory.blocks:
        threads = []
        for thread in block.threads:
            closed = draw(st.sampled_from(["by the model", "by a budget", "after eos"]))
            close = len(schema.fork_join.thread_close)
            ending = tuple(ids[thread.end - close : thread.end].tolist())
            if closed != "by the model" and ending == schema.fork_join.thread_close:
                replaced = (schema.eos_id,) if closed == "after eos" else ()
                thread = dataclasses.replace(
                    thread, sampled_end=thread.end - close, replaced=replaced
                )
            threads.append(thread)
        blocks.append(dataclasses.replace(block, threads=tuple(threads)))
    return dataclasses.replace(trajectory, blocks=tuple(blocks))
