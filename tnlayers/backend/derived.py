"""Rate tables derived from properties of a device: estimates, for devices that nobody has measured.

Every rate is a multiple of three numbers: the seconds to start an operation, the peak of FLOPs per second, and the
bytes per second of the memory. The multiples are constants. Those of CPUs are rounded means over the two measured CPUs
(AVX2 and AVX512, float32). Those of accelerators come from how their libraries work, and were not measured on any.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from tnlayers.backend.devices import name_of
from tnlayers.backend.rates import CONTRACT, KEPT, MOVE, WEIGHTS, Rate, Rates, lanes

TF32 = "tf32"
"""Name among the dtypes for float32 rounded to 10 bits, in which cuDNN convolves by default."""

DOUBT = 0.15
"""Safety margin for the dense kernel, as of the measured table with the largest errors."""

_GLIBC = 1 << 25, 3.3e-10
"""``large`` and ``fault`` of the measured CPUs."""


@dataclass(frozen=True)
class DeviceProperties:
    """What the rates of a device are derived from.

    Attributes:
        name: of the device.
        flops: peak FLOPs per second by dtype, with tensor cores where they serve it. 'float32' is without them; it
            stands for dtypes that are not there.
        bandwidth: bytes per second of the memory.
        launch: seconds to start one operation, including torch's own work on the CPU.
        tensor_cores: whether there are matrix units.
        lanes: number to whose multiples convolutions round up channels.
        cpu: whether it is a CPU.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    launch: float
    tensor_cores: bool
    lanes: int
    cpu: bool = False


class _Multiples(NamedTuple):
    """What one kind of operation costs: launches, inverse of its share of the peak, and bytes moved per byte.

    Training has launches and bytes of its own. Its FLOPs are those of a forward and two gradients, three times as many.
    """

    launches: float
    work: float
    traffic: float
    launches_train: float
    traffic_train: float


_BACKWARD = 3.0

_ON_CPU = {
    # oneDNN copies channels-first images into blocks and back: more launches and bytes than channels last.
    "conv first": _Multiples(5, 1.2, 1.5, 12, 6.5),
    "conv last": _Multiples(3.3, 1.2, 1.3, 9.5, 4),
    "point first": _Multiples(5, 1.2, 2.6, 12, 8.5),
    "point last": _Multiples(3.3, 1.2, 1, 9.5, 3.3),
    "group first": _Multiples(5, 1.2, 2.5, 12, 8.5),
    "group last": _Multiples(3.3, 1.2, 2.8, 10, 9.8),
    "depth first": _Multiples(5, 1.2, 2.5, 12, 7.8),
    "depth last": _Multiples(3.3, 1.2, 1.1, 9.5, 3.4),
    # One small image goes through another convolution, which starts faster.
    "conv single": _Multiples(1, 1.2, 4, 2.6, 4),
    "point single": _Multiples(0.8, 1.2, 2.5, 2.6, 4),
    "matmul first first": _Multiples(1.2, 1.2, 1.3, 2.8, 5),
    "matmul first last": _Multiples(1.2, 1.2, 1.25, 2.8, 5.5),
    "matmul last first": _Multiples(1.2, 1.2, 1.4, 2.8, 5.5),
    "matmul last last": _Multiples(1.2, 1.2, 1.25, 2.5, 6),
    # One small product per group, whose rows lie apart.
    "matmul group": _Multiples(1.8, 1.2, 9, 2.8, 25),
    # Cores are small: a permutation of each operand is a large part.
    WEIGHTS: _Multiples(1.5, 1.2, 3.5, 3, 10),
    CONTRACT: _Multiples(0.7, 0, 0, 7.5, 0),
    MOVE: _Multiples(1, 0, 1, 1.4, 2),
}

# Accelerators. A call of a library costs two launches of a plain kernel, and cuDNN's choice of an algorithm one more.
# Of the peak, a large product reaches about two thirds and a convolution half. Grouped ones get no tensor cores and a
# fifth of the vector units. A backward reads and writes everything three times: the input, the weight, the output.
_CONV, _MATMUL, _GROUP = _Multiples(3, 2, 1.3, 9, 4), _Multiples(2, 1.5, 1.3, 6, 4), _Multiples(3, 5, 1.5, 9, 4.5)
_ON_ACCELERATOR = {
    # Channels first are transposed for the tensor cores, and back.
    "conv first": _CONV._replace(traffic=2, traffic_train=6),
    "conv last": _CONV,
    "point first": _CONV._replace(traffic=2, traffic_train=6),
    "point last": _CONV,
    "group first": _GROUP,
    "group last": _GROUP,
    "depth first": _GROUP,
    "depth last": _GROUP,
    "conv single": _CONV._replace(traffic=2, traffic_train=6),
    "point single": _CONV._replace(traffic=2, traffic_train=6),
    "matmul first first": _MATMUL,
    "matmul first last": _MATMUL,
    "matmul last first": _MATMUL,
    "matmul last last": _MATMUL,
    "matmul group": _MATMUL._replace(work=4, traffic=2, traffic_train=6),
    # A product and the permutation of an operand; small, so far from the peak.
    WEIGHTS: _Multiples(2, 4, 2, 6, 6),
    # Views and checks in Python; in training also a function of autograd.
    CONTRACT: _Multiples(1, 0, 0, 6, 0),
    MOVE: _Multiples(1, 0, 1.3, 2, 2.6),
}


def derive(properties: DeviceProperties, dtype: str) -> Rates:
    """Return estimated rates of a device in a dtype.

    Example:
        >>> phone = DeviceProperties("a GPU", {"float32": 1e12}, 50e9, 20e-6, tensor_cores=False, lanes=1)
        >>> derive(phone, "float32").infer["matmul last last"]
        Rate(call=4e-05, flop=1.5e-12, byte=2.6e-11)
    """
    multiples = _ON_CPU if properties.cpu else _ON_ACCELERATOR
    large, fault = _GLIBC if properties.cpu and platform.system() == "Linux" else (KEPT, 0.0)
    tables: dict[str, dict[str, Rate]] = {"train": {}, "infer": {}}
    for kind, each in multiples.items():
        peak = _peak(properties, kind, dtype)
        for mode, launches, work, traffic in (
            ("train", each.launches_train, _BACKWARD * each.work, each.traffic_train),
            ("infer", each.launches, each.work, each.traffic),
        ):
            tables[mode][kind] = Rate(launches * properties.launch, work / peak, traffic / properties.bandwidth)
    train, infer = (MappingProxyType(tables[mode]) for mode in ("train", "infer"))
    return Rates(lanes(*(properties.lanes,) * 3), large, fault, DOUBT, train, infer)


def _peak(properties: DeviceProperties, kind: str, dtype: str) -> float:
    """Return the peak that a kind of operation is measured by."""
    flops, vector = properties.flops, properties.flops["float32"]
    if kind.startswith(("group", "depth")) and properties.tensor_cores:
        return flops.get(dtype, vector) if dtype == "float64" else vector
    if kind == WEIGHTS and dtype in ("float16", "bfloat16"):  # cores contract in float32, as under autocast
        return vector
    if dtype == "float32" and kind.startswith(("conv", "point")):
        return flops.get(TF32, vector)
    return flops.get(dtype, vector)


# ------------------------------------------------------------------ properties of this machine's devices


class _Generation(NamedTuple):
    """A generation of NVIDIA's multiprocessors: units per multiprocessor, from the vendor's public data sheets.

    ``half`` is FLOPs per cycle of the tensor cores in float16 without sparsity, summed in float32; 0 without tensor
    cores. ``bandwidth`` is GB/s per multiprocessor of a usual card, where torch does not say the memory's clock.
    """

    cores: int
    doubles: int
    half: int
    bandwidth: float


_GENERATIONS = {
    (5, 0): _Generation(128, 4, 0, 12),
    (6, 0): _Generation(64, 32, 0, 13),
    (6, 1): _Generation(128, 4, 0, 16),
    (7, 0): _Generation(64, 32, 1024, 11),
    (7, 5): _Generation(64, 2, 1024, 8),
    (8, 0): _Generation(64, 32, 2048, 17),
    (8, 6): _Generation(128, 2, 512, 11),
    (8, 7): _Generation(128, 2, 2048, 13),
    (8, 9): _Generation(128, 2, 512, 8),
    (9, 0): _Generation(128, 64, 4096, 25),
    (10, 0): _Generation(128, 64, 8192, 54),
    (12, 0): _Generation(128, 2, 512, 10),
}
"""By compute capability. One that is not there takes the values of the nearest before it."""

_CLOCK = 1.5e9
"""Cycles per second of a GPU, where torch does not say."""

_LAUNCH, _LAUNCH_INTEGRATED = 6e-6, 20e-6
"""Seconds of one eager operation: mostly the work of a CPU. Beside an integrated GPU, that CPU is a slow one."""

_VECTOR = {"avx512": 16, "avx2": 8}
_CYCLE = {"avx512": 48, "avx2": 32}
"""FLOPs per cycle and core. With AVX512, processors have one or two units of 32: the mean."""

_CPU_CLOCK, _CPU_BANDWIDTH, _CPU_LAUNCH = 2.5e9, 15e9, 25e-6
"""Cycles per second; bytes per second of one thread; seconds of one eager operation."""

_CHANNELS = 8
"""Number of threads that fill the memory's bandwidth."""


def properties_of(device: str) -> DeviceProperties:
    """Return the properties of this machine's device of a type, as far as torch says them."""
    if device in ("cpu", "meta"):
        return of_cpu(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability().lower())
    if device == "cuda" and torch.cuda.is_available() and torch.version.cuda:
        return of_cuda(torch.cuda.get_device_properties(torch.cuda.current_device()))
    if device == "mps":  # the least of Apple's own
        return DeviceProperties("an Apple GPU", MappingProxyType({"float32": 2.6e12}), 68e9, 20e-6, False, 1)
    flops = MappingProxyType({"float32": 5e12})
    return DeviceProperties(f"a device {device!r} of middle size", flops, 2e11, 15e-6, False, 1)


def of_cpu(threads: int, capability: str) -> DeviceProperties:
    """Return the properties of a CPU with a number of threads and an instruction set as torch names it."""
    single = threads * _CPU_CLOCK * _CYCLE.get(capability, 16)
    flops = MappingProxyType({"float32": single, "float64": single / 2})
    bandwidth = min(threads, _CHANNELS) * _CPU_BANDWIDTH
    return DeviceProperties(name_of("cpu"), flops, bandwidth, _CPU_LAUNCH, False, _VECTOR.get(capability, 4), cpu=True)


def of_cuda(found: Any) -> DeviceProperties:
    """Return the properties of what ``torch.cuda.get_device_properties`` returns.

    The stubs of torch 2.13 and 2.14 name the clocks and the width of the bus. Where they are missing or 0, values of
    the generation stand for them.
    """
    capability = found.major, found.minor
    generation = _GENERATIONS[max([key for key in _GENERATIONS if key <= capability], default=min(_GENERATIONS))]
    clock = 1e3 * (getattr(found, "clock_rate", 0) or 0) or _CLOCK  # they are in kHz
    memory, width = (getattr(found, name, 0) or 0 for name in ("memory_clock_rate", "memory_bus_width"))
    bandwidth = 2e3 * memory * width / 8 or 1e9 * generation.bandwidth * found.multi_processor_count
    cycles = clock * found.multi_processor_count
    flops = {"float32": 2 * cycles * generation.cores, "float64": 2 * cycles * generation.doubles}
    if generation.half:
        flops["float16"] = cycles * generation.half
        if capability >= (8, 0):  # older ones have neither
            flops |= {"bfloat16": flops["float16"], TF32: max(flops["float16"] / 2, flops["float32"])}
    launch = _LAUNCH_INTEGRATED if getattr(found, "is_integrated", 0) else _LAUNCH
    tensor_cores = bool(generation.half)
    return DeviceProperties(
        " ".join(found.name.split()), MappingProxyType(flops), bandwidth, launch, tensor_cores, 8 if tensor_cores else 1
    )
