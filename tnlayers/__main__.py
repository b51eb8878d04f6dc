"""The command line: ``python -m tnlayers rates`` and ``python -m tnlayers info``."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from tnlayers.backend.rate_tables import VARIABLE
from tnlayers.measuring.info import info
from tnlayers.measuring.measure import DTYPES, measure_rates
from tnlayers.measuring.timing import keep_freed_memory


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one sentence, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m tnlayers", description="Tensor-network layers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{rates,info}")
    rates = commands.add_parser(
        "rates",
        help="measure this machine's device for the planner",
        description="Measure the speed of operations on this machine's device, print it, and keep it for the planner. "
        "The device should do nothing else meanwhile.",
    )
    rates.add_argument("--device", default="cpu", help="cpu, cuda, mps or another device type of torch; default: cpu")
    rates.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    rates.add_argument("--seconds", type=float, default=50, help="how long to measure; default: 50")
    file = rates.add_mutually_exclusive_group()
    file.add_argument(
        "--out", metavar="FILE", help=f"write this file instead of the one in the user's cache, which {VARIABLE} moves"
    )
    file.add_argument("--dry-run", action="store_true", help="measure and print, and write nothing")
    commands.add_parser(
        "info",
        help="print versions, devices, threads, rate tables and tuned settings",
        description="Print what a report of a bug needs: versions, devices, threads, rate tables and tuned settings.",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error ends the process with one sentence and exit code 2."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command == "info":
        print(info())
        return
    keep_freed_memory()
    try:
        found = measure_rates(
            given.device, getattr(torch, given.dtype), given.seconds, path=given.out, save=not given.dry_run
        )
    except OSError as error:
        parser.error(str(error) if error.strerror is None else f"{error.filename} cannot be written: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; nothing was written\n")
    print(found)
    print("nothing was written" if found.path is None else f"written to {found.path}", file=sys.stderr)


if __name__ == "__main__":
    main()
