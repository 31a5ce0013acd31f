"""`stableopd golden`: solutions that the teacher writes, for the golden term.

Each prompt is answered N times. The first answer that ended with a stop, and with `--verified` was
right, is its solution. FILE.attempts.jsonl has a line for each prompt that was tried, in order, and
FILE is made from it: it is whole at any time, and a kill loses the prompts that were being tried.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import track

from stableopd.config import DataConfig
from stableopd.config_templates import read_template, told_template
from stableopd.data.answers import begin_thoughts
from stableopd.data.grading import grade, grader_of
from stableopd.data.prompts import encode_prompts, load_prompts
from stableopd.data.templates import give_template
from stableopd.data.thoughts import join_thought
from stableopd.data.vocabulary import require_rows
from stableopd.endpoint import AnswerError, answer_bytes, at, listed, table, words
from stableopd.evaluate.settings import MAX_SAMPLES
from stableopd.evaluate.store import fingerprint
from stableopd.models import LanguageModel, shared_vocabulary
from stableopd.offline.journal import Journal, settings_of
from stableopd.offline.source import Opened, Source, open_source
from stableopd.rollout.sampler import TransformersSampler
from stableopd.runfolder.files import json_line, write_bytes, writing
from stableopd.training.answer_checks import failing_answers
from stableopd.types import (
    ConfigError,
    DataError,
    Prompt,
    RunFolderError,
    SamplingSettings,
    ServerError,
    StopReason,
)

__all__ = ["Asked", "run_golden"]


@dataclass(frozen=True)
class Asked:
    """What is asked of the teacher.

    Attributes:
        num_samples: N, answers to each prompt.
        is_verified: Whether a solution must be right, by the prompt's answer.
        temperature: Of sampling; 0 takes the likeliest token.
        top_p: Of sampling.
        max_new_tokens: Longest answer.
        seed: Of sampling.
        batch_size: Answers that a local teacher writes at once.
        grader: "math", "exact", or "auto", see `stableopd.data.grading.grader_of`.
        answer_marker: What stands before the answer, for "exact".
        chat_template: "auto" puts prompts through the teacher's chat template; "none" does not;
            the path of a file takes the template from there.
        prompt_column: Column with the prompt.
        answer_column: Column with the answer.
        max_problems: Prompts, from the beginning; 0 takes all.
        chat_template_kwargs: Further variables of the template.
    """

    num_samples: int = 1
    is_verified: bool = False
    temperature: float = 0.7  # untuned
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    batch_size: int = 64
    grader: str = "auto"
    answer_marker: str = ""
    chat_template: str = "auto"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    max_problems: int = 0
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])


class Answer(NamedTuple):
    """A text, whether it ended with a stop, and whether its prompt had begun a thought."""

    text: str
    has_ended: bool
    is_thinking: bool = False


class _Writer(Protocol):
    num_together: int
    prompt_ids: Sequence[tuple[int, ...]]  # where they are made here

    def write(self, prompts: Sequence[Prompt], asked: Asked, start: int) -> list[list[Answer]]: ...


def run_golden(source: Source, data: str, output: Path, asked: Asked) -> int:
    """Let a teacher write solutions, or go on where a kill left it.

    Args:
        source: The teacher.
        data: Prompts: a .jsonl or .parquet file, a folder, or "embedded".
        output: The file to write: prompts with solutions, as training reads them.
        asked: What is asked of the teacher.

    Returns:
        0, or 130 after Ctrl-C; what was written is kept.

    Raises:
        StableOPDError: A setting is impossible; teacher, data or output cannot be used.
    """
    _check(asked)
    columns = DataConfig(prompt=asked.prompt_column, answer=asked.answer_column, solution="")
    prompts = load_prompts(
        data,
        columns,
        split="train",
        needs_solution=False,
        needs_answer=asked.is_verified,
        max_rows=asked.max_problems,
    )
    grader = grader_of(asked.grader, asked.answer_marker, data)
    teacher = open_source(source, "golden")
    if asked.is_verified and (found := failing_answers(prompts, grader)).failing:
        Console(stderr=True).print(f"{data}: {found}.", highlight=False, markup=False)
    writer = _writer(teacher, prompts, asked, source.max_in_flight)
    settings = {
        "command": "golden",
        "teacher": teacher.name,
        "weights": teacher.weights,
        "stop_ids": list(teacher.stop_ids or ()),
        "prompts": fingerprint(prompts),
        "prompt_ids": fingerprint(writer.prompt_ids),
        **{k: v for k, v in asdict(asked).items() if not k.startswith("chat_template")},
        **told_template(asked.chat_template, asked.chat_template_kwargs),
    }
    attempts = output.with_name(f"{output.name}.attempts.jsonl")
    with writing(output):
        # An error before the first attempt leaves an empty file and what says that it is ours.
        is_ours = attempts.exists() or settings_of(attempts).exists() or not output.exists()
    if not is_ours:
        raise RunFolderError(
            f"{output} is there and was not made by this command ({attempts.name} is missing); "
            "choose another --output."
        )
    journal = Journal(attempts, settings, _as_attempt)
    try:
        kept = _write_all(output, journal, writer, prompts, asked, grader)
    except KeyboardInterrupt:
        print("Interrupted; what was written is kept. The same command goes on.")
        return 130
    finally:
        journal.close()
    what = "ended with a stop and was right" if asked.is_verified else "ended with a stop"
    others = f"; for the others no answer of {asked.num_samples} {what}"
    if num_empty := sum(row.get("num_empty", 0) for row in journal.rows()):
        others += f" ({num_empty} ended without any text after the thought)"
    told = others if kept < len(prompts) else ""
    print(f"{kept} of {len(prompts)} prompts have a solution{told}: {output}")
    return 0


def _check(asked: Asked) -> None:
    if asked.grader not in ("auto", "math", "exact"):
        raise ConfigError(f"--grader {asked.grader}: choose from auto, math, exact.")
    if asked.num_samples > MAX_SAMPLES:
        raise ConfigError(f"-k {asked.num_samples}: at most {MAX_SAMPLES} answers each.")
    if not 0 <= asked.temperature <= 100:
        raise ConfigError(f"--temperature {asked.temperature}: give a number from 0 on.")
    if not 0 < asked.top_p <= 1:
        raise ConfigError(f"--top-p {asked.top_p}: give a number above 0 and up to 1.")
    if not asked.temperature and asked.num_samples > 1:
        raise ConfigError(
            f"--temperature 0 writes the same answer {asked.num_samples} times; give -k 1 or a "
            "temperature above 0."
        )


def _writer(
    teacher: Opened, prompts: Sequence[Prompt], asked: Asked, max_in_flight: int
) -> _Writer:
    if teacher.local is None:
        if teacher.tokenizer is not None:
            give_template(teacher.tokenizer, asked.chat_template)
        return _ServedWriter(teacher, max_in_flight)
    give_template(teacher.local.tokenizer, asked.chat_template)
    return _LocalWriter(teacher.local, teacher.stop_ids or (), asked, prompts)


def _write_all(
    output: Path,
    journal: Journal,
    writer: _Writer,
    prompts: Sequence[Prompt],
    asked: Asked,
    grader: tuple[str, str],
) -> int:
    """Answer the prompts that are left, and make the output; how many have a solution."""
    together = writer.num_together  # what is drawn together is written together
    done = journal.num_done(len(prompts), together)
    for row, prompt in zip(journal.rows(), prompts, strict=False):
        if row["id"] != prompt.id:
            raise RunFolderError(
                f"{journal.path}: has {row['id']!r} where {prompt.id!r} belongs, as two processes "
                "leave it; remove it to begin again, or choose another --output."
            )
    console = Console(stderr=True)
    if journal.note:
        console.print(journal.note, highlight=False, markup=False)
    starts = range(done, len(prompts), together)
    try:
        for start in track(starts, "writing", console=console, disable=not console.is_terminal):
            part = prompts[start : start + together]
            for prompt, answers in zip(part, writer.write(part, asked, start), strict=True):
                journal.add([_row(prompt, answers, asked, grader)])
    finally:
        kept = _publish(output, journal, prompts)
    return kept


def _as_attempt(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Refuse a line that this command does not write."""
    is_ours = isinstance(row.get("id"), str) and isinstance(row.get("solution", 0), str | None)
    if not is_ours or type(row.get("num_empty", 0)) is not int:
        raise RunFolderError(f"{where}: is no attempt; remove the file to begin again.")
    return row


def _row(
    prompt: Prompt, answers: list[Answer], asked: Asked, grader: tuple[str, str]
) -> dict[str, Any]:
    """What came of a prompt; `solution` is None where no answer will do."""
    stopped = [answer for answer in answers if answer.has_ended]
    ended = [answer for answer in stopped if answer.text.strip()]
    right = [
        answer
        for answer in ended
        if asked.is_verified
        and grade(answer.text, prompt.answer or "", *grader, answer.is_thinking)
    ]
    chosen = right if asked.is_verified else ended
    return {
        "id": prompt.id,
        "num_samples": len(answers),
        "num_ended": len(ended),
        "num_empty": len(stopped) - len(ended),
        "num_correct": len(right) if asked.is_verified else None,
        "solution": chosen[0].text if chosen else None,
    }


def _publish(output: Path, journal: Journal, prompts: Sequence[Prompt]) -> int:
    """Write the prompts that have a solution so far; how many there are."""
    lines: list[bytes] = []
    for prompt, row in zip(prompts, journal.rows(), strict=False):
        if row["solution"] is None:
            continue
        line = {"id": prompt.id, "prompt": _plain(prompt), "solution": row["solution"]}
        if prompt.answer is not None:
            line["answer"] = prompt.answer
        if prompt.tools:
            line["tools"] = json.loads(prompt.tools)
        lines.append(json_line(line))
    write_bytes(output, lines)
    return len(lines)


def _plain(prompt: Prompt) -> Any:
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    return [message.as_dict() for message in prompt.prompt]


class _LocalWriter:
    """Answers of a model in this process."""

    def __init__(
        self,
        model: LanguageModel,
        stop_ids: Sequence[int],
        asked: Asked,
        prompts: Sequence[Prompt],
    ) -> None:
        vocabulary = shared_vocabulary(model, None)
        self._model = model
        self.num_together = max(1, asked.batch_size // asked.num_samples)
        self.prompt_ids: Sequence[tuple[int, ...]] = encode_prompts(
            prompts,
            model.tokenizer,
            asked.chat_template,
            2**62,
            model.context,
            asked.max_new_tokens,
            asked.chat_template_kwargs,
        )
        told = [f"prompt {prompt.id}" for prompt in prompts]
        require_rows(zip(told, self.prompt_ids, strict=True), model.tokenizer, vocabulary)
        self._sampler = TransformersSampler(
            model.model, model.tokenizer, stop_ids, vocabulary, asked.batch_size
        )

    def write(self, prompts: Sequence[Prompt], asked: Asked, start: int) -> list[list[Answer]]:
        """N answers to each prompt; draws follow from the seed and the place of the first."""
        k, budget = asked.num_samples, asked.max_new_tokens
        ids = self.prompt_ids[start : start + len(prompts)]
        drawn = self._sampler.sample(
            [(prompt.id, own) for prompt, own in zip(prompts, ids, strict=True)],
            k,
            SamplingSettings(budget, asked.temperature, asked.top_p),
            _seed(asked, start),
        )
        thinking = begin_thoughts([r.prompt_ids for r in drawn], self._model.tokenizer)
        answers = [
            Answer(r.completion, r.stop_reason is StopReason.STOP, is_thinking)
            for r, is_thinking in zip(drawn, thinking, strict=True)
        ]
        return [answers[n : n + k] for n in range(0, len(answers), k)]


class _ServedWriter:
    """Answers of a served model, which puts chats through its own template."""

    def __init__(self, teacher: Opened, max_in_flight: int) -> None:
        assert teacher.endpoint is not None
        self._endpoint, self._name = teacher.endpoint, teacher.name
        self._stop_ids, self._tokenizer = teacher.stop_ids, teacher.tokenizer
        self.num_together = 2 * max_in_flight
        self.prompt_ids: Sequence[tuple[int, ...]] = ()

    def write(self, prompts: Sequence[Prompt], asked: Asked, start: int) -> list[list[Answer]]:
        """N answers to each prompt."""
        path = "/completions" if asked.chat_template == "none" else "/chat/completions"
        bodies = [self._body(prompt, asked, start + i) for i, prompt in enumerate(prompts)]
        size = answer_bytes(asked.num_samples * asked.max_new_tokens)
        told = self._endpoint.post_all(path, bodies, most_bytes=size)
        return [self._answers(p, a, asked) for p, a in zip(prompts, told, strict=True)]

    def _body(self, prompt: Prompt, asked: Asked, place: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._name,
            "n": asked.num_samples,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "max_tokens": asked.max_new_tokens,
            "seed": _seed(asked, place),
        }
        if self._stop_ids:
            body["stop_token_ids"] = list(self._stop_ids)
        if asked.chat_template != "none":
            turns = _plain(prompt)
            one = [{"role": "user", "content": turns}]
            body["messages"] = one if isinstance(turns, str) else turns
            if prompt.tools:
                body["tools"] = json.loads(prompt.tools)
            # The names that vLLM and SGLang have for them.
            if asked.chat_template_kwargs:
                body["chat_template_kwargs"] = asked.chat_template_kwargs
            if template := read_template(asked.chat_template):
                body["chat_template"] = template
            return body
        if not isinstance(prompt.prompt, str):
            raise DataError(
                f"prompt {prompt.id}: a list of messages, which needs the chat template; leave "
                "--no-chat-template out."
            )
        return {**body, "prompt": prompt.prompt}

    def _answers(self, prompt: Prompt, answer: dict[str, Any], asked: Asked) -> list[Answer]:
        is_chat = asked.chat_template != "none"
        try:
            found = [
                Answer(
                    self._said(prompt, table(at(choice, "message"), "message"), asked)
                    if is_chat
                    else words(at(choice, "text") or "", "text"),
                    at(choice, "finish_reason") == "stop",
                )
                for choice in listed(at(answer, "choices"), "choices")
            ]
        except AnswerError as error:
            raise ServerError(
                f"{self._endpoint.name}: the answer of {self._endpoint.urls[0]} {error}."
            ) from None
        if len(found) != asked.num_samples:
            raise ServerError(
                f"{self._endpoint.name}: {self._endpoint.urls[0]} gave {len(found)} of the "
                f"{asked.num_samples} answers that were asked for; it must take n."
            )
        return found

    def _said(self, prompt: Prompt, message: dict[str, Any], asked: Asked) -> str:
        """The text of an answer; "" without one."""
        content = message.get("content")  # a server may leave null out
        if isinstance(content, list):
            parts = listed(content, "content")
            content = "".join(words(at(part, "text"), "text") for part in parts)
        text = words(content or "", "content")
        thought = message.get("reasoning_content") or message.get("reasoning")
        if not isinstance(thought, str) or not thought.strip():
            return text
        if self._tokenizer is None:
            raise ServerError(
                f"{self._endpoint.name}: {self._endpoint.urls[0]} gives the thought apart from the "
                "answer, and a solution needs both: start the server without --reasoning-parser, "
                "or give the teacher's folder as --tokenizer, whose chat template joins them."
            )
        if not text.strip():
            return ""  # the thought is all that there is
        kwargs = asked.chat_template_kwargs
        return join_thought(prompt, thought, text, self._tokenizer, asked.chat_template, kwargs)


def _seed(asked: Asked, place: int) -> int:
    # Text as a seed is hashed in full, so neighbouring prompts are unrelated.
    return random.Random(f"golden {asked.seed} {place}").getrandbits(31)
