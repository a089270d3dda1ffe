"""One process against two (gloo) on one recipe: first gradients, plan, perplexity; prints and writes JSON.

    python benchmarks/processes.py [--recipe recipes/smollm2/quickstart.yaml] [--tokens 6144] [--shard]
                                   [--out benchmarks/processes.json]

Both compute in float32 with one thread a process, on real text, with the same global batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The command, with the gradients of the first step written down as they are after the processes shared them.
SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from koff_prune import ranks
from koff_prune.cli import main

path, share = Path(sys.argv.pop(1)), ranks.share_mean

def noting(tensors):
    tensors = list(tensors)
    share(tensors)
    if not ranks.rank() and not path.exists():
        save_file({str(n): t.contiguous().clone() for n, t in enumerate(tensors)}, path)

ranks.share_mean = noting
main()
"""


def run(recipe: Path, out: Path, processes: int, tokens: int, shard: bool) -> float:
    """Learns, cuts and evaluates; the seconds that it took."""
    script = out.with_suffix(".py")
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    keys = {"model.dtype": "float32", "learn.batch": 2, "learn.window": 256, "learn.tokens": tokens,
            "learn.settle_tokens": tokens // 3, "scoring.tokens": 2048, "evaluate.tokens": 4096,
            "compare": "[]"}  # fmt: skip
    command = [
        sys.executable, *(launcher if processes > 1 else []), script, out.with_suffix(".safetensors"),
        "compare", recipe, "--out", out, "--device", "cpu", *(["--shard"] if shard and processes > 1 else []),
        *(part for key, value in keys.items() for part in ("--set", f"{key}={value}")),
    ]  # fmt: skip
    begun = time.monotonic()
    subprocess.run(
        [*map(str, command)], check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return time.monotonic() - begun


def main() -> None:
    """Runs both and compares what they left."""
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/smollm2/quickstart.yaml"))
    parser.add_argument("--tokens", type=int, default=6144, help="of the joint phase")
    parser.add_argument("--shard", action="store_true", help="the two share out the frozen model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/processes.json"))
    given = parser.parse_args()
    found: dict[str, Any] = {"recipe": str(given.recipe), "tokens": given.tokens, "shard": given.shard}
    with tempfile.TemporaryDirectory() as place:
        runs = {n: Path(place) / f"run-{n}" for n in (1, 2)}
        found["seconds"] = {n: round(run(given.recipe, out, n, given.tokens, given.shard), 1)
                            for n, out in runs.items()}  # fmt: skip
        one, two = (load_file(out.with_suffix(".safetensors")) for out in runs.values())
        found["largest_gradient"] = max(float(t.abs().max()) for t in one.values())
        found["largest_gradient_difference"] = max(float((one[k] - two[k]).abs().max()) for k in one)
        plans = [json.loads((out / "plan.json").read_text()) for out in runs.values()]
        kept = [[(n, kind, unit) for n, layer in enumerate(plan["layers"]) for kind, units in layer.items()
                 for unit in units] for plan in plans]  # fmt: skip
        found["kept_units_alike"] = len(set(kept[0]) & set(kept[1])) / len(kept[0])
        rows = [json.loads((out / "report.json").read_text())["rows"][1] for out in runs.values()]
        gmeans = [row["perplexity"]["gmean"] for row in rows]
        found["gmean"] = dict(zip((1, 2), gmeans, strict=True))
        found["gmean_difference"] = abs(gmeans[1] / gmeans[0] - 1)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
