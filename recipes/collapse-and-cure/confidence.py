"""How surely a model goes on with a loop: the probability of one more copy of the answer."""

from __future__ import annotations

from pathlib import Path

import torch
from maps import COPIES
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from stableopd.data.arithmetic import make_problems

__all__ = ["further_copies"]

NUM_PROBLEMS, SEED = 200, 3


def further_copies(folder: Path) -> list[float]:
    """Mean probability of the "#" that begins a further copy, over held-out problems.

    Args:
        folder: A model of the embedded world.

    Returns:
        One probability for each number of copies of `COPIES`.
    """
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mark = tokenizer.convert_tokens_to_ids("#")
    problems = make_problems(NUM_PROBLEMS, SEED, "test")
    found: list[float] = []
    for num_copies in COPIES:
        total = 0.0
        for problem in problems:
            text = f"{problem.prompt}{problem.solution}" + f"#{problem.answer}" * num_copies
            with torch.no_grad():
                logits_BTV = model(torch.tensor([tokenizer.encode(text)])).logits
            total += torch.softmax(logits_BTV[0, -1], -1)[mark].item()
        found.append(total / len(problems))
    return found
