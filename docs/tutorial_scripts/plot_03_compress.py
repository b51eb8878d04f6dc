"""
Compress a trained network and deploy it
========================================

You train a small dense network, replace its convolutions by tensor layers with a budget of parameters, fine-tune it,
choose the budget from a sweep, save the result, and turn it into plain PyTorch layers that any tool can export.
"""

# %%
# A trained network
# -----------------
#
# Any model serves. This one is a small convolutional network on scikit-learn's images of digits, 8 x 8 pixels each. Its
# images are split three ways: for training, for choices (validation), and for the last figures (test).

import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import tnlayers

torch.manual_seed(0)
digits = load_digits()
images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
labels = torch.as_tensor(digits.target)
images = (images - images.mean()) / images.std()
train, validation, test = torch.randperm(len(images)).split([1000, 397, 400])


def make():
    """Return the dense network, untrained."""
    blocks = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=False)
        blocks.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU()))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def accuracy(model, rows):
    """Return the percentage of images whose digit the model finds."""
    model.eval()
    with torch.no_grad():
        return 100 * (model(images[rows]).argmax(1) == labels[rows]).float().mean().item()


def count(model):
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def learn(model, loss_of, lr, epochs):
    """Train a model; ``loss_of`` returns the loss of some rows. The learning rate falls to zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(train) // 50))
    for _ in range(epochs):
        model.train()
        for rows in train[torch.randperm(len(train))].split(50):
            loss = loss_of(model, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


dense = make()
learn(dense, lambda model, rows: F.cross_entropy(model(images[rows]), labels[rows]), lr=0.1, epochs=6)
print(f"dense: {count(dense):,} parameters, {accuracy(dense, validation):.2f} % of the validation images")

# %%
# Swap its layers
# ---------------
#
# :func:`tnlayers.tensorize_` replaces convolutions and linear layers, in place, by tensor layers. A tensor layer holds
# a few small tensors, the **cores**, instead of the kernel; the **format** says how they are joined (see
# :doc:`/tutorials/plot_01_first_layer`). Here the format is Tucker: a convolution to few channels, one among few
# channels, and one back. :class:`tnlayers.TensorizeConfig` says what to do:
#
# - ``budget={"params": 0.2}``: all chosen layers together may have this share of their parameters. The sizes of the
#   cores, the **ranks**, are spent where the error falls most for what it costs.
# - ``exclude`` names layers that stay: the first convolution and the last layer are small.
# - The cores are fitted to the kernels that are there. With ``calibration``, a list of batches, each layer is fitted so
#   that its *outputs* on these batches are kept, not its kernel alone.

calibration = [images[train[:250]]]


def compress(share):
    """Return a copy of the dense network, compressed, and the report."""
    model = copy.deepcopy(dense).eval()
    config = tnlayers.TensorizeConfig("tucker", budget={"params": share}, exclude=["0", "6"])
    report = tnlayers.tensorize_(model, config, calibration=calibration, example_input=images[:1])
    return model, report


model, report = compress(0.2)

# %%
# The report has a line for each layer: what it was and what it became with which ranks, its parameters and
# floating-point operations (FLOPs) before and after, and the relative error of its kernel, ``||W - W'|| / ||W||``. That
# error looks large, and may exceed one. It counts all directions of the kernel alike, and the calibration gives up
# those that the data use least. What counts is the accuracy.

print(report)

# %%
print(f"compressed: {count(model):,} parameters, {accuracy(model, validation):.2f} % of the validation images")

# %%
# Fine-tune
# ---------
#
# A little training repairs most of what the fit lost. The loss has two terms:
#
# - **distillation**: the dense network is the teacher; the compressed one learns its outputs. No label is needed.
# - **weight decay of the kernels**: decay of the cores is not decay of the kernels that they form.
#   :func:`tnlayers.frobenius_penalty` is the sum of the squared entries of all kernels, computed from the cores. Half
#   of it times 5e-4 acts as the optimizer's ``weight_decay=5e-4`` on dense layers.
#
# An optimizer that you made before the swap would still hold the old kernels; make a new one, or call
# :func:`tnlayers.remap_optimizer_`. :doc:`/how-to/optimizers` has more.

with torch.no_grad():
    targets = dense.eval()(images).softmax(1)


def distillation(model, rows):
    """Return the distance to the teacher's outputs, and the decay of the kernels."""
    return F.cross_entropy(model(images[rows]), targets[rows]) + 0.5 * 5e-4 * tnlayers.frobenius_penalty(model)


def result(share, model):
    """Return what the sweep below needs: a model, fine-tuned, and its accuracies."""
    fitted = accuracy(model, validation)
    learn(model, distillation, lr=0.05, epochs=4)
    tuned = accuracy(model, validation)
    print(f"budget {share:4}: {count(model):6,} parameters, {fitted:.2f} % fitted, {tuned:.2f} % fine-tuned")
    return {"model": model, "parameters": count(model), "fitted": fitted, "tuned": tuned}


sweep = {0.2: result(0.2, model)}

# %%
# Choose the budget
# -----------------
#
# How small can the network be? Try several budgets, with the same fine-tune each, and take the smallest network that
# loses at most one point on the validation images.

for share in (0.05, 0.1, 0.4):
    sweep[share] = result(share, compress(share)[0])

enough = accuracy(dense, validation) - 1
chosen = min((share for share, found in sweep.items() if found["tuned"] >= enough), default=max(sweep))
model = sweep[chosen]["model"]
print(f"chosen: {chosen}; on the test images {accuracy(model, test):.2f} %, dense {accuracy(dense, test):.2f} %")

# %%
# Save and load
# -------------
#
# :func:`tnlayers.save_tensorized` writes one safetensors file with a description of the tensor layers.
# :func:`tnlayers.load_tensorized` takes a function that makes the *dense* model, and swaps its layers as the file says.
# It runs no code from the file. See :doc:`/how-to/saving`.

folder = tempfile.TemporaryDirectory()
file = Path(folder.name, "digits.safetensors")
tnlayers.save_tensorized(model, file)
again = tnlayers.load_tensorized(lambda: make().eval(), file)
print(f"file: {file.stat().st_size:,} bytes; equal:", torch.equal(again(images[test]), model(images[test])))

# %%
# Deploy
# ------
#
# :func:`tnlayers.unfold_` replaces each tensor layer by a sequence of plain layers with the same function. Whoever runs
# the network then needs no tnlayers. (:func:`tnlayers.densify_` makes single ``nn.Conv2d`` with full kernels instead.)

tnlayers.unfold_(model)
print(model[2])

with torch.no_grad():
    torch.testing.assert_close(model(images[test]), again(images[test]), rtol=1e-4, atol=1e-4)

# %%
# So every exporter works. Here is ``torch.export`` with an open batch size; :doc:`/how-to/compile-export` has ONNX too.

batch = torch.export.Dim("batch")
program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
with torch.no_grad():
    torch.testing.assert_close(program.module()(images[test]), model(images[test]), rtol=1e-4, atol=1e-4)
operations = [node.target.__name__ for node in program.graph.nodes if node.op == "call_function"]
print({name: operations.count(name) for name in dict.fromkeys(operations)})
folder.cleanup()

# %%
# The sweep as a picture
# ----------------------
#
# Fitted alone, the network loses accuracy early. Fine-tuned, it holds longer. This is one run of a small task; a larger
# one, with published weights, is in :doc:`/evidence/compression`.

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
by_size = [sweep[share] for share in sorted(sweep)]
sizes = [found["parameters"] for found in by_size]
axes.semilogx(sizes, [found["fitted"] for found in by_size], "s--", color="#d55e00", label="fitted")
axes.semilogx(sizes, [found["tuned"] for found in by_size], "o-", color="#0072b2", label="fine-tuned, four epochs")
axes.plot(count(dense), accuracy(dense, validation), "k*", ms=13, ls="none", label="dense")
axes.axhline(enough, color="0.5", lw=1, ls=":", label="one point below dense")
best = sweep[chosen]
axes.plot(best["parameters"], best["tuned"], "o", ms=16, mfc="none", color="#0072b2", label=f"chosen, budget {chosen}")
axes.set(xlabel="parameters of the network", ylabel="accuracy on 397 validation images (%)")
ticks = [*sizes, count(dense)]
axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
axes.set_xticks([], minor=True)
axes.grid(alpha=0.3)
axes.legend(loc="lower right")
plt.show()

# sphinx_gallery_thumbnail_number = -1
