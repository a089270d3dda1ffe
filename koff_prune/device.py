"""The device that models compute on, chosen once for a process (`--device`).

Gates, plans, statistics and the closed-form solves stay on the CPU, as does whatever is written; models go to
the device with their memories, and windows follow them.
"""

from __future__ import annotations

import gc
import os
from typing import Any, TypeVar

import torch
from torch import nn

from koff_export.errors import KoffError

M = TypeVar("M", bound=nn.Module)


class _State:
    device = torch.device("cpu")


def use(name: str | None) -> None:
    """Takes a device: `cpu`, `cuda`, `cuda:1`, …; `auto` or None: a CUDA GPU where there is one.

    Of several processes on one machine each takes a GPU of its own.

    Raises:
        KoffError: torch has no such device here.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1) > 1:
            raise KoffError(f"--device: each of several processes takes a GPU of its own; say {device.type}")
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0") or 0))
        float(torch.zeros(1, device=device))  # "meta" makes tensors and computes nothing
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:  # a CPU build of torch asserts
        reason = str(error).splitlines()[0][:160]
        reason = "torch has no such kind of device" if reason.startswith("Expected one of") else reason
        raise KoffError(f"--device: {name!r} cannot be used here ({reason}); name another, or cpu") from error
    _State.device = device


def device() -> torch.device:
    """The one in use."""
    return _State.device


def on_device(model: M) -> M:
    """The model, on the device in use."""
    if _State.device.type != "cpu":  # hooks and memories hold each other: what is done with still lies there
        gc.collect()
        if _State.device.type == "cuda":
            torch.cuda.empty_cache()
    return model.to(_State.device)


def device_of(model: Any) -> torch.device:
    """Where a model is."""
    found: torch.device = next(model.parameters()).device
    return found
