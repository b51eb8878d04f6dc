import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnlayers
from cases import KERNELS, KINDS
from networks import networks
from tnlayers import testing
from tnlayers.spec.rank import _caps, _kernel_bonds, resolve

LAYERS = [
    tnlayers.CPConv2d,
    tnlayers.TuckerConv2d,
    tnlayers.TTConv2d,
    tnlayers.TRConv2d,
    tnlayers.BTTConv2d,
    tnlayers.CPConv3d,
    tnlayers.TRConv1d,
]


def network(layer, *args, **kwargs):
    return layer(*args, device="meta", **kwargs).network


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("keep", [0.05, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("channels", [(64, 64), (16, 512), (48, 20)])
def test_keep_ratio_is_met_closely_and_evenly(layer, keep, channels):
    made = layer(*channels, 3, rank=keep, device="meta")
    assert made.keep_ratio <= keep
    sizes = made.rank
    caps = _caps(made.network, tuple(sizes))
    # No bond can grow by one more without leaving the budget, unless it would add nothing or overtake the others.
    lowest = min((size for bond, size in sizes.items() if size < caps[bond]), default=None)
    for bond, size in sizes.items():
        if size < caps[bond]:
            assert size <= lowest + 1, "one bond is starved while another is wide"
            if size == lowest:
                grown = made.network.resize({bond: size + 1})
                assert grown.num_params > keep * made.network.dense_params


@pytest.mark.parametrize("keep", [0.03, 0.1, 0.5])
def test_keep_ratio_never_collapses_a_kernel_axis(keep):
    layer = tnlayers.BTTConv2d(64, 64, (3, 5), rank=keep, device="meta")
    assert (layer.rank["rh"], layer.rank["rw"]) == (3, 5)
    layer = tnlayers.EinsumConv2d(64, 64, 3, network="i a, a b c p, b h, c w, p o", rank=keep, device="meta")
    assert (layer.rank["b"], layer.rank["c"]) == (3, 3)


def test_forms_of_rank():
    assert tnlayers.TuckerConv2d(8, 8, 3, rank=5).rank == {"ri": 5, "ro": 5}
    assert tnlayers.TuckerConv2d(8, 8, 3, rank=[2, 3]).rank == {"ri": 2, "ro": 3}
    assert tnlayers.TuckerConv2d(8, 8, 3, rank=(2, 3, 1, 2)).rank == {"ri": 2, "ro": 3, "rh": 1, "rw": 2}
    assert tnlayers.TuckerConv2d(8, 8, 3, rank={"ro": 3, "ri": 2}).rank == {"ri": 2, "ro": 3}
    assert tnlayers.BTTConv2d(8, 8, 3, rank=2, blocks=7).network.sizes["n"] == 7
    assert "n" not in tnlayers.BTTConv2d(8, 8, 3, rank=2).rank
    assert tnlayers.EinsumConv2d(8, 8, 3, network="i r:3, r h w s, s o", rank=4).rank == {"s": 4}
    assert tnlayers.EinsumConv2d(8, 8, 3, network="i r:3, r h w s:2, s o").rank == {}


def test_the_largest_fitting_network_by_brute_force():
    """Two bonds, every pair of sizes tried: nothing even to within one is larger and fits."""
    dense = {"i": 20, "o": 30, "h": 3, "w": 3}
    for keep in (0.07, 0.2, 0.6):
        found, _ = resolve("i a, a h w b, b o", dense, keep)
        budget = keep * found.dense_params
        best = max(
            params
            for a in range(1, 21)
            for b in range(1, 31)
            if (params := 20 * a + 9 * a * b + 30 * b) <= budget and (abs(a - b) <= 1 or (a == 20 and b >= 20))
        )
        assert found.num_params == best


@settings(max_examples=60, deadline=None)
@given(network=networks(max_cores=6), keep=st.floats(0.01, 1.0))
def test_any_network_keeps_its_budget_or_says_why(network, keep):
    dense = {axis: network.sizes[axis] for axis in network.dense_axes}
    caps, whole = _caps(network, network.bonds), _kernel_bonds(network, network.bonds)
    least = network.resize({bond: caps[bond] if bond in whole else 1 for bond in network.bonds}).num_params
    budget = keep * network.dense_params
    if network.bonds and least > budget:
        with pytest.raises(ValueError, match=f"keep ratio leaves {int(budget)} of .* has at least {least}"):
            resolve(str(network), dense, keep)
    else:
        found, sizes = resolve(str(network), dense, keep)
        assert set(sizes) == set(network.bonds)
        assert not sizes or least <= found.num_params <= budget


SMALL = [(1, 1), (3, 8), (4, 4), (8, 8), (16, 16), (7, 5), (16, 3)]
FORMATS = [name for name in tnlayers.FORMATS if name != "einsum"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_builds_small_layers_at_the_default(name, kind):
    """At a keep ratio of 0.25, or as the smallest network, which is refused where that ratio is asked for."""
    layer = getattr(tnlayers, f"{tnlayers.FORMATS[name].__name__}{kind}")
    kernels = [KERNELS[KINDS[kind]], (1,) * KINDS[kind]] if KINDS[kind] else [()]
    for channels in SMALL:
        for kernel in kernels:
            for groups in {1, channels[0]} if kernel and channels[0] == channels[1] else {1}:
                own = {"kernel_size": kernel, "groups": groups} if kernel else {}
                made = layer(*channels, **own, device="meta")
                caps, whole = _caps(made.network, tuple(made.rank)), _kernel_bonds(made.network, tuple(made.rank))
                smallest = {bond: caps[bond] if bond in whole else 1 for bond in made.rank}
                if made.rank and made.keep_ratio > 0.25:
                    assert made.rank == smallest
                    with pytest.raises(ValueError, match=r"rank is 0\.25; that keep ratio leaves"):
                        layer(*channels, **own, rank=0.25, device="meta")
                else:
                    assert made.network == layer(*channels, **own, rank=0.25, device="meta").network
    last = layer(7, 5, **({"kernel_size": kernels[0]} if KINDS[kind] else {}))
    testing.assert_same_function(last, testing.example_input(last))


@pytest.mark.parametrize("layer", [tnlayers.BTTConv2d, tnlayers.BlockTTConv2d, tnlayers.CPConv2d])
def test_all_ways_to_a_layer_have_the_default(layer):
    dense = layer.dense_type(8, 8, 3)
    made = [layer(8, 8, 3), layer(8, 8, 3, rank=None), layer.from_conv(dense, decompose=False)]
    made += [layer.from_dense(dense, rank=None, decompose=False)]
    assert len({each.network for each in made}) == 1
