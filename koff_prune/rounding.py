"""4-bit codes that make up for one another's rounding: GPTQ.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
algorithm 1: a matrix is rounded input by input, and what that does to its products is taken back by the
inputs that are not rounded yet, in the metric of the second moments of all. There is a scale for each block
of `koff_export.quantize`, the best of a few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from koff_export.quantize import BLOCK, LOWEST, Rounded
from koff_prune.architecture import native_dtype
from koff_prune.attach import attach_memory
from koff_prune.chat import tokens
from koff_prune.cut import load_backbone
from koff_prune.progress import bar
from koff_prune.surgeon import damping, factor
from koff_prune.units import decoder_layers

ROUNDED_ON = 4096  # tokens of each domain
MOMENTS = 2**30  # bytes of second moments at one time: a larger model's layers are read in turn
RIDGE = 0.01
SHRINKS = torch.linspace(0.75, 1.1, 15)  # of the scale that just holds a block's largest weight
# What a matrix multiplies, told by the first matrix that multiplies the same.
_INPUTS = {
    "self_attn.q_proj": ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj": ("o_proj",),
    "mlp.gate_proj": ("gate_proj", "up_proj"), "mlp.down_proj": ("down_proj",),
}  # fmt: skip


def round_matrices(
    folder: Path, texts: Mapping[str, torch.Tensor], keeps: Sequence[str]
) -> dict[str, Rounded]:
    """Codes for `quantize`, of every matrix of a bundle's backbone that has 4 bits, by its name in the graph.

    Args:
        folder: The bundle; each domain's memory is on while its text is read.
        texts: By domain, windows int64 [windows, window]; the first `ROUNDED_ON` tokens are read.
        keeps: Matrices that are not rounded to 4 bits, as `export.onnx.int4_keeps`.
    """
    model = load_backbone(folder)
    if native_dtype() == "float32":
        model = model.float()  # 16 bits would be read through float32, and slowly
    found: dict[str, Rounded] = {}
    groups = list(_groups(model, keeps))
    read = {name: windows[: max(1, ROUNDED_ON // windows.shape[1])] for name, windows in texts.items()}
    with bar("rounding", len(groups) * sum(w.numel() for w in read.values())) as progress:
        for group in groups:
            second = {path: torch.zeros(m.in_features, m.in_features) for path, m in group.items()}
            handles = [m.register_forward_pre_hook(_adds_to(second[path])) for path, m in group.items()]
            for name, windows in read.items():
                _read(model, folder / "memories" / name, windows, "lm_head" in group, progress)
            for handle in handles:
                handle.remove()
            for path in group:
                damped = second.pop(path)
                solved = inverse_factor(damped)
                for name, weight in _matrices(model, path, keeps):
                    found[name] = round_matrix(weight, solved)
    return found


def round_matrix(weight: torch.Tensor, inverse: torch.Tensor) -> Rounded:
    """One matrix [outputs, inputs] to codes uint8 [inputs, outputs] and scales float32 [blocks, outputs].

    Args:
        weight: In any dtype.
        inverse: See `inverse_factor`.
    """
    left = weight.detach().float().T.contiguous()  # [inputs, outputs]; rows change until they are rounded
    codes, scales = torch.empty(left.shape, dtype=torch.uint8), []
    for begin in range(0, len(left), BLOCK):
        block = left[begin : begin + BLOCK]
        end = begin + len(block)
        own = inverse[begin:end, begin:end]
        scale = _best_scale(block, own.diagonal())
        errors = torch.empty_like(block)
        for j in range(len(block)):
            code = (block[j] / scale).round().clamp(LOWEST, -1 - LOWEST)
            codes[begin + j] = (code - LOWEST).to(torch.uint8)
            errors[j] = (block[j] - code * scale) / own[j, j]
            block[j + 1 :] -= own[j, j + 1 :, None] * errors[j]
        left[end:] -= inverse[begin:end, end:].T @ errors
        scales.append(scale)
    return codes.numpy(), torch.stack(scales).numpy()


def _best_scale(block: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Of a few for every output, the scale of least error in a block [inputs, outputs]; float32 [outputs]."""
    largest = block.gather(0, block.abs().argmax(0, keepdim=True))[0] / LOWEST
    largest[largest == 0] = 1
    best, least = largest, torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        scale = largest * shrink
        missed = block - (block / scale).round().clamp(LOWEST, -1 - LOWEST) * scale
        error = (missed / own[:, None]).square().sum(0)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def inverse_factor(second: torch.Tensor) -> torch.Tensor:
    """Of second moments [n, n], damped: the upper Cholesky factor of their inverse, float32 [n, n]."""
    # backwards C is L L^T, so forwards its inverse is U^T U with U = L^-1 turned round: rounding cannot make
    # that indefinite, as it can an inverse that is factored in its turn
    lower = factor(second.flip(0, 1), damping(second, RIDGE).flip(0))
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False).flip(0, 1)


def _groups(model: PreTrainedModel, keeps: Sequence[str]) -> Iterator[dict[str, Any]]:
    """By path, modules whose inputs' second moments fit into `MOMENTS` together."""
    group: dict[str, Any] = {}
    size = 0
    paths = [f"model.layers.{i}.{name}" for i in range(len(decoder_layers(model))) for name in _INPUTS]
    for path in [*paths, "lm_head"]:
        if not _matrices(model, path, keeps):
            continue
        module: Any = model.get_submodule(path)
        bytes_ = 4 * module.in_features**2
        if group and size + bytes_ > MOMENTS:
            yield group
            group, size = {}, 0
        group[path] = module
        size += bytes_
    if group:
        yield group


def _matrices(model: PreTrainedModel, path: str, keeps: Sequence[str]) -> list[tuple[str, torch.Tensor]]:
    """Names in the graph, and weights, of the 4-bit matrices that multiply what the module at `path` does."""
    if path == "lm_head":
        head: Any = model.get_output_embeddings()
        tied = head.weight is model.get_input_embeddings().weight
        return [] if "head" in keeps else [("tied_head_weight" if tied else "lm_head.weight", head.weight)]
    place, _, name = path.rpartition(".")
    names = _INPUTS[f"{place.rpartition('.')[2]}.{name}"]
    return [
        (f"{place}.{each}.weight", model.get_submodule(f"{place}.{each}").weight)  # type: ignore[misc]
        for each in names if each not in keeps
    ]  # fmt: skip


def _adds_to(second: torch.Tensor) -> Any:
    def add(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0].reshape(-1, len(second)).float()
        second.addmm_(x.T, x)

    return add


@torch.no_grad()
def _read(model: PreTrainedModel, memory: Path, windows: torch.Tensor, head: bool, progress: Any) -> None:
    """Passes windows through the model with the memory on, if it is there."""
    attached = attach_memory(model, memory) if memory.exists() else None
    run = model if head else model.model
    for window in tokens(windows):
        run(input_ids=window[None], use_cache=False)
        progress(window.numel())
    if attached is not None:
        attached.unwrap()
