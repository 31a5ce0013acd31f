"""Models, batches and calls that the tests of the training step share."""

import random

import torch

from stableopd.config import parse
from stableopd.hidden import reads_prompts_once
from stableopd.objective.advantage import group_reward
from stableopd.teacher.local import FrozenModel
from stableopd.training.step import step
from stableopd.training.terms import Players, Work
from stableopd.types import Rollout, SamplingSettings, Sequence, StopReason
from tiny import END, EOS, PAD, V, in_double, make_llama

STOPS = (EOS, END)
MAX_LENGTH = 9
SETTINGS = SamplingSettings(MAX_LENGTH)
AGGREGATIONS = ("sequence", "token", "constant")


def objective(method="stable_opd", **fields):
    table = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"train": "d"}}
    return parse(table | {"objective": {"method": method, **fields}}).objective


def model(seed, width=32, sharp=30.0):
    return in_double(make_llama(seed, width, sharp=sharp))


def make_rollouts(seed=0):
    """Three prompts with two rollouts each; stops of both ids, and two that were cut off."""
    draw = random.Random(seed)
    prompts = [tuple(draw.randrange(3, V) for _ in range(3 + i)) for i in range(3)]
    rollouts = []
    for i, (length, stop) in enumerate([(4, EOS), (9, 0), (2, END), (6, EOS), (9, 0), (1, EOS)]):
        body = tuple(draw.randrange(3, V) for _ in range(length - bool(stop)))
        reason = StopReason.STOP if stop else StopReason.LENGTH
        ids = (*body, stop) if stop else body
        rollouts.append(
            Rollout(f"p{i // 2}", prompts[i // 2], ids, "", reason, (0.0,) * length, SETTINGS)
        )
    return rollouts


def make_golden(seed=1):
    draw = random.Random(seed)
    return [
        Sequence((3, 4, 5), (*(draw.randrange(3, V) for _ in range(length)), EOS), True, i)
        for i, length in enumerate((3, 7, 1))
    ]


def players(student, teacher=None, reference=None, temperature=1.0, event=True):
    return Players(
        student=student,
        num_tokens=V,
        teacher=None if teacher is None else FrozenModel(teacher, V),
        reference=None
        if reference is None
        else FrozenModel(reference, V, temperature, is_base=True),
        stop_ids=torch.tensor(STOPS if event else (EOS,)),
        stop_is_event=event,
        temperature=temperature,
        pad_id=PAD,
    )


def work(chosen, rollouts=None, golden=None, rewards=None):
    uses_rollouts = chosen.lambda_policy or chosen.lambda_divergence or chosen.beta_reference
    rollouts = (make_rollouts() if rollouts is None else rollouts) if uses_rollouts else []
    golden = make_golden() if golden is None else golden
    if chosen.advantage == "group_reward" and rewards is None:
        rewards = group_reward(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 2)
    return Work(chosen, rollouts, golden, rewards, MAX_LENGTH)


def run(who, batch, lr=0.1, micro_batch_tokens=40, grad_clip=1e9):
    optimizer = torch.optim.SGD([p for p in who.student.parameters() if p.requires_grad], lr)
    return step(who, optimizer, batch, micro_batch_tokens=micro_batch_tokens, grad_clip=grad_clip)


def flat(student):
    return torch.cat([p.detach().reshape(-1) for p in student.parameters()]).clone()


class Counted:
    """How often a model is called, and how many rows it reads."""

    def __init__(self, language_model):
        if hasattr(language_model, "get_output_embeddings"):
            reads_prompts_once(language_model)  # is asked once, which is not to be counted
        self.calls = self.rows = 0
        language_model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, args, named):
        self.calls += 1
        self.rows += len(named["input_ids"] if "input_ids" in named else args[0])
