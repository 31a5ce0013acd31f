"""What the doctor looks at: two models, prompts, and the settings of the run to come."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from stableopd import config as configuration
from stableopd import embedded, models
from stableopd.config import Config, TeacherConfig
from stableopd.config_templates import read_template
from stableopd.data.prompts import encode_prompts, load_prompts
from stableopd.data.templates import give_template
from stableopd.models import LanguageModel
from stableopd.rollout.stops import Finding
from stableopd.training.devices import dtype_of, make_accelerator, require_one_process
from stableopd.types import ConfigError, Prompt

__all__ = ["Check", "Patient", "Settings", "admit", "settings_of"]

# Design: data are tokenised again by `train`, which refuses the first prompt that is too long.
MAX_ROWS = 2000

# Fills data.train where there are no data, since a configuration without any is refused.
NO_DATA = "built-in prompts"

# Without data. Short questions, so that a base model and a chat model can both answer.
BUILT_IN = (
    "What is 17 + 25?",
    "Name three colours of the rainbow.",
    "A train leaves at 9 and arrives at 12. How many hours does it take?",
    "Explain in one sentence why the sky is blue.",
    "What is the capital of France?",
    "Write a short story about a dog.",
    "Solve for x: 3 * x + 4 = 19.",
    "List the first five prime numbers and say why 9 is not among them.",
)


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found, in words and in numbers."""

    findings: tuple[Finding, ...] = ()
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Settings:
    """The settings of the run to come.

    Attributes:
        config: The configuration.
        is_given: Whether the user gave a configuration; where not, what it says of the objective
            and the batch are defaults, and the run may be made with another trainer.
        num_prompts: On how many prompts completions are sampled.
        has_budget: Whether the user chose `rollout.max_new_tokens`.
    """

    config: Config
    is_given: bool
    num_prompts: int
    has_budget: bool


@dataclass(frozen=True)
class Patient:
    """Models and prompts, loaded.

    Attributes:
        settings: The settings.
        device: Where the models are.
        student: The student, with its adapter where one is configured.
        teacher: The teacher; None without one.
        prompts: Prompts, at most `MAX_ROWS`.
        prompt_ids: Their token ids; only those of `student`'s tokenizer exist.
        has_data: Whether the prompts are the user's, and not the built-in ones.
        autocast: Opens the mixed-precision context.
    """

    settings: Settings
    device: torch.device
    student: LanguageModel
    teacher: LanguageModel | None
    prompts: Many[Prompt]
    prompt_ids: Many[tuple[int, ...]]
    has_data: bool
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.settings.config


def settings_of(
    student: str = "",
    teacher: str = "",
    data: str = "",
    config: Path | None = None,
    overrides: Many[str] = (),
    max_new_tokens: int | None = None,
    num_prompts: int = 8,
    chat_template: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings that the command's options stand for.

    Options that are given change the fields of the configuration, and `overrides` change both. The
    embedded student without data and without a configuration is examined with the demo's.

    Args:
        student: `student.model`; "" leaves it.
        teacher: `teacher.model`; "" leaves it.
        data: `data.train`; "" leaves it.
        config: A training configuration, or None.
        overrides: Strings "section.key=value".
        max_new_tokens: `rollout.max_new_tokens`; None leaves it.
        num_prompts: Prompts on which completions are sampled, at least 1.
        chat_template: `data.chat_template`; "" leaves it.
        chat_template_kwargs: `data.chat_template_kwargs`; an empty one leaves them.

    Returns:
        The settings.

    Raises:
        ConfigError: Neither a student nor a configuration, or a setting that is not possible.
    """
    if not student and config is None:
        raise ConfigError(
            "nothing to examine: give --student and --teacher, or --config with a training's TOML."
        )
    if num_prompts < 1:
        raise ConfigError(f"--num-prompts {num_prompts} must be at least 1.")
    options: dict[str, Any] = {
        "student.model": student,
        "teacher.model": teacher,
        "data.train": data,
        "data.chat_template": chat_template,
        "data.chat_template_kwargs": dict(chat_template_kwargs or {}),
        "rollout.max_new_tokens": max_new_tokens,
    }
    is_embedded = config is None and student == "embedded" and data in ("", "embedded")
    if config is None and not teacher:
        options["objective.method"] = "sft"  # the one that needs no teacher
    if config is None and not data and not is_embedded:
        options["data.train"] = NO_DATA
    changes = [*_as_overrides(options), *overrides]
    if config is not None:
        made = _with_local_teacher(configuration.load(config, changes), teacher)
    elif is_embedded:
        made = configuration.load(embedded.path("demo"), changes)
        made = made if teacher else _without_teacher(made)
    else:
        made = configuration.parse({}, changes, source="stableopd doctor")
    has_budget = config is not None or is_embedded
    has_budget |= any(change.startswith("rollout.max_new_tokens") for change in changes)
    return Settings(made, config is not None, num_prompts, has_budget)


def _as_overrides(options: Mapping[str, Any]) -> list[str]:
    """Options that were given, as `section.key=value`."""
    return [
        f"{field}={configuration.toml_value(value)}"
        for field, value in options.items()
        if value not in ("", None, {})
    ]


def _with_local_teacher(config: Config, folder: str) -> Config:
    """A configuration with a folder in place of the teacher that it has served, if it has one."""
    if not config.teacher.url:
        return config
    if not folder:
        raise ConfigError(
            "doctor examines a teacher in this process, and teacher.url names a server; give its "
            "folder as --teacher. (Training tests a served teacher before its first step.)"
        )
    return dataclasses.replace(config, teacher=TeacherConfig(folder))


def _without_teacher(config: Config) -> Config:
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, model=""))


def admit(settings: Settings) -> Patient:
    """Load what is to be examined; nothing is written.

    Args:
        settings: The settings.

    Returns:
        Models and prompts.

    Raises:
        StableOPDError: A model or the data cannot be loaded; the message says what and where.
    """
    config = settings.config
    s, t = config.student, config.teacher
    read_template(config.data.chat_template)  # refused before weights are read
    accelerator = make_accelerator(config.run.device, s.dtype, (), Path())
    require_one_process(accelerator, "doctor")
    device = accelerator.device
    transformers.logging.set_verbosity_error()

    def load(source: str, role: str, dtype: str, gguf_file: str) -> LanguageModel:
        folder = str(embedded.path(role)) if source == "embedded" else source
        kind = dtype_of(dtype, role, device)
        return models.load(folder, role=role, dtype=kind, device=device, gguf_file=gguf_file)

    student = load(s.model, "student", s.dtype, s.gguf_file)
    if s.lora_rank:
        student = models.add_lora(student, s.lora_rank, s.lora_alpha, s.lora_targets)
    give_template(student.tokenizer, config.data.chat_template)
    teacher = load(t.model, "teacher", t.dtype, t.gguf_file) if t.model else None
    has_data = config.data.train != NO_DATA
    if has_data:
        prompts = load_prompts(
            config.data.train,
            config.data,
            split="train",
            needs_solution=False,
            needs_answer=False,
            max_rows=MAX_ROWS,
        )
    else:
        prompts = [Prompt(str(i), text) for i, text in enumerate(BUILT_IN)]
    prompt_ids = encode_prompts(
        prompts,
        student.tokenizer,
        config.data.chat_template,
        # Lengths are a check of their own: here nothing is refused.
        max_prompt_tokens=10**9,
        context=None,
        max_new_tokens=config.rollout.max_new_tokens,
        template_kwargs=config.data.chat_template_kwargs,
    )
    autocast: Any = accelerator.autocast
    return Patient(settings, device, student, teacher, prompts, prompt_ids, has_data, autocast)
