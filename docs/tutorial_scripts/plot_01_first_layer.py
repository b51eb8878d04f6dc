"""
Your first tensor layer
=======================

You replace one ``nn.Conv2d`` by a :class:`tnlayers.TRConv2d`, look at what the layer holds, train a small network on
images of digits with either, and turn the result back into a plain ``nn.Conv2d``. You need to know PyTorch, and nothing
about tensor networks.
"""

# %%
# One layer for another
# ---------------------
#
# A convolution from 64 to 64 channels with a 3 x 3 kernel holds its *kernel*, a tensor of shape (64, 64, 3, 3).
# A tensor layer takes the same arguments and returns an output of the same shape. It holds several small tensors
# instead, and computes the kernel from them.

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import tnlayers

torch.manual_seed(0)
dense = nn.Conv2d(64, 64, 3, padding=1)
layer = tnlayers.TRConv2d(64, 64, 3, padding=1, rank=0.2)

x = torch.randn(32, 64, 8, 8)  # (batch, channels, height, width)
print("outputs:", tuple(dense(x).shape), tuple(layer(x).shape))
print("entries of the kernel:", dense.weight.numel())
print("entries of the cores: ", sum(core.numel() for core in layer.cores))

# %%
# What the layer holds
# --------------------
#
# The small tensors are the **cores**. They are ordinary parameters, in ``layer.cores``. The **network** says how they
# are joined: one core between two commas, and the names of its axes. ``i`` and ``o`` are the input and the output
# channels, ``h`` and ``w`` are the height and the width of the kernel.

print("network:", layer.network)
for names, core in zip(layer.network.cores, layer.cores, strict=True):
    print(f"{' '.join(names):8}", tuple(core.shape))

# %%
# Every other name is a **bond**: an axis that two cores share. To *contract* the network means to multiply the cores
# and to sum over all bonds. The result is the kernel. Here it is as one ``torch.einsum``, and as ``layer.weight``,
# which the layer computes at each access:

kernel = torch.einsum("aib, bhwc, coa -> oihw", *layer.cores)
print("largest difference:", f"{(kernel - layer.weight).abs().max():.0e}")

# %%
# The bonds of this network form a ring, hence the name **tensor ring**, TR. A drawing of it has a disc for each core, a
# line between two discs for each bond, and a loose line for each axis of the kernel. The number in a disc is the core's
# index in ``layer.cores``.

CORES, DENSE = "#0072b2", "#d55e00"  # two colours that everybody can tell apart


def draw(network, axes):
    """Draw a network whose cores form a ring."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(len(network.cores)) / len(network.cores)
    places = np.column_stack([np.cos(angles), np.sin(angles)])
    for bond in network.bonds:
        ends = places[[bond in core for core in network.cores]]
        axes.plot(*ends.T, color="0.4", lw=2, zorder=1)
        axes.annotate(f"{bond}: {network.sizes[bond]}", 1.6 * ends.mean(axis=0), ha="center", va="center", fontsize=11)
    for k, (core, place, angle) in enumerate(zip(network.cores, places, angles, strict=True)):
        own = [axis for axis in core if axis not in network.bonds]
        for axis, turn in zip(own, 0.35 * (np.arange(len(own)) - (len(own) - 1) / 2), strict=True):
            tip = place + 0.75 * np.array([np.cos(angle + turn), np.sin(angle + turn)])
            axes.plot(*np.array([place, tip]).T, color=DENSE, lw=2, zorder=1)
            axes.annotate(
                f"{axis}: {network.sizes[axis]}", place + 1.3 * (tip - place), ha="center", va="center", fontsize=11
            )
        axes.plot(*place, "o", ms=34, color=CORES, zorder=2)
        axes.annotate(f"{k}", place, ha="center", va="center", color="white", fontsize=13, weight="bold")
    axes.set(aspect="equal", xlim=(-2.3, 2.3), ylim=(-1.4, 2.2))
    axes.axis("off")


figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
draw(layer.network, axes)
axes.set_title("A tensor-ring convolution: each axis with its size", fontsize=12)
plt.show()

# %%
# Rank and keep ratio
# -------------------
#
# The size of a bond is its **rank**. Larger ranks mean more parameters, and more kernels that the cores can form. You
# give ``rank`` in one of these ways:
#
# - an integer: the size of all bonds;
# - a sequence or a mapping: a size for each bond;
# - a float in (0, 1]: the **keep ratio**, the share of the kernel's parameters that the cores may have. The layer takes
#   the largest ranks that stay within it.
#
# :doc:`/how-to/ranks` says how to choose one.

for rank in (8, (4, 8, 4), {"r0": 4, "r1": 8, "r2": 4}, 0.2):
    print(rank, "->", tnlayers.TRConv2d(64, 64, 3, rank=rank))

# %%
# ``print(layer)`` shows torch's arguments, then the format, the ranks and the keep ratio. A **format** is a family of
# networks, such as tensor rings. There are others, with the same arguments: :class:`tnlayers.CPConv2d`,
# :class:`tnlayers.TuckerConv2d`, :class:`tnlayers.TTConv2d` and more; see :doc:`/tutorials/plot_04_choose_format`.
#
# How the layer starts
# --------------------
#
# In a network with ReLUs, Kaiming's rule asks for a kernel whose entries have the standard deviation
# :math:`\sqrt{2 / \text{fan-in}}`. The fan-in is the number of products in each output value, here 64 x 3 x 3. The rule
# is about the kernel, but a tensor layer draws its cores. So the layer computes the standard deviations of the
# cores that give the kernel the right one. ``layer.variance`` is the result.

print("fan-in:             ", layer.variance.fan_in)
print("wanted std of W:    ", f"{layer.variance.weight_std:.4f}")
print("std of this kernel: ", f"{layer.weight.std():.4f}")
print("std of each core:   ", [round(std, 4) for std in layer.variance.std])

# %%
# :doc:`/tutorials/plot_02_signal` shows what happens without it.
#
# How the layer computes
# ----------------------
#
# The layer need not build its kernel. The input may meet the cores one after the other, which often takes fewer
# operations. Such an order is a **plan**. ``layer.explain`` prints the plan for a shape of the input: each step, its
# floating-point operations (FLOPs), the bytes it moves, and its share of the estimated time. The last line names the
# second best plan. :doc:`/how-to/explain` reads it line by line.

print(layer.explain(x.shape))

# %%
# Train it
# --------
#
# scikit-learn holds images of digits, 8 x 8 pixels each. The network has one convolution from one channel, which
# is small and stays dense, three convolutions that are dense or tensor rings of keep ratio 0.2, and a linear layer.
# Batch normalisation and a ReLU follow each convolution.

digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
labels = torch.as_tensor(digits.target)
images = (images - images.mean()) / images.std()
test, train = torch.randperm(len(images)).split([360, len(images) - 360])


def block(conv, *args, **kwargs):
    """Return a convolution, batch normalisation and a ReLU."""
    layer = conv(*args, padding=1, bias=False, **kwargs)
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())


def network(conv):
    """Return the network with three convolutions of a class."""
    return nn.Sequential(
        block(nn.Conv2d, 1, 32, 3),
        block(conv, 32, 64, 3, stride=2),
        block(conv, 64, 64, 3),
        block(conv, 64, 64, 3),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def learn(model, epochs=8, batch=64):
    """Train a model, and return its training loss and its test accuracy after each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history = []
    for _ in range(epochs):
        losses = []
        model.train()
        for rows in torch.randperm(len(images[train])).split(batch):
            loss = nn.functional.cross_entropy(model(images[train][rows]), labels[train][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        model.eval()
        with torch.no_grad():
            right = model(images[test]).argmax(1) == labels[test]
        history.append((np.mean(losses), 100 * right.float().mean().item()))
    return np.array(history)


runs = {}
for name, conv in (("dense", nn.Conv2d), ("tensor ring", partial(tnlayers.TRConv2d, rank=0.2))):
    torch.manual_seed(1)
    model = network(conv)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    runs[f"{name}, {parameters:,} parameters"] = learn(model)

# %%
# Back to a plain layer
# ---------------------
#
# ``to_conv`` contracts the cores, and returns an ``nn.Conv2d`` with the same function. The trained network then needs
# no tnlayers any more. (For many layers at once, and for plain layers that stay small, see
# :doc:`/tutorials/plot_03_compress`.)

trained = model[1][0]
plain = trained.to_conv()
x = torch.randn(4, 32, 8, 8)
print(plain)
print("largest difference:", f"{(plain(x) - trained(x)).abs().max():.0e}")

# %%
# The two runs
# ------------
#
# Both networks learn the digits with the same learning rate and the same schedule. This is one run of a small
# task; :doc:`/evidence/training` has larger ones, over several seeds.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for (name, history), color, marker in zip(runs.items(), (DENSE, CORES), "os", strict=True):
    epochs = np.arange(1, len(history) + 1)
    left.semilogy(epochs, history[:, 0], color=color, marker=marker, ms=5, label=name)
    right.plot(epochs, history[:, 1], color=color, marker=marker, ms=5, label=name)
left.set(xlabel="epoch", ylabel="training loss (nats)", title="Loss")
right.set(xlabel="epoch", ylabel="accuracy on 360 test images (%)", title="Accuracy")
right.legend(loc="lower right")
for axes in (left, right):
    axes.grid(alpha=0.3)
plt.show()

# sphinx_gallery_thumbnail_number = -1
