"""Every registered layer is held to every promise of tnlayers.testing."""

import inspect
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from covertable import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tnlayers
from cases import CASES, Case
from networks import networks
from tnlayers import testing

CHANNELS = (8, 12)
KERNELS: dict[int, tuple[int, ...]] = {1: (3,), 2: (3, 2), 3: (2, 1, 3)}


def test_every_registered_format_has_layers_and_cases():
    for name, form in tnlayers.FORMATS.items():
        for ndim in (1, 2, 3):
            layer = getattr(tnlayers, f"{form.__name__}Conv{ndim}d")
            assert layer.format_type is form
            assert layer.ndim == ndim
            assert any(case.format == name and case.ndim == ndim for case in CASES), f"no case for {layer.__name__}"


@pytest.mark.parametrize("keeps", testing.PROMISES.values(), ids=testing.PROMISES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_promise(case: Case, keeps: Any):
    torch.manual_seed(0)
    keeps(partial(case.layer, *CHANNELS, kernel_size=KERNELS[case.ndim], padding=1, **case.arguments))


OPTIONS: dict[str, list[Any]] = {
    "kernel_size": [1, 3, "asymmetric"],
    "stride": [1, 2, "asymmetric"],
    "padding": [0, 2, "asymmetric", "same", "valid"],
    "dilation": [1, 2, "asymmetric"],
    "groups": [1, 2, 4],
    "bias": [True, False],
    "padding_mode": ["zeros", "reflect", "replicate", "circular"],
    "strategy": ["reconstruct", "factorized"],
}
ASYMMETRIC = {"kernel_size": (3, 2, 1), "stride": (2, 1, 3), "padding": (1, 0, 2), "dilation": (1, 2, 3)}


def arguments(ndim: int, options: dict[str, Any]) -> dict[str, Any]:
    return {k: ASYMMETRIC[k][:ndim] if v == "asymmetric" else v for k, v in options.items()}


def valid(options: dict[str, Any]) -> bool:
    """padding='same' is defined for stride 1 only."""
    return options.get("padding") != "same" or options.get("stride", 1) == 1


def grouped(case: Case, groups: int) -> dict[str, Any]:
    """The case's own arguments where its channel shapes allow the groups; otherwise without its shapes and ranks."""
    ok = groups == 1 or not {"in_shape", "out_shape"} & set(case.arguments)
    return case.arguments if ok else {**case.arguments, "in_shape": None, "out_shape": None, "rank": 2}


def check_options(case: Case, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    own = grouped(case, options["groups"])
    layer = case.layer(*CHANNELS, **arguments(case.ndim, options), dtype=torch.float64, **own)
    x = torch.randn(2, CHANNELS[0], *(9, 8, 7)[: case.ndim], dtype=torch.float64)
    # Against torch's layer as built from the arguments, not from ours.
    dense = layer.dense_type(
        *CHANNELS, dtype=torch.float64, **{k: v for k, v in arguments(case.ndim, options).items() if k != "strategy"}
    )
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    assert layer(x).shape == dense(x).shape
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-10, atol=1e-10)


TRIPLES = make(
    OPTIONS,
    strength=3,
    constraints=[{"operator": "fn", "requires": ["padding", "stride"], "evaluate": valid}],
)
# torch tells so of its own layer.
torch_pads_with_a_copy = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def test_triples_cover_every_three_options():
    for names in itertools.combinations(OPTIONS, 3):
        for values in itertools.product(*(OPTIONS[name] for name in names)):
            options = dict(zip(names, values, strict=True))
            if valid(options):
                assert any(options.items() <= row.items() for row in TRIPLES)


@torch_pads_with_a_copy
@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_in_threes(case: Case):
    """Any three options together, for every case."""
    for options in TRIPLES:
        check_options(case, options)


@pytest.mark.slow
@torch_pads_with_a_copy
@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_full_product(case: Case):
    for row in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, row, strict=True))
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
    bias, mode = data.draw(st.booleans()), data.draw(st.sampled_from(OPTIONS["padding_mode"]))
    strategies = ["auto", "reconstruct"] + ["factorized"] * (network.sizes[network.outputs[0]] % groups == 0)
    kind = (tnlayers.EinsumConv1d, tnlayers.EinsumConv2d, tnlayers.EinsumConv3d)[ndim - 1]
    layer = kind(
        groups * inner, out_channels, network.dense_shape[2:], groups=groups, bias=bias, padding_mode=mode, **each,
        network=text, in_shape=network.shape(network.inputs), out_shape=network.shape(network.outputs),
        dtype=torch.float64, strategy=data.draw(st.sampled_from(strategies)),
    )  # fmt: skip
    testing.assert_same_function(layer, testing.example_input(layer))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grouped_convolutions_run_factorised_with_default_shapes(case: Case):
    for channels, groups in (((8, 12), 4), ((6, 6), 6), ((12, 20), 4), ((9, 6), 3)):
        own = {k: v for k, v in case.arguments.items() if k not in ("in_shape", "out_shape")} | {"rank": 2}
        if not isinstance(case.arguments["rank"], int | float):
            own["rank"] = 0.9 if case.arguments["rank"] != () else ()
        layer = case.layer(*channels, 3, groups=groups, strategy="factorized", dtype=torch.float64, **own)
        testing.assert_same_function(layer, testing.example_input(layer))


def test_grouped_shapes_that_cannot_run_factorised_still_reconstruct():
    layer = tnlayers.TRConv2d(8, 12, 3, groups=2, out_shape=(3, 4), rank=2, dtype=torch.float64)
    testing.assert_same_function(layer, testing.example_input(layer))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_drop_in_for_torch(case: Case):
    """The arguments of nn.ConvNd, by position, give its attributes."""
    dense_type = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[case.ndim]
    args = (8, 12, 3, 2, 1, 2, 1, False, "circular", "cpu", torch.float64)
    layer, dense = case.layer(*args, **case.arguments), dense_type(*args)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    for name in names:
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
    layer = case.layer(*CHANNELS, 3, **case.arguments)
    x = testing.example_input(layer)
    for strategy in ("reconstruct", "factorized"):
        layer = case.layer(*CHANNELS, 3, strategy=strategy, **case.arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = layer(x), layer.to_conv()(x)
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
