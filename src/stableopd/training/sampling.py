"""Rollouts written by all processes, each for its own prompts."""

from __future__ import annotations

from collections.abc import Sequence

from stableopd.rollout.sampler import TransformersSampler
from stableopd.training.ranks import Ranks
from stableopd.training.sharding import gathered
from stableopd.types import Rollout, SamplingSettings

__all__ = ["SpreadSampler"]

# Keeps the draws of the processes apart, beyond every seed of a run (below 2^51). The main process
# has the seed itself, so that one process alone draws as it always did.
RANK_SEED = 2**52


class SpreadSampler:
    """A sampler whose prompts are spread over the processes; all of them call it together.

    Args:
        inner: Writes the rollouts of this process.
        ranks: The processes.
    """

    def __init__(self, inner: TransformersSampler, ranks: Ranks) -> None:
        self.inner = inner
        self.ranks = ranks

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
