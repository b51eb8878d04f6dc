"""Planning takes bounded work, whatever the network; what it finds in it is near to the best."""

import itertools
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnlayers
from cases import CASES, FAMILIES
from networks import networks
from tnlayers import Geometry, TensorNetwork
from tnlayers.backend.rate_tables import rates_of
from tnlayers.backend.rates import RUN_MODES
from tnlayers.formats import factorize
from tnlayers.ops.contraction import pairs
from tnlayers.planning import choose as planning
from tnlayers.planning import search_space
from tnlayers.planning.choose import plan
from tnlayers.planning.search import WORK, Search
from tnlayers.planning.setting import Setting

ENDS = {0: ["i:8"], 1: ["h:3", "w:3"], 59: ["o:8"]}
LARGE = {
    "hyperedge": ", ".join([f"{axis}{k}:2 r:4" for axis in "io" for k in range(31)] + ["h:3 r", "w:3 r"]),
    "chain": ", ".join(["h:3 w:3 b0:4", *(f"b{k}:4 {'io'[k % 2]}{k}:2 b{k + 1}:4" for k in range(62)), "b62:4 o99:2"]),
    "ring": ", ".join(f"b{k}:4 {'io'[k % 2]}{k}:2 b{(k + 1) % 63}:4" for k in range(63)) + ", b62 h:3 w:3",
    "tree": ", ".join(
        [f"{'io'[k % 2]}{k}:2 t{k}:4" for k in range(32)]
        + [f"t{2 * k}:4 t{2 * k + 1}:4 t{32 + k}:4" for k in range(30)] + ["t60:4 t61:4"]
    ),
    "many hyperedges": ", ".join(
        [f"{axis}{k}:2 r:4 s{k % 7}:2" for axis in "io" for k in range(31)] + ["h:3 r s0 s1", "w:3 r s2 s3 s4 s5 s6"]
    ),
    "star": ", ".join([" ".join(f"t{k}:2" for k in range(63))] + [f"{'io'[k % 2]}{k}:2 t{k}" for k in range(63)]),
    "full": ", ".join(
        " ".join([f"b{min(j, k)}x{max(j, k)}:2" for j in range(60) if j != k] + ENDS.get(k, [])) for k in range(60)
    ),
    "unconnected": ", ".join(["i:4", "o:4", *(f"x{k}:2 y{k}:2, y{k} x{k}" for k in range(31))]),
}  # fmt: skip
MOST_OPTIONS = 700
"""Steps that may be looked at for one plan: each takes some ten microseconds."""


MOST_PAIRS = 16_000
"""Pairs of cores that may be judged in all of the plans of one test: each takes some microseconds."""


def large(name: str) -> tuple[TensorNetwork, Geometry]:
    network = TensorNetwork.parse(LARGE[name])
    assert 60 <= len(network.cores) <= 64
    kernel = network.shape(network.kernel)
    return network, Geometry(network.dense_shape[1], network.dense_shape[0], kernel, padding=1 if kernel else 0)


@pytest.mark.parametrize("strategy", ["auto", "reconstruct", "factorized"])
@pytest.mark.parametrize("name", LARGE)
def test_few_steps_are_priced_and_little_memory_taken(name, strategy, no_plans, monkeypatch):
    """In every mode, thrifty or not; and of a new size, none is searched."""
    network, geometry = large(name)
    size = (28, 28)[: geometry.ndim]
    counted = []
    original = tnlayers.planning.options.Pricing._kinds
    monkeypatch.setattr(tnlayers.planning.options.Pricing, "_kinds", lambda *args: counted.append(1) or original(*args))
    judged = []
    push = tnlayers.ops.contraction.heappush
    monkeypatch.setattr(tnlayers.ops.contraction, "heappush", lambda heap, entry: judged.append(1) or push(heap, entry))
    for mode, memory in (("train", "auto"), ("train", "low"), ("infer", "auto"), ("cached", "auto")):
        counted.clear()
        setting = Setting(7, size, mode=mode)
        found = plan(network, geometry, setting, strategy, memory)
        assert len(counted) <= MOST_OPTIONS
        assert sorted(k for weight in found.weights for k in weight.cores) == list(range(len(network.cores)))
    assert len(judged) <= MOST_PAIRS


@pytest.mark.parametrize("name", LARGE)
def test_little_memory_is_taken(name, no_plans):
    network, geometry = large(name)
    tracemalloc.start()
    plan(network, geometry, Setting(7, (28, 28)[: geometry.ndim]))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50e6


def test_layers_of_many_cores_compute_what_the_kernel_does():
    """Built, planned and run, forward and backward: 18 cores with one hyperedge, 17 of a tree, 20 of a ring."""
    for kind, factors in ((tnlayers.CPConv2d, 8), (tnlayers.HTConv2d, 8), (tnlayers.TRConv2d, 9)):
        layer = kind(
            2**factors, 2**factors, 3, padding=1, rank=2, in_shape=(2,) * factors, out_shape=(2,) * factors,
            dtype=torch.float64,
        )  # fmt: skip
        assert len(layer.cores) >= 17
        x = torch.randn(1, 2**factors, 4, 4, dtype=torch.float64)
        expected = layer.to_conv()(x)
        for strategy in ("auto", "factorized"):
            layer.strategy = strategy
            torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
            assert layer.flops(x.shape) > 0


def estimate(where, setting, work) -> float:
    """Seconds of what is chosen, with the doubt of what is not the dense kernel."""
    table = rates_of(setting.device, "float32")
    search = Search(where, setting, table, work=work)
    path, recompute = next(planning._choices(search.pricing, search, "auto", "auto"))
    return (path.seconds + recompute.seconds) * (1 if len(path.options) == 1 else 1 + table.doubt)


CELLS = [(1, 32, "first"), (32, 32, "first"), (8, 14, "last")]


@pytest.mark.parametrize("layer", FAMILIES)
def test_what_a_bounded_search_finds_is_near_to_the_best(layer, monkeypatch):
    """Up to eight cores, over ranks, channels, sizes, layouts and modes: the search of large networks, forced."""
    checked = 0
    for channels, factors, rank in itertools.product((64, 256), (1, 2, 3), (4, 0.1, 0.25)):
        shape = factorize(channels, factors, exact=True)
        try:
            made = layer(channels, channels, 3, padding=1, rank=rank, in_shape=shape, out_shape=shape, device="meta")
        except ValueError:
            continue  # the format takes another number of factors, or no rank so small
        if len(made.cores) > 8:
            continue
        monkeypatch.setattr(search_space, "MOST_SETS", 2**8)
        exact = search_space.SearchSpace(made.network, made.geometry)
        monkeypatch.setattr(search_space, "MOST_SETS", 0)
        bounded = search_space.SearchSpace(made.network, made.geometry)
        assert exact.exact
        assert not bounded.exact
        (batch, size, layout), mode = CELLS[checked % 3], RUN_MODES[checked // 3 % 3]
        setting = Setting(batch, (size, size), layout, mode)
        assert estimate(bounded, setting, WORK) <= 1.1 * estimate(exact, setting, float("inf"))
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("layer", FAMILIES)
def test_between_the_corners_known_ways_are_near_to_the_best(layer):
    made = layer(64, 64, 3, padding=1, rank=0.25, device="meta")
    for batch, size, mode in itertools.product((3, 24), (7, 28), RUN_MODES):
        setting = Setting(batch, (size, size), mode=mode)
        found, best = plan(made.network, made.geometry, setting), next(
            planning.candidates(made.network, made.geometry, setting)
        )  # fmt: skip
        assert found.seconds <= 1.1 * best.seconds


def test_a_new_size_searches_nothing(no_plans, monkeypatch):
    """Within powers of two around sizes that were seen."""
    layer = tnlayers.TRConv2d(8, 12, 3, rank=3)
    layer(torch.randn(5, 8, 10, 10))
    monkeypatch.setattr(Search, "__iter__", None)
    for batch, size in ((6, 11), (7, 12), (5, 15), (7, 9)):
        layer(torch.randn(batch, 8, size, size))
    with pytest.raises(TypeError, match=r"not iterable|not callable"):
        layer(torch.randn(9, 8, 10, 10))


@settings(max_examples=200, deadline=None)
@given(networks(max_cores=7), st.data())
def test_greedy_pairs_are_those_of_a_plain_search(network, data):
    """Against judging every pair anew in each step."""
    out = network.dense_axes
    alive = {k: set(core) for k, core in enumerate(network.cores)}
    expected = []

    def volume(axes):
        return int(torch.tensor([network.sizes[axis] for axis in axes] + [1]).prod())

    while len(alive) > 1:
        every = list(itertools.combinations(alive, 2))
        joined = [(a, b) for a, b in every if alive[a] & alive[b]]
        judged = []
        for a, b in joined or every:
            others = set(out).union(*(axes for k, axes in alive.items() if k not in (a, b)))
            result = (alive[a] | alive[b]) & others
            growth = volume(result) - volume(alive[a]) - volume(alive[b])
            judged.append((growth, volume(alive[a] | alive[b]), a, b, result))
        *_, a, b, result = min(judged, key=lambda each: each[:4])
        del alive[a], alive[b]
        expected.append((a, b))
        alive[len(network.cores) + len(expected) - 1] = result
    assert pairs(network.cores, out, network.sizes) == expected


@pytest.mark.parametrize("layer", FAMILIES)
@pytest.mark.parametrize("strategy", ["auto", "reconstruct", "factorized"])
def test_images_without_rows_or_columns(layer, strategy):
    """Where padding makes something of them, as torch does."""
    ours = layer(8, 12, 3, padding=2, rank=2, strategy=strategy)
    for size in ((0, 5), (5, 0), (0, 0)):
        x = torch.randn(2, 8, *size, requires_grad=True)
        try:
            expected = ours.to_conv()(x)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                ours(x)
            continue
        found = ours(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found.sum().backward()
        assert all(core.grad is not None for core in ours.cores)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cheap_bound_is_below_the_other_and_changes_no_path(case, monkeypatch):
    """Paths come out in the same order as when the search bounds every step by all of its options at once."""
    layer = case.make(device="meta")
    where = search_space.space_of(layer.network, layer.geometry)
    size = tuple(max(9, span) for span in layer.geometry.spans)

    def search() -> Search:
        return Search(where, Setting(3, size), rates_of("cpu", "float32"))

    found = search()
    for absorbed in {0, *where.tensors()} - {where.all}:
        for tensor in where.tensors():
            if not tensor & absorbed:
                assert found.bound(absorbed, tensor) <= found.pricing.least(absorbed, tensor)
    paths = list(itertools.islice(search(), 8))
    monkeypatch.setattr(Search, "_bound", lambda self, *step: self.pricing.least(*step))
    assert list(itertools.islice(search(), 8)) == paths
