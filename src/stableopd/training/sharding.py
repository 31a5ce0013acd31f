"""Weights that are shared out over the processes: sharded by FSDP2, gathered again, put back.

Each process keeps a part of every weight, of its gradient and of the optimizer's state. A layer's
weights are gathered for its pass and dropped again; embedding, final norm and head, which stand in
the group of the whole model, stay gathered from the forward pass to the end of the backward pass,
so that the loss can read the head's weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from stableopd.hidden import HOOKED, base_of, hidden_states, offer_hooked_hidden_states

__all__ = ["gathered", "like", "shard", "whole", "whole_weights"]


def shard(model: Any, device: torch.device, offloads: bool) -> None:
    """Share the weights of a model out over all processes, in place.

    Args:
        model: A transformers model with its weights on the CPU, the same in every process, or a
            PEFT model around one.
        device: Where this process computes.
        offloads: Whether the parts, their gradients and the optimizer's state live on the CPU.
    """
    inner = base_of(model)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=device.type == "cuda") if offloads else OffloadPolicy()
        ),
    }
    layers = set(inner._no_split_modules or ())
    for module in list(inner.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, reshard_after_forward=True, **options)
    fully_shard(inner, reshard_after_forward=False, **options)
    for module in _sharded(inner):
        # Losses are divided by counts of the whole step already: sum the gradients of the
        # processes, where FSDP would take their mean. By a plain sum, which gloo has, too.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    offer_hooked_hidden_states(inner)
    register_fsdp_forward_method(inner, HOOKED)
    # FSDP takes the first module that it sees computing for the root of all others.
    ids_BT = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.no_grad():
        hidden_states(model, ids_BT, torch.ones_like(ids_BT))
    for module in _sharded(inner):
        module.reshard()


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Whole weights inside: passes are no exchanges there, and each process makes its own number.

    Args:
        model: A model; where it is not sharded, nothing happens.

    Yields:
        Nothing.
    """
    modules = list(_sharded(model))
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
        for layer in modules[1:]:
            layer.set_reshard_after_forward(True, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in full; every process must ask for it where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, full: Tensor) -> Tensor:
    """A whole tensor, shared out as a parameter is.

    Args:
        parameter: A parameter, sharded or not.
        full: A tensor of its whole shape; or one that is shared out already.

    Returns:
        The tensor itself where the parameter is not sharded.
    """
    if not isinstance(parameter, DTensor) or isinstance(full, DTensor):
        return full
    mesh = parameter.device_mesh
    # Every process has read all of it, so none needs to be sent its part.
    parts = distribute_tensor(
        full.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None
    )
    return parts.to(parameter.device)


def whole_weights(model: Any, keeps: bool) -> dict[str, Tensor]:
    """The weights that a checkpoint holds, in full; every process must ask for them.

    Args:
        model: A sharded model; of one with an adapter, the adapter alone is given.
        keeps: Whether this process wants them; for the others each is dropped at once.

    Returns:
        Weights on the CPU by their names in the model; empty without `keeps`.
    """
    names = model.state_dict(keep_vars=True)
    if hasattr(model, "peft_config"):
        names = {name: weight for name, weight in names.items() if weight.requires_grad}
    found: dict[str, Tensor] = {}
    same: dict[int, Tensor] = {}
    for name, weight in names.items():
        if id(weight) not in same:  # tied weights stay tied
            full = whole(weight.detach())
            same[id(weight)] = full.cpu() if keeps else torch.empty(0)
        if keeps:
            found[name] = same[id(weight)]
    return found


def _sharded(model: Any) -> Iterator[FSDPModule]:
    """The groups of weights of a model, that of the whole model first."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))
