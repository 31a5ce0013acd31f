"""What the scripts share: how a problem is asked, when two are the same, how errors show."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

from stableopd.types import DataError, StableOPDError

# OpenR1's generations were asked for with this sentence (its data card, "Dataset curation").
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# Where the instruction goes. DeepSeek-R1's distilled models ask for "user".
PLACES = ("system", "user")

# LaTeX that changes how a problem looks, but not what it says.
LOOKS = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[ ,;:!()\[\]]|\$|\s+|\\\\(?=\s)"
)


def ask(problem: str, instruction: str, place: str) -> list[dict[str, str]]:
    """The prompt of a problem as chat messages.

    Args:
        problem: The problem.
        instruction: How to answer it; "" leaves it out.
        place: "system" makes the instruction a message of its own, "user" puts it before the
            problem.

    Returns:
        Messages, the last one of the user.

    Raises:
        DataError: The place is neither of the two.
    """
    if place not in PLACES:
        raise DataError(f"--place {place}: choose from {', '.join(PLACES)}.")
    if not instruction:
        return [{"role": "user", "content": problem}]
    if place == "user":
        return [{"role": "user", "content": f"{instruction}\n\n{problem}"}]
    return [{"role": "system", "content": instruction}, {"role": "user", "content": problem}]


def read_instruction(file: Path | None) -> str:
    """The instruction in a file; without one, the sentence of OpenR1.

    Args:
        file: A text file, or None.

    Returns:
        The instruction, without the white space around it.

    Raises:
        DataError: The file cannot be read.
    """
    if file is None:
        return INSTRUCTION
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--instruction {file}: cannot be read ({error}).") from None


def normalised(problem: str) -> str:
    """A problem without what does not distinguish it: case, spacing, LaTeX delimiters, a last dot.

    Signs and digits stay, so that `x+1` and `x-1` are two problems.

    Args:
        problem: The problem.

    Returns:
        Text that is the same for two copies of one problem.
    """
    text = unicodedata.normalize("NFKC", problem).casefold().replace("\\dfrac", "\\frac")
    return LOOKS.sub("", text.replace("\\tfrac", "\\frac")).rstrip(".?!:")


def run(app: Callable[[], None]) -> None:
    """Run a typer app; a user's mistake is one line on standard error and exit code 2.

    Args:
        app: The app.
    """
    try:
        app()
    except StableOPDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
