"""The terminal view keeps threads side by side and lets no text steer the terminal."""

import io

import rich.console

from tests.evals.written_rollouts import written_rollout
from tw_jax.evals.generate import print_sample
from tw_jax.evals.sample import sample_from_rollout


def test_threads_stand_side_by_side(tokenizer, schema, task):
    problem = task.problem("heldout", 0, 0)
    rollout = written_rollout(problem.prompt, problem.parallel, tokenizer, schema)
    sample = sample_from_rollout(
        rollout, tokenizer, style="free", answer=problem.answer, correct=True
    )
    sample["parts"][-1]["text"] += "\x1b[31m[bold]markup[/bold]"
    out = io.StringIO()
    print_sample(rich.console.Console(file=out, width=100, color_system="standard"), sample)
    text = out.getvalue()
    one, two = (t["text"] for t in sample["parts"][0]["threads"])
    assert any(one in line and two in line for line in text.splitlines())
    assert "\\x1b[31m[bold]markup[/bold]" in text
    assert "correct" in text
