"""The models of the experiments: teachers and students of the embedded world, and other stop ids.

`python recipes/collapse-and-cure/worlds.py NAME --out DIR` makes one model folder, DIR/NAME:

- teacher-loops-P: the shipped teacher's pretraining, with a share P of documents that repeat;
- student-steps-N: the shipped student's, with N clean steps;
- student-loops-Q: the shipped student's, with probability Q of a further copy of an answer;
- different-ROLE (of shipped models), different-plain-teacher: a vocabulary with a second stop
  token, with which the teacher stops; nothing else tells the two stops apart;
- problems-N.jsonl: no model but data, the first N problems to train on.

Everything else (seed, learning rates, sloppy steps at the end) is the shipped models' own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from stableopd import embedded
from stableopd.data.arithmetic import make_problems
from stableopd.embedded.make_models import (
    END_ID,
    PAD_ID,
    PHASES,
    SEEDS,
    Phase,
    make_tokenizer,
    pretrain,
)

PLAIN_TEACHER = "teacher-loops-0"
OTHER_STOP = "<turn>"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="Which model; see the head of this file.")],
    out: Annotated[Path, typer.Option(help="Folder of the model folders.")],
    scale: Annotated[float, typer.Option(help="Factor on steps; to try the script.")] = 1.0,
) -> None:
    """Make one model, unless it is there."""
    if is_made(name, out):
        return
    if name.startswith("problems-"):
        write_problems(name, out)
        return
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if name.startswith("different-"):
        model, tokenizer = other_stop(name, out)
    else:
        role = name.partition("-")[0]
        model = pretrain(name, SEEDS[role], phases_of(name), scale)
        tokenizer = make_tokenizer()
    # The last file to appear is the one that is asked for above: a kill leaves no half model.
    tokenizer.save_pretrained(out / name)
    model.save_pretrained(out / f"{name}.part")
    for file in sorted((out / f"{name}.part").iterdir(), key=lambda f: f.name == "config.json"):
        file.rename(out / name / file.name)
    (out / f"{name}.part").rmdir()


def is_made(name: str, out: Path) -> bool:
    """Whether it is there, and whole."""
    return (out / name if name.endswith(".jsonl") else out / name / "config.json").is_file()


def write_problems(name: str, out: Path) -> None:
    """The problems of problems-N.jsonl."""
    number = int(name.removeprefix("problems-").removesuffix(".jsonl"))
    rows = [
        {"id": p.id, "prompt": p.prompt, "solution": p.solution, "answer": p.answer}
        for p in make_problems(number, 0, "train")
    ]
    (out / f"{name}.part").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / f"{name}.part").rename(out / name)


def phases_of(name: str) -> tuple[Phase, ...]:
    """The pretraining of a name such as teacher-loops-0.02 or student-steps-300."""
    role, _, rest = name.partition("-")
    axis, _, value = rest.partition("-")
    phases = PHASES[role]
    if axis == "steps":
        return (dataclasses.replace(phases[0], num_steps=int(value)), *phases[1:])
    changed: list[Phase] = []
    for phase in phases:
        repeat = (float(value), *phase.style.repeat[1:])
        changed.append(
            dataclasses.replace(phase, style=dataclasses.replace(phase.style, repeat=repeat))
        )
    return tuple(changed)


def other_stop(name: str, out: Path) -> tuple[Any, Any]:
    """A model with a second stop token, which a teacher takes for its own."""
    kind = name.removeprefix("different-")
    source = out / PLAIN_TEACHER if kind == "plain-teacher" else embedded.path(kind)
    model = AutoModelForCausalLM.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    turn = len(tokenizer)
    tokenizer.add_tokens([OTHER_STOP], special_tokens=True)
    model.resize_token_embeddings(turn + 1, mean_resizing=False)
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    with torch.no_grad():
        for table in tables:
            table[turn] = table[PAD_ID]  # a token that never came up in pretraining
            if kind != "student":
                table[[END_ID, turn]] = table[[turn, END_ID]]
    if kind != "student":
        model.generation_config.eos_token_id = model.config.eos_token_id = turn
        tokenizer.eos_token = OTHER_STOP
    return model, tokenizer


if __name__ == "__main__":
    app()
