"""Make train-sft.jsonl and train-opd.jsonl from a local copy of open-r1/OpenR1-Math-220k.

The filters are the paper's (arXiv 2604.08527): generations that are too long or judged wrong by
Math-Verify are dropped, a problem stays if one stays. What the paper leaves open is chosen here and
said in README.md; `counts.json` holds how many were left after each stage.

Each file is written whole or not at all, counts.json last: without it the script begins again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from problem_text import ask, normalised, read_instruction, run

from stableopd.data.grading import grade
from stableopd.data.prompts import render
from stableopd.data.rows import Row, one_line, read_rows
from stableopd.runfolder import write_atomically
from stableopd.types import DataError, Message, Prompt

COLUMNS = (
    *("problem", "answer", "uuid", "generations", "is_reasoning_complete"),
    "correctness_math_verify",
)
# The stages, in the order in which the counts are shown.
STAGES = (
    "problems read",
    "problems dropped: no text or no answer",
    "problems dropped: in an evaluation set",
    "problems dropped: a copy of an earlier problem",
    "problems dropped: prompt too long",
    "problems dropped: no generation left",
    "problems kept",
    "problems for SFT",
    "problems for OPD",
    "generations read, of problems not dropped before",
    "generations dropped: not complete",
    "generations dropped: holds the stop token",
    "generations dropped: too long",
    "generations dropped: wrong",
    "generations kept",
    "generations right to us, wrong in the data",
    "generations wrong to us, right in the data",
)
VERIFIERS = ("grade", "column")
TOLD_EVERY = 5_000  # problems

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the two files; it is written into counts.json."""

    source: str
    tokenizer: str
    evaluation: str
    instruction: str
    place: str
    verify: str
    max_tokens: int
    max_prompt_tokens: int
    num_opd: int
    seed: int


@dataclass
class Filter:
    """What the stages need to know, and what they counted."""

    settings: Settings
    tokenizer: Any
    held_out: set[str]
    seen: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="Folder of parquet files, or of save_to_disk.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with the student's tokenizer.")],
    output: Annotated[Path, typer.Option(help="Where the files go.")],
    evaluation: Annotated[
        Path, typer.Option(help="Folder that evaluation_sets.py wrote; its problems are left out.")
    ],
    instruction: Annotated[
        Path | None, typer.Option(help="Text file; default: the sentence of OpenR1.")
    ] = None,
    place: Annotated[str, typer.Option(help="Of the instruction: system or user.")] = "system",
    verify: Annotated[
        str, typer.Option(help="grade: judge again; column: take the data's own verdict.")
    ] = "grade",
    max_tokens: Annotated[int, typer.Option(help="Longest generation, its stop included.")] = 8192,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longest prompt.")] = 1024,
    num_opd: Annotated[int, typer.Option(help="Problems for OPD; SFT gets the others.")] = 13_000,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
) -> None:
    """Filter, split, and write the two files and counts.json."""
    if verify not in VERIFIERS:
        raise DataError(f"--verify {verify}: choose from {', '.join(VERIFIERS)}.")
    text = read_instruction(instruction)
    settings = Settings(
        *(str(source), str(tokenizer), str(evaluation), text, place, verify),
        *(max_tokens, max_prompt_tokens, num_opd, seed),
    )
    if _is_made(output, settings):
        print(f"{output}: there already, with the same settings.")
        return
    filters = Filter(settings, _tokenizer(tokenizer), _held_out(evaluation))
    rows: list[dict[str, Any]] = []
    for number, found in enumerate(read_rows(source, "train"), start=1):
        if (row := keep(found, filters)) is not None:
            rows.append(row)
        if number % TOLD_EVERY == 0:
            print(f"{number} problems read, {len(rows)} kept", file=sys.stderr)
    sft, opd = split(rows, num_opd, seed)
    filters.counts.update({"problems for SFT": len(sft), "problems for OPD": len(opd)})
    counts = {stage: filters.counts[stage] for stage in STAGES}
    output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train-sft", sft), ("train-opd", opd)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        write_atomically(output / f"{name}.jsonl", "".join(lines))
    made = {"settings": dataclasses.asdict(settings), "counts": counts}
    write_atomically(output / "counts.json", json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    for stage, count in counts.items():
        print(f"{count:>8}  {stage}")


def keep(row: Row, filters: Filter) -> dict[str, Any] | None:
    """The training row of a problem, or None where a stage drops it; every stage is counted.

    The stage that takes longest, grading, comes last.

    Args:
        row: A row of OpenR1-Math-220k.
        filters: What the stages need; counts and seen problems are added to it.

    Returns:
        A row with id, prompt (messages), solution, answer and num_tokens; or None.

    Raises:
        DataError: The row lacks a column.
    """
    counts, settings, values = filters.counts, filters.settings, row.values
    if lacking := [name for name in COLUMNS if name not in values]:
        raise DataError(
            f"{row.place}: no column {lacking[0]!r} (its columns are {', '.join(values)}); this "
            "is not OpenR1-Math-220k as its data card describes it."
        )
    counts["problems read"] += 1
    problem, answer = str(values["problem"] or "").strip(), str(values["answer"] or "").strip()
    if not problem or not answer:
        counts["problems dropped: no text or no answer"] += 1
        return None
    key = normalised(problem)
    for reason, keys in (
        ("in an evaluation set", filters.held_out),
        ("a copy of an earlier problem", filters.seen),
    ):
        if key in keys:
            counts[f"problems dropped: {reason}"] += 1
            return None
    filters.seen.add(key)
    prompt = ask(problem, settings.instruction, settings.place)
    opening = _opening(prompt, row, filters)
    if opening is None:
        counts["problems dropped: prompt too long"] += 1
        return None
    found = golden(values, answer, opening, filters)
    if found is None:
        counts["problems dropped: no generation left"] += 1
        return None
    counts["problems kept"] += 1
    solution, length = found
    name = str(values["uuid"] or row.fallback_id)
    name = f"{name} {row.fallback_id}" if name in filters.ids else name
    filters.ids.add(name)
    return {
        "id": name,
        "prompt": prompt,
        "solution": solution,
        "answer": answer,
        "num_tokens": length,
    }


def golden(
    values: dict[str, Any], answer: str, opening: str, filters: Filter
) -> tuple[str, int] | None:
    """The golden solution among a problem's generations, and its length in tokens.

    Args:
        values: The columns of the problem.
        answer: The right answer.
        opening: What the rendered prompt ends with and the solution need not repeat.
        filters: Settings, tokenizer and counts.

    Returns:
        The first generation that is complete, short enough and right; or None.
    """
    counts, right = filters.counts, list[tuple[str, int]]()
    for number, generation in enumerate(values["generations"] or []):
        counts["generations read, of problems not dropped before"] += 1
        text = str(generation).strip()
        solution = text.removeprefix(opening).lstrip() if opening else text
        ids = filters.tokenizer(solution, add_special_tokens=False, verbose=False)["input_ids"]
        if not _flag(values["is_reasoning_complete"], number):
            reason = "not complete"
        elif filters.tokenizer.eos_token_id in ids:
            reason = "holds the stop token"
        elif len(ids) + 1 > filters.settings.max_tokens:
            reason = "too long"
        elif not _is_right(values, number, text, answer, filters):
            reason = "wrong"
        else:
            right.append((solution, len(ids) + 1))
            reason = ""
        counts[f"generations dropped: {reason}" if reason else "generations kept"] += 1
    return right[0] if right else None


def split(
    rows: list[dict[str, Any]], num_opd: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Give `num_opd` problems to OPD and the others to SFT, by a seeded hash of their ids.

    Args:
        rows: All problems.
        num_opd: Problems for OPD.
        seed: Another seed, another split.

    Returns:
        The rows for SFT and those for OPD.

    Raises:
        DataError: No problem would be left for SFT.
    """
    if len(rows) <= num_opd:
        raise DataError(
            f"{len(rows)} problems are left, which is not more than --num-opd {num_opd}; lower it."
        )
    order = sorted(rows, key=lambda r: hashlib.sha256(f"{seed} {r['id']}".encode()).digest())
    return order[num_opd:], order[:num_opd]


def _is_right(values: dict[str, Any], number: int, text: str, answer: str, filters: Filter) -> bool:
    """The verdict of the chosen verifier; where it grades, disagreement with the data counts."""
    verdict = _flag(values["correctness_math_verify"], number)
    if filters.settings.verify == "column":
        return verdict
    right = grade(text, answer, "math", "")
    if right != verdict:
        ours, theirs = ("right", "wrong") if right else ("wrong", "right")
        filters.counts[f"generations {ours} to us, {theirs} in the data"] += 1
    return right


def _flag(flags: list[bool] | None, number: int) -> bool:
    return bool(flags[number]) if flags is not None and number < len(flags) else False


def _opening(prompt: list[dict[str, str]], row: Row, filters: Filter) -> str | None:
    """What the rendered prompt opens the answer with: "<think>" or nothing; None if too long."""
    messages = tuple(Message(m["role"], m["content"]) for m in prompt)
    text = render(Prompt(row.fallback_id, messages), filters.tokenizer, "auto")
    ids = filters.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) > filters.settings.max_prompt_tokens:
        return None
    return "<think>" if text.rstrip().endswith("<think>") else ""


def _tokenizer(folder: Path) -> Any:
    import transformers

    if not folder.is_dir():
        raise DataError(f"--tokenizer {folder}: no such folder; make it with model_folders.py.")
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"--tokenizer {folder}: cannot be loaded ({one_line(error)}).") from None
    if not tokenizer.chat_template:
        raise DataError(f"--tokenizer {folder}: it has no chat template, and prompts are messages.")
    return tokenizer


def _held_out(folder: Path) -> set[str]:
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(
            f"--evaluation {folder}: no .jsonl file there; run evaluation_sets.py first, so that "
            "its problems can be left out of the training."
        )
    found: set[str] = set()
    for row in (row for file in files for row in read_rows(file, "test")):
        if not isinstance(row.values.get("problem"), str):
            raise DataError(f"{row.place}: no column 'problem'; evaluation_sets.py writes one.")
        found.add(normalised(row.values["problem"]))
    return found


def _is_made(output: Path, settings: Settings) -> bool:
    file = output / "counts.json"
    if not file.exists():
        return False
    if json.loads(file.read_text(encoding="utf-8"))["settings"] != dataclasses.asdict(settings):
        raise DataError(
            f"{file}: made with other settings; choose another --output, or remove that folder."
        )
    return True


if __name__ == "__main__":
    run(app)
