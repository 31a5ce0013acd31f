"""A teacher for one command: a model in this process, or one that is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stableopd.config import TeacherConfig
from stableopd.config_checks import DTYPES
from stableopd.config_servers import key_fault
from stableopd.endpoint import Endpoint
from stableopd.evaluate.loading import load_model
from stableopd.model_files import find_tokenizer
from stableopd.models import LanguageModel, load_tokenizer, shared_vocabulary
from stableopd.objective.logprobs import score_tokens
from stableopd.teacher.local import FrozenModel
from stableopd.teacher.server import Item, Judged, find_model
from stableopd.training.batch import collate, micro_batches
from stableopd.training.devices import dtype_of, make_accelerator, require_one_process
from stableopd.training.teaching import open_endpoint, served_stop_ids
from stableopd.types import ConfigError
from stableopd.types import Sequence as TokenSequence

__all__ = ["LocalJudge", "Opened", "Source", "open_source"]


@dataclass(frozen=True)
class Source:
    """Which teacher.

    Attributes:
        model: A model folder, an adapter's folder, a hub name or "embedded" (the teacher); with
            `urls` its name there.
        urls: Addresses of a served one's replicas.
        tokenizer: Its tokenizer's folder or hub name, where it is served.
        stop_ids: Ids that stop a completion beside those that its files name.
        api_key_env: Name of the environment variable with the server's key.
        gguf_file: Name of a GGUF file in the model's folder.
        dtype: Type of the weights.
        device: Where they go.
        max_in_flight: Requests under way at once.
        timeout_s: Seconds for one answer of a server.
        patience_s: Seconds without any answer after which it is given up.
    """

    model: str = ""
    urls: tuple[str, ...] = ()
    tokenizer: str = ""
    stop_ids: tuple[int, ...] = ()
    api_key_env: str = ""
    gguf_file: str = ""
    dtype: str = "auto"
    device: str = "auto"
    max_in_flight: int = 32
    timeout_s: float = 300.0
    patience_s: float = 600.0


@dataclass(frozen=True)
class Opened:
    """A teacher that is ready; either `local` or `endpoint` is there.

    Attributes:
        name: Folder, hub name, or the name at the server.
        weights: A fingerprint of a local one's; "served" for others.
        tokenizer: Its tokenizer; None for a served one whose folder was not given.
        context: Longest sequence that it reads; None without a limit.
        stop_ids: What it stops with; None where that is not known.
        local: The model.
        endpoint: The client of its server.
    """

    name: str
    weights: str
    tokenizer: Any
    context: int | None
    stop_ids: tuple[int, ...] | None
    local: LanguageModel | None = None
    endpoint: Endpoint | None = None


def open_source(source: Source, command: str) -> Opened:
    """Load a teacher, or ask its server for what it serves.

    Args:
        source: Which.
        command: Of the command line, for messages.

    Returns:
        The teacher.

    Raises:
        StableOPDError: There is none, or it cannot be loaded or reached.
    """
    from stableopd.rollout.stops import stop_ids_of

    _check(source)
    if not source.urls:
        one = make_accelerator(source.device, "float32", (), Path())
        device = require_one_process(one, command).device
        name = "embedded-teacher" if source.model == "embedded" else source.model
        dtype = dtype_of(source.dtype, "teacher", device)
        model, weights = load_model(name, source.gguf_file, dtype, device, "teacher")
        ids = {*stop_ids_of(model.model, model.tokenizer), *source.stop_ids}
        outside = [e for e in ids if not 0 <= e < shared_vocabulary(model, None)]
        if outside:
            raise ConfigError(f"--stop-ids {outside[0]}: the model has no such token.")
        stops = tuple(sorted(ids))
        return Opened(source.model, weights, model.tokenizer, model.context, stops, model)
    settings = TeacherConfig(
        tokenizer=source.tokenizer,
        api_key_env=source.api_key_env,
        max_in_flight=source.max_in_flight,
        timeout_s=source.timeout_s,
        patience_s=source.patience_s,
    )
    endpoint = open_endpoint(settings, source.urls, "teacher")
    name, context = find_model(endpoint, source.model)
    tokenizer = None
    if source.tokenizer:
        where = f"--tokenizer {source.tokenizer!r}"
        tokenizer = load_tokenizer(find_tokenizer(source.tokenizer, where), where)
    stops = tuple(sorted({*(served_stop_ids(settings) or ()), *source.stop_ids})) or None
    return Opened(name, "served", tokenizer, context, stops, endpoint=endpoint)


def _check(source: Source) -> None:
    if not (source.model or source.urls):
        raise ConfigError("no teacher: give --model as a folder or hub name, or --url of a server.")
    if fault := key_fault(source.api_key_env):
        raise ConfigError(f"--api-key-env {fault}")
    if not source.urls and (source.tokenizer or source.api_key_env):
        raise ConfigError("--tokenizer and --api-key-env belong to a --url.")
    if source.urls and source.gguf_file:
        raise ConfigError("--gguf-file belongs to a model in this process, and not to a --url.")
    if source.dtype not in DTYPES:
        raise ConfigError(f"--dtype {source.dtype}: choose from {', '.join(DTYPES)}.")


class LocalJudge:
    """Scores completions with a model in this process, as a `ServedTeacher` does with its own.

    Args:
        model: The model.
        event_ids: Ids that are scored as one stop; empty scores each id by itself.
        max_tokens: Padded tokens of one forward pass.
    """

    def __init__(self, model: LanguageModel, event_ids: tuple[int, ...], max_tokens: int) -> None:
        self.num_tokens = shared_vocabulary(model, None)
        self._frozen = FrozenModel(model.model, self.num_tokens)
        self._device = model.model.device
        self._is_event = bool(event_ids)
        self._stop_ids = torch.tensor(event_ids or (0,), device=self._device)
        self._max_tokens = max_tokens

    @torch.no_grad()
    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """Score completions.

        Args:
            items: Prompts of one token or more, each with its completion.

        Returns:
            What the model says of each.
        """
        sequences = [
            TokenSequence(tuple(prompt), tuple(completion), is_golden=False, index=place)
            for place, (prompt, completion) in enumerate(items)
        ]
        logps: dict[int, tuple[float, ...]] = {}
        for group in micro_batches(sequences, self._max_tokens):
            batch = collate(group, 0, self._device)
            hidden_ND = self._frozen.hidden(batch)
            scores = score_tokens(
                hidden_ND,
                self._frozen.head,
                batch.target_N,
                stop_ids=self._stop_ids,
                stop_is_event=self._is_event,
            )
            parts = scores.logp_N.float().cpu().split([len(s.completion_ids) for s in group])
            for sequence, part in zip(group, parts, strict=True):
                logps[sequence.index] = tuple(part.tolist())
        return [Judged(logps[place]) for place in range(len(items))]
