"""Where rollouts come from: all processes, each for its own prompts, or servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from stableopd.config import Config
from stableopd.endpoint import read_key
from stableopd.models import LanguageModel, head_of
from stableopd.rollout.sampler import TransformersSampler
from stableopd.rollout.stops import StopPlan
from stableopd.rollout.vllm import VllmSampler
from stableopd.training.data import Problems
from stableopd.training.ranks import Ranks
from stableopd.training.serving import ServedSampler
from stableopd.training.sharding import gathered
from stableopd.types import Rollout, SamplingSettings

__all__ = ["Sampler", "SpreadSampler", "make_samplers"]

# Keeps the draws of the processes apart, beyond every seed of a run (below 2^51). The main process
# has the seed itself, so that one process alone draws as it always did.
RANK_SEED = 2**52


class Sampler(Protocol):
    """What a run needs of its sampler; all processes call it together.

    `metrics` are of the last weights that were sent anywhere; empty where none are.
    """

    metrics: Mapping[str, float]

    def sample(
        self,
        prompts: Sequence[tuple[str, tuple[int, ...]]],
        num_per_prompt: int,
        settings: SamplingSettings,
        seed: int,
    ) -> list[Rollout]:
        """Write `num_per_prompt` completions of every prompt."""
        ...

    def update(self) -> None:
        """Take note that the student has changed."""
        ...

    def close(self) -> None:
        """Leave nothing behind that only rollouts need."""
        ...


def make_samplers(
    config: Config,
    student: LanguageModel,
    stops: StopPlan,
    num_tokens: int,
    train: Problems,
    held_out: Problems | None,
    ranks: Ranks,
    autocast: Any,
) -> tuple[Sampler, Sampler]:
    """The samplers of rollouts and evaluations; one and the same where servers write.

    Args:
        config: The configuration.
        student: The student.
        stops: Which ids end a rollout.
        num_tokens: Size of the vocabulary that may be drawn.
        train: The problems to train on.
        held_out: The problems of the evaluation; None without one.
        ranks: The processes.
        autocast: How the student computes in training.

    Returns:
        Both; a server has not been asked for anything yet.

    Raises:
        ConfigError: `rollout.api_key_env` names a variable that is not set or holds no key.
    """
    r = config.rollout
    if r.engine != "vllm":
        here, there = (
            TransformersSampler(
                student.model, student.tokenizer, stops.decode_ids, num_tokens, batch_size
            )
            for batch_size in (r.batch_size, config.eval.batch_size)
        )
        return SpreadSampler(here, ranks), SpreadSampler(there, ranks)
    known = zip(train.prompt_ids, train.golden, strict=True)
    served = ServedSampler(
        _client(config, student, stops, num_tokens),
        student,
        ranks,
        autocast,
        folder=Path(r.weights_dir or f"{config.run.output}.served"),
        tolerance=r.tolerance,
        longest=_longest(config, train, held_out),
        probes=[(*ids, *(golden.completion_ids if golden else ())) for ids, golden in known],
    )
    return served, served


def _client(
    config: Config, student: LanguageModel, stops: StopPlan, num_tokens: int
) -> VllmSampler:
    r = config.rollout
    return VllmSampler(
        tuple(r.url),
        student.tokenizer,
        stops.decode_ids,
        num_tokens,
        head_of(student.model).weight_VD.shape[0],
        api_key=read_key(r.api_key_env, "the rollouts' server"),
        timeout_s=r.timeout_s,
        patience_s=r.patience_s,
    )


def _longest(config: Config, train: Problems, held_out: Problems | None) -> int:
    """Tokens of the longest prompt and what may be written behind it."""
    budget = config.rollout.max_new_tokens
    longest = max(map(len, train.prompt_ids)) + budget
    if held_out is None:
        return longest
    budget = config.eval.max_new_tokens or budget
    return max(longest, max(map(len, held_out.prompt_ids)) + budget)


class SpreadSampler:
    """A sampler whose prompts are spread over the processes; all of them call it together.

    Args:
        inner: Writes the rollouts of this process.
        ranks: The processes.
    """

    def __init__(self, inner: TransformersSampler, ranks: Ranks) -> None:
        self.inner = inner
        self.ranks = ranks
        self.metrics: Mapping[str, float] = {}

    def sample(
        self,
        prompts: Sequence[tuple[str, tuple[int, ...]]],
        num_per_prompt: int,
        settings: SamplingSettings,
        seed: int,
    ) -> list[Rollout]:
        """Write `num_per_prompt` completions of every prompt, as the inner sampler does.

        Sharded weights are whole meanwhile: the processes then make as many calls as their own
        rollouts need, and wait for each other once, at the end.

        Args:
            prompts: Pairs of a prompt's id and its token ids, the same in every process.
            num_per_prompt: Rollouts of each prompt.
            settings: Length budget, temperature, top-p and top-k.
            seed: Seed of the main process; the others' follow from it.

        Returns:
            All rollouts, in every process, prompt by prompt.

        Raises:
            DataError: A prompt has no token.
            TrainingError: The model's logits are not finite in some process.
        """
        own = seed + RANK_SEED * self.ranks.rank
        with gathered(self.inner.model):
            return self.ranks.spread(
                prompts, lambda mine: self.inner.sample(mine, num_per_prompt, settings, own)
            )

    def update(self) -> None:
        """Do nothing: the student that draws is the one that is trained."""

    def close(self) -> None:
        """Do nothing: there is nothing beside the student."""
