"""
A format of your own
====================

You write down a tensor network that is not in the library, first as the text of one layer, then as a format with
convolutions, transposed convolutions and linear layers. You check the layers, measure how they start, and compress a
trained network with them.
"""

# %%
# The idea
# --------
#
# A **tensor network** is a set of small tensors, the **cores**, that multiply to a large one, here the kernel of a
# convolution. An axis that two cores share is a **bond**; it is summed over, and its size is a **rank**. A **format**
# is a family of networks. (:doc:`/tutorials/plot_01_first_layer` shows these terms in code.)
#
# Our network is a *filter bank*. All pairs of channels use the same few spatial filters, mixed in different ways:
#
# .. math:: W_{o\,i\,h\,w} = \sum_{a,b,f} A_{i a} \, M_{a b f} \, F_{f h w} \, B_{b o}
#
# ``A`` reduces the input channels, ``B`` restores the output channels, ``F`` holds the filters, and ``M`` mixes. ``M``
# is joined to all others, so the network is a star.

from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import tnlayers
from tnlayers import testing

torch.manual_seed(0)

# %%
# One layer from text
# -------------------
#
# :class:`tnlayers.EinsumConv2d` takes the network as text: commas between cores, spaces between axes. ``i`` and ``o``
# are the input and the output channels, ``h`` and ``w`` the axes of the kernel. Every other name is a bond, which at
# least two cores must have. ``f:4`` fixes a size: there are four filters. ``rank`` sets the other bonds; a float is the
# **keep ratio**, the largest share of the dense kernel's parameters that the cores may have.

layer = tnlayers.EinsumConv2d(64, 64, 3, padding=1, network="i a, a b f:4, f h w, b o", rank=0.1)
print("output:", tuple(layer(torch.randn(8, 64, 10, 10)).shape))
for names, core in zip(layer.network.cores, layer.cores, strict=True):
    print(f"{' '.join(names):6}", tuple(core.shape))

# %%
# That is all for one kind of layer. Nothing else has to be written: initialisation, plans, conversions and saving
# follow from the network.
#
# A format
# --------
#
# A text is about one number of axes. A format makes the text for any: 1d to 3d convolutions, linear layers
# without a kernel, and channels that are split into several axes. It is a frozen dataclass with one method, ``text``.
# Its fields are options of the layers. :func:`tnlayers.register` gives it a name, once in a process.


@tnlayers.register("filterbank")
@dataclass(frozen=True)
class FilterBank(tnlayers.Format):
    """A few spatial filters, shared by all pairs of channels.

    Example:
        >>> FilterBank().text(("i",), ("o",), ("h", "w"), rank=8)
        'i ri, ri ro f:4, f h w, ro o'
    """

    filters: int = 4

    def text(self, inputs, outputs, kernel, rank):
        """Return input factors, the mixing core, the filters if there is a kernel, and output factors."""
        bonds = [f"r{axis}" for axis in inputs + outputs]
        filters = [f"f:{self.filters}"] if kernel else []
        return ", ".join(
            [
                *(f"{axis} r{axis}" for axis in inputs),
                " ".join(bonds + filters),
                *([f"f {' '.join(kernel)}"] if kernel else []),
                *(f"r{axis} {axis}" for axis in outputs),
            ]
        )


print(FilterBank().text(("i",), ("o",), ("h", "w"), rank=None))
print(FilterBank(filters=2).text(("i1", "i2"), ("o",), ("d", "h", "w"), rank=None))
print(FilterBank().text(("i",), ("o",), (), rank=None))

# %%
# Its layers
# ----------
#
# A layer is a class statement: the kind as the base class, and the format by name.


class FilterBankConv2d(tnlayers.TensorConv2d, format="filterbank"):
    """A convolution whose kernel is a filter bank."""


class FilterBankConvTranspose2d(tnlayers.TensorConvTranspose2d, format="filterbank"):
    """A transposed convolution whose kernel is a filter bank."""


class FilterBankLinear(tnlayers.TensorLinear, format="filterbank"):
    """A linear layer; without a kernel, it is a product of three matrices."""


print(FilterBankConv2d(64, 64, 3, padding=1, rank=0.1, filters=3))
print(FilterBankConvTranspose2d(64, 32, 4, stride=2, padding=1, rank=8))
print(FilterBankLinear(64, 64, rank=0.5))

# %%
# Check them
# ----------
#
# :func:`tnlayers.testing.check` takes a class and arguments for small layers. It compares outputs with those of torch
# and the contracted kernel, and checks gradients, the variance of the start, copies, conversions and operation counts.
# It raises an ``AssertionError`` if something is wrong.

testing.check(FilterBankConv2d, 8, 12, 3, rank=2)
testing.check(FilterBankConvTranspose2d, 8, 12, 3, stride=2, rank=2)
testing.check(FilterBankLinear, 8, 12, rank=2)
print("checked:", ", ".join(testing.PROMISES))

# %%
# How they start
# --------------
#
# He's rule for networks with ReLUs wants each convolution to double the second moment of its input:
# :math:`E[y^2] = 2 E[x^2]` (the ReLU behind it halves it again). The **gain** here is :math:`E[y^2] / (2 E[x^2])`. It
# should be one. We measure it on rectified random inputs for 60 draws of three layers: a dense one, drawn by He's rule;
# ours as it comes; and ours with ``kaiming_normal_`` on each core, which does not know what the cores multiply to.

x = torch.randn(8, 64, 12, 12).relu()


@torch.no_grad()
def gain(layer):
    """Return the measured gain of a layer."""
    return (layer(x).square().mean() / (2 * x.square().mean())).item()


dense, ours = nn.Conv2d(64, 64, 3, bias=False), FilterBankConv2d(64, 64, 3, bias=False, rank=0.1)
gains = {"dense, He": [], "filter bank,\nas it comes": [], "filter bank,\nKaiming per core": []}
for _ in range(60):
    nn.init.kaiming_normal_(dense.weight, nonlinearity="relu")
    ours.reset_parameters()
    measured = [gain(dense), gain(ours)]
    for core in ours.cores:
        nn.init.kaiming_normal_(core, nonlinearity="relu")
    measured.append(gain(ours))
    for found, value in zip(gains.values(), measured, strict=True):
        found.append(value)

for name, found in gains.items():
    print(f"{' '.join(name.split()):30} {min(found):.2f} to {max(found):.2f}")

# %%
# Compress with it
# ----------------
#
# A registered name is all that :func:`tnlayers.tensorize_` needs. It makes layer classes for the kinds that have none.
# Here it replaces two convolutions of a small network that was trained on images of digits, and fits the cores to the
# kernels; :doc:`/tutorials/plot_03_compress` does this with fine-tuning and all.

digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
images, labels = (images - images.mean()) / images.std(), torch.as_tensor(digits.target)
train, test = torch.randperm(len(images)).split([1397, 400])


def trained():
    """Return a small network that was trained on the digits."""
    blocks = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 32, 2), (32, 32, 1)):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=False)
        blocks.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU()))
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=6 * 28)
    for _ in range(6):
        for rows in train[torch.randperm(len(train))].split(50):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model):
    """Return the percentage of test images whose digit the model finds."""
    with torch.no_grad():
        return 100 * (model(images[test]).argmax(1) == labels[test]).float().mean().item()


model = trained()
kernel = model[2][0]  # a plain nn.Conv2d
before = accuracy(model)
config = tnlayers.TensorizeConfig("filterbank", rank=0.3, options={"filters": 5}, include=["1", "2"])
print(tnlayers.tensorize_(model, config, calibration=[images[train[:250]]]))
print(f"test accuracy: {before:.1f} % before, {accuracy(model):.1f} % after, without fine-tuning")

# %%
# Is it a good format?
# --------------------
#
# That is a question to measure. ``from_conv`` fits the cores to the kernel of one trained convolution. The error,
# :math:`\|W - W'\| / \|W\|`, at equal numbers of parameters compares formats.

fits = {}
for name, kind, options in (
    ("filter bank, 2 filters", FilterBankConv2d, {"filters": 2}),
    ("filter bank, 5 filters", FilterBankConv2d, {"filters": 5}),
    ("Tucker", tnlayers.TuckerConv2d, {}),
    ("CP", tnlayers.CPConv2d, {}),
):
    for keep in (0.05, 0.1, 0.2, 0.4):
        fitted = kind.from_conv(kernel, rank=keep, **options)
        with torch.no_grad():
            error = ((fitted.weight - kernel.weight).norm() / kernel.weight.norm()).item()
        fits.setdefault(name, []).append((fitted.network.num_params, error))

# %%
# Left: as they come, the new layers start as a dense one does, and each draw is right. Kaiming's rule on each core is
# wrong by a factor that no dense layer shows. Right: two filters serve a small layer, but more channels do not make up
# for the filters that are missing. Five filters are a little nearer to this kernel than Tucker's format, and CP is
# nearer than both.
#
# To bring a format into the library, see :doc:`/how-to/add-a-format`. A model saved with
# :func:`tnlayers.save_tensorized` names its formats, so register yours before you load it.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
generator = np.random.default_rng(0)
for k, (found, color) in enumerate(zip(gains.values(), ("0.4", "#0072b2", "#d55e00"), strict=True)):
    left.plot(k + generator.uniform(-0.18, 0.18, len(found)), found, ".", color=color, ms=7, alpha=0.7)
left.axhline(1, color="0.5", lw=1, ls=":")
left.set_yscale("log")
left.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
left.set_yticks([], minor=True)
left.set_xticks(range(len(gains)), gains)
left.set(xlim=(-0.5, 2.5), ylabel="gain, measured (1 is right)", title="60 draws of a layer")
styles = ("o-", "#56b4e9"), ("s-", "#0072b2"), ("^--", "#e69f00"), ("v:", "black")
for (name, points), (style, color) in zip(fits.items(), styles, strict=True):
    right.semilogx(*zip(*points, strict=True), style, color=color, label=name)
right.set_xticks([500, 1000, 2000, 4000], ["500", "1,000", "2,000", "4,000"])
right.set_xticks([], minor=True)
right.set(xlabel="parameters of the layer", ylabel="error of the fit, relative", title="Fits to one trained kernel")
right.legend()
right.grid(alpha=0.3)
plt.show()

del tnlayers.FORMATS["filterbank"]  # only since all tutorials of this site run in one process

# sphinx_gallery_thumbnail_number = -1
