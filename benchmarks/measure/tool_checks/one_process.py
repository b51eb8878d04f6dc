"""Checks of tools that run in this process."""

import copy
import io
import pickle
import tempfile
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure.tool_checks.registry import layers, relative, same, tool
from tnlayers import TensorLayer, testing


def compiled(layer: TensorLayer, backend: str, sizes: bool) -> None:
    """Check training and inference in one graph with several batch sizes, and heights and widths if ``sizes``."""
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True if sizes else None)
    # With dynamic sizes, torch 2.13 loads graphs of other sizes from its disk cache, also for plain convolutions.
    with torch.compiler.config.patch(force_disable_caches=True):
        for batch in (2, 5):
            x = testing.example_input(layer, batch)
            if sizes and x.ndim == 4:
                x = nn.functional.pad(x, (0, batch, batch, 0))
            torch._dynamo.mark_dynamic(x, 0)
            parameters = list(layer.parameters())
            y, expected = run(x), layer(x)
            same(y, expected)
            found = torch.autograd.grad(y.square().sum(), parameters)
            for one, other in zip(found, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
                same(one, other)
        layer.eval()
        with torch.no_grad():
            same(run(x), layer(x))


for _backend, _sizes in (("inductor", False), ("inductor", True), ("aot_eager", True)):
    _what = "batch, height, width open" if _sizes else "batch open"
    tool(f"compile, {_backend}, {_what}")(partial(compiled, backend=_backend, sizes=_sizes))


def exported(layer: TensorLayer) -> tuple[torch.export.ExportedProgram, Tensor]:
    """Return the program exported with dynamic batch, height and width, and an input of other sizes."""
    layer.eval()
    x = testing.example_input(layer)
    open_sizes = {0: torch.export.Dim("n", min=2, max=64)}
    if x.ndim == 4:
        open_sizes |= {2: torch.export.Dim("h", min=5, max=64), 3: torch.export.Dim("w", min=5, max=64)}
    program = torch.export.export(layer, (x,), dynamic_shapes=(open_sizes,))
    other = testing.example_input(layer, 5)
    return program, nn.functional.pad(other, (0, 2, 3, 0)) if x.ndim == 4 else other


@tool("torch.export")
def export(layer: TensorLayer) -> None:
    """Export with dynamic sizes, and run with other sizes."""
    program, other = exported(layer)
    same(program.module()(other), layer(other))


@tool("ONNX, onnxruntime")
def onnx(layer: TensorLayer) -> None:
    """Export to ONNX, and run in onnxruntime with other sizes."""
    import onnxruntime  # noqa: PLC0415

    program, other = exported(layer)
    model = torch.onnx.export(program, verbose=False)
    assert model is not None
    held = io.BytesIO()
    model.save(held)
    session = onnxruntime.InferenceSession(held.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    same(torch.from_numpy(found), layer(other).detach())


@tool("autocast")
def autocast(layer: TensorLayer) -> None:
    """Compare dtype and values with torch's layer: bfloat16 and float16, training and inference."""
    x = testing.example_input(layer)
    for dtype in (torch.bfloat16, torch.float16):
        for grad in (True, False):
            layer.train(grad)
            with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(grad):
                y, expected = layer(x), layer.to_dense()(x)
            assert y.dtype == expected.dtype == dtype
            error = relative(y, expected)
            assert error < 2 * (len(layer.cores) + 1) * torch.finfo(dtype).eps, f"differs by {error:.2g}"
            if grad:
                y.float().sum().backward()
                assert all(core.grad is not None and core.grad.dtype == core.dtype for core in layer.cores)


@tool("vmap, per-sample gradients")
def vmap(layer: TensorLayer) -> None:
    """Compute per-sample gradients by vmap over grad of functional_call."""
    parameters, x = dict(layer.named_parameters()), testing.example_input(layer, 3)

    def loss(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (one,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for k in range(3):
        for name, expected in torch.func.grad(loss)(parameters, x[k]).items():
            same(found[name][k], expected)


@tool("forward-mode AD, jvp")
def jvp(layer: TensorLayer) -> None:
    """Compare the derivative along a direction of input and cores with finite differences."""
    layer.double()
    values = {name: value.detach() for name, value in layer.named_parameters()}
    at = (values, testing.example_input(layer))
    along = ({name: torch.randn_like(value) for name, value in values.items()}, torch.randn_like(at[1]))

    def function(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (x,))

    def moved(step: float) -> Tensor:
        return function({name: values[name] + step * along[0][name] for name in values}, at[1] + step * along[1])

    _, found = torch.func.jvp(function, at, along)
    torch.testing.assert_close(found, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-6)


@tool("activation checkpointing")
def checkpointing(layer: TensorLayer) -> None:
    """Compare gradients with and without checkpointing."""
    x = testing.example_input(layer).requires_grad_()
    inputs = [x, *layer.parameters()]
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    for one, other in zip(torch.autograd.grad(y.square().sum(), inputs), expected, strict=True):
        same(one, other)


@tool("channels_last")
def channels_last(layer: TensorLayer) -> None:
    """Move model and input to channels_last. The output must keep the input's layout."""
    x = testing.example_input(layer)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    if x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    y = layer(x)
    same(y, expected)
    assert x.ndim < 4 or y.is_contiguous(memory_format=torch.channels_last)


@tool("deepcopy, pickle, torch.save")
def copies(layer: TensorLayer) -> None:
    """Check that a copy computes the same."""
    x, held = testing.example_input(layer), io.BytesIO()
    torch.save(layer, held)
    held.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(held, weights_only=False)):
        assert torch.equal(twin(x), layer(x))


@tool("safetensors")
def safetensors(layer: TensorLayer) -> None:
    """Save and load a layer as a model."""
    from safetensors.torch import load_model, save_model  # noqa: PLC0415

    twin, x = copy.deepcopy(layer), testing.example_input(layer)
    twin.reset_parameters()
    with tempfile.TemporaryDirectory() as folder:
        save_model(layer, f"{folder}/model.safetensors")
        load_model(twin, f"{folder}/model.safetensors")
    assert torch.equal(twin(x), layer(x))


@tool("Hub mixin")
def hub(layer: TensorLayer) -> None:
    """Load a model with huggingface_hub's mixin from its saved configuration and weights."""
    from huggingface_hub import PyTorchModelHubMixin  # noqa: PLC0415

    class Model(nn.Module, PyTorchModelHubMixin):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.layer = layers(only=name)[name]

    model, x = Model(type(layer).__name__), testing.example_input(layer)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        twin = Model.from_pretrained(folder)
    assert torch.equal(twin.layer(x), model.layer(x))
