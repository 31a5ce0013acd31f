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

from stableopd.data import answers
from stableopd.types import DataError

__all__ = ["Grade", "grade", "grader_of", "judge"]

# The child limits each parse and each comparison itself; the parent kills it when that fails.
SOFT_SECONDS = 2
HARD_SECONDS = 8.0
START_SECONDS = 120.0
# What the child says of an answer.
RIGHT, WRONG, NONE = b"1\n", b"0\n", b"none\n"
MEMORY_BYTES = 4 * 2**30  # a tower of powers must not take the memory of the training


@dataclass(frozen=True, slots=True)
class Grade:
    """What came of an answer; one that took too long is not right.

    Attributes:
        is_right: Whether it is the right one.
        is_late: Whether its time ran out.
        is_found: Whether there is an answer in the text at all.
    """

    is_right: bool
    is_late: bool = False
    is_found: bool = True


def grader_of(grader: str, marker: str, source: str) -> tuple[str, str]:
    """Which grader a setting stands for, for a data set.

    Args:
        grader: "auto", "math" or "exact". "auto" is "exact" for the embedded problems and where a
            marker is given, else "math".
        marker: What stands before the answer, for "exact".
        source: The data set, as `load_prompts` takes it.

    Returns:
        "math" or "exact", and the marker.
    """
    if grader == "auto" and source == "embedded":
        from stableopd.data.arithmetic import ANSWER_MARKER

        return "exact", ANSWER_MARKER
    if grader == "auto":
        return ("exact" if marker else "math"), marker
    return grader, marker


def grade(
    completion: str, answer: str, grader: str, marker: str, is_thinking: bool = False
) -> bool:
    r"""Whether the answer in a completion is right.

    The text after the thought counts; a thought that does not end is no answer. "exact" compares
    the text after the last marker, without the white space around it; without the marker a
    completion is wrong. "math" compares the last box, formula or number by its value, so that 1/2
    is 0.5; boxes that only a comma, an "and" or an "or" joins are one set of answers. Letters of a
    choice and dates are compared as such. An answer that math-verify does not understand within
    seconds is wrong.

    Args:
        completion: The completion as text.
        answer: The right answer; for "math" with or without $ or \boxed.
        grader: "exact" or "math".
        marker: What stands before the answer, such as "####"; "" compares the whole completion.
            "math" does not use it.
        is_thinking: Whether the prompt has begun a thought already, see `answers.opens_thought`.

    Returns:
        True where the answer is right.

    Raises:
        DataError: The grader is unknown, or math-verify cannot be started.
    """
    return judge(completion, answer, grader, marker, is_thinking=is_thinking).is_right


def judge(
    completion: str,
    answer: str,
    grader: str,
    marker: str,
    time_limit: float | None = None,
    is_thinking: bool = False,
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
        is_thinking: Whether the prompt has begun a thought already.

    Returns:
        Whether it is right, whether it was late, and whether there was one.

    Raises:
        DataError: The grader is unknown, or math-verify cannot be started.
    """
    if grader not in ("exact", "math"):
        raise DataError(f"data.grader = {grader!r} is not possible; choose from exact, math.")
    said = answers.after_thought(completion, is_thinking)
    if not said.strip():
        return Grade(False, is_found=False)
    if grader == "math":
        return _CHILD.ask(said, answer, time_limit)
    if marker not in said:
        return Grade(False, is_found=False)
    text = said.rpartition(marker)[2] if marker else said
    return Grade(text.strip() == answer.strip(), is_found=bool(text.strip()))


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
        return Grade(reply == RIGHT, is_late, reply in (RIGHT, WRONG))

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
        replies.write(_answer(*json.loads(line)))
        replies.flush()


def _answer(completion: str, answer: str, soft_limit: int | None) -> bytes:
    """Whether the text that follows the thought gives the answer."""
    from math_verify.errors import TimeoutException

    try:
        is_right = _equal(completion, answer, soft_limit)
    except (Exception, TimeoutException):  # not understood is not right, whatever a model wrote
        return WRONG
    return NONE if is_right is None else RIGHT if is_right else WRONG


def _equal(said: str, answer: str, soft_limit: int | None) -> bool | None:
    """The same as a truth value; None where there is no answer in the text."""
    from math_verify import verify

    boxes = answers.last_box(said)
    gold = answers.last_box(answer) or (answer,)
    if len(gold) == 1 and (letter := _only_letter(gold[0])):
        found = answers.letter_of(boxes[-1]) if boxes else answers.letter_in(said)
        if found:
            return found == letter
    if len(gold) == 1 and (date := answers.date_in(gold[0], is_all=True)):
        found = answers.date_in(boxes[-1], is_all=True) if boxes else answers.date_in(said)
        return found == date if found or boxes else None
    if boxes and answers.date_in(boxes[-1], is_all=True):
        return False  # to math-verify 2025-01-03 is a difference
    target = _parse(_boxed(boxes) if boxes else answers.final_text(said), soft_limit)
    if not target:
        return None
    return verify(_parse_gold(answer, soft_limit), target, timeout_seconds=soft_limit)


def _only_letter(answer: str) -> str | None:
    """The letter of an answer that is one choice, such as C or (C), and nothing else."""
    bare = answer.strip().strip("$").strip()
    return answers.letter_of(bare) if answers.is_letter(bare) else None


def _boxed(boxes: tuple[str, ...]) -> str:
    # A box is mathematics by itself: dollars in it are of money, or change nothing.
    plain = [answers.plain_math(box).replace("$", "") for box in boxes]
    return " or ".join(f"\\boxed{{{box}}}" for box in plain)


def _parse_gold(answer: str, soft_limit: int | None) -> list[Any]:
    # A bare answer such as \frac{1}{2} or (1, 2) is found as a formula only between delimiters.
    if boxes := answers.last_box(answer):
        return _parse(_boxed(boxes), soft_limit)
    bare = answers.plain_math(answer)
    if bare.count("$") == 1:  # of money
        bare = bare.replace("$", "")
    delimited = any(mark in bare for mark in ("$", "\\(", "\\["))
    text = bare if delimited else f"${bare}$"
    return _parse(text, soft_limit) or _parse(bare, soft_limit)


def _parse(text: str, soft_limit: int | None) -> list[Any]:
    from math_verify import parse

    # A value of None turns the limit off, also where there is no SIGALRM; the parent's remains.
    limit: Any = soft_limit
    return parse(answers.plain_math(text), parsing_timeout=limit)


if __name__ == "__main__":
    _serve()
