"""A made sample of what recipes/openr1-math reads: the same columns, file names and layouts."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet

from stableopd.data.grading import grade
from tiny import VOCABULARY, make_llama, make_tokenizer, save_model, write_rows

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "openr1-math"
NAMES = ("problem_text", "prepare", "evaluation_sets", "model_folders", "estimate", "table")
PLAIN = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
THINKING = PLAIN + "{{ '<think>\\n' }}"
# As DeepSeek-R1-Distill-Qwen beside Qwen2.5: the same ids, but another stop token behind one.
RENAMED = {"<stop>" if token == "<eos>" else token: i for token, i in VOCABULARY.items()}
SMALL = ("--max-tokens", 100, "--max-prompt-tokens", 200, "--num-opd", 4)


@contextlib.contextmanager
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The recipe's scripts as modules; they import one another, as they do when they are run."""
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(RECIPE))
        for name in NAMES:
            sys.modules.pop(name, None)


def run(module: ModuleType, *arguments: object) -> tuple[int, str, str]:
    """Run a script's app as its `__main__` does: exit code, standard output, standard error."""
    code, argv = 0, sys.argv
    sys.argv = [str(module.__file__), *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.modules["problem_text"].run(module.app)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def must(module: ModuleType, *arguments: object) -> str:
    """Run a script that has to succeed; its standard output."""
    code, out, error = run(module, *arguments)
    assert code == 0, error
    return out


def read(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def tokenizer_with(template: str, **options: Any) -> Any:
    tokenizer = make_tokenizer(**options)
    tokenizer.chat_template = template
    return tokenizer


def make_base(folder: Path) -> Path:
    """A student with 400 positions, as the hub has Qwen2.5-Math with 4,096."""
    model = make_llama(0, sharp=8, max_position_embeddings=400)
    return save_model(folder, model, tokenizer_with(PLAIN))


def thought(text: str, answer: str) -> str:
    return f"<think>\n{text}\n</think>\nSo \\boxed{{{answer}}}."


def row(
    number: int, problem: str, answer: str, generations: list[str], **changes: object
) -> dict[str, Any]:
    """A row with all the columns of OpenR1-Math-220k."""
    judged = [grade(text, answer, "math", "") for text in generations]
    values = {
        "problem": problem,
        "solution": f"worked by hand: {answer}",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": f"uuid-{number}",
        "is_reasoning_complete": [True] * len(generations),
        "generations": generations,
        "correctness_math_verify": judged,
        "correctness_llama": None,
        "finish_reasons": ["stop"] * len(generations),
        "correctness_count": sum(judged),
        "messages": [{"content": problem, "role": "user"}],
    }
    return values | changes


def openr1_rows() -> list[dict[str, Any]]:
    """Nine ordinary problems, and one for each stage that drops something."""
    rows = [
        row(i, f"What is ${i} + {i}$?", str(2 * i), [thought("0", "-1"), thought("1", str(2 * i))])
        for i in range(9)
    ]
    half = [thought("abc" * 9, "0.5"), thought("a", "\\frac{1}{2}")]
    rows += [
        row(9, "Löse ∑ 三角形 für ½: wie groß?", "\\frac{1}{2}", half),
        row(10, "too long", "7", [thought("a" * 400, "7")]),
        row(11, "wrong", "7", [thought("a", "8"), thought("b", "9")]),
        row(12, "cut off", "7", [thought("a", "7")], is_reasoning_complete=[False]),
        row(13, "holds a stop", "7", [f"<eos>{thought('a', '7')}"]),
        row(14, "What is $\\left 0+0 \\right$", "0", [thought("a", "0")]),  # of problem 0
        row(15, "FIND  $\\dfrac{a}{b}$", "3", [thought("a", "3")]),  # of the evaluation
        row(16, "no answer", "", [thought("a", "3")]),
        row(17, "a" * 300, "3", [thought("a", "3")]),  # the prompt is too long
        row(8, "an id that was there", "3", [thought("a", "3")]),
        row(18, "the data says wrong", "3", [thought("a", "3")], correctness_math_verify=[False]),
    ]
    return rows


def write_openr1(folder: Path) -> Path:
    """Two parquet files, named as on the hub."""
    folder.mkdir(parents=True)
    rows = openr1_rows()
    for part, place in enumerate((rows[:12], rows[12:])):
        table = pyarrow.Table.from_pylist(place)
        pyarrow.parquet.write_table(table, folder / f"train-{part:05}-of-00002.parquet")
    return folder


def write_evaluation_sets(folder: Path) -> Path:
    """Copies of the six sets, each with its own columns and its own layout."""

    def lines(name: str, *rows: dict[str, object]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name, list(rows))

    def parquet(name: str, *rows: dict[str, object]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), folder / name)

    math500 = {"solution": "s", "subject": "Algebra", "level": 2, "unique_id": "test/1.json"}
    lines(
        "math500/test.jsonl",
        {"problem": "Find $\\frac{a}{b}$.", "answer": "3", **math500},
        {"problem": "1+2=", "answer": "3", **math500},
    )
    (folder / "math500" / "README.md").write_text("a data card")
    lines("minerva/test.jsonl", {"question": "2+2=", "answer": "4"})
    olympiad = {"id": 1606, "is_multiple_answer": True, "solution": ["s"], "context": None}
    for part, answer in (("OE_TO_maths_en_COMP", ["$2$", "$3$"]), ("OE_TO_physics_en_COMP", ["9"])):
        parquet(
            f"olympiadbench/OlympiadBench/{part}/{part}.parquet",
            {"question": "Both roots?", "final_answer": answer, **olympiad},
        )
    data = "data/train-00000-of-00001.parquet"
    parquet(f"amc/{data}", {"id": 0, "problem": "3+3=", "answer": 142.0, "url": "u"})
    aime = {"id": 60, "solution": "s", "url": "u", "year": "2024"}
    parquet(f"aime24/{data}", {"problem": "4+4=", "answer": "033", **aime})
    lines("aime25/test.jsonl", {"problem": "5+5=", "answer": "70", "id": "0"})
    hidden = folder / "aime25" / ".cache" / "old.jsonl"
    hidden.parent.mkdir()
    hidden.write_text("not a row\n")
    return folder
