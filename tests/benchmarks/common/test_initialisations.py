"""The benchmarks of initialisation: what they measure is what is there, rows are complete, peers may be missing."""

import csv
import math

import pytest
import torch
from torch import nn

import tnlayers
from benchmarks.common import initialisations
from benchmarks.common.families import LayerCase
from benchmarks.common.rows import read_csv
from benchmarks.measure import depth, init_scale
from benchmarks.report import pictures, start_tables


def rows_of(path):
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_default_is_one_of_the_arms():
    others = {name: rule for name, rule in initialisations.RULES.items() if name != "default"}
    assert initialisations.RULES["default"] in others.values()
    assert initialisations.RULES["paper"] == tnlayers.Init.of("paper")


@pytest.mark.parametrize("kind", [nn.Conv2d, tnlayers.TRConv2d, None])
def test_kernels_are_read_off_any_layer(kind):
    torch.manual_seed(0)
    n = initialisations.CHANNELS
    own = {"rank": 3} if kind is tnlayers.TRConv2d else {}
    layer = (kind or nn.Conv2d)(n, n, 3, padding=1, bias=False, **own)
    other = nn.Sequential(layer) if kind is None else layer  # something with no weight of its own
    torch.testing.assert_close(initialisations.kernel(other), layer.weight.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("border", depth.BORDERS)
def test_both_passes_are_those_of_torch(border):
    torch.manual_seed(0)
    mode = depth.BORDERS[border]
    convs = [nn.Conv2d(6, 6, 3, padding=1, padding_mode=border, bias=False) for _ in range(3)]
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    signals, h = [], x
    for conv in convs:
        h = conv(h).relu()
        h.retain_grad()
        signals.append(h)
    torch.manual_seed(1)
    forward, backward = depth.passes([conv.weight.detach() for conv in convs], x.detach(), mode)
    torch.manual_seed(1)
    top = torch.randn_like(h)
    h.backward(top)
    squares = [float(value.detach().square().mean() / x.detach().square().mean()) for value in signals]
    assert forward == pytest.approx([math.log(square) for square in squares], abs=1e-4)
    gradients = [x.grad, *(value.grad for value in signals[:-1])]
    squares = [float(value.square().mean() / top.square().mean()) for value in gradients]
    assert backward == pytest.approx([math.log(square) for square in squares], abs=1e-4)


def test_measures_are_those_of_drawn_inputs():
    torch.manual_seed(0)
    n = 20_000
    weight = initialisations.kernel(
        initialisations.make("white", "cp", initialisations.CHANNELS, initialisations.CHANNELS, 8)
    ).double()
    found = init_scale.measures(weight)
    white = torch.randn(n, initialisations.CHANNELS, 9, dtype=torch.float64)
    smooth = white[:, :, :1].expand_as(white)
    for name, inputs in {
        "white": white, "rectified": white.relu(), "smooth": smooth, "smooth_rectified": smooth.relu(),
    }.items():  # fmt: skip
        y = (inputs.flatten(1) @ weight.flatten(1).mT).square().mean(1) / inputs.square().mean() / 2
        assert abs(float(y.mean()) - found[name]) < 5 * float(y.std()) / math.sqrt(n)
    assert 1 < found["effective_rank"] <= 8  # CP of rank 8 is a matrix of rank 8


def test_typical_gains_have_a_logarithm_of_zero_mean():
    """Over fresh inputs and many layers, within five standard errors."""
    torch.manual_seed(0)
    means = []
    for _ in range(60):
        weight = initialisations.make("typical", "cp", 64, 64, 8).weight.detach().double().sum((2, 3))
        v = torch.randn(64, 500, dtype=torch.float64).relu()
        gains = (weight @ v).square().mean(0) / v.square().mean(0) / 2
        means.append(float(gains.log().mean()))
    found = torch.tensor(means)
    assert abs(float(found.mean())) < 5 * float(found.std()) / math.sqrt(60)
    plain = initialisations.make("default", "cp", 64, 64, 8).weight.detach().double().sum((2, 3))
    gains = (plain @ v).square().mean(0) / v.square().mean(0) / 2
    assert float(gains.log().mean()) < -0.02


def test_rows_are_complete_and_become_tables_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "DEPTHS", (3, 6))
    monkeypatch.setattr(depth, "EVERY", 3)
    monkeypatch.setattr(depth, "NETWORKS", {name: depth.NETWORKS[name] for name in ("dense", "TT r8")})
    monkeypatch.setattr(depth, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(init_scale, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    chosen = ["default", "exact", "orthogonal white", "white", "paper", "kaiming", "xavier", "tltorch"]
    monkeypatch.setattr(
        "sys.argv",
        ["depth.py", "--inits", "default", "tltorch", "calibrated", "--draws", "2", "--out", f"{tmp_path}/depth.csv"],
    )
    depth.main()
    rows = read_csv(tmp_path / "depth.csv")
    calibrated = [row for row in rows if row["init"] == "calibrated" and row["layer"] == row["depth"]]
    assert len(calibrated) == 2 * 2 * 2
    assert all(abs(float(row["forward"])) < 0.3 for row in calibrated)
    assert [row["note"] for row in rows if row["network"] == "TT r8" and row["init"] == "tltorch"] != [""]
    table = start_tables.depth(rows)
    assert "forward behind 6 layers" in table
    assert "commit" in table
    monkeypatch.setattr("sys.argv", ["pictures.py"])
    pictures.main()
    assert (tmp_path / "depth.png").stat().st_size > 1000

    own = ["--families", "cp", "tt", "--ranks", "4", "--inits", *chosen, "--draws", "3"]
    monkeypatch.setattr("sys.argv", ["init_scale.py", *own, "--out", f"{tmp_path}/init_scale.csv"])
    init_scale.main()
    rows = read_csv(tmp_path / "init_scale.csv")
    assert len(rows) == 1 + 2 * len(chosen)
    default = [row for row in rows if row["init"] == "default"]
    for name in ("white", "rectified", "smooth", "smooth_rectified"):
        assert all(float(row[f"{name}_{end}"]) == pytest.approx(1, abs=1e-3) for row in default for end in (5, 95))
    assert "over all formats and ranks" in start_tables.init_scale(rows)


class Here:
    """A pool without processes, so that what is patched is there."""

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        value = function(*arguments)
        return type("Done", (), {"result": lambda _: value})()


@pytest.mark.parametrize("family", ["cp", "tucker", "tt", "tr"])
def test_tednet_s_numbers_are_in_our_layers(family):
    """One distribution in all cores of a layer, as large as tednet's own."""
    layers = [initialisations.make("tednet", family, 16, 32, 0.25) for _ in range(20)]
    drawn = [torch.cat([core.detach().flatten() for core in layer.cores]) for layer in layers]
    assert isinstance(layers[0], tnlayers.TensorLayer)
    ours = initialisations.make("paper", family, 16, 32, 0.25)
    with torch.no_grad():
        peer = initialisations.tednet_peer(LayerCase(family, (16, 32, 0, 1), 0.25, 0, ""), ours)
    own = torch.cat([p.detach().flatten() for name, p in peer.named_parameters() if name != "bias"])
    spread = torch.stack([numbers.std() for numbers in drawn])
    # The standard error of a standard deviation is 0.71 of it over the root of the count, for normal numbers.
    error = 0.71 * own.std() / len(own) ** 0.5
    assert abs(spread.mean() - own.std()) < 5 * error * (1 + 1 / 20) ** 0.5
