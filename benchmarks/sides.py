"""Both sides of a training step: ours by the public path, TRL's by its own trainers.

    python benchmarks/sides.py '{"side": "opd", "world": "tiny", "warm": 1, "steps": 2}'

A side is a method of ours ("opd", "gkd", "stable_opd"), run by `prepare` and `train` as `stableopd
train` does, with metrics, rollouts and alarm; or a trainer of TRL ("IWOPDTrainer",
"DistillationTrainer"), run by `train()`. With "replay" no tokens are drawn: both sides score the
same given completions, and what they found of each step is returned instead of times. With
"device": "cuda" both compute as they do there by themselves: a float32 student in bfloat16
autocast, and a bfloat16 teacher.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common import Clock, Memory, answer
from pairs import WORLDS, World, completion, problems

LEARNING_RATE = 1e-4
OURS = ("opd", "gkd", "stable_opd")


def compute(spec: dict[str, Any]) -> dict[str, Any]:
    """Make the steps that a specification asks for."""
    world = WORLDS[spec["world"]]
    with tempfile.TemporaryDirectory() as folder:
        side = _ours if spec["side"] in OURS else _theirs
        return side(spec, world, Path(folder))


def our_run(world: World, method: str, folder: Path, steps: int, device: str = "cpu") -> Any:
    """A prepared run of ours."""
    import stableopd
    from stableopd.config import parse

    dtype = "float32" if device == "cpu" else "auto"
    table: dict[str, dict[str, Any]] = {
        # One step more than is made: the checkpoint at the end is not part of a step.
        "run": {"output": str(folder / "run"), "steps": steps + 1, "save_every": 10**6},
        "student": {"model": str(world.folder / "student"), "dtype": dtype},
        "teacher": {"model": str(world.folder / "teacher"), "dtype": dtype},
        "data": {"train": str(world.folder / "train.jsonl"), "chat_template": "none"},
        "rollout": {
            "prompts_per_step": world.num_prompts,
            "rollouts_per_prompt": world.rollouts // world.num_prompts,
            "max_new_tokens": world.new_tokens,
        },
        "objective": {"method": method},
        "optimizer": {"learning_rate": LEARNING_RATE},
    }
    table["run"]["device"] = device
    if method == "gkd":
        table["objective"]["divergence"] = "reverse_kl"
    return stableopd.prepare(parse(table))


def _ours(spec: dict[str, Any], world: World, folder: Path) -> dict[str, Any]:
    import stableopd

    steps = spec["warm"] + spec["steps"]
    device = spec.get("device", "cpu")
    run = our_run(world, spec["side"], folder, steps, device)
    if spec.get("replay"):
        run = dataclasses.replace(run, sampler=Replay(world, run.players.num_tokens))
        return _replayed(run, spec["side"], steps)
    memory, clocks, told = Memory(device), [], []
    lines = stableopd.train(run, should_stop=lambda: False)
    for line in lines:
        clocks.append(Clock.now(device))
        told.append(line)
        if len(clocks) == steps:
            break
    lines.close()
    found = _measured(world, clocks, [line["rollout/mean_length"] for line in told], spec, memory)
    timed = told[spec["warm"] :]
    parts = ("rollout_s", "score_s", "update_s")
    return found | {p: sum(line[f"time/{p}"] for line in timed) / len(timed) for p in parts}


def _measured(
    world: World, clocks: list[Clock], lengths: list[float], spec: dict[str, Any], memory: Memory
) -> dict[str, Any]:
    # One stop among 151,936 tokens is drawn now and then where no probability of it is set.
    least = 0.97 * world.new_tokens if world.shapes else world.new_tokens
    if any(not least <= length <= world.new_tokens for length in lengths):
        raise SystemExit(f"rollouts have {lengths} tokens on average, not {world.new_tokens}.")
    seconds = clocks[-1].since(clocks[spec["warm"] - 1], spec["steps"])
    return {**seconds, **memory.grown(), "threads": torch.get_num_threads()}


class Replay:
    """Stands for our sampler: hands out the given completions."""

    def __init__(self, world: World, vocabulary: int) -> None:
        self.world, self.vocabulary = world, vocabulary
        self.metrics: dict[str, float] = {}

    def update(self) -> None:
        """Nothing follows the student."""

    def close(self) -> None:
        """Nothing is held."""

    def sample(self, prompts: Any, num_per_prompt: int, settings: Any, seed: int) -> list[Any]:
        from stableopd.types import Rollout, StopReason

        length = self.world.new_tokens
        return [
            Rollout(
                prompt_id,
                prompt_ids,
                tuple(completion(prompt_ids, number, length, self.vocabulary)),
                "",
                StopReason.LENGTH,
                (0.0,) * length,
                settings,
            )
            for prompt_id, prompt_ids in prompts
            for number in range(num_per_prompt)
        ]


def _replayed(run: Any, method: str, steps: int) -> dict[str, Any]:
    """What each step found; for StableOPD also the dense formula of the same terms."""
    import stableopd

    found: dict[str, list[float]] = {"loss": [], "grad_norm": [], "dense": []}
    lines = stableopd.train(run, should_stop=lambda: False)
    for _ in range(steps):
        if method == "stable_opd":
            found["dense"].append(_dense_loss(run))
        line = next(lines)
        found["loss"].append(line["loss/total"])
        found["grad_norm"].append(line["grad_norm"])
    lines.close()
    return found


@torch.no_grad()
def _dense_loss(run: Any) -> float:
    """StableOPD's loss of the replayed rollouts from whole logits, row by row."""
    objective, train = run.config.objective, run.train
    student, teacher = run.players.student, run.players.teacher.model
    reference, places = run.players.reference.model, range(len(train.prompts))
    device = run.accelerator.device
    per_prompt = run.config.rollout.rollouts_per_prompt
    rollouts = run.sampler.sample(train.named_ids(places), per_prompt, None, 0)

    def logps(model: Any, prompt_ids: Any, completion_ids: Any) -> tuple[Any, Any]:
        ids_BT = torch.tensor([[*prompt_ids, *completion_ids]], device=device)
        logp_TV = model(ids_BT).logits[0, len(prompt_ids) - 1 : -1].float().log_softmax(-1)
        return logp_TV, logp_TV.gather(1, ids_BT[0, len(prompt_ids) :, None])

    policy = constraint = golden = 0.0
    for r in rollouts:
        mine_TV, mine = logps(student, r.prompt_ids, r.completion_ids)
        _, other = logps(teacher, r.prompt_ids, r.completion_ids)
        first_TV, _ = logps(reference, r.prompt_ids, r.completion_ids)
        policy += (mine - other).mean().item() / len(rollouts)
        kl = (mine_TV.exp() * (mine_TV - first_TV)).sum(-1).mean().item()
        constraint += kl / len(rollouts)
    for s in train.golden:
        golden -= logps(student, s.prompt_ids, s.completion_ids)[1].mean().item()
    return policy + objective.beta_reference * constraint + golden / len(train.golden)


def _theirs(spec: dict[str, Any], world: World, folder: Path) -> dict[str, Any]:
    steps = spec["warm"] + spec["steps"]
    device = spec.get("device", "cpu")
    trainer = their_trainer(world, spec["side"], folder, steps, device)
    if spec.get("replay"):
        return _their_replay(trainer, world)
    clocks: list[Clock] = []
    trainer.add_callback(_callback(lambda: clocks.append(Clock.now(device))))
    memory = Memory(device)
    trainer.train()
    logged = trainer.state.log_history
    key = "completions/on_policy_mean_length"
    key = key if spec["side"] == "IWOPDTrainer" else "completions/mean_length"
    lengths = [line[key] for line in logged if key in line]
    if not lengths:
        raise SystemExit(f"TRL logged no {key}: {logged}")
    return _measured(world, clocks, lengths, spec, memory)


def _callback(on_step_end: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class AtStepEnd(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            on_step_end()

    return AtStepEnd()


def their_trainer(world: World, name: str, folder: Path, steps: int, device: str = "cpu") -> Any:
    """A trainer of TRL on the same models, prompts and sizes."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "per_device_train_batch_size": world.rollouts,
        "max_completion_length": world.new_tokens,
        "beta": 1.0,  # KL(student || teacher)
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,  # as ours, which writes a line a step
        "save_strategy": "no",
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    rows = [
        row
        for row in problems(world.name)
        for _ in range(world.rollouts // world.num_prompts)
    ] * steps  # fmt: skip
    load = AutoModelForCausalLM.from_pretrained
    models = {
        "model": load(world.folder / "student", dtype=torch.float32),
        "teacher_model": load(
            world.folder / "teacher", dtype=torch.float32 if device == "cpu" else torch.bfloat16
        ),
        "processing_class": AutoTokenizer.from_pretrained(world.folder / "student"),
    }
    if name == "IWOPDTrainer":
        # It divides by the label tokens of the data set's answers: as many as are generated.
        data = [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": f"{row['solution']} w2"},
                ]
            }
            for row in rows
        ]
        args = IWOPDConfig(lmbda=1.0, iw_opd_gamma=0.0, max_length=1024, **settings)
        return IWOPDTrainer(args=args, train_dataset=datasets.Dataset.from_list(data), **models)
    prompts = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    args = trl.DistillationConfig(shuffle_dataset=False, **settings)
    return trl.DistillationTrainer(args=args, train_dataset=prompts, **models)


def _their_replay(trainer: Any, world: World) -> dict[str, Any]:
    """What each step found on the given completions: loss, gradient norm, mean advantage."""
    model, found = trainer.model, {"loss": [], "grad_norm": [], "advantage": []}
    vocabulary = model.config.vocab_size

    def generate(
        input_ids: Any, attention_mask: Any, return_dict_in_generate: bool = False, **_: Any
    ) -> Any:
        seen: dict[tuple[int, ...], Iterator[int]] = {}
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = tuple(ids[mask.bool()].tolist())
            number = next(seen.setdefault(prompt, iter(range(len(input_ids)))))
            rows.append(completion(prompt, number, world.new_tokens, vocabulary))
        whole = torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], dim=1)
        return _Sequences(whole) if return_dict_in_generate else whole

    model.generate = generate
    step = trainer.training_step

    def training_step(*arguments: Any, **named: Any) -> Any:
        loss = step(*arguments, **named)
        found["loss"].append(loss.item())
        advantages = trainer._metrics["train"].get("iw_opd/mean_advantage")
        found["advantage"].append(advantages[-1] if advantages else math.nan)
        return loss

    trainer.training_step = training_step
    trainer.train()
    found["grad_norm"] = [
        float(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line
    ]
    return found


@dataclasses.dataclass(frozen=True)
class _Sequences:
    sequences: Any


if __name__ == "__main__":
    answer(compute)
