"""What a bundle's graphs compute beside torch, and what few bits cost beside float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from koff_export.bundle import open_manifest
from koff_export.errors import KoffError
from koff_prune.attach import attach_memory
from koff_prune.cut import load_backbone
from koff_prune.memory import load_memory

TOLERANCE = 1e-3  # of logits, torch float32 against ONNX Runtime
CHECKED = 24  # tokens of random text that graphs are held against torch on
SHORT = 256  # tokens of a domain's text that precisions are measured on: its logits must fit in memory


def numerics(folder: Path, offered: tuple[Path, Path] | None = None) -> dict[str, float]:
    """Largest logit difference between torch (float32) and ONNX Runtime, without and with every memory.

    Every profile of the graph counts.

    Args:
        folder: The bundle.
        offered: Only a memory that is not in the bundle yet, named "offered": its folder and its
            `.onnx_adapter`.
    """
    from koff_export.runtime import Runtime

    manifest = open_manifest(folder)
    assert manifest.graph is not None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, min(manifest.graph.vocab_size, 30_000), (1, CHECKED), generator=generator)
    places: dict[str | None, Path | None]
    if offered is not None:
        places = {"offered": offered[0]}
    elif manifest.merged is not None:  # what is left of it, the learned KV, is in the graph
        places = {
            None: folder / "memories" / manifest.merged if manifest.merged in manifest.domains else None
        }
    else:
        places = {None: None, **{name: folder / "memories" / name for name in manifest.domains}}
    texts = {name: _with_own(ids, place, manifest.graph.vocab_size) for name, place in places.items()}
    expected = _torch_logits(folder, texts, places)
    result = dict.fromkeys(expected, 0.0)
    for profile in manifest.graph.profiles:  # torch is gone by now: one model in memory at a time
        runtime = Runtime.open(folder, verify=False, profile=profile, mapped=True)
        if offered is not None:
            runtime.memory("offered", offered[1], offered[0] / "tokenizer.json")
        for name, logits in expected.items():
            found = runtime.logits(texts[name][0].tolist(), name)
            worst = np.abs(found - logits).max()
            result[name] = float(np.maximum(result[name], worst))  # what is not a number stays so
        del runtime
    return {name or "none": worst for name, worst in result.items()}


def checked_numerics(folder: Path, called: str) -> dict[str, float]:
    """`numerics` of a bundle, which is called so in messages.

    Raises:
        KoffError: A difference is above `TOLERANCE`, or no number.
    """
    found = numerics(folder)
    for name, worst in found.items():
        if not worst <= TOLERANCE:
            raise KoffError(
                f"{called}: with memory {name} ONNX differs from torch by {worst:.2g}, more than {TOLERANCE};"
                " leave onnx out of export.formats"
            )
    return found


def _with_own(ids: torch.Tensor, memory: Path | None, backbone: int) -> torch.Tensor:
    """The same text, int64 [1, tokens], every third token of it one of a memory's own where it has any."""
    own = len(load_memory(memory).get("tokens", {}).get("embedding", ())) if memory is not None else 0
    result = ids.clone()
    if own:
        result[0, ::3] = backbone + torch.arange(len(result[0, ::3])) * 7 % own
    return result


@torch.no_grad()
def _torch_logits(
    folder: Path, texts: Mapping[str | None, torch.Tensor], places: Mapping[str | None, Path | None]
) -> dict[str | None, np.ndarray]:
    """Logits [tokens, vocabulary] of the backbone in float32, by name, with the memory in each place."""
    model, result = load_backbone(folder), {}
    for name, place in places.items():
        attached = attach_memory(model, place) if place is not None else None
        with _in_float32(model):
            result[name] = model(input_ids=texts[name], use_cache=False).logits[0].float().numpy()
        if attached is not None:
            model = attached.unwrap()
    return result


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Computes in float32 and holds one module's weights in it at a time: the model may fill the memory."""
    before: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def widen(module: nn.Module, args: object) -> None:
        before[module] = dict(module._parameters)
        for name, tensor in before[module].items():
            if tensor is not None:
                module._parameters[name] = nn.Parameter(tensor.float(), requires_grad=False)

    def restore(module: nn.Module, args: object, output: object) -> None:
        module._parameters.update(before.pop(module))

    handles = []
    for module in [m for m in model.modules() if m._parameters]:
        handles += [
            module.register_forward_pre_hook(widen),
            module.register_forward_hook(restore, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def accuracy(
    folder: Path, texts: Mapping[str, Sequence[int]], profile: str = "portable"
) -> dict[str, dict[str, float]]:
    """What each precision of a bundle's graph loses, with every memory on its own domain's text.

    Args:
        folder: The bundle.
        texts: By domain, tokens of held-out text; the first `SHORT` of each are used.
        profile: Whose graphs.

    Returns:
        By precision: `kl`, the mean KL divergence from float32 in nats per token (0 for fp32 itself), and
        `perplexity`. Empty without texts.

    Raises:
        KoffError: A graph computes what is no number.
    """
    from koff_export.runtime import Runtime

    manifest = open_manifest(folder)
    assert manifest.graph is not None
    short = {name: list(text[:SHORT]) for name, text in texts.items()}
    if not short:
        return {}
    reference: dict[str, np.ndarray] = {}
    result: dict[str, dict[str, float]] = {}
    for precision in sorted(manifest.graph.precisions, key=lambda name: name != "fp32"):
        mapped = precision == "fp32"  # the model may fill the memory
        runtime = Runtime.open(folder, precision, verify=False, profile=profile, mapped=mapped)
        kl, nats = [], []
        for name, tokens in short.items():
            found = _log_softmax(runtime.logits(tokens, None if manifest.merged else name)[:-1])
            exact = reference.setdefault(name, found)
            kl.append((np.exp(exact) * (exact - found)).sum(1))
            nats.append(-found[np.arange(len(found)), tokens[1:]])
        lost, mean = float(np.concatenate(kl).mean()), float(np.concatenate(nats).mean())
        if not (math.isfinite(lost) and math.isfinite(mean)):
            raise KoffError(
                f"the {profile} graph in {precision} computes what is no number; leave {precision} out of"
                " export.onnx.precision"
            )
        result[precision] = {"kl": lost, "perplexity": math.exp(min(mean, 700))}
    return result


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
