"""`python -m koff_prune`."""

from koff_prune.cli import main

if __name__ == "__main__":
    main()
