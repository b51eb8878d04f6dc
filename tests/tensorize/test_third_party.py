"""Models that nobody here wrote, swapped whole: forward, a training step, and back."""

import pytest
import torch
from torch import nn

import tnlayers
from cases import FAMILIES
from tnlayers import TensorizeConfig, TensorLayer, densify_, tensorize_, unfold_
from tnlayers.layers.registry import KINDS

LABELS = {"num_labels": 3}


def transformers():
    """Imported where it is in use: the other processes of the test run save ten seconds."""
    return pytest.importorskip("transformers")


def monai_nets():
    return pytest.importorskip("monai.networks.nets")


def image(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 2])}


def resnet():
    config = transformers().ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", **LABELS
    )
    return transformers().ResNetForImageClassification(config), image()


def regnet():
    config = transformers().RegNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8, **LABELS
    )
    return transformers().RegNetForImageClassification(config), image()


def mobilenet(**own):
    config = transformers().MobileNetV2Config(depth_multiplier=0.25, image_size=64, **LABELS, **own)
    return transformers().MobileNetV2ForImageClassification(config), image(64)


def convnext():
    config = transformers().ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, **LABELS)
    return transformers().ConvNextForImageClassification(config), image()


def vit():
    config = transformers().ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        **LABELS,
    )  # fmt: skip
    return transformers().ViTForImageClassification(config), image()


def unet3d():
    model = monai_nets().UNet(3, in_channels=1, out_channels=2, channels=(8, 16), strides=(2,), num_res_units=1)
    return model, {"x": torch.randn(2, 1, 8, 8, 8)}


def resnet3d():
    model = monai_nets().ResNet(
        "basic", [1, 1, 1, 1], [8, 8, 16, 16], spatial_dims=3, n_input_channels=1, num_classes=3, conv1_t_size=3
    )
    return model, {"x": torch.randn(2, 1, 16, 16, 16)}


FIVE = [layer for layer in FAMILIES if layer.format_type.name in ("cp", "tucker", "tt", "tr", "btt")]
MODELS = [resnet, regnet, mobilenet, convnext, vit, unet3d, resnet3d]
EXPLAINED = ("drawn", "depthwise", "refused: rank is ", "refused: network ")


def loss_of(model, inputs):
    y = model(**inputs)
    return y.loss if hasattr(y, "loss") else y.square().mean()


@pytest.mark.parametrize("layer", FIVE)
@pytest.mark.parametrize("make", MODELS)
def test_from_scratch_forward_and_a_training_step(make, layer):
    torch.manual_seed(0)
    model, inputs = make()
    plain = {name for name, module in model.named_modules() if isinstance(module, tuple(KINDS))}
    config = TensorizeConfig(layer.format_type.name, rank=0.5, decompose=False)
    report = tensorize_(model, config, example_input=inputs)
    assert {name for each in report.layers for name in (each.name, *each.aliases)} == plain
    for each in report.layers:
        assert each.reason.startswith(EXPLAINED), each
        assert each.swapped == (each.reason == "drawn")
        assert each.flops is not None
        if each.swapped:
            assert each.params[1] <= 0.5 * each.params[0]
    # Small networks of blocks have more parameters than half of a small kernel.
    assert len(report.swapped) >= len(plain) / (6 if layer is tnlayers.BTTConv2d else 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = loss_of(model.train(), inputs)
    loss.backward()
    assert torch.isfinite(loss)
    for module in model.modules():
        if isinstance(module, TensorLayer):
            assert all(core.grad is not None for core in module.cores)
    optimizer.step()
    assert torch.isfinite(loss_of(model, inputs))


@pytest.mark.parametrize("back", [densify_, unfold_])
@pytest.mark.parametrize("make", MODELS)
def test_back_to_plain_layers(make, back):
    torch.manual_seed(0)
    model, inputs = make(tf_padding=False) if make is mobilenet else make()
    model = model.double().eval()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    tensorize_(model, TensorizeConfig("tucker", rank=0.5, decompose=False))

    def outputs():
        with torch.no_grad():
            y = model(**inputs)
        return y.logits if hasattr(y, "logits") else y

    before = outputs()
    back(model)
    assert not any(isinstance(module, TensorLayer) for module in model.modules())
    torch.testing.assert_close(outputs(), before, rtol=0, atol=1e-10 * max(1.0, float(before.abs().max())))


def clip():
    own = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = own | {"vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers().CLIPConfig(
        text_config=text, vision_config=own | {"image_size": 16, "patch_size": 8}, projection_dim=16
    )
    tokens = torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])
    return transformers().CLIPModel(config), {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": tokens}


def t5():
    config = transformers().T5Config(
        vocab_size=20, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers().T5ForConditionalGeneration(config)
    return model, {"input_ids": torch.tensor([[3, 5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 4]])}


def mamba():
    config = transformers().MambaConfig(
        vocab_size=20, hidden_size=32, state_size=4, num_hidden_layers=1, time_step_rank=4
    )
    return transformers().MambaModel(config), {"input_ids": torch.tensor([[3, 5, 6, 1]])}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("make", [clip, t5, mamba])
def test_models_that_read_their_layers_weights(make, example):
    """CLIP and T5 ask for dtypes, which sequences answer; Mamba computes with weights, which an example finds out."""
    torch.manual_seed(0)
    model, inputs = make()
    model = model.double().eval()
    tensorize_(model, TensorizeConfig("tucker", rank=0.5, decompose=False))

    def outputs():
        with torch.no_grad():
            return next(iter(model(**inputs).values()))

    before = outputs()
    report = unfold_(model, example_input=inputs if example else None)
    plain = {layer.name for layer in report.layers if layer.reason == "plain again: the model reads its bias, weight"}
    if make is mamba and not example:
        with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'bias'"):
            outputs()
        return
    assert any(layer.reason == "unfolded" for layer in report.layers)
    assert plain == ({"layers.0.mixer.dt_proj"} if make is mamba else set())
    torch.testing.assert_close(outputs(), before, rtol=0, atol=1e-10 * float(before.abs().max()))


def test_fused_encoder_layers():
    """What reads ``linear1.weight`` by itself, as torch's fused encoder does, gets the contracted kernel."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    report = tensorize_(model, TensorizeConfig("tucker", rank=0.5, decompose=False))
    assert report["self_attn.out_proj"].reason.startswith("refused: NonDynamicallyQuantizableLinear is a subclass")
    assert report.swapped == ("linear1", "linear2")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fused = model(x)
    slow = model(x)
    torch.testing.assert_close(fused, slow.detach(), rtol=0, atol=1e-5)
    report = unfold_(model)
    assert report["linear1"].reason == "plain again: its parent reads its weight"
    torch.testing.assert_close(model(x).detach(), slow.detach(), rtol=0, atol=1e-5)
