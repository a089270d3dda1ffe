"""The frozen model in 4 bits while memories and gates are trained around it (QLoRA, Dettmers et al. 2023).

The linear layers of the decoder are stored as NF4 with their block scales quantised too, and unpacked one at
a time in the forward and the backward pass. Scores, cut and export take the weights as they were, so only the
training sees what the quantisation lost. There is no way back: whoever needs the model whole reads it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from koff_export.errors import KoffError, is_out_of_memory
from koff_prune.units import decoder_layers


def check_installed() -> None:
    """Whether what packs weights into 4 bits is here.

    Raises:
        KoffError: It is not.
    """
    try:
        import bitsandbytes.nn  # noqa: F401
    except ImportError as error:
        raise KoffError(
            "learn.base: nf4 needs bitsandbytes: pip install bitsandbytes; or set full"
        ) from error


def quantise(model: Any) -> None:
    """Replaces the frozen linear layers of a causal LM's decoder, in place; LoRA around them stays.

    Args:
        model: Frozen, on the device it is to be trained on; PEFT may have wrapped it.

    Raises:
        KoffError: bitsandbytes is not installed, or knows no 4-bit kernels for the device.
    """
    check_installed()
    from bitsandbytes.nn import Linear4bit, Params4bit

    try:
        for layer in decoder_layers(model):
            for parent in list(layer.modules()):
                for name, module in list(parent.named_children()):
                    if type(module) is nn.Linear and not module.weight.requires_grad:
                        setattr(parent, name, _four_bits(module, Linear4bit, Params4bit))
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0][:160]
        raise KoffError(f"learn.base: nf4 does not run on this device ({reason}); set full") from error


def _four_bits(module: nn.Linear, linear: Any, params: Any) -> nn.Module:
    """A 4-bit layer of the same weight, bias and device."""
    weight = module.weight.detach()
    with torch.device("meta"):  # else it would first be filled with random numbers
        made: nn.Module = linear(
            module.in_features, module.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4"
        )
    packed = params(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    )
    made.weight = packed.to(weight.device)  # quantised on the way
    made.bias = module.bias
    return made
