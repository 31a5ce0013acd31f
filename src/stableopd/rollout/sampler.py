"""Rollouts by transformers' own `generate`, with the log-prob of every token as it was drawn.

Three things that a plain call of `generate` gets wrong for on-policy training are set right here:

- It fills whatever the caller leaves open from the model's `generation_config.json`, and many
  models ship a top-p, a repetition penalty or suppressed tokens there. For the length of a call the
  model gets an empty one.
- It puts temperature, top-k and top-p behind the caller's logits processors, so that no processor
  sees the distribution that is drawn from. Here they are passed as processors themselves, and one
  more stands behind them and keeps the log-prob of the token drawn.
- It computes every row until the last one is done. Here `generate` is called in segments that hand
  on the key-value cache, and rows that have stopped leave the batch between two segments.

What is left out: a prompt is read once for each of its rollouts, and free places in the batch are
not filled with waiting prompts. An inference engine does both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stableopd.types import (
    DataError,
    ModelError,
    Rollout,
    SamplingSettings,
    StopReason,
    TrainingError,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TransformersSampler"]

# Tokens between two chances to leave the batch. A stopped row costs half a segment on average, and
# each segment a new call of `generate`. On one CPU core, models of widths 64 to 256 and ragged
# lengths (mean 50 to 100 of a budget of 256 to 384), 16 to 64 cost the same within the noise, and
# less than half of what a single call costs.
SEGMENT_TOKENS = 32

# Layers whose whole state `batch_select_indices` selects. Subclasses may hold more (a linear
# attention state beside the keys and values) that it leaves untouched, so the type must be exact.
SELECTABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


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
        self._drops_rows: bool | None = None

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
        for prompt_id, prompt_ids in prompts:
            if not prompt_ids:
                raise DataError(
                    f"prompt {prompt_id!r} has no token to continue from; give it some text or use "
                    "a tokenizer that begins with one."
                )
        work = [prompt for prompt in prompts for _ in range(num_per_prompt)]
        size = self.batch_size or max(len(work), 1)
        rollouts: list[Rollout] = []
        with (
            torch.no_grad(),
            _evaluating(self.model),
            _without_generation_config(self.model),
            _seeded(self.model.device, seed),
        ):
            for start in range(0, len(work), size):
                chunk = work[start : start + size]
                drawn = self._draw([prompt_ids for _, prompt_ids in chunk], settings)
                rollouts += [
                    self._rollout(prompt_id, prompt_ids, ids, logps, settings)
                    for (prompt_id, prompt_ids), (ids, logps) in zip(chunk, drawn, strict=True)
                ]
        return rollouts

    def _draw(
        self, prompts: list[tuple[int, ...]], settings: SamplingSettings
    ) -> list[tuple[list[int], list[float]]]:
        """Complete the prompts as one batch, segment by segment."""
        ids_BT, mask_BT = self._left_padded(prompts)
        drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        rows = list(range(len(prompts)))
        left = settings.max_new_tokens
        segment = SEGMENT_TOKENS if left > SEGMENT_TOKENS and self._can_drop_rows() else left
        cache: Any = None
        while True:
            steps = min(segment, left)
            output, logps = self._generate(ids_BT, mask_BT, cache, steps, settings)
            tokens = output.sequences[:, ids_BT.shape[1] :].tolist()
            going: list[int] = []
            for place, row in enumerate(rows):
                end = self._end(tokens[place])
                drawn[row][0].extend(tokens[place][:end])
                drawn[row][1].extend(logps[place][:end])
                if end is None:
                    going.append(place)
            left -= steps
            if not (going and left):
                return drawn
            keep = torch.tensor(going, dtype=torch.long, device=ids_BT.device)
            cache = output.past_key_values
            if len(going) < len(rows):
                cache.batch_select_indices(keep)
            ids_BT = output.sequences[keep]
            mask_BT = torch.cat([mask_BT[keep], mask_BT.new_ones(len(going), steps)], dim=1)
            rows = [rows[place] for place in going]

    def _generate(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        cache: Any,
        steps: int,
        settings: SamplingSettings,
    ) -> tuple[Any, list[list[float]]]:
        """Call `generate` for at most `steps` tokens; its output, and a log-prob for each token."""
        kept = _DrawnLogps()
        drawing = settings.temperature > 0
        config = GenerationConfig(
            max_new_tokens=steps,
            do_sample=drawing,
            # The values that switch transformers' own off: its default is a cut to the top 50.
            # Where nothing is drawn, setting them earns a warning.
            temperature=1.0 if drawing else None,
            top_k=0 if drawing else None,
            top_p=1.0 if drawing else None,
            num_beams=1,
            use_cache=True,
            eos_token_id=list(self.stop_ids),
            # Never read: a row's end is its first stop token, and padding is masked by length.
            pad_token_id=self.stop_ids[0],
            return_dict_in_generate=True,
        )
        output = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids_BT,
            attention_mask=mask_BT,
            past_key_values=cache,
            generation_config=config,
            logits_processor=self._processors(settings, kept),
            # Where weights are sharded, the default waits for other processes after each token.
            synced_gpus=False,
        )
        return output, kept.of(output.sequences[:, ids_BT.shape[1] :])

    def _processors(self, settings: SamplingSettings, kept: _DrawnLogps) -> LogitsProcessorList:
        processors: list[LogitsProcessor] = [_CommonVocabulary(self.num_tokens)]
        if settings.temperature > 0:
            if settings.temperature != 1:
                processors.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_k:
                processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                processors.append(TopPLogitsWarper(settings.top_p))
        return LogitsProcessorList([*processors, kept])

    def _can_drop_rows(self) -> bool:
        """Whether rows can be taken out of the model's cache, from the cache that it makes."""
        if self._drops_rows is None:
            ids_BT = torch.tensor([[self.stop_ids[0]]], device=self.model.device)
            greedy = SamplingSettings(max_new_tokens=1, temperature=0.0)
            output, _ = self._generate(ids_BT, torch.ones_like(ids_BT), None, 1, greedy)
            cache = output.past_key_values
            self._drops_rows = type(cache) is DynamicCache and all(
                type(layer) in SELECTABLE_LAYERS for layer in cache.layers
            )
        return self._drops_rows

    def _left_padded(self, prompts: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(prompt) for prompt in prompts)
        filler = self.stop_ids[0]  # masked, so that any valid id does
        ids = [[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _end(self, tokens: list[int]) -> int | None:
        """Number of tokens up to and with the first stop token; None where there is none."""
        ends = (place + 1 for place, token in enumerate(tokens) if token in self.stop_ids)
        return next(ends, None)

    def _rollout(
        self,
        prompt_id: str,
        prompt_ids: tuple[int, ...],
        ids: list[int],
        logps: list[float],
        settings: SamplingSettings,
    ) -> Rollout:
        stopped = ids[-1] in self.stop_ids
        # A stop id need not be marked special in the tokenizer, so that decode could keep it.
        text = self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
        return Rollout(
            prompt_id=prompt_id,
            prompt_ids=tuple(prompt_ids),
            completion_ids=tuple(ids),
            completion=str(text),
            stop_reason=StopReason.STOP if stopped else StopReason.LENGTH,
            sampler_logps=tuple(logps),
            settings=settings,
        )


class _CommonVocabulary(LogitsProcessor):
    """Gives tokens beyond the vocabulary that student and teacher share no probability."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        # One NaN or infinity makes the sum one; drawing from it would be a crash in torch.
        if not bool(torch.isfinite(scores.sum())):
            raise TrainingError(
                "the student's logits are not finite (NaN or infinity), so that it cannot write; "
                "lower optimizer.learning_rate, or choose another student.dtype."
            )
        # `generate` hands over a float32 copy of the last logits, so that in place is safe.
        scores[:, self.num_tokens :] = -torch.inf
        return scores


class _DrawnLogps(LogitsProcessor):
    """Stands last, and gathers each token's log-prob from the scores that it was drawn from.

    The token is known one call later, so the scores of a single step are kept at any time.
    """

    def __init__(self) -> None:
        self.scores_BV: torch.Tensor | None = None
        self.logp_B: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        self._gather(input_ids[:, -1])
        self.scores_BV = scores
        return scores

    def of(self, tokens_BT: torch.Tensor) -> list[list[float]]:
        """Log-probs in nats of the generated tokens, row by row; meaningless behind a stop."""
        # On some devices `generate` runs one step more and takes its token back.
        if len(self.logp_B) < tokens_BT.shape[1]:
            self._gather(tokens_BT[:, -1])
        return torch.stack(self.logp_B[: tokens_BT.shape[1]], dim=1).tolist()

    def _gather(self, token_B: torch.Tensor) -> None:
        if self.scores_BV is not None:
            score_B = self.scores_BV.gather(1, token_B[:, None]).squeeze(1)
            self.logp_B.append(score_B - self.scores_BV.logsumexp(dim=1))


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
