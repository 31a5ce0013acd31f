"""`stableopd score`: the teacher's log-probs for rollouts that are there, line by line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from rich.console import Console
from rich.progress import track

from stableopd.config_templates import told_template
from stableopd.data.golden import encode_after
from stableopd.data.messages import conversation, solution_text, tools_of
from stableopd.data.prompts import encode_prompts, render
from stableopd.data.rows import Row, read_rows
from stableopd.data.templates import give_template
from stableopd.evaluate.store import fingerprint
from stableopd.offline.journal import Journal
from stableopd.offline.source import LocalJudge, Opened, Source, open_source
from stableopd.runfolder import RunFolder
from stableopd.teacher.selftest import probe_of
from stableopd.teacher.server import Item, Judged, ServedTeacher
from stableopd.types import ConfigError, DataError, Prompt, RunFolderError, StopReason

__all__ = ["run_score"]

# Lines that are scored, and then written, together (design).
GROUP = 64


class _Judge(Protocol):
    def judge(self, items: list[Item]) -> list[Judged]: ...


@dataclass(frozen=True)
class _Template:
    setting: str
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class _Line:
    place: str
    values: dict[str, Any]


def run_score(
    source: Source,
    rollouts: Path,
    output: Path,
    stop: str = "event",
    chat_template: str = "auto",
    batch_tokens: int = 8192,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """Write rollouts with `teacher_logprobs` filled in, or go on where a kill left it.

    Args:
        source: The teacher.
        rollouts: A run folder, or a file (or folder of files) of rollouts.
        output: The file to write.
        stop: "event" scores a stop as any of the stop ids, "token" as the one that stands there.
        chat_template: For prompts without ids: "auto" puts them through the tokenizer's chat
            template; "none" does not; the path of a file takes the template from there.
        batch_tokens: Padded tokens of one forward pass of a local teacher.
        chat_template_kwargs: Further variables of the template.

    Returns:
        0, or 130 after Ctrl-C; what was scored is kept.

    Raises:
        StableOPDError: A setting is impossible; teacher, rollouts or output cannot be used.
    """
    if stop not in ("event", "token"):
        raise ConfigError(f"--stop {stop}: choose event or token.")
    files, run_stops = _files(rollouts)
    lines = list(_lines(rollouts, files))
    if not lines:
        raise DataError(f"{rollouts}: there is no rollout in it.")
    teacher = open_source(source, "score")
    event_ids = _event_ids(teacher, run_stops) if stop == "event" else ()
    judge = _judge_of(teacher, event_ids, batch_tokens)
    kwargs = dict(chat_template_kwargs or {})
    if teacher.tokenizer is not None:
        give_template(teacher.tokenizer, chat_template)
    template = _Template(chat_template, kwargs)
    items = [_item(line, teacher, template) for line in lines]
    settings = {
        "command": "score",
        "teacher": teacher.name,
        "weights": teacher.weights,
        "stop": stop,
        "stop_ids": list(event_ids),
        "batch_tokens": batch_tokens,
        **told_template(chat_template, kwargs),
        "rollouts": fingerprint(files),
        "ids": fingerprint(items),
    }
    journal = Journal(output, settings, _as_scored)
    console = Console(stderr=True)
    try:
        if journal.note:
            console.print(journal.note, highlight=False, markup=False)
        # What is computed together here decides each other's last digits.
        together = GROUP if teacher.local is not None else 1
        starts = range(journal.num_done(len(lines), together), len(lines), GROUP)
        if isinstance(judge, ServedTeacher) and starts:
            prompt_ids, completion_ids = items[starts[0]]
            for url in judge.endpoint.urls:
                judge.remember(url, probe_of([[*prompt_ids, *completion_ids]]))
        for start in track(starts, "scoring", console=console, disable=not console.is_terminal):
            part = slice(start, start + GROUP)
            _score(journal, judge, lines[part], items[part])
        values = [x for row in journal.rows() for x in row["teacher_logprobs"] if x is not None]
    except KeyboardInterrupt:
        print(f"Interrupted; what was scored is in {output}. The same command goes on.")
        return 130
    finally:
        journal.close()
    mean = math.fsum(values) / len(values) if values else math.nan
    print(
        f"{len(lines)} rollouts, {len(values)} tokens, the teacher's mean log-prob is {mean:.4f} "
        f"nats: {output}"
    )
    return 0


def _judge_of(teacher: Opened, event_ids: tuple[int, ...], batch_tokens: int) -> _Judge:
    if teacher.endpoint is not None:
        return ServedTeacher(teacher.endpoint, teacher.name, event_ids)
    assert teacher.local is not None
    return LocalJudge(teacher.local, event_ids, batch_tokens)


def _files(rollouts: Path) -> tuple[list[Path], tuple[int, ...] | None]:
    """The files of rollouts, and the stop ids of the run that wrote them; None if not of a run."""
    if (rollouts / "config.toml").is_file():
        folder = RunFolder.open(rollouts)
        stops = folder.environment().get("stops") or {}
        ids = {*(stops.get("event_ids") or ()), *(stops.get("student_ids") or ())}
        files = [rollouts / "rollouts" / f"{step:06d}.jsonl" for step in folder.rollout_steps()]
        return files, tuple(sorted(ids))
    if rollouts.is_dir():
        return sorted(f for f in rollouts.iterdir() if f.suffix in (".jsonl", ".parquet")), None
    return [rollouts], None


def _lines(rollouts: Path, files: list[Path]) -> Iterator[_Line]:
    for file in files:
        for row in read_rows(file, "train"):
            yield _Line(row.place, row.values)


def _event_ids(teacher: Opened, run_stops: tuple[int, ...] | None) -> tuple[int, ...]:
    """All ids that are a stop to the teacher or to the student of the run."""
    if teacher.stop_ids is None and not run_stops:
        raise ConfigError(
            "a server does not say what the teacher stops with; give its folder as --tokenizer, or "
            "the ids as --stop-ids, or --stop token."
        )
    return tuple(sorted({*(teacher.stop_ids or ()), *(run_stops or ())}))


def _score(journal: Journal, judge: _Judge, lines: list[_Line], items: list[Item]) -> None:
    scored = [item for item in items if item[1]]
    judged = iter(judge.judge(scored))
    rows: list[Mapping[str, Any]] = []
    for line, (prompt_ids, completion_ids) in zip(lines, items, strict=True):
        logps = next(judged).logps if completion_ids else ()
        rows.append(
            {
                **line.values,
                "prompt_ids": list(prompt_ids),
                "completion_ids": list(completion_ids),
                "teacher_logprobs": [round(x, 5) for x in logps],
            }
        )
    journal.add(rows)


def _as_scored(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Refuse a line that this command does not write."""
    found: Any = row.get("teacher_logprobs")
    if not isinstance(found, list) or not all(
        x is None or type(x) in (int, float) for x in cast(list[Any], found)
    ):
        raise RunFolderError(f"{where}: has no teacher_logprobs; remove the file to begin again.")
    return row


def _item(line: _Line, teacher: Opened, template: _Template) -> Item:
    """Token ids of a rollout: those that it holds, or those of its texts."""
    values, place = line.values, line.place
    ids = [values.get("prompt_ids"), values.get("completion_ids")]
    if all(x is None for x in ids):
        ids = _encode(values, place, teacher, template)
    for name, found in zip(("prompt_ids", "completion_ids"), ids, strict=True):
        if not isinstance(found, list) or not all(type(x) is int and x >= 0 for x in found):
            raise DataError(f"{place}: {name} must be a list of token ids.")
    prompt_ids, completion_ids = ids
    assert prompt_ids is not None
    assert completion_ids is not None
    if not prompt_ids:
        raise DataError(f"{place}: the prompt has no token, so nothing scores what follows it.")
    length = len(prompt_ids) + len(completion_ids)
    if teacher.context is not None and length > teacher.context:
        raise DataError(
            f"{place}: {length} tokens, but the teacher reads at most {teacher.context}; leave the "
            "line out."
        )
    if teacher.local is not None:
        size = teacher.local.model.get_output_embeddings().weight.shape[0]
        if (largest := max(*prompt_ids, *completion_ids)) >= size:
            raise DataError(
                f"{place}: token id {largest}, but the teacher has {size} tokens; use a teacher of "
                "the same tokenizer."
            )
    return prompt_ids, completion_ids


def _encode(
    values: Mapping[str, Any], place: str, teacher: Opened, template: _Template
) -> list[list[int] | None]:
    tokenizer, row = teacher.tokenizer, Row(place, place, dict(values))
    if values.get("completion") is None or values.get("prompt") is None:
        raise DataError(
            f"{place}: neither prompt_ids and completion_ids nor the texts prompt and completion "
            "are there."
        )
    if tokenizer is None:
        raise DataError(
            f"{place}: texts without token ids; give the teacher's folder as --tokenizer."
        )
    turns = conversation(row, "prompt", values["prompt"], must_end_open=False)
    text = values["completion"]
    if text != "":  # which is a rollout of no token
        text = solution_text(row, "completion", text)
    told = Prompt(place, turns, tools=tools_of(row))
    setting, kwargs = template.setting, template.kwargs
    (prompt_ids,) = encode_prompts([told], tokenizer, setting, 2**62, None, 0, kwargs)
    completion = list(encode_after(render(told, tokenizer, setting, kwargs), text, tokenizer))
    if values.get("stop_reason") == StopReason.STOP:
        stops = teacher.stop_ids or ()
        eos = tokenizer.eos_token_id
        completion.append(eos if eos in stops or not stops else stops[0])
    return [list(prompt_ids), completion]
