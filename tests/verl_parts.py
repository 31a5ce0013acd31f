"""A step's sequences as verl hands them to its loss, with real models in the teacher's place."""

from __future__ import annotations

import asyncio
import copy
import functools
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.trainer.distillation import distillation_ppo_loss
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.rollout.replica import TokenOutput

import step_parts
from stableopd.integrations.verl.rollouts import StopEventTeacher
from stableopd.training.batch import rollout_sequences
from stableopd.training.terms import Tally, terms_of
from tiny import make_tokenizer

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "recipes" / "verl" / "train.sh"
TEACHER = "distillation.teacher_models.teacher_model"
STOPS = step_parts.STOPS
N = 3  # two rollouts and one golden solution a prompt
AGGREGATIONS = {
    "sequence": "seq-mean-token-mean",
    "token": "token-mean",
    "constant": "seq-mean-token-sum-norm",
}


@functools.cache
def overrides(*more: str, objective: str = "method:stable_opd,reference_kl:k1") -> tuple[str, ...]:
    """What the recipe's script says to verl."""
    names = {"STUDENT": "/student", "TEACHER": "/teacher", "DATA": "/data", "STOP_IDS": "1,2"}
    env = {**os.environ, **names, "RUNNER": "printf %s\\n", "OBJECTIVE": objective}
    command = ["bash", str(SCRIPT), *more]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return tuple(done.stdout.splitlines())


@functools.cache
def configure(lines: tuple[str, ...]) -> Any:
    """verl's whole configuration, as its own entry point makes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=list(lines))
    OmegaConf.resolve(config)
    return config


def configs(event: bool = True, n: int = 3, extra: tuple[str, ...] = (), **fields: Any) -> Any:
    """verl's actor and distillation configuration, with our settings in it."""
    stop = "event" if event else "token"
    fields = {"method": "stable_opd", "stop": stop, "reference_kl": "k1"} | fields
    mode = AGGREGATIONS[fields.get("aggregation", "sequence")]
    lines = (
        f"actor_rollout_ref.rollout.n={n}",
        f"actor_rollout_ref.actor.rollout_n={n}",
        f"actor_rollout_ref.actor.loss_agg_mode={mode}",
        "actor_rollout_ref.actor.loss_scale_factor=9",
        f"distillation.distillation_loss.loss_mode=stableopd{'' if event else '_token'}",
        *extra,
    )
    # The script's lines go through hydra once; changes of them straight into the result.
    config = copy.deepcopy(configure(overrides()))
    OmegaConf.set_struct(config, False)
    for line in lines:
        key, _, value = line.removeprefix("+").partition("=")
        OmegaConf.update(config, key, yaml.safe_load(value))
    table = {"stop_ids": list(STOPS), **fields}
    OmegaConf.update(config, f"{TEACHER}.inference.custom.stableopd", table, merge=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    return actor, omega_conf_to_dataclass(config.distillation), config


class Server:
    """A teacher's server: a language model that answers as verl's servers do.

    Row s holds the log-prob of token s + 1, and the last row is a dummy.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.asked: list[list[int]] = []

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        assert sampling_params["prompt_logprobs"] == 0
        self.asked.append(prompt_ids)
        logp_S = token_logps(self.model, prompt_ids)
        fields = {
            "prompt_ids": [[i] for i in prompt_ids[1:]] + [[0]],
            "prompt_logprobs": [[x] for x in logp_S.tolist()] + [[0.0]],
        }
        return TokenOutput(token_ids=[0], extra_fields=fields)


def logits(model: Any, ids: list[int] | tuple[int, ...]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(ids)])).logits[0]


@torch.no_grad()
def token_logps(model: Any, ids: list[int] | tuple[int, ...]) -> torch.Tensor:
    """Log-prob of each token but the first, (S - 1,)."""
    logp_SV = logits(model, ids).log_softmax(-1)
    return logp_SV[:-1].gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0]


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def make_data(
    sequences: list[Any],
    old: list[torch.Tensor],
    teacher_rows: list[tuple[torch.Tensor, torch.Tensor]],
    reference: list[torch.Tensor] | None,
    num_rows: int,
    num_tokens: int,
) -> TensorDict:
    """The micro-batch as verl's v1 trainer hands it to the loss: nested, without padding."""
    ids = [torch.tensor((*s.prompt_ids, *s.completion_ids)) for s in sequences]
    fields = {
        "input_ids": jagged(ids),
        "prompts": jagged([torch.tensor(s.prompt_ids) for s in sequences]),
        "responses": jagged([torch.tensor(s.completion_ids) for s in sequences]),
        "response_mask": jagged([torch.ones(len(s.completion_ids)).long() for s in sequences]),
        "old_log_probs": jagged(old),
        "teacher_ids": jagged([ids for ids, _ in teacher_rows]),
        "teacher_logprobs": jagged([logps for _, logps in teacher_rows]),
        "is_golden": torch.tensor([[int(s.is_golden)] for s in sequences]),
    }
    if reference is not None:
        fields["ref_log_prob"] = jagged(reference)
    data = TensorDict(fields, batch_size=[len(sequences)])
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=num_tokens, global_batch_size=num_rows)
    return data


def model_output(
    student: Any, actor: Any, distillation: Any, data: TensorDict, event: bool
) -> dict[str, torch.Tensor]:
    """What verl's FSDP engine makes of the student's logits, with verl's own functions."""
    rows = [logits(student, row.tolist()) for row in data["input_ids"].unbind()]
    flat = torch.cat(rows)
    offsets = data["input_ids"].offsets()
    if event:
        found = distillation_ppo_loss(
            actor, distillation, data=data, student_logits=flat.unsqueeze(0)
        )
        return {k: torch.nested.nested_tensor_from_jagged(v[0], offsets) for k, v in found.items()}
    labels = torch.roll(data["input_ids"].values(), -1)
    found_N = logprobs_from_logits(flat, labels, inplace_backward=False)
    return {"log_probs": torch.nested.nested_tensor_from_jagged(found_N, offsets)}


class World:
    """The same step, once for our trainer and once for verl."""

    def __init__(self, event: bool = True, old_seed: int | None = None, **fields) -> None:
        self.event, self.fields = event, fields
        self.student = step_parts.model(0)
        self.teacher = step_parts.model(1)
        self.reference = step_parts.model(2)
        self.objective = step_parts.objective(
            stop="event" if event else "token", **({"reference_kl": "k1"} | fields)
        )
        self.rollouts = step_parts.make_rollouts()
        self.golden = step_parts.make_golden() if self.objective.lambda_gold else []
        self.sequences = rollout_sequences(self.rollouts) + self.golden
        self.old_logps = None if old_seed is None else self._perturbed(old_seed)

    def _perturbed(self, seed: int) -> list[list[float]]:
        """Log-probs of an older student, off by up to half a nat."""
        draw = torch.Generator().manual_seed(seed)
        rows = [token_logps(self.student, self._ids(s)) for s in self.sequences]
        kept = [row[-len(s.completion_ids) :] for row, s in zip(rows, self.sequences, strict=True)]
        return [(r + torch.rand(len(r), generator=draw) - 0.5).tolist() for r in kept]

    @staticmethod
    def _ids(sequence) -> tuple[int, ...]:
        return (*sequence.prompt_ids, *sequence.completion_ids)

    def ours(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], Tally]:
        """The loss as our trainer computes it."""
        o, tally = self.objective, Tally()
        who = step_parts.players(
            self.student,
            self.teacher,
            self.reference if o.beta_reference else None,
            event=self.event,
        )
        work = step_parts.work(o, rollouts=self.rollouts, golden=self.golden)
        sequences = self.sequences
        found = terms_of(who, work, tally, sequences, self.old_logps)
        total = (o.lambda_policy or 0.0) * found.get("opd", torch.zeros(()))
        if o.reference_kl != "k1" and "reference_kl" in found:
            total = total + o.beta_reference * found["reference_kl"]
        if o.lambda_gold:
            total = total + o.lambda_gold * found["golden"]
        return total, found, tally

    def verl(self, splits: tuple[slice, ...] = (slice(None),), extra: tuple[str, ...] = ()):
        """The loss as verl computes it, summed over micro-batches, and its metrics."""
        actor, distillation, _ = configs(self.event, N, extra=extra, **self.fields)
        total, metrics = torch.zeros((), dtype=torch.float64), []
        for part in splits:
            data = self.data(part)
            output = model_output(self.student, actor, distillation, data, self.event)
            value, found = distillation_ppo_loss(
                actor, distillation, model_output=output, data=data
            )
            total = total + value
            metrics.append(found)
        return total, metrics

    def data(self, part: slice = slice(None)):
        places = range(len(self.sequences))[part]
        num_tokens = sum(len(s.completion_ids) for s in self.sequences)
        reference = [self.response(self.reference, i) for i in places]
        return make_data(
            [self.sequences[i] for i in places],
            [self._old(i) for i in places],
            [self.teacher_rows(self._ids(self.sequences[i])) for i in places],
            reference if self.objective.beta_reference else None,
            len(self.sequences),
            num_tokens,
        )

    def _old(self, i: int) -> torch.Tensor:
        if self.old_logps is None:
            return self.response(self.student, i)
        return torch.tensor(self.old_logps[i], dtype=torch.float64)

    def response(self, model, i: int) -> torch.Tensor:
        s = self.sequences[i]
        return token_logps(model, self._ids(s))[-len(s.completion_ids) :]

    def teacher_rows(self, ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        server = Server(self.teacher)
        client = StopEventTeacher(server, STOPS) if self.event else server
        params = {"prompt_logprobs": 0, "max_tokens": 1}
        call = client.generate("r", prompt_ids=list(ids), sampling_params=params)
        fields = asyncio.run(call).extra_fields
        logps = torch.tensor(fields["prompt_logprobs"], dtype=torch.float64)
        return torch.tensor(fields["prompt_ids"], dtype=torch.int32), logps


def step_players(world: World) -> Any:
    """The models of a world, for our trainer's step."""
    return step_parts.players(world.student, world.teacher, event=world.event)


def step_work(world: World) -> Any:
    """The batch of a world, for our trainer's step."""
    return step_parts.work(world.objective, rollouts=world.rollouts, golden=world.golden)


class Writer:
    """A server of rollouts: a language model that writes its likeliest tokens."""

    def __init__(self, model: Any, budget: int) -> None:
        self.model, self.budget = model, budget
        self.stop_ids: list[int] | None = None

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        self.stop_ids = sampling_params["stop_token_ids"]
        ids: list[int] = []
        while len(ids) < self.budget and not set(ids[-1:]) & set(self.stop_ids):
            ids.append(int(logits(self.model, [*prompt_ids, *ids])[-1].argmax()))
        return TokenOutput(
            token_ids=ids, extra_fields={"min_global_steps": 4, "max_global_steps": 4}
        )


def chat_tokenizer() -> Any:
    """A tokenizer of single characters with a template of one turn."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<end>"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    return tokenizer


def mixture(config: Any, server: Any, kind: type) -> Any:
    """An agent loop as verl's worker makes it."""
    return kind(
        trainer_config=DictConfigWrap(config),
        server_manager=server,
        tokenizer=chat_tokenizer(),
        processor=None,
        dataset_cls=RLHFDataset,
        data_config=DictConfigWrap(config.data),
    )
