"""Progress bars of runs, and the final table."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from benchmarks.training.loop import Loop
from benchmarks.training.records import Result


class _Speed(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} img/s", style="progress.data.speed")


def progress_bars(console: Console, disable: bool = False) -> Progress:
    """Return bars that show epoch, training loss and accuracy, images per second, and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        _Speed(),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        disable=disable,
    )


def progress_bar(progress: Progress, run: Loop) -> Callable[..., None]:
    """Add a bar for a run, and return the run's report function."""
    name = f"{run.config.arm} seed {run.config.seed}"
    task = progress.add_task(name, total=run.images, completed=run.images_done, status="")

    def report(advance: int, epoch: int, loss: float, accuracy: float) -> None:
        progress.update(task, advance=advance, status=f"epoch {epoch:2d}  loss {loss:.3f}  acc {accuracy:6.1%}")

    return report


def table(results: Sequence[Result]) -> Table:
    """Return a table with one line per run."""
    splits = " or ".join(sorted({result.config.split for result in results}))
    table = Table("run", "accuracy", "parameters", "keep ratio", "seconds", title=f"accuracy on the {splits} images")
    for result in results:
        row = result.row
        table.add_row(
            result.config.directory.name,
            f"{row['accuracy']:.2%}",
            f"{row['parameters']:,}",
            f"{row['keep_ratio']:.3f}",
            f"{row['seconds']:.0f}",
        )
    return table
