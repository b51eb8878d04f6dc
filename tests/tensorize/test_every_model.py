"""Models of transformers, swapped as far as it goes: every parameter is accounted for, they train, and come back."""

import copy
from functools import cache

import pytest
import torch

from tnlayers import TensorizeConfig, densify_, tensorize_
from tnlayers.layers.any_weight import NetworkWeight
from tnlayers.tensorize.swappable import GROUPS, NETWORKS

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {"input_ids": torch.tensor([[0, 5, 6, 7], [0, 8, 9, 4]])}
TEXT = {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PICTURE = {"image_size": 16, "patch_size": 8}


def pixels(size=16):
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)}


def sound(length):
    return torch.linspace(-9, 9, length).sin().reshape(1, length)


def gpt2():
    own = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "n_inner": 32}
    return "GPT2LMHeadModel", "GPT2Config", TEXT | own, WORDS


def bert():
    return "BertForMaskedLM", "BertConfig", TEXT | SMALL, WORDS


def llama():
    return "LlamaForCausalLM", "LlamaConfig", TEXT | SMALL | {"num_key_value_heads": 1}, WORDS


def whisper():
    own = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 8}
    own |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    own |= {"max_target_positions": 8, "decoder_start_token_id": 0, "begin_suppress_tokens": None}
    inputs = {"input_features": sound(8 * 16).reshape(1, 8, 16), "decoder_input_ids": WORDS["input_ids"][:1]}
    return "WhisperForConditionalGeneration", "WhisperConfig", TEXT | own, inputs


def wav2vec2():
    own = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "vocab_size": 20}
    own |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    return "Wav2Vec2ForCTC", "Wav2Vec2Config", SMALL | own, {"input_values": sound(400)}


def swin():
    own = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    return "SwinForImageClassification", "SwinConfig", own, pixels()


def vit():
    return "ViTForImageClassification", "ViTConfig", SMALL | PICTURE, pixels()


def clip():
    own = {"text_config": SMALL | TEXT, "vision_config": SMALL | PICTURE, "projection_dim": 16}
    return "CLIPModel", "CLIPConfig", own, WORDS | pixels()


def detr():
    from transformers import ResNetConfig  # noqa: PLC0415  (only where it is in use)

    own = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4, "num_labels": 3}
    own |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    backbone = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    own |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    own |= {"backbone_config": ResNetConfig(**backbone, out_features=["stage2"])}
    return "DetrForObjectDetection", "DetrConfig", own, pixels(32)


def t5():
    own = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    inputs = WORDS | {"decoder_input_ids": WORDS["input_ids"]}
    return "T5ForConditionalGeneration", "T5Config", own | {"decoder_start_token_id": 0}, inputs


def mamba():
    own = {"vocab_size": 20, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4}
    return "MambaForCausalLM", "MambaConfig", own, WORDS


def mixtral():
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    return "MixtralForCausalLM", "MixtralConfig", TEXT | SMALL | own, WORDS


def encodec():
    own = {"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "codebook_dim": 16, "upsampling_ratios": [4, 2]}
    own |= {"num_lstm_layers": 1, "target_bandwidths": [24.0], "sampling_rate": 8000}
    return "EncodecModel", "EncodecConfig", own, {"input_values": sound(64).reshape(1, 1, 64)}


MODELS = [gpt2, bert, llama, whisper, wav2vec2, swin, vit, clip, detr, t5, mamba, mixtral, encodec]


@cache
def made(make):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, config, own, inputs = make()
    return getattr(transformers, model)(getattr(transformers, config)(**own)).eval(), inputs


def output(model, inputs):
    """Return one tensor that depends on most weights."""
    found = model(**inputs)
    names = "logits", "logits_per_image", "audio_values"
    return next(found[name] for name in names if name in found)


@pytest.mark.parametrize("decompose", [False, True], ids=["drawn", "fitted"])
@pytest.mark.parametrize("make", MODELS)
def test_every_parameter_is_accounted_for_and_back(make, decompose, monkeypatch, tmp_path):
    monkeypatch.setattr("tnlayers.tensorize.replace.holders", lambda _: [])  # half of the time; no optimizer is there
    torch.manual_seed(0)
    model, inputs = (copy.deepcopy(each) for each in made(make))
    total = sum(p.numel() for p in model.parameters())
    settings = {"rank": 0.6, "decompose": decompose, "parametrize": True, "parametrized": "fold", "depthwise": True}
    settings["kinds"] = tuple(GROUPS)
    report = tensorize_(model, TensorizeConfig("tucker", **settings))
    rows = report.layers + report.others
    assert sum(row.held for row in rows) == total == report.model_params[0]
    assert report.model_params[1] == sum(p.numel() for p in model.parameters()) < total
    assert all(row.reason for row in rows)
    assert 0.2 < report.reached <= 1
    output(model.train(), inputs).square().mean().backward()
    cores = [p for name, p in model.named_parameters() if ".cores." in name or ".parametrizations." in name]
    gradients = [core.grad for core in cores if core.grad is not None]
    assert len(gradients) >= len(cores) / 2  # not of the layers before EnCodec's quantizer
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    before = output(model.eval(), inputs).detach()
    assert torch.isfinite(before).all()
    if not decompose:  # how it was made is no matter
        model.save_pretrained(tmp_path)
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        mine, theirs = model.state_dict(), again.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert len({*map(id, again.parameters())}) == len({*map(id, model.parameters())})
        for loaded, own in zip(again.parameters(), model.parameters(), strict=True):
            loaded.data = loaded.detach().clone()  # the loaded ones lie in the file's memory, as it aligns them
            loaded.requires_grad_(own.requires_grad)  # transformers' load thaws plain DETRs too; plans depend on it
        torch.testing.assert_close(output(again, inputs), before, rtol=0, atol=0)
        model = again
    densify_(model)
    assert not any(isinstance(module, (*NETWORKS, NetworkWeight)) for module in model.modules())
    after = output(model, inputs).detach()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * max(1.0, float(before.abs().max())))
