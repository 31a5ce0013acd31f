"""The configuration: frozen dataclasses, read from TOML and `--set section.key=value`.

Every field of every section is listed here, with its default and where that default comes from
("paper" is arXiv 2604.08527; "design" is this project's own choice; "untuned" is a guess).
An unknown key, a wrong type or a combination that cannot work is a `ConfigError` with the reason.
A method is a preset: it fills the fields of `[objective]` that the user left out, and nothing else
in the program ever looks at its name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stableopd.config_checks import check, check_section
from stableopd.text import one_line
from stableopd.types import ConfigError

__all__ = ["Config", "load", "parse", "repetition_of", "to_toml", "toml_value"]


@dataclass(frozen=True)
class RunConfig:
    output: str = "runs/train"
    seed: int = 0
    steps: int = 200  # paper: collapse shows within 100 to 200 steps
    save_every: int = 50  # design
    rollouts_every: int = 1  # design: every step's rollouts are kept
    keep_checkpoints: int = 2  # design: the last two, and what a rollback may need; 0: all
    device: str = "auto"  # "auto", "cpu", "cuda", "mps"
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudentConfig:
    model: str = ""
    gguf_file: str = ""
    dtype: str = "auto"  # float32 weights; bfloat16 autocast where a GPU has it
    lora_rank: int = 0  # 0: all weights are trained
    lora_alpha: int = 32  # untuned
    lora_targets: str = "all-linear"
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class TeacherConfig:
    model: str = ""
    gguf_file: str = ""
    dtype: str = "auto"  # bfloat16 on a GPU, float32 elsewhere
    temperature: float = 1.0  # the teacher's own distribution, whatever the rollouts' temperature
    # The rest is for a served teacher; `model` is then its name there, "" the only one.
    url: tuple[str, ...] | str = ()  # of replicas, up to and with "/v1"
    by_name: dict[str, tuple[str, ...] | str] = field(
        default_factory=lambda: dict[str, tuple[str, ...] | str]()
    )  # further teachers, for rows whose column data.teacher names them: name = url(s)
    tokenizer: str = ""  # folder or hub name: what it stops with; "": `model`, if that is a folder
    stop_ids: tuple[int, ...] = ()  # what it stops with, where there is no such folder
    api_key_env: str = ""  # name of the environment variable that holds the key; "": none is sent
    max_in_flight: int = 32  # untuned: requests under way at once, of one process to one teacher
    timeout_s: float = 300.0  # untuned: for one full answer, queueing at the server among it
    patience_s: float = 600.0  # untuned: a server may be started again within this


@dataclass(frozen=True)
class DataConfig:
    train: str = ""
    prompt: str = "prompt"
    solution: str = "solution"
    answer: str = "answer"
    teacher: str = "teacher"  # column with a name of teacher.by_name; empty: the default teacher
    chat_template: str = "auto"  # "auto", "none", or a file with a Jinja template
    # Variables for the template, such as {enable_thinking = false}.
    chat_template_kwargs: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())
    grader: str = "auto"  # exact with an answer_marker, else math; the embedded data: exact
    skip_long: bool = False  # leave prompts out that are too long, instead of refusing the data
    answer_marker: str = ""  # exact: the text after the last marker is compared; "" compares all


@dataclass(frozen=True)
class RolloutConfig:
    prompts_per_step: int = 16  # paper: 64 rollouts a step, 4 to a prompt
    rollouts_per_prompt: int = 4  # paper
    max_new_tokens: int = 512
    max_prompt_tokens: int = 1024  # paper
    temperature: float = 1.0  # paper
    top_p: float = 1.0
    top_k: int = 0
    allow_off_policy_sampling: bool = False
    engine: str = "transformers"
    batch_size: int = 0  # rollouts generated at once in this process; 0: all of a step
    # The rest is for engine = "vllm".
    url: tuple[str, ...] | str = ()  # of servers, up to and with "/v1"
    api_key_env: str = ""  # name of the environment variable that holds the key; "": none is sent
    weights_dir: str = ""  # design: "" is a folder beside run.output; servers must read it, too
    # Mean difference of log-probs, in nats, at which a server and the trainer are two models. 0:
    # 0.001 for servers in float32, else 0.15 (design: rounding to bfloat16 alone was measured as
    # 0.037; docs/engines.md).
    tolerance: float = 0.0
    timeout_s: float = 600.0  # untuned: for one prompt's rollouts, queueing among them
    patience_s: float = 600.0  # untuned: a server may be started again within this


@dataclass(frozen=True)
class ObjectiveConfig:
    method: str = "stable_opd"
    # The weights of the four terms. None takes the method's preset.
    lambda_policy: float | None = None
    lambda_gold: float | None = None
    lambda_divergence: float | None = None
    beta_reference: float | None = None
    reference_kl: str = "exact"  # design: no sampling noise, and no estimator to get wrong
    stop: str = "event"  # design: the two models need not share a stop id
    golden_stop_label: bool = True  # paper: solutions are terminated, and the stop is a label
    # The policy term.
    advantage: str | None = None
    advantage_parameter: float | None = None  # c, a or lambda of the bounded forms; None: untuned
    baseline: str = "none"  # "kl": control variate -KL(student || teacher) (2605.07865)
    first_n: int = 0  # credit for the first N tokens alone (2602.15260); 0: all
    prefix_gain: float = 0.0  # g of the prefix weights (2606.22600, which uses 0.5)
    mask_truncated: bool = False  # leave rollouts that were cut off out of the policy term
    clip: float | None = None  # paper: eps 0.2; acts only with several updates per batch,
    # where our sweep (docs/results.md, "Defaults") is flat from .1 to .4 for StableOPD.
    updates_per_batch: int = 1  # paper
    aggregation: str = "sequence"  # paper: the mean over rollouts of per-rollout means
    # The divergence term of gkd.
    divergence: str = "reverse_kl"
    top_k: int = 0  # local support of the teacher's k best tokens (2603.25562, K = 32); 0: all


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-6  # paper; our sweep is of models a thousand times smaller
    schedule: str = "constant"
    schedule_steps: int = 0  # steps over which the rate decays; 0: run.steps
    warmup_steps: int = 0  # as transformers counts them: the first step's rate is 0
    grad_clip: float = 1.0
    weight_decay: float = 0.0  # paper: Adam
    beta1: float = 0.9
    beta2: float = 0.999
    micro_batch_tokens: int = 8192  # design: padded tokens of one forward and backward pass


@dataclass(frozen=True)
class EvalConfig:
    data: str = ""
    every: int = 20
    samples: int = 4
    temperature: float = 0.6  # paper
    top_p: float = 1.0
    max_new_tokens: int = 0  # 0: as in the rollouts
    max_problems: int = 0  # 0: all
    batch_size: int = 64  # completions generated at once


@dataclass(frozen=True)
class RepetitionConfig:
    window_chars: int = 10_000  # paper: L
    ratio: float = 10.0  # paper: tau
    ngram: int = 8  # design
    min_run: int = 0  # design: 0 labels every recurring n-gram, 64 only long runs


@dataclass(frozen=True)
class AlarmConfig:
    # "none" asks no alarm, "warn" speaks, "stop" ends the run; "rollback" and "strengthen" raise
    # lambda_gold and beta_reference, the former after it has put the last healthy student back.
    action: str = "warn"  # design: it only speaks, so it changes no run
    max_actions: int = 3  # untuned: how often rollback or strengthen may act; then the run stops
    factor: float = 3.0  # untuned: multiplies a weight that is on; one that is off gets STABILISERS


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. `parse` and `load` make it; nothing changes it."""

    run: RunConfig = RunConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    alarm: AlarmConfig = AlarmConfig()


# What a method is: values for the fields that the user left out.
PRESETS: dict[str, dict[str, Any]] = {
    "opd": {
        "lambda_policy": 1.0, "lambda_gold": 0.0, "lambda_divergence": 0.0,
        "beta_reference": 0.0, "advantage": "log_ratio",
    },
    "stable_opd": {
        "lambda_policy": 1.0,
        # Our sweep (docs/results.md, "Defaults"): .3 still collapses, 1 to 3 are flat.
        "lambda_gold": 1.0,
        "lambda_divergence": 0.0,
        # Our sweep: flat from 0 to .1. The paper gives neither weight.
        "beta_reference": 0.01,
        "advantage": "log_ratio",
    },
    "sft": {
        "lambda_policy": 0.0, "lambda_gold": 1.0, "lambda_divergence": 0.0,
        "beta_reference": 0.0, "advantage": "log_ratio",
    },
    "grpo": {
        "lambda_policy": 1.0, "lambda_gold": 0.0, "lambda_divergence": 0.0,
        "beta_reference": 0.0, "advantage": "group_reward",
    },
    "gkd": {
        "lambda_policy": 0.0, "lambda_gold": 0.0, "lambda_divergence": 1.0,
        "beta_reference": 0.0, "advantage": "log_ratio",
    },
}  # fmt: skip

# What the alarm turns on where it is off.
STABILISERS: dict[str, float] = {
    name: PRESETS["stable_opd"][name] for name in ("lambda_gold", "beta_reference")
}

# Parameter of each bounded advantage where the user gives none (untuned, in nats or a probability).
ADVANTAGE_PARAMETERS: dict[str, float | None] = {
    "log_ratio": None,
    "clip": 5.0,
    "soft_log": None,
    "tanh": 1.0,
    "power": 1.0,
    "floor": 0.01,
    "group_reward": None,
}


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, fill presets, and check.

    Args:
        path: The TOML file.
        overrides: Strings of the form "section.key=value"; the value is TOML, or plain text.

    Returns:
        The resolved configuration.

    Raises:
        ConfigError: The file is missing or not TOML, or `parse` refuses what it says.
    """
    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            raise ConfigError(
                f"{file}: cannot be read: it is not a file; give the path of a TOML config."
            )
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; give the path of a TOML config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}).") from None
    return parse(_toml(text, str(file)), overrides, source=str(file))


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not valid TOML: {error}.") from None
    except (ValueError, RecursionError) as error:  # a number too long, or too many brackets
        reason = one_line(error)
        raise ConfigError(f"{source}: not usable as TOML: {reason}.") from None


def parse(
    table: dict[str, Any], overrides: typing.Sequence[str] = (), source: str = "config"
) -> Config:
    """Make a checked `Config` of nested tables.

    Args:
        table: Sections of fields, as `tomllib` gives them. It is not changed.
        overrides: Strings of the form "section.key=value", applied over the table.
        source: Where the table comes from, for messages.

    Returns:
        The resolved configuration: every field of the objective that was None is filled.

    Raises:
        ConfigError: An unknown section or key, a wrong type or value, an impossible combination.
    """
    sections = {f.name: typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}
    merged: dict[str, dict[str, Any]] = {}
    for section, values in table.items():
        if section not in sections:
            raise ConfigError(f"{source}: unknown section [{section}]{_nearest(section, sections)}")
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: [{section}] must be a table of fields.")
        merged[section] = dict(typing.cast(dict[str, Any], values))
    for override in overrides:
        section, key, value = _split(override, sections)
        merged.setdefault(section, {})[key] = value
    built = {name: _section(source, name, cls, merged.get(name, {}))
             for name, cls in sections.items()}  # fmt: skip
    config = Config(**built)
    config = dataclasses.replace(config, objective=_preset(config.objective))
    check(config, source)
    return config


def repetition_of(values: typing.Mapping[str, Any], source: str) -> RepetitionConfig:
    """How a run counts repetition, by the table of a version that may know other fields.

    Args:
        values: The table [repetition]; fields that are not known here are passed over.
        source: Where it comes from, for messages.

    Returns:
        The section.

    Raises:
        ConfigError: A value has a wrong type or is out of its range.
    """
    known = {f.name for f in dataclasses.fields(RepetitionConfig)}
    found = {name: value for name, value in values.items() if name in known}
    section = _section(source, "repetition", RepetitionConfig, found)
    check_section(source, "repetition", section)
    return section


def to_toml(config: Config) -> str:
    """Write a configuration as TOML that `parse` reads back to an equal one."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = getattr(config, section.name)
        for f in dataclasses.fields(values):
            value = getattr(values, f.name)
            if value is not None:
                lines.append(f"{f.name} = {toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """Write a value of a field as TOML, on one line.

    Args:
        value: Text, a number, true or false, or a list or dict of these.

    Returns:
        TOML that `parse` and overrides read back.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML forbids one more control character than JSON does.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        items = typing.cast(dict[str, Any], value).items()
        return "{" + ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in items) + "}"
    if isinstance(value, tuple | list):
        items = typing.cast(typing.Sequence[Any], value)
        return "[" + ", ".join(map(toml_value, items)) + "]"
    return repr(value)


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}."


def _split(override: str, sections: dict[str, Any]) -> tuple[str, str, Any]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise ConfigError(f"--set {override}: write it as section.key=value.")
    if section not in sections:
        raise ConfigError(f"--set {override}: unknown section{_nearest(section, sections)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        reason = one_line(error)
        raise ConfigError(f"--set {section}.{key}: not usable as TOML: {reason}.") from None
    return section, key.strip(), value


def _section(source: str, name: str, cls: type, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{source}: unknown key '{name}.{key}'{_nearest(key, hints)}")
    return cls(
        **{key: _typed(source, f"{name}.{key}", hints[key], value) for key, value in values.items()}
    )


def _typed(source: str, name: str, hint: Any, value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= 2**63:  # no field takes it, nor does float()
        raise ConfigError(f"{source}: {name} is a number that is too large.")
    if isinstance(hint, types.UnionType):
        if type(None) not in typing.get_args(hint) and isinstance(value, str):
            value = [value] if value else []  # one text stands for a list of one
        hint = typing.get_args(hint)[0]
        if typing.get_origin(hint) is tuple and isinstance(value, str):
            value = [value] if value else []  # one text stands for a list of one
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{source}: {name} must be a table of names, not {_shown(value)}.")
        _, inner = typing.get_args(hint)
        if inner is Any:
            return dict(typing.cast(dict[str, Any], value))  # `check` looks at what is in it
        items = typing.cast(dict[str, Any], value).items()
        return {key: _typed(source, f"{name}.{key}", inner, item) for key, item in items}
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        # The type itself: true is no number here.
        if not isinstance(value, list | tuple) or not all(
            type(v) is inner for v in typing.cast(list[Any], value)
        ):
            kind = {str: "strings", int: "whole numbers"}[inner]
            raise ConfigError(f"{source}: {name} must be a list of {kind}, not {_shown(value)}.")
        return tuple(_typed(source, name, inner, v) for v in typing.cast(list[Any], value))
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
        raise ConfigError(f"{source}: {name} must be {kind}, not {_shown(value)}.")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{source}: {name} holds the character U+0000; leave it out.")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        # Bytes of the command line that are not UTF-8, which no TOML file can hold.
        raise ConfigError(f"{source}: {name} = {value!r} is not valid Unicode text.")
    return value


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of too many digits within
        return "what it holds"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _preset(objective: ObjectiveConfig) -> ObjectiveConfig:
    if objective.method not in PRESETS:
        return objective
    filled = {k: v for k, v in PRESETS[objective.method].items() if getattr(objective, k) is None}
    resolved = dataclasses.replace(objective, **filled)
    if resolved.advantage_parameter is None:
        parameter = ADVANTAGE_PARAMETERS.get(resolved.advantage or "")
        resolved = dataclasses.replace(resolved, advantage_parameter=parameter)
    if resolved.clip is None and resolved.updates_per_batch > 1:
        resolved = dataclasses.replace(resolved, clip=0.2)
    return resolved
