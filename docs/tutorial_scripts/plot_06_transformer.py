r"""
A transformer with tensor layers
================================

Most parameters of a transformer are in linear layers. This tutorial takes a vision transformer from the library
``transformers``, replaces its linear layers by smaller ones before training, and trains it from scratch on real images.
You see which layers are replaced and which stay, which formats make sense for linear layers, how to set up AdamW, and
how to save the result.

It needs ``pip install transformers scikit-learn matplotlib`` beside tnlayers. Nothing is downloaded.

.. index:: ! transformer, ! ViT, ! attention
"""

# %%
# The model
# ---------
# A configuration of ``transformers`` is enough to build a model with random weights. The images are the 8 x 8
# handwritten digits that come with scikit-learn. The model cuts each into 16 patches of 2 x 2 pixels, and treats these
# as a sentence of 16 words.
#
# ``initializer_range`` is the standard deviation of all weights. The usual 0.02 suits layers of thousands of features.
# For 64 features it is set to 1 / sqrt(64), so that the dense model starts well too, and the comparison is fair.
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import tnlayers

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)
TRAINING = 1437  # images to learn from; the other 360 are for the test

vit = ViTConfig(
    image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=4, intermediate_size=256, initializer_range=64**-0.5,
)  # fmt: skip

# %%
# Which format for a linear layer
# -------------------------------
# A tensor layer computes its weight from several small tensors, the **cores**. Cores share axes, the **bonds**, and
# the product sums over them. The size of a bond is its **rank**. The **format** says how the cores are joined. With
# ``rank=0.25``, a float, each layer takes the largest ranks that keep at most a quarter of the dense parameters. This
# share is the **keep ratio**.
#
# The formats differ in one respect that matters here: the rank of the weight as a matrix, which bounds how many
# independent directions the layer can pass on. For a layer of 64 x 256 at most 64 are possible.
torch.manual_seed(0)
candidates = {
    "TR": tnlayers.TRLinear(64, 256, rank=0.25),
    "TR, split features": tnlayers.TRLinear(64, 256, rank=0.25, in_shape=(8, 8), out_shape=(16, 16)),
    "Tucker": tnlayers.TuckerLinear(64, 256, rank=0.25),
    "CP": tnlayers.CPLinear(64, 256, rank=0.25),
    "TT chain": tnlayers.TTLinear(64, 256, rank=0.25, layout="chain"),
    "TT": tnlayers.TTLinear(64, 256, rank=0.25),
    "BTT": tnlayers.BTTLinear(64, 256, rank=0.25),
    "BlockTT": tnlayers.BlockTTLinear(64, 256, rank=0.25),
}
for name, layer in candidates.items():
    matrix_rank = torch.linalg.matrix_rank(layer.weight).item()
    print(f"{name:19s} keeps {layer.keep_ratio:5.1%}, matrix rank {matrix_rank:2d}   {layer.network}")

# %%
# In the last column, ``i`` is the axis of the input features and ``o`` that of the output features. All other letters
# are bonds.
#
# TR, Tucker, CP and the TT chain have one core for all inputs and one for all outputs. For a linear layer that is a
# product of thin matrices, the plain low-rank layer under different names.
#
# TT, BTT and BlockTT split the features into factors, such as 64 = 8 x 8, and join an input factor with an output
# factor in one core. Their matrices have full rank at the same number of parameters. So these are the formats to try
# for linear layers. The arguments ``in_shape`` and ``out_shape`` choose the factors; without them, the format does.
# With split features the cores of a ring are smaller, so its bonds are larger, and here it has full rank too. BlockTT
# has few possible sizes in a layer this small, and keeps less than a quarter. :doc:`/explanation/formats` says more.
#
# Replace the layers
# ------------------
# :func:`tnlayers.tensorize_` replaces layers in place. ``decompose=False`` draws new cores at random, for a model that
# is trained from scratch. (The default fits the cores to the trained weights; see :doc:`/tutorials/plot_03_compress`.)
#
# The settings are a :class:`tnlayers.TensorizeConfig`:
#
# - ``exclude`` leaves the classifier dense. It has few parameters, and all of its 10 outputs matter.
# - ``min_params`` leaves small layers dense, here the one that embeds the patches.
# - ``init`` draws cores for layers without a ReLU behind them, as the layers of a transformer are. The default draws
#   weights of twice this variance, for a ReLU.


def compressed(name):
    """Return the settings for one format."""
    linear = tnlayers.Init(nonlinearity="linear")
    return tnlayers.TensorizeConfig(
        name, rank=0.25, decompose=False, exclude=["classifier"], min_params=1000, init=linear
    )


torch.manual_seed(0)
model = ViTForImageClassification(vit)
report = tnlayers.tensorize_(model, compressed("tt"))
print(report)

# %%
# The report names every linear layer and convolution, what became of it, and why. Embeddings, layer norms and biases
# are not in it, and stay as they are.
#
# The models of ``transformers`` have separate layers for queries, keys and values, so all are replaced. Torch's own
# ``nn.MultiheadAttention`` keeps them in one parameter that is not a layer. It stays dense, and so does its output
# layer, which has a class of its own. Only the two other linear layers are replaced:
settings = tnlayers.TensorizeConfig("tt", rank=0.25, decompose=False)
print(tnlayers.tensorize_(nn.TransformerEncoderLayer(64, 4, 256), settings, dry_run=True))

# %%
# An optimizer for cores
# ----------------------
# A step of the same length in a core and in a dense weight does not change the layer equally.
# :func:`tnlayers.param_groups` makes parameter groups for any optimizer. Each core gets the learning rate at which the
# layer's first step is expected to lower the loss as much as a dense layer's step at ``lr``. ``optimizer="adam"``
# stands for AdamW too. With ``scale="expected"`` equal layers have equal rates, which makes few groups.
groups = tnlayers.param_groups(model, lr=2e-3, weight_decay=0.05, optimizer="adam", scale="expected")
for group in groups:
    entries = sum(parameter.numel() for parameter in group["params"])
    print(f"{group['name']:42s} {entries:6,} entries, lr {group['lr']:.5f}, weight decay {group['weight_decay']}")

# %%
# Dense weights and embeddings decay; biases, norms and cores do not. **Weight decay** pulls each weight towards zero
# in every step, and for cores that is not the same as for the weight they compute. To decay the computed weights, add
# ``0.5 * decay * tnlayers.frobenius_penalty(model)`` to the loss. The penalty is the sum of their squared entries. It
# passes through Adam's scaling as any gradient does, while AdamW's own decay does not, so ``decay`` has to be chosen
# anew. This short run does without it. :doc:`/how-to/optimizers` has the details.
#
# Train
# -----
# Four models, the same batches, the same schedule. For the dense model, ``param_groups`` gives the base learning rate.


def train(name, steps=130):
    """Train one model; return it, the loss of each step and the accuracy on the test images."""
    torch.manual_seed(0)
    model = ViTForImageClassification(vit)
    if name != "dense":
        tnlayers.tensorize_(model, compressed(name))
    groups = tnlayers.param_groups(model, lr=2e-3, weight_decay=0.05, optimizer="adam", scale="expected")
    optimizer = torch.optim.AdamW(groups)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.1)
    batches = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        batch = torch.randint(TRAINING, (64,), generator=batches)
        loss = F.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        right = model(pixel_values=images[TRAINING:]).logits.argmax(1) == labels[TRAINING:]
    return model, losses, right.float().mean().item()


results = {name: train(name) for name in ("dense", "tr", "tt", "blocktt")}
for name, (model, _, accuracy) in results.items():
    print(f"{name:8s} {sum(p.numel() for p in model.parameters()):7,} parameters, accuracy {accuracy:.1%}")

# %%
# Save and load
# -------------
# :func:`tnlayers.save_tensorized` writes one file with the parameters and the description of every tensor layer.
# :func:`tnlayers.load_tensorized` takes a function that builds the plain model, and replaces its layers as the file
# says.
model = results["tt"][0]
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    path = Path(folder) / "digits.safetensors"
    tnlayers.save_tensorized(model, path)
    again = tnlayers.load_tensorized(lambda: ViTForImageClassification(vit), path).eval()
    same = torch.equal(model(pixel_values=images[:8]).logits, again(pixel_values=images[:8]).logits)
    print(f"{path.stat().st_size / 1000:.0f} kB, same outputs: {same}")

# %%
# transformers' own ``save_pretrained`` and ``from_pretrained`` work too, and with them the Hugging Face Hub.
# :doc:`/how-to/hugging-face` has the code.
#
# What was gained
# ---------------
# All three have about a quarter of the dense model's parameters. TT and BlockTT, whose matrices have full rank, learn
# faster than the ring, which is a plain low-rank layer here. The dense model learns fastest. This is one seed, a few
# seconds of training and 360 test images; the bars are the standard error from the number of images alone, and
# differences within them mean nothing. :doc:`/tutorials/plot_04_choose_format` shows how to choose for your own
# layers.
names = {"dense": "dense", "tr": "TR", "tt": "TT", "blocktt": "BlockTT"}
colors = {"dense": "0.35", "tr": "#D55E00", "tt": "#0072B2", "blocktt": "#009E73"}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
for name, (model, losses, accuracy) in results.items():
    smooth = torch.tensor(losses).unfold(0, 8, 1).mean(1)
    left.semilogy(range(8, len(losses) + 1), smooth, color=colors[name], linewidth=2, label=names[name])
    size = sum(parameter.numel() for parameter in model.parameters()) / 1000
    error = 100 * math.sqrt(accuracy * (1 - accuracy) / (len(labels) - TRAINING))
    right.errorbar(size, 100 * accuracy, error, color=colors[name], fmt="o", markersize=9, capsize=4)
    side = {"xytext": (-9, 5), "ha": "right"} if name == "blocktt" else {"xytext": (9, 5)}
    right.annotate(names[name], (size, 100 * accuracy), textcoords="offset points", color=colors[name], **side)
left.set_xlabel("step of training")
left.set_ylabel("cross-entropy (nats), mean of 8 steps")
left.set_title("Training from scratch")
left.legend()
left.grid(alpha=0.3, which="both")
right.set_xlabel("parameters of the whole model (thousands)")
right.set_ylabel("accuracy on 360 test images (%)")
right.set_title("Accuracy against size")
right.set_xlim(0, 120)
right.grid(alpha=0.3)
plt.show()
