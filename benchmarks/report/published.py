"""Published CIFAR-10 test accuracies of compressed ResNets, to compare with. They were not measured here."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.names import DENSE
from benchmarks.report.markdown import markdown


@dataclass(frozen=True)
class Published:
    """One published accuracy.

    Attributes:
        model: the network, as in `tnlayers.models`.
        ratio: parameters of the dense network over those of the compressed one.
        accuracy: of the test images, in per cent.
        epochs: of the training, as far as known here.
        dense: the same source's accuracy of the dense network, in per cent, as far as known here.
        method: name of the method, and its source.
        trained: whether the start was a trained dense network.
    """

    model: str
    ratio: float
    accuracy: float
    epochs: str
    method: str
    trained: bool = False
    dense: float | None = None

    @property
    def smaller(self) -> str:
        """The compression in words."""
        return DENSE if self.ratio == 1 else f"{self.ratio:g}x"


EVERY = (
    Published("resnet20", 1, 92.56, "200", "chenyaofo/pytorch-cifar-models"),
    Published("resnet20", 1, 91.73, "200", "akamaster/pytorch_resnet_cifar10"),
    Published("resnet20", 2.3, 90.8, "", "PSTRN, searched ranks"),
    Published("resnet20", 6.1, 88.5, "", "PSTRN, searched ranks"),
    Published("resnet32", 1, 93.41, "200", "chenyaofo/pytorch-cifar-models"),
    Published("resnet32", 1, 92.63, "200", "akamaster/pytorch_resnet_cifar10"),
    Published("resnet32", 2.5, 91.44, "", "PSTRN, searched ranks"),
    Published("resnet32", 2.9, 92.86, "1,000, the best one", "T-Basis", dense=94.34),
    Published("resnet32", 3, 93.05, "", "ADMM-TT", trained=True),
    Published("resnet32", 3, 93.29, "", "ADMM-Tucker", trained=True),
    Published("resnet32", 5, 90.6, "", "Tensor Ring Nets", dense=92.5),
    Published("resnet32", 5.2, 90.6, "", "PSTRN, searched ranks"),
    Published("resnet32", 5.6, 91.85, "1,000, the best one", "T-Basis", dense=94.34),
    Published("resnet32", 10.5, 90.24, "1,000, the best one", "T-Basis", dense=94.34),
    Published("resnet32", 15, 80.8, "", "Tensor Ring Nets", dense=92.5),
    Published("resnet32", 19, 87.65, "1,000, the best one", "T-Basis", dense=94.34),
    Published("resnet56", 1, 93.39, "200", "akamaster/pytorch_resnet_cifar10"),
)


def published(models: Sequence[str]) -> str:
    """Return a table of the published accuracies of these networks, or an empty string."""
    table = [
        [
            one.model,
            one.smaller,
            f"{one.accuracy:.2f} %",
            f"{dense:.2f} %" if (dense := one.accuracy if one.ratio == 1 else one.dense) else "",
            one.epochs,
            "a trained network" if one.trained else "",
            one.method,
        ]
        for one in EVERY
        if one.model in models
    ]
    header = [
        "network",
        "smaller",
        "published accuracy",
        "of its dense network",
        "epochs",
        "start, if not random",
        "method",
    ]
    note = "Epochs, or an accuracy of the dense network, that are not there: not known here."
    return f"{markdown(header, table)}\n\n{note}" if table else ""
