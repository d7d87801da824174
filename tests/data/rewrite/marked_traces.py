"""Hand-made traces with marks: what goes in, what an LLM would answer, what must come out.

In traces.txt, `{{ plan` begins a block and its first thread, `|| plan` the next thread, `}}` ends
the block, and `[[words=>other words]]` is a reference with its replacement. The expected bytes are
put together here, from the marks alone, without any code of the package.
"""

import dataclasses
import functools
import pathlib
import re

_EDIT = re.compile(r"\[\[(.*?)=>(.*?)\]\]")
_MARKS = ("{{", "||", "}}")


@dataclasses.dataclass
class Thread:
    plan: str
    marked: list[str]
    first: int

    @property
    def source(self) -> str:
        return _EDIT.sub(r"\1", "\n".join(self.marked)).strip()

    @property
    def written(self) -> str:
        return _EDIT.sub(r"\2", "\n".join(self.marked)).strip()

    @property
    def edits(self) -> list[dict]:
        found = _EDIT.findall("\n".join(self.marked))
        return [{"find": a, "replace": b, "reason": "points at a sibling"} for a, b in found]

    @property
    def lines(self) -> dict:
        """First and last line, without blank lines at the end."""
        return {"first": self.first, "last": self.first + len(self.source.split("\n")) - 1}


@dataclasses.dataclass
class Case:
    id: str
    problem: str
    final: str
    source: str
    expected: str
    blocks: list[list[Thread]]

    @property
    def n_lines(self) -> int:
        return self.source.count("\n") + 1


def make_case(name: str, problem: str, marked: str, final: str) -> Case:
    source, expected, blocks, line = [], [], [], 1
    thread = None
    for text in marked.split("\n"):
        if not text.startswith(_MARKS):
            source.append(_EDIT.sub(r"\1", text))
            line += 1
            if thread is None:
                expected.append(text)
            else:
                thread.marked.append(text)
            continue
        if text.startswith("{{"):
            blocks.append([])
        if text.startswith("}}"):
            thread = None
            plans = [f"<Outline>{i + 1}: {t.plan}</Outline>" for i, t in enumerate(blocks[-1])]
            threads = [
                f"<Thread>\n{i + 1}: {t.written}\n</Thread>" for i, t in enumerate(blocks[-1])
            ]
            expected += ["<Parallel>", "<Outlines>", *plans, "</Outlines>", "".join(threads)]
            expected.append("</Parallel>")
        else:
            thread = Thread(text[2:].strip(), [], line)
            blocks[-1].append(thread)
    return Case(name, problem, final, "\n".join(source), "\n".join(expected), blocks)


@functools.cache
def cases() -> tuple[Case, ...]:
    text = pathlib.Path(__file__).with_name("traces.txt").read_text()
    made = []
    for part in text.split("=== ")[1:]:
        name, _, rest = part.partition("\n")
        problem, marked, final = rest.rstrip("\n").split("\n---\n")
        made.append(make_case(name, problem, marked, final))
    return tuple(made)


def record(case: Case, form: int) -> tuple[dict, str]:
    """A record in one of four forms, and the response that must come out."""
    fields = {"prompt": case.problem, "answer": case.final, "id": case.id}
    if form == 0:
        fields |= {"reasoning": case.source, "final": case.final}
        return fields, f"<think>\n{case.expected}\n</think>\n\n{case.final}"
    if form == 1:
        response = f"<think>\n{case.source}\n</think>\n\n{case.final}"
        return fields | {"response": response}, response.replace(case.source, case.expected)
    if form == 2:
        response = f"{case.source}</think>{case.final}"
        return fields | {"response": response}, response.replace(case.source, case.expected)
    return fields | {"reasoning": case.source}, case.expected
