"""The frozen model shared out over the processes while memories and gates are trained (FSDP2).

Every process keeps its part of each decoder layer and borrows the rest for the length of that layer's forward
and backward pass. What is trained stays whole everywhere. There is no way back: a model that was sharded is
thrown away after its training, and whoever needs it whole reads it again.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from koff_prune import ranks
from koff_prune.device import device_of
from koff_prune.units import decoder_layers


def shard(model: Any) -> None:
    """Shares out a causal LM's frozen parameters in place; embeddings and head stay whole in every process.

    Args:
        model: The same in all processes, on the device it is to be trained on, memories included.
    """
    mesh = init_device_mesh(device_of(model).type, (ranks.world(),))
    whole = {p for p in model.parameters() if p.requires_grad}
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    decoder: nn.Module = model.model
    fully_shard(decoder, mesh=mesh, ignored_params=set(_outside(model)) | whole)


def _outside(model: Any) -> list[nn.Parameter]:
    """Parameters of no decoder layer."""
    inside = {id(p) for layer in decoder_layers(model) for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]
