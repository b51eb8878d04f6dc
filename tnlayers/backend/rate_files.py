"""Rate tables as files: a header of ``# key: value`` lines, a row for each mode and kind, and a last line.

Every kind of ``KINDS`` has a row in both modes. Those of ``BASES`` may be missing, in both modes.

The units of the rows are microseconds per call, per million FLOPs, and per megabyte.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tnlayers.backend.rates import BASES, KINDS, Rate, Rates, lanes

FORMAT = 1
"""Version of the file format."""

COLUMNS, END = "mode,kind,call,flop,byte", "# end"
_MODES = "train", "infer"
_UNITS = 1e-6, 1e-12, 1e-12
_KEYS = (
    "format", "device", "dtype", "origin", "machine", "threads", "torch", "date", "samples", "errors", "lanes", "large",
    "fault", "doubt",
)  # fmt: skip
MEASURED, DERIVED = "measured", "derived"


@dataclass(frozen=True, eq=False)
class RateTable:
    """Rates of one kind of device in one dtype, and where they come from.

    Attributes:
        device: kind of device, such as 'cpu avx512' or 'cuda'.
        dtype: name of the dtype, such as 'float32'.
        origin: 'measured', or 'derived' from properties of the device; the latter are estimates.
        machine: name of the processor or GPU.
        rates: what the planner reads.
        threads, torch, date, samples: how it was measured.
        errors: median relative errors of the fits, the least and the largest over the kinds.
        notes: remarks.
    """

    device: str
    dtype: str
    origin: str
    machine: str
    rates: Rates
    threads: int = 0
    torch: str = ""
    date: str = ""
    samples: int = 0
    errors: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        source = f"measured {self.date}" if self.origin == MEASURED else f"estimated from properties of {self.machine}"
        return f"{self.device} {self.dtype}, {source}"


def written(table: RateTable) -> str:
    """Return the text of a table's file."""
    rates = table.rates
    values = [
        FORMAT, table.device, table.dtype, table.origin, table.machine, table.threads, table.torch, table.date,
        table.samples, table.errors, ", ".join(f"{name} {number}" for name, number in rates.lanes.items()),
        rates.large, f"{rates.fault:g}", f"{rates.doubt:g}",
    ]  # fmt: skip
    lines = [f"# {key}: {value}" for key, value in zip(_KEYS, values, strict=True)]
    lines += [f"# note: {note}" for note in table.notes]
    lines.append(COLUMNS)
    for mode in _MODES:
        for kind, rate in rates.of(mode).items():
            numbers = zip((rate.call, rate.flop, rate.byte), _UNITS, strict=True)
            lines.append(",".join((mode, kind, *(f"{number / unit:.3g}" for number, unit in numbers))))
    return "\n".join([*lines, END, ""])


def parsed(text: str) -> RateTable:
    """Return the table of a file's text.

    Raises:
        ValueError: the text is not a whole and valid table. The message is the reason, without a full stop.
    """
    if not text.startswith("# format: "):
        raise ValueError("it is no rate table")
    lines = text.split("\n")
    if (version := lines[0].removeprefix("# format: ")) != str(FORMAT):
        raise ValueError(f"its format is {version[:20]!r}, and this version reads {FORMAT}")
    if lines[-2:] != [END, ""]:
        raise ValueError("its end is missing")
    try:
        start = lines.index(COLUMNS)
    except ValueError:
        raise ValueError(f"it lacks the line {COLUMNS!r}") from None
    pairs = [line.removeprefix("# ").partition(": ")[::2] for line in lines[:start]]
    head = {key: value for key, value in pairs if key != "note"}
    if missing := [key for key in _KEYS if key not in head]:
        raise ValueError(f"its header lacks {missing[0]!r}")
    if head["origin"] not in (MEASURED, DERIVED):
        raise ValueError(f"its origin is {head['origin']!r}; accepted: '{MEASURED}', '{DERIVED}'")
    modes = _rows(lines[start + 1 : -2])
    multiples = dict(part.split(" ") for part in head["lanes"].split(", ") if part.count(" ") == 1)
    if [*multiples] != ["first", "last", "single"]:
        raise ValueError(f"its lanes are {head['lanes']!r}; accepted: 'first 16, last 8, single 1' and other numbers")
    rates = Rates(
        lanes(*(_whole(f"lanes {name}", value, 1) for name, value in multiples.items())),
        large=_whole("large", head["large"], 1),
        fault=_number("fault", head["fault"]),
        doubt=_number("doubt", head["doubt"]),
        train=modes["train"],
        infer=modes["infer"],
    )
    return RateTable(
        head["device"], head["dtype"], head["origin"], head["machine"], rates, _whole("threads", head["threads"]),
        head["torch"], head["date"], _whole("samples", head["samples"]), head["errors"],
        tuple(value for key, value in pairs if key == "note"),
    )  # fmt: skip


def _rows(lines: list[str]) -> Mapping[str, Mapping[str, Rate]]:
    found: dict[str, dict[str, Rate]] = {mode: {} for mode in _MODES}
    for line in lines:
        mode, _, rest = line.partition(",")
        kind, *numbers = rest.split(",")
        if mode not in _MODES or kind not in (*KINDS, *BASES) or len(numbers) != len(_UNITS):
            raise ValueError(f"it has the line {line[:60]!r}")
        if kind in found[mode]:
            raise ValueError(f"it has two rows for {kind!r} in {mode!r}")
        values = [_number(f"rate of {kind!r} in {mode!r}", number) for number in numbers]
        if not any(values):
            raise ValueError(f"its rates of {kind!r} in {mode!r} are all 0")
        found[mode][kind] = Rate(*(value * unit for value, unit in zip(values, _UNITS, strict=True)))
    for mode, table in found.items():
        if missing := [kind for kind in KINDS if kind not in table]:
            raise ValueError(f"it lacks {missing[0]!r} in {mode!r}")
        if alone := [kind for other in found.values() for kind in other if kind not in table]:
            raise ValueError(f"it lacks {alone[0]!r} in {mode!r}, and has it in the other mode")
    return {mode: MappingProxyType(table) for mode, table in found.items()}


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"its {name} is {text[:20]!r}, which is no number of at least 0")
    return value


def _whole(name: str, text: str, minimum: int = 0) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 20 or int(text) < minimum:
        raise ValueError(f"its {name} is {text[:20]!r}, which is no integer of at least {minimum}")
    return int(text)
