"""A torch-pruning script on a grouped-query model, with koff-prune's importance and pruner.

python examples/torch_pruning_script.py MODEL TEXT_FILE [RATIO]

MODEL is a folder or hub id of a Llama, Qwen2, Qwen3 or Gemma 3 model; TEXT_FILE the text to score units on.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from koff_prune.cut import save_backbone
from koff_prune.scores import collect
from koff_prune.torch_pruning import GroupedQueryPruner, UnitImportance, read_units


def main() -> None:
    name, text = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8")
    ratio = float(sys.argv[3]) if len(sys.argv) > 3 else 0.2
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
    tokens = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt").input_ids[0][:5120]
    windows, test = tokens[:4096].split(256), tokens[4096:]
    if len(test) < 2:
        sys.exit(f"{sys.argv[2]}: {len(tokens)} tokens; give more than 4,097, to score on and to test with")

    units = read_units(model)
    statistics = collect(model, units, ["ffn_neurons"], windows)
    importance = UnitImportance("curvature", model, units, statistics)
    before, loss_before = model.num_parameters(), loss(model, test)
    pruner = GroupedQueryPruner(model, None, importance, pruning_ratio=ratio)
    for group in pruner.step(interactive=True):
        print(f"{group[0][0].target.name}: {len(group[0][1])} neurons leave")
        group.prune()
    print(f"{before:,} -> {model.num_parameters():,} parameters")
    print(f"loss {loss_before:.3f} -> {loss(model, test):.3f} on the text's last kilotoken")
    save_backbone(model, Path("pruned"))


@torch.no_grad()
def loss(model: AutoModelForCausalLM, tokens: torch.Tensor) -> float:
    return float(model(input_ids=tokens[None], labels=tokens[None]).loss)


if __name__ == "__main__":
    main()
