"""Turn JSONL with prompt, solution and answer into the parquet files that verl reads.

    python recipes/verl/prepare.py train.jsonl test.jsonl --output work/verl \
        --model path/to/student --max-prompt-tokens 1024 --max-response-tokens 8192 \
        --stop-ids 151643 151645

Of the training file every row asks for the golden mixture, so a prompt without a solution, or with
one that is longer than the budget or holds a stop within, is left out and counted. verl has no
prompts but chats: a prompt that is text becomes the one message of a user.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from stableopd.config import DataConfig
from stableopd.data.golden import encode_golden
from stableopd.data.prompts import load_prompts
from stableopd.types import DataError, Prompt


def messages(prompt: Prompt) -> list[dict[str, str]]:
    if isinstance(prompt.prompt, str):
        return [{"role": "user", "content": prompt.prompt}]
    return [{"role": m.role, "content": m.content} for m in prompt.prompt]


def row(prompt: Prompt, index: int, split: str, args: argparse.Namespace) -> dict[str, Any]:
    extra: dict[str, Any] = {
        "index": index,
        "split": split,
        "grader": args.grader,
        "answer_marker": args.answer_marker,
    }
    line: dict[str, Any] = {
        "data_source": "stableopd",
        "prompt": messages(prompt),
        "ability": "stableopd",
        "reward_model": {"style": "rule", "ground_truth": prompt.answer},
        "extra_info": extra,
    }
    if split == "train":
        extra["solution"] = prompt.solution
        line["agent_name"] = "stableopd_mixture"
    return line


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", required=True, help="the student, for its tokenizer")
    parser.add_argument("--max-prompt-tokens", type=int, default=1024)
    parser.add_argument("--max-response-tokens", type=int, default=8192)
    parser.add_argument("--grader", choices=("exact", "math"), default="math")
    parser.add_argument("--answer-marker", default="")
    parser.add_argument(
        "--stop-ids", type=int, nargs="*", default=[], help="the same as the run's stop_ids"
    )
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None:
        raise SystemExit("verl makes prompts with a chat template, and the student has none.")
    for split, file in (("train", args.train), ("test", args.test)):
        data = DataConfig(train=str(file), grader=args.grader, answer_marker=args.answer_marker)
        prompts = load_prompts(
            str(file), data, split=split, needs_solution=False, needs_answer=True
        )
        kept = [p for p in prompts if split == "test" or fits(p, tokenizer, args)]
        rows = [row(p, i, split, args) for i, p in enumerate(kept)]
        write(args.output / f"{split}.parquet", rows)
        print(f"{split}: {len(kept)} of {len(prompts)} prompts")


def fits(prompt: Prompt, tokenizer: Any, args: argparse.Namespace) -> bool:
    """Whether there is a solution, and room for it and the prompt."""
    if prompt.solution is None:
        return False
    chat = tokenizer.apply_chat_template(
        messages(prompt), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    label, *others = args.stop_ids or [tokenizer.eos_token_id]
    try:
        golden = encode_golden(prompt, tokenizer, label, others)
    except DataError as error:
        print(f"left out: {error}")
        return False
    return len(chat) <= args.max_prompt_tokens and len(golden) <= args.max_response_tokens


if __name__ == "__main__":
    main()
