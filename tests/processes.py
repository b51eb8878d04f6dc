"""Scripts in processes of their own, forked from one that has imported what takes longest of them: torch and such.

A child is as fresh as a new interpreter, but for those imports: nothing of the test's own process is in it.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from torch.distributed import TCPStore

FORKED = multiprocessing.get_context("forkserver")  # conftest.py says what it imports


def start(command: Sequence[str], cwd: Path, out: Path, environment: Mapping[str, str]) -> ForkServerProcess:
    """Start a script with its arguments; what it prints is added to a file."""
    process = FORKED.Process(target=_run, args=([*map(str, command)], cwd, out, dict(environment)))
    process.start()
    return process


def run(command: Sequence[str], cwd: Path, out: Path, environment: Mapping[str, str], ranks: int = 0) -> int:
    """Run a script to its end, in as many processes as there are ranks, as torchrun would; return the first failure."""
    if not ranks:
        (processes, store) = [start(command, cwd, out, environment)], None
    else:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # What torchrun sets. The last makes rank 0 use the store that is there, at a port that was free.
        group = {"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1"}
        group |= {"MASTER_PORT": f"{store.port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        each = ({"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(ranks))
        processes = [start(command, cwd, out, {**environment, **group, **own}) for own in each]
    left = {process.sentinel: process for process in processes}
    while left:
        for sentinel in wait([*left]):
            process = left.pop(sentinel)
            process.join()
            if process.exitcode:  # the others would wait for it
                for end in (ForkServerProcess.terminate, ForkServerProcess.kill):
                    for other in left.values():
                        end(other)
                        other.join(30)
                return process.exitcode
    return 0


def _run(command: Sequence[str], cwd: Path, out: Path, environment: Mapping[str, str]) -> None:
    """Be the script: its directory, variables, arguments and output."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    with out.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = [*command]
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
