"""Train a dense and a tensor-ring ResNet-20, and compare their signals: python benchmarks/training/demo.py.

Prints a table and writes a picture, runs/demo.png. It shows the losses, and the signal of every convolution in the
untrained network: initialised by the solver, by two common rules, and with dense convolutions.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tnlayers
from benchmarks.common.errors import ConfigError, DataError, RunError
from benchmarks.common.initialisations import CORES
from benchmarks.common.rows import REPOSITORY
from benchmarks.common.sizes import convolutions
from benchmarks.training.config import Config
from benchmarks.training.data.official_files import NUM_CLASSES
from benchmarks.training.progress import progress_bar, progress_bars
from benchmarks.training.records import Result
from benchmarks.training.run import Run

CONFIGS = (REPOSITORY / "configs" / "digits-dense.yaml", REPOSITORY / "configs" / "digits-tr.yaml")
PICTURE = Path("runs") / "demo.png"
DRAWS = 5  # networks per initialisation in the picture
IMAGES = 128  # number of images to measure the signal on

kaiming = CORES["kaiming"]  # common without a solver: torch's rule for a dense weight, on every core
small = CORES["normal 0.02"]  # also common: the same small normal distribution for every core

BLUE, GREY, ORANGE, PURPLE = "#0072b2", "#5f6368", "#d55e00", "#8e44ad"
DOTTED = (0, (1, 1.5))


def signal(model: nn.Module, images: Tensor) -> Tensor:
    """Return E[x^2] and E[y^2], mean squares of input and output of every convolution: shape (2, convolutions)."""
    squares: list[tuple[float, float]] = []

    def look(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        squares.append((inputs[0].square().mean().item(), output.square().mean().item()))

    hooks = [conv.register_forward_hook(look) for conv in convolutions(model)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return torch.tensor(squares, dtype=torch.float64).T


def gains(config: Config, images: Tensor) -> Tensor:
    """Return E[y^2] / E[x^2] of every convolution before the first training step."""
    x, y = signal(config.network(images.shape[1], NUM_CLASSES).double(), images)
    return y / x


def depth_profile(config: Config, images: Tensor, redraw: Callable[[Tensor], object] | None = None) -> Tensor:
    """Return E[y^2] of every convolution without normalisation, of shape (DRAWS, convolutions).

    Normalisation rescales every layer's output, which hides the effect of the initialisation. Double precision is
    needed because bad rules exceed the range of single precision.
    """
    profiles = []
    for seed in range(DRAWS):
        model = replace(config, seed=seed).network(images.shape[1], NUM_CLASSES, norm=nn.Identity)
        if redraw:
            torch.manual_seed(seed)
            for layer in convolutions(model):
                for core in layer.cores if isinstance(layer, tnlayers.TensorLayer) else ():  # the stem is dense
                    redraw(core)
        profiles.append(signal(model.double(), images)[1])
    return torch.stack(profiles)


def draw_losses(axes: Axes, results: Sequence[Result], colours: Sequence[str]) -> None:
    """Draw training and test loss per epoch."""
    for result, colour in zip(results, colours, strict=True):
        epochs = [row["epoch"] for row in result.history]
        train, test = ([row[key] for row in result.history] for key in ("train_loss", "loss"))
        axes.plot(epochs, train, color=colour, lw=2)
        axes.plot(epochs, test, color=colour, lw=1.2, ls=DOTTED)
    # In the first epochs, batch normalisation's running averages lag behind, and the test loss is outside the limits.
    axes.set(yscale="log", ylim=(None, 5), xlabel="epoch", ylabel="cross-entropy")
    axes.set_title("Training loss,\nwith batch normalisation", fontsize=10, fontweight="bold")
    lines = [
        Line2D([], [], color=GREY, ls=style, label=label) for label, style in (("training", "-"), ("test", DOTTED))
    ]
    axes.legend(handles=lines, frameon=False)


def draw_profiles(axes: Axes, profiles: dict[str, tuple[str, Tensor]]) -> None:
    """Draw E[y^2] by depth: the geometric mean over draws as a line, their range as a band."""
    for label, (colour, profile) in profiles.items():
        depth = torch.arange(1, profile.shape[1] + 1)
        axes.fill_between(depth, profile.amin(0), profile.amax(0), color=colour, alpha=0.15, lw=0)
        width = 5 if label == "dense" else 2  # the next line lies on it
        axes.plot(depth, profile.log().mean(0).exp(), color=colour, lw=width, marker="o", ms=3, label=label)
    axes.set(yscale="log", xlabel="convolution, from the image on")
    title = "Second moment of the signal\nbefore the first step,\nnormalisation taken out"
    axes.set_title(title, fontsize=10, fontweight="bold")


def picture(results: Sequence[Result], images: Tensor, path: Path) -> None:
    """Write the picture. It is as wide as a page of the site, so its font has that size there."""
    dense, ring = (result.config for result in results)
    row = results[1].row
    share = 100 * row["parameters"] / row["dense_parameters"]
    figure = Figure(figsize=(6.4, 4.4), dpi=200, layout="constrained")
    losses, profiles = figure.subplots(1, 2, width_ratios=(1, 1.2))
    draw_losses(losses, results, (GREY, BLUE))
    draw_profiles(
        profiles,
        {
            "dense": (GREY, depth_profile(dense, images)),
            f"tensor ring, {share:.0f} % of the parameters": (BLUE, depth_profile(ring, images)),
            "the ring, Kaiming's rule for each core": (ORANGE, depth_profile(ring, images, kaiming)),
            "the ring, std 0.02 for each core": (PURPLE, depth_profile(ring, images, small)),
        },
    )
    for axes in (losses, profiles):
        axes.grid(color="#e8e8e8", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    figure.legend(
        handles=profiles.get_lines(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9.5,
        columnspacing=1.4,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def table(results: Sequence[Result], images: Tensor) -> Table:
    """Return a table with one column per network."""
    table = Table("ResNet-20 on digits", *(result.config.arm for result in results))
    rows = [result.row for result in results]
    signals = [gains(result.config, images) for result in results]
    table.add_row("test accuracy", *(f"{row['accuracy']:.2%}" for row in rows))
    table.add_row("parameters", *(f"{row['parameters']:,}" for row in rows))
    table.add_row("  of the dense network's", *(f"{row['parameters'] / row['dense_parameters']:.1%}" for row in rows))
    table.add_row("keep ratio of the convolutions", *(f"{row['keep_ratio']:.3f}" for row in rows))
    table.add_row("E(y²) / E(x²) of a convolution at step 0", *(f"{g.log().mean().exp():.2f}" for g in signals))
    table.add_row("  smallest to largest", *(f"{g.min():.2f} to {g.max():.2f}" for g in signals))
    table.add_row("seconds, beside each other", *(f"{row['seconds']:.0f}" for row in rows))
    return table


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    console = Console()
    try:
        runs = [Run(replace(Config.from_yaml(path), out=PICTURE.parent, overwrite=True)) for path in CONFIGS]
        with progress_bars(console) as progress, ThreadPoolExecutor() as pool:
            results = list(pool.map(Run.finish, runs, [progress_bar(progress, run) for run in runs]))
    except (ConfigError, DataError, RunError, OSError) as error:
        sys.exit(f"error: {error}")
    images = runs[0].normalise(runs[0].data.train_images[:IMAGES]).double()
    console.print(table(results, images))
    picture(results, images, PICTURE)
    console.print(f"picture: {PICTURE}")


if __name__ == "__main__":
    main()
