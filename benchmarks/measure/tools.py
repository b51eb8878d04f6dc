"""Whatever users do with a layer of PyTorch's, done with ours: every cell of the README's table is a run.

    python benchmarks/tools.py

Every tool is tried on one layer of every format and kind. A row of the CSV is a tool and a layer; the result is empty
where it works, else the error.
"""

import argparse
import copy
import gc
import io
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import tnlayers
from provenance import csv_file, read_csv, write_csv
from tnlayers import TensorLayer, testing
from tnlayers.backend.sharding import whole

OUT = Path(__file__).parent / "results" / "tools.csv"
KINDS = ("Conv2d", "ConvTranspose2d", "Linear")
NETWORKS = {"Linear": "n:2 i1 a, n i2 a b, n b o"} | dict.fromkeys(KINDS[:2], "n:2 i1 a, n i2 b, n a b h w c, c o")
STEPS = 10

Layers = dict[str, TensorLayer]
Report = dict[str, str]

TOOLS: dict[str, Callable[[Layers], Report]] = {}
"""Every tool by name: it takes layers by name and tells, for each, what went wrong, or nothing."""


def layers(formats: Any = None, kinds: Any = KINDS, only: str | None = None, **arguments: Any) -> Layers:
    """A layer of every format and kind, or only the one of this name."""
    made: Layers = {}
    for name in formats or tnlayers.FORMATS:
        for kind in kinds:
            own: dict[str, Any] = {} if kind == "Linear" else {"kernel_size": 3, "padding": 1, "stride": 2}
            own |= {"network": NETWORKS[kind]} if name == "einsum" else {}
            layer = getattr(tnlayers, f"{tnlayers.FORMATS[name].__name__}{kind}")
            if only in (None, layer.__name__):
                made[layer.__name__] = layer(8, 12, rank=2, **own, **arguments)
    return made


def tool(name: str) -> Callable[[Callable[[TensorLayer], None]], Callable[[Layers], Report]]:
    """Decorator: enter a check of one layer among the tools."""

    def enter(check: Callable[[TensorLayer], None]) -> Callable[[Layers], Report]:
        def each(made: Layers) -> Report:
            return {key: attempt(partial(check, layer)) for key, layer in made.items()}

        TOOLS[name] = each
        return each

    return enter


def attempt(check: Callable[[], None]) -> str:
    """What a check raises, in one line; nothing if it passes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tools' own, about themselves
            check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return ""


def same(found: Tensor, expected: Tensor) -> None:
    """Equal by norm, up to the rounding of a few thousand sums."""
    assert found.shape == expected.shape
    error = relative(found, expected)
    assert error < 256 * torch.finfo(expected.dtype).eps, f"differs by {error:.2g}"


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what was expected."""
    return float((found - expected).detach().double().norm() / expected.detach().double().norm())


# ------------------------------------------------------------------ one process


def compiled(layer: TensorLayer, backend: str, sizes: bool) -> None:
    """Training and inference in one graph, with other batches, and other heights and widths if ``sizes``."""
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True if sizes else None)
    # With open sizes, torch 2.13 takes graphs of other sizes from its cache on disk, of plain convolutions too.
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
    """The program with open batch, height and width, and an input of other sizes than it was exported with."""
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
    """Exported with open sizes, run with others."""
    program, other = exported(layer)
    same(program.module()(other), layer(other))


@tool("ONNX, onnxruntime")
def onnx(layer: TensorLayer) -> None:
    """Exported to ONNX and run in onnxruntime with other sizes."""
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
    """bfloat16 and float16, training and inference: the dtype of torch's layer, near its values."""
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
    """Gradients of every sample at once, through vmap over grad of functional_call."""
    parameters, x = dict(layer.named_parameters()), testing.example_input(layer, 3)

    def loss(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (one,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for k in range(3):
        for name, expected in torch.func.grad(loss)(parameters, x[k]).items():
            same(found[name][k], expected)


@tool("forward-mode AD, jvp")
def jvp(layer: TensorLayer) -> None:
    """The derivative along a direction of the input and of the cores, against differences."""
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
    """Gradients equal with and without."""
    x = testing.example_input(layer).requires_grad_()
    inputs = [x, *layer.parameters()]
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    for one, other in zip(torch.autograd.grad(y.square().sum(), inputs), expected, strict=True):
        same(one, other)


@tool("channels_last")
def channels_last(layer: TensorLayer) -> None:
    """Model and input moved as one moves any model; the output stays in the input's layout."""
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
    """The copy computes the same."""
    x, held = testing.example_input(layer), io.BytesIO()
    torch.save(layer, held)
    held.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(held, weights_only=False)):
        assert torch.equal(twin(x), layer(x))


@tool("safetensors")
def safetensors(layer: TensorLayer) -> None:
    """Saved and loaded as a model."""
    from safetensors.torch import load_model, save_model  # noqa: PLC0415

    twin, x = copy.deepcopy(layer), testing.example_input(layer)
    twin.reset_parameters()
    with tempfile.TemporaryDirectory() as folder:
        save_model(layer, f"{folder}/model.safetensors")
        load_model(twin, f"{folder}/model.safetensors")
    assert torch.equal(twin(x), layer(x))


@tool("Hub mixin")
def hub(layer: TensorLayer) -> None:
    """A model with the mixin of huggingface_hub, from its saved configuration and weights."""
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


# ------------------------------------------------------------------ two processes


def start(rank: int, world: int, folder: str, work: Callable[[], Report]) -> None:
    """Join a process group, do the work, and let the first process write down what came of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What a launcher such as torchrun sets; accelerate looks there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        found = work()
        reports: list[Any] = [None] * world
        dist.all_gather_object(reports, found)
        if rank == 0:
            joined = {key: next(filter(None, (report[key] for report in reports)), "") for key in found}
            Path(folder, "report").write_bytes(pickle.dumps(joined))
        gc.collect()  # models whose hooks still know the group
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads have been seen to abort a process that takes its time to end


def in_processes(work: Callable[..., Report], made: Layers, world: int = 2) -> Report:
    """Run ``work(names, folder)`` in several processes; what it reports."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(start, (world, folder, partial(work, tuple(made), folder)), world, start_method="forkserver")
        report: Report = pickle.loads(Path(folder, "report").read_bytes())
    return report


def distributed(name: str) -> Callable[[Callable[[str, str], None]], Callable[[str, str], None]]:
    """Decorator: enter a check that runs in two processes, for a layer by name, among the tools."""

    def enter(check: Callable[[str, str], None]) -> Callable[[str, str], None]:
        TOOLS[name] = partial(in_processes, partial(try_each, check))
        return check  # as the other processes find it, by its name

    return enter


def try_each(check: Callable[[str, str], None], names: tuple[str, ...], folder: str) -> Report:
    return {name: attempt(partial(check, name, folder)) for name in names}


def model_of(name: str, device: str = "cpu") -> nn.Module:
    """A small net around a layer, the same in every process."""
    torch.manual_seed(0)
    layer = layers(only=name, device=device)[name]
    width = layer.geometry.out_channels
    head: type[Any] = tnlayers.TRConv2d if layer.geometry.ndim else tnlayers.TTLinear
    own = {"kernel_size": 1} if layer.geometry.ndim else {}
    return nn.Sequential(layer, nn.Tanh(), head(width, 4, rank=2, device=device, **own))


def redraw(model: nn.Module) -> None:
    """Initialise whatever can be."""
    for child in model.children():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()


def trained(model: nn.Module, name: str, rank: int = 0, world: int = 1) -> list[Tensor]:
    """The parameters after some steps of gradient descent on this process' share of the batch."""
    generator = torch.Generator().manual_seed(1)
    layer = layers(only=name)[name]
    shape = testing.example_input(layer).shape[1:]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(STEPS):
        x = torch.randn(8, *shape, generator=generator)
        optimizer.zero_grad()
        model(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    return [whole(parameter).detach() for parameter in model.parameters()]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Within 1e-5 of the norm of all parameters."""
    error = relative(*(torch.cat([one.flatten() for one in many]) for many in (found, expected)))
    assert error < 1e-5, f"differs by {error:.2g}"


@distributed("DDP")
def ddp(name: str, folder: str) -> None:
    """Steps in two processes equal those in one."""
    model = nn.parallel.DistributedDataParallel(model_of(name))
    close(trained(model, name, dist.get_rank(), 2), trained(model_of(name), name))


def sharded(name: str) -> nn.Module:
    """Built without storage, sharded, then drawn."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    model = model_of(name, device="meta")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model:
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())  # the first process' draw is everyone's
    redraw(model)
    return model


def drawn(name: str) -> nn.Module:
    """The same in one process."""
    model = model_of(name, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    redraw(model)
    return model


@distributed("FSDP2, from meta")
def fsdp(name: str, folder: str) -> None:
    """Every core as one process draws it; steps equal to those in one; inference sees changed shards."""
    model, twin = sharded(name), drawn(name)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(one), other.detach()), "drawn otherwise"
    for one, other in ((model[0], twin[0]), (model[0].to_dense(), twin[0].to_dense())):
        same(one.weight, other.weight)
    close(trained(model, name, dist.get_rank(), 2), trained(twin, name))
    x = testing.example_input(twin[0])
    with torch.no_grad():
        model.eval()
        before = model(x)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert not torch.allclose(model(x), before), "inference kept weights of before"


@distributed("DCP, other world size")
def dcp(name: str, folder: str) -> None:
    """Saved from two processes; loaded in each as if alone."""
    from torch.distributed import checkpoint  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: PLC0415

    model = sharded(name)
    checkpoint.save(get_model_state_dict(model), checkpoint_id=f"{folder}/{name}")
    alone = model_of(name)
    redraw(alone)
    state = alone.state_dict()
    checkpoint.load(state, checkpoint_id=f"{folder}/{name}", no_dist=True)
    alone.load_state_dict(state)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(whole(one), other.detach())
    # And back: from one process' file into shards.
    if dist.get_rank() == 0:
        checkpoint.save(drawn(name).state_dict(), checkpoint_id=f"{folder}/{name}-alone", no_dist=True)
    dist.barrier()
    shards = get_model_state_dict(model)
    checkpoint.load(shards, checkpoint_id=f"{folder}/{name}-alone")
    for one, other in zip(model.parameters(), drawn(name).parameters(), strict=True):
        assert torch.equal(whole(one), other.detach())


@distributed("accelerate")
def accelerate(name: str, folder: str) -> None:
    """``Accelerator.prepare`` in two processes: steps equal to those in one."""
    from accelerate import Accelerator  # noqa: PLC0415

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.set_num_threads(1)  # which it has changed
    model = accelerator.prepare(model_of(name))
    close(trained(model, name, accelerator.process_index, 2), trained(model_of(name), name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--out", type=csv_file, default=OUT)
    arguments = parser.parse_args()
    rows: list[dict[str, str]] = []
    if arguments.out.exists():  # what is not asked for stays as it was measured
        rows = [row for row in read_csv(arguments.out) if row["tool"] not in arguments.tools]
    for name in arguments.tools:
        found = TOOLS[name](layers())
        print(name, *(f"  {key}: {error}" for key, error in found.items() if error), sep="\n", flush=True)
        kinds = {key: next(kind for kind in KINDS if key.endswith(kind)) for key in found}
        rows += [{"tool": name, "layer": key, "kind": kinds[key], "result": error} for key, error in found.items()]
    write_csv(arguments.out, sorted(rows, key=lambda row: list(TOOLS).index(row["tool"])))


if __name__ == "__main__":
    main()
