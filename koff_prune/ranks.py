"""Several processes on one run: each trains on its share of every batch, the first one writes.

A launcher (torchrun) starts the same command several times. All of them walk through the same stages; what is
not training is done by the first while the others wait, and is then found on the disk by them. Gradients are
shared here and not by DistributedDataParallel, which cannot accumulate over domains whose memories take
turns: to transformers and accelerate every process is alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from koff_export.errors import KoffError
from koff_prune.device import device
from koff_prune.progress import console, say

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
             "ROLE_WORLD_SIZE", "NODE_RANK")  # fmt: skip


# While the first process scores, cuts or exports, the others wait; a dead one is told by its closed socket.
PATIENCE = timedelta(days=30)


class _State:
    rank, world = 0, 1
    sharded = False  # whether training shares out the frozen model
    depth = 0  # of nested turns
    training = False  # here alone may one process fail without the others
    lost = False  # another: this one is on its way out


def join(shard: bool = False) -> None:
    """Takes the place that a launcher gave this process; without one, nothing but what accelerate is told.

    Args:
        shard: Share out the frozen model while training (`sharding`).

    Raises:
        KoffError: The launcher's variables are no numbers, or there is nobody to share with.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # DeepSpeed, torch.compile and the like are of others' training loops
    try:
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    except ValueError as error:
        raise KoffError("WORLD_SIZE and RANK must be numbers, as torchrun sets them; unset them") from error
    if world < 2 or _State.world > 1:
        if shard and world < 2:
            raise KoffError("--shard: there is one process; start several with torchrun or accelerate launch")
        return
    _State.sharded = shard
    kind = device().type
    backend = "gloo"
    if kind != "cpu":
        backend = f"cpu:gloo,{kind}:{distributed.get_default_backend_for_device(kind)}"
    distributed.init_process_group(backend, rank=rank, world_size=world, timeout=PATIENCE)
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    _State.rank, _State.world = rank, world
    if rank:
        console.quiet = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    say(f"{world} processes on one run")


def leave() -> None:
    """Ends what `join` began."""
    if _State.world > 1 and distributed.is_initialized():
        distributed.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return _State.world


def rank() -> int:
    """This process's place, 0 for the first."""
    return _State.rank


def sharded() -> bool:
    """Whether training shares out the frozen model over the processes."""
    return _State.sharded


def speaks() -> bool:
    """Whether this process tells its failure: the first does, and any that may be the only one to fail."""
    return _State.rank == 0 or _State.training


def _wait() -> None:
    """For the others; where one of them is gone, it has said why."""
    try:
        distributed.barrier()
    except RuntimeError as error:
        raise _lost() from error


def _lost() -> KoffError:
    _State.lost = True
    return KoffError(
        f"process {_State.rank} of {_State.world} lost another; see its message, then use --resume"
    )


@contextmanager
def turn() -> Iterator[None]:
    """The first process does the block while the others wait; then they do it, and find its files."""
    _State.depth += 1
    try:
        if _State.depth > 1 or _State.world == 1:
            yield
            return
        if _State.rank:
            _wait()
        yield
        if not _State.rank:
            _wait()
        _wait()  # nobody runs ahead into what the others still read
    finally:
        _State.depth -= 1


@contextmanager
def training() -> Iterator[None]:
    """Marks the block in which every process has work of its own."""
    _State.training = True
    try:
        yield
    except RuntimeError as error:
        # gloo tells a lost neighbour as a RuntimeError of its sockets
        if _State.world > 1 and any(word in str(error) for word in ("gloo", "Connection", "recv", "peer")):
            raise _lost() from error
        raise
    _State.training = False


def has_lost_another() -> bool:
    """Whether another process is gone, so that this one is leaving already."""
    return _State.lost


def agree(answer: bool) -> bool:
    """The first process's answer, for all."""
    if _State.world == 1 or _State.depth:
        return answer
    told = torch.tensor([int(answer)])
    distributed.broadcast(told, 0)
    return bool(told)


def any_of(answer: bool) -> bool:
    """Whether any process says so."""
    if _State.world == 1:
        return answer
    told = torch.tensor([int(answer)])
    distributed.all_reduce(told)
    return bool(told)


def sum_of(count: int) -> int:
    """The sum of every process's count."""
    if _State.world == 1:
        return count
    total = torch.tensor([count])
    distributed.all_reduce(total)
    return int(total)


def share_mean(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces tensors by their mean over all processes, in place; float32, the same shapes everywhere.

    They may be on several devices: each device's go as one.
    """
    if _State.world == 1:
        return
    found = list(tensors)
    for place in {t.device: None for t in found}:  # in the same order everywhere
        here = [t for t in found if t.device == place]
        flat = torch.cat([t.reshape(-1) for t in here])
        distributed.all_reduce(flat)
        flat /= _State.world
        at = 0
        for tensor in here:
            tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()
