"""Opens a bundle in torch, attaches a memory, and generates.

python examples/use_bundle.py runs/quickstart/bundle python "def fibonacci(n):"
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from koff_prune import load_bundle

if len(sys.argv) != 4:
    sys.exit(__doc__)
bundle, memory, prompt = sys.argv[1:]
model = load_bundle(bundle, memory=None if memory == "none" else memory)
tokenizer = AutoTokenizer.from_pretrained(bundle)
bos = json.loads((Path(bundle) / "koff.json").read_text())[
    "bos"
]  # what the memories were trained behind, if anything
ids = ([] if bos is None else [bos]) + tokenizer(prompt, add_special_tokens=False).input_ids
out = model.generate(
    torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
)
print(tokenizer.decode(out[0], skip_special_tokens=True))
