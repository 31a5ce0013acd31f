"""An output head over hidden states, which makes tiles of its logits in buffers of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor

from stableopd.objective.heads import Against, Head

__all__ = ["TiledHead"]


class TiledHead:
    """A head over its hidden states.

    Products are taken in the type in which `Head.logits` takes them (the weight's, or autocast's);
    tiles are float32, or float64 for float64 weights. A tile of the weight is cast by itself.

    Args:
        model: The head, the hidden states (N, D), and the temperature. No gradient is recorded.
    """

    def __init__(self, model: Against) -> None:
        head, device = model.head, model.hidden_ND.device.type
        assert isinstance(head, Head)
        mixed = torch.is_autocast_enabled(device)
        self.type = torch.get_autocast_dtype(device) if mixed else head.weight_VD.dtype
        self.tile_type = torch.float64 if self.type == torch.float64 else torch.float32
        self.hidden_ND = model.hidden_ND.detach().to(self.type)
        self.weight_VD = head.weight_VD.detach()
        self.bias_V = None if head.bias_V is None else head.bias_V.detach()
        self.scale, self.softcap, self.temperature = head.scale, head.softcap, model.temperature
        self._buffers: dict[str, Tensor] = {}

    @property
    def num_tokens(self) -> int:
        """Entries of the vocabulary."""
        return self.weight_VD.shape[0]

    def weight(self, columns: slice) -> Tensor:
        """Some rows of the weight, in the type that is multiplied."""
        return self.weight_VD[columns].to(self.type)

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory that the next call with that name overwrites.

        One for all tiles: the allocator of a CPU would scatter them, and keep their memory.
        """
        size, found = math.prod(shape), self._buffers.get(name)
        if found is None or found.numel() < size:
            found = self.hidden_ND.new_empty(size, dtype=self.tile_type)
            self._buffers[name] = found
        return found[:size].view(shape)

    def tile(self, rows: slice | Tensor, columns: slice) -> Tensor:
        """Logits over the temperature at some positions and columns, (R, C), in a buffer."""
        hidden_RD, weight_CD = self.hidden_ND[rows], self.weight(columns)
        z_RC = self.buffer("logits", (hidden_RD.shape[0], weight_CD.shape[0]))
        if self.type == self.tile_type:
            torch.mm(hidden_RD, weight_CD.T, out=z_RC)
            if self.bias_V is not None:
                z_RC.add_(self.bias_V[columns])
        else:
            bias_C = None if self.bias_V is None else self.bias_V[columns].to(self.type)
            z_RC.copy_(F.linear(hidden_RD, weight_CD, bias_C))
        return self._bend_(z_RC)

    def at(self, rows: slice, ids_RK: Tensor) -> Tensor:
        """Logits over the temperature of other columns at each position, (R, K)."""
        weight_RKD = self.weight_VD[ids_RK].to(self.type)
        z_RK = torch.bmm(weight_RKD, self.hidden_ND[rows, :, None]).squeeze(2)
        if self.bias_V is not None:
            z_RK = z_RK + self.bias_V[ids_RK].to(self.type)
        return self._bend_(z_RK.to(self.tile_type))

    def _bend_(self, z: Tensor) -> Tensor:
        """Scale, soft cap and temperature, in place."""
        factor = self.scale if self.softcap is None else self.scale / self.softcap
        if factor != 1.0:
            z.mul_(factor)
        if self.softcap is not None:
            z.tanh_().mul_(self.softcap)
        return z if self.temperature == 1.0 else z.div_(self.temperature)

    def straighten_(self, gradient_RC: Tensor, z_RC: Tensor) -> Tensor:
        """From the gradient of bent logits `z_RC` to that of the linear ones, in place."""
        slope = self.scale / self.temperature
        if self.softcap is not None:
            z_RC.mul_(self.temperature / self.softcap).square_()
            gradient_RC.mul_(z_RC.neg_().add_(1.0))
        return gradient_RC if slope == 1.0 else gradient_RC.mul_(slope)
