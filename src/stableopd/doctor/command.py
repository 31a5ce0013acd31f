"""`stableopd doctor`: examine models and data before a run, one line for each check."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from stableopd.doctor.examine import examine
from stableopd.doctor.patient import admit, settings_of
from stableopd.terminal import table

__all__ = ["run_doctor"]


def run_doctor(
    student: str = "",
    teacher: str = "",
    data: str = "",
    config: Path | None = None,
    overrides: Many[str] = (),
    max_new_tokens: int | None = None,
    num_prompts: int = 8,
    chat_template: str = "",
    as_json: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """Examine models and data before a run, and print what was found.

    Args:
        student: `student.model`: a folder, a hub name or "embedded"; "" where `config` names it.
        teacher: `teacher.model`, likewise; "" leaves out what needs one.
        data: `data.train`; "" takes a few built-in prompts (the demo's for the embedded student).
        config: A training configuration, from which all else comes.
        overrides: Strings "section.key=value".
        max_new_tokens: `rollout.max_new_tokens`.
        num_prompts: Prompts on which each model writes one completion.
        chat_template: `data.chat_template`.
        as_json: Print one JSON object instead of the table.
        chat_template_kwargs: `data.chat_template_kwargs`.

    Returns:
        1 where a finding is FAIL, else 0.

    Raises:
        StableOPDError: A setting is impossible, or a model or the data cannot be loaded.
    """
    settings = settings_of(
        student,
        teacher,
        data,
        config,
        overrides,
        max_new_tokens,
        num_prompts,
        chat_template,
        chat_template_kwargs,
    )
    progress = Console(stderr=True)
    with progress.status("loading models and data"):
        patient = admit(settings)
    with progress.status("writing and scoring a few completions"):
        findings, numbers = examine(patient)
    counts = {level: sum(f.level == level for f in findings) for level in ("FAIL", "WARN", "OK")}
    if as_json:
        found = [dataclasses.asdict(finding) for finding in findings]
        summary = {"num_fail": counts["FAIL"], "num_warn": counts["WARN"]}
        print(json.dumps({"findings": found, "numbers": _plain(numbers), **summary}, indent=2))
    else:
        c = settings.config
        title = f"Before a run: student {c.student.model}, teacher {c.teacher.model or 'none'}"
        rows = [
            (f.level, f.name, f"{f.message}\nFix: {f.fix}" if f.fix else f.message)
            for f in findings
        ]
        console = Console()
        console.print(table(("", "check", "what was found"), rows, title))
        said = ", ".join(f"{count} {level}" for level, count in counts.items())
        console.print(said, highlight=False)
    return int(counts["FAIL"] > 0)


def _plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in cast(Many[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
