"""The command line of benchmarks/train.py."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import tyro
from rich.console import Console

from benchmarks.common.atomic import WriteError, check
from benchmarks.common.errors import ConfigError, DataError, RunError
from benchmarks.training import distributed
from benchmarks.training.config import Config, presets
from benchmarks.training.loop import batches
from benchmarks.training.progress import progress_bar, progress_bars, table
from benchmarks.training.records import Result, check_kept, check_new, write_results
from benchmarks.training.run import Run, processes_of, read_data

NOTHING = "nothing was trained"


@dataclass(frozen=True)
class Command:
    """Train a ResNet with dense or tensor-network convolutions."""

    config: tuple[Path, ...] = ()
    """YAML presets, one per arm. The other flags override them."""
    seeds: tuple[int, ...] | None = None
    """Run every arm once per seed; replaces --seed."""
    results: Path | None = None
    """CSV file to write, one row per run."""
    run: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)

    @property
    def runs(self) -> list[Config]:
        """The configurations, one per seed.

        Raises:
            ConfigError: a seed is negative or there twice, or there is none.
        """
        if self.seeds is None:
            return [self.run]
        if not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise ConfigError(f"seeds is {[*self.seeds]}, but one at least is needed, and none twice")
        return [replace(self.run, seed=seed) for seed in self.seeds]


def parse(arguments: Sequence[str] | None) -> list[Command]:
    """Return one command per preset. Without presets, return one command."""
    defaults = [Command(run=Config.from_yaml(path)) for path in presets(arguments)] or [Command()]
    return [tyro.cli(Command, args=arguments, default=default) for default in defaults]


def check_distinct(commands: Sequence[Command]) -> None:
    """Check that no two runs have the same directory: they would count as two seeds of one arm.

    Raises:
        ConfigError: two runs have the same directory.
    """
    taken: set[Path] = set()
    for run in (run for command in commands for run in command.runs):
        if run.directory in taken:
            raise ConfigError(
                f"arm {run.arm} with seed {run.seed} is there twice: name the presets apart (name: in the YAML)"
            )
        taken.add(run.directory)


def check_files(commands: Sequence[Command]) -> None:
    """Check before training that no checkpoint and no results would be lost.

    Raises:
        ConfigError: a checkpoint or results would be lost.
        WriteError: --results cannot be written.
    """
    runs = [run for command in commands for run in command.runs]
    if commands[0].results is not None:  # one flag for all commands
        check(commands[0].results, "results")
        check_kept(commands[0].results, runs)
    for run in runs:
        check_new(run)


@distributed.signals.obeyed()
def main(arguments: Sequence[str] | None = None) -> None:
    console = Console()
    results: list[Result] = []
    run: Run | None = None
    try:
        commands = parse(arguments)
        check_distinct(commands)
        processes = processes_of(commands[0].run)
        distributed.first(processes, partial(check_files, commands))
        sets = [read_data(command.run) for command in commands]
        for command, data in zip(commands, sets, strict=True):  # check all before training the first
            batches(command.run, data)
            with torch.device("meta"):
                command.run.network(data.channels, data.num_classes)
        main_process = processes.is_main_process
        with progress_bars(console, disable=not main_process) as progress, distributed.signals.noted():
            for command, data in zip(commands, sets, strict=True):
                for config in command.runs:
                    run = Run(config, data)
                    if config.resume and main_process:
                        told = f"{config.directory.name}: {run.beginning}"
                        progress.console.print(told, markup=False, highlight=False, soft_wrap=True)
                    results.append(run.finish(progress_bar(progress, run)))
                    if command.results is not None:
                        distributed.first(processes, partial(write_results, command.results, results))
        if main_process:
            console.print(table(results))
        processes.wait_for_everyone()
    except (ConfigError, DataError, RunError, WriteError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # from reading files, or from standard output
        sys.exit(f"error: {error}; {run.way_on if run else NOTHING}")
    except KeyboardInterrupt:
        _leave("interrupted", signal.SIGINT, run)
    except distributed.Ended as ended:
        _leave(f"ended by {ended.signal.name}", ended.signal, run)
    finally:
        distributed.leave()


def _leave(why: str, number: signal.Signals, run: Run | None) -> NoReturn:
    """Print a sentence, and exit with a shell's exit code for a signal."""
    if run is None or run.processes.is_main_process:
        print(f"{why}: {run.way_on if run else NOTHING}", file=sys.stderr)
    sys.exit(128 + number)
