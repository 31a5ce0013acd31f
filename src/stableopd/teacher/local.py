"""A frozen model in this process: the teacher, or the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopd.hidden import token_hidden_states
from stableopd.models import head_of
from stableopd.objective.heads import Against, Head
from stableopd.types import Batch

__all__ = ["FrozenModel"]


class FrozenModel:
    """A model that scores tokens and never changes.

    Args:
        model: A transformers model, or a PEFT model around one.
        num_tokens: Size of the vocabulary shared with the student.
        temperature: Temperature of its distribution.
        autocast: Opens the mixed-precision context in which it runs.
        is_base: Whether a PEFT model stands for its base, with the adapter off: the reference of a
            student that trains an adapter.
    """

    def __init__(
        self,
        model: Any,
        num_tokens: int,
        temperature: float = 1.0,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        *,
        is_base: bool = False,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self._num_tokens = num_tokens
        self._autocast = autocast
        self._is_base = is_base and hasattr(model, "disable_adapter")

    @property
    def head(self) -> Head:
        """The output head over the shared vocabulary, without gradient.

        Sharded weights are whole from a pass of the model on, so ask after `hidden`.
        """
        with self._adapter_off():
            head = head_of(self.model).restricted_to(self._num_tokens)
        # With an adapter the head is shared with the student, and takes no gradient from here.
        return Head(
            head.weight_VD.detach(),
            None if head.bias_V is None else head.bias_V.detach(),
            head.scale,
            head.softcap,
        )

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states at the completion tokens of a batch, (N, D), without gradient."""
        with self._adapter_off(), self._autocast():
            return token_hidden_states(self.model, batch)

    def against(self, batch: Batch, *compares: Callable[[Tensor, Tensor], Tensor]) -> Against:
        """This model at a batch's completion tokens, to be scored beside the student.

        Args:
            batch: A padded micro-batch.
            compares: Ways to compare the student's distribution with this model's.

        Returns:
            What `score_tokens` takes.
        """
        hidden_ND = self.hidden(batch)
        return Against(hidden_ND, self.head, compares, self.temperature)

    def _adapter_off(self) -> contextlib.AbstractContextManager[Any]:
        return self.model.disable_adapter() if self._is_base else contextlib.nullcontext()
