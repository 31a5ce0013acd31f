"""Output heads of language models, and which of them are scored side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

__all__ = ["Against", "Divergence", "Head", "Support"]

# Log-prob of a token of which nothing is known: exp() of it is 0, as of `logprobs.NEVER`.
UNKNOWN = -1e4

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """The output head of a language model.

    logits = cap * tanh(scale * (hidden W^T + bias) / cap), or without the cap where there is none.

    Attributes:
        weight_VD: Output embedding; the input embedding itself where the two are tied.
        bias_V: Bias, or None.
        scale: Factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Soft cap of the logits (Gemma 2's `final_logit_softcapping`), or None.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits of a few positions, in float32 (float64 for float64 weights).

        Args:
            hidden_ND: Last hidden states, (N, D); carries gradient.

        Returns:
            Logits, (N, V); gradient reaches the hidden states, the weight and the bias.
        """
        if not torch.is_autocast_enabled(hidden_ND.device.type):
            hidden_ND = hidden_ND.to(self.weight_VD.dtype)
        logits_NV = F.linear(hidden_ND, self.weight_VD, self.bias_V)
        if logits_NV.dtype != torch.float64:
            logits_NV = logits_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    def restricted_to(self, num_tokens: int) -> Head:
        """The same head over the first `num_tokens` ids alone (for padded vocabularies).

        Args:
            num_tokens: Size of the vocabulary that both models share.

        Returns:
            A head on views of the same parameters; gradient still reaches them.

        Raises:
            ValueError: The head has fewer rows than that.
        """
        if num_tokens > self.weight_VD.shape[0]:
            raise ValueError(f"the head has {self.weight_VD.shape[0]} rows, not {num_tokens}")
        if num_tokens == self.weight_VD.shape[0]:
            return self  # the gradient of a slice is a whole tensor of zeros first
        bias_V = None if self.bias_V is None else self.bias_V[:num_tokens]
        return Head(self.weight_VD[:num_tokens], bias_V, self.scale, self.softcap)


@dataclass(frozen=True)
class Support:
    """In place of a head: K log-probs are known at each position, and all others count as never.

    Attributes:
        num_tokens: V.
    """

    num_tokens: int

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The known log-probs at their places; `log_distribution` makes their sum one.

        Args:
            hidden_ND: Ids and then log-probs in nats, (N, 2K); ids in float32 are exact up to 2^24.

        Returns:
            Logits, (N, V), of the type of what is given; no gradient.
        """
        id_NK, logp_NK = hidden_ND.chunk(2, dim=-1)
        whole_NV = logp_NK.new_full((len(logp_NK), self.num_tokens), UNKNOWN)
        return whole_NV.scatter(1, id_NK.long(), logp_NK.clamp(min=UNKNOWN))


@dataclass(frozen=True)
class Against:
    """Another model at the same positions, to be scored in the same sweep and compared with.

    Attributes:
        hidden_ND: Hidden states of the other model, (N, D'), or what its `Support` takes; no
            gradient is sent there.
        head: Its output head, or what stands in its place.
        compares: Each takes (logp_NV of the scored model, logp_NV of the other) and gives (N,),
            or (N, M) for M numbers that are found together.
        temperature: Temperature of the other model's distribution.
    """

    hidden_ND: Tensor
    head: Head | Support
    compares: tuple[Divergence, ...] = ()
    temperature: float = 1.0
