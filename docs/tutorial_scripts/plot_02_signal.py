r"""
Why the start decides
=====================

A deep network can only learn if its signal survives the first forward pass. In a layer whose kernel is computed from
several smaller tensors, PyTorch's usual initialisation gives the kernel a wrong size. This tutorial shows by how much,
derives the right size in ten lines of code, sends one batch through thirty layers under four starts, and trains a
network from two of them.

You need to know PyTorch's modules and training loop. You need to know nothing about tensor networks.
"""

# %%
# One layer, several cores
# ------------------------
# :class:`tnlayers.TRConv2d` takes the arguments of ``torch.nn.Conv2d``, and a ``rank``. It does not store its
# **kernel**, the weight of shape (out channels, in channels, height, width). It stores small tensors, the **cores**,
# and multiplies them to get the kernel. TR is short for tensor ring: the cores stand in a ring, and neighbours share
# an axis.
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import tnlayers

torch.manual_seed(0)

layer = tnlayers.TRConv2d(64, 64, 3, padding=1, bias=False, rank=8)
print("cores ", layer.network)
print("shapes", layer.network.core_shapes)
print("kernel", tuple(layer.weight.shape), f"from {layer.keep_ratio:.1%} of its parameters")

# %%
# Each group of letters between commas is a core, and each letter is one of its axes. ``i`` are the input channels,
# ``o`` the output channels, ``h`` and ``w`` the height and the width of the kernel. An axis that stands in two cores,
# such as ``r1``, is a **bond**: the product sums over it. The size of a bond is its **rank**, here 8.
#
# The variance rule
# -----------------
# How large is an entry of the kernel? It is a sum, with one term for each combination of values of the bonds. There
# are 8 x 8 x 8 = 512 terms here. Each term is a product of one entry from each core. If all entries are independent
# and have mean zero, the variance of a product is the product of the variances, and the variances of different terms
# add:
#
# .. math:: \mathrm{Var}(W) = \text{(product of the bond sizes)} \times \text{(product of the variances of the cores)}
#
# Ten lines check this. They draw the cores with three arbitrary standard deviations, compute the kernel, and measure.
bonds = math.prod(layer.network.shape(layer.network.bonds))
stds = 0.3, 0.1, 0.05
predicted = bonds * math.prod(std**2 for std in stds)

measured = []
with torch.no_grad():
    for _ in range(200):
        for core, std in zip(layer.cores, stds, strict=True):
            nn.init.normal_(core, std=std)
        measured.append(layer.weight.square().mean())
print(f"Var(W) by the rule {predicted:.3e}, mean over 200 draws {torch.stack(measured).mean():.3e}")

# %%
# What a start per core does to the kernel
# ----------------------------------------
# The **second moment** of a signal is the mean of its squared entries. A layer with a ReLU behind it keeps the second
# moment if Var(W) = 2 / fan_in. The **fan-in** is the number of inputs that one output sums, here 64 x 3 x 3 = 576.
# This is He's rule, and ``nn.init.kaiming_normal_`` applies it to a dense kernel.
#
# Applied to each core, the same function sees the shape of the core and not the shape of the kernel. It takes all axes
# but the first for the fan-in. The rule above says what comes out.


def kernel_variance(variances):
    """Return Var(W) for the layer above, from the variances of its cores."""
    return bonds * math.prod(variances)


target = 2 / 576
starts = {
    "default of tnlayers": [std**2 for std in layer.variance.std],
    "Kaiming per core": [2 / core[0].numel() for core in layer.cores],
    "N(0, 0.02) per core": [0.02**2 for _ in layer.cores],
}
for name, variances in starts.items():
    ratio = kernel_variance(variances) / target
    print(f"{name:20s} Var(W) over the target {ratio:8.2e}, after 30 layers {ratio**30:8.2e}")

# %%
# Such a factor seems harmless in one layer. But it multiplies with every layer. Batch normalisation rescales the
# signal behind each layer, and so hides the factor. Without normalisation nothing corrects it.
#
# The default of tnlayers solves the equation for the variances when the layer is made. The attribute ``variance`` of
# the layer holds the answer, and :class:`tnlayers.Init` has the options.
#
# Thirty layers, four starts
# --------------------------
# The network below is a dense convolution, then thirty tensor-ring convolutions with a ReLU behind each. It has no
# normalisation, no bias and no shortcut. The padding is circular, so no zeros at the border take signal away. (With
# zeros, ``init=tnlayers.Init(input_size=(8, 8))`` counts the zeros.)
#
# The four starts:
#
# - the default: the variance rule, and each draw rescaled until the kernel's own gain is exact;
# - ``init="paper"``: the variance rule alone, which is right on average over draws (Pan et al., ICML 2022);
# - Kaiming per core: ``nn.init.kaiming_normal_`` on each core;
# - N(0, 0.02) per core: ``nn.init.normal_`` with a standard deviation of 0.02 on each core, as many transformers do it
#   for dense weights.

STARTS = {
    "default of tnlayers": "#0072B2",
    'the paper\'s rule, init="paper"': "#009E73",
    "Kaiming per core": "#D55E00",
    "N(0, 0.02) per core": "#CC79A7",
}


def plain_network(depth, start, channels=32, rank=4):
    """Return convolutions with ReLUs and a classifier behind them."""
    init = "paper" if "paper" in start else "fan_in"
    layers = [nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.ReLU()]
    nn.init.kaiming_normal_(layers[0].weight)
    for _ in range(depth):
        arguments = {"padding": 1, "padding_mode": "circular", "bias": False, "rank": rank, "init": init}
        layers += [tnlayers.TRConv2d(channels, channels, 3, **arguments), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10))
    for module in network:
        if isinstance(module, tnlayers.TensorLayer) and "per core" in start:
            for core in module.cores:
                if "Kaiming" in start:
                    nn.init.kaiming_normal_(core, nonlinearity="relu")
                else:
                    nn.init.normal_(core, std=0.02)
    return network


# %%
# The input is real: the 8 x 8 images of handwritten digits that come with scikit-learn. The second moment is measured
# behind each ReLU.
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)

moments = {}
with torch.no_grad():
    for start in STARTS:
        torch.manual_seed(0)
        x, moments[start] = images[:256], []
        for module in plain_network(30, start)[:-3]:
            x = module(x)
            if isinstance(module, nn.ReLU):
                moments[start].append(x.square().mean().item())
        print(f"{start:31s} behind layer 1: {moments[start][1]:8.1e}, behind layer 30: {moments[start][-1]:8.1e}")

# %%
# The tool for your own model
# ---------------------------
# :func:`tnlayers.signal` does this for any model. It runs the model once and reports the second moment of what goes in
# and out of every module. With ``loss``, a function of the output that returns a number, it runs the backward pass
# too, and reports the gradients. Under the table it names what vanishes, explodes or is not a number, and where. Here
# is a network of four layers that start with N(0, 0.02) per core:


def loss_of(output):
    """Return the cross-entropy on the first 256 images."""
    return F.cross_entropy(output, labels[:256])


torch.manual_seed(0)
bad = tnlayers.signal(plain_network(4, "N(0, 0.02) per core"), images[:256], loss=loss_of)
print(bad)

# %%
# ``problems`` holds these sentences. It is empty for the same network with the default start. ``plot`` draws the
# numbers.
good = tnlayers.signal(plain_network(4, "default of tnlayers"), images[:256], loss=loss_of)
print(len(bad.problems), "problems with N(0, 0.02) per core,", len(good.problems), "with the default")

figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for signal, ax, title in zip((bad, good), axes, ("N(0, 0.02) per core", "default of tnlayers"), strict=True):
    signal.plot(ax)
    ax.set_title(title)
    ax.set_xlabel("module with a weight, by name")
plt.show()

# %%
# :doc:`/how-to/nan` uses this tool to find the first layer that goes wrong.
#
# What it means for training
# --------------------------
# Two networks of sixteen layers see the same batches with the same optimizer. They differ only in the start of their
# cores. (The training part has sixteen layers because thirty layers without normalisation or shortcuts learn slowly
# from any start: the right size of the signal is necessary, and not sufficient.)


def train(start, steps=60):
    """Return the loss of each step, and the accuracy on the images that were left out."""
    torch.manual_seed(0)
    network = plain_network(16, start)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        batch = torch.randint(1437, (64,))
        loss = F.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        right = network(images[1437:]).argmax(1) == labels[1437:]
    return losses, right.float().mean().item()


curves = {start: train(start) for start in ("default of tnlayers", "Kaiming per core")}
for start, (_, accuracy) in curves.items():
    print(f"{start:20s} accuracy on 360 other images {accuracy:.0%}")

# %%
# With Kaiming per core the signal is so small that the output does not depend on the image. The gradient of the cores
# is just as small: Adam, which divides by the gradient's size plus 1e-8, cannot repair it either. What is left to
# learn is the bias of the last layer, and chance accuracy is one in ten.
#
# The picture shows both. On the left, one division of the vertical axis is a factor of ten thousand millions, and a
# line ends where the signal becomes exactly zero, because float32 has no smaller number.
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
for start, color in STARTS.items():
    values = [value if value > 0 else math.nan for value in moments[start]]  # zero has no logarithm
    left.semilogy(range(len(values)), values, color=color, linewidth=2, label=start)
left.set_xlabel("tensor-ring layer (0: dense first layer)")
left.set_ylabel("second moment of the signal")
left.set_yticks([10.0**power for power in range(-40, 11, 10)])
left.set_title("Forward, before the first step")
left.legend(loc="lower right")
left.grid(alpha=0.3)

for start, (losses, accuracy) in curves.items():
    right.plot(losses, color=STARTS[start], linewidth=2, label=f"{start}: {accuracy:.0%} accuracy")
right.axhline(math.log(10), color="0.5", linestyle=":", label="ln 10, a guess among 10 classes")
right.set_xlabel("step of training")
right.set_ylabel("cross-entropy of the batch (nats)")
right.set_title("Training sixteen layers")
right.set_ylim(0, 3.4)
right.legend(loc="upper right")
right.grid(alpha=0.3)
plt.show()
