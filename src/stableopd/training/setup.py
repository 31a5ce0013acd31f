"""Everything that is decided and loaded before the first step."""

from __future__ import annotations

import dataclasses
import platform
import sys
import tomllib
from collections.abc import Sequence as Many
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from stableopd import config as configuration
from stableopd import embedded, models
from stableopd.config import Config
from stableopd.data.golden import golden_sequences, num_too_long
from stableopd.data.prompts import encode_prompts, load_prompts
from stableopd.models import LanguageModel
from stableopd.rollout.sampler import TransformersSampler
from stableopd.rollout.stops import StopPlan, plan_stops, stop_ids_of
from stableopd.runfolder import RunFolder
from stableopd.teacher.local import FrozenModel
from stableopd.training.checkpoint import load_adapter, load_trainer
from stableopd.training.devices import dtype_of, make_accelerator
from stableopd.training.terms import Players
from stableopd.types import ConfigError, Prompt, SamplingSettings, Sequence

__all__ = ["Problems", "Run", "begin", "eval_settings", "prepare"]


@dataclass(frozen=True)
class Problems:
    """Prompts with their token ids, and the golden solution of each where there is one."""

    prompts: Many[Prompt]
    prompt_ids: Many[tuple[int, ...]]
    golden: Many[Sequence | None]

    def named_ids(self, places: Many[int]) -> list[tuple[str, tuple[int, ...]]]:
        """What the sampler takes, for the prompts at some places."""
        return [(self.prompts[i].id, self.prompt_ids[i]) for i in places]


@dataclass(frozen=True)
class Run:
    """A run that is ready to make its next step.

    Attributes:
        config: The configuration.
        folder: The run folder; of a new run it is not made yet.
        accelerator: Device, precision and trackers.
        student: The student.
        teacher_tokenizer: The teacher's tokenizer; None without a teacher.
        players: The models as a step sees them.
        stops: Which ids stop, and how stopping is scored.
        sampler: Writes the rollouts.
        eval_sampler: The same student with the batch size of the evaluation.
        optimizer: Holds what is trained.
        scheduler: The learning rate over the steps.
        train: The problems to train on.
        held_out: The problems of the evaluation; None without one.
        is_resumed: Whether the folder holds this run already.
        start_step: Steps that are already made.
        notes: Sentences for the user about what was found on the way.
    """

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    student: LanguageModel
    teacher_tokenizer: Any
    players: Players
    stops: StopPlan
    sampler: TransformersSampler
    eval_sampler: TransformersSampler
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train: Problems
    held_out: Problems | None
    is_resumed: bool
    start_step: int
    notes: tuple[str, ...]


def prepare(config: Config, resume: bool = False) -> Run:
    """Load models and data, check that they fit, and open the run folder.

    Nothing is written: `begin` makes the folder when the first step is about to be made.

    Args:
        config: The configuration.
        resume: Go on from the newest checkpoint of the folder `run.output`.

    Returns:
        The run.

    Raises:
        StableOPDError: Something does not fit; the message says what and where.
    """
    output = Path(config.run.output)
    folder, checkpoint = _find_folder(config, output, resume)
    accelerator = make_accelerator(
        config.run.device, config.student.dtype, config.run.trackers, output
    )
    torch.manual_seed(config.run.seed)  # a new adapter is drawn from it
    transformers.logging.set_verbosity_error()
    student, teacher, reference = _load_models(config, accelerator.device, checkpoint)
    num_tokens, stops = _agree(config, student, teacher)
    players = _players(config, accelerator, student, teacher, reference, stops, num_tokens)
    train, held_out, notes = _load_data(config, student, teacher, stops)
    optimizer, scheduler = _optimizer(config, student)
    start_step = 0
    if checkpoint is not None:
        start_step = load_trainer(checkpoint, optimizer, scheduler)

    def sampler(batch_size: int) -> TransformersSampler:
        return TransformersSampler(
            student.model, student.tokenizer, stops.decode_ids, num_tokens, batch_size
        )

    return Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        student=student,
        teacher_tokenizer=None if teacher is None else teacher.tokenizer,
        players=players,
        stops=stops,
        sampler=sampler(config.rollout.batch_size),
        eval_sampler=sampler(config.eval.batch_size),
        optimizer=optimizer,
        scheduler=scheduler,
        train=train,
        held_out=held_out,
        is_resumed=resume,
        start_step=start_step,
        notes=tuple(notes),
    )


def begin(run: Run) -> None:
    """Make the folder of a new run, or take a resumed one back to its checkpoint.

    Args:
        run: A prepared run that is about to make its next step.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    text = configuration.to_toml(run.config)
    if run.is_resumed:
        # Without a checkpoint even step 0's evaluation is made again.
        run.folder.rewind(run.start_step or -1)
        run.folder.write_text("config.toml", text)
    else:
        RunFolder.create(run.folder.path, text, _environment(run.config))
    if run.config.run.trackers:
        # Trackers take no lists.
        flat = {k: str(v) if isinstance(v, list) else v for k, v in _flat(run.config).items()}
        run.accelerator.init_trackers("stableopd", config=flat)


def _source(model: str, role: str) -> str:
    return str(embedded.path(role)) if model == "embedded" else model


def _load_models(
    config: Config, device: torch.device, checkpoint: Path | None
) -> tuple[LanguageModel, LanguageModel | None, LanguageModel | None]:
    """Student, teacher and reference; the last two None where no term needs them."""
    o, s, t = config.objective, config.student, config.teacher
    source = _source(s.model, "student")
    dtype = dtype_of(s.dtype, "student", device)

    def load_student(path: str, gguf_file: str) -> LanguageModel:
        return models.load(path, role="student", dtype=dtype, device=device, gguf_file=gguf_file)

    if s.lora_rank:
        student = load_student(source, s.gguf_file)
        student = models.add_lora(student, s.lora_rank, s.lora_alpha, s.lora_targets)
        if checkpoint is not None:
            load_adapter(student, checkpoint)
    elif checkpoint is not None:
        student = load_student(str(checkpoint), "")
    else:
        student = load_student(source, s.gguf_file)
    if s.gradient_checkpointing:
        _checkpoint_gradients(student.model)
    teacher = reference = None
    if (o.lambda_policy and o.advantage != "group_reward") or o.lambda_divergence:
        teacher = models.load(
            _source(t.model, "teacher"),
            role="teacher",
            dtype=dtype_of(t.dtype, "teacher", device),
            device=device,
            gguf_file=t.gguf_file,
        )
        models.require_same_tokenizer(student, teacher)
    if o.beta_reference:
        # With an adapter the student's own base is the reference, and no second copy is held.
        reference = student if s.lora_rank else load_student(source, s.gguf_file)
    return student, teacher, reference


def _checkpoint_gradients(model: Any) -> None:
    # Its name from transformers 5.20 on, and before.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    for module in model.modules():
        # In training mode are the checkpointing layers alone: dropout stays off, as in sampling.
        module.training = bool(getattr(module, "gradient_checkpointing", False))


def _find_folder(config: Config, output: Path, resume: bool) -> tuple[RunFolder, Path | None]:
    """The run folder, and the checkpoint to go on from; nothing is written yet."""
    if not resume:
        return RunFolder.claim(output), None
    folder = RunFolder.open(output)
    _require_same_config(config, folder)
    checkpoints = folder.checkpoints()
    return folder, folder.checkpoint_path(checkpoints[-1]) if checkpoints else None


def _agree(
    config: Config, student: LanguageModel, teacher: LanguageModel | None
) -> tuple[int, StopPlan]:
    """The vocabulary that student and teacher share, and how their stops are scored."""
    num_tokens = models.shared_vocabulary(student, teacher)
    if config.objective.top_k > num_tokens:
        raise ConfigError(
            f"objective.top_k = {config.objective.top_k} is larger than the vocabulary of "
            f"{num_tokens} tokens; lower it."
        )
    stops = plan_stops(
        stop_ids_of(student.model, student.tokenizer),
        None if teacher is None else stop_ids_of(teacher.model, teacher.tokenizer),
        student.tokenizer.eos_token_id,
        config.objective.stop,
        num_tokens,
    )
    return num_tokens, stops


def _players(
    config: Config,
    accelerator: Accelerator,
    student: LanguageModel,
    teacher: LanguageModel | None,
    reference: LanguageModel | None,
    stops: StopPlan,
    num_tokens: int,
) -> Players:
    autocast: Any = accelerator.autocast

    def frozen(model: LanguageModel | None, temperature: float) -> FrozenModel | None:
        if model is None:
            return None
        return FrozenModel(model.model, num_tokens, temperature, autocast)

    pad_id = student.tokenizer.pad_token_id
    return Players(
        student=student.model,
        num_tokens=num_tokens,
        teacher=frozen(teacher, config.teacher.temperature),
        reference=frozen(reference, config.rollout.temperature),
        stop_ids=torch.tensor(stops.event_ids or stops.decode_ids, device=accelerator.device),
        stop_is_event=bool(stops.event_ids),
        temperature=config.rollout.temperature,
        pad_id=stops.label_id if pad_id is None else pad_id,
        autocast=autocast,
    )


def _load_data(
    config: Config, student: LanguageModel, teacher: LanguageModel | None, stops: StopPlan
) -> tuple[Problems, Problems | None, list[str]]:
    o, r, data = config.objective, config.rollout, config.data
    contexts = [m.context for m in (student, teacher) if m is not None and m.context]
    notes: list[str] = []

    def encoded(prompts: Many[Prompt], max_new_tokens: int) -> list[tuple[int, ...]]:
        return encode_prompts(
            prompts,
            student.tokenizer,
            data.chat_template,
            r.max_prompt_tokens,
            min(contexts, default=None),
            max_new_tokens,
        )

    prompts = load_prompts(
        data.train,
        data,
        split="train",
        needs_solution=bool(o.lambda_gold),
        needs_answer=o.advantage == "group_reward",
    )
    ids = encoded(prompts, r.max_new_tokens)
    golden: list[Sequence | None] = [None] * len(prompts)
    if o.lambda_gold:
        golden = golden_sequences(prompts, ids, student.tokenizer, stops.label_id, r.max_new_tokens)
        if left_out := num_too_long(prompts, golden):
            notes.append(
                f"{left_out} of {len(prompts)} golden solutions are longer than "
                f"rollout.max_new_tokens = {r.max_new_tokens} and are left out of the golden term."
            )
    train = Problems(prompts, ids, golden)
    if not config.eval.data:
        return train, None, notes
    held_out = load_prompts(
        config.eval.data,
        data,
        split="test",
        needs_solution=False,
        needs_answer=True,
        max_rows=config.eval.max_problems,
    )
    ids = encoded(held_out, config.eval.max_new_tokens or r.max_new_tokens)
    return train, Problems(held_out, ids, [None] * len(held_out)), notes


def _optimizer(config: Config, student: LanguageModel) -> tuple[torch.optim.Optimizer, Any]:
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        [p for p in student.model.parameters() if p.requires_grad],
        lr=o.learning_rate,
        betas=(o.beta1, o.beta2),
        weight_decay=o.weight_decay,
    )
    name = "constant_with_warmup" if o.schedule == "constant" else o.schedule
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=o.warmup_steps, num_training_steps=config.run.steps
    )
    return optimizer, scheduler


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


def _require_same_config(config: Config, folder: RunFolder) -> None:
    """Refuse to go on with other settings; the number of steps alone may grow."""
    before = configuration.parse(
        tomllib.loads(folder.config_text()), source=str(folder.path / "config.toml")
    )
    old, new = _flat(before), _flat(config)
    for name in sorted(old | new):
        mine, theirs = new.get(name), old.get(name)
        # The folder may have been moved, and steps may be added.
        if name == "run.output" or (name == "run.steps" and new[name] >= old[name]):
            continue
        if mine != theirs:
            raise ConfigError(
                f"--resume: {name} is {mine!r}, but the run in {folder.path} has {theirs!r}; use "
                "its settings, or another run.output for a new run."
            )


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
        if value is not None
    }


def _environment(config: Config) -> dict[str, Any]:
    packages = ("stableopd", "torch", "transformers", "accelerate", "datasets", "math-verify")
    return {
        "packages": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
        "seed": config.run.seed,
    }
