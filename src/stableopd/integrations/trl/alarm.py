"""The collapse alarm as a callback, for any trainer of TRL that logs its completions.

    from stableopd.integrations.trl import CollapseAlarm

    config = GRPOConfig(..., log_completions=True)
    trainer = GRPOTrainer(..., args=config, callbacks=[CollapseAlarm("stop")])

It is the alarm of `stableopd train` (diagnostics/alarm.py) on what the trainer logs, and it asks
for a log every step, whatever `logging_steps` says. TRL's logs have the truncation rate and the
mean length; its file of completions, which some trainers write after each log, has the texts, from
which repetition is measured. So the alarm speaks when the next step begins. `StableOPDTrainer`
measures its own rollouts and tells the alarm at once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stableopd.config import AlarmConfig, RepetitionConfig
from stableopd.diagnostics.alarm import Alarm, Level, advance
from stableopd.diagnostics.collect import Collector
from stableopd.diagnostics.evidence import Facts
from stableopd.diagnostics.lines import lines_of, onset_of
from stableopd.diagnostics.summary import Parameters
from stableopd.diagnostics.verdict import Verdict, judge
from stableopd.integrations.dumps import open_dump
from stableopd.types import ConfigError, Record, StableOPDError

__all__ = ["ACTIONS", "CollapseAlarm"]

ACTIONS = ("none", "warn", "stop")

# What trainers of TRL call the share of rollouts that were cut off, and the mean length.
NAMES = (
    ("completions/clipped_ratio", "completions/mean_length"),  # Distillation, GRPO, RLOO and others
    ("completions/truncated_fraction", "completions/on_policy_mean_length"),  # IWOPD
)
# Only a log with this name has been measured by StableOPDTrainer.
MEASURED = "rollout/repetitive_share"
GROUPS = ("rollout/", "advantage/", "logp/", "stop/")
# Under this name a checkpoint keeps the lines of every step, in `TrainerState.stateful_callbacks`.
KEPT = "stableopd.alarm"

logger = logging.getLogger(__name__)


class CollapseAlarm(TrainerCallback):
    """Watches a training run of TRL, warns of a collapse, and may end the run.

    One line is one step: the alarm makes the trainer log every step, except `StableOPDTrainer`,
    which tells it more than it logs. Its state follows from the lines: a resumed run replays those
    of the checkpoint.

    Attributes:
        action: "none" only measures, "warn" speaks, "stop" ends the run at a collapse.
        alarm: The state of the alarm: `alarm.level`, `alarm.reason`.
        lines: What it has seen, one mapping a step with the names of docs/metrics.md.
        facts: What is known of the models' stops, for the verdict.
    """

    def __init__(
        self,
        action: str = AlarmConfig.action,
        repetition: RepetitionConfig = RepetitionConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """Make an alarm that has seen nothing.

        Args:
            action: "none", "warn" or "stop".
            repetition: What counts as repetition.

        Raises:
            ConfigError: The action is none of the three.
        """
        if action not in ACTIONS:
            raise ConfigError(
                f"the alarm's action must be one of {', '.join(ACTIONS)} inside TRL, not "
                f"{action!r}; rollback and strengthen are actions of `stableopd train`."
            )
        self.action = action
        self.alarm = Alarm()
        self.lines: list[dict[str, Any]] = []
        self.facts = Facts()
        self._repetition = repetition
        self._run = self._collector(None)
        self._waiting: tuple[int, Mapping[str, Any]] | None = None
        self._tokenizer: Any = None
        self._is_told = False
        self._first_step = 0
        self._misses_texts = False

    def measure(self, records: Sequence[Record], step: int) -> dict[str, Any]:
        """Measure the rollouts of a step, and keep what the verdict needs of them.

        Args:
            records: The rollouts.
            step: The step.

        Returns:
            Numbers by the names of docs/metrics.md; one that does not exist is left out.
        """
        records = [dataclasses.replace(record, step=step) for record in records]
        self._run.add(records)
        collector = self._collector(None)
        collector.add(records)
        line, *_ = (*lines_of(collector.summary()), {})
        return {name: value for name, value in line.items() if name != "step"}

    def tell(self, line: Mapping[str, Any], state: TrainerState) -> None:
        """Take what a trainer has measured of a step, in the place of its logs.

        Args:
            line: `step`, and numbers by the names of docs/metrics.md; the same in all processes.
            state: The trainer's, which keeps the lines for a resumed run.
        """
        self._is_told = True
        self._take(line, state)
        kept: Any = state.stateful_callbacks  # a mapping, whatever its type says
        kept[KEPT] = self.lines

    def verdict(self) -> Verdict:
        """What happened so far, of which cause, and what to do: see `diagnostics/verdict.py`."""
        summary = self._run.summary()
        truncation = onset_of(self.lines, "rollout/truncation_rate", summary)
        repetition = onset_of(self.lines, "rollout/repetitive_share", summary)
        return judge(summary, self.lines, truncation, repetition, self.facts, self.alarm)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start anew, and replay the lines or the logs of a resumed run, without a word."""
        processing: Any = kwargs.get("processing_class")
        self._tokenizer = getattr(processing, "tokenizer", processing)
        self._run = self._collector(getattr(args, "max_completion_length", None))
        self.alarm, self.lines, self._waiting = Alarm(), [], None
        self._is_told, self._misses_texts = False, False
        self._first_step = state.global_step
        kept: Any = state.stateful_callbacks or {}
        for line in kept.get(KEPT, ()):
            self._take(line, None)
        for logs in state.log_history if KEPT not in kept else ():
            self._hear(int(logs["step"]), logs)
            self._settle(args, state, is_new=False)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a log; one that says nothing of rollouts is passed over."""
        if self._is_told:
            return
        self._settle(args, state)
        self._hear(state.global_step, kwargs["logs"])
        self._act(control)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the last log, whose completions are on disk by now."""
        self._settle(args, state)
        self._act(control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a log of this step, unless the trainer has told already."""
        control.should_log = control.should_log or not self._is_told
        self._act(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the last log; say whether it was a collapse, and whether nothing was seen."""
        self._settle(args, state)
        if self.action == "none" or not state.is_world_process_zero:
            return
        verdict = self.verdict()
        if verdict.collapsed:
            logger.warning("%s %s", verdict.headline, " ".join(verdict.advice[:1]))
        elif not self.lines and state.global_step > self._first_step:
            logger.warning(
                "The collapse alarm saw nothing of this run, so its silence means nothing: no log "
                "had one of %s; it needs a trainer that logs its rollouts, such as "
                "DistillationTrainer, IWOPDTrainer, GRPOTrainer or RLOOTrainer.",
                ", ".join(truncation for truncation, _ in NAMES),
            )

    def _collector(self, max_new_tokens: int | None) -> Collector:
        r = self._repetition
        parameters = Parameters(r.window_chars, r.ratio, r.ngram, r.min_run)
        # Texts are tokenized again, and come out a little shorter: no stop, other splits.
        return Collector(parameters, max_new_tokens, tolerance=0.02)

    def _hear(self, step: int, logs: Mapping[str, Any]) -> None:
        if any(isinstance(logs.get(truncation), int | float) for truncation, _ in NAMES):
            self._waiting = (step, dict(logs))

    def _settle(self, args: TrainingArguments, state: TrainerState, is_new: bool = True) -> None:
        """Make a line of the log that waits for its completions, and ask the alarm."""
        if self._waiting is None:
            return
        (step, logs), self._waiting = self._waiting, None
        line = {k: v for k, v in logs.items() if k.startswith(GROUPS) and v is not None}
        if MEASURED not in logs and state.is_world_process_zero:
            line |= self._read(args, step)
        # TRL counted these on token ids; from texts they can only be guessed.
        for names in NAMES:
            found = zip(("rollout/truncation_rate", "rollout/mean_length"), names, strict=True)
            line |= {ours: logs[theirs] for ours, theirs in found if logs.get(theirs) is not None}
        # The file is the main process's; every process must come to the same answer.
        line = broadcast_object_list([line])[0]
        self._take({"step": step} | line, state if is_new else None)

    def _take(self, line: Mapping[str, Any], state: TrainerState | None) -> None:
        """Ask the alarm about a line; a `state` is there where a new level is to be told."""
        before = self.alarm.level
        self.alarm = advance(self.alarm, line)
        self.lines.append({**line, "alarm/level": list(Level).index(self.alarm.level)})
        is_told = self.action != "none" and state is not None and state.is_world_process_zero
        if is_told and self.alarm.level is not before:
            level, reason = self.alarm.level.value.upper(), self.alarm.reason
            logger.warning("Step %s: %s%s.", line["step"], level, f": {reason}" if reason else "")

    def _read(self, args: TrainingArguments, step: int) -> dict[str, Any]:
        """What the texts of a step show; nothing, and a warning once, where there are none."""
        file = Path(args.output_dir or ".") / "completions" / f"completions_{step:05d}.parquet"
        if not getattr(args, "log_completions", True):
            self._miss("log_completions is False")
        elif not file.is_file():
            self._miss(f"this trainer writes no {file}")
        else:
            encode = self._encode if self._tokenizer else None
            try:
                dump = open_dump([file], format="trl", tokenizer=encode)
                return self.measure([record for batch in dump.batches() for record in batch], step)
            except StableOPDError as error:
                # An error here would leave the other processes waiting.
                self._miss(str(error).removesuffix("."))
        return {}

    def _miss(self, reason: str) -> None:
        if not self._misses_texts and self.action != "none":
            logger.warning(
                "The collapse alarm sees truncation and length, and no repetition: %s.", reason
            )
        self._misses_texts = True

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _act(self, control: TrainerControl) -> None:
        if self.action == "stop" and self.alarm.level is Level.COLLAPSE:
            control.should_training_stop = True
