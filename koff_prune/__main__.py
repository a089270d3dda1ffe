"""`koff-prune`, and `python -m koff_prune`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of both; an interruption while the program is being imported is one word, as later on."""
    try:
        from koff_prune.cli import main as command
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
