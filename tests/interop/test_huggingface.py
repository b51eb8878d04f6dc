"""Round trips through transformers: save_pretrained and from_pretrained give the same model, to the last bit."""

import copy
import importlib
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import tnlayers
from tnlayers import TensorizeConfig, TensorLayer, densify_, register_with_transformers, tensorize_
from tnlayers.interop import huggingface, transformers_quantizer

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IDS = torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def transformers():
    """Imported where it is in use: the other processes of the test run save ten seconds."""
    return pytest.importorskip("transformers", minversion="5")


def gpt2():
    config = transformers().GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=8, tie_word_embeddings=False, **TOKENS
    )
    model = transformers().GPT2LMHeadModel(config)
    for parent in [*model.modules()]:
        for name, layer in parent.named_children():
            if type(layer).__name__ == "Conv1D":  # an nn.Linear whose weight is transposed
                linear = nn.Linear(*layer.weight.shape)
                linear.weight.data, linear.bias.data = layer.weight.data.T.contiguous(), layer.bias.data
                setattr(parent, name, linear)
    return model, {"input_ids": IDS}


def bert():
    config = transformers().BertConfig(**SMALL, **TOKENS, max_position_embeddings=8)
    return transformers().BertForSequenceClassification(config), {"input_ids": IDS}


def llama():
    config = transformers().LlamaConfig(**SMALL, **TOKENS, num_key_value_heads=1, max_position_embeddings=8)
    return transformers().LlamaForCausalLM(config), {"input_ids": IDS}


def whisper():
    config = transformers().WhisperConfig(
        **TOKENS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=4, max_source_positions=4, max_target_positions=8,
        decoder_start_token_id=0, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers().WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.ones(2, 4, 8), "decoder_input_ids": IDS}


def wav2vec2():
    config = transformers().Wav2Vec2Config(
        **SMALL, conv_dim=[16, 16], conv_stride=[2, 2], conv_kernel=[3, 3], num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **TOKENS,
    )  # fmt: skip
    return transformers().Wav2Vec2ForCTC(config), {"input_values": torch.linspace(-1, 1, 128).view(2, 64)}


def swin():
    config = transformers().SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, num_labels=3
    )
    return transformers().SwinForImageClassification(config), {"pixel_values": IMAGES}


def vit():
    config = transformers().ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    return transformers().ViTForImageClassification(config), {"pixel_values": IMAGES}


def clip():
    config = transformers().CLIPConfig(
        text_config=SMALL | TOKENS | {"max_position_embeddings": 8},
        vision_config=SMALL | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return transformers().CLIPModel(config), {"pixel_values": IMAGES, "input_ids": IDS}


def detr():
    backbone = transformers().ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"]
    )
    config = transformers().DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=16, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=3,
    )  # fmt: skip
    return transformers().DetrForObjectDetection(config), {"pixel_values": IMAGES}


def t5(**own):
    config = transformers().T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, **own
    )
    return transformers().T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS}


def mamba():
    config = transformers().MambaConfig(
        vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=4
    )
    return transformers().MambaForCausalLM(config), {"input_ids": IDS}


MODELS = [gpt2, bert, llama, whisper, wav2vec2, swin, vit, clip, detr, t5, mamba]


def swapped(make=bert, format="tt", rank=2, **own):
    torch.manual_seed(0)
    model, inputs = make()
    tensorize_(model.eval(), TensorizeConfig(format, rank=rank, decompose=False, **own))
    return model, inputs


def outputs(model, inputs):
    with torch.no_grad():
        y = model(**inputs)
    return next(y[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in y)


def assert_same(again, model, inputs):
    """Names, values and dtypes of the state, and outputs."""
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    layers, twins = (
        {name: each for name, each in each.named_modules(remove_duplicate=False) if isinstance(each, TensorLayer)}
        for each in (again, model)
    )
    assert layers.keys() == twins.keys()
    for name, layer in layers.items():
        twin = twins[name]
        assert (type(layer), layer.rank, layer.init, layer.training) == (type(twin), twin.rank, twin.init, False)
        assert layer.variance == twin.variance


def described(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def loaded(model, folder, **own):
    """Return the model of the folder, after a check that nothing was missing, odd or new."""
    again, info = type(model).from_pretrained(folder, output_loading_info=True, **own)
    assert not any(info.values()), info
    return again


@pytest.mark.parametrize("make", MODELS)
def test_the_same_model_to_the_last_bit(make, tmp_path):
    model, inputs = swapped(make, min_params=0)
    before = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    again = loaded(model, tmp_path)
    assert_same(again, model, inputs)
    again.save_pretrained(tmp_path / "again")
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "again"))
    assert first == second
    assert described(tmp_path / "again") == described(tmp_path)
    model, again = model.double(), again.double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = outputs(model, inputs)
    densify_(again)
    torch.testing.assert_close(outputs(again, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [bert, t5])
def test_other_files_devices_and_dtypes(make, tmp_path):
    pytest.importorskip("accelerate")  # transformers wants it for device_map
    model, inputs = swapped(make)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    for own in ({}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"dtype": torch.float32}):
        assert_same(loaded(model, tmp_path, **own), model, inputs)
    half = loaded(model, tmp_path, dtype=torch.bfloat16)
    assert all(
        torch.equal(value, model.state_dict()[name].to(value.dtype)) for name, value in half.state_dict().items()
    )
    assert {core.dtype for layer in half.modules() if isinstance(layer, TensorLayer) for core in layer.cores} == {
        parameter.dtype for parameter in half.parameters()
    }
    half.save_pretrained(tmp_path)
    assert_same(loaded(half, tmp_path), half, inputs)
    assert_same(half.float(), loaded(half, tmp_path, dtype=torch.float32), inputs)


def test_every_format(tmp_path):
    for name, format in tnlayers.FORMATS.items():
        if name != "einsum":  # its network is the user's
            model, inputs = swapped(vit, name)
            model.save_pretrained(tmp_path)
            assert_same(loaded(model, tmp_path), model, inputs)
            assert format in {type(layer.format) for layer in model.modules() if isinstance(layer, TensorLayer)}


def test_with_and_without_a_head(tmp_path):
    model, inputs = swapped()
    model.save_pretrained(tmp_path / "head")
    base, info = transformers().AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"]
    assert all(name.startswith("classifier.") for name in info["unexpected_keys"])
    assert torch.equal(outputs(base, inputs), outputs(model.bert, inputs))
    base.save_pretrained(tmp_path / "base")
    classes = transformers().AutoModelForSequenceClassification
    again, info = classes.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(outputs(again.bert, inputs), outputs(base, inputs))


def test_without_this_library_loading_raises(tmp_path, monkeypatch, caplog):
    """Weights are never random: transformers names the method that it does not know, and every layer."""
    swapped()[0].save_pretrained(tmp_path)
    auto = importlib.import_module("transformers.quantizers.auto")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, transformers_quantizer.METHOD)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, transformers_quantizer.METHOD)
    for cls in (transformers().AutoModel, transformers().BertForSequenceClassification):
        caplog.clear()
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            cls.from_pretrained(tmp_path)
        assert "Unknown quantization type, got tnlayers" in caplog.text
        assert "encoder.layer.0.attention.self.query.weight" in caplog.text


WITHOUT = """
    import sys
    from transformers import AutoModel

    try:
        AutoModel.from_pretrained(sys.argv[1])
    except RuntimeError as error:
        print("sizes" in str(error))
    import tnlayers
    tnlayers.register_with_transformers()
    print(type(AutoModel.from_pretrained(sys.argv[1]).pooler.dense).__name__)
"""


@pytest.mark.slow
def test_in_a_process_without_this_library(tmp_path):
    swapped()[0].save_pretrained(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "TTLinear"]
    assert "Unknown quantization type, got tnlayers" in done.stderr


def test_saved_is_what_the_model_is_now(tmp_path):
    """Not what it was when it was swapped or loaded."""
    model, inputs = swapped()
    model.save_pretrained(tmp_path)
    model = loaded(model, tmp_path)
    densify_(model, include=["bert.encoder.*"])
    model.classifier = tnlayers.CPLinear(16, 2, rank=3)
    model.bert.pooler.dense = tnlayers.TRLinear.from_linear(nn.Linear(16, 16), rank=3)
    model.save_pretrained(tmp_path)
    names = {name for group in described(tmp_path)["layers"] for name in group["names"]}
    assert names == {"classifier", "bert.pooler.dense"}
    assert_same(again := loaded(model, tmp_path), model, inputs)
    densify_(again)
    assert not hasattr(again, "hf_quantizer")
    again.save_pretrained(tmp_path)
    assert described(tmp_path) is None
    assert_same(loaded(again, tmp_path), again, inputs)


def test_parts_and_copies(tmp_path):
    """Any model within a module is described by itself; copies and pickles are described as they are."""
    model, inputs = swapped()
    copied = copy.deepcopy(model)
    tnlayers.densify_(copied, include=["classifier"])
    for each in (pickle.loads(pickle.dumps(model)), copied, model):
        each.save_pretrained(tmp_path)
        assert_same(loaded(each, tmp_path), each, inputs)
    model.bert.save_pretrained(tmp_path)
    assert_same(loaded(model.bert, tmp_path), model.bert, inputs)
    whole, inputs = swapped(clip)
    whole.vision_model.save_pretrained(tmp_path / "vision")
    whole.save_pretrained(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    assert "quantization_config" in config
    assert "quantization_config" not in config["vision_config"]
    assert_same(loaded(whole, tmp_path / "clip"), whole, inputs)


@pytest.mark.parametrize("plain", [(), ("hh",), ("ih", "hh")])
def test_recurrent_layers(plain, tmp_path):
    """Of a model with two of nn.LSTM, in its encoder and decoder."""
    torch.manual_seed(0)
    config = transformers().EncodecConfig(
        hidden_size=8, num_filters=4, upsampling_ratios=[2], codebook_size=8, codebook_dim=8, num_residual_layers=1,
    )  # fmt: skip
    model = transformers().EncodecModel(config).eval()
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.LSTM)]
    assert len(dense) == 2
    for name in dense:
        rank = 2 if len(plain) < 2 else None
        made = tnlayers.TTLSTM.from_lstm(model.get_submodule(name), rank=rank, decompose=False, plain=plain)
        model.set_submodule(name, made)
    register_with_transformers(model)
    model.save_pretrained(tmp_path)
    again = loaded(model, tmp_path)
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    x = torch.randn(5, 1, 2, model.get_submodule(dense[0]).input_size)
    for name in dense:
        here, there = model.get_submodule(name), again.get_submodule(name)
        assert type(there) is tnlayers.TTLSTM
        assert torch.equal(here(x[:, 0])[0], there(x[:, 0])[0])
        assert [type(part) for part in here.parts.values()] == [type(part) for part in there.parts.values()]
    again.save_pretrained(tmp_path / "again")
    assert described(tmp_path / "again") == described(tmp_path)
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "again"))
    assert first == second
    with pytest.raises(ValueError, match=r"lstm': the file has TTLSTM.*'num_layers': 2.*but the model has LSTM"):
        type(model).from_pretrained(tmp_path, num_lstm_layers=1)


def test_layers_that_came_about_otherwise(tmp_path):
    torch.manual_seed(0)
    model, inputs = bert()
    with pytest.warns(UserWarning, match=r"BertEncoder is a part of .*register_with_transformers\(model\)"):
        tensorize_(model.bert.encoder, TensorizeConfig("tt", rank=2, decompose=False))
    register_with_transformers(model)
    model.eval().save_pretrained(tmp_path)
    assert_same(loaded(model, tmp_path), model, inputs)
    tnlayers.save_tensorized(model, tmp_path / "own.safetensors")
    again = tnlayers.load_tensorized(lambda: type(model)(model.config).eval(), tmp_path / "own.safetensors")
    again.save_pretrained(tmp_path)
    assert_same(loaded(model, tmp_path), model, inputs)
    model.own = tnlayers.TTLinear(16, 16)
    with pytest.raises(ValueError, match="layer 'own': BertForSequenceClassification makes no such module"):
        model.save_pretrained(tmp_path)
    del model.own
    model.classifier = tnlayers.TTLinear(16, 4, rank=2)
    with pytest.raises(ValueError, match=r"layer 'classifier': the file has .*out_features=4.*out_features=2"):
        model.save_pretrained(tmp_path)


def test_ties(tmp_path):
    """Those of tensor layers are kept, and those that a plain layer had are not made again."""
    torch.manual_seed(0)
    model, inputs = gpt2()
    model.config.tie_word_embeddings = True
    tensorize_(model.eval(), TensorizeConfig("tt", rank=2, decompose=False))
    model.save_pretrained(tmp_path)
    assert_same(loaded(model, tmp_path), model, inputs)
    model, inputs = swapped()
    attention = model.bert.encoder.layer[0].attention.self
    attention.key.cores[0] = attention.query.cores[0]
    attention.value = attention.key
    model.save_pretrained(tmp_path)
    again = loaded(model, tmp_path)
    assert_same(again, model, inputs)
    attention = again.bert.encoder.layer[0].attention.self
    assert attention.key.cores[0] is attention.query.cores[0] is attention.value.cores[0]
    assert attention.value.bias is attention.key.bias
    assert attention.key.cores[1] is not attention.query.cores[1]
    base = transformers().AutoModel.from_pretrained(tmp_path).encoder.layer[0].attention.self
    assert base.key.cores[0] is base.query.cores[0]


def bert_lm():
    config = transformers().BertConfig(**SMALL, **TOKENS, max_position_embeddings=8)
    return transformers().BertForMaskedLM(config), {"input_ids": IDS}


def gpt2_lm():
    config = transformers().GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, **TOKENS)
    return transformers().GPT2LMHeadModel(config), {"input_ids": IDS}


@pytest.mark.parametrize("make", [bert_lm, gpt2_lm, t5])
def test_transformers_ties_what_the_model_has(make, tmp_path):
    """Weights that are networks stay tied as they are, and those of the plain model are tied again."""
    model, inputs = swapped(make, kinds=("embedding", "linear"))
    model.save_pretrained(tmp_path)
    for each in (model, loaded(model, tmp_path), copy.deepcopy(model)):
        expected = outputs(each, inputs)
        assert isinstance(each.get_output_embeddings(), tnlayers.TiedLinear)
        for tie in (each.tie_weights, each.init_weights):
            tie()
        assert torch.equal(outputs(each, inputs), expected)
        densify_(each)
        assert type(each)._tied_weights_keys == each._tied_weights_keys
        assert each.all_tied_weights_keys == type(each)(each.config).all_tied_weights_keys
        weight = each.get_input_embeddings().weight = nn.Parameter(each.get_input_embeddings().weight.detach() * 2)
        each.tie_weights()
        assert each.get_output_embeddings().weight is weight
        tensorize_(each, TensorizeConfig("tt", rank=2, decompose=False))  # the tie is left plain
        each.tie_weights()
        assert each.get_output_embeddings().weight is weight


def test_offloaded_layers_are_refused(tmp_path):
    pytest.importorskip("accelerate")
    model, _ = swapped()
    model.save_pretrained(tmp_path)
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    with pytest.raises(ValueError, match=r"layer 'bert.encoder.*': device_map offloads it"):
        type(model).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")


def test_modules_that_the_class_does_not_make(tmp_path):
    """GPT-2's Conv1D has a transposed weight, and reads a square one of an nn.Linear without a word."""
    torch.manual_seed(0)
    model, _ = gpt2()
    tensorize_(model, TensorizeConfig("tt", rank=2, exclude=["*attn.c_proj"], decompose=False))
    with pytest.raises(ValueError, match=r"module 'transformer.h.0.attn.c_proj' is a Linear, .* makes a Conv1D"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_files_that_do_not_fit(tmp_path):
    model, _ = swapped()
    model.save_pretrained(tmp_path)
    cls, found = type(model), json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"layer 'classifier': the file has .*out_features=2.*out_features=5"):
        cls.from_pretrained(tmp_path, num_labels=5)
    for change, message in (
        ({"version": 2}, "version 2; this library reads up to 1"),
        ({"layers": {}}, r"layers is \{\}; it must be a list"),
        ({"layers": [{"names": []}]}, "layers has no 'layer'"),
        ({"tied": []}, r"tied is \[\]; it must be a mapping"),
    ):
        text = json.dumps(found | {"quantization_config": found["quantization_config"] | change})
        (tmp_path / "config.json").write_text(text)
        with pytest.raises((TypeError, ValueError), match=message):
            cls.from_pretrained(tmp_path)
    found["quantization_config"]["layers"][0]["layer"]["format"] = "no"
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"layer 'bert.*': format is 'no'"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_plain_weights_under_the_configuration_of_tensor_layers(whole, tmp_path):
    """A plain model of a swapped model's configuration is saved with it, and loaded as the plain model that it is."""
    model, inputs = swapped() if whole else bert()
    if not whole:
        tnlayers.parametrize_(model, "bert.embeddings.position_embeddings.weight", "tt", rank=2, decompose=False)
        register_with_transformers(model)
    model.save_pretrained(tmp_path / "swapped")
    config = transformers().AutoConfig.from_pretrained(tmp_path / "swapped")
    for own in (config, model.config):
        plain = type(model)(own).eval()
        plain.save_pretrained(tmp_path / "plain")
        assert described(tmp_path / "plain")
        with pytest.warns(UserWarning, match="the file is of the plain model, so a plain model is loaded"):
            again = loaded(plain, tmp_path / "plain")
        assert_same(again, plain, inputs)
        again.save_pretrained(tmp_path / "plain")
        assert described(tmp_path / "plain") is None
    with pytest.raises(ValueError, match=r"(?s)layer 'bert.*': .* the file does not hold its cores"):
        type(model).from_pretrained(None, config=config, state_dict={})


def test_quantization_is_described_by_the_model_alone(tmp_path):
    model, _ = swapped()
    model.save_pretrained(tmp_path)
    bert()[0].save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        type(model).from_pretrained(tmp_path / "plain", quantization_config=model.config.quantization_config)


def test_register():
    register_with_transformers()
    register_with_transformers()
    with pytest.raises(TypeError, match="model is of type int"):
        register_with_transformers(3)
    with pytest.raises(ValueError, match="model is Linear; it must be, or hold, a transformers"):
        register_with_transformers(nn.Linear(2, 2))
    model, _ = swapped()
    with pytest.raises(ValueError, match=r"tnlayers.densify_\(model\)"):
        model.dequantize()
    model, _ = bert()
    model.hf_quantizer = nn.Identity()
    with pytest.raises(ValueError, match="quantized by Identity"):
        register_with_transformers(model)
    with pytest.warns(UserWarning, match="quantized by Identity, so save_pretrained does not describe"):
        tensorize_(model, TensorizeConfig("tt", rank=2, decompose=False))


def test_transformers_is_not_installed(monkeypatch):
    monkeypatch.setattr(huggingface, "registered", huggingface.registered.__wrapped__)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tnlayers\[transformers\]'"):
        register_with_transformers()


def test_trainer(tmp_path):
    """A loaded model trains, and its checkpoints are loaded as others."""
    pytest.importorskip("accelerate")
    model, inputs = swapped()
    model.save_pretrained(tmp_path)
    model = loaded(model, tmp_path)
    before = copy.deepcopy(model.state_dict())
    arguments = transformers().TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=2,
        disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": torch.tensor(k)} for k, ids in enumerate(inputs["input_ids"])]
    found = transformers().Trainer(model, arguments, train_dataset=data).train()
    assert torch.isfinite(torch.tensor(found.training_loss))
    cores = [name for name in before if ".cores." in name]
    assert cores
    assert all(not torch.equal(before[name], model.state_dict()[name]) for name in cores)
    assert_same(loaded(model, tmp_path / "run" / "checkpoint-2"), model.eval(), inputs)
    arguments.max_steps = 3
    transformers().Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=True)
    assert all(not torch.equal(before[name], model.state_dict()[name]) for name in cores)


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = swapped()
    before = copy.deepcopy(model.state_dict())
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for _ in range(2):
        loss = prepared(**inputs, labels=torch.tensor([0, 1])).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items() if ".cores." in name)
    plain = accelerator.unwrap_model(prepared)
    plain.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(prepared))
    assert_same(loaded(plain, tmp_path), plain, inputs)


@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:`is_gradient_checkpointing` is deprecated")
def test_lora(tmp_path):
    """The line of the how-to. Adapters train, are saved, loaded, and merged into plain layers."""
    peft = pytest.importorskip("peft")

    def registered(config):
        config._register_custom_module({tnlayers.TensorLinear: peft.tuners.lora.Linear})
        return config

    def adapters(model):
        return {name: value for name, value in model.state_dict().items() if "lora_" in name}

    model, inputs = swapped()
    model.save_pretrained(tmp_path / "base")
    config = registered(peft.LoraConfig(r=2, target_modules=["query", "value", "classifier"]))
    adapted = peft.get_peft_model(model, config)
    before = copy.deepcopy(adapters(adapted))
    cores = [core.clone() for core in model.bert.pooler.dense.cores]
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=1.0)
    for _ in range(2):  # B starts at zero, so A moves in the second step
        optimizer.zero_grad()
        adapted(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    assert len(before) == 6
    assert all(not torch.equal(before[name], value) for name, value in adapters(adapted).items())
    assert all(map(torch.equal, cores, model.bert.pooler.dense.cores))
    adapted.save_pretrained(tmp_path / "lora")
    base = loaded(swapped()[0], tmp_path / "base")
    config = registered(peft.PeftConfig.from_pretrained(tmp_path / "lora"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "lora", config=config)
    expected = outputs(adapted.eval(), inputs)
    assert torch.equal(outputs(again.eval(), inputs), expected)
    with pytest.raises(RuntimeError, match="cannot change a tensor layer"):
        again.merge_and_unload()
    densify_(again)
    torch.testing.assert_close(outputs(again.merge_and_unload(), inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:`is_gradient_checkpointing` is deprecated")
def test_transformers_own_adapters(tmp_path, monkeypatch):
    """``add_adapter`` of transformers: ``save_pretrained`` then writes the adapters alone, as of a plain model."""
    peft = pytest.importorskip("peft")
    model, _ = swapped()
    # transformers 5.24 wants a PEFT that came out after it.
    monkeypatch.setattr(importlib.import_module("transformers.integrations.peft"), "MIN_PEFT_VERSION", "0")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    config._register_custom_module({tnlayers.TensorLinear: peft.tuners.lora.Linear})
    model.add_adapter(config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
