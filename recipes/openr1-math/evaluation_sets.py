"""Turn local copies of the six evaluation sets into JSONL with id, prompt, answer and problem.

Nothing is downloaded; README.md has the commands that do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from problem_text import ask, read_instruction, run

from stableopd.data.rows import Row, read_rows
from stableopd.runfolder import write_atomically
from stableopd.types import DataError


@dataclass(frozen=True)
class EvaluationSet:
    """One set: where it usually comes from, how many problems it has, samples of each (paper)."""

    hub: str
    num_problems: int
    num_samples: int
    within: str = ""  # the part of the repository that is meant


# Columns were looked up on the data cards: problem, answer (MATH-500, AMC, AIME), question, answer
# (Minerva), question, final_answer (OlympiadBench, where it is a list).
SETS = {
    "math500": EvaluationSet("HuggingFaceH4/MATH-500", 500, 1),
    "minerva": EvaluationSet("math-ai/minervamath", 272, 1),
    "olympiadbench": EvaluationSet("Hothan/OlympiadBench", 674, 1, "OE_TO_maths_en_COMP"),
    "amc": EvaluationSet("AI-MO/aimo-validation-amc", 83, 32),
    "aime24": EvaluationSet("HuggingFaceH4/aime_2024", 30, 32),
    "aime25": EvaluationSet("math-ai/aime25", 30, 32),
}
PROBLEM_COLUMNS = ("problem", "question", "Problem")
ANSWER_COLUMNS = ("answer", "final_answer", "Answer")
DATA_FILES = (".jsonl", ".parquet")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="Folder with a subfolder for each set.")],
    output: Annotated[Path, typer.Option(help="Where the JSONL files go.")],
    only: Annotated[list[str], typer.Option(help="A set to convert; default: all six.")] = [],  # noqa: B006
    instruction: Annotated[
        Path | None, typer.Option(help="Text file; default: the sentence of OpenR1.")
    ] = None,
    place: Annotated[str, typer.Option(help="Of the instruction: system or user.")] = "system",
) -> None:
    """Convert each set; all are read before the first file is written."""
    if unknown := sorted(set(only) - set(SETS)):
        raise DataError(f"--only {unknown[0]}: choose from {', '.join(SETS)}.")
    text = read_instruction(instruction)
    found = {name: convert(source, name, text, place) for name in only or SETS}
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        file = output / f"{name}.jsonl"
        write_atomically(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        usual = SETS[name].num_problems
        note = "" if len(rows) == usual else f" (the usual copy has {usual}: look at the source)"
        print(f"{file}: {len(rows)} problems{note}.")


def convert(source: Path, name: str, instruction: str, place: str) -> list[dict[str, Any]]:
    """Read one set.

    Args:
        source: Folder with a subfolder of the set's name.
        name: One of `SETS`.
        instruction: How to answer a problem.
        place: Where the instruction goes, see `problem_text.ask`.

    Returns:
        Rows with id, prompt (messages), answer (text), and the problem by itself.

    Raises:
        DataError: There is no data, or a row has no problem or no answer.
    """
    the_set = SETS[name]
    folder = source / name
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in DATA_FILES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and the_set.within in str(file.relative_to(folder))
    )
    if not files:
        part = f" of {the_set.within}" if the_set.within else ""
        raise DataError(
            f"{folder}: no data file{part} there; hf download {the_set.hub} --repo-type dataset "
            f"--local-dir {folder}, or leave this set out with --only."
        )
    rows: list[dict[str, Any]] = []
    for file in files:
        for row in read_rows(file, "test"):
            problem = str(_column(row, PROBLEM_COLUMNS))
            answer = as_text(_column(row, ANSWER_COLUMNS))
            prompt = ask(problem, instruction, place)
            number = f"{name}-{len(rows)}"
            rows.append({"id": number, "prompt": prompt, "answer": answer, "problem": problem})
    return rows


def as_text(answer: Any) -> str:
    """An answer as text: lists joined, `142.0` and `033` as whole numbers, no dollars around it.

    Args:
        answer: Text, a number, or a list of these.

    Returns:
        The answer.
    """
    if isinstance(answer, list):
        return ", ".join(as_text(part) for part in answer)
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    text = str(answer).strip()
    if text.startswith("$") and text.endswith("$") and text.count("$") == 2:
        text = text[1:-1].strip()
    return str(int(text)) if text.isascii() and text.isdigit() else text


def _column(row: Row, names: tuple[str, ...]) -> Any:
    for name in names:
        if row.values.get(name) not in (None, "", []):
            return row.values[name]
    raise DataError(
        f"{row.place}: none of the columns {', '.join(names)} holds anything; its columns are "
        f"{', '.join(row.values)}."
    )


if __name__ == "__main__":
    run(app)
