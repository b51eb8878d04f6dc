"""Kernels of a given standard deviation, and those as large as the weight that they replace."""

import json

import pytest
import torch
from torch import nn

import tnlayers
from cases import CASES
from tnlayers import Init, TensorizeConfig, tensorize_
from tnlayers.layers.description import build, describe

FORMATS = [name for name in tnlayers.FORMATS if name != "einsum"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_has_the_standard_deviation_asked_for(case):
    torch.manual_seed(0)
    layer = case.make(init=Init(std=0.02), dtype=torch.float64)
    assert abs(layer.variance.weight_std - 0.02) < 1e-12
    torch.testing.assert_close(layer.variance.gain, 0.02 * layer.variance.fan**0.5, rtol=1e-12, atol=0)
    size = float(layer.weight.detach().square().mean().sqrt())
    assert abs(size - 0.02) < 1e-10


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"std": 0}, ValueError, "std is 0; it must be positive and finite"),
        ({"std": float("nan")}, ValueError, "std is nan; it must be positive and finite"),
        ({"std": "like"}, TypeError, "std is 'like'; it must be a number or None"),
        ({"std": True}, TypeError, "std is True; it must be a number or None"),
        ({"std": 1, "mode": "fan_out"}, ValueError, "mode is 'fan_out', but std is 1.0 and takes its place"),
        ({"std": 1, "nonlinearity": "tanh"}, ValueError, "nonlinearity is 'tanh', but std is 1.0"),
        ({"std": 1, "input_size": (8,)}, ValueError, r"input_size is \(8,\), but std is 1.0"),
    ],
)
def test_what_contradicts_a_standard_deviation_is_refused(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        Init(**arguments)


def net():
    """Like BERT: small weights, of linear layers and a convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 24, 3), nn.ConvTranspose2d(24, 16, 2), nn.Flatten(), nn.Linear(784, 32)
    ).double()
    for layer in model:
        if hasattr(layer, "weight"):
            nn.init.normal_(layer.weight, std=0.02)
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_drawn_kernels_are_as_large_as_the_weights_they_replace(name):
    model = net()
    wanted = {k: model[k].weight.detach().norm() for k in (0, 1, 3)}
    report = tensorize_(model, TensorizeConfig(name, rank=0.5, decompose=False, init="like"))
    assert [layer.reason for layer in report.layers] == ["drawn"] * 3
    for k, norm in wanted.items():
        torch.testing.assert_close(model[k].weight.detach().norm(), norm, rtol=1e-10, atol=0)
        model[k].reset_parameters()
        torch.testing.assert_close(model[k].weight.detach().norm(), norm, rtol=1e-10, atol=0)


def test_a_weight_without_a_size_stays_and_the_report_says_why():
    model = net()
    nn.init.zeros_(model[0].weight)
    config = TensorizeConfig("tr", decompose=False, init="like", overrides={"1": {"init": "fan_in"}})
    report = tensorize_(model, config)
    assert type(model[0]) is nn.Conv2d
    assert report["0"].reason.startswith("refused: init is 'like', but the weight of this layer is zero")
    assert model[1].init == Init()
    for fault, sentence in ((torch.nan, "holds NaN or infinity"), (0.0, "is zero")):
        linear = nn.Linear(8, 8)
        nn.init.constant_(linear.weight, fault)
        with pytest.raises(ValueError, match=f"init is 'like', but the weight of linear {sentence}"):
            tnlayers.TRLinear.from_linear(linear, decompose=False, init="like")
    with pytest.raises(ValueError, match="linear is on the meta device and has no values; name another init"):
        tnlayers.TRLinear.from_linear(nn.Linear(8, 8, device="meta"), decompose=False, init="like")


def test_embeddings_and_parametrized_weights_too():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(30, 16, padding_idx=1),
            "attention": nn.MultiheadAttention(16, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        }
    ).double()
    with torch.no_grad():
        model["table"].weight.mul_(0.02)
        model["attention"].in_proj_weight.mul_(0.1)
    wanted = [model["table"].weight.norm(), model["attention"].in_proj_weight.norm(), model["normed"].weight.norm()]
    config = TensorizeConfig(
        "tr",
        rank=0.5,
        decompose=False,
        init="like",
        parametrize=True,
        parametrized="fold",
        kinds=["linear", "embedding"],
    )
    report = tensorize_(model, config)
    assert {"table", "attention.in_proj_weight", "normed"} <= {*report.swapped}
    found = [model["table"].weight.norm(), model["attention"].in_proj_weight.norm(), model["normed"].weight.norm()]
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


def test_an_embedding_or_a_parameter_without_a_size_stays():
    model = nn.ModuleDict({"table": nn.Embedding(30, 16), "attention": nn.MultiheadAttention(16, 2)})
    nn.init.zeros_(model["table"].weight)
    nn.init.zeros_(model["attention"].in_proj_weight)
    config = TensorizeConfig("tr", decompose=False, init="like", parametrize=True, kinds=["linear", "embedding"])
    report = tensorize_(model, config)
    for name in ("table", "attention.in_proj_weight"):
        assert report[name].reason.startswith("refused: init is 'like', but the weight of this layer is zero")


def test_one_layer_and_small_half_precision_weights():
    linear = nn.Linear(32, 32, dtype=torch.float16)
    nn.init.normal_(linear.weight, std=1e-4)
    layer = tnlayers.TTLinear.from_linear(linear, decompose=False, init="like")
    size = float(linear.weight.detach().double().square().mean().sqrt())
    torch.testing.assert_close(layer.init.std, size, rtol=1e-5, atol=0)


def test_configurations_and_descriptions_keep_it(tmp_path):
    for init in ("like", Init(std=0.02)):
        config = TensorizeConfig("tr", decompose=False, init=init, overrides={"0": {"init": "like"}})
        assert TensorizeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        config.to_yaml(tmp_path / "config.yaml")
        assert TensorizeConfig.from_yaml(tmp_path / "config.yaml") == config
    layer = tnlayers.TRLinear(8, 8, rank=2, init=Init(std=0.02))
    assert build(describe(layer), device="meta").init == layer.init
    older = describe(tnlayers.TRLinear(8, 8, rank=2))
    del older["init"]["std"]
    assert build(older, device="meta").init == Init()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_each_weight_of_a_recurrent_layer_keeps_its_size(name, kind):
    torch.manual_seed(0)
    more = {"proj_size": 4} if kind == "LSTM" else {}
    plain = getattr(nn, kind)(8, 8, bidirectional=True, **more).double()
    sizes = {}
    for k, (key, weight) in enumerate(plain.named_parameters()):
        nn.init.normal_(weight, std=0.01 * (k + 1))
        sizes[key] = weight.detach().norm()
    model = nn.Sequential(plain)
    config = TensorizeConfig(name, rank=2, decompose=False, init="like", kinds=["recurrent"])
    report = tensorize_(model, config)
    assert report.swapped == ("0",)
    for again in (False, True):
        if again:
            model[0].reset_parameters()
        for key in (key for key in sizes if key.startswith("weight")):
            weight = getattr(model[0], key).detach()
            torch.testing.assert_close(weight.norm(), sizes[key], rtol=1e-10, atol=0)
    config = TensorizeConfig(name, rank=2, decompose=False, init="like", kinds=["recurrent"], options={"plain": ["hh"]})
    model = nn.Sequential(nn.LSTM(8, 8))
    nn.init.zeros_(model[0].weight_hh_l0)
    assert tensorize_(model, config).swapped == ("0",)


def test_a_recurrent_weight_without_a_size_stays():
    model = nn.Sequential(nn.LSTM(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[0].weight_hh_l0)
    config = TensorizeConfig("tr", decompose=False, init="like", kinds=["recurrent", "linear"])
    assert tensorize_(model, config)["0"].reason.startswith(
        "refused: init is 'like', but the weight of this layer's hh_l0 is zero"
    )


def test_a_tied_pair_has_the_size_of_the_embeddings_rows():
    model = nn.ModuleDict({"e": nn.Embedding(53, 16, padding_idx=0), "h": nn.Linear(16, 53)}).double()
    model["h"].weight = model["e"].weight
    wanted = model["e"].weight.detach()[1:].square().mean().sqrt()
    config = TensorizeConfig("tt", rank=0.5, decompose=False, init="like", kinds=["linear", "embedding"])
    assert tensorize_(model, config).swapped == ("e", "h")
    torch.testing.assert_close(model["e"].init.std, wanted.item(), rtol=1e-12, atol=0)
