"""Runs a bundle with ONNX Runtime alone, swapping memories without reloading the backbone. Needs no torch.

python examples/run_on_device.py runs/quickstart/bundle "The capital of France is"
"""

import sys

from koff_export import Runtime

if len(sys.argv) != 3:
    sys.exit(__doc__)
bundle, prompt = sys.argv[1:]
runtime = Runtime.open(bundle)
for memory in [None, *runtime.memories]:
    text = "".join(runtime.generate(prompt, memory=memory, max_new_tokens=16))
    print(f"{memory or 'no memory'}: {text!r}")
