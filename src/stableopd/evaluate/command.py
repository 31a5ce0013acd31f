"""`stableopd eval`: answer problems, grade, and print what came out; from where a kill left it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from stableopd import models
from stableopd.config import DataConfig
from stableopd.config_templates import told_template
from stableopd.data.grading import grader_of
from stableopd.data.prompts import encode_prompts, load_prompts, refuse_long
from stableopd.data.templates import give_template
from stableopd.data.vocabulary import require_rows
from stableopd.evaluate.loading import load_model
from stableopd.evaluate.measure import answer, num_together, summarise
from stableopd.evaluate.settings import MAX_NEW_TOKENS, Settings, check, names_of
from stableopd.evaluate.store import Store, fingerprint
from stableopd.models import LanguageModel
from stableopd.rollout.sampler import TransformersSampler
from stableopd.rollout.stops import stop_ids_of
from stableopd.terminal import table
from stableopd.training.answer_checks import failing_answers
from stableopd.training.devices import dtype_of, make_accelerator, require_one_process
from stableopd.types import Prompt

__all__ = ["run_eval"]

PLAIN_INTERVAL_S = 30.0


@dataclasses.dataclass(frozen=True)
class _Set:
    """A data set: its problems, and how their answers are compared."""

    source: str
    prompts: Sequence[Prompt]
    grader: tuple[str, str]


def run_eval(settings: Settings, output: Path, as_json: bool = False) -> int:
    """Evaluate a model on data sets, go on with an evaluation, or show one that is done.

    Args:
        settings: The options.
        output: The folder of the evaluation.
        as_json: Print the summary as JSON instead of the table.

    Returns:
        0, or 130 after Ctrl-C; what was answered is kept.

    Raises:
        StableOPDError: A setting is impossible; or model, data or folder cannot be used.
    """
    check(settings)
    sets = {name: _read(source, settings) for name, source in names_of(settings.data).items()}
    console = Console(stderr=True)
    with console.status("loading the model") if console.is_terminal else nullcontext():
        one = require_one_process(make_accelerator(settings.device, "float32", (), output), "eval")
        dtype = dtype_of(settings.dtype, "teacher", one.device)
        model, weights = load_model(settings.model, settings.gguf_file, dtype, one.device, "eval")
    give_template(model.tokenizer, settings.chat_template)
    encoded = _encode(sets, model, settings)
    vocabulary = models.shared_vocabulary(model, None)
    for name, of in sets.items():
        told = [f"{name}: prompt {prompt.id}" for prompt in of.prompts]
        require_rows(zip(told, encoded[name], strict=True), model.tokenizer, vocabulary)
    budget = settings.max_new_tokens or _budget(encoded, model)
    for name, of in sets.items():
        limits = 10**9, model.context, budget
        refuse_long(of.prompts, encoded[name], *limits, f"{name}: ", "--max-new-tokens")
    ids = stop_ids_of(model.model, model.tokenizer)
    asked = dataclasses.asdict(settings)
    template = {name: asked[name] for name in ("chat_template", "chat_template_kwargs")}
    decided = {
        **{k: v for k, v in asked.items() if k not in ("data", "device", *template)},
        **told_template(*template.values()),
        "max_new_tokens": budget,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights,
        "stop_ids": list(ids),
    }
    told = {
        name: {
            "source": of.source,
            "num_problems": len(of.prompts),
            "problems": fingerprint(of.prompts),
            "prompt_ids": fingerprint(encoded[name]),
            "grader": of.grader[0],
        }
        for name, of in sets.items()
    }
    sampler = TransformersSampler(
        model.model, model.tokenizer, ids, vocabulary, settings.batch_size
    )
    store = Store(output, decided, told)
    try:
        if store.note:
            console.print(store.note, highlight=False, markup=False)
        _try_graders(store, sets, console)
        for name, of in sets.items():
            _answer_all(store, name, of, encoded[name], sampler, settings, budget, console)
        summary = _summary(store, settings, decided)
        store.write_summary(summary)
    except KeyboardInterrupt:
        print(f"Interrupted; what was answered is in {output}. The same command goes on.")
        return 130
    finally:
        store.close()
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _show(summary, settings.num_samples)
        print(f"Summary and answers: {output}")
    return 0


def _read(source: str, settings: Settings) -> _Set:
    """The problems of a data set, each with an answer."""
    columns = DataConfig(prompt=settings.prompt_column, answer=settings.answer_column, solution="")
    prompts = load_prompts(
        source,
        columns,
        split="test",
        needs_solution=False,
        needs_answer=True,
        max_rows=settings.max_problems,
    )
    return _Set(source, prompts, grader_of(settings.grader, settings.answer_marker, source))


def _encode(
    sets: Mapping[str, _Set], model: LanguageModel, settings: Settings
) -> dict[str, list[tuple[int, ...]]]:
    template, kwargs = settings.chat_template, settings.chat_template_kwargs
    # Any length, for the moment: the budget of the completions follows from the longest prompt.
    return {
        name: encode_prompts(of.prompts, model.tokenizer, template, 2**62, None, 0, kwargs)
        for name, of in sets.items()
    }


def _try_graders(store: Store, sets: Mapping[str, _Set], console: Console) -> None:
    """Say which right answers the grader does not understand, before problems are answered."""
    for name, of in sets.items():
        if len(store.rows(name)) < len(of.prompts):
            found = failing_answers(of.prompts, of.grader)
            if found.failing:
                console.print(f"{name}: {found}.", highlight=False, markup=False)


def _budget(encoded: Mapping[str, Sequence[tuple[int, ...]]], model: LanguageModel) -> int:
    longest = max(len(ids) for prompts in encoded.values() for ids in prompts)
    room = MAX_NEW_TOKENS if model.context is None else model.context - longest
    return max(1, min(MAX_NEW_TOKENS, room))


def _answer_all(
    store: Store,
    name: str,
    of: _Set,
    prompt_ids: Sequence[tuple[int, ...]],
    sampler: TransformersSampler,
    settings: Settings,
    budget: int,
    console: Console,
) -> None:
    """Answer the problems of a data set that have no row yet."""
    total, together = len(of.prompts), num_together(settings)
    rows = store.rows(name)
    store.require_order(name, rows, of.prompts)
    num_rows = len(rows)
    if num_rows >= total:
        return
    done = num_rows - num_rows % together  # problems that are drawn together are written together
    if num_rows != done:
        store.keep(name, done)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    told = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=total, completed=done)
        for start in range(done, total, together):
            part = slice(start, start + together)
            seed = f"eval {settings.seed} {name} {start}"
            rows = answer(
                sampler, of.prompts[part], prompt_ids[part], settings, budget, of.grader, seed
            )
            store.add(name, rows)
            progress.advance(bar, len(rows))
            if not console.is_terminal and time.monotonic() - told > PLAIN_INTERVAL_S:
                told = time.monotonic()
                console.print(f"{name}: {start + len(rows)} of {total} problems", highlight=False)


def _summary(store: Store, settings: Settings, decided: Mapping[str, Any]) -> dict[str, Any]:
    """Of every data set in the folder that is whole, also of an earlier call."""
    read = {name: store.rows(name) for name in store.sets}
    sets = {
        name: summarise(rows, settings.num_samples)
        for name, rows in read.items()
        if len(rows) == store.sets[name]["num_problems"]
    }
    return {"model": settings.model, "settings": dict(decided), "sets": sets}


def _show(summary: Mapping[str, Any], k: int) -> None:
    """A line for each measure of each data set, which fits any terminal."""
    rows: list[list[object]] = []
    for name, of in summary["sets"].items():
        measures = {f"avg@{k}": of["accuracy"]}
        # The first is the accuracy again.
        measures |= {f"pass@{n}": value for n, value in of["pass_at"].items() if n != "1"}
        measures |= {"TruncRate": of["truncation_rate"], "RepRate": of["repetition_rate"]}
        measures |= {"tokens": of["mean_length"]}
        heads = [name, f"{of['num_problems']} problems"]
        if of["num_timeouts"]:
            heads.append(f"{of['num_timeouts']} graded late")
        heads += [""] * len(measures)
        for head, (measure, value) in zip(heads, measures.items(), strict=False):
            rows.append([head, measure, value["mean"], value["low"], value["high"]])
    title = f"{summary['model']}: mean and 95% interval over problems"
    Console().print(table(("data", "measure", "mean", "low", "high"), rows, title))
