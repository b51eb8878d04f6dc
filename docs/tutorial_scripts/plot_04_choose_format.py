"""
Choose a format and a rank
==========================

You train a small network on images of digits, compare all formats for one of its layers, and draw two pictures: what a
format loses, and what it costs. Then you let the library choose the ranks of all layers. You need to know PyTorch, and
the words *core*, *bond*, *rank* and *keep ratio* from :doc:`/tutorials/plot_01_first_layer`.
"""

# %%
# A trained network
# -----------------
#
# scikit-learn holds images of digits, 8 x 8 pixels each. Four convolutions and a linear layer learn them in a few
# seconds. The second convolution, from 32 to 32 channels, is the layer to look at.

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import tnlayers

digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
images = (images - images.mean()) / images.std()
labels = torch.as_tensor(digits.target)
torch.manual_seed(0)
test, train = torch.randperm(len(images)).split([360, len(images) - 360])


def block(inputs, outputs):
    """Return a convolution, batch normalisation and a ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def accuracy(model):
    """Return the share of test images that a model gets right."""
    model.eval()
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


model = nn.Sequential(
    *(block(1, 32), block(32, 32), nn.MaxPool2d(2), block(32, 32), block(32, 64)),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
for _ in range(4):
    model.train()
    for rows in train[torch.randperm(len(train))].split(64):
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"test accuracy: {accuracy(model):.1%}")

# %%
# All formats for one layer
# -------------------------
#
# A **format** is a family of networks: it says which cores there are and which bonds join them.
# :func:`tnlayers.compare` makes a layer of each format for the same dense layer and returns a table with one line for
# each. Here every format may hold a tenth of the kernel's parameters. ``decompose=True`` also fits the cores to the
# trained kernel, as :func:`tnlayers.tensorize_` does.

layer = model[1][0]
shape = (64, 32, 8, 8)  # 64 images, with 32 channels and 8 x 8 positions each
tenth = tnlayers.compare(layer, rank=0.1, input_shape=shape, decompose=True)
print(tenth)

# %%
# How to read a line:
#
# - ``rank`` holds the sizes of the bonds: one number if all are equal. ``keep`` is the keep ratio they lead to. Sizes
#   are integers, so it is mostly a little below the one that you asked for.
# - ``FLOPs`` counts the operations of one forward, as the layer would run it.
# - ``train ms`` and ``infer ms`` are estimates, not measurements. The columns after them divide by the dense layer's
#   estimate: below 1, the format is faster.
# - ``error`` is the distance between the trained kernel and the fitted one, over the norm of the trained kernel. At 0
#   nothing is lost, at 1 everything.
# - ``plan`` tells how the layer computes. ``factorized`` means that the input meets the cores one after the other.
#   ``reconstruct`` means that the layer builds the dense kernel from its cores first and then runs the usual
#   convolution. This takes the dense layer's time and a little more.
# - A format that cannot hold the layer at this rank is ``refused``, and the reason stands beneath the table. BlockTT,
#   for instance, has a smallest size, and a tenth of this kernel is below it.
#
# The rows are plain data: ``pandas.DataFrame(tenth.rows)`` makes a table of them, and ``tenth.best("error")`` returns
# the row with the smallest error.
#
# Sweep the keep ratio
# --------------------
#
# One keep ratio says little, so compare at several, from 0.05 to 0.3 of the kernel's parameters.

others = [tnlayers.compare(layer, rank=ratio, input_shape=shape, decompose=True) for ratio in (0.05, 0.2, 0.3)]
comparisons = [others[0], tenth, *others[1:]]
sweep = {rows[0].name: rows for rows in zip(*(each.rows[1:] for each in comparisons), strict=True)}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
for name, marker in zip(sweep, "osvD^P<X*", strict=False):
    rows = [row for row in sweep[name] if row.params is not None]
    params = [row.params for row in rows]
    (line,) = left.plot(params, [row.error for row in rows], marker=marker, label=name)
    right.plot(params, [row.train_ratio for row in rows], marker=marker, color=line.get_color())
right.axhline(1, color="0.4", lw=1, ls="--")
right.annotate("dense layer", (0.02, 0.99), xycoords=right.get_yaxis_transform(), va="top", color="0.4")
for axes in (left, right):
    axes.set(xlabel="parameters", xscale="log")
    axes.set_xticks([500, 1000, 2000], ["500", "1,000", "2,000"])
    axes.minorticks_off()
left.set(ylabel="relative error of the fit", ylim=(0, 1))
right.set(ylabel="estimated training time / dense", ylim=(0, None))
figure.legend(loc="outside right upper", title="format")
plt.show()

# %%
# What the pictures say
# ---------------------
#
# **On the left**, every format loses less with more parameters, and at the same size they differ. Here CP and TR come
# closest to the kernel, then Tucker and TT in chain layout. TT in its default, matrix layout, HT and BTT first split
# the channels into factors (32 = 8 x 4) and pair input factors with output factors. A trained kernel has no reason to
# have this form, so their fits lose more. BlockTT also splits, and has a smallest size: it is missing at the smaller
# ratios.
#
# **On the right**, Tucker, CP, TR and TT in chain layout are below the dense layer as long as they are small. With
# more parameters they come near the line, and some cross it. TT in matrix layout, HT and BTT stay above it at every
# size: their plan is ``reconstruct``, so **they save parameters and not time**. Nothing keeps you from another plan.
# The entries of ``formats`` also take the arguments of a layer, and ``strategy="factorized"`` never builds the kernel:

entries = [{"format": name, "strategy": "factorized"} for name in ("tt", "ht", "btt")]
print(tnlayers.compare(layer, rank=0.1, input_shape=shape, formats=entries))

# %%
# Time and memory are several times the dense layer's. While the input meets the cores of split channels, the
# intermediate results grow, and their axes have to be reordered. Take these formats if parameters are what you lack.
#
# This is one kernel of one small network. Larger layers mostly save more time, because each step has a fixed cost.
# Errors of other kernels differ, so compare with your own layer. :doc:`/explanation/formats` says more about each
# format.
#
# Times are estimates; the last line names the rates. To measure plans on your machine, call :func:`tnlayers.autotune`.
#
# One rank for each layer
# -----------------------
#
# Take Tucker for the whole network. One keep ratio for all layers is the simplest choice, but the layers of a trained
# network differ: some are close to low rank, others are not. :class:`tnlayers.TensorizeConfig` has two arguments that
# look at the trained kernels:
#
# - ``energy=0.8`` takes, for each layer, the smallest ranks that keep at least this share of the squared *singular
#   values* of the kernel, unfolded into a matrix at each cut of the network. You say how much may be lost, and get
#   the size.
# - ``budget={"params": 0.3}`` gives all chosen layers together this share of their parameters, and spends them where
#   the estimated error of the kernels falls most. You say the size, and get the error. ``{"flops": 0.3}`` does the
#   same for operations.

small = copy.deepcopy(model)
config = tnlayers.TensorizeConfig("tucker", budget={"params": 0.3}, exclude=["0.0", "7"])  # the first and last layer
print(tnlayers.tensorize_(small, config))
print(f"test accuracy: {accuracy(small):.1%}, dense {accuracy(model):.1%}")

# %%
# The column ``becomes`` shows that the layers got different shares. The last picture compares the three ways for this
# network. Nothing is trained after the fits, and so few test images make the curves uneven.

ways = {
    "one keep ratio": [{"rank": share} for share in (0.15, 0.3, 0.5)],
    "energy": [{"energy": share} for share in (0.7, 0.8, 0.9)],
    "budget": [{"budget": {"params": share}} for share in (0.15, 0.3, 0.5)],
}
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for (name, arguments), marker in zip(ways.items(), "osv", strict=True):
    points = []
    for each in arguments:
        small = copy.deepcopy(model)
        tnlayers.tensorize_(small, tnlayers.TensorizeConfig("tucker", exclude=["0.0", "7"], **each))
        params = sum(parameter.numel() for parameter in small.parameters())
        points.append((params, 100 * accuracy(small)))
    axes.plot(*zip(*points, strict=True), marker=marker, label=name)
axes.axhline(100 * accuracy(model), color="0.4", lw=1, ls="--", label="dense network")
axes.set(xlabel="parameters of the network", ylabel="test accuracy before any further training, %", ylim=(0, 100))
axes.legend()
plt.show()

# %%
# At about the same size, the budget keeps more accuracy here than one keep ratio for all layers. All three lose at
# small sizes. Training after the fit is the remedy: :doc:`/tutorials/plot_03_compress` does this.
# :doc:`/how-to/ranks` has all ways to give ranks.
#
# In short:
#
# 1. Compare formats for your largest layer with :func:`tnlayers.compare`, with the shape of its real input.
# 2. To save time, take Tucker, CP, TR or TT in chain layout, at a size where the ratio to the dense layer is below 1.
# 3. To compress a trained network, take a format of small error, and let ``budget`` or ``energy`` choose the ranks.
# 4. To train from scratch there is no kernel to fit: leave ``decompose`` out, and compare parameters and time.
