"""Rollouts in the training process, with the log-prob of every token as it was drawn.

Two things that a plain call of transformers' `generate` gets wrong for on-policy training are set
right here; how tokens are drawn and decoded is in `drawing.py` and `decoding.py`:

- It fills whatever the caller leaves open from the model's `generation_config.json`, and many
  models ship a top-p, a repetition penalty or suppressed tokens there. For the length of a call the
  model gets an empty one.
- It puts temperature, top-k and top-p behind the caller's logits processors, so that no processor
  sees the distribution that is drawn from. Here the draw itself gives the log-prob.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stableopd.rollout.decoding import Pick, complete
from stableopd.rollout.drawing import draw, greedy
from stableopd.types import DataError, ModelError, Rollout, SamplingSettings, StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TransformersSampler", "as_rollout", "require_tokens"]


class TransformersSampler:
    """Draws rollouts from a causal language model in this process.

    Every process may hold a sampler of its own over a whole copy of the weights, as the processes
    make different numbers of calls; weights that are sharded over them must be gathered first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        num_tokens: int,
        batch_size: int = 0,
    ) -> None:
        """Keep the model and how to read it.

        Args:
            model: A causal language model of transformers, or a PEFT model around one.
            tokenizer: Its tokenizer; used to decode alone.
            stop_ids: Token ids that end a rollout.
            num_tokens: Size of the vocabulary that may be drawn; ids from here on never are.
            batch_size: Sequences generated at once; 0 generates all of a call at once.

        Raises:
            ModelError: There is no stop id, or one lies outside the `num_tokens` ids.
        """
        if not stop_ids or not all(0 <= stop < num_tokens for stop in stop_ids):
            raise ModelError(
                f"the stop ids {sorted(stop_ids)} must be at least one id below the {num_tokens} "
                "tokens that may be drawn; set eos_token_id in the model's generation_config.json."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = tuple(sorted(set(stop_ids)))
        self.num_tokens = num_tokens
        self.batch_size = batch_size

    def sample(
        self,
        prompts: Sequence[tuple[str, tuple[int, ...]]],
        num_per_prompt: int,
        settings: SamplingSettings,
        seed: int,
    ) -> list[Rollout]:
        """Write `num_per_prompt` completions of every prompt.

        The distribution is softmax(logits / temperature) over the first `num_tokens` ids, then cut
        to the top k and to the top p; `sampler_logps` are log-probs under exactly this
        distribution, in float32. Temperature 0 takes the likeliest token, ignores top-k and top-p,
        and gives log-probs at temperature 1. The same seed and batch size give the same rollouts
        on CPU. The random state of the process, the training flags of the model and its generation
        config are as before when this returns.

        Args:
            prompts: Pairs of a prompt's id and its token ids.
            num_per_prompt: Rollouts of each prompt.
            settings: Length budget, temperature, top-p and top-k.
            seed: Seed of all draws of this call.

        Returns:
            The rollouts, prompt by prompt; those of one prompt are adjacent.

        Raises:
            DataError: A prompt has no token.
            TrainingError: The model's logits are not finite.
        """
        require_tokens(prompts)
        work = [place for place in range(len(prompts)) for _ in range(num_per_prompt)]
        size = self.batch_size or max(len(work), 1)
        pick = _pick(settings, self.num_tokens)
        rollouts: list[Rollout] = []
        with (
            torch.no_grad(),
            _evaluating(self.model),
            _without_generation_config(self.model),
            _seeded(self.model.device, seed),
        ):
            for start in range(0, len(work), size):
                chunk = work[start : start + size]
                drawn = complete(
                    self.model,
                    [prompt_ids for _, prompt_ids in prompts[chunk[0] : chunk[-1] + 1]],
                    [place - chunk[0] for place in chunk],
                    settings.max_new_tokens,
                    self.stop_ids,
                    pick,
                )
                rollouts += [
                    as_rollout(prompts[place], ids, logps, settings, self.tokenizer, self.stop_ids)
                    for place, (ids, logps) in zip(chunk, drawn, strict=True)
                ]
        return rollouts


def require_tokens(prompts: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse prompts that nothing can be written behind.

    Args:
        prompts: Pairs of a prompt's id and its token ids.

    Raises:
        DataError: One has no token.
    """
    for prompt_id, prompt_ids in prompts:
        if not prompt_ids:
            raise DataError(
                f"prompt {prompt_id!r} has no token to continue from; give it some text or use "
                "a tokenizer that begins with one."
            )


def as_rollout(
    prompt: tuple[str, tuple[int, ...]],
    ids: list[int],
    logps: list[float],
    settings: SamplingSettings,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
) -> Rollout:
    """What has been drawn, as a rollout.

    Args:
        prompt: The prompt's id and its token ids.
        ids: Token ids of the completion, with its stop.
        logps: Their log-probs, in nats.
        settings: How they were drawn.
        tokenizer: Decodes them.
        stop_ids: Ids of which the last one is one, unless the completion was cut off.

    Returns:
        The rollout.
    """
    prompt_id, prompt_ids = prompt
    stopped = ids[-1] in stop_ids
    # A stop id need not be marked special in the tokenizer, so that decode could keep it.
    text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
    return Rollout(
        prompt_id=prompt_id,
        prompt_ids=tuple(prompt_ids),
        completion_ids=tuple(ids),
        completion=str(text),
        stop_reason=StopReason.STOP if stopped else StopReason.LENGTH,
        sampler_logps=tuple(logps),
        settings=settings,
    )


def _pick(settings: SamplingSettings, num_tokens: int) -> Pick:
    """How tokens are chosen: by the settings, among the first `num_tokens`."""
    temperature = float(settings.temperature)
    warpers = LogitsProcessorList()
    if temperature and settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if temperature and settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    if warpers:
        warpers.insert(0, TemperatureLogitsWarper(temperature))

    def pick(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BV = logits_BV[:, :num_tokens].float()
        if not temperature:
            return greedy(logits_BV)
        if not warpers:
            return draw(logits_BV, uniform_B, temperature)
        # They do not read the ids so far.
        no_ids: Any = torch.empty(len(logits_BV), 0, dtype=torch.long, device=logits_BV.device)
        return draw(warpers(no_ids, logits_BV), uniform_B)

    return pick


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout and gradient checkpointing off inside; every module's own flag comes back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _without_generation_config(model: torch.nn.Module) -> Iterator[None]:
    """An empty generation config inside, in the model and in whatever it wraps."""
    owners = [
        (module, module.__dict__["generation_config"])
        for module in model.modules()
        if "generation_config" in module.__dict__
    ]
    for module, _ in owners:
        module.__dict__["generation_config"] = GenerationConfig()
    try:
        yield
    finally:
        for module, config in owners:
            module.__dict__["generation_config"] = config


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draws on `device` follow the seed inside; the state outside is left as it was."""
    on_cuda = device.type == "cuda"
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng([device] if on_cuda else [], device_type="cuda"):
        # Not torch.manual_seed: it would seed every device, and only this one is given back.
        torch.default_generator.manual_seed(seed)
        with torch.cuda.device(device) if on_cuda else nullcontext():
            if on_cuda:
                torch.cuda.manual_seed(seed)
        if mps_state is not None:
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
