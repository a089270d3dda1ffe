"""`koff-prune` on a device that is not there: `python simulated_device.py apply recipe.yaml --device sim`.

Tensors on `sim` say so, refuse to meet a CPU tensor, and compute on the CPU underneath, so that a run on it
proves what a GPU would otherwise be needed for: that everything is on the device where it has to be. It says
nothing about kernels, speed, or memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as tree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
# CUDA takes indices from the CPU
MIXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
calls = {"sim": 0}


class Simulated(torch.Tensor):
    """A tensor that says it is on `sim`; `raw` is where its numbers are."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Simulated:
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device="sim:0",
        )  # fmt: skip
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


class _Module(_DummyBackendModule):
    """What torch asks `torch.sim`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def run(op: Any, args: Any, kwargs: Any) -> Any:
    """One operator on the numbers underneath; what comes out is on `sim`, save where it says otherwise."""
    calls["sim"] += 1
    flat, spec = tree.tree_flatten((args, kwargs))
    mine = {id(a.raw): a for a in flat if isinstance(a, Simulated)}
    if op is aten.copy_.default:
        raw_args = [a.raw if isinstance(a, Simulated) else a for a in flat]
        raw_args[0].copy_(*raw_args[1:])
        return args[0]
    if op is not aten._to_copy.default and op not in MIXED and mine:
        for a in flat:
            if isinstance(a, torch.Tensor) and not isinstance(a, Simulated) and a.dim():
                raise RuntimeError(f"{op}: expected all tensors on one device, found cpu and sim")
    raw = [_underneath(a) for a in flat]
    raw_args, raw_kwargs = tree.tree_unflatten(raw, spec)
    out = op(*raw_args, **raw_kwargs)
    target = kwargs.get("device")
    if op is aten._to_copy.default and (target or args[0].device).type == "cpu":
        return out
    return tree.tree_map(lambda t: mine[id(t)] if id(t) in mine else _wrapped(t), out)


def _underneath(value: Any) -> Any:
    if isinstance(value, Simulated):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "sim" else value


def _wrapped(value: Any) -> Any:
    return Simulated(value) if isinstance(value, torch.Tensor) else value


def main() -> None:
    """Registers the device and hands over to the command line."""
    _setup_privateuseone_for_python_backend("sim", backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
    # one thread, so that nothing depends on how the machine takes turns
    torch.autograd.set_multithreading_enabled(False)
    make = torch.tensor

    def tensor(data: Any, **kwargs: Any) -> torch.Tensor:
        """Of numbers in Python, which torch writes without asking any operator."""
        device = torch.device(kwargs.pop("device", None) or "cpu")
        return make(data, **kwargs).to(device)

    torch.tensor = tensor
    from koff_prune.cli import main as command

    try:
        command()
    finally:
        print(f"operators on sim: {calls['sim']}")


if __name__ == "__main__":
    main()
