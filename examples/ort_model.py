"""Opens a bundle's portable ONNX graph in optimum's ORTModelForCausalLM, and compares the greedy tokens.

python examples/ort_model.py BUNDLE [PROMPT]

The bundle must have `widths: uniform`, whole attention layers and an ONNX graph. optimum-onnx needs an older
transformers, so the script makes an environment of its own (ort-env/, once) and opens the bundle there; here
it runs koff_export's Runtime.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from koff_export.errors import KoffError
from koff_export.runtime import Runtime

HOME = Path("ort-env")
PINS = ("torch==2.13.0", "transformers==4.57.6", "optimum==2.1.0", "optimum-onnx==0.1.0", "onnxruntime")
NEW_TOKENS = 16
INSIDE = """
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM
import torch
folder, ids, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder, subfolder="onnx", file_name="model.onnx", use_cache=True,
                                            use_io_binding=False)
found = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                       max_new_tokens=count, do_sample=False, repetition_penalty=1.0,
                       eos_token_id=None, pad_token_id=0)
print(json.dumps(found[0, len(ids):].tolist()))
"""


def environment() -> Path:
    """The interpreter of the environment that optimum-onnx lives in; a half-made one is made anew."""
    python = HOME / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    whole = HOME / "complete"
    if not whole.exists():
        venv.create(HOME, with_pip=True, clear=True)
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS])
        if done.returncode:
            raise KoffError(f"{HOME}: pip could not install {', '.join(PINS)}; its own words stand above")
        whole.touch()
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt", nargs="?", default="The treatment of asthma is")
    asked = parser.parse_args()
    runtime = Runtime.open(asked.bundle)
    ids = runtime.encode(asked.prompt)
    ours, text = [], list(ids)
    for _ in range(NEW_TOKENS):
        text.append(int(runtime.logits(text, None)[-1].argmax()))
        ours.append(text[-1])
    command = [environment(), "-c", INSIDE, asked.bundle, json.dumps(ids), str(NEW_TOKENS)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise KoffError(f"{asked.bundle}: optimum does not run it: {answer.stderr.strip()[-300:]}")
    theirs = json.loads(answer.stdout.splitlines()[-1])
    print("koff_export:        ", ours)
    print("ORTModelForCausalLM:", theirs)
    sys.exit(0 if ours == theirs else "the tokens differ")


if __name__ == "__main__":
    try:
        main()
    except (KoffError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
