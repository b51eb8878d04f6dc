"""What kind of device this machine has, and its name."""

import platform
import re
from functools import cache
from pathlib import Path

import torch

_ZEN5 = 26
"""First family number of AMD's processors with this core."""


def kind_of(device: str) -> str:
    """Return the kind of a device type, by which rate tables are named: a CPU's has its instruction set.

    AMD's processors since Zen 5 are a kind of their own: their convolutions (oneDNN) use the whole width of AVX512, but
    the matrix products (MKL) do not, and take twice the time per FLOP. <!-- setting -->

    The meta device has no speed. Plans for it are those of this machine's CPU.

    Example:
        >>> kind_of("cuda"), kind_of("cpu").startswith("cpu "), kind_of("meta") == kind_of("cpu")
        ('cuda', True, True)
    """
    if device not in ("cpu", "meta"):
        return device
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    if instructions == "default":
        return f"cpu {platform.machine().lower() or instructions}"
    return f"cpu {instructions} zen5" if instructions == "avx512" and amd_family() >= _ZEN5 else f"cpu {instructions}"


def file_words(*words: str) -> str:
    """Return words as a part of a file's name.

    Example:
        >>> file_words("cpu avx512", "Some(R) CPU @ 2.0GHz", "float32")
        'cpu-avx512-some-r-cpu-2-0ghz-float32'
    """
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def name_of(device: str) -> str:
    """Return the name of this machine's device of a type: the processor's model, or the GPU's."""
    if device == "cuda" and torch.cuda.is_available():
        return " ".join(torch.cuda.get_device_name().split())
    return _processor() if device in ("cpu", "meta", "mps") else device


def amd_family() -> int:
    """Return the family number of an AMD processor; 0 for others and where the system does not say."""
    found = facts()
    family = found.get("cpu family", "")
    return int(family) if found.get("vendor_id") == "AuthenticAMD" and family.isdigit() else 0


def _processor() -> str:
    name = facts().get("model name") or platform.processor() or platform.machine() or "unknown"
    return " ".join(name.split())


@cache
def facts() -> dict[str, str]:
    """Return what Linux says of the first processor; nothing on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, value in pairs}
