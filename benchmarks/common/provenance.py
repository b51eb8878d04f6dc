"""Provenance of results: machine, versions and commit in every row of every results file."""

import argparse
import csv
import io
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tnlayers
from benchmarks.common.atomic import WriteError, check, write
from benchmarks.common.rows import REPOSITORY

WRITTEN_BY_BENCHMARKS = ("benchmarks/results", "README.md")  # written results must not mark the next ones "dirty"


def provenance(device: str = "cpu") -> dict[str, str]:
    """Return what is needed to judge or repeat a run on `device`. It names no host, user or path.

    Returns:
        machine, versions of Python, torch and tnlayers, commit ("+dirty" with uncommitted changes), date (UTC).
    """
    return {
        "machine": _gpu(device) if torch.device(device).type == "cuda" else _cpu(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # torch.__version__ is a subclass of str
        "tnlayers": tnlayers.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def csv_file(text: str) -> Path:
    """Return the path of an argument, and check before measuring that it can be written.

    Raises:
        argparse.ArgumentTypeError: the file cannot be written.
    """
    try:
        check(Path(text), "out")
    except WriteError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def write_csv(path: Path, rows: Sequence[dict[str, Any]], device: str = "cpu") -> None:
    """Write rows with the same keys as a CSV file. Rows without provenance get the current one.

    Raises:
        WriteError: the file cannot be written. Its old content is untouched.
    """
    here = provenance(device)
    complete = [row | here | row for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, complete[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(complete)
    write(path, text.getvalue().encode())


def _gpu(device: str) -> str:
    return torch.cuda.get_device_name(device)


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} {'thread' if threads == 1 else 'threads'}"


@cache
def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", os.fspath(REPOSITORY), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in WRITTEN_BY_BENCHMARKS))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # not a git checkout, or a machine without git
    return f"{commit}+dirty" if changes else commit
