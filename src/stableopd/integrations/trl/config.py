"""The arguments of `StableOPDTrainer`: TRL's own, and a few more."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import DistillationConfig  # pyright: ignore[reportPrivateImportUsage] (a lazy module)

from stableopd.config import PRESETS, AlarmConfig, DataConfig, ObjectiveConfig, RepetitionConfig
from stableopd.integrations.trl.alarm import ACTIONS
from stableopd.types import ConfigError

__all__ = ["StableOPDConfig"]


@dataclass
class StableOPDConfig(DistillationConfig):
    """TRL's `DistillationConfig` with the switches of StableOPD; defaults as in `stable_opd`.

    Attributes:
        lambda_gold: Weight of the golden term; 0 leaves it out.
        beta_reference: Weight of KL(student || initial student), exact over the vocabulary; 0
            leaves it out, and no copy of the initial student is held.
        stop: "event" scores a stop as one event over the stop ids of both models, "token" as the
            id that was sampled.
        solution_column: Column of the golden solutions: text, one assistant message in a list, or
            token ids that end in a stop.
        alarm_action: "none", "warn" or "stop", see `CollapseAlarm`.
        repetition_window_chars: L of RepRate, in characters.
        repetition_ratio: tau of RepRate.
        repetition_ngram: n of the token labels.
        repetition_min_run: Shortest run of repetitive tokens that counts.
    """

    lambda_gold: float = field(
        default=PRESETS["stable_opd"]["lambda_gold"],
        metadata={"help": "Weight of the cross entropy of golden solutions."},
    )
    beta_reference: float = field(
        default=PRESETS["stable_opd"]["beta_reference"],
        metadata={"help": "Weight of KL(student || initial student)."},
    )
    stop: str = field(
        default=ObjectiveConfig.stop,
        metadata={"help": "'event': the stop ids of both models are one event; 'token': not."},
    )
    solution_column: str = field(
        default=DataConfig.solution, metadata={"help": "Column of the golden solutions."}
    )
    alarm_action: str = field(
        default=AlarmConfig.action, metadata={"help": "At a collapse: 'none', 'warn' or 'stop'."}
    )
    repetition_window_chars: int = RepetitionConfig.window_chars
    repetition_ratio: float = RepetitionConfig.ratio
    repetition_ngram: int = RepetitionConfig.ngram
    repetition_min_run: int = RepetitionConfig.min_run

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: One of them cannot be.
        """
        super().__post_init__()
        for name in ("lambda_gold", "beta_reference"):
            if not 0 <= getattr(self, name) <= 1e9:
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)}.")
        for name, choices in (("stop", ("event", "token")), ("alarm_action", ACTIONS)):
            if getattr(self, name) not in choices:
                known = ", ".join(map(repr, choices))
                raise ConfigError(f"{name} must be one of {known}, not {getattr(self, name)!r}.")
