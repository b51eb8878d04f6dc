"""Measuring of a rate table: ``measure_rates``, and ``python -m tnlayers rates``."""

import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from types import MappingProxyType

import torch

from tnlayers import validate
from tnlayers.backend.devices import kind_of, name_of
from tnlayers.backend.rate_files import MEASURED, RateTable
from tnlayers.backend.rate_tables import own_file, table_of, write
from tnlayers.backend.rates import BASES, KINDS, ROWS, SINGLE, Rate, in_form
from tnlayers.backend.whole_files import check_writable
from tnlayers.measuring.fit import fit
from tnlayers.measuring.samples import FAMILIES, Sampler
from tnlayers.measuring.timing import Clock
from tnlayers.measuring.whole_plans import ratios

DTYPES = ("float32", "bfloat16", "float16", "float64")

FEWEST = 4
"""Minimum number of samples of each kind, whatever time they take."""

_SHARE, _LONGEST, _BUDGET = 0.9, 0.02, 0.1
"""Share of the time for samples; the rest is for whole plans. Maximum seconds of a forward, and of all its repeats."""

_Rows = dict[str, list[tuple[float, float, float]]]


@dataclass(frozen=True, eq=False)
class MeasuredRates:
    """What ``measure_rates`` found; ``print`` shows it.

    Attributes:
        table: the table: kind of device, dtype, date and rates.
        errors: median relative error of the fit and number of samples, by mode ('train', 'infer') and kind.
        ratios: estimated over measured seconds of whole plans, of layers that were not fitted.
        path: the file that holds the table; None if it was not written.
        skipped: kinds that the device does not compute in this dtype, with torch's reason. The table has no row of its
            own for them, or that of the table that was there.
    """

    table: RateTable
    errors: Mapping[tuple[str, str], tuple[float, int]]
    ratios: tuple[float, ...]
    path: Path | None
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"rates: {self.table}", "microseconds per call, per million FLOPs, per megabyte; error of the fit"]
        for (mode, kind), (error, number) in self.errors.items():
            rate = self.table.rates.of(mode)[kind]
            numbers = f"{1e6 * rate.call:9.3g} {1e12 * rate.flop:9.3g} {1e12 * rate.byte:9.3g}"
            lines.append(f"{mode:6} {kind:24} {numbers}  {error:5.0%} in the median of {number} samples")
        lines += [f"not measured: {kind}, as torch says: {reason}" for kind, reason in self.skipped.items()]
        low, high = min(self.ratios), max(self.ratios)
        lines.append(
            f"whole plans of {len(self.ratios)} layers that were not fitted: estimate over time "
            f"{statistics.median(self.ratios):.2f} in the median, {low:.2f} to {high:.2f}"
        )
        return "\n".join(lines)


def measure_rates(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 50,
    progress: bool = True,
    *,
    path: str | os.PathLike[str] | None = None,
    save: bool = True,
) -> MeasuredRates:
    """Measure the speed of operations on this machine's device, and keep it for the planner of later processes.

    Random operations of every kind are timed, forward, and forward with backward: convolutions with 1 to 3 spatial
    axes, transposed and grouped ones, matrix products of linear layers and over positions, contractions of cores, and
    copies. Seconds per call, per FLOP and per byte are fitted to them. The device should do nothing else meanwhile.
    Processes that start later plan with the table; this one may have plans already, and keeps the rates that it has.

    Args:
        device: 'cpu', 'cuda', 'mps' or another device type of torch. Of several GPUs, the current one.
        dtype: float32, bfloat16, float16 or float64.
        seconds: how long to measure. Operations of each kind are timed at least four times, so a short run may take
            longer than this.
        progress: whether to count on stderr, where that is a terminal.
        path: the file to write instead of the one in the user's cache; not with ``save=False``.
        save: whether to write a file.

    Returns:
        MeasuredRates: the table, errors of the fits, and how far estimates of whole plans are off.

    Raises:
        TypeError, ValueError: an argument is not as above, or torch finds no such device.
        OSError: the file cannot be written.

    Example:
        >>> found = measure_rates("cpu", torch.bfloat16)  # doctest: +SKIP
        >>> print(found)  # how far the fits of every kind, and estimates of whole plans, are off  # doctest: +SKIP
    """
    _check(device, dtype, seconds)
    progress, save = validate.boolean("progress", progress), validate.boolean("save", save)
    if path is not None and not save:
        raise ValueError(f"path is {os.fspath(path)!r}, and save is False; give a path only with save=True")
    name = str(dtype).removeprefix("torch.")
    target = (Path(path) if path is not None else own_file(device, name)) if save else None
    if target is not None:
        check_writable(target)  # before the work
    before = table_of(device, name)
    infer, train, skipped, clock = _timed(device, dtype, before, _SHARE * seconds, progress)
    rates: dict[str, Mapping[str, Rate]] = {}
    errors: dict[tuple[str, str], tuple[float, int]] = {}
    for mode, rows in (("train", train), ("infer", infer)):
        rates[mode], found = _fitted(rows, before.rates.of(mode))
        errors |= {(mode, kind): each for kind, each in found.items()}
    shares = sorted(error for error, _ in errors.values())
    table = RateTable(
        kind_of(device),
        name,
        MEASURED,
        name_of(device),
        replace(before.rates, train=rates["train"], infer=rates["infer"]),
        torch.get_num_threads(),
        str(torch.__version__),
        datetime.now(UTC).strftime("%Y-%m-%d"),
        sum(map(len, infer.values())),
        f"{shares[0]:.0%} to {shares[-1]:.0%}",
        (
            "lanes, large, fault and doubt are those of the table that was there.",
            *([f"not measured: {', '.join(skipped)}"] if skipped else []),
        ),
    )
    off = tuple(ratios(table.rates, device, dtype, clock))
    if target is not None:
        write(table, target)
    return MeasuredRates(table, MappingProxyType(errors), off, target, MappingProxyType(skipped))


def _check(device: str, dtype: torch.dtype, seconds: float) -> None:
    if not isinstance(device, str) or not device.isalpha():
        kind = ValueError if isinstance(device, str) else TypeError
        raise kind(f"device is {device!r}; it must be a device type such as 'cpu', 'cuda' or 'mps'")
    if device == "meta":
        raise ValueError("device is 'meta', which computes nothing; accepted: 'cpu', 'cuda', 'mps'")
    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"device is {device!r}, and torch finds no such device here") from None
    if dtype not in (accepted := [getattr(torch, name) for name in DTYPES]):
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(map(str, accepted))}")
    try:
        torch.zeros(1, device=device, dtype=dtype)
    except (RuntimeError, TypeError):
        raise ValueError(f"dtype is {dtype!r}, which device {device!r} does not have") from None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"seconds is {seconds!r}; it must be a number above 0")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds is {seconds!r}; it must be a number above 0")


def _timed(
    device: str, dtype: torch.dtype, before: RateTable, seconds: float, progress: bool
) -> tuple[_Rows, _Rows, dict[str, str], Clock]:
    """Time operations.

    Returns:
        Rows of FLOPs, bytes and seconds by kind, of forwards, and of forwards with backwards; the kinds that never ran,
        with the reason; and the clock.
    """
    start, shown = time.perf_counter(), progress and sys.stderr.isatty()
    sampler, clock = Sampler(device, dtype, before.rates, _LONGEST), Clock(device, _BUDGET)
    infer: _Rows = defaultdict(list)
    train: _Rows = defaultdict(list)
    failed: dict[str, str] = {}
    needed = [kind for kind in (*KINDS, *BASES) if device == "cpu" or not kind.endswith(SINGLE)]
    for family in cycle(FAMILIES):
        if time.perf_counter() - start > seconds and all(
            len(infer[kind]) >= FEWEST or kind in failed for kind in needed
        ):
            break
        for sample in sampler.samples(family):
            try:
                forward, both = clock.passes(sample.forward, sample.both)
            except RuntimeError as error:  # no such operation in this dtype, or no memory left
                failed.setdefault(sample.kind, str(error).partition("\n")[0])
                continue
            sampler.learn(sample, max(forward, both / 3))
            infer[sample.kind].append((sample.flops, sample.bytes, forward))
            train[sample.kind].append((sample.flops, sample.bytes, both))
        if shown:
            passed, number = time.perf_counter() - start, sum(map(len, infer.values()))
            print(f"\r{passed:.0f} of {seconds:.0f} s, {number} operations", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)
    return infer, train, {kind: why for kind, why in failed.items() if not infer[kind]}, clock


def _fitted(
    rows: Mapping[str, Sequence[tuple[float, float, float]]], before: Mapping[str, Rate]
) -> tuple[Mapping[str, Rate], dict[str, tuple[float, int]]]:
    """Return the rate of each kind, and the error of its fit with the number of samples.

    A kind without samples keeps the rate that was there; if it is one of ``BASES``, it has none.
    """
    rates: dict[str, Rate] = {}
    errors = {}
    for kind in (*KINDS, *BASES):
        # Only CPUs have another convolution for one small image.
        source = kind if rows.get(kind) or kind in BASES else kind.replace(SINGLE, "first")
        if rows.get(source):
            numbers, error = fit(rows[source])
            rates[kind], errors[kind] = Rate(*numbers), (error, len(rows[source]))
        elif kind in KINDS:
            rates[kind] = before[kind]
    # With few channels per group, memory traffic hides the cost of a FLOP.
    for form in ("", ROWS):
        group, plain = in_form("matmul group", form), in_form("matmul last last", form)
        if group in rates and plain in rates:
            rates[group] = replace(rates[group], flop=max(rates[group].flop, rates[plain].flop))
    return MappingProxyType(rates), errors
