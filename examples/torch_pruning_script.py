"""A torch-pruning script on a grouped-query model, with koff-prune's importance and pruner.

python examples/torch_pruning_script.py MODEL TEXT_FILE [RATIO]

MODEL is a folder or hub id of a Llama, Qwen2, Qwen3 or Gemma 3 model; TEXT_FILE the text to score units on.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from koff_prune import KoffError
from koff_prune.cut import save_backbone
from koff_prune.scores import collect
from koff_prune.torch_pruning import GroupedQueryPruner, UnitImportance, read_units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("ratio", type=float, nargs="?", default=0.2)
    asked = parser.parse_args()
    text, ratio = asked.text.read_text(encoding="utf-8"), asked.ratio
    model = (
        AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval().requires_grad_(False)
    )
    tokens = AutoTokenizer.from_pretrained(asked.model)(text, return_tensors="pt").input_ids[0][:5120]
    windows, test = tokens[:4096].split(256), tokens[4096:]
    if len(test) < 2:
        raise KoffError(f"{asked.text}: {len(tokens)} tokens; give over 4,097, to score on and to test with")

    units = read_units(model)
    statistics = collect(model, units, ["ffn_neurons"], windows)
    importance = UnitImportance("curvature", model, units, statistics)
    before, loss_before = model.num_parameters(), loss(model, test)
    pruner = GroupedQueryPruner(model, None, importance, pruning_ratio=ratio)
    for group in pruner.step(interactive=True):
        print(f"{group[0][0].target.name}: {len(group[0][1])} neurons leave")
        group.prune()
    print(f"{before:,} -> {model.num_parameters():,} parameters")
    after = loss(model, test)
    print(f"loss {loss_before:.3f} -> {after:.3f} on the {len(test):,} tokens after those scored on")
    save_backbone(model, Path("pruned"))
    print("written to pruned/, for koff_prune.load_backbone: its layers differ in width")


@torch.no_grad()
def loss(model: AutoModelForCausalLM, tokens: torch.Tensor) -> float:
    return float(model(input_ids=tokens[None], labels=tokens[None]).loss)


if __name__ == "__main__":
    try:
        main()
    except (KoffError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
