"""Everything that is decided and loaded before the first step."""

from __future__ import annotations

import logging
import platform
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

import stableopd
from stableopd import config as configuration
from stableopd import models
from stableopd.config import Config, ObjectiveConfig
from stableopd.config_checks import RAISING
from stableopd.data.splits import PROBES, split_differently, why_split
from stableopd.data.vocabulary import require_rows
from stableopd.models import LanguageModel
from stableopd.rollout.stops import StopPlan, plan_stops, stop_ids_of
from stableopd.runfolder import RunFolder
from stableopd.teacher.local import FrozenModel
from stableopd.teacher.selftest import self_test
from stableopd.teacher.server import ServedTeachers
from stableopd.training.checkpoint import load_trainer
from stableopd.training.data import Problems, load_held_out, load_train
from stableopd.training.devices import Layout, lay_out, make_accelerator
from stableopd.training.guard import Guard, spared
from stableopd.training.inputs import changed_inputs, differs, inputs_of, served_scores
from stableopd.training.loading import Models, load_models, share_out
from stableopd.training.ranks import Ranks, shared
from stableopd.training.resume import Past, find_past, flat, schedule_steps
from stableopd.training.sampling import Sampler, make_samplers
from stableopd.training.teaching import Teaching, find_teaching, needs_served, served_stop_ids
from stableopd.training.terms import Players
from stableopd.types import ConfigError, SamplingSettings

__all__ = ["Run", "begin", "eval_settings", "prepare", "prune", "tidy"]

log = logging.getLogger("stableopd")


@dataclass(frozen=True)
class Run:
    """A run that is ready to make its next step.

    Attributes:
        config: The configuration.
        folder: The run folder; of a new run it is not made yet.
        accelerator: Device, precision and trackers.
        ranks: The processes, this one among them.
        student: The student.
        teacher_tokenizer: The teacher's tokenizer; None without a teacher, and where it is served
            and its tokenizer is not at hand.
        players: The models as a step sees them.
        served: The teachers that are served; None without any.
        stops: Which ids stop, and how stopping is scored.
        sampler: Writes the rollouts.
        eval_sampler: The same student with the batch size of the evaluation.
        optimizer: Holds what is trained.
        scheduler: The learning rate over the steps.
        train: The problems to train on.
        held_out: The problems of the evaluation; None without one.
        initial: The trained parameters as they were at the start, by name; empty where no
            rollback can need them.
        guard: What the alarm has seen and done in the steps that are already made.
        inputs: Checksums of data and models, in the main process.
        is_resumed: Whether the folder holds this run already.
        start_step: Steps that are already made.
        notes: Sentences for the user about what was found on the way.
    """

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    ranks: Ranks
    student: LanguageModel
    teacher_tokenizer: Any
    players: Players
    served: ServedTeachers | None
    stops: StopPlan
    sampler: Sampler
    eval_sampler: Sampler
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train: Problems
    held_out: Problems | None
    initial: Mapping[str, Tensor]
    guard: Guard
    inputs: dict[str, str]
    is_resumed: bool
    start_step: int
    notes: tuple[str, ...]


def prepare(config: Config, resume: bool = False, allowed: Sequence[str] = ()) -> Run:
    """Load models and data, check that they fit, and open the run folder.

    Nothing is written but the lock of a folder that is resumed: `begin` makes the folder when the
    first step is about to be made.

    Args:
        config: The configuration.
        resume: Go on from the newest checkpoint of the folder `run.output`.
        allowed: What may have changed since the run began: names in `inputs.ALLOWABLE`.

    Returns:
        The run.

    Raises:
        StableOPDError: Something does not fit; the message says what and where.
    """
    r = config.run
    try:
        accelerator = make_accelerator(r.device, config.student.dtype, r.trackers, Path(r.output))
    except ConfigError as error:
        shared(error)  # all processes of a machine ask for the same device and trackers
        raise
    ranks = Ranks(accelerator.process_index, accelerator.num_processes)
    with ranks.watched():
        # Together, or the first to find fault would leave while others are still coming in.
        layout = ranks.together(lambda: lay_out(accelerator))
        try:
            return _prepare(config, resume, allowed, accelerator, layout)
        except BaseException:
            RunFolder(Path(r.output)).unlock()
            raise


@dataclass(frozen=True)
class _Read:
    """What a process has read by itself, before the processes do anything together."""

    past: Past
    models: Models
    teacher: Teaching
    num_tokens: int
    stops: StopPlan
    train: Problems
    held_out: Problems | None
    inputs: dict[str, str]
    notes: list[str]


def _prepare(
    config: Config,
    resume: bool,
    allowed: Sequence[str],
    accelerator: Accelerator,
    layout: Layout,
) -> Run:
    ranks = layout.ranks
    read = ranks.together(lambda: _read(config, resume, allowed, layout))
    if ranks.num > 1:
        ranks.require_same(_facts(config, read))
    models = share_out(read.models, layout, config.alarm.action == "rollback")
    student, past = models.student, read.past
    optimizer, scheduler = _optimizer(config, student, not ranks.shards)
    start_step, checkpoint = 0, past.checkpoint
    if checkpoint is not None:
        start_step = ranks.together(lambda: load_trainer(checkpoint, optimizer, scheduler))
    sampler, eval_sampler = make_samplers(
        config,
        student,
        read.stops,
        read.num_tokens,
        read.train,
        read.held_out,
        ranks,
        accelerator.autocast,
    )
    return Run(
        config=config,
        folder=past.folder,
        accelerator=accelerator,
        ranks=ranks,
        student=student,
        teacher_tokenizer=read.teacher.tokenizer,
        players=_players(config, accelerator, models, read.stops, read.num_tokens),
        served=read.teacher.served,
        stops=read.stops,
        sampler=sampler,
        eval_sampler=eval_sampler,
        optimizer=optimizer,
        scheduler=scheduler,
        train=read.train,
        held_out=read.held_out,
        initial=models.initial,
        guard=past.guard,
        is_resumed=resume,
        start_step=start_step,
        inputs=read.inputs,
        notes=(
            *past.notes,
            *read.notes,
            *_rate_notes(config, past, start_step, scheduler),
            *_alarm_notes(config, past.guard.objective),
            *_rank_notes(ranks),
        ),
    )


def _read(config: Config, resume: bool, allowed: Sequence[str], layout: Layout) -> _Read:
    """Find what there is of the run, and load models and data."""
    if layout.ranks.num > config.rollout.prompts_per_step:
        raise ConfigError(
            f"rollout.prompts_per_step = {config.rollout.prompts_per_step} leaves some of "
            f"{layout.ranks.num} processes without a prompt; raise it or start fewer processes."
        )
    past = find_past(config, resume, layout.ranks.is_main)
    torch.manual_seed(config.run.seed)  # a new adapter is drawn from it
    transformers.logging.set_verbosity_error()
    objective, may_raise = past.guard.objective, config.alarm.action in RAISING
    needs_reference = bool(objective.beta_reference) or may_raise
    loaded = load_models(config, layout, past.checkpoint, needs_reference)
    student = loaded.student
    num_tokens, stops = _agree(config, student, loaded.teacher, past.student_stop_ids)
    teacher = find_teaching(config, student, loaded.teacher, stops, num_tokens)
    needs_golden = bool(objective.lambda_gold) or may_raise
    train, notes = load_train(config, student, teacher.context, stops, needs_golden)
    held_out, told = load_held_out(config, student, teacher.context)
    notes += [f"eval.data: {note}" for note in told]
    for problems in (train, held_out):
        if problems is not None:
            require_rows(problems.named_texts(), student.tokenizer, num_tokens)
    notes += [*student.notes, *_model_notes(config, loaded, train)]
    inputs: dict[str, str] = {}
    before = past.environment.get("inputs") or {}
    if layout.ranks.is_main:
        inputs = inputs_of(train, held_out, loaded.sums, stops.teacher_ids)
        notes += changed_inputs(before, inputs, allowed, past.folder.path)
    if teacher.served is not None:
        notes += self_test(teacher.served, student.tokenizer, train.prompt_ids)
        if layout.ranks.is_main:
            scores = {"served": served_scores(teacher.served)}
            notes += changed_inputs(before, scores, allowed, past.folder.path)
            inputs |= scores
    return _Read(past, loaded, teacher, num_tokens, stops, train, held_out, inputs, notes)


def _model_notes(config: Config, loaded: Models, train: Problems) -> list[str]:
    """What of the models will do harm, though nothing is wrong with each of them."""
    student, teacher = loaded.student, loaded.teacher
    notes: list[str] = []
    if rounding := models.rounding_note(student.model, config.optimizer.learning_rate):
        notes.append(f"{rounding} Leave student.dtype at auto (float32 weights).")
    if teacher is not None:
        some = train.prompts[:16]
        own = [p.prompt for p in some if isinstance(p.prompt, str)]
        own += [p.solution for p in some if p.solution]
        if split := split_differently(student, teacher, [*own, *PROBES]):
            why, fix = why_split(student, teacher, split[0])
            notes.append(
                f"{len(split)} of {len(own) + len(PROBES)} texts are split differently by the "
                f"tokenizers of student and teacher, {why}; {fix}"
            )
    return notes


def _facts(config: Config, read: _Read) -> dict[str, Any]:
    """What all processes must have read alike, beside the weights."""
    data = repr(
        [(read.train.prompt_ids, read.train.golden), read.held_out and read.held_out.prompts]
    )
    return {
        "configuration": configuration.to_toml(config),
        "checkpoint": str(read.past.checkpoint),
        "data set": zlib.crc32(data.encode()),
    }


def begin(run: Run) -> None:
    """Make the folder of a new run, or take a resumed one back to its checkpoint.

    Args:
        run: A prepared run that is about to make its next step.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    run.ranks.on_main(lambda: _open_folder(run))
    if run.config.run.trackers:
        # Trackers take no lists.
        told = flat(run.config).items()
        fields = {k: str(v) if isinstance(v, list | dict) else v for k, v in told}
        run.accelerator.init_trackers("stableopd", config=fields)


def _open_folder(run: Run) -> None:
    text = configuration.to_toml(run.config)
    if run.is_resumed:
        tidy(run)
        run.folder.write_text("config.toml", text)
        _record_inputs(run)
    else:
        if note := run.folder.lock():
            log.warning("%s", note)
        RunFolder.create(run.folder.path, text, _environment(run))


def tidy(run: Run) -> None:
    """Forget what came after the checkpoint of a resumed run, and what kills left over.

    Args:
        run: The run.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    # Without a checkpoint even step 0's evaluation is made again.
    run.folder.rewind(run.start_step or -1)
    # A kill may have come between the write of the checkpoint and this.
    prune(run, run.guard)


def _record_inputs(run: Run) -> None:
    """Keep what a resumed run is made of from now on, and from which step on it is another."""
    before = run.folder.environment() if run.folder.has_environment() else _environment(run)
    old: dict[str, str] = before.get("inputs") or {}
    new = old | run.inputs
    changed = [name for name in old if differs(name, old[name], new[name])]
    if changed:
        known = before.get("changed")
        told = [*(known if isinstance(known, list) else []), {"step": run.start_step}]
        told[-1]["inputs"] = changed
        before = {**before, "changed": told}
    if changed or new != old or not run.folder.has_environment():
        run.folder.write_environment({**before, "inputs": new})


def prune(run: Run, guard: Guard) -> None:
    """Remove the checkpoints that nobody needs any more.

    Args:
        run: The run.
        guard: The alarm after the last step.

    Raises:
        RunFolderError: One cannot be removed.
    """
    kept = spared(guard, run.folder.checkpoints(), run.config)
    run.folder.prune_checkpoints(run.config.run.keep_checkpoints, kept)


def _agree(
    config: Config,
    student: LanguageModel,
    teacher: LanguageModel | None,
    own_ids: tuple[int, ...] | None,
) -> tuple[int, StopPlan]:
    """The vocabulary that student and teacher share, and how their stops are scored.

    `own_ids` are those that the student stopped with before it was trained, where it comes from a
    checkpoint, which names those of the run.
    """
    num_tokens = models.shared_vocabulary(student, teacher)
    if needs_served(config):
        # Rows beyond the tokenizer's ids are padding, which the server may not have.
        num_tokens = min(num_tokens, max(student.tokenizer.get_vocab().values()) + 1)
    if config.objective.top_k > num_tokens:
        raise ConfigError(
            f"objective.top_k = {config.objective.top_k} is larger than the vocabulary of "
            f"{num_tokens} tokens; lower it."
        )
    served_ids = served_stop_ids(config.teacher) if needs_served(config) else None
    stops = plan_stops(
        own_ids or stop_ids_of(student.model, student.tokenizer),
        served_ids if teacher is None else stop_ids_of(teacher.model, teacher.tokenizer),
        student.tokenizer.eos_token_id,
        config.objective.stop,
        num_tokens,
    )
    return num_tokens, stops


def _players(
    config: Config,
    accelerator: Accelerator,
    loaded: Models,
    stops: StopPlan,
    num_tokens: int,
) -> Players:
    student = loaded.student
    autocast: Any = accelerator.autocast

    def frozen(
        model: LanguageModel | None, temperature: float, is_base: bool = False
    ) -> FrozenModel | None:
        if model is None:
            return None
        return FrozenModel(model.model, num_tokens, temperature, autocast, is_base=is_base)

    pad_id = student.tokenizer.pad_token_id
    if pad_id is None or not 0 <= pad_id < num_tokens:
        pad_id = stops.label_id
    return Players(
        student=student.model,
        num_tokens=num_tokens,
        teacher=frozen(loaded.teacher, config.teacher.temperature),
        reference=frozen(loaded.reference, config.rollout.temperature, is_base=True),
        stop_ids=torch.tensor(stops.event_ids or stops.decode_ids, device=accelerator.device),
        stop_is_event=bool(stops.event_ids),
        temperature=config.rollout.temperature,
        pad_id=pad_id,
        autocast=autocast,
    )


def _alarm_notes(config: Config, objective: ObjectiveConfig) -> list[str]:
    """What the alarm's action costs, and what it cannot do."""
    action, every, steps = config.alarm.action, config.run.save_every, config.run.steps
    notes: list[str] = []
    if action in RAISING and not objective.beta_reference and not config.student.lora_rank:
        notes.append(
            f"alarm.action = {action!r} may turn the golden and the reference term on: golden "
            "solutions and a frozen copy of the initial student are held from the start; the copy "
            "takes as much memory as the student's weights."
        )
    if action == "rollback" and every >= steps:
        notes.append(
            f"alarm.action = 'rollback' can put back the initial student alone, as "
            f"run.save_every = {every} makes no checkpoint before the last of {steps} steps; "
            "lower run.save_every."
        )
    return notes


def _rank_notes(ranks: Ranks) -> list[str]:
    if ranks.num == 1:
        return []
    holding = "which share the weights out (FSDP2)" if ranks.shards else "each with all weights"
    return [
        f"{ranks.num} processes, {holding}: each draws the rollouts of its prompts with a seed of "
        "its own, so that another number of processes draws other rollouts."
    ]


def _optimizer(
    config: Config, student: LanguageModel, is_fused: bool
) -> tuple[torch.optim.Optimizer, Any]:
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        [p for p in student.model.parameters() if p.requires_grad],
        lr=o.learning_rate,
        betas=(o.beta1, o.beta2),
        weight_decay=o.weight_decay,
        fused=is_fused,  # one pass over the weights and their states instead of ten
    )
    name = "constant_with_warmup" if o.schedule == "constant" else o.schedule
    total = schedule_steps(config)
    scheduler: Any = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=o.warmup_steps, num_training_steps=total
    )
    if o.schedule_steps:
        # Past its end a cosine would rise again.
        scheduler.lr_lambdas = [_ending(f, total) for f in scheduler.lr_lambdas]
    return optimizer, scheduler


def _ending(factor: Callable[[int], float], total: int) -> Callable[[int], float]:
    return lambda step: factor(min(step, total))


def _rate_notes(config: Config, past: Past, start_step: int, scheduler: Any) -> list[str]:
    """What the learning rate will do that the user may not expect."""
    o, steps, total = config.optimizer, config.run.steps, schedule_steps(config)

    def rate(step: int) -> float:
        return o.learning_rate * scheduler.lr_lambdas[0](step - 1)

    notes: list[str] = []
    if o.warmup_steps >= steps:
        notes.append(
            f"optimizer.warmup_steps = {o.warmup_steps} and run.steps = {steps}: the learning rate "
            f"only gets to {rate(steps):g} of {o.learning_rate:g}."
        )
    if o.schedule == "constant":
        return notes
    old = past.schedule_steps
    if old is not None and old != total and start_step:
        was = f" It was {past.last_rate:g} in step {start_step}." if past.last_rate else ""
        notes.append(
            f"The {o.schedule} schedule of the learning rate was made for {old} steps and is now "
            f"stretched over {total}.{was} It is {rate(start_step + 1):g} in step "
            f"{start_step + 1}. To keep the schedule as it was, press Ctrl-C twice now and go on "
            f"with --set optimizer.schedule_steps={old}: the rate is 0 after its end."
        )
    if total < steps:
        notes.append(
            f"The {o.schedule} schedule of the learning rate ends at step {total}: after it the "
            f"rate is {rate(total + 1):g}, up to step {steps} (optimizer.schedule_steps)."
        )
    return notes


def eval_settings(config: Config) -> SamplingSettings:
    """How the completions of an evaluation are drawn.

    Args:
        config: The configuration.

    Returns:
        The settings.
    """
    e = config.eval
    return SamplingSettings(
        e.max_new_tokens or config.rollout.max_new_tokens, e.temperature, e.top_p
    )


def _version(package: str) -> str | None:
    """The version that is installed; None of one that is imported from elsewhere, or missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _environment(run: Run) -> dict[str, Any]:
    stops = run.stops
    packages = ("torch", "transformers", "accelerate", "datasets", "math-verify")
    versions = {"stableopd": stableopd.__version__} | {name: _version(name) for name in packages}
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": _command(sys.argv),
        "seed": run.config.run.seed,
        "num_processes": run.ranks.num,
        "shards": run.ranks.shards,
        "stops": {
            "mode": stops.mode,
            "student_ids": stops.student_ids,
            "teacher_ids": stops.teacher_ids,
            "event_ids": stops.event_ids,
        },
        "inputs": run.inputs,
    }


def _command(arguments: Sequence[str]) -> list[str]:
    """The command line without what names a machine or its user: the folder is for sharing.

    What is set is in the configuration.
    """
    told: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        told.append(f"{name}=..." if equals else PurePath(argument).name)
    return told
