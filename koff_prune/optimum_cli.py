"""`optimum-cli koff …`: the commands of koff-prune under optimum's command line.

The wheel ships this file as `optimum/commands/register/register_koff.py` too, where optimum-cli looks for
plugins. It is read at every start of optimum-cli, so it imports nothing of ours before it is asked to.
"""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class KoffCommand(BaseOptimumCLICommand):
    """Hands everything after `koff` to koff-prune: the same options, sentences and exit codes."""

    COMMAND = CommandInfo(
        name="koff", help="Prune a language model into one backbone and a memory per domain."
    )
    args: Any

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Leaves all arguments alone, `--help` included: the command line behind knows them."""
        parser.prefix_chars = "\0"  # no argument begins with it, so none is taken for an option here
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Runs koff-prune in this process."""
        from koff_prune.cli import main

        sys.argv = ["optimum-cli koff", *self.args.arguments]
        main()


REGISTER_COMMANDS = [KoffCommand]
