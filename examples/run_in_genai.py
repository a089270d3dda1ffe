"""A bundle in onnxruntime-genai, a memory attached by its Adapters: tokens of the answer to a prompt.

Usage: python run_in_genai.py BUNDLE MEMORY PROMPT       (pip install onnxruntime-genai tokenizers)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from tokenizers import Tokenizer


def main(bundle: Path, memory: str, prompt: str) -> None:
    """Prints up to 24 greedy tokens; the memory "none" is the bare backbone."""
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    bos = json.loads((bundle / "koff.json").read_text())[
        "bos"
    ]  # what the memories were trained behind, if anything
    ids = ([] if bos is None else [bos]) + tokenizer.encode(prompt, add_special_tokens=False).ids
    model = genai.Model(str(bundle))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + 24, do_sample=False)
    generator = genai.Generator(model, settings)
    if memory != "none":
        adapters = genai.Adapters(model)
        adapters.load(str(bundle / "onnx" / "memories" / f"{memory}.onnx_adapter"), memory)
        generator.set_active_adapter(adapters, memory)
    generator.append_tokens(np.array([ids], np.int32))
    answer = []
    while not generator.is_done():
        generator.generate_next_token()
        answer.append(int(generator.get_next_tokens()[0]))
    print(" ".join(map(str, answer)))
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
