"""Held-out KL(student || teacher) per token, exact over the vocabulary, on the student's rollouts.

The student answers the problems at temperature 1 with a fixed seed. At every token of its answers
the two distributions are compared; a rollout counts with the mean over its tokens, and what is
printed is the mean over the rollouts with its standard error.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stableopd import models
from stableopd.config import DataConfig
from stableopd.data.grading import grade
from stableopd.data.prompts import encode_prompts, load_prompts
from stableopd.hidden import token_hidden_states
from stableopd.models import LanguageModel
from stableopd.objective.divergence import reverse_kl
from stableopd.objective.logprobs import score_tokens
from stableopd.rollout.sampler import TransformersSampler
from stableopd.rollout.stops import StopPlan, plan_stops, stop_ids_of
from stableopd.runfolder import write_atomically
from stableopd.teacher.local import FrozenModel
from stableopd.training.batch import collate, micro_batches, rollout_sequences
from stableopd.types import Prompt, Rollout, SamplingSettings, StopReason

MAX_PROMPT_TOKENS = 128
BATCH_SIZE = 49
MICRO_BATCH_TOKENS = 2048

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    student: Annotated[Path, typer.Argument(help="Model folder of the student.")],
    teacher: Annotated[Path, typer.Argument(help="Model folder of the teacher.")],
    data: Annotated[Path, typer.Argument(help="Problems to answer, one JSON object a line.")],
    output: Annotated[Path, typer.Option(help="Where the numbers go, as JSON.")],
    seed: Annotated[int, typer.Option(help="Seed of the rollouts.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest rollout, in tokens.")] = 128,
    max_problems: Annotated[int, typer.Option(help="Problems to use; 0 uses all.")] = 0,
) -> None:
    """Measure, print one line, and write it as JSON; a measurement that is there is kept."""
    if output.exists():
        print(f"{output}: there already.\n{_sentence(json.loads(output.read_text()))}")
        return
    start = time.perf_counter()
    found = measure(student, teacher, data, seed, max_new_tokens, max_problems)
    found["seconds"] = round(time.perf_counter() - start, 1)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(found, indent=2) + "\n")
    print(_sentence(found))


def measure(
    student_path: Path,
    teacher_path: Path,
    data: Path,
    seed: int,
    max_new_tokens: int,
    max_problems: int = 0,
) -> dict[str, Any]:
    """Let the student answer each problem once, and compare it with the teacher at every token.

    Args:
        student_path: Model folder of the student.
        teacher_path: Model folder of the teacher.
        data: The problems.
        seed: Seed of the rollouts.
        max_new_tokens: Longest rollout, in tokens.
        max_problems: Problems to use; 0 uses all.

    Returns:
        KL in nats per token with its standard error; accuracy and share of cut-off answers of the
        same rollouts; mean length in tokens.
    """
    torch.manual_seed(seed)
    student, teacher = _load(student_path, "student"), _load(teacher_path, "teacher")
    models.require_same_tokenizer(student, teacher)
    num_tokens = models.shared_vocabulary(student, teacher)
    stops = _stops(student, teacher)
    prompts = load_prompts(
        str(data),
        DataConfig(),
        split="test",
        needs_solution=False,
        needs_answer=True,
        max_rows=max_problems,
    )
    rollouts = _rollouts(student, stops, prompts, seed, max_new_tokens)
    kl = _kl_of_rollouts(student, teacher, stops, num_tokens, rollouts)
    right = [
        grade(rollout.completion, prompt.answer or "", "math", "")
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]
    return {
        "student": str(student_path),
        "teacher": str(teacher_path),
        "data": str(data),
        "seed": seed,
        "num_rollouts": len(rollouts),
        "kl_per_token": statistics.fmean(kl),
        "kl_standard_error": _standard_error(kl),
        "accuracy": statistics.fmean(right),
        "accuracy_standard_error": _standard_error([float(r) for r in right]),
        "truncation_rate": statistics.fmean(r.stop_reason is StopReason.LENGTH for r in rollouts),
        "mean_length": statistics.fmean(len(r.completion_ids) for r in rollouts),
    }


def _load(path: Path, role: str) -> LanguageModel:
    cpu = torch.device("cpu")
    return models.load(str(path), role=role, dtype=torch.float32, device=cpu)


def _stops(student: LanguageModel, teacher: LanguageModel) -> StopPlan:
    return plan_stops(
        stop_ids_of(student.model, student.tokenizer),
        stop_ids_of(teacher.model, teacher.tokenizer),
        student.tokenizer.eos_token_id,
        "event",
        models.shared_vocabulary(student, teacher),
    )


def _rollouts(
    student: LanguageModel, stops: StopPlan, prompts: list[Prompt], seed: int, max_new_tokens: int
) -> list[Rollout]:
    ids = encode_prompts(
        prompts, student.tokenizer, "auto", MAX_PROMPT_TOKENS, student.context, max_new_tokens
    )
    num_tokens = models.shared_vocabulary(student, None)
    sampler = TransformersSampler(
        student.model, student.tokenizer, stops.decode_ids, num_tokens, BATCH_SIZE
    )
    named = [(prompt.id, prompt_ids) for prompt, prompt_ids in zip(prompts, ids, strict=True)]
    return sampler.sample(named, 1, SamplingSettings(max_new_tokens), seed)


@torch.no_grad()
def _kl_of_rollouts(
    student: LanguageModel,
    teacher: LanguageModel,
    stops: StopPlan,
    num_tokens: int,
    rollouts: list[Rollout],
) -> list[float]:
    """The mean KL over the tokens of each rollout, in nats."""
    frozen = FrozenModel(teacher.model, num_tokens)
    head = models.head_of(student.model).restricted_to(num_tokens)
    stop_ids = torch.tensor(stops.event_ids)
    means = [math.nan] * len(rollouts)
    for group in micro_batches(rollout_sequences(rollouts), MICRO_BATCH_TOKENS):
        batch = collate(group, stops.label_id, torch.device("cpu"))
        scores = score_tokens(
            token_hidden_states(student.model, batch),
            head,
            batch.target_N,
            stop_ids=stop_ids,
            stop_is_event=True,
            against=[frozen.against(batch, reverse_kl)],
        )
        kl_N = scores.others[0].comparisons[0]
        lengths = [len(s.completion_ids) for s in group]
        for sequence, kl_n in zip(group, kl_N.split(lengths), strict=True):
            means[sequence.index] = kl_n.mean().item()
    return means


def _standard_error(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _sentence(found: dict[str, Any]) -> str:
    def with_error(name: str, error: str) -> str:
        spread = "" if found[error] is None else f" +- {found[error]:.3f}"
        return f"{found[name]:.3f}{spread}"

    kl = with_error("kl_per_token", "kl_standard_error")
    accuracy = with_error("accuracy", "accuracy_standard_error")
    return (
        f"{found['student']} || {found['teacher']}, {found['num_rollouts']} rollouts on "
        f"{found['data']}, seed {found['seed']}: KL {kl} nats per token, accuracy {accuracy} at "
        f"temperature 1, truncated {found['truncation_rate']:.2f}, mean length "
        f"{found['mean_length']:.0f} tokens"
    )


if __name__ == "__main__":
    app()
