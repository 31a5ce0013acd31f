"""The teacher of a run, wherever it is: what the rest of the run needs to know of it."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import transformers

from stableopd.config import Config, TeacherConfig
from stableopd.config_servers import tokenizer_source
from stableopd.endpoint import Endpoint, read_key
from stableopd.model_files import find_tokenizer, guarded
from stableopd.models import LanguageModel, load_tokenizer, require_same_vocabulary
from stableopd.rollout.stops import StopPlan, stop_ids_of
from stableopd.teacher.server import ServedTeacher, ServedTeachers, find_model
from stableopd.training.loading import needs_teacher

__all__ = ["Teaching", "find_teaching", "needs_served", "open_endpoint", "served_stop_ids"]


@dataclass(frozen=True)
class Teaching:
    """What a run needs to know of its teacher beside its scores.

    Attributes:
        tokenizer: Its tokenizer; None where there is no teacher or it is not at hand.
        context: Longest sequence that it reads, in tokens; None without a limit.
        served: The teachers that are served; None without any.
    """

    tokenizer: Any
    context: int | None
    served: ServedTeachers | None


def needs_served(config: Config) -> bool:
    """Whether a term needs a teacher, and that one is served.

    Args:
        config: The configuration.
    """
    return bool(config.teacher.url) and needs_teacher(config.objective)


def served_stop_ids(teacher: TeacherConfig) -> tuple[int, ...] | None:
    """What a served teacher stops with, by the configuration or the files that it names.

    Args:
        teacher: The configuration of the teacher.

    Returns:
        The ids; None where neither says it.

    Raises:
        ModelError: The tokenizer's folder cannot be read, or names no stop.
    """
    source = tokenizer_source(teacher)
    if teacher.stop_ids or not source:
        return teacher.stop_ids or None
    tokenizer, files = _read(source)
    return stop_ids_of(files, tokenizer)


def open_endpoint(teacher: TeacherConfig, urls: Many[str], name: str) -> Endpoint:
    """A client of one teacher's replicas.

    Args:
        teacher: Key and limits.
        urls: The replicas.
        name: For messages.

    Returns:
        The client; nothing has been asked yet.

    Raises:
        ConfigError: The key's environment variable is not set, or does not hold a key.
    """
    return Endpoint(
        urls,
        api_key=read_key(teacher.api_key_env, "the teacher's server"),
        timeout_s=teacher.timeout_s,
        patience_s=teacher.patience_s,
        max_in_flight=teacher.max_in_flight,
        name=name,
    )


def find_teaching(
    config: Config,
    student: LanguageModel,
    teacher: LanguageModel | None,
    stops: StopPlan,
    num_tokens: int,
) -> Teaching:
    """Ask for what the run needs to know of its teacher.

    Args:
        config: The configuration.
        student: The student.
        teacher: The teacher in this process, if there is one.
        stops: How stops are scored.
        num_tokens: Size of the vocabulary that both share.

    Returns:
        What was found.

    Raises:
        StableOPDError: A server does not answer, does not serve the model, or is of another
            tokenizer.
    """
    if teacher is not None:
        return Teaching(teacher.tokenizer, teacher.context, None)
    if not needs_served(config):
        return Teaching(None, None, None)
    t, o = config.teacher, config.objective
    tokenizer = None
    source = tokenizer_source(t)
    if source:
        tokenizer, _ = _read(source)
        require_same_vocabulary(student.name, student.tokenizer, source, tokenizer)
    # Merged stops are one token: with E of them, K + E - 1 ids hold K tokens.
    top_k = min(o.top_k + max(0, len(stops.event_ids) - 1), num_tokens)
    top_k = top_k if o.lambda_divergence else 0
    found: dict[str | None, ServedTeacher] = {}
    contexts: list[int] = []
    for name, urls in {None: t.url, **t.by_name}.items():
        told = "teacher" if name is None else f"teacher {name!r}"
        endpoint = open_endpoint(t, tuple(urls), told)
        # `model` names the default teacher: the others are other models, one at each address.
        model, context = find_model(endpoint, t.model if name is None else "")
        contexts += [context] if context else []
        found[name] = ServedTeacher(endpoint, model, stops.event_ids, top_k, num_tokens)
    return Teaching(tokenizer, min(contexts, default=None), ServedTeachers(found))


def _read(source: str) -> tuple[Any, Any]:
    """The tokenizer of a folder or hub name, and what its files say of stops."""
    where = f"teacher.tokenizer = {source!r}"
    folder = find_tokenizer(source, where)
    tokenizer = load_tokenizer(folder, where)
    files: dict[str, Any] = {"config": SimpleNamespace()}
    for name, kind in (
        ("generation_config", transformers.GenerationConfig),
        ("config", transformers.AutoConfig),
    ):
        if (folder / f"{name}.json").is_file():  # it may hold a tokenizer only
            with guarded(where):
                files[name] = kind.from_pretrained(str(folder))
    return tokenizer, SimpleNamespace(**files)
