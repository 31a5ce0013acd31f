"""Is a completion's answer the right one? By text, or by mathematics with math-verify.

math-verify limits its time with SIGALRM, which works in the main thread alone and cannot interrupt
a single long operation in C. So it runs in a child process (this module as a script) that is asked
one question at a time and killed when it does not answer: no thread, no endless power and no crash
of a parser reaches the caller. The child imports neither torch nor transformers.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

from stableopd.types import DataError

__all__ = ["Grade", "grade", "judge"]

# The child limits each parse and each comparison itself; the parent kills it when that fails.
SOFT_SECONDS = 2
HARD_SECONDS = 8.0
START_SECONDS = 120.0
MEMORY_BYTES = 4 * 2**30  # a tower of powers must not take the memory of the training


@dataclass(frozen=True, slots=True)
class Grade:
    """What came of an answer; one that took too long is not right."""

    is_right: bool
    is_late: bool = False


def grade(completion: str, answer: str, grader: str, marker: str) -> bool:
    r"""Whether the answer in a completion is right.

    "exact" compares the text after the last marker, without the white space around it; without the
    marker a completion is wrong. "math" compares the last box, formula or number by its value, so
    that 1/2 is 0.5; boxes that stand close together count as one set of answers. An answer that
    math-verify does not understand within seconds is wrong.

    Args:
        completion: The completion as text.
        answer: The right answer; for "math" with or without $ or \boxed.
        grader: "exact" or "math".
        marker: What stands before the answer, such as "####"; "" compares the whole completion.
            "math" does not use it.

    Returns:
        True where the answer is right.

    Raises:
        DataError: The grader is unknown, or math-verify cannot be started.
    """
    return judge(completion, answer, grader, marker).is_right


def judge(
    completion: str, answer: str, grader: str, marker: str, time_limit: float | None = None
) -> Grade:
    """Grade a completion as `grade` does, and tell whether its time ran out.

    Args:
        completion: The completion as text.
        answer: The right answer.
        grader: "exact" or "math".
        marker: What stands before the answer, for "exact".
        time_limit: Seconds that math-verify has for this one, parsing and comparing together; None
            limits each part by itself, and tells an answer that is late from one that is wrong
            only where its whole process had to be killed.

    Returns:
        Whether it is right, and whether it was late.

    Raises:
        DataError: The grader is unknown, or math-verify cannot be started.
    """
    if grader == "math":
        return _CHILD.ask(completion, answer, time_limit)
    if grader != "exact":
        raise DataError(f"data.grader = {grader!r} is not possible; choose from exact, math.")
    if marker not in completion:
        return Grade(False)
    text = completion.rpartition(marker)[2] if marker else completion
    return Grade(text.strip() == answer.strip())


class _Child:
    """The process that runs math-verify; started by the first question, one question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, completion: str, answer: str, time_limit: float | None) -> Grade:
        # With a limit of the caller's the child sets none: one that strikes there looks like "no".
        soft = SOFT_SECONDS if time_limit is None and hasattr(signal, "SIGALRM") else None
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            question = json.dumps([completion, answer, soft]).encode("ascii") + b"\n"
            reply, is_late = self._exchange(question, time_limit or HARD_SECONDS)
        return Grade(reply == b"1\n", is_late)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:  # what was written last never arrived, which is of no matter
                continue

    def _start(self) -> None:
        self.close()
        # The child finds the package where this process found it.
        paths = os.pathsep.join(path for path in sys.path if path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "stableopd.data.grading"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
            )
        except OSError as error:
            raise DataError(
                f"data.grader = 'math': the process for math-verify cannot be started ({error})."
            ) from None
        if self._exchange(b"", START_SECONDS)[0] != b"ready\n":
            raise DataError(
                "data.grader = 'math': math-verify cannot be loaded; see what "
                "`python -c 'import math_verify'` says, or set data.grader = \"exact\"."
            )

    def _exchange(self, question: bytes, seconds: float) -> tuple[bytes, bool]:
        """Write a line and read one, b"" when the child died; and whether it was killed as late."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        except BaseException:  # an interrupt: an unread reply must not answer the next question
            self.close()
            raise
        finally:
            timer.cancel()
        if not reply.endswith(b"\n"):
            self.close()
            return b"", late.is_set()
        return reply, False


_CHILD = _Child()
atexit.register(_CHILD.close)


def _serve() -> None:
    """Answer questions from standard input until it ends: the child's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # parsers that print must not answer for us
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    import math_verify  # noqa: F401  the parent waits for this import

    logging.disable(logging.CRITICAL)
    replies.write(b"ready\n")
    replies.flush()
    for line in sys.stdin.buffer:
        completion, answer, soft_limit = json.loads(line)
        replies.write(b"1\n" if _equal(completion, answer, soft_limit) else b"0\n")
        replies.flush()


def _equal(completion: str, answer: str, soft_limit: int | None) -> bool:
    from math_verify import verify
    from math_verify.errors import TimeoutException

    try:
        target = _parse(completion, soft_limit)
        if not target:
            return False
        return verify(_parse_gold(answer, soft_limit), target, timeout_seconds=soft_limit)
    except (Exception, TimeoutException):  # whatever a model wrote: not understood is not right
        return False


def _parse_gold(answer: str, soft_limit: int | None) -> list[Any]:
    # A bare answer such as \frac{1}{2} or (1, 2) is found as a formula only between delimiters.
    delimited = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    text = answer if delimited else f"${answer}$"
    return _parse(text, soft_limit) or _parse(answer, soft_limit)


def _parse(text: str, soft_limit: int | None) -> list[Any]:
    from math_verify import parse

    # A value of None turns the limit off, also where there is no SIGALRM; the parent's remains.
    limit: Any = soft_limit
    return parse(text, parsing_timeout=limit)


if __name__ == "__main__":
    _serve()
