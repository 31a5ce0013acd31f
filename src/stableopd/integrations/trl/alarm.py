"""The collapse alarm as a callback, for any trainer of TRL that logs its completions.

    from stableopd.integrations.trl import CollapseAlarm

    config = GRPOConfig(..., log_completions=True, logging_steps=1)
    trainer = GRPOTrainer(..., args=config, callbacks=[CollapseAlarm("stop")])

It is the alarm of `stableopd train` (diagnostics/alarm.py) on what the trainer logs. TRL's logs
have the truncation rate and the mean length; its file of completions, written after each log, has
the texts, from which repetition is measured. So the alarm speaks when the next step begins.
`StableOPDTrainer` measures its own rollouts and is heard at once.
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
from stableopd.types import ConfigError, Record

__all__ = ["ACTIONS", "CollapseAlarm"]

ACTIONS = ("none", "warn", "stop")

# A log with this name of TRL's is about rollouts; ours are added to it by StableOPDTrainer.
TRL_TRUNCATION, TRL_LENGTH = "completions/clipped_ratio", "completions/mean_length"
GROUPS = ("rollout/", "advantage/", "logp/", "stop/")
MEASURED = "rollout/repetitive_share"

logger = logging.getLogger(__name__)


class CollapseAlarm(TrainerCallback):
    """Watches a training run of TRL, warns of a collapse, and may end the run.

    One line is one log, so `logging_steps=1` shows most. Its state follows from the logs alone: a
    resumed run replays those of the checkpoint.

    Attributes:
        action: "none" only measures, "warn" speaks, "stop" ends the run at a collapse.
        alarm: The state of the alarm: `alarm.level`, `alarm.reason`.
        lines: What it has seen, one mapping a log with the names of docs/metrics.md.
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

    def measure(self, records: Sequence[Record], step: int) -> dict[str, Any]:
        """Measure the rollouts of a log, and keep what the verdict needs of them.

        Args:
            records: The rollouts.
            step: The step of the log.

        Returns:
            Numbers by the names of docs/metrics.md; one that does not exist is left out.
        """
        records = [dataclasses.replace(record, step=step) for record in records]
        self._run.add(records)
        collector = self._collector(None)
        collector.add(records)
        line, *_ = (*lines_of(collector.summary()), {})
        return {name: value for name, value in line.items() if name != "step"}

    def verdict(self) -> Verdict:
        """What happened so far, of which cause, and what to do: see `diagnostics/verdict.py`."""
        summary = self._run.summary()
        truncation = onset_of(self.lines, "rollout/truncation_rate", summary)
        repetition = onset_of(self.lines, "rollout/repetitive_share", summary)
        return judge(summary, self.lines, truncation, repetition, self.facts, self.alarm)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start anew, and replay the logs of a resumed run."""
        processing: Any = kwargs.get("processing_class")
        self._tokenizer = getattr(processing, "tokenizer", processing)
        self._run = self._collector(getattr(args, "max_completion_length", None))
        self.alarm, self.lines, self._waiting = Alarm(), [], None
        for logs in state.log_history:
            self._hear(args, state, int(logs["step"]), logs)
            self._settle(args, state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a log; one that says nothing of rollouts is passed over."""
        self._settle(args, state)
        self._hear(args, state, state.global_step, kwargs["logs"])
        self._act(control)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the last log, whose completions are on disk by now."""
        self._settle(args, state)
        self._act(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the last log, and say what happened where it was a collapse."""
        self._settle(args, state)
        if self.action != "none" and state.is_world_process_zero:
            verdict = self.verdict()
            if verdict.collapsed:
                logger.warning("%s %s", verdict.headline, " ".join(verdict.advice[:1]))

    def _collector(self, max_new_tokens: int | None) -> Collector:
        r = self._repetition
        parameters = Parameters(r.window_chars, r.ratio, r.ngram, r.min_run)
        # Texts are tokenized again, and come out a little shorter: no stop, other splits.
        return Collector(parameters, max_new_tokens, tolerance=0.02)

    def _hear(
        self, args: TrainingArguments, state: TrainerState, step: int, logs: Mapping[str, Any]
    ) -> None:
        if TRL_TRUNCATION not in logs:
            return
        self._waiting = (step, dict(logs))
        if MEASURED in logs:
            self._settle(args, state)

    def _settle(self, args: TrainingArguments, state: TrainerState) -> None:
        """Make a line of the log that waits for its completions, and ask the alarm."""
        if self._waiting is None:
            return
        (step, logs), self._waiting = self._waiting, None
        line = {k: v for k, v in logs.items() if k.startswith(GROUPS) and v is not None}
        if MEASURED not in logs and state.is_world_process_zero:
            line |= self._read(Path(args.output_dir or ".") / "completions", step)
        # TRL counted these on token ids; from texts they can only be guessed.
        line |= {
            "step": step,
            "rollout/truncation_rate": logs[TRL_TRUNCATION],
            "rollout/mean_length": logs[TRL_LENGTH],
        }
        # The file is the main process's; every process must come to the same answer.
        line = broadcast_object_list([line])[0]
        before = self.alarm.level
        self.alarm = advance(self.alarm, line)
        self.lines.append(line | {"alarm/level": list(Level).index(self.alarm.level)})
        is_told = self.action != "none" and state.is_world_process_zero
        if is_told and self.alarm.level is not before:
            level, reason = self.alarm.level.value.upper(), self.alarm.reason
            logger.warning("Step %d: %s%s.", step, level, f": {reason}" if reason else "")

    def _read(self, folder: Path, step: int) -> dict[str, Any]:
        file = folder / f"completions_{step:05d}.parquet"
        if not file.is_file():
            if not self.lines:
                logger.warning(
                    "%s is not there: without log_completions=True the alarm sees truncation and "
                    "length alone, and no repetition.",
                    file,
                )
            return {}
        dump = open_dump([file], format="trl", tokenizer=self._encode if self._tokenizer else None)
        return self.measure([record for batch in dump.batches() for record in batch], step)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _act(self, control: TrainerControl) -> None:
        if self.action == "stop" and self.alarm.level is Level.COLLAPSE:
            control.should_training_stop = True
