"""Fill the paper's tables from the summary.json files that evaluate.sh leaves.

Without any evaluation it prints table-template.md: the paper's numbers beside "-".
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from evaluation_sets import SETS
from problem_text import run

from stableopd.runfolder import write_atomically
from stableopd.types import DataError

# Average accuracy in percent over the six sets: arXiv 2604.08527, main table.
METHODS = {"base": "base", "sft": "SFT", "grpo": "GRPO", "opd": "OPD", "stable_opd": "StableOPD"}
PAPER: dict[str, tuple[str, tuple[float, ...]]] = {
    "1.5b-openthinker3": (
        "Qwen2.5-Math-1.5B <- OpenThinker3-7B",
        (16.0, 31.9, 30.1, 28.9, 36.1),
    ),
    "1.5b-r1-distill": (
        "Qwen2.5-Math-1.5B <- DeepSeek-R1-Distill-Qwen-7B",
        (16.0, 31.9, 30.1, 28.0, 35.7),
    ),
    "7b-openthinker3": (
        "Qwen2.5-Math-7B <- OpenThinker3-7B",
        (19.1, 44.1, 45.5, 43.8, 47.6),
    ),
}
# Its ablation, of 1.5b-r1-distill. None: not reported.
ABLATION: dict[str, tuple[str, float | None]] = {
    "opd": ("OPD", 28.0),
    "opd-kl": ("OPD + KL", 29.7),
    "opd-golden": ("OPD + golden", None),
    "stable_opd": ("OPD + KL + golden = StableOPD", 35.7),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Score:
    """What stableopd eval says of one model on one set; shares between 0 and 1.

    Attributes:
        accuracy: avg@k.
        half: Half of its 95% interval; None where there is no interval.
        num_problems: Problems.
        num_samples: k.
        truncation_rate: Share of answers that were cut off.
        repetition_rate: Share of answers that end in repetition.
        mean_length: Tokens.
    """

    accuracy: float
    half: float | None
    num_problems: int
    num_samples: int
    truncation_rate: float
    repetition_rate: float
    mean_length: float


@app.command()
def main(
    evaluations: Annotated[
        Path, typer.Argument(help="Folder with a folder for each arm, such as 1.5b-r1-distill-opd.")
    ],
    output: Annotated[Path | None, typer.Option(help="Also write the tables here.")] = None,
) -> None:
    """Print the tables in markdown."""
    text = tables(read_scores(evaluations))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, text)
    print(text, end="")


def read_scores(folder: Path) -> dict[str, dict[str, Score]]:
    """All scores below a folder, by arm and set.

    Args:
        folder: evaluate.sh's folder; one that is missing has no scores.

    Returns:
        For each arm its sets.

    Raises:
        DataError: A summary.json cannot be read, or an arm has two scores of one set.
    """
    found: dict[str, dict[str, Score]] = {}
    for file in sorted(folder.glob("*/*/summary.json")):
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
            if summary["format"] not in (1, 2):  # their scores are alike
                raise ValueError(f"format {summary['format']}")
            scores = {name: _score(part) for name, part in summary["sets"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}: not a summary of stableopd eval ({type(error).__name__}: {error})."
            ) from None
        arm = found.setdefault(file.parent.parent.name, {})
        if twice := sorted(set(arm) & set(scores)):
            raise DataError(f"{file}: {twice[0]} was evaluated twice for this arm; remove one.")
        arm |= scores
    return {name: arm for name, arm in found.items() if arm}


def _score(part: dict[str, Any]) -> Score:
    low, high = part["accuracy"]["low"], part["accuracy"]["high"]
    return Score(
        float(part["accuracy"]["mean"]),
        None if low is None or high is None else (high - low) / 2,
        int(part["num_problems"]),
        int(part["num_samples"]),
        *(float(part[n]["mean"]) for n in ("truncation_rate", "repetition_rate", "mean_length")),
    )


def arm_of(pair: str, method: str) -> str:
    """The name of an arm: base and GRPO do not depend on the teacher, SFT on its tokenizer alone.

    Args:
        pair: A key of `PAPER`.
        method: base, sft, grpo, or a method of the pair.

    Returns:
        The name that evaluate.sh was given.
    """
    size = pair.partition("-")[0]
    if method in ("base", "grpo") or (method == "sft" and pair != "1.5b-r1-distill"):
        return f"{size}-{method}"
    return f"{pair}-{method}"


def average(scores: dict[str, Score] | None) -> str:
    """The mean accuracy in percent over the six sets and half its interval; "-" without all six.

    The sets are independent, so halves add as squares: hypot(halves) / 6.

    Args:
        scores: The scores of an arm by set; None where it was not evaluated.

    Returns:
        Text for a cell.
    """
    if scores is None or set(SETS) - set(scores):
        return "-"
    parts = [scores[name] for name in SETS]
    text = f"{100 * statistics.fmean(part.accuracy for part in parts):.1f}"
    halves = [part.half for part in parts if part.half is not None]
    if len(halves) == len(parts):
        text += f" +- {100 * math.hypot(*halves) / len(parts):.1f}"
    return text + (" *" if any(_mark(name, scores[name]) for name in SETS) else "")


def _mark(name: str, score: Score) -> str:
    """What is not as in the paper: the samples of a problem, or fewer problems than there are."""
    marks = [f"k = {score.num_samples}"] if score.num_samples != SETS[name].num_samples else []
    if score.num_problems < SETS[name].num_problems:
        marks.append(f"{score.num_problems} problems")
    return f" ({', '.join(marks)})" if marks else ""


def tables(scores: dict[str, dict[str, Score]]) -> str:
    """The main table, the ablation, and the sets one by one.

    Args:
        scores: What `read_scores` found.

    Returns:
        Markdown.
    """
    lines = [
        "# The paper's tables",
        "",
        "Average accuracy in percent over MATH-500, Minerva, OlympiadBench, AMC, AIME24 and AIME25",
        "(AMC and AIME avg@32, the others pass@1, temperature 0.6). Paper: arXiv 2604.08527, main",
        'table and ablation. Ours: "-" was not run, or not on all six; `+-` is half of the 95%',
        "interval over problems; `*`: fewer samples or problems than that, named below.",
        "",
        f"| student <- teacher | | {' | '.join(METHODS.values())} |",
        "|---" * (2 + len(METHODS)) + "|",
    ]
    for pair, (name, numbers) in PAPER.items():
        ours = [average(scores.get(arm_of(pair, method))) for method in METHODS]
        lines.append(f"| {name} | paper | " + " | ".join(f"{n:.1f}" for n in numbers) + " |")
        lines.append("| | ours | " + " | ".join(ours) + " |")
    lines += ["", "Ablation, Qwen2.5-Math-1.5B <- DeepSeek-R1-Distill-Qwen-7B:", ""]
    lines += ["| arm | paper | ours |", "|---|---|---|"]
    for method, (name, number) in ABLATION.items():
        paper = "not reported" if number is None else f"{number:.1f}"
        ours = average(scores.get(arm_of("1.5b-r1-distill", method)))
        lines.append(f"| {name} | {paper} | {ours} |")
    lines += [
        "",
        "Set by set, ours: accuracy in percent; the last three are means over the sets.",
        "",
    ]
    lines.append(f"| arm | {' | '.join(SETS)} | cut off | repetitive | tokens |")
    lines.append("|---" * (4 + len(SETS)) + "|")
    lines += [_line(arm, scores[arm]) for arm in sorted(scores)] or ["| - " * (4 + len(SETS)) + "|"]
    return "\n".join(lines) + "\n"


def _line(arm: str, scores: dict[str, Score]) -> str:
    cells = [
        f"{100 * scores[name].accuracy:.1f}{_mark(name, scores[name])}" if name in scores else "-"
        for name in SETS
    ]
    parts = list(scores.values())
    cut = statistics.fmean(part.truncation_rate for part in parts)
    loops = statistics.fmean(part.repetition_rate for part in parts)
    length = statistics.fmean(part.mean_length for part in parts)
    return f"| {arm} | {' | '.join(cells)} | {cut:.2f} | {loops:.2f} | {length:.0f} |"


if __name__ == "__main__":
    run(app)
