"""Checks of tools that distribute a layer over several processes."""

import gc
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
from benchmarks.measure.tool_checks.registry import TOOLS, Layers, Report, attempt, layers, relative, same
from tnlayers import testing
from tnlayers.backend.sharding import whole

STEPS = 10


def start(rank: int, world: int, folder: str, work: Callable[[], Report]) -> None:
    """Join a process group, do the work, and write its report in the first process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # accelerate reads these variables, which a launcher such as torchrun sets.
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
        gc.collect()  # frees models whose hooks still refer to the group
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads can abort a process that ends slowly


def in_processes(work: Callable[..., Report], made: Layers, world: int = 2) -> Report:
    """Run ``work(names, folder)`` in several processes, and return its report."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(start, (world, folder, partial(work, tuple(made), folder)), world, start_method="forkserver")
        report: Report = pickle.loads(Path(folder, "report").read_bytes())
    return report


def distributed(name: str) -> Callable[[Callable[[str, str], None]], Callable[[str, str], None]]:
    """Register the decorated check as a tool. It runs in two processes, and gets a layer's name."""

    def enter(check: Callable[[str, str], None]) -> Callable[[str, str], None]:
        TOOLS[name] = partial(in_processes, partial(try_each, check))
        return check  # unchanged, because the other processes import it by name

    return enter


def try_each(check: Callable[[str, str], None], names: tuple[str, ...], folder: str) -> Report:
    return {name: attempt(partial(check, name, folder)) for name in names}


def model_of(name: str, device: str = "cpu") -> nn.Module:
    """Return a small network around a layer, the same in every process."""
    torch.manual_seed(0)
    layer = layers(only=name, device=device)[name]
    width = layer.geometry.out_channels
    head: type[Any] = tnlayers.TRConv2d if layer.geometry.ndim else tnlayers.TTLinear
    own = {"kernel_size": 1} if layer.geometry.ndim else {}
    return nn.Sequential(layer, nn.Tanh(), head(width, 4, rank=2, device=device, **own))


def redraw(model: nn.Module) -> None:
    """Initialise all children that have `reset_parameters`."""
    for child in model.children():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()


def trained(model: nn.Module, name: str, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Return the parameters after STEPS steps of SGD on this process' part of the batch."""
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
    """Assert equality within 1e-5 of the norm of all parameters."""
    error = relative(*(torch.cat([one.flatten() for one in many]) for many in (found, expected)))
    assert error < 1e-5, f"differs by {error:.2g}"


@distributed("DDP")
def ddp(name: str, folder: str) -> None:
    """Compare steps in two processes with those in one."""
    model = nn.parallel.DistributedDataParallel(model_of(name))
    close(trained(model, name, dist.get_rank(), 2), trained(model_of(name), name))


def sharded(name: str) -> nn.Module:
    """Return a model that is built on meta, sharded, then initialised."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    model = model_of(name, device="meta")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model:
        fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())  # all processes must get the first one's draw
    redraw(model)
    return model


def drawn(name: str) -> nn.Module:
    """Return the same model in one process."""
    model = model_of(name, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    redraw(model)
    return model


@distributed("FSDP2, from meta")
def fsdp(name: str, folder: str) -> None:
    """Compare cores and steps with those of one process. Inference must see changed shards."""
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
    """Save from two processes, and load in each as in a single process; then the other way round."""
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
    # The other way round: from one process' file into shards.
    if dist.get_rank() == 0:
        checkpoint.save(drawn(name).state_dict(), checkpoint_id=f"{folder}/{name}-alone", no_dist=True)
    dist.barrier()
    shards = get_model_state_dict(model)
    checkpoint.load(shards, checkpoint_id=f"{folder}/{name}-alone")
    for one, other in zip(model.parameters(), drawn(name).parameters(), strict=True):
        assert torch.equal(whole(one), other.detach())


@distributed("accelerate")
def accelerate(name: str, folder: str) -> None:
    """Compare steps with ``Accelerator.prepare`` in two processes with those in one."""
    from accelerate import Accelerator  # noqa: PLC0415

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.set_num_threads(1)  # Accelerator has changed it
    model = accelerator.prepare(model_of(name))
    close(trained(model, name, accelerator.process_index, 2), trained(model_of(name), name))
