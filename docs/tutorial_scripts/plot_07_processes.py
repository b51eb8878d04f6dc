"""
Several processes
=================

You train a dense network and a tensor-ring network in two processes, see that two processes come to the losses of one,
count what they send to each other, and shard a model that was built without memory. Everything runs on a CPU. On GPUs,
replace the backend ``gloo`` by ``nccl`` and move the model and the images. That was not tried: tnlayers has never run
on a GPU. It uses only torch operations, so it should run there; its speed there is unknown.
"""

# %%
# What is shared
# --------------
#
# In **data parallel** training, each process has a copy of the network and takes its part of each batch. After the
# backward pass, all processes average their gradients, with an **all-reduce**: an operation that sums a tensor over the
# processes and gives the sum to each. What it sends grows with the number of parameters.
#
# A tensor layer has fewer of them. It holds a few small tensors, the **cores**, and computes the kernel from them
# (:doc:`/tutorials/plot_01_first_layer`). A **tensor ring**, :class:`tnlayers.TRConv2d`, is one such layer. Its cores
# are ordinary parameters, so torch's wrappers take it as it is.
#
# The program
# -----------
#
# Several processes need a program in a file. Here it is, as a text that we write to a file below. Some things in it
# matter, and none is special to tensor layers:
#
# - ``torch.manual_seed(0)`` before the network is made, so that all copies are equal;
# - the rows of a batch are drawn alike in all processes, and each takes its part;
# - group normalisation, which looks at one image at a time. Batch normalisation would use the statistics of each
#   process' own images; ``nn.SyncBatchNorm`` is for that, on GPUs;
# - SiLU, not ReLU: two processes round differently than one, and where that moves a value over the kink of a ReLU, the
#   gradient jumps. Both trainings are then right, but their losses no longer agree to the last digits;
# - the loss to be shown is the mean over the processes.
#
# ``register_comm_hook`` lets us see each bucket of gradients that ``DistributedDataParallel`` reduces; the hook counts
# its bytes and then does what is done without it.

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

PROGRAM = '''
"""Train in as many processes as torchrun starts, or alone."""

import json
import os
import sys
from functools import partial

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tnlayers

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
images, labels = (images - images.mean()) / images.std(), torch.as_tensor(digits.target)
KINDS = {"dense": nn.Conv2d, "tensor ring": partial(tnlayers.TRConv2d, rank=0.2)}


def network(conv):
    """Return a network with three convolutions of a class."""
    blocks = []
    for stride in (2, 1, 1):
        blocks += [conv(64, 64, 3, padding=1, stride=stride), nn.GroupNorm(8, 64), nn.SiLU()]
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.SiLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


def train(model, steps=40, batch=64):
    """Train a model on this process' part of each batch; return the mean losses of all processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        rows = torch.randperm(len(images), generator=generator)[:batch].chunk(WORLD)[RANK]
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / WORLD
        if WORLD > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def count(sizes, bucket):
    """Note the bytes of a bucket of gradients, and average it over the processes."""
    sizes.append(bucket.buffer().nbytes)
    return allreduce_hook(None, bucket)


def data_parallel(kind):
    """Train with a copy of the network in each process."""
    torch.manual_seed(0)
    model, sizes = network(KINDS[kind]), []
    if WORLD > 1:
        model = DistributedDataParallel(model)
        model.register_comm_hook(sizes, count)
    losses = train(model)
    return {"losses": losses, "bytes": sum(sizes) // len(losses)}


def sharded(kind):
    """Train with the parameters split among the processes."""
    with torch.device("meta"):  # shapes without memory
        model = network(KINDS[kind])
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for child in model:
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")  # memory, each process for its shards
    torch.manual_seed(RANK)
    for child in model:
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()  # values
    layer = model[2]
    started = {"std": layer.weight.std().item(), "wanted": layer.variance.weight_std}
    held = sum(parameter.to_local().nbytes for parameter in model.parameters())
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return started | {"losses": train(model, steps=10), "held": held, "whole": whole}


if WORLD > 1:
    dist.init_process_group("gloo")
found = {kind: data_parallel(kind) for kind in KINDS}
if WORLD > 1:
    found["sharded"] = sharded("tensor ring")
    if RANK == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()
'''

# %%
# One process, then two
# ---------------------
#
# Alone, the program runs in this process. ``torchrun`` starts it twice: in a shell you write
# ``torchrun --standalone --nproc-per-node 2 program.py result.json``.

folder = tempfile.TemporaryDirectory()
program, result = Path(folder.name, "program.py"), Path(folder.name, "result.json")
program.write_text(PROGRAM)
one = runpy.run_path(str(program))["found"]

command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
command += ["--nproc-per-node", "2", str(program), str(result)]
run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
if run.returncode:
    raise RuntimeError(run.stderr)
two = json.loads(result.read_text())
folder.cleanup()

# %%
# Two processes come to the losses of one, up to the rounding of single precision:

for kind in one:
    losses = np.array([one[kind]["losses"], two[kind]["losses"]])
    print(f"{kind:12} first loss {losses[0, 0]:.3f}, last {losses[0, -1]:.3f};", end=" ")
    print(f"largest difference of two processes to one: {abs(losses[0] - losses[1]).max():.0e}")

# %%
# Shards, from no memory at all
# -----------------------------
#
# Where copies do not fit, torch's FSDP2 (``fully_shard``) gives each process a part of every parameter, its **shard**,
# and gathers a layer when it is needed. Large models are then built on the *meta* device, where tensors have shapes but
# no memory. ``sharded`` above has the order of steps:
#
# 1. build the model under ``torch.device("meta")``;
# 2. ``fully_shard`` each layer or block, then the whole model;
# 3. ``to_empty``, which takes memory for this process' shards;
# 4. ``reset_parameters`` in every process. A tensor layer draws its cores whole, scales them so that the kernel has the
#    right variance, and hands out the shards; all processes get the draw of the first.
#
# torch's own layers draw each shard where it is. On a CPU, with equal seeds, all shards of such a layer would be equal
# (torch 2.13), so here the seed is the process' number.
#
# The start of a sharded tensor layer is right too:

shards = two["sharded"]
print(f"standard deviation of a kernel: {shards['std']:.5f}, wanted {shards['wanted']:.5f}")
print(f"parameters: {shards['held']:,} of {shards['whole']:,} bytes are in this process")
print(f"first loss {shards['losses'][0]:.3f}, after ten steps {shards['losses'][-1]:.3f}")

# %%
# Shard only where you must. ``fully_shard`` cuts a tensor along its first axis, and the first axis of a core is often
# short, so over many processes most of what is gathered is padding. A tensor network that is small enough to copy is
# best copied, and the batch split. :doc:`/how-to/many-processes` and :doc:`/evidence/scale` say more.
#
# What is sent
# ------------
#
# Left: the losses, one process as a line, two as dots. Right: the gradients that are reduced in a step. In a ring of P
# processes, each sends 2 (P - 1) / P times that, so double that at most, however many processes there are. The rest
# of what the tensor-ring network sends is mostly its cores; the first convolution and the last layer are dense in both.

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained", width_ratios=[1.6, 1])
colors = {"dense": "#d55e00", "tensor ring": "#0072b2"}
for kind, color in colors.items():
    steps = np.arange(1, len(one[kind]["losses"]) + 1)
    left.plot(steps, one[kind]["losses"], color=color, label=f"{kind}, one process")
    left.plot(steps[::2], two[kind]["losses"][::2], "o", ms=5, color=color, label=f"{kind}, two processes")
left.set(xlabel="step", ylabel="loss (nats)", title="Losses", ylim=(0, None))
left.legend()
left.grid(alpha=0.3)
sizes = [two[kind]["bytes"] / 1000 for kind in colors]
bars = right.bar(list(colors), sizes, color=list(colors.values()), width=0.6)
right.bar_label(bars, [f"{size:,.0f} kB" for size in sizes], padding=2)
right.set(ylabel="gradients reduced in a step (kB)", title="What is sent", ylim=(0, 1.12 * max(sizes)))
plt.show()

# sphinx_gallery_thumbnail_number = -1
