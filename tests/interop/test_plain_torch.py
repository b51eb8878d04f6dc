"""A layer as plain modules: the same function, in the structure expected, at no more work, and without us."""

import io
import itertools
import pickle
import subprocess
import sys
import warnings
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import tnlayers
from cases import CASES, FAMILIES, Case
from networks import geometries, networks
from tnlayers import testing, unfold_
from tnlayers.interop import plain_torch
from tnlayers.interop.plain_torch import unfold
from tnlayers.planning.search_space import SearchSpace

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own layer's

ANY = [{}, {"bias": False}]
BOTH = [{"stride": 2, "dilation": 2, "bias": False}, {"groups": 2}]
OPTIONS = {
    "Linear": ANY,
    "Conv": [
        *BOTH,
        {"padding": "same"},
        {"padding": "same", "dilation": 3, "padding_mode": "circular", "groups": 4},
        {"padding": 2, "padding_mode": "reflect", "stride": 2},
        {"padding_mode": "replicate", "groups": 2, "bias": False},
    ],
    "ConvTranspose": [*BOTH, {"stride": 3, "output_padding": 1, "padding": 2, "groups": 2}],
}
UNEQUAL = {
    2: {"kernel_size": (3, 4), "padding": (2, 1), "stride": (2, 1)},
    3: {"padding": (2, 0, 1), "stride": (1, 3, 2)},
}


def error(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def make(case: Case, **options):
    """The case's layer; where its channel shapes do not allow the groups, with the format's own."""
    if options.get("groups", 1) > 1 and {"in_shape", "out_shape"} & set(case.arguments):
        options |= {"in_shape": None, "out_shape": None, "rank": 2}
    return case.make(**options)


def check(layer, limit=1e-10):
    """The unfolded layer's function is that of the dense one; returns it."""
    x = testing.example_input(layer)
    plain = unfold(layer)
    modules = [*plain] if isinstance(plain, nn.Sequential) else [plain]
    assert all(type(module) in (*PLAIN, nn.ChannelShuffle) for module in modules)
    assert error(plain(x), layer.to_dense()(x)) <= limit
    return plain


def conv(plain):
    """What a reader looks at first: (in, out, kernel, groups) of convolutions, the groups alone of a shuffle."""
    return [
        module.groups
        if isinstance(module, nn.ChannelShuffle)
        else (module.in_channels, module.out_channels, module.kernel_size, module.groups)
        for module in plain
    ]


def flops(function, x):
    with FlopCounterMode(display=False) as counter:
        function(x)
    return counter.get_total_flops()


@pytest.fixture
def scrambled(monkeypatch):
    """Random prices, of which the dense kernel's is the highest: the search then finds any sequence there may be."""

    def seeded(seed):
        def price(where, absorbed, cores):
            most = where.network.dense_params
            if cores == where.all:
                return most
            return zlib.crc32(repr((seed, absorbed, cores)).encode()) % (most // 9 + 1)

        monkeypatch.setattr(plain_torch, "_multiply_adds", price)

    return seeded


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_keeps_its_function(case, scrambled):
    torch.manual_seed(0)
    options = OPTIONS[case.kind.rstrip("123d") if case.ndim else case.kind]
    check(make(case, dtype=torch.float32), 1e-5)
    for seed, row in enumerate([*options, *([UNEQUAL[case.ndim]] if case.ndim in UNEQUAL else [])]):
        layer = make(case, dtype=torch.float64, **row)
        if not seed:
            check(layer)
        scrambled(seed)
        check(layer)


@settings(max_examples=50, deadline=None)
@given(networks(max_cores=6), st.data())
def test_any_network_keeps_its_function(network, data):
    geometry = data.draw(geometries(len(network.kernel)))
    groups, ndim = geometry.groups, geometry.ndim
    kind = getattr(tnlayers, f"Einsum{data.draw(st.sampled_from(('Conv', 'ConvTranspose')))}{ndim}d")
    text = ", ".join(" ".join(f"{a}:{network.sizes[a]}" if a in network.bonds else a for a in c) for c in network.cores)
    out_shape = network.shape(network.outputs)
    out_shape = (out_shape[0] * data.draw(st.sampled_from((1, groups))), *out_shape[1:])
    if (outputs := torch.Size(out_shape).numel()) % groups:
        groups = 1
    layer = kind(
        network.dense_shape[1] * groups, outputs, network.dense_shape[2:], stride=geometry.stride,
        padding=geometry.padding if kind.__name__ == f"EinsumConv{ndim}d" else 0, dilation=geometry.dilation,
        groups=groups, network=text, in_shape=network.shape(network.inputs), out_shape=out_shape, dtype=torch.float64,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            most = layer.network.dense_params
            prices = data.draw(st.randoms(use_true_random=False))
            patch.setattr(
                plain_torch,
                "_multiply_adds",
                lambda where, _, cores: most if cores == where.all else prices.randint(0, most // 7),
            )
        check(layer)


POINT, FULL = (1, 1), (3, 3)
STRUCTURES = [
    ("CP", {"rank": 8}, [(64, 8, POINT, 1), (8, 8, (3, 1), 8), (8, 8, (1, 3), 8), (8, 64, POINT, 1)]),
    ("Tucker", {"rank": 8}, [(64, 8, POINT, 1), (8, 8, FULL, 1), (8, 64, POINT, 1)]),
    (
        "TT",
        {"layout": "chain", "rank": 8},
        [(64, 8, POINT, 1), (8, 8, (3, 1), 1), (8, 8, (1, 3), 1), (8, 64, POINT, 1)],
    ),
    ("TR", {"rank": 4}, [(64, 16, POINT, 1), (16, 16, FULL, 4), (16, 64, POINT, 1)]),
    ("TR", {"rank": 4, "groups": 2}, [(64, 32, POINT, 2), (32, 32, FULL, 8), (32, 64, POINT, 2)]),
    ("BlockTT", {"rank": 1}, [(64, 64, FULL, 8), 8, (64, 64, POINT, 8)]),
    (
        "TT",
        {"rank": 2},
        [(64, 128, POINT, 8), 8, (128, 128, POINT, 8), (128, 64, FULL, 64), 8],
    ),
]


@pytest.mark.parametrize(("name", "options", "expected"), STRUCTURES)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_structures(name, options, expected, mode):
    layer = getattr(tnlayers, f"{name}Conv2d")(64, 64, 3, padding=1, padding_mode=mode, dtype=torch.float64, **options)
    plain = check(layer)
    assert conv(plain) == expected
    last = [module for module in plain if not isinstance(module, nn.ChannelShuffle)][-1]
    assert [module for module in plain.children() if getattr(module, "bias", None) is not None] == [last]


def test_each_axis_brings_its_own_arguments():
    layer = tnlayers.TTConv2d(
        64, 64, (3, 5), (1, 2), (2, 4), (2, 1), layout="chain", rank=4, padding_mode="circular", dtype=torch.float64
    )
    first, height, width, last = check(layer)
    assert (first.stride, first.padding, first.padding_mode) == ((1, 1), (0, 0), "zeros")
    assert (height.stride, height.padding, height.dilation) == ((1, 1), (2, 0), (2, 1))
    assert (width.stride, width.padding, width.dilation) == ((1, 2), (0, 4), (1, 1))
    assert height.padding_mode == width.padding_mode == "circular"
    assert last.stride == (1, 1)
    up = tnlayers.CPConvTranspose2d(64, 64, (4, 3), (2, 1), (1, 0), rank=4, dtype=torch.float64)
    assert [type(module) for module in check(up)] == [nn.Conv2d, nn.ConvTranspose2d, nn.ConvTranspose2d, nn.Conv2d]


def test_linear_layers_become_linear_layers():
    layer = tnlayers.EinsumLinear(64, 64, network="i1 i2 a, a b, b o1 o2", rank=4, dtype=torch.float64)
    plain = check(layer)
    assert [(module.in_features, module.out_features) for module in plain] == [(64, 4), (4, 64)]
    x = torch.randn(64, dtype=torch.float64)
    assert error(plain(x), layer(x)) < 1e-10
    # Blocks of a diagonal merge: nn.Linear has no groups.
    assert type(unfold(tnlayers.BlockTTLinear(64, 64, rank=1))) is nn.Linear


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [2, 0.3])
@pytest.mark.parametrize("stride", [1, 2])
def test_no_more_work_than_the_dense_layer(family, rank, stride):
    for kind, kernel in (("Conv2d", 3), ("ConvTranspose2d", 2 + stride)):
        layer = getattr(tnlayers, family.__name__.replace("Conv2d", kind))(32, 32, kernel, stride, 1, rank=rank)
        x, plain = torch.randn(2, 32, 8, 8), unfold(layer)
        dense = layer.to_dense()
        assert flops(plain, x) <= flops(dense, x)
        assert sum(p.numel() for p in plain.parameters()) <= sum(p.numel() for p in dense.parameters())
        assert isinstance(plain, nn.Sequential) == (flops(plain, x) < flops(dense, x))


def test_no_sequence_is_cheaper_than_the_one_found():
    """Against every way to take the cores one by one or several at once, where any order of channels will do."""
    layer = tnlayers.TuckerConv2d(32, 48, 3, padding=1, rank=(6, 5, 2, 3), stride=2)
    where, found = SearchSpace(layer.network, layer.geometry), []
    numbers = range(len(where.cores))
    for labels in itertools.product(numbers, repeat=len(numbers)):
        blocks = [sum(1 << k for k in numbers if labels[k] == label) for label in numbers]
        blocks = [block for block in blocks if block]
        before = [sum(blocks[:k]) for k in range(len(blocks))]
        found.append(sum(map(plain_torch._multiply_adds, [where] * len(blocks), before, blocks)))
    x = torch.randn(1, 32, 8, 8)
    assert flops(unfold(layer), x) == 2 * 16 * min(found)


@pytest.mark.parametrize("network", ["cp", "tr"])
def test_many_cores_are_searched_in_no_time(network):
    """Too many for every sequence: inputs stay with inputs, and the result is what fewer cores would give."""
    layer = {"cp": tnlayers.CPConv2d, "tr": tnlayers.TRConv2d}[network](
        64, 64, 3, padding=1, rank=3, in_shape=(2,) * 6, out_shape=(2,) * 6, dtype=torch.float64
    )
    assert len(check(layer)) == {"cp": 4, "tr": 3}[network]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_state_is_taken_over_and_nothing_is_shared(dtype, training):
    layer = tnlayers.BlockTTConv2d(16, 16, 3, padding=1, rank=1, dtype=dtype).train(training)
    layer.bias.requires_grad_(False)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    plain = unfold(layer)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(plain, nn.Sequential)
    assert all(module.training == training for module in plain.modules())
    parameters = dict(plain.named_parameters())
    assert {name: p.requires_grad for name, p in parameters.items()} == {
        "0.weight": True, "2.weight": True, "2.bias": False,
    }  # fmt: skip
    assert all(p.dtype == dtype and p.is_contiguous() for p in parameters.values())
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert own.isdisjoint(p.untyped_storage().data_ptr() for p in parameters.values())
    x = testing.example_input(layer).requires_grad_()
    y = plain(x)
    assert error(y, layer(x)) < 64 * torch.finfo(dtype).eps
    y.square().sum().backward()
    assert x.grad is not None
    assert all((p.grad is not None) == p.requires_grad for p in parameters.values())
    layer.cores.requires_grad_(False)
    assert not any(p.requires_grad for p in unfold(layer).parameters())


def test_without_a_graph_under_autocast_and_on_meta():
    layer = tnlayers.CPConv2d(16, 16, 3, padding=1, rank=4)
    x, expected = torch.randn(2, 16, 6, 6), layer.to_dense().state_dict()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = unfold(layer)
    assert all(p.requires_grad and p.grad_fn is None for p in plain.parameters())
    assert error(plain(x), nn.functional.conv2d(x, **expected, padding=1)) < 1e-5
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    meta = unfold(tnlayers.CPConv2d(16, 16, 3, padding=1, rank=4, device="meta"))
    assert {name: p.shape for name, p in meta.named_parameters()} == shapes
    assert all(p.is_meta for p in meta.parameters())


@pytest.mark.parametrize("name", ["CP", "BTT"])
def test_parametrized_cores_count_by_their_values(name):
    class Double(nn.Module):
        def forward(self, core):
            return 2 * core

    layer = getattr(tnlayers, f"{name}Conv2d")(16, 16, 3, rank=4, dtype=torch.float64)
    parametrize.register_parametrization(layer.cores, "0", Double())
    parametrize.register_parametrization(layer, "bias", Double())
    with torch.no_grad():
        plain = unfold(layer)
    assert all(p.requires_grad for name, p in plain.named_parameters() if "weight" in name)
    x = testing.example_input(layer)
    assert error(plain(x), layer(x)) < 1e-10


def test_what_is_not_a_layer_is_refused():
    with pytest.raises(TypeError, match="layer is Conv2d; it must be a TensorLayer"):
        unfold(nn.Conv2d(3, 3, 3))


def test_groups_that_no_factor_has_give_the_dense_layer():
    layer = tnlayers.TRConv2d(8, 12, 3, groups=2, out_shape=(3, 4), rank=1, dtype=torch.float64)
    assert type(check(layer)) is nn.Conv2d


class AsksForDtypes(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.conv = layer

    def forward(self, x):
        return self.conv(x.to(self.conv.weight.dtype))


def test_sequences_answer_for_their_weights_dtype_and_device():
    layer = tnlayers.CPConv2d(16, 16, 3, padding=1, rank=4)
    model = AsksForDtypes(layer)
    unfold_(model)
    plain, dense = model.conv, layer.to_dense()
    assert plain.weight.untyped_storage().nbytes() == 4
    assert (len(plain), [*plain.state_dict()]) == (4, [*nn.Sequential(*plain).state_dict()])
    assert [*plain.parameters()] == [*nn.Sequential(*plain).parameters()]
    for change in ("double", "half", "bfloat16"):
        getattr(plain, change)()
        getattr(dense, change)()
        for name in ("dtype", "device", "shape"):
            assert getattr(plain.weight, name) == getattr(dense.weight, name)
        assert plain.weight.isnan().all()
    assert plain.to("meta").weight.is_meta
    assert "weight" not in repr(plain)
    plain.load_state_dict(unfold(layer).state_dict(), assign=True)


@pytest.mark.parametrize("example", [None, torch.zeros(2, 16, 8, 8)])
def test_models_that_ask_for_no_weights_have_buffers_that_can_be_written(example):
    """As averages of models, and DistributedDataParallel, write them."""
    model = nn.Sequential(tnlayers.CPConv2d(16, 16, 3, padding=1, rank=4), nn.BatchNorm2d(16))
    unfold_(model, example_input=example)
    average = AveragedModel(model, use_buffers=True)
    model(torch.randn(2, 16, 8, 8))
    for _ in range(2):
        average.update_parameters(model)
    torch.testing.assert_close(average.module[1].running_mean, model[1].running_mean)
    assert not hasattr(model[0], "weight")


def test_pickles_without_us(tmp_path):
    layer = tnlayers.BlockTTConv2d(16, 16, 3, padding=1, rank=1, dtype=torch.float64)
    x = testing.example_input(layer)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps((unfold(layer), x, layer(x).detach())))
    code = (
        "import pickle, sys; plain, x, y = pickle.load(open('plain.pkl', 'rb')); "
        "assert (plain(x) - y).abs().max() < 1e-10; assert not any('tnlayers' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("layer", ["TRConv2d", "BlockTTConv2d"])
def test_onnx(layer):
    import onnxruntime  # noqa: PLC0415

    layer = getattr(tnlayers, layer)(16, 16, 3, padding=1, rank=1, dtype=torch.float32)
    x, plain = testing.example_input(layer), unfold(layer).eval()
    assert isinstance(plain, nn.Sequential)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        model = torch.onnx.export(plain, (x,), dynamo=True, verbose=False)
    held = io.BytesIO()
    model.save(held)
    session = onnxruntime.InferenceSession(held.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert error(torch.from_numpy(found), layer(x).detach()) < 1e-5
