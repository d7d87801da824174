"""Answers that are graded while others are still being written."""

import concurrent.futures

from tw_jax.rewards.graders import Grade, Grader


class GradingQueue:
    """Grades in threads of its own; use it as `with GradingQueue(...) as queue`.

    A grader that is slow holds up nobody before `collect`, and one that hangs not longer than
    `collect` waits.
    """

    def __init__(self, grader: Grader, at_once: int) -> None:
        """Starts nothing yet.

        Args:
          grader: may be called from several threads.
          at_once: answers that are graded at a time.
        """
        self._grader = grader
        self._threads = concurrent.futures.ThreadPoolExecutor(at_once)
        self._waiting: dict[int, concurrent.futures.Future[Grade]] = {}

    def __enter__(self) -> "GradingQueue":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, key: int, answer_text: str, reference: str | None) -> None:
        """Puts an answer into the queue and returns at once; `key` names it."""
        self._waiting[key] = self._threads.submit(self._grader, answer_text, reference)

    def collect(self, wait_s: float | None) -> dict[int, Grade]:
        """The grades of all answers submitted since the last call, by key.

        Args:
          wait_s: seconds to wait at most; what is not graded by then counts as `grading_backlog`.
            None waits for all, each of which the grader's own limit bounds.

        Raises:
          UserError: the grader cannot work at all.
        """
        waiting, self._waiting = self._waiting, {}
        done, _ = concurrent.futures.wait(waiting.values(), timeout=wait_s)
        grades = {}
        for key, future in waiting.items():
            if future in done:
                grades[key] = future.result()
            else:
                future.cancel()
                grades[key] = Grade(
                    False, None, "grading_backlog", message=f"not graded within {wait_s:g} s"
                )
        return grades
