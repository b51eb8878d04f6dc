"""Image models of timm, swapped whole: the function, the gradients, and back. ``make test-latest`` installs timm."""

import copy
import re

import pytest
import torch
from torch import nn

from tnlayers import TensorizeConfig, TensorLayer, densify_, tensorize_
from tnlayers.layers.registry import KINDS

timm = pytest.importorskip("timm", reason="timm is not installed; make test-latest has it")

# The smallest of each kind, with the arguments that make it smaller still.
SMALL = {"img_size": 64}
MODELS = {
    "beit_base_patch16_224": SMALL | {"embed_dim": 96, "depth": 2, "num_heads": 3},
    "cait_xxs24_224": SMALL | {"depth": 2},
    "coatnet_nano_rw_224": SMALL,
    "convnext_atto": {},
    "deit_tiny_distilled_patch16_224": SMALL | {"depth": 2},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2)},
    "dla46_c": {},
    "edgenext_xx_small": {},
    "efficientnet_b0": {},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
    "fastvit_t8": {},
    "ghostnet_050": {},
    "gmlp_ti16_224": SMALL,
    "hrnet_w18_small": {},
    "inception_next_atto": {},
    "maxvit_rmlp_pico_rw_256": SMALL,
    "mixer_s32_224": SMALL,
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "nf_regnet_b0": {},
    "poolformer_s12": {},
    "regnetx_002": {},
    "repvgg_a0": {},
    "resmlp_12_224": SMALL,
    "resnet10t": {},
    "resnext50_32x4d": {},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 24, "depths": (1, 1, 1), "num_heads": (1, 2, 4)},
    "vgg11": {"mlp_ratio": 0.1},
    "vit_tiny_patch16_224": SMALL | {"depth": 2},
    "xception41": {},
}
# What may stay plain, and why: nothing else is refused.
EXPLAINED = re.compile(r"drawn|fitted|depthwise|refused: rank is |refused: \w+ is a subclass of ")


def model_and_images(name):
    torch.manual_seed(0)
    size = MODELS[name].get("img_size", 64)
    return timm.create_model(name, num_classes=10, **MODELS[name]).double(), torch.randn(2, 3, size, size).double()


def check(model, x, config):
    """Swap, compare with the same model densified, take the gradients of a training step; return the report."""
    plain = {name for name, module in model.named_modules() if isinstance(module, tuple(KINDS))}
    report = tensorize_(model, config, example_input=x)
    assert {name for each in report.layers for name in (each.name, *each.aliases)} == plain
    for each in report.layers:
        assert EXPLAINED.match(each.reason), each.reason
        # The attention of beit and eva02 hands the weight to F.linear itself: the layer is never called.
        assert each.flops is not None or each.name.endswith(".attn.qkv"), each.name
    assert len(report.swapped) >= len(plain) / 3
    dense = copy.deepcopy(model)
    densify_(dense)
    assert not any(isinstance(module, TensorLayer) for module in dense.modules())
    with torch.no_grad():
        expected, found = dense.eval()(x), model.eval()(x)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    nn.functional.cross_entropy(model.train()(x), torch.tensor([0, 3])).backward()
    for name in report.swapped:
        for core in model.get_submodule(name).cores:
            assert core.grad is not None, name
            assert torch.isfinite(core.grad).all(), name
    return report


@pytest.mark.parametrize("format", ["tr", "tucker"])
@pytest.mark.parametrize("name", MODELS)
def test_drawn(name, format):
    model, x = model_and_images(name)
    check(model, x, TensorizeConfig(format, rank=0.4, decompose=False))


@pytest.mark.parametrize(("name", "format"), [("mobilenetv3_small_050", "tucker"), ("vit_tiny_patch16_224", "tt")])
def test_fitted(name, format):
    model, x = model_and_images(name)
    report = check(model, x, TensorizeConfig(format, rank=0.4))
    assert all(0 < report[name].error < 1 for name in report.swapped)
