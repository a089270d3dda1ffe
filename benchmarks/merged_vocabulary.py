"""What a merged bundle gains and loses by its domain's tokens alone: size, perplexity, speed.

python benchmarks/merged_vocabulary.py RUN [--coverage 0.999] [--precision int8] [--domain NAME] [--out FILE]

RUN is a finished run. Every domain's memory is merged twice, with all tokens of the run and with those that
`export.merged_vocabulary` leaves, into RUN/merged/. Both are open in one process and take turns (see
bundle_speed.py); a token of the smaller vocabulary is a little less text, so that characters are counted too.
Writes benchmarks/merged_vocabulary.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bundle_speed import in_a_process, size_mb, tell
from engines import Case

import koff_prune
from koff_export.bundle import open_manifest
from koff_prune.chat import tokens
from koff_prune.evaluate import perplexities, read_losses
from koff_prune.losses import heldout_counts
from koff_prune.run import finished_run, versions

HERE = Path(__file__).parent
TOKENS, ROUNDS, PROMPT = 16, 5, 16


def merged(run: Path, domain: str, coverage: float | None, precision: str) -> Path:
    """One domain's memory merged, with the tokens of this coverage; made once."""
    place = run / "merged" / f"{domain}-{coverage or 'all'}"
    if not place.exists():
        onnx = f"export.onnx={{precision: [fp32, {precision}], profiles: [portable, fused]}}"
        asked = [f"export.merged_vocabulary={coverage or 'none'}", "export.formats=[safetensors, onnx]", onnx]
        recipe = koff_prune.load_recipe(run / "recipe.yaml", asked, check_files=False)
        made = run / f"bundle-{domain}"
        koff_prune.export(recipe, run, resume=True, merge=domain)
        place.parent.mkdir(exist_ok=True)
        made.rename(place)
    return place


def characters(bundle: Path, text: str) -> float:
    """Characters that a token is of, in this text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle, local_files_only=True)
    return len(text) / len(tokenizer(text, add_special_tokens=False)["input_ids"])


def compare(run: Path, domain: str, coverage: float, precision: str) -> dict[str, Any]:
    """Both bundles of one domain."""
    places = {str(c or "all"): merged(run, domain, c, precision) for c in (None, coverage)}
    with finished_run(run) as found:
        counts, blocks = heldout_counts(found), found.domains
        losses = read_losses(run / "losses.json", {name: len(b.heldout) for name, b in blocks.items()})
        whole = perplexities(losses, counts)[domain]
        text = found.dense.tokenizer.decode(
            tokens(blocks[domain].heldout).flatten(), skip_special_tokens=True
        )
    result: dict[str, Any] = {"characters": len(text)}
    for name, place in places.items():
        manifest = open_manifest(place)
        told = manifest.told.get("vocabulary", {"kept": None, "perplexity": whole})
        file = size_mb(Case("onnx", str(place), None, "in_place", precision))
        result[name] = {
            "tokens": told["kept"],
            "parameters": manifest.parameters["slim"],
            "file_mb": round(file, 1),
            "perplexity": round(told["perplexity"], 3),
            "characters_per_token": round(characters(place, text), 3),
        }
    cases = {name: Case("onnx", str(place), None, "in_place", precision) for name, place in places.items()}
    raced = in_a_process("race", cases, TOKENS, ROUNDS, 1, [PROMPT], [1])
    result["speed"] = tell(raced, TOKENS)
    return result


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--coverage", type=float, default=0.999)
    parser.add_argument("--precision", default="int8", choices=["fp16", "int8", "int4"])
    parser.add_argument("--domain", action="append", help="only this one; repeatable")
    parser.add_argument("--out", type=Path, default=HERE / "merged_vocabulary.json")
    args = parser.parse_args()
    names = args.domain or list(koff_prune.load_recipe(args.run / "recipe.yaml", check_files=False).domains)
    words = [args.run.name if word == str(args.run) else word for word in sys.argv[1:]]
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/merged_vocabulary.py", *words]),
        "versions": versions(), "coverage": args.coverage, "precision": args.precision, "domains": {},
    }  # fmt: skip
    for name in names:
        found = result["domains"][name] = compare(args.run, name, args.coverage, args.precision)
        print(name, json.dumps(found), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
