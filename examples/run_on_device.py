"""Runs a bundle with ONNX Runtime alone, swapping memories without reloading the backbone. Needs no torch.

python examples/run_on_device.py runs/quickstart/bundle "The capital of France is"
"""

import argparse
import sys

from koff_export import Runtime
from koff_export.errors import KoffError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("bundle", "prompt"):
        parser.add_argument(name)
    asked = parser.parse_args()
    runtime = Runtime.open(asked.bundle)
    for memory in [None, *runtime.memories]:
        text = "".join(runtime.generate(asked.prompt, memory=memory, max_new_tokens=16))
        print(f"{memory or 'no memory'}: {text!r}")


if __name__ == "__main__":
    try:
        main()
    except (KoffError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
