"""Plans by rates that are derived from properties: of a CPU beside the measured ones, and of GPUs by arithmetic."""

import csv
import math
import statistics
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

import tnlayers
from tnlayers import Geometry, TensorNetwork
from tnlayers.backend import derived
from tnlayers.backend.derived import TF32, derive, of_cpu, of_cuda, properties_of
from tnlayers.backend.rate_tables import shipped
from tnlayers.backend.rates import KEPT, KINDS
from tnlayers.planning import choose
from tnlayers.planning.plan import build_plan
from tnlayers.planning.search import Search
from tnlayers.planning.search_space import space_of
from tnlayers.planning.setting import Setting

ROWS = list(csv.DictReader((Path(__file__).parents[1] / "golden" / "plans.csv").read_text().splitlines()))

# As torch names them: compute capability, multiprocessors, clocks in kHz, bits of the memory's bus. Clocks are the
# boost clocks of the vendor's data sheets; their peaks are beside, in TFLOPs per second and GB/s.
CARDS = {
    "H100 SXM": (9, 0, 132, 1_830_000, 2_619_000, 5120, False),
    "A100 SXM 80GB": (8, 0, 108, 1_410_000, 1_593_000, 5120, False),
    "T4": (7, 5, 40, 1_590_000, 5_001_000, 256, False),
    "RTX 4090": (8, 9, 128, 2_520_000, 10_501_000, 384, False),
    "Jetson Orin": (8, 7, 16, 1_300_000, 3_200_000, 256, True),
}
SHEETS = {
    "H100 SXM": {"float32": 67, "float64": 34, TF32: 495, "bfloat16": 989, "float16": 989, "bandwidth": 3350},
    "A100 SXM 80GB": {"float32": 19.5, "float64": 9.7, TF32: 156, "bfloat16": 312, "float16": 312, "bandwidth": 2039},
    "T4": {"float32": 8.1, "float16": 65, "bandwidth": 320},
    "RTX 4090": {"float32": 82.6, TF32: 82.6, "bfloat16": 165, "float16": 165, "bandwidth": 1008},
    "Jetson Orin": {"float32": 5.3, "bandwidth": 204.8},
}
NAMES = (
    "major",
    "minor",
    "multi_processor_count",
    "clock_rate",
    "memory_clock_rate",
    "memory_bus_width",
    "is_integrated",
)

# Of ResNet-50: channels in and out, kernel, stride, size of the image.
RESNET50 = ((64, 64, 3, 1, 56), (256, 64, 1, 1, 56), (256, 256, 3, 1, 14))
FORMATS = "TR", "Tucker", "CP", "TT"
KEEPS = 0.1, 0.25


def card(name, **changes):
    return SimpleNamespace(name=name, **dict(zip(NAMES, CARDS[name], strict=True)) | changes)


@pytest.mark.parametrize("name", CARDS)
def test_peaks_are_those_of_the_data_sheets(name):
    found, sheet = of_cuda(card(name)), dict(SHEETS[name])
    assert found.bandwidth == pytest.approx(1e9 * sheet.pop("bandwidth"), rel=0.02)
    for dtype, peak in sheet.items():  # some sheets round, or have a higher boost clock
        assert found.flops[dtype] == pytest.approx(1e12 * peak, rel=0.1)
    assert (found.name, found.tensor_cores, found.lanes) == (name, True, 8)
    assert found.launch == (derived._LAUNCH_INTEGRATED if name == "Jetson Orin" else derived._LAUNCH)
    assert ("bfloat16" in found.flops) is (name != "T4")


@pytest.mark.parametrize("name", CARDS)
def test_without_clocks_the_generation_stands_for_them(name):
    """As where torch does not say them: within a factor of two."""
    found = of_cuda(SimpleNamespace(name=name, **dict(zip(NAMES[:3], CARDS[name], strict=False))))
    assert 0.5 < found.bandwidth / of_cuda(card(name)).bandwidth < 2
    assert 0.5 < found.flops["float32"] / of_cuda(card(name)).flops["float32"] < 2
    assert of_cuda(card(name, clock_rate=0, memory_clock_rate=0, is_integrated=0)).flops == found.flops


def test_an_unknown_capability_takes_the_nearest_before_it():
    newer, older = of_cuda(card("H100 SXM", major=9, minor=5)), of_cuda(card("T4", major=3, minor=5))
    assert newer.flops == of_cuda(card("H100 SXM")).flops
    assert "float16" not in older.flops
    assert (older.tensor_cores, older.lanes) == (False, 1)


def test_every_device_has_properties():
    for device in ("cpu", "cuda", "mps", "xpu"):
        found = derive(properties_of(device), "float32")
        assert tuple(found.train) == tuple(found.infer) == KINDS
        assert all(rate.call > 0 for table in (found.train, found.infer) for rate in table.values())


def test_dtypes_take_the_units_that_serve_them():
    properties = of_cuda(card("A100 SXM 80GB"))
    rates = {dtype: derive(properties, dtype).infer for dtype in ("float32", "float16", "float64")}

    def ratio(kind, dtype, over="float32"):
        return rates[dtype][kind].flop / rates[over][kind].flop

    assert ratio("conv last", "float16") == pytest.approx(1 / 2)  # TF32 has half of float16's
    assert ratio("matmul last last", "float16") == pytest.approx(1 / 16)  # torch's products in float32 are exact
    assert ratio("depth last", "float16") == ratio("weights", "float16") == 1
    assert ratio("matmul last last", "float64") == pytest.approx(2)
    assert derive(properties, "float32").large == KEPT


# ------------------------------------------------------------------ plans


def searched(network, geometry, setting, rates):
    """The search, and the path that would be taken, with its recomputation."""
    search = Search(space_of(network, geometry), setting, rates)
    return search, *next(choose._choices(search.pricing, search, "auto", "auto"))


@pytest.mark.parametrize("capability", ["avx512", "avx2"])
def test_a_cpus_derived_rates_choose_plans_near_those_of_its_measured_ones(capability):
    """By the measured rates' seconds. The multiples are means over the two: this is what the mean costs."""
    measured, estimated = shipped()[f"cpu {capability}", "float32"].rates, derive(of_cpu(2, capability), "float32")
    ratios = []
    for row in ROWS[::3]:
        network, size = TensorNetwork.parse(row["network"]), int(row["size"])
        outputs, inputs, *kernel = network.dense_shape
        geometry = Geometry(inputs, outputs, tuple(kernel), stride=int(row["stride"]), padding=1)
        setting = Setting(int(row["batch"]), (size, size), mode=row["mode"])
        search, best, recompute = searched(network, geometry, setting, measured)
        _, other, _ = searched(network, geometry, setting, estimated)
        there = search.pricing.price(other.path)
        limit = choose.LIMIT * choose._dense(search.pricing)
        again = choose._within(search.pricing, there, limit) if row["mode"] == "train" else None
        seconds = there.seconds + (again.seconds if again else 0)
        ratios.append(seconds / (best.seconds + recompute.seconds))
    assert max(ratios) < 1.3
    assert math.exp(statistics.fmean(map(math.log, ratios))) < 1.1
    assert max(ratios) > 1.01  # they are two tables


@cache
def made(name, keep, form, mode, batch):
    """The plans of ResNet-50's layers on a device."""
    device = "cpu" if name == "cpu" else "cuda"
    rates = shipped()["cpu avx512", "float32"].rates if name == "cpu" else derive(of_cuda(card(name)), "float32")
    plans = []
    for inputs, outputs, kernel, stride, size in RESNET50:
        layer = getattr(tnlayers, f"{form}Conv2d")(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, rank=keep, bias=False, device="meta"
        )
        setting = Setting(batch, (size, size), mode=mode, device=device)
        search, path, recompute = searched(layer.network, layer.geometry, setting, rates)
        plans.append(build_plan(search.pricing, path, recompute))
    return plans


def operations(plan):
    """The number of steps, contractions and copies of a plan."""
    contractions = 0 if plan.setting.mode == "cached" else sum(len(w.contraction.steps) for w in plan.weights)
    return len(plan.steps) + contractions + sum(step.move is not None for step in plan.steps) + bool(plan.tail)


def total(count, name, mode, batch):
    cases = product(KEEPS, FORMATS)
    return sum(count(plan) for keep, form in cases for plan in made(name, keep, form, mode, batch))


@pytest.mark.parametrize("name", CARDS)
def test_plans_change_with_the_device_as_arithmetic_says(name):
    """A call costs more FLOPs than on a CPU, and so does a byte."""
    here, there = derive(of_cuda(card(name)), "float32").infer, shipped()["cpu avx512", "float32"].rates.infer
    for kind in ("conv last", "matmul last last"):
        assert here[kind].call / here[kind].flop > there[kind].call / there[kind].flop
        assert here[kind].byte / here[kind].flop > there[kind].byte / there[kind].flop
    for keep, form in product(KEEPS, FORMATS):
        mine, cpus = (made(each, keep, form, "cached", 1) for each in (name, "cpu"))
        assert sum(map(operations, mine)) <= sum(map(operations, cpus))
    for mode in ("cached", "train"):  # of single images, where calls decide
        assert total(operations, name, mode, 1) < total(operations, "cpu", mode, 1)

    def size(plan):
        return sum(cost.bytes for cost in plan.costs)

    if name != "T4":  # in float32, where it has no tensor cores, its FLOPs are not much cheaper than its bytes
        assert total(size, name, "train", 32) < total(size, "cpu", "train", 32)
        assert total(lambda plan: plan.flops, name, "train", 32) > total(lambda plan: plan.flops, "cpu", "train", 32)


@pytest.mark.parametrize("form", FORMATS)
def test_costlier_calls_make_fewer_of_them_and_cheaper_flops_fewer_bytes(form):
    """One device with one number changed: the least of a sum uses no more of what alone became costlier."""
    properties = replace(of_cuda(card("T4")), launch=1e-6)
    for keep, (inputs, outputs, kernel, stride, size) in product(KEEPS, RESNET50):
        layer = getattr(tnlayers, f"{form}Conv2d")(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, rank=keep, bias=False, device="meta"
        )
        space, setting = space_of(layer.network, layer.geometry), Setting(4, (size, size), mode="infer", device="cuda")

        def share(number, changed, space=space, setting=setting):
            """Seconds of calls, or of all but FLOPs, of the best plan; counted by the unchanged rates."""
            base, rates = (derive(each, "float32") for each in (properties, changed))
            path = next(iter(Search(space, setting, rates))).path
            kept = {
                kind: replace(rate, **({"flop": 0.0} if number == "flop" else {"flop": 0.0, "byte": 0.0}))
                for kind, rate in base.infer.items()
            }
            return Search(space, setting, replace(base, infer=kept)).pricing.price(path).seconds

        faster = replace(properties, flops={name: 16 * peak for name, peak in properties.flops.items()})
        assert share("flop", faster) <= share("flop", properties) * (1 + 1e-9)
        slower = replace(properties, launch=16e-6)
        assert share("call", slower) <= share("call", properties) * (1 + 1e-9)
