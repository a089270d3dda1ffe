"""A bundle in onnxruntime-genai, a memory attached by its Adapters: tokens of the answer to a prompt.

Usage: python run_in_genai.py BUNDLE MEMORY PROMPT       (pip install onnxruntime-genai tokenizers)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from tokenizers import Tokenizer


def main(bundle: Path, memory: str, prompt: str) -> None:
    """Prints up to 24 greedy tokens; the memory "none" is the bare backbone."""
    told = json.loads((bundle / "koff.json").read_text(encoding="utf-8"))
    if not (bundle / "genai_config.json").exists():
        raise ValueError(f"{bundle}: has no genai_config.json; export it with onnx, and take it unshipped")
    if memory not in ("none", *told["domains"]):
        raise ValueError(f"{memory}: {bundle} has no such memory; it has {', '.join(told['domains'])}")
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    bos = told["bos"]  # what the memories were trained behind, if anything
    ids = ([] if bos is None else [bos]) + tokenizer.encode(prompt, add_special_tokens=False).ids
    model = genai.Model(str(bundle))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + 24, do_sample=False)
    generator = genai.Generator(model, settings)
    if memory != "none":
        adapters = genai.Adapters(model)
        adapters.load(str(bundle / told["domains"][memory]["adapter"]), memory)
        generator.set_active_adapter(adapters, memory)
    generator.append_tokens(np.array([ids], np.int32))
    answer = []
    while not generator.is_done():
        generator.generate_next_token()
        answer.append(int(generator.get_next_tokens()[0]))
    print(" ".join(map(str, answer)))
    print(tokenizer.decode(answer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    for name in ("memory", "prompt"):
        parser.add_argument(name)
    try:
        main(**vars(parser.parse_args()))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
