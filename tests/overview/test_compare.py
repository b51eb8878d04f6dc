"""What ``tnlayers.compare`` says of a format is what a layer of this format has, and the layer stays as it was."""

import copy
import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tnlayers
from cases import CHANNELS, KERNELS, KINDS
from tnlayers import FORMATS, Geometry, TensorizeConfig, compare, tensorize_
from tnlayers.backend.rate_tables import rates_of, table_of
from tnlayers.layers.registry import layer_class

OTHERS = [name for name in FORMATS if name != "einsum"]
NUMBERS = [each.name for each in dataclasses.fields(compare(nn.Linear(2, 2)).rows[0]) if each.default is None][2:]
"""The fields that are empty without a layer."""


def plain(kind, **changes):
    """A torch layer of a kind, of small sizes."""
    ndim = KINDS[kind]
    arguments = {"kernel_size": KERNELS[ndim], "padding": 1} | changes if ndim else changes
    return getattr(nn, kind)(*CHANNELS, **arguments)


def inputs(kind):
    return (3, CHANNELS[0], *(6, 5, 4)[: KINDS[kind]])


def by_name(found):
    return {row.name: row for row in found.rows}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_what_the_built_layer_has(kind, training):
    dense, shape = plain(kind).train(training), inputs(kind)
    rows = by_name(compare(dense, rank=0.7, input_shape=shape))
    assert [*rows] == ["dense", *sorted([*OTHERS, "tt layout=chain"])]
    held = 0
    for row in [*rows.values()][1:]:
        cls = layer_class(row.format, type(dense))
        if row.params is None:
            with pytest.raises(ValueError, match=re.escape(row.note)):
                cls.from_dense(dense, rank=0.7, decompose=False, **row.options)
            continue
        layer, held = cls.from_dense(dense, rank=0.7, decompose=False, **row.options), held + 1
        assert row.params == sum(core.numel() for core in layer.cores)
        assert row.keep_ratio == layer.keep_ratio == row.params / dense.weight.numel()
        assert row.rank == layer.rank
        assert row.flops == layer.flops(shape)
        assert layer.explain(shape).startswith(f"{row.strategy} plan")
        for mode, number in (("train", row.train_ms), ("infer", row.infer_ms)):
            setting = layer.train(mode == "train")._setting(shape)
            assert number == 1000 * layer._executor.plan(setting).seconds
    assert held >= 6


@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d", "ConvTranspose2d", "Linear"])
def test_the_dense_row_is_the_dense_layer(kind):
    dense, shape = plain(kind), inputs(kind)
    found = compare(dense, input_shape=shape, formats=["cp", "tr"])
    row = found.rows[0]
    model = nn.Sequential(dense)
    assert row.params == dense.weight.numel()
    assert row.flops == tnlayers.summary(model, torch.randn(shape)).rows[0].flops
    assert (row.format, row.rank, row.keep_ratio, row.strategy, row.note) == (None, None, 1.0, "reconstruct", "")
    assert (row.train_ratio, row.infer_ratio, row.memory_ratio) == (1, 1, 1)
    # weight, input and output, and the gradients of the three
    assert row.memory == 4 * 2 * (dense.weight.numel() + torch.Size(shape).numel() + dense(torch.randn(shape)).numel())
    for other in found.rows[1:]:
        if other.params is not None:
            assert other.train_ratio == other.train_ms / row.train_ms
            assert other.infer_ratio == other.infer_ms / row.infer_ms
            assert other.memory_ratio == other.memory / row.memory


def test_the_dense_time_is_the_rate_of_one_convolution():
    """Of 64 channels, so that no number of channels is rounded up."""
    row = compare(nn.Conv2d(64, 64, 3, padding=1), formats=["cp"]).rows[0]
    size = 4 * (2 * 32 * 64 * 32 * 32 + 64 * 64 * 9)
    assert row.flops == 2 * 32 * 32 * 32 * 64 * 64 * 9
    rate = rates_of("cpu", "float32").train["conv first"]
    assert row.train_ms == pytest.approx(1000 * rate.seconds(row.flops, size))


def test_the_errors_are_those_of_tensorize():
    for dense in (plain("Conv2d"), plain("Linear"), plain("ConvTranspose1d", groups=2)):
        found = by_name(compare(dense, rank=0.6, formats=["tucker", "tt"], decompose=True))
        assert found["dense"].error == 0
        for name in ("tucker", "tt"):
            report = tensorize_(nn.Sequential(copy.deepcopy(dense)), TensorizeConfig(name, rank=0.6))["0"]
            assert found[name].error == pytest.approx(report.error, rel=1e-5)
            assert found[name].params == report.params[1]
            assert 0.01 < found[name].error < 1


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Conv2d", {"groups": 4, "stride": 2, "dilation": (1, 2)}),
        ("Conv2d", {"groups": 4, "padding": "same", "padding_mode": "circular"}),
        ("ConvTranspose2d", {"groups": 4, "stride": 2, "output_padding": 1}),
    ],
)
def test_groups_and_padding(kind, changes):
    dense = plain(kind, **changes)
    rows = by_name(compare(dense, rank=2, input_shape=(2, 8, 9, 9)))
    assert rows["dense"].flops == tnlayers.summary(nn.Sequential(dense), torch.randn(2, 8, 9, 9)).rows[0].flops
    for name in ("cp", "tr", "tucker"):
        layer = layer_class(name, type(dense)).from_dense(dense, rank=2, decompose=False)
        assert (rows[name].params, rows[name].flops) == (layer.network.num_params, layer.flops((2, 8, 9, 9)))


def test_depthwise_and_what_cannot_hold_it():
    rows = by_name(compare(nn.Conv2d(8, 8, 3, groups=8), rank=0.5, input_shape=(8, 9, 9)))
    assert "has at least" in rows["blocktt"].note
    assert rows["cp"].params <= 36
    empty = rows["blocktt"]
    assert (empty.name, empty.format, empty.options) == ("blocktt", "blocktt", {})
    assert {getattr(empty, name) for name in NUMBERS} == {None}
    # A train of one core: the kernel itself.
    rows = by_name(compare(nn.Linear(1, 7), rank=0.5, formats=["tt", "cp"]))
    assert rows["tt"].note == "its network would be one dense core"


def test_a_geometry():
    geometry = Geometry(8, 12, (3, 2), padding=1, groups=2)
    only = ["cp", "tt"]
    found, same = compare(geometry), compare(nn.Conv2d(8, 12, (3, 2), padding=1, groups=2))
    assert found == same
    assert found.input_shape == (32, 8, 32, 32)
    assert compare(dataclasses.replace(geometry, input_size=(7, 9)), formats=only).input_shape == (32, 8, 7, 9)
    assert compare(Geometry(8, 12, (40,), dilation=2), formats=["cp"]).input_shape == (32, 8, 79)
    assert compare(Geometry(8, 12, ()), formats=only) == compare(nn.Linear(8, 12), formats=only)
    up = Geometry(8, 12, (3,), stride=2, transposed=True)
    assert compare(up, formats=only) == compare(nn.ConvTranspose1d(8, 12, 3, stride=2), formats=only)
    with pytest.raises(ValueError, match="layer is a Geometry and has no weight"):
        compare(geometry, decompose=True)
    with pytest.raises(ValueError, match="a linear one no groups"):
        compare(Geometry(8, 8, (), groups=2))


def test_a_tensor_layer_stands_for_its_dense_layer():
    layer = tnlayers.TuckerConv2d(8, 12, 3, padding=1, rank=2)
    found = compare(layer, rank=2, formats=["tucker", "cp"], decompose=True)
    assert found == compare(layer.to_conv(), rank=2, formats=["tucker", "cp"], decompose=True)
    assert found.rows[1].error < 1e-5 < found.rows[2].error


def test_device_dtype_and_mode_are_the_layers():
    layer = plain("Conv2d").to("meta", torch.bfloat16).eval()
    found = compare(layer, formats=["cp"])
    assert (found.device, found.dtype, found.training) == ("meta", torch.bfloat16, False)
    assert found.rows[0].memory * 2 == compare(plain("Conv2d"), formats=["cp"]).rows[0].memory
    with pytest.raises(ValueError, match="layer is on the meta device"):
        compare(layer, decompose=True)
    assert "one forward in eval mode\n" in str(found)
    assert "for torch.bfloat16 on meta; nothing was timed here\nRates: cpu " in str(found)


def test_ranks_and_entries():
    dense = plain("Conv2d")
    rows = by_name(compare(dense, rank={"cp": 3, "tt": {"r1": 2, "r2": 1}}, formats=["cp", "tt", "tr"]))
    assert (rows["cp"].rank, rows["tt"].rank) == ({"r": 3}, {"r1": 2, "r2": 1})
    assert rows["tr"].rank == by_name(compare(dense, rank=0.25))["tr"].rank
    # A mapping without a format's name is one from bond to size.
    rows = by_name(compare(dense, rank={"r": 3}, formats=["cp", "tucker"]))
    assert rows["cp"].rank == {"r": 3}
    assert "rank names 'r'" in rows["tucker"].note
    entries = [
        {"format": "tt", "layout": "chain", "rank": 2},
        {"format": "tt", "options": {"layout": "chain"}, "rank": 3},
        {"format": "tr", "in_shape": (4, 2), "strategy": "reconstruct"},
        {"format": "einsum", "network": "i a, a h w o"},
    ]
    one, two, three, four = compare(dense, rank=4, formats=entries).rows[1:]
    assert (one.name, one.options, one.rank) == ("tt layout=chain", {"layout": "chain"}, {"r1": 2, "r2": 2, "r3": 2})
    assert (two.name, two.rank) == ("tt layout=chain", {"r1": 3, "r2": 3, "r3": 3})
    assert three.params == tnlayers.TRConv2d(*CHANNELS, (3, 2), rank=4, in_shape=(4, 2)).network.num_params
    assert three.name == "tr in_shape=(4, 2) strategy=reconstruct"
    assert (four.name, four.params) == ("einsum network=i a, a h w o", 8 * 4 + 4 * 12 * 6)
    assert compare(dense, rank=None, formats=["blocktt"]).rows[1].params is not None
    (wide,) = compare(dense, rank=100, formats=["cp"], decompose=True).rows[1:]
    assert wide.note == "more parameters than the dense kernel"
    assert wide.error < 1e-4


def test_what_a_format_cannot_hold_is_a_note():
    """A keep ratio, groups, and a rank that another format takes: the arguments themselves are valid."""
    grouped = nn.Conv2d(12, 12, 3, groups=3)
    entry = {"format": "tr", "out_shape": (4, 3), "strategy": "factorized"}
    (row,) = compare(grouped, formats=[entry]).rows[1:]
    assert (row.params, "groups (3) does not divide the first factor of out_shape" in row.note) == (None, True)
    (row,) = compare(grouped, formats=[entry | {"strategy": "reconstruct"}]).rows[1:]
    assert (row.strategy, row.note) == ("reconstruct", "")
    rows = by_name(compare(plain("Conv2d"), rank=(2, 2, 2), formats=["tr", "cp", "ht"]))
    assert rows["tr"].rank == {"r0": 2, "r1": 2, "r2": 2}
    assert "has 3 entries; network" in rows["cp"].note
    (row,) = compare(nn.Linear(8, 8), formats=[{"format": "einsum", "network": "i a, a h o"}]).rows[1:]
    assert row.note == "network 'i a, a h o' has the kernel axis 'h', but a linear layer has none"
    (row,) = compare(nn.Linear(8, 8), rank=0.01, formats=["blocktt"]).rows[1:]
    assert row.note.startswith("rank is 0.01; that keep ratio leaves 0 of 64 parameters")


def test_a_new_format_has_rows_for_its_options(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Mine(tnlayers.Format):
        turned: bool = False
        size: int = 4

        def text(self, inputs, outputs, kernel, rank):
            return f"{' '.join(inputs)} r, r {' '.join(kernel + outputs)}"

    monkeypatch.setitem(FORMATS, "mine", Mine)
    names = [row.name for row in compare(plain("Conv2d")).rows]
    assert [name for name in names if "mine" in name] == ["mine", "mine turned=True"]


def test_nothing_changes():
    layer = parametrizations.spectral_norm(plain("Conv2d"))
    layer.weight  # noqa: B018  (one step, so that a further one would show)
    state, random, attributes = copy.deepcopy(layer.state_dict()), torch.get_rng_state(), {*vars(layer)}
    with torch.inference_mode():
        found = compare(layer, rank=0.5, formats=["cp", "tucker"], decompose=True)
    compare(layer, rank=100)
    assert all(row.error > 0 for row in found.rows[1:])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[name], value) for name, value in layer.state_dict().items())
    assert {*vars(layer)} == attributes
    assert layer.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in layer.parameters())


def test_the_table():
    found = compare(nn.Conv2d(8, 8, 3, groups=8), rank=0.5, formats=["blocktt", "cp"], decompose=True)
    header, dense, refused, cp, note, first, second, third = str(found).splitlines()
    assert header.split()[:5] == ["format", "rank", "parameters", "keep", "FLOPs"]
    assert dense.split()[:4] == ["dense", "-", "72", "100.0%"]
    assert refused.split() == ["blocktt", "-", "refused"]
    assert note.startswith("blocktt: rank is 0.5; that keep ratio leaves 36 of 72 parameters, but network")
    assert note == f"blocktt: {found.rows[1].note}"
    row = found.rows[2]
    assert cp.split()[:5] == ["cp", "2", str(row.params), f"{row.keep_ratio:.1%}", f"{row.flops:,}"]
    assert (f"{row.error:.4f}", row.strategy) == (*cp.split()[-2:],)
    assert first == "Input (32, 8, 32, 32); FLOPs and plan: one forward in training mode"
    assert second == "Times and memory: the planner's estimates for torch.float32 on cpu; nothing was timed here"
    assert third == f"Rates: {table_of('cpu', 'float32')}"
    assert "error" not in str(compare(nn.Conv2d(8, 8, 3, groups=8), formats=["cp"])).splitlines()[0]
    page = found._repr_html_()
    assert page.count("<tr>") == 4
    assert ">refused</td>" in page
    assert page.count("<p>blocktt: rank is 0.5; that keep ratio leaves") == 1


def test_no_sentence_stands_in_the_table():
    """Refusals, fits that fail and warnings stand beneath it, a line each, so the table's lines stay short."""
    found = compare(nn.Linear(8, 8), rank=0.01, decompose=True)
    assert all(row.params is None for row in found.rows[1:])
    lines = str(found).splitlines()
    assert max(map(len, lines[: len(found.rows) + 1])) <= 130  # of numbers alone
    assert lines[len(found.rows) + 1 : -3] == [f"{row.name}: {row.note}" for row in found.rows[1:]]
    wide = compare(nn.Linear(8, 8), rank=8, formats=["cp"])
    assert str(wide).splitlines()[3] == "cp: more parameters than the dense kernel"
    assert str(wide).splitlines()[2].split()[-1] == wide.rows[1].strategy


def test_best():
    found = compare(plain("Conv2d"), rank=0.7, formats=["ht", "tucker", "tt"], decompose=True)
    rows = [row for row in found.rows[1:] if row.params is not None]
    assert found.best().train_ms == min(row.train_ms for row in rows)
    assert found.best("error").error == min(row.error for row in rows)
    assert found.best(by="params").params == min(row.params for row in rows)
    found = compare(plain("Conv2d").eval(), rank=0.7)
    assert found.best("time").infer_ms == min(row.infer_ms for row in found.rows[1:] if row.params is not None)
    with pytest.raises(ValueError, match="by is 'error', but no format has this number; only decompose=True"):
        found.best("error")
    with pytest.raises(ValueError, match="by is 'speed'; accepted: 'time', 'params', 'error'"):
        found.best("speed")


WRONG = [
    ({"layer": nn.ReLU()}, TypeError, "layer is of type ReLU; it must be a convolution"),
    ({"layer": nn.LazyConv2d(8, 3)}, ValueError, "layer is a LazyConv2d, which has no shape"),
    ({"layer": nn.Linear(2, 2, dtype=torch.complex64)}, TypeError, "layer has dtype torch.complex64; accepted:"),
    ({"layer": Geometry(2, 2, (1, 1, 1, 1))}, ValueError, "at most 3 spatial axes"),
    ({"rank": 0}, ValueError, "rank is 0; it must be an integer >= 1"),
    ({"rank": 1.5}, ValueError, r"rank is 1.5; it must be a share in \(0, 1\]"),
    ({"rank": "8"}, TypeError, r"rank\[0\] is '8'|rank is '8'; it must be"),
    ({"rank": {"cp": 2, "c": 3}}, ValueError, "rank has the key 'c'; the compared formats are"),
    ({"input_shape": 8}, TypeError, r"input_shape is 8; it must be a sequence of integers, \(N, 8, h, w\), or"),
    ({"input_shape": (2, 9, 8, 8)}, ValueError, r"input_shape is \(2, 9, 8, 8\); this layer takes \(N, 8, h, w\), or"),
    ({"input_shape": (2, 8, 8)}, ValueError, r"input_shape is \(2, 8, 8\); this layer takes"),
    ({"input_shape": (0, 8, 8, 8)}, ValueError, r"input_shape\[0\] is 0; it must be an integer >= 1"),
    (
        {"input_shape": (2, 8, 1, 8)},
        ValueError,
        r"input_shape is \(2, 8, 1, 8\); input size .* smaller than the kernel",
    ),
    ({"layer": nn.Linear(4, 2), "input_shape": ()}, ValueError, r"input_shape is \(\); this layer takes \(\*, 4\)"),
    ({"formats": "tt"}, TypeError, "formats is 'tt'; it must be a sequence of formats"),
    ({"formats": []}, TypeError, r"formats is \[\]; it must be a sequence of formats"),
    ({"formats": ["cp", "mps"]}, ValueError, r"formats\[1\]: format is 'mps'; accepted: .*'cp'"),
    ({"formats": [None]}, TypeError, r"formats\[0\] is None; it must be a format's name, or a mapping"),
    ({"formats": [{"format": "cp", "layout": "chain"}]}, ValueError, r"formats\[0\] has the key 'layout'; accepted:"),
    ({"formats": [{"format": "tt", "options": 3}]}, TypeError, r"formats\[0\]: options is 3; it must be a mapping"),
    ({"formats": [{"format": "tt", "layout": "ring"}]}, ValueError, "layout is 'ring'; accepted: 'matrix', 'chain'"),
    # What no layer of this size has, in the words of one entry.
    ({"formats": [{"format": "tr", "strategy": "bad"}]}, ValueError, r"formats\[0\]: strategy is 'bad'; accepted:"),
    ({"formats": ["cp", {"format": "tr", "strategy": 5}]}, TypeError, r"formats\[1\]: strategy is 5; accepted:"),
    (
        {"formats": [{"format": "tr", "strategy": "0 > 1"}]},
        ValueError,
        r"formats\[0\]: strategy is '0 > 1'; .*0 to 2, once",
    ),
    ({"formats": [{"format": "tr", "strategy": "0 > x"}]}, ValueError, r"formats\[0\]: strategy is '0 > x'; accepted:"),
    ({"formats": [{"format": "blocktt", "strategy": "bad"}], "rank": 0.01}, ValueError, "strategy is 'bad'; accepted:"),
    ({"formats": [{"format": "tr", "memory": "much"}]}, ValueError, r"formats\[0\]: memory is 'much'; accepted:"),
    (
        {"formats": [{"format": "tr", "in_shape": (7, 8)}]},
        ValueError,
        r"formats\[0\]: in_shape \(7, 8\) has product 56, but in_channels is 8",
    ),
    (
        {"layer": nn.Conv2d(8, 8, 3, groups=2), "formats": [{"format": "tr", "in_shape": (4, 2)}]},
        ValueError,
        "in_shape .* has product 8, but in_channels / groups is 4",
    ),
    (
        {"layer": nn.Linear(4, 6), "formats": [{"format": "tr", "out_shape": (2, 2)}]},
        ValueError,
        r"formats\[0\]: out_shape \(2, 2\) has product 4, but out_features is 6",
    ),
    (
        {"formats": [{"format": "tr", "out_shape": 8}]},
        TypeError,
        r"formats\[0\]: out_shape is 8; it must be a sequence",
    ),
    ({"formats": [{"format": "blocktt", "in_shape": (2, 2, 2)}]}, ValueError, r"in_shape has 3 factors .* takes 2"),
    ({"formats": [{"format": "tr", "rank": (2, 2)}]}, ValueError, r"formats\[0\]: rank \(2, 2\) has 2 entries;"),
    (
        {"formats": [{"format": "cp", "rank": {"s": 1}}]},
        ValueError,
        r"formats\[0\]: rank names 's'; the bonds .* are r",
    ),
    ({"rank": {"foo": 1}}, ValueError, r"rank fits none of the \d+ formats it is for; one says: rank names 'foo'"),
    ({"rank": (2, 2, 2, 2, 2, 2, 2)}, ValueError, "rank fits none of the .* has 7 entries; network"),
    ({"rank": {"foo": 1}, "formats": ["cp"]}, ValueError, "^rank names 'foo'; the bonds of network .* are r$"),
    (
        {"rank": {"tt": {"foo": 1}}},
        ValueError,
        r"rank\['tt'\] fits none of the 2 formats it is for; one says: rank nam",
    ),
    (
        {"formats": [{"format": "btt", "options": {"blocks": 2}, "blocks": 3}]},
        ValueError,
        r"formats\[0\] has 'blocks' twice: 3, and 2 in options; give one",
    ),
    ({"formats": ["einsum"]}, ValueError, r"formats\[0\] lacks 'network', which the format 'einsum' needs"),
    ({"decompose": 1}, TypeError, "decompose is 1; it must be True or False"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG)
def test_errors_name_the_argument(arguments, kind, message):
    with pytest.raises(kind, match=message):
        compare(**{"layer": nn.Conv2d(8, 8, 3)} | arguments)


def test_no_fit_to_what_is_not_finite():
    layer = plain("Linear")
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of layer holds NaN or infinity"):
        compare(layer, decompose=True)
