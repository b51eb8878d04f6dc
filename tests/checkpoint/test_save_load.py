import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import tnlayers
from tnlayers.checkpoint.save_load import load_tensorized, save_tensorized
from tnlayers.layers.description import describe
from tnlayers.layers.registry import layer_class
from tnlayers.tensorize.config import TensorizeConfig

COMPILER = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
"""Importing it warns."""


class Net(nn.Module):
    """A small model with a layer of each kind, and every sort of state."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 6)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.up(self.conv(x))).mean((2, 3)))


def tensorized(format: str = "tr", **options: Any) -> Any:
    """The same with tensor layers, after a change of everything that is not a layer."""
    torch.manual_seed(0)
    model: Any = Net()
    for name in ("conv", "up", "head"):
        dense = getattr(model, name)
        cls = layer_class(format, type(dense))
        setattr(model, name, cls.from_dense(dense, rank=2, decompose=False, **options))
    model(torch.randn(8, 4, 6, 6))
    model.mask.logical_not_()
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    save_tensorized(tensorized(), path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Change a file's JSON, and its tensors; a text that is returned is written as it is."""
    tensors, about = load_file(path), read(path)
    text = change(about, tensors)
    save_file(tensors, path, {"tnlayers": text if isinstance(text, str) else json.dumps(about)})


def read(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["tnlayers"])


@pytest.mark.parametrize("format", tnlayers.FORMATS)
def test_round_trip(format: str, path: Path):
    if format == "einsum":
        model: Any = Net()
        model.conv = tnlayers.EinsumConv2d(4, 8, 3, 2, 1, network="i r, h w r s, s o", rank=2)
    else:
        model = tensorized(format)
    calls = []

    def factory() -> Any:
        calls.append(Net().eval())
        calls[-1].conv.train()
        calls[-1].conv.weight.requires_grad_(False)
        return calls[-1]

    save_tensorized(model, path)
    again = load_tensorized(factory, path)
    assert len(calls) == 1
    assert again is calls[0]
    assert same(model, again)
    assert (again.conv.training, again.head.training, again.training) == (True, False, False)
    assert {core.requires_grad for core in again.conv.cores} == {False}
    assert again.conv.bias.requires_grad
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), again.eval()(x))
    again.load_state_dict(load_tensorized(lambda: model, str(path)).state_dict())  # a model with tensor layers already
    assert os.listdir(path.parent) == [path.name]


def test_loading_draws_nothing(saved: Path):
    made = Net()
    state = torch.get_rng_state()
    load_tensorized(lambda: made, saved)
    assert torch.equal(state, torch.get_rng_state())


def test_the_model_itself_is_the_layer(path: Path):
    layer = tnlayers.TTConv1d(4, 6, 3, rank=2)
    save_tensorized(layer, path)
    assert same(layer, load_tensorized(lambda: nn.Conv1d(4, 6, 3), path))


def test_subclasses_of_torch_s_layers_are_replaced(path: Path):
    class Special(nn.Linear):
        pass

    save_tensorized(nn.Sequential(tnlayers.TRLinear(4, 6, rank=2)), path)
    assert type(load_tensorized(lambda: nn.Sequential(Special(4, 6)), path)[0]) is tnlayers.TRLinear


@COMPILER
def test_the_configuration_comes_back(path: Path):
    model = tensorized()
    model._tensorize_config = TensorizeConfig("tr", rank=2)
    save_tensorized(torch.compile(model), path)
    assert load_tensorized(Net, path)._tensorize_config == model._tensorize_config
    assert read(path)["config"] == model._tensorize_config.to_dict()


# ---------------------------------------------------------------- names and sharing


class Tied(nn.Module):
    def __init__(self, tied: bool = True):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.body2 = self.body if tied else nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def test_what_is_shared_is_stored_once_and_shared_again(path: Path):
    model: Any = Tied()
    model.body = model.body2 = tnlayers.TRLinear.from_linear(model.body, rank=2)
    save_tensorized(model, path)
    shared = ["body2.cores.0", "body2.cores.1", "body2.bias"]
    assert read(path)["aliases"] == {name: name.replace("2", "") for name in shared} | {
        "lm_head.weight": "embed.weight"
    }
    assert not {*shared, "lm_head.weight"} & {*load_file(path)}
    again = load_tensorized(Tied, path)
    assert again.body is again.body2
    assert again.lm_head.weight is again.embed.weight
    loose = load_tensorized(lambda: Tied(tied=False), path)  # shares at least the tensors
    assert loose.lm_head.weight is loose.embed.weight
    assert all(map(lambda a, b: a is b, loose.body.parameters(), loose.body2.parameters()))
    assert same(model, again)
    assert same(model, loose)


def test_a_model_shares_what_the_file_does_not(path: Path):
    save_tensorized(Tied(tied=False), path)
    with pytest.raises(ValueError, match=r"'body2.weight' and 'body.weight' are one tensor in the model, but two in"):
        load_tensorized(Tied, path)
    model: Any = Tied(tied=False)
    model.body, model.body2 = tnlayers.TRLinear(4, 4, rank=2), tnlayers.TRLinear(4, 4, rank=1)
    save_tensorized(model, path)
    with pytest.raises(ValueError, match=r"'body' and 'body2' are one module in the model, but differ in the file"):
        load_tensorized(Tied, path)


def test_views_and_strides(path: Path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            base = torch.arange(24.0).reshape(4, 6)
            for name, value in {
                "whole": base,
                "row": base[1],
                "turned": base.T,
                "flat": base.view(-1),
                "bits": base.view(torch.int32),
                "empty": base[:0],
                "conj": torch.complex(base, base).conj(),
                "scalar": torch.tensor(3),
            }.items():
                self.register_buffer(name, value)

    class Copies(Views):
        def __init__(self):
            super().__init__()
            for name, value in self.named_buffers():
                setattr(self, name, torch.zeros_like(value.resolve_conj(), memory_format=torch.contiguous_format))

    save_tensorized(Views(), path)
    about = read(path)
    assert about["aliases"] == {}
    assert about["views"] == {"row": "whole", "turned": "whole", "flat": "whole", "bits": "whole"}
    assert same(Views(), load_tensorized(Views, path))
    with pytest.warns(UserWarning, match=r"'\w+' and 'whole' were views of one memory when they were saved") as caught:
        loaded = load_tensorized(Copies, path)
    assert len(caught) == len(about["views"])
    assert all(warning.filename == __file__ for warning in caught)
    assert same(Views(), loaded)
    save_tensorized(Copies(), path)  # of zeros: what differs nowhere may be one in the model
    assert "views" not in read(path)
    assert not load_tensorized(Views, path).whole.any()


def test_views_in_the_model_of_what_differs_in_the_file(path: Path):
    """Loading one would overwrite the other."""
    model: Any = Tied(tied=False)
    save_tensorized(model, path)

    def factory() -> Any:
        made: Any = Tied(tied=False)
        made.body2.weight.data = made.body.weight.data.t()
        return made

    with pytest.raises(ValueError, match=r"'body2.weight' and 'body.weight' share memory in the model, but differ in"):
        load_tensorized(factory, path)
    model.body2.weight.data = model.body.weight.data.t()
    save_tensorized(model, path)
    again = load_tensorized(factory, path)
    assert again.body2.weight.data_ptr() == again.body.weight.data_ptr()
    assert same(model, again)


def test_tensor_layers_that_are_the_file_s_stay(saved: Path):
    """Whatever holds them goes on with the values of the file."""
    made = tensorized()
    made.conv.cores[0].requires_grad_(False)
    made.stages = [[made.conv]]
    for core in made.conv.cores:
        core.detach().zero_()
    again = load_tensorized(lambda: made, saved)
    assert again.stages[0][0] is again.conv
    assert [core.requires_grad for core in again.conv.cores].count(False) == 1
    assert same(again, tensorized())
    other = tensorized()
    other.conv = layer_class("cp", nn.Conv2d)(4, 8, 3, stride=2, padding=1, rank=2)
    other.stages = [[other.conv]]
    with pytest.raises(ValueError, match=r"layer 'conv': Net.stages\[0\]\[0\] holds it too, outside of the modules"):
        load_tensorized(lambda: other, saved)


def test_a_tensor_that_is_to_be_tied_and_is_held(path: Path):
    save_tensorized(Tied(), path)

    def factory() -> Any:
        made: Any = Tied(tied=False)
        made.weights = [made.lm_head.weight]
        return made

    with pytest.raises(ValueError, match=r"Tied.weights\[0\] holds its weight too, outside of the modules"):
        load_tensorized(factory, path)


@COMPILER
def test_compiled_models_leave_no_trace(path: Path):
    model = tensorized()
    for made, factory in ((torch.compile(model), Net), (model, lambda: torch.compile(Net()))):
        save_tensorized(made, path)
        again = load_tensorized(factory, path)
        assert list(read(path)["layers"]) == ["conv", "up", "head"]
        assert same(model, getattr(again, "_orig_mod", again))
    model.conv = torch.compile(model.conv)
    save_tensorized(nn.DataParallel(model), path)
    assert same(load_tensorized(Net, path).conv, model.conv._orig_mod)

    def factory() -> nn.Module:
        net: Any = Net()
        net.conv = torch.compile(net.conv)
        return net

    with pytest.raises(ValueError, match="layer 'conv' is compiled or wrapped by itself in the model"):
        load_tensorized(factory, path)


def test_distributed_models(path: Path, tmp_path: Path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tensorized()
        save_tensorized(nn.parallel.DistributedDataParallel(model), path)
        assert same(model, load_tensorized(Net, path))
        with pytest.raises(ValueError, match="distribute it after loading"):
            load_tensorized(lambda: nn.parallel.DistributedDataParallel(Net()), path)
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- what cannot be saved


def changed(**attributes: Any) -> nn.Module:
    model = Net()
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor):
            model.register_buffer(name, value)
        else:
            setattr(model, name, value)
    return model


class Extra(nn.Module):
    def get_extra_state(self) -> Any:
        return {"a": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Loud(tnlayers.TRLinear):
    def forward(self, input: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: 3, "model is of type int; it must be a torch.nn.Module"),
        (lambda: changed(sub=Extra()), r"state 'sub._extra_state' is dict; a file holds tensors only"),
        (lambda: changed(far=torch.ones(2, device="meta")), "tensor 'far' is on the meta device"),
        (
            lambda: changed(sparse=torch.eye(2).to_sparse()),
            "tensor 'sparse' is Tensor .*sparse_coo.*plain dense tensors",
        ),
        (lambda: changed(wide=torch.ones(2, dtype=torch.complex128)), "tensor 'wide' has torch.complex128; accepted"),
        (lambda: changed(lazy=nn.LazyLinear(3)), r"tensor 'lazy.weight' is UninitializedParameter"),
        (lambda: changed(head=Loud(4, 6, rank=2)), "layer 'head': Loud has its own forward"),
    ],
)
def test_what_cannot_be_saved_is_named(model: Any, sentence: str, path: Path):
    path.write_bytes(b"old")
    with pytest.raises((TypeError, ValueError), match=sentence):
        save_tensorized(model(), path)
    assert path.read_bytes() == b"old"


# ---------------------------------------------------------------- files, whole or not at all


def test_modes_and_links(path: Path, tmp_path: Path):
    before = os.umask(0o027)
    try:
        save_tensorized(Net(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    link = tmp_path / "link"
    link.symlink_to(path.name)
    save_tensorized(tensorized(), os.fspath(link))
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert same(tensorized(), load_tensorized(Net, link))
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*nowhere; make it first"):
        save_tensorized(Net(), tmp_path / "nowhere" / "file")
    with pytest.raises(OSError, match="it is there, and no regular file"):
        save_tensorized(Net(), tmp_path)
    with pytest.raises(ValueError, match="is no regular file"):
        load_tensorized(Net, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors does not exist"):
        load_tensorized(Net, tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file(saved: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch):
    before = saved.read_bytes()

    def half(tensors: Any, file: Any, metadata: Any) -> None:
        Path(file).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(type(error)):
        save_tensorized(Net(), saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_killed_writer_leaves_the_old_file(saved: Path):
    code = f"""if True:
        import sys, time, torch
        from pathlib import Path
        import safetensors.torch, tnlayers
        def half(tensors, file, metadata):
            Path(file).write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)
        safetensors.torch.save_file = half
        tnlayers.save_tensorized(torch.nn.Linear(2, 2), {os.fspath(saved)!r})"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir(saved.parent)) == 2, "it was writing elsewhere"
    assert same(tensorized(), load_tensorized(Net, saved))


# ---------------------------------------------------------------- models that do not fit


def without(name: str) -> nn.Module:
    model = Net()
    delattr(model, name)
    return model


def hooked() -> nn.Module:
    model = Net()
    model.conv.register_forward_hook(lambda *_: None)
    return model


def parametrized() -> nn.Module:
    model = Net()
    parametrize.register_parametrization(model.conv, "weight", nn.Identity())
    return model


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        (lambda: without("conv"), "the file has the layer 'conv', but the model has no module of this name"),
        (
            lambda: changed(conv=nn.Conv2d(4, 64, 3, 2, 1)),
            r"layer 'conv': the file has Conv2d\(.*out_channels=8.*but the model has Conv2d\(.*out_channels=64",
        ),
        (lambda: changed(conv=nn.Linear(4, 8)), r"the file has Conv2d\(.*but the model has Linear\(bias=True"),
        (lambda: changed(conv=nn.ReLU()), r"the file has Conv2d\(.*but the model has a ReLU"),
        (lambda: changed(conv=Net().conv.double()), r"dtype=float32\), but .*dtype=float64\)"),
        (
            lambda: changed(norm=nn.BatchNorm2d(5)),
            r"'norm.weight' is torch.float32 of shape \(4,\) in the file, but .*5",
        ),
        (
            lambda: changed(mask=torch.ones(2)),
            r"'mask' is torch.bool of .*, but torch.float32 of shape \(2,\) in the mod",
        ),
        (lambda: without("norm"), r"'norm.bias' is .* in the file, but no tensor in the model"),
        (lambda: changed(new=nn.ReLU(), add=torch.ones(1)), r"'add' is no tensor in the file, but torch.float32 of"),
        (lambda: changed(sub=Extra()), r"the model's state 'sub._extra_state' is dict; a file holds tensors only"),
        (
            lambda: changed(more=tnlayers.TRLinear(4, 4, rank=1)),
            "the model has the tensor layer 'more', but the file has no such",
        ),
        (hooked, "layer 'conv': the model's module has _forward_hooks; add them after loading"),
        (parametrized, "layer 'conv': the model's module has parametrizations"),
        (lambda: Net().to("meta"), r"the factory makes 'conv.weight' on the meta device"),
    ],
)
def test_a_model_that_does_not_fit(factory: Any, sentence: str, saved: Path):
    with pytest.raises(ValueError, match=rf"cannot be loaded: .*{sentence}"):
        load_tensorized(factory, saved)


def test_factories(saved: Path):
    def broken() -> Any:
        raise TypeError("my own")

    with pytest.raises(TypeError, match=r"^my own$"):
        load_tensorized(broken, saved)
    with pytest.raises(TypeError, match="model_factory made int; it must make"):
        load_tensorized(lambda: 3, saved)  # type: ignore[arg-type, return-value]


# ---------------------------------------------------------------- damaged and hostile files


def never() -> Any:
    raise AssertionError("refused before a model is made")


def test_files_of_others(path: Path):
    for content in (b"", b"{}", b"\xff" * 64, b"\0" * 64, (2**40).to_bytes(8, "little") + b"{}", b"PK\3\4" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be loaded: Error while deserializing header"):
            load_tensorized(never, path)
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.ones(2)}, path, metadata)
        with pytest.raises(ValueError, match="it was written by something else: its metadata have no 'tnlayers'"):
            load_tensorized(never, path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no JSON"),
        ("[]", "no JSON object with a version"),
        ("3", "no JSON object with a version"),
        ("{}", "no JSON object with a version"),
        ('{"version": true}', "no JSON object with a version"),
        ('{"version": 2}', "it was written by version 2; this library reads up to 1"),
        ('{"version": 1}', "metadata has no 'tnlayers'"),
        ('{"version": 1, "version": 1}', "a key is there twice"),
        ('{"version": NaN}', "NaN is no number that could be meant"),
        ('{"version": -Infinity}', "is no number that could be meant"),
        ('{"version": 1e999}', "is no number that could be meant"),
        ('{"version": ' + "9" * 5000 + "}", "is no number that could be meant"),
        ('{"version": ' + "[" * 100_000 + "]" * 100_000 + "}", "recursion"),
        ('{"version": "' + "a" * 2**24 + '"}', "characters; at most"),
        ('{"version": 1}}', "no JSON"),
    ],
)
def test_hostile_json(text: str, sentence: str, saved: Path):
    rewrite(saved, lambda about, tensors: text)
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{sentence}") as caught:
        load_tensorized(never, saved)
    assert len(str(caught.value)) < 2000


def put(*keys: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(about: dict[str, Any], tensors: dict[str, Any]) -> None:
        for key in keys[:-1]:
            about = about[key]
        about[keys[-1]] = value

    return change


HUGE = describe(tnlayers.TRLinear(4, 6, rank=2)) | {"rank": {"r0": 2**29, "r1": 2**29}}
NESTED: Any = []
for _ in range(900):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("more", value=1), "metadata has the key 'more'"),
        (put("layers", value=[]), "layers and aliases must be JSON objects"),
        (put("layers", "conv", value=3), "layer 'conv': description is 3; it must be a mapping"),
        (put("layers", "conv", value=NESTED), "layer 'conv': description"),
        (put("layers", "conv", "options", value=NESTED), "layer 'conv': options is|layer 'conv': description"),
        (put("layers", "conv", "format", value="__import__('os')"), "layer 'conv': format is"),
        (
            put("layers", "conv", "rank", "r0", value=3),
            r"'conv' is described with cores of shapes .*; its tensors have",
        ),
        (put("layers", "head", value=HUGE), "layer 'head': .*at most 64 cores and"),
        (put("layers", "__class__", value=describe(tnlayers.TRLinear(4, 6, rank=2))), "'__class__' is described with"),
        (put("aliases", value={"x": "x"}), "alias 'x' stands for 'x', which is no tensor in it"),
        (put("aliases", value={"x": "y", "y": "x"}), "alias 'x' stands for 'y', which is no tensor in it"),
        (put("aliases", value={"x": 3}), "alias 'x' stands for 3"),
        (put("views", value=[]), "views must be a JSON object whose values are names"),
        (put("views", value={"mask": 3}), "views must be a JSON object whose values are names"),
        (put("views", value={"mask": "nothing"}), "views must be a JSON object whose values are names"),
        (put("aliases", value={"mask": "mask"}), "alias 'mask' is also the name of a tensor"),
        (put("config", value=3), "config is 3|config"),
        (put("config", value={"format": "nothing"}), "format is 'nothing'"),
        (put("config", value={"version": 99}), "version is 99"),
    ],
)
def test_hostile_descriptions(change: Any, sentence: str, saved: Path):
    rewrite(saved, change)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{sentence}"):
        load_tensorized(never, saved)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "name", ["__class__", "a..b", "conv.weight", "forward", ".", "conv.", "norm", "_modules", "\n"]
)
def test_names_that_are_no_layer_s(name: str, path: Path):
    save_tensorized(nn.Sequential(tnlayers.TRLinear(4, 6, rank=2, bias=False)), path)

    def change(about: dict[str, Any], tensors: dict[str, Any]) -> None:
        about["layers"] = {name: about["layers"]["0"]}
        for k in range(2):
            tensors[f"{name}.cores.{k}"] = tensors.pop(f"0.cores.{k}")

    rewrite(path, change)
    with pytest.raises(ValueError, match=r"but the model has no module of this name|but the model has a BatchNorm2d"):
        load_tensorized(Net, path)


def test_other_dtypes_of_tensors(saved: Path):
    for name in ("conv.cores.0", "norm.weight"):
        before = saved.read_bytes()
        rewrite(saved, lambda about, tensors, name=name: tensors.update({name: tensors[name].double()}))
        with pytest.raises(ValueError, match=rf"'{name}' is torch.float64 .* in the file, but torch.float32"):
            load_tensorized(Net, saved)
        saved.write_bytes(before)


def test_an_alias_that_ties_what_was_not_tied(saved: Path):
    def change(about: dict[str, Any], tensors: dict[str, Any]) -> None:
        del tensors["norm.bias"]
        about["aliases"]["norm.bias"] = "norm.weight"

    rewrite(saved, change)
    again = load_tensorized(Net, saved)
    assert again.norm.bias is again.norm.weight


def test_damage_anywhere(saved: Path):
    """A flipped bit or a cut: a sentence, or a model whose numbers may differ; nothing else."""
    content = saved.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *range(8, head, max(1, head // 150)), *range(head, len(content), (len(content) - head) // 20)]
    damaged = [content[:place] for place in places]
    damaged += [content + b"\0", content[:head] + content[head + 1 :]]
    for k, place in enumerate(places):
        flipped = bytearray(content)
        flipped[place] ^= 1 << k % 8
        damaged.append(bytes(flipped))
    sentences = []
    for data in damaged:
        saved.write_bytes(data)
        try:
            load_tensorized(Net, saved)
        except ValueError as error:
            sentences.append(str(error))
    assert all(sentence.startswith(f"{saved} cannot be loaded: ") for sentence in sentences)
    assert len(damaged) // 2 < len(sentences) < len(damaged) - 10
