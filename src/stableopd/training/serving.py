"""Rollouts from servers that follow the student: its weights written, pushed, and checked.

Weights are pushed when they are needed, before the first call of `sample` behind an update: a run
that ends or evaluates later pays for no push. The main process talks to the servers; the others
help to gather weights and to score the tokens of the check.

That a server says it has new weights proves nothing (`rollout/vllm_worker.py` names a case). So
after every push some log-probs are compared with the trainer's own. One update may move these by
less than the tolerance, which must leave room for rounding. So the first push of a run is a trial:
a student whose token ids are shifted by one, in the input embedding and the output head. It must
say of shifted tokens what the student says of the tokens. The student's own weights come second, so
that a server whose weights stay, or stay once they have been used, says something else altogether.
"""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from stableopd.hidden import base_of, token_hidden_states
from stableopd.models import LanguageModel, head_of
from stableopd.objective.logprobs import score_tokens
from stableopd.rollout.vllm import START, VllmSampler
from stableopd.runfolder.files import filling, writing
from stableopd.training.batch import collate
from stableopd.training.devices import DTYPES
from stableopd.training.ranks import Ranks
from stableopd.training.sharding import gathered, whole_weights
from stableopd.types import Rollout, SamplingSettings, Sequence, ServerError

__all__ = ["ServedSampler", "serving_weights"]

# What is compared after a push (design): of a few sequences their last tokens.
NUM_PROBES, PROBE_TOKENS = 4, 256

# Mean difference of log-probs in nats that is no rounding (docs/engines.md, "The check").
TOLERANCE, TOLERANCE_HALF = 1e-3, 0.15


class ServedSampler:
    """The sampler of a run whose rollouts come from servers; all processes call it together."""

    def __init__(
        self,
        inner: VllmSampler,
        student: LanguageModel,
        ranks: Ranks,
        autocast: Callable[[], AbstractContextManager[None]],
        *,
        folder: Path,
        tolerance: float,
        longest: int,
        probes: Many[Many[int]],
    ) -> None:
        """Keep what a push needs; nothing is asked or written yet.

        Args:
            inner: Talks to the servers.
            student: Whose weights they are to have.
            ranks: The processes.
            autocast: How the student computes in training.
            folder: Where weights are written; the servers read them there.
            tolerance: Mean difference of log-probs, in nats, that stops the run; 0 takes the
                default for the servers' type.
            longest: Tokens of the longest prompt and its rollout.
            probes: Token ids to compare log-probs on before there are rollouts.
        """
        self.inner, self.student, self.ranks, self.autocast = inner, student, ranks, autocast
        self.folder, self.tolerance, self.longest = folder, tolerance, longest
        self.metrics: Mapping[str, float] = {}
        self._probes = self._chosen(probes)
        self._dtype, self._is_pushed = "", False
        # Two runs may share a folder; each removes its own weights alone.
        self._name = uuid.uuid4().hex[:8]
        self._pushes = 0

    def sample(
        self,
        prompts: Many[tuple[str, tuple[int, ...]]],
        num_per_prompt: int,
        settings: SamplingSettings,
        seed: int,
    ) -> list[Rollout]:
        """Push the student's weights if they have changed, and have the servers write.

        Args:
            prompts: Pairs of a prompt's id and its token ids, the same in every process.
            num_per_prompt: Rollouts of each prompt.
            settings: Length budget, temperature, top-p and top-k.
            seed: Seed of the call; the number of processes changes no draw.

        Returns:
            All rollouts, in every process, prompt by prompt.

        Raises:
            DataError: A prompt has no token.
            ModelError: A server runs another model, or was started in another way.
            ServerError: A server does not answer, or has other weights than the student.
            RunFolderError: The weights cannot be written.
        """
        if not self._is_pushed:
            self._push()

        def write() -> tuple[list[Rollout], bool]:
            rollouts = self.inner.sample(prompts, num_per_prompt, settings, seed)
            return rollouts, self.inner.has_reloaded

        rollouts, is_unchecked = self.ranks.on_main(write)
        if is_unchecked:
            self._check(is_trial=False)
        if rollouts:
            self._probes = self._chosen([(*r.prompt_ids, *r.completion_ids) for r in rollouts])
        return rollouts

    def update(self) -> None:
        """Take note that the student has changed."""
        self._is_pushed = False

    def close(self) -> None:
        """Remove the weights that were written last."""
        if self.ranks.is_main:
            for path in self.folder.glob(f"{self._name}-*"):
                shutil.rmtree(path, ignore_errors=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _chosen(self, sequences: Many[Many[int]]) -> list[tuple[int, ...]]:
        """The ends of a few sequences; a server writes one more token behind them."""
        num_tokens = max(2, min(PROBE_TOKENS, self.longest - 1))
        usable = [ids for ids in sequences if len(ids) > 1]
        step = max(1, len(usable) // NUM_PROBES)
        return [tuple(ids[-num_tokens:]) for ids in usable[::step][:NUM_PROBES]]

    def _push(self) -> None:
        start = time.perf_counter()
        if not self._dtype:
            self._dtype = self.ranks.on_main(lambda: self.inner.examine(self.longest))
            self._send(is_trial=True)
            self._check(is_trial=True)
        self._send(is_trial=False)
        gap = self._check(is_trial=False)
        self._is_pushed = True
        self.metrics = {"mismatch/served": gap, "time/sync_s": time.perf_counter() - start}

    def _send(self, is_trial: bool) -> None:
        weights = serving_weights(
            self.student, keeps=self.ranks.is_main, dtype=DTYPES[self._dtype], is_shifted=is_trial
        )

        def write_and_load() -> None:
            self._pushes += 1
            path = self.folder / f"{self._name}-{self._pushes:06d}"
            with writing(path), filling(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_name(f"{path.name}.tmp")
                base_of(self.student.model).save_pretrained(unfinished, state_dict=weights)
                unfinished.rename(path)
            self.inner.load(path)
            for old in self.folder.glob(f"{self._name}-*"):
                if old != path:
                    shutil.rmtree(old, ignore_errors=True)

        self.ranks.on_main(write_and_load)

    def _check(self, is_trial: bool) -> float:
        """Mean difference of log-probs between the servers and the trainer, the largest of all."""
        wanted = [self._logps(ids) for ids in self._probes]

        def compare() -> float:
            rows = head_of(self.student.model).weight_VD.shape[0]
            asked = [[(i + is_trial) % rows for i in ids] for ids in self._probes]
            gaps = [_gap(found, wanted) for found in self.inner.token_logps(asked)]
            worst = max(range(len(gaps)), key=lambda place: gaps[place])
            limit = self.tolerance or (TOLERANCE if self._dtype == "float32" else TOLERANCE_HALF)
            if not gaps[worst] <= limit:
                raise ServerError(self._told(worst, gaps[worst], limit, is_trial))
            return gaps[worst]

        return self.ranks.on_main(compare) if self._probes else 0.0

    def _told(self, place: int, gap: float, limit: float, is_trial: bool) -> str:
        num_tokens = sum(len(ids) - 1 for ids in self._probes)
        what = "a trial of new weights" if is_trial else "the student's weights"
        return (
            f"rollout.url: the server at {self.inner.roots[place]} took {what}, but its log-probs "
            f"of {num_tokens} tokens differ from the trainer's by {gap:.3g} nats on average "
            f"(rollout.tolerance = {limit:g}, server in {self._dtype}): it runs another model or "
            f"goes on with old weights; start it with {START}."
        )

    @torch.no_grad()
    def _logps(self, ids: tuple[int, ...]) -> list[float]:
        """Log-probs of all tokens but the first under the student, at temperature 1."""
        device = self.student.model.device
        batch = collate([Sequence(ids[:1], ids[1:], False, 0)], 0, device)
        model = self.student.model
        with self.autocast():
            scores = score_tokens(
                token_hidden_states(model, batch),
                head_of(model),
                batch.target_N,
                stop_ids=batch.target_N[:1],
                stop_is_event=False,
            )
        return scores.logp_N.float().tolist()


def serving_weights(
    student: LanguageModel, *, keeps: bool, dtype: torch.dtype, is_shifted: bool = False
) -> dict[str, Tensor]:
    """The student's weights as a server without adapters loads them; every process must ask.

    Args:
        student: The student; an adapter is merged into the weights that are given.
        keeps: Whether this process wants them.
        dtype: Their type.
        is_shifted: Whether token id i + 1 is to mean what i means to the student.

    Returns:
        Weights on the CPU by the names of the student's base; empty without `keeps`.
    """
    model = student.model
    weights = (
        _merged(model, keeps) if hasattr(model, "peft_config") else whole_weights(model, keeps)
    )
    same: dict[int, Tensor] = {}
    for name, weight in weights.items():
        if id(weight) not in same:  # tied weights stay tied
            same[id(weight)] = weight.to(dtype) if weight.is_floating_point() else weight
        weights[name] = same[id(weight)]
    if is_shifted and keeps:
        base = base_of(model)
        ends = (base.get_input_embeddings(), base.get_output_embeddings())
        names = {name: module for name, module in base.named_modules() if module in ends}
        shifted = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
        for name in shifted & weights.keys():
            weights[name] = weights[name].roll(1, 0)
    return weights


def _merged(model: object, keeps: bool) -> dict[str, Tensor]:
    """Weights of the base of a PEFT model, with its adapter's added."""
    base = base_of(model)
    found: dict[str, Tensor] = {}
    same: dict[int, Tensor] = {}
    with gathered(model), torch.no_grad():
        if not keeps:
            return {}
        for name, weight in base.named_parameters(remove_duplicate=False):
            module, is_wrapped, kind = name.partition(".base_layer.")
            if ".lora_" in name:
                continue
            if id(weight) not in same:
                # A copy also on CPUs: what is gathered is gone behind this block.
                same[id(weight)] = weight.detach().to("cpu", copy=True)
            found[f"{module}.{kind}" if is_wrapped else name] = same[id(weight)]
            if is_wrapped and kind == "weight":
                layer = base.get_submodule(module)
                delta = layer.get_delta_weight(layer.active_adapters[0]).cpu()
                found[f"{module}.weight"] = found[f"{module}.weight"] + delta
    return found


def _gap(found: list[list[float]], wanted: list[list[float]]) -> float:
    """Mean absolute difference; infinite where a number is none."""
    pairs = [
        (x, y)
        for row, other in zip(found, wanted, strict=True)
        for x, y in zip(row, other, strict=True)
    ]
    mean = sum(abs(x - y) for x, y in pairs) / len(pairs)
    return mean if math.isfinite(mean) else math.inf
