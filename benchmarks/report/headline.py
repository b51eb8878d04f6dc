"""Table of the README's headline figures, wins and losses alike."""

from collections.abc import Callable

from benchmarks.report.markdown import markdown

PLAIN = "convergence/fashion-mnist-plain"
NO_NORM = "convergence/cifar10-resnet-no-norm"
NETWORK = "results/cifar10-resnet20"
COMPRESSED = "compress/resnet20"
AT_KEEP_10 = "promises/keep-0.1-training-cp-tucker-tt-chain-tr-dense"
WHOLE = "throughput/resnet32"
PEER = "promises/auto-tensorly-torch-cp-tucker-tt-chain"
HEADLINE = (
    (
        "30 layers without normalisation, small Fashion-MNIST: accuracy, worst to best of five formats",
        f"default {{{PLAIN}/default}}; Kaiming's rule per core {{{PLAIN}/kaiming-per-core}} (0 = diverged, 10 % = "
        f"chance); dense {{{PLAIN}/dense}}",
        "convergence",
    ),
    (
        "Where the default loses: ResNet-20 in TR without normalisation, small CIFAR-10",
        f"default {{{NO_NORM}-tr/default/1}} %; Kaiming's rule per core {{{NO_NORM}-tr/kaiming-per-core/1}} %; "
        f"`scale_residual_` {{{NO_NORM}-tr/scale_residual_/1}} %; dense {{{NO_NORM}-dense/default/1}} %",
        "convergence",
    ),
    (
        "With batch normalisation: formats in which no other start needs fewer steps",
        "{convergence/fewest/digits} on digits, {convergence/fewest/fashion-mnist} on Fashion-MNIST, "
        "{convergence/fewest/cifar10} on CIFAR-10: mostly no gain",
        "convergence",
    ),
    (
        "ResNet-20 on CIFAR-10, 5x smaller: accuracy after 30 epochs",
        f"dense {{{NETWORK}-dense/whole/1}} % (mean of {{{NETWORK}-dense/whole/4}} seeds); "
        f"TR {{{NETWORK}-tr/5x-smaller/1}} (one seed)",
        "training",
    ),
    (
        "Points lost by a trained ResNet-20 at 50 % of its parameters, one seed",
        f"Tucker {{{COMPRESSED}-tucker-0.5/points-lost/1}} "
        f"({{{COMPRESSED}-tucker-0.5/images-of-the-fine-tune}} images of fine-tuning; the others "
        f"{{{COMPRESSED}-tr-0.5/images-of-the-fine-tune}}); TR {{{COMPRESSED}-tr-0.5/points-lost/1}}; "
        f"TT {{{COMPRESSED}-tt-0.5/points-lost/1}}; CP {{{COMPRESSED}-cp-0.5/points-lost/1}}; "
        f"TT chain {{{COMPRESSED}-tt-chain-0.5/points-lost/1}}; BTT {{{COMPRESSED}-btt-0.5/points-lost/1}}",
        "compression",
    ),
    (
        "Training step over dense, keep 0.1",
        f"time of single layers in CP, Tucker, TT chain, TR {{{AT_KEEP_10}/geometric-mean/1}} on average, worst "
        f"{{{AT_KEEP_10}/worst-row/1}}; images per second of whole ResNet-32: "
        f"Tucker {{{WHOLE}-tucker/float32-keep-0.1/1}}; CP {{{WHOLE}-cp/float32-keep-0.1/1}}; "
        f"TR {{{WHOLE}-tr/float32-keep-0.1/1}}; TT {{{WHOLE}-tt/float32-keep-0.1/1}}; "
        f"BTT {{{WHOLE}-btt/float32-keep-0.1/1}}",
        "speed training",
    ),
    (
        "Time of single layers over tednet's, and over tensorly-torch's, at equal shapes and ranks",
        "{promises/auto-tednet/geometric-mean/1} (not slower in {promises/auto-tednet/rows-within}); "
        f"{{{PEER}/geometric-mean/1}} (not slower in {{{PEER}/rows-within}})",
        "speed",
    ),
    (
        "Time over dense where a format must contract its kernel: BTT, single layers, one image, inference",
        "{speed/btt/dense-inference-batch-1/1} on average, worst {speed/btt/dense-inference-batch-1/2}",
        "speed",
    ),
    (
        "Pairs of a tool of PyTorch and a layer that work",
        "{tools/passed}, with {tools/tools} tools",
        "tools",
    ),
)
"""Question, answer with the names of figures in braces, and pages of docs/evidence, with a space between them."""


def headline(figure: Callable[[str], str]) -> str:
    """Return the table.

    Args:
        figure: returns the text of a figure, by its name.
    """
    table = []
    for question, answer, pages in HEADLINE:
        first, *rest = answer.split("{")
        filled = "".join(f"{figure(name)}{text}" for name, _, text in (part.partition("}") for part in rest))
        links = ", ".join(f"[{page}](docs/evidence/{page}.md)" for page in pages.split())
        table.append([question, first + filled, links])
    return markdown(["question", "figure", "evidence"], table)
