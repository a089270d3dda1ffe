"""Opens a bundle in torch, attaches a memory, and generates.

python examples/use_bundle.py runs/quickstart/bundle python "def fibonacci(n):"
"""

import sys

from transformers import AutoTokenizer

from koff_prune import load_bundle

bundle, memory, prompt = sys.argv[1:4]
model = load_bundle(bundle, memory=None if memory == "none" else memory)
tokenizer = AutoTokenizer.from_pretrained(bundle)
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(out[0], skip_special_tokens=True))
