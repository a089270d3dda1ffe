"""What a memory picked by the prompt, and several at once, are worth beside the right and a wrong one.

    python benchmarks/routing.py RUN [--windows 12] [--out benchmarks/routing.json]

RUN is a finished run with a bundle of several memories. Every domain's first held-out windows are read under
no memory, under each one, and under each two and all of them composed in equal parts; and the router picks a
memory by the first tokens of each window. Perplexities are geometric means over the domains; a routed window
counts as it is read under what was picked.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from koff_export.bundle import open_manifest
from koff_export.files import write_json
from koff_export.router import BARE
from koff_prune import load_backbone, load_bundle
from koff_prune.domains import load_blocks
from koff_prune.evaluate import window_losses
from koff_prune.memory import Memories
from koff_prune.recipe import Memory
from koff_prune.router import Router
from koff_prune.run import versions

PROMPTS = (8, 16, 64)  # tokens that the router sees


def read_under(bundle: Path, memory: str | None, windows: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Nats per token of every window, by its domain."""
    if memory is None:
        attached = Memories(load_backbone(bundle), Memory(lora=None, kv=None), {}, 0)
    else:
        attached = load_bundle(bundle, memory).__dict__["koff_memories"]
    return {domain: window_losses(attached, block, memory) for domain, block in windows.items()}


def perplexity(found: dict[str, list[float]]) -> float:
    """Geometric mean over the domains."""
    return round(math.exp(mean(mean(losses) for losses in found.values())), 3)


def averaged(rows: list[list[float]]) -> list[float]:
    """Window by window, the mean over several readings."""
    return [mean(column) for column in zip(*rows, strict=True)]


def measured(run: Path, count: int) -> dict[str, Any]:
    """All of it, of one run."""
    bundle = run / "bundle"
    domains = open_manifest(bundle).domains
    if any(told.tokens for told in domains.values()):
        raise SystemExit(f"{bundle}: its memories read text by tokens of their own, and cannot be composed")
    names = list(domains)
    windows = {name: load_blocks(run / "domains" / f"{name}.safetensors").heldout[:count] for name in names}
    several = ["+".join(part) for n in range(2, len(names) + 1) for part in itertools.combinations(names, n)]
    table = {memory or BARE: read_under(bundle, memory, windows) for memory in (None, *names, *several)}
    wrong = {d: averaged([table[n][d] for n in names if n != d]) for d in names}
    pairs = [(set(memory.split("+")), table[memory]) for memory in several if memory.count("+") == 1]
    with_right = {d: averaged([found[d] for pair, found in pairs if d in pair]) for d in names}
    result: dict[str, Any] = {
        "windows": {name: list(block.shape) for name, block in windows.items()},
        "perplexity": {
            "no memory": perplexity(table[BARE]),
            "the right memory": perplexity({d: table[d][d] for d in names}),
            "a wrong memory": perplexity(wrong),
            "the right one and another, in equal parts": perplexity(with_right),
            "all, in equal parts": perplexity(table["+".join(names)]),
        },
        "nats": {
            memory: {d: round(mean(rows), 4) for d, rows in found.items()} for memory, found in table.items()
        },
        "router": {},
    }
    router = Router(bundle)
    for prompt in PROMPTS:
        picked = {d: [router.choose_tokens(row[:prompt].tolist()).memory or BARE for row in block]
                  for d, block in windows.items()}  # fmt: skip
        routed = {d: [table[pick][d][i] for i, pick in enumerate(picks)] for d, picks in picked.items()}
        result["router"][f"{prompt} tokens"] = {
            "right": round(mean(mean(pick == d for pick in picks) for d, picks in picked.items()), 3),
            "perplexity": perplexity(routed),
        }
    return result


def main() -> None:
    """See the module's own words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--windows", type=int, default=12, help="of each domain")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "routing.json")
    args = parser.parse_args()
    result = measured(args.run, args.windows)
    write_json(args.out, {"command": "python " + " ".join(sys.argv), "versions": versions(), **result})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
