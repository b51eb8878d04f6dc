"""Rates of linear, 1d, 3d and transposed layers: their own where a table has them, else those of images."""

from dataclasses import replace

import pytest

from tnlayers.backend.rate_tables import shipped
from tnlayers.backend.rates import BASES, Rate
from tnlayers.formats import TR, TT
from tnlayers.planning.plan import build_plan
from tnlayers.planning.search import Search
from tnlayers.planning.search_space import space_of
from tnlayers.planning.setting import Setting
from tnlayers.spec.geometry import Geometry

LAYERS = {
    "rows": (Geometry(256, 512, ()), 64, ()),
    "1d": (Geometry(64, 64, (10,), 5, 5), 4, (400,)),
    "3d": (Geometry(32, 32, (3, 3, 3), padding=1), 2, (12, 12, 12)),
    "transposed": (Geometry(64, 64, (4, 4), 2, 1, transposed=True), 8, (14, 14)),
    "": (Geometry(64, 64, (3, 3), padding=1), 8, (14, 14)),
}


def measured(factor: float):
    """A shipped table, and that with a row for every kind of a form, slower than its base by a factor."""
    rates = shipped()["cpu avx512", "float32"].rates
    tables = {}
    for mode in ("train", "infer"):
        table = rates.of(mode)
        more = {
            kind: Rate(*(factor * number for number in (table[base].call, table[base].flop, table[base].byte)))
            for kind, base in BASES.items()
        }
        tables[mode] = {**table, **more}
    return rates, replace(rates, **tables)


def searches(form, rates, strategy, mode="train"):
    """The searches for a layer of a form, in two formats."""
    geometry, batch, size = LAYERS[form]
    for format in (TR(), TT(layout="chain")):
        channels = format.split(geometry.in_channels, geometry.out_channels, 1)
        network, _ = format.build(*channels, geometry.kernel_size, 0.2)
        yield Search(space_of(network, geometry), Setting(batch, size, mode=mode), rates, strategy)


def plans(form, rates, strategies=("auto", "reconstruct", "factorized"), mode="train"):
    """The plans of these layers."""
    for strategy in strategies:
        for search in searches(form, rates, strategy, mode):
            yield build_plan(search.pricing, next(iter(search)))


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("form", LAYERS)
def test_a_table_without_a_form_plans_as_one_in_which_it_is_as_fast_as_images(form, mode):
    without, same = measured(1)
    for one, other in zip(plans(form, without, mode=mode), plans(form, same, mode=mode), strict=True):
        assert one.order == other.order
        assert one.seconds == pytest.approx(other.seconds, rel=1e-12)
        assert {step.kind for step in one.steps}.isdisjoint(BASES)
        assert [BASES.get(step.kind, step.kind) for step in other.steps] == [step.kind for step in one.steps]


def test_steps_take_the_rates_of_their_form():
    _, own = measured(1)
    expected = {
        "rows": {"matmul rows last last", "matmul rows group"},
        "1d": {"conv 1d first"},
        "3d": {"conv 3d first", "conv 3d last"},
        "transposed": {"conv transposed first", "conv transposed last"},
        "": set(),
    }
    for form, kinds in expected.items():
        found = {step.kind for plan in plans(form, own, ("factorized", "reconstruct")) for step in plan.steps}
        assert found & {*BASES} <= {kind for kind in BASES if kind.split()[1] == form}
        assert bool(found & kinds) is bool(kinds), found
        if form == "rows":  # it has nothing else
            assert found <= kinds


@pytest.mark.parametrize("form", ["rows", "1d", "3d", "transposed"])
def test_a_slow_form_is_priced_and_planned_with_its_own_rates(form):
    """Where its operations cost a hundred times as much. Layers of images are not concerned."""
    without, slow = measured(100)
    for one, other in zip(searches(form, without, "auto"), searches(form, slow, "auto"), strict=True):
        before, after = next(iter(one)), next(iter(other))
        same = other.pricing.price(before.path)
        assert same.seconds > 10 * before.seconds
        assert before.seconds < after.seconds <= same.seconds
    for one, other in zip(plans("", without), plans("", slow), strict=True):
        assert (one.order, one.seconds, one.steps) == (other.order, other.seconds, other.steps)
