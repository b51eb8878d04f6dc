"""Every registered layer is held to every promise of tnlayers.testing."""

import inspect
import itertools
from typing import Any

import pytest
import torch
from covertable import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tnlayers
from cases import CASES, CHANNELS, KINDS, Case
from networks import networks
from tnlayers import testing


def test_every_registered_format_has_layers_and_cases():
    for name, form in tnlayers.FORMATS.items():
        for kind, ndim in KINDS.items():
            layer = getattr(tnlayers, f"{form.__name__}{kind}")
            assert layer.format_type is form
            assert getattr(layer, "ndim", 0) == ndim
            assert any(case.format == name and case.kind == kind for case in CASES), f"no case for {layer.__name__}"


@pytest.mark.parametrize("keeps", testing.PROMISES.values(), ids=testing.PROMISES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_promise(case: Case, keeps: Any):
    torch.manual_seed(0)
    keeps(case.make)


BOTH: dict[str, list[Any]] = {"bias": [True, False], "strategy": ["reconstruct", "factorized"]}
GEOMETRY: dict[str, list[Any]] = {
    "kernel_size": [1, 3, "asymmetric"],
    "stride": [1, 2, "asymmetric"],
    "dilation": [1, 2, "asymmetric"],
    "groups": [1, 2, 4],
}
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "Conv": BOTH
    | GEOMETRY
    | {
        "padding": [0, 2, "asymmetric", "same", "valid"],
        "padding_mode": ["zeros", "reflect", "replicate", "circular"],
    },
    "ConvTranspose": BOTH
    | GEOMETRY
    | {"padding": [0, 2, "asymmetric"], "output_padding": [0, 1, "asymmetric"], "output_size": [None, "largest"]},
    "Linear": BOTH,
}
ASYMMETRIC = {
    "kernel_size": (3, 2, 1),
    "stride": (2, 1, 3),
    "padding": (1, 0, 2),
    "dilation": (1, 2, 3),
    "output_padding": (1, 0, 2),
}


def arguments(ndim: int, options: dict[str, Any]) -> dict[str, Any]:
    return {k: ASYMMETRIC[k][:ndim] if v == "asymmetric" else v for k, v in options.items()}


def valid(options: dict[str, Any]) -> bool:
    """padding='same' is defined for stride 1 only; output_padding is less than stride or dilation."""
    if options.get("padding") == "same" and options.get("stride", 1) != 1:
        return False
    extra, *most = (
        ASYMMETRIC[name] if (value := options.get(name, 0)) == "asymmetric" else (value,) * 3
        for name in ("output_padding", "stride", "dilation")
    )
    return all(more == 0 or more < max(limits) for more, *limits in zip(extra, *most, strict=True))


def grouped(case: Case, groups: int) -> dict[str, Any]:
    """The case's own arguments where its channel shapes allow the groups; otherwise without its shapes and ranks."""
    ok = groups == 1 or not {"in_shape", "out_shape"} & set(case.arguments)
    return case.arguments if ok else {**case.arguments, "in_shape": None, "out_shape": None, "rank": 2}


def check_options(case: Case, options: dict[str, Any]) -> None:
    own, options = grouped(case, options.get("groups", 1)), arguments(case.ndim, options)
    wanted, strategy = options.pop("output_size", None), options.pop("strategy")
    layer = case.layer(*CHANNELS, **options, dtype=torch.float64, strategy=strategy, **own)
    x = torch.randn(2, CHANNELS[0], *(9, 8, 7)[: case.ndim], dtype=torch.float64)
    # Against torch's layer as built from the arguments, not from ours.
    dense = layer.dense_type(*CHANNELS, dtype=torch.float64, **options)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    sizes = ()
    if wanted:
        least = layer.geometry.least_size(tuple(x.shape[2:]))
        sizes = ([size + stride - 1 for size, stride in zip(least, layer.stride, strict=True)],)
    x.requires_grad_()
    found, expected = layer(x, *sizes), dense(x, *sizes)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # The cores' gradients are those that the dense kernel's gives through the kernel.
    cores = [*layer.cores]
    for_x, *for_cores = torch.autograd.grad(found.square().sum(), [x, *cores])
    dense_x, for_weight = torch.autograd.grad(expected.square().sum(), [x, dense.weight])
    through = torch.autograd.grad(layer.weight, cores, for_weight)
    for one, other in zip((for_x, *for_cores), (dense_x, *through), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * max(1.0, float(other.abs().max())))


def kind_of(case: Case) -> str:
    return case.kind.rstrip("123d") if case.ndim else case.kind


TIED = {"Conv": ["padding", "stride"], "ConvTranspose": ["stride", "dilation", "output_padding"], "Linear": []}
COVERS = {
    strength: {
        kind: make(
            options,
            strength=min(strength, len(options)),
            constraints=[{"operator": "fn", "requires": TIED[kind], "evaluate": valid}] if TIED[kind] else [],
        )
        for kind, options in OPTIONS.items()
    }
    for strength in (2, 3)
}
"""Rows in which any two, or any three, options are together."""
FIRST = {(case.format, case.kind): case for case in reversed(CASES)}
# torch tells so of its own layer.
torch_pads_with_a_copy = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("strength", COVERS)
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_covers_have_all_options_together(kind, strength):
    for names in itertools.combinations(OPTIONS[kind], min(strength, len(OPTIONS[kind]))):
        for values in itertools.product(*(OPTIONS[kind][name] for name in names)):
            options = dict(zip(names, values, strict=True))
            others = [name for name in ("stride", "dilation") if name in OPTIONS[kind] and name not in options]
            if any(valid(options | dict(zip(others, more, strict=True))) for more in
                   itertools.product(*(OPTIONS[kind][name] for name in others))):  # fmt: skip
                assert any(options.items() <= row.items() for row in COVERS[strength][kind])


@torch_pads_with_a_copy
@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_together(case: Case):
    """Any two options together for every layer, and any three for two formats of each kind: the formats take turns."""
    torch.manual_seed(0)
    pairs, triples = (cover[kind_of(case)] for cover in COVERS.values())
    turns = len(tnlayers.FORMATS) // 2
    own = triples[[*tnlayers.FORMATS].index(case.format) % turns :: turns]
    for options in pairs + own * (case is FIRST[case.format, case.kind]):
        check_options(case, options)


@pytest.mark.slow
@torch_pads_with_a_copy
@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_full_product(case: Case):
    torch.manual_seed(0)
    table = OPTIONS[kind_of(case)]
    for row in itertools.product(*table.values()):
        options = dict(zip(table, row, strict=True))
        if valid(options):
            check_options(case, options)


@torch_pads_with_a_copy
@settings(max_examples=150, deadline=None)
@given(networks(max_cores=6), st.data())
def test_any_network_in_any_geometry(network: tnlayers.TensorNetwork, data: st.DataObject):
    """Networks that nobody would write: hyperedges, cores without channels, several factors, sizes of one."""
    ndim = len(network.kernel)
    out_channels, inner = network.dense_shape[0], network.dense_shape[1]
    groups = data.draw(st.sampled_from([g for g in range(1, out_channels + 1) if out_channels % g == 0]))
    each = {name: tuple(data.draw(st.integers(low, 2)) for _ in range(ndim)) for name, low in
            (("stride", 1), ("padding", 0), ("dilation", 1))}  # fmt: skip
    text = ", ".join(" ".join(f"{a}:{network.sizes[a]}" if a in network.bonds else a for a in c) for c in network.cores)
    bias, mode = data.draw(st.booleans()), data.draw(st.sampled_from(OPTIONS["Conv"]["padding_mode"]))
    strategies = ["auto", "reconstruct"] + ["factorized"] * (network.sizes[network.outputs[0]] % groups == 0)
    kind = (tnlayers.EinsumConv1d, tnlayers.EinsumConv2d, tnlayers.EinsumConv3d)[ndim - 1]
    layer = kind(
        groups * inner, out_channels, network.dense_shape[2:], groups=groups, bias=bias, padding_mode=mode, **each,
        network=text, in_shape=network.shape(network.inputs), out_shape=network.shape(network.outputs),
        dtype=torch.float64, strategy=data.draw(st.sampled_from(strategies)),
    )  # fmt: skip
    testing.assert_same_function(layer, testing.example_input(layer))


@pytest.mark.parametrize("case", [case for case in CASES if case.ndim], ids=str)
def test_grouped_convolutions_run_factorised_with_default_shapes(case: Case):
    for channels, groups in (((8, 12), 4), ((6, 6), 6), ((12, 20), 4), ((9, 6), 3)):
        own = {k: v for k, v in case.arguments.items() if k not in ("in_shape", "out_shape")} | {"rank": 2}
        if not isinstance(case.arguments["rank"], int | float):
            own["rank"] = 0.9 if case.arguments["rank"] != () else ()
        if case.format == "einsum" and "i2" in own["network"]:
            continue  # as many factors as the network names: not these channels'
        layer = case.layer(*channels, 3, groups=groups, strategy="factorized", dtype=torch.float64, **own)
        testing.assert_same_function(layer, testing.example_input(layer))


def test_grouped_shapes_that_cannot_run_factorised_still_reconstruct():
    layer = tnlayers.TRConv2d(8, 12, 3, groups=2, out_shape=(3, 4), rank=2, dtype=torch.float64)
    testing.assert_same_function(layer, testing.example_input(layer))


POSITIONAL = {
    "Conv": (8, 12, 3, 2, 1, 2, 1, False, "circular", "cpu", torch.float64),
    "ConvTranspose": (8, 12, 3, 2, 1, 1, 1, False, 2, "zeros", "cpu", torch.float64),
    "Linear": (8, 12, False, "cpu", torch.float64),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_drop_in_for_torch(case: Case):
    """The arguments of torch's layer, by position, give its attributes."""
    args = POSITIONAL[kind_of(case)]
    layer = case.layer(*args, **case.arguments)
    dense = layer.dense_type(*args)
    for name in dense.__constants__:
        assert getattr(layer, name) == getattr(dense, name)
    assert layer.weight.shape == dense.weight.shape
    assert layer.bias is None
    assert dense.bias is None
    shown, expected = repr(layer).split("\n")[0], repr(dense)
    fields = expected[expected.index("(") + 1 : -1]
    assert fields in shown
    for word in (f"format={case.format}", "rank=", "keep_ratio="):
        assert word in shown


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast(case: Case):
    x = testing.example_input(case.make())
    for strategy in ("reconstruct", "factorized"):
        layer = case.make(strategy=strategy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = layer(x), layer.to_dense()(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        y.float().sum().backward()
        # Each pairwise step rounds to 8 bits; errors of the steps add up at worst.
        y, expected = y.detach().float(), expected.detach().float()
        relative = float((y - expected).norm() / expected.norm())
        assert relative < 2 * (len(layer.cores) + 1) * 2**-8


def test_conversion_under_autocast_keeps_the_dtype():
    layer = tnlayers.TRConv2d(8, 12, 3, rank=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        conv = layer.to_conv()
    assert conv.weight.dtype == conv.bias.dtype == torch.float32
    assert torch.equal(conv.weight, layer.weight)


def test_bias_is_drawn_as_torch_draws_it():
    """Uniform within 1 / sqrt(C_in / groups * prod(kernel)): of 4,096 draws the largest is within 1 % of the bound."""
    bound = 1 / (16 / 2 * 9) ** 0.5
    bias = tnlayers.CPConv2d(16, 4096, 3, groups=2, rank=2).bias.detach()
    assert 0.99 * bound < float(bias.abs().max()) <= bound
    assert abs(float(bias.mean())) < 4 * bound / 3**0.5 / 4096**0.5


def test_strategy_can_be_set_later():
    layer = tnlayers.TRConv2d(8, 12, 3, rank=2)
    layer.strategy = "factorized"
    assert layer.explain((1, 8, 9, 9)).startswith("factorized")
    with pytest.raises(ValueError, match="strategy is 'slow'"):
        layer.strategy = "slow"
    assert layer.strategy == "factorized"


def test_signatures_show_the_options_and_nothing_else():
    names = [*inspect.signature(tnlayers.TTConv2d).parameters]
    assert names[-7:] == ["rank", "in_shape", "out_shape", "init", "strategy", "memory", "layout"]
    assert [*inspect.signature(tnlayers.TRConv2d).parameters] == names[:-1]
    assert names[:11] == [*inspect.signature(nn.Conv2d).parameters]

    class Other(tnlayers.TTConv2d, format="btt"):
        """Another format for the same constructor."""

    class Own(tnlayers.TTConv2d):
        """A constructor of its own."""

        def __init__(self, width):
            super().__init__(width, width, 3)

    assert [*inspect.signature(Other).parameters] == [*names[:-1], "blocks"]
    assert [*inspect.signature(Own).parameters] == ["width"]
