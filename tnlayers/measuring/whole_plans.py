"""How far a table's estimates of whole plans are off."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tnlayers.backend.rates import Rates
from tnlayers.execution.run import run
from tnlayers.formats import CP, TR, TT, Format, Tucker
from tnlayers.measuring.timing import Clock
from tnlayers.planning.plan import Plan, build_plan
from tnlayers.planning.search import Search
from tnlayers.planning.search_space import space_of
from tnlayers.planning.setting import Setting
from tnlayers.spec.geometry import Geometry

LAYERS = tuple(
    (form, *shape)
    for form in (CP(), Tucker(), TT(layout="chain"), TR())
    for shape in ((64, 28, 8, 0.1), (128, 14, 16, 0.25), (96, 20, 1, 0.2))
)
"""Format, channels, size, batch and keep ratio of each. None of these sizes is fitted."""


def _plan(
    form: Format,
    channels: int,
    size: int,
    batch: int,
    keep: float,
    rates: Rates,
    mode: str,
    device: str,
    dtype: torch.dtype,
) -> Plan:
    network, _ = form.build(*form.split(channels, channels, 1), (3, 3), keep)
    geometry = Geometry(channels, channels, (3, 3), padding=1)
    setting = Setting(batch, (size, size), mode=mode, device=device, dtype=dtype)
    search = Search(space_of(network, geometry), setting, rates)
    return build_plan(search.pricing, next(iter(search)))


def ratios(rates: Rates, device: str, dtype: torch.dtype, clock: Clock) -> Iterator[float]:
    """Yield the estimated over the measured seconds of each layer's fastest plan, in training and inference in turn."""
    generator = torch.Generator().manual_seed(0)
    for number, (form, channels, size, batch, keep) in enumerate(LAYERS):
        mode = "train" if number % 2 else "infer"
        plan = _plan(form, channels, size, batch, keep, rates, mode, device, dtype)
        shapes = [(batch, channels, size, size), *plan.network.core_shapes]
        x, *cores = (torch.randn(shape, generator=generator).to(device, dtype) / 8 for shape in shapes)
        yield plan.seconds / (_trained if mode == "train" else _inferred)(plan, x, cores, clock)


def _inferred(plan: Plan, x: Tensor, cores: list[Tensor], clock: Clock) -> float:
    with torch.no_grad():
        return clock.seconds(lambda: run(plan, x, cores))


def _trained(plan: Plan, x: Tensor, cores: list[Tensor], clock: Clock) -> float:
    leaves = [x.requires_grad_(), *(core.requires_grad_() for core in cores)]
    with torch.enable_grad():
        gradient = torch.ones_like(run(plan, x, cores).detach())
        return clock.seconds(lambda: torch.autograd.grad(run(plan, x, cores), leaves, gradient))
