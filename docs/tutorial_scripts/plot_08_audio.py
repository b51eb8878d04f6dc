r"""
Sound: convolutions in one dimension
====================================

Models of sound stack convolutions over time, and models that put out sound end with transposed ones. This tutorial
builds a small network that removes noise from a waveform, with dense layers and with tensor layers in three formats and
two sizes. At the end you see a melody before and after, and the error of each network against its size.

The sounds are computed here. It takes PyTorch, matplotlib and tnlayers, and a few seconds.
"""

# %%
# The data: notes and noise
# -------------------------
# A clip is one note of a tenth of a second. A note is a sum of up to six sine waves at multiples of a base frequency,
# with random phases. All clips have power 1, the mean of the squared samples. The noise added to them has power 1 too,
# so the **signal-to-noise ratio** (power of the sound over power of the error, in decibels) is zero. The network takes
# the noisy clip and has to put out the clean one.
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import nn

import tnlayers

torch.manual_seed(0)
RATE = 8000  # samples per second
PITCHES = [220 * 2 ** (step / 12) for step in range(24)]  # two octaves, in hertz


def note(pitch, length):
    """Return one note of power 1."""
    time = torch.arange(length) / RATE
    waves = [
        torch.sin(2 * math.pi * (k * pitch * time + torch.rand(()))) / k for k in range(1, 7) if k * pitch < RATE / 2
    ]
    sound = torch.stack(waves).sum(0)
    return sound / sound.square().mean().sqrt()


def clips(count, length=805):
    """Return notes of random pitch, of shape (count, 1, length)."""
    return torch.stack([note(PITCHES[int(torch.randint(24, ()))], length) for _ in range(count)])[:, None]


training, test = clips(512), clips(64)
noisy_test = test + torch.randn(test.shape)

# %%
# The network
# -----------
# The first layer is the front end of many audio models: kernel size 10, stride 5. It turns 805 samples into 160 frames
# of 64 channels. The next layer has stride 4, which leaves 40 frames of 128 channels. Two more layers keep this size.
# Then two transposed convolutions undo the strides: a **transposed convolution** of stride 4 puts out four frames for
# each frame that comes in.
#
# The function takes the two kinds of layer as arguments, so the dense network and all others are built by the same
# lines. The first and the last layer stay dense: with one channel on one side they have 640 weights, too few to save
# on.


def network(conv=nn.Conv1d, transposed=nn.ConvTranspose1d):
    """Return the network with these layers between its first and its last."""
    return nn.Sequential(
        nn.Conv1d(1, 64, 10, stride=5), nn.ReLU(),
        conv(64, 128, 8, stride=4, padding=2), nn.ReLU(),
        conv(128, 128, 5, padding=2), nn.ReLU(),
        conv(128, 128, 5, padding=2), nn.ReLU(),
        transposed(128, 64, 8, stride=4, padding=2), nn.ReLU(),
        nn.ConvTranspose1d(64, 1, 10, stride=5),
    )  # fmt: skip


print(tuple(network()(noisy_test).shape))

# %%
# Layers for one dimension
# ------------------------
# A tensor layer computes its **kernel**, the weight of shape (out channels, in channels, width), from several small
# tensors, the **cores**. Axes that cores share are **bonds**, and the product sums over them; the size of a bond is
# its **rank**. The **format** says how the cores are joined. :class:`tnlayers.TRConv1d`, :class:`tnlayers.TTConv1d`
# and :class:`tnlayers.CPConv1d` take the arguments of ``nn.Conv1d``, and a rank. A float is a **keep ratio**: the
# largest ranks with at most this share of the dense parameters.
for layer_class in (tnlayers.TRConv1d, tnlayers.TTConv1d, tnlayers.CPConv1d):
    layer = layer_class(64, 128, 8, stride=4, padding=2, rank=0.2)
    print(f"{layer_class.__name__}  ranks {dict(layer.rank)}, keeps {layer.keep_ratio:.1%}   {layer.network}")

# %%
# Each group of letters between commas is a core. ``w`` is the axis of the kernel's width, ``i`` are input and ``o``
# output channels; all others are bonds. The tensor ring (TR) closes a ring with ``r0``. The tensor train (TT) splits
# the channels into factors, ``i1`` and ``i2``, and pairs them with factors of the outputs. CP joins all cores at one
# bond.
#
# The transposed layers, such as :class:`tnlayers.TRConvTranspose1d`, have the same networks. They start right without
# help too: each output of stride 4 and width 8 receives two of the eight taps, and the initialisation counts them.
# :doc:`/tutorials/plot_02_signal` shows why that matters.
#
# :func:`tnlayers.summary` lists each layer of a model with its parameters, and the floating-point operations of one
# forward pass:
ring = network(partial(tnlayers.TRConv1d, rank=0.2), partial(tnlayers.TRConvTranspose1d, rank=0.2))
print(tnlayers.summary(ring, noisy_test[:1]))

# %%
# Train
# -----
# Every network sees the same clips with the same noise. The optimizer and its settings are the same too.


def train(model, steps=140):
    """Train a model to remove noise; return its signal-to-noise ratio on the test clips, in decibels."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        clean = training[torch.randint(len(training), (16,))]
        loss = (model(clean + torch.randn(clean.shape)) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        error = (model(noisy_test) - test).square().mean()
    return -10 * math.log10(error)


formats = {
    "TR": (tnlayers.TRConv1d, tnlayers.TRConvTranspose1d),
    "TT": (tnlayers.TTConv1d, tnlayers.TTConvTranspose1d),
    "CP": (tnlayers.CPConv1d, tnlayers.CPConvTranspose1d),
}
torch.manual_seed(0)
models = {("dense", 1.0): network()}
for name, (conv, transposed) in formats.items():
    for keep in (0.2, 0.05):
        models[name, keep] = network(partial(conv, rank=keep), partial(transposed, rank=keep))

results = {}
for (name, keep), model in models.items():
    results[name, keep] = sum(parameter.numel() for parameter in model.parameters()), train(model)
    print(f"{name:5s} keep {keep:4.0%}: {results[name, keep][0]:7,} parameters, {results[name, keep][1]:.1f} dB")

# %%
# Before and after
# ----------------
# A convolution takes sounds of any length. So the networks, trained on single notes, run on a melody of eight. The
# spectrograms show which frequencies sound when: each note is a stack of lines, and the noise is everywhere. The TT
# network with a fifth of the parameters in its layers keeps the strong lines below 1 kHz. Above, where the sound is
# weaker than the noise, it removes most of both.
#
# Below, on the left, are twelve milliseconds of the same melody. On the right is what size buys. At a fifth of the
# parameters the formats lose a little against the dense network. At a twentieth they differ more, and TT keeps the
# most. These are one seed, a short training and one kind of sound. :doc:`/tutorials/plot_04_choose_format` compares
# formats on layers of your own.
torch.manual_seed(2)
tune = torch.cat([note(PITCHES[step], 800) for step in (0, 4, 7, 12, 16, 12, 7, 4)])
tune = torch.cat([tune, tune[-5:]])  # 6,405 samples: the strides divide 6,400
noisy = tune + torch.randn(tune.shape)
with torch.no_grad():
    denoised = models["TT", 0.2](noisy[None, None])[0, 0]

figure, axes = plt.subplot_mosaic(
    [["in", "out", "clean"], ["wave", "wave", "size"]], figsize=(11, 7), layout="constrained"
)
for name, sound, title in (
    ("in", noisy, "noisy input"),
    ("out", denoised, "output of TT, keep ratio 0.2"),
    ("clean", tune, "clean sound"),
):
    image = axes[name].specgram(sound.numpy(), NFFT=256, noverlap=224, Fs=RATE, vmin=-65, vmax=-25, cmap="magma")[-1]
    axes[name].set_title(title)
    axes[name].set_xlabel("time (s)")
    axes[name].set_ylim(0, 3000)
axes["in"].set_ylabel("frequency (Hz)")
figure.colorbar(image, ax=axes["clean"], label="power density (dB/Hz)")

window = slice(2600, 2600 + 96)
milliseconds = torch.arange(len(tune))[window] * 1000 / RATE
axes["wave"].plot(milliseconds, noisy[window], color="0.75", label="noisy input")
axes["wave"].plot(milliseconds, tune[window], color="black", linewidth=2, label="clean sound")
axes["wave"].plot(milliseconds, denoised[window], color="#0072B2", linewidth=2, linestyle="--", label="output of TT")
axes["wave"].set_xlabel("time (ms)")
axes["wave"].set_ylabel("amplitude (power 1)")
axes["wave"].legend(ncols=3, loc="upper center")
axes["wave"].set_ylim(-4.5, 5.5)

styles = {"dense": ("0.35", "s"), "TR": ("#D55E00", "o"), "TT": ("#0072B2", "^"), "CP": ("#009E73", "D")}
for name, (color, marker) in styles.items():
    points = sorted(point for (other, _), point in results.items() if other == name)
    axes["size"].semilogx(*zip(*points, strict=True), color=color, marker=marker, markersize=8, label=name)
axes["size"].set_xticks([15_000, 60_000, 300_000], ["15,000", "60,000", "300,000"])
axes["size"].minorticks_off()
axes["size"].set_xlim(10_000, 500_000)
axes["size"].set_xlabel("parameters of the network")
axes["size"].set_ylabel("signal-to-noise ratio (dB)")
axes["size"].set_title("Noisy input: 0 dB")
axes["size"].grid(alpha=0.3)
axes["size"].legend()
plt.show()
