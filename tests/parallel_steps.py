"""A few steps on given rollouts, in one process or in several; run by test_parallel_step.py."""

from pathlib import Path

import torch
import torch.distributed as dist

import step_parts
from stableopd import models
from stableopd.models import LanguageModel
from stableopd.runfolder import RunFolder
from stableopd.training import checkpoint, sharding
from stableopd.training.loading import checkpoint_gradients
from stableopd.training.ranks import ALONE, Ranks
from stableopd.training.step import step
from stableopd.types import ConfigError, StopReason, TrainingError
from tiny import CPU, EOS, in_double, make_llama, make_tokenizer

NUM_STEPS, LEARNING_RATE = 3, 1e-2


def make_student(case):
    """A student, and the reference that belongs to it."""
    options = {"tie_word_embeddings": bool(case.get("tied"))}
    student = in_double(make_llama(0, sharp=8, **options))
    if not case.get("lora"):
        return student, in_double(make_llama(2, sharp=8, **options))
    torch.manual_seed(0)
    whole = LanguageModel("student", student, None, None)
    student = models.add_lora(whole, 2, 32, "all-linear").model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return student.double(), student


def make_batch(case, seed):
    chosen = step_parts.objective(case.get("method", "stable_opd"), **case.get("objective", {}))
    rollouts = step_parts.make_rollouts(seed)
    if case.get("only_truncated"):
        rollouts = [r for r in rollouts if r.stop_reason is StopReason.LENGTH]
    golden = step_parts.make_golden(seed)[: case.get("num_golden", 3)]
    return step_parts.work(chosen, rollouts[: case.get("num_rollouts")], golden)


def take_all(cases, shards, offloads=False):
    """What `take_steps` gives for each of the cases, in one of several processes."""
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), shards)
    return {name: take_steps(case, ranks, offloads) for name, case in cases.items()}


def take_steps(case, ranks=ALONE, offloads=False):
    """Make some steps, and give all that came of them; the same in every process."""
    student, reference = make_student(case)
    if case.get("checkpointing"):
        checkpoint_gradients(student)
    teacher = step_parts.model(1, 48, sharp=8)
    for model in {id(m): m for m in (student, reference, teacher)}.values():
        if ranks.shards:
            sharding.shard(model, CPU, offloads)
    who = step_parts.players(student, teacher, reference)
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=0.1)
    results = []
    for number in range(NUM_STEPS):
        results.append(
            step(
                who,
                optimizer,
                make_batch(case, number),
                micro_batch_tokens=case.get("micro_batch_tokens", 40),
                grad_clip=1.0,
                ranks=ranks,
            )
        )
    weights = {name: sharding.whole(p.detach()).clone() for name, p in trained.items()}
    return results, weights


def put_back(folder, shards, lora):
    """Whether a checkpoint, and then the initial student, come back bit by bit after more steps."""
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), 2, shards)
    case = {"lora": lora, "method": "sft"}
    model, _ = make_student(case)
    reference, _ = make_student(case)
    for one in (model, reference) if shards else ():
        sharding.shard(one, CPU, False)
    student = LanguageModel("student", model, make_tokenizer(), None)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)

    def train(number):
        batch, who = make_batch(case, number), step_parts.players(model)
        step(who, optimizer, batch, micro_batch_tokens=40, grad_clip=1.0, ranks=ranks)

    def state():
        moments = [v for values in optimizer.state.values() for v in values.values()]
        return [sharding.whole(t.detach()).clone() for t in (*trained.values(), *moments)]

    def equal(some, others):
        return len(some) == len(others) and all(map(torch.equal, some, others))

    initial = state()
    train(0)
    run = RunFolder(Path(folder))
    checkpoint.save(run, 1, student, optimizer, scheduler, ranks, [EOS])
    saved = state()
    train(1)
    moved = state()
    checkpoint.restore(student, optimizer, scheduler, run.checkpoint_path(1))
    found = [equal(state(), saved), not equal(moved, saved)]
    weights = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    checkpoint.restore_initial(student, optimizer, scheduler, weights)
    return [*found, equal(state(), initial), not equal(initial, saved[: len(initial)])]


def differ(values):
    """What is told where the processes have read different things."""
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), 2)
    try:
        ranks.require_same({"data set": values[ranks.rank]})
    except ConfigError as error:
        return str(error), error.is_shared
    return None


def fail(case, shards):
    """One step whose teacher or student is broken in the last process alone."""
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), 2, shards)
    student, teacher = make_student({})[0], step_parts.model(1, 48, sharp=8)
    for model in (student, teacher) if shards else ():
        sharding.shard(model, CPU, False)
    if not ranks.is_main:
        broken = teacher if case == "teacher" else student
        place = broken.get_parameter("model.norm.weight")
        with torch.no_grad():
            getattr(place, "to_local", lambda: place)()[:] = torch.nan
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    who = step_parts.players(student, teacher)
    batch = make_batch({"method": "opd"}, 0)
    try:
        step(who, optimizer, batch, micro_batch_tokens=40, grad_clip=1.0, ranks=ranks)
    except TrainingError as error:
        return str(error), error.is_shared, len(optimizer.state)
    return None
