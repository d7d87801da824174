"""An OpenAI-compatible chat server on the loopback that answers from a script, with faults."""

import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable

from tests.data.rewrite.marked_traces import Case, cases
from tests.loopback_server import LoopbackHandler, LoopbackServer

_SECTION = re.compile(r"----- BEGIN ([A-Z]+) (\w+) -----\n(.*?)\n----- END \1 \2 -----", re.DOTALL)


@dataclasses.dataclass
class Question:
    """A request, taken apart."""

    stage: str
    sections: dict[str, str]
    attempt: int
    seen: int  # how often the same question was asked before
    body: dict


@dataclasses.dataclass
class Reply:
    """What is sent back; `raw` in place of a well-formed answer."""

    text: str | None = ""
    finish_reason: str = "stop"
    status: int = 200
    headers: dict = dataclasses.field(default_factory=dict)
    pause_s: float = 0.0
    raw: str | None = None
    usage: dict | None = None


Answer = Callable[[Question], Reply]


def question(body: dict, seen: int = 0) -> Question:
    content = body["messages"][-1]["content"]
    attempt = re.search(r"# Attempt (\d+)", content)
    return Question(
        stage=re.findall(r"^# Task: (\w+)$", content, re.MULTILINE)[-1],
        sections={name: text for name, _, text in _SECTION.findall(content)},
        attempt=int(attempt[1]) if attempt else 1,
        seen=seen,
        body=body,
    )


def case_of(asked: Question) -> Case:
    return next(case for case in cases() if case.problem == asked.sections["PROBLEM"])


def good_answer(asked: Question, case: Case | None = None) -> dict:
    """What a careful LLM answers."""
    case = case or case_of(asked)
    if asked.stage == "steps":
        step = {"number": 1, "first": 1, "last": case.n_lines, "summary": "all of it"}
        return {"steps": [{**step, "depends_on": [], "substeps": []}]}
    if asked.stage == "groups":
        threads = [[thread.lines for thread in block] for block in case.blocks]
        return {"groups": [{"reason": "independent", "threads": lines} for lines in threads]}
    if asked.stage == "verify":
        numbers = range(1, len(case.blocks) + 1)
        return {"verdicts": [{"block": n, "keep": True, "reason": "yes"} for n in numbers]}
    if asked.stage == "references":
        here = [t for block in case.blocks for t in block]
        found = [t.edits for t in here if t.source == asked.sections["THREAD"]]
        return {"replacements": found[0] if found else []}
    first = asked.sections["THREADS"].partition("\n\nThread 2:\n")[0].removeprefix("Thread 1:\n")
    block = next(block for block in case.blocks if block[0].written == first)
    return {"outlines": [thread.plan for thread in block]}


def good(asked: Question) -> Reply:
    return Reply(json.dumps(good_answer(asked)))


class ChatServer(LoopbackServer):
    """`with ChatServer(answer) as server`; `url`, and `questions` as they came."""

    def __init__(self, answer: Answer = good) -> None:
        self.answer = answer
        self.questions: list[Question] = []
        self.bodies: list[dict] = []
        self.at_once = self.most_at_once = 0
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()

    def handler(self):
        outer = self

        class Handler(LoopbackHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                content = body["messages"][-1]["content"]
                with outer._lock:
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    asked = question(body, outer._seen.get(content, 0))
                    outer._seen[content] = asked.seen + 1
                    outer.questions.append(asked)
                    outer.bodies.append(body)
                try:
                    reply = outer.answer(asked)
                    time.sleep(reply.pause_s)
                finally:
                    with outer._lock:
                        outer.at_once -= 1
                self.reply(body, reply)

            def reply(self, body, reply):
                message = {"role": "assistant", "content": reply.text}
                answer = {
                    "choices": [{"message": message, "finish_reason": reply.finish_reason}],
                    "usage": reply.usage or usage(body, reply.text),
                }
                if reply.usage == {}:
                    del answer["usage"]
                text = json.dumps(answer) if reply.raw is None else reply.raw
                self.send(reply.status, text, reply.headers)

        return Handler


def usage(body: dict, text: str | None) -> dict:
    """Tokens as a server could count them."""
    prompt = sum(len(message["content"]) for message in body["messages"])
    return {"prompt_tokens": prompt // 4, "completion_tokens": len(text or "") // 4 + 1}
