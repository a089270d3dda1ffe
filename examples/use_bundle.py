"""Opens a bundle in torch, attaches a memory ("none": the bare backbone), and generates.

python examples/use_bundle.py runs/quickstart/bundle python "def fibonacci(n):"
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from koff_prune import KoffError, load_bundle, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("bundle", "memory", "prompt"):
        parser.add_argument(name)
    asked = parser.parse_args()
    memory = None if asked.memory == "none" else asked.memory
    model = load_bundle(asked.bundle, memory)
    tokenizer = load_tokenizer(asked.bundle, memory)  # a memory may have tokens of its own
    bos = json.loads((Path(asked.bundle) / "koff.json").read_text(encoding="utf-8"))[
        "bos"
    ]  # what memories were trained behind
    ids = ([] if bos is None else [bos]) + tokenizer(asked.prompt, add_special_tokens=False).input_ids
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    try:
        main()
    except (KoffError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
