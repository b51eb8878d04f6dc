"""Table of the README's headline figures, wins and losses alike."""

from collections.abc import Callable

from benchmarks.report.markdown import markdown

PLAIN = "convergence/fashion-mnist-plain"
AT_KEEP_10 = "promises/keep-0.1-training-cp-tucker-tt-chain-tr-dense"
PEER = "promises/auto-tensorly-torch-cp-tucker-tt-chain"
HEADLINE = (
    (
        "Do 30 plain layers train without normalisation? Test accuracy on small Fashion-MNIST, worst to best format",
        f"default {{{PLAIN}/default}}; Kaiming's rule per core {{{PLAIN}/kaiming-per-core}}; dense {{{PLAIN}/dense}}",
        "convergence",
    ),
    (
        "And with batch normalisation? Formats in which no other start needs fewer steps",
        "{convergence/fewest/digits} on digits, {convergence/fewest/fashion-mnist} on Fashion-MNIST, "
        "{convergence/fewest/cifar10} on CIFAR-10: mostly no gain",
        "convergence",
    ),
    (
        "Accuracy of ResNet-20 on CIFAR-10, 5x smaller, after a short training",
        "dense {results/cifar10-resnet20-dense/2.5x-smaller/1}; TR {results/cifar10-resnet20-tr/5x-smaller/1}; "
        "TT {results/cifar10-resnet20-tt/5x-smaller/1}; CP {results/cifar10-resnet20-cp/5x-smaller/1}; "
        "Tucker {results/cifar10-resnet20-tucker/5x-smaller/1}",
        "training",
    ),
    (
        "Points lost by a trained ResNet-20 that is compressed to 50 % and fine-tuned",
        "Tucker {compress/resnet20-tucker-0.5/points-lost/1}; TR {compress/resnet20-tr-0.5/points-lost/1}; "
        "CP {compress/resnet20-cp-0.5/points-lost/1}; BTT {compress/resnet20-btt-0.5/points-lost/1}",
        "compression",
    ),
    (
        "Time of a training step over the dense layer's: CP, Tucker, TT chain and TR at keep 0.1",
        f"{{{AT_KEEP_10}/geometric-mean/1}} on average; worst {{{AT_KEEP_10}/worst-row/1}}",
        "speed",
    ),
    (
        "Time over tednet's, and over tensorly-torch's, at equal shapes and ranks",
        "{promises/auto-tednet/geometric-mean/1} (not slower in {promises/auto-tednet/rows-within}); "
        f"{{{PEER}/geometric-mean/1}} (not slower in {{{PEER}/rows-within}})",
        "speed",
    ),
    (
        "Time over the dense layer's where a format must contract its kernel: BTT, one image, inference",
        "{speed/btt/dense-inference-batch-1/1} on average; worst {speed/btt/dense-inference-batch-1/2}",
        "speed",
    ),
    (
        "Do torch's tools work? Pairs of a tool and a layer",
        "{tools/passed}, with {tools/tools} tools",
        "tools",
    ),
)
"""Question, answer with the names of figures in braces, and page of docs/evidence."""


def headline(figure: Callable[[str], str]) -> str:
    """Return the table.

    Args:
        figure: returns the text of a figure, by its name.
    """
    table = []
    for question, answer, page in HEADLINE:
        first, *rest = answer.split("{")
        filled = "".join(f"{figure(name)}{text}" for name, _, text in (part.partition("}") for part in rest))
        table.append([question, first + filled, f"[{page}](docs/evidence/{page}.md)"])
    return markdown(["question", "figure", "evidence"], table)
