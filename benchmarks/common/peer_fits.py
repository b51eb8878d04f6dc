"""Kernels fitted by tensorly and tensorly-torch."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from importlib import import_module

import torch
from torch import Tensor, nn

import tnlayers


def tensorly_kernels(family: str, conv: nn.Conv2d, ranks: list[int], seed: int) -> Iterator[Tensor]:
    """Yield the fits of tensorly's algorithm for a kernel; for `tr`, one per start mode. Other families yield none."""
    tl, found, kernel = import_module("tensorly"), import_module("tensorly.decomposition"), conv.weight
    chain = kernel.permute(1, 2, 3, 0)
    if family == "tucker":
        (core, factors), _ = found.partial_tucker(kernel, ranks[::-1], modes=[0, 1], random_state=seed)
        yield tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    elif family == "cp":
        yield tl.cp_to_tensor(found.parafac(kernel, ranks[0], random_state=seed))
    elif family == "tt-chain":
        yield tl.tt_to_tensor(found.tensor_train(chain, [1, *ranks, 1])).permute(3, 0, 1, 2)
    elif family == "tr":
        refusals = []
        for mode in range(3):  # tensorly raises where the ranks do not fit the unfolding of the mode
            try:
                ring = found.tensor_ring(chain.flatten(1, 2), [*ranks, ranks[0]], mode=mode)
                yield tl.tr_to_tensor(ring).unflatten(1, kernel.shape[2:]).permute(3, 0, 1, 2)
            except ValueError as error:
                refusals.append(error)
        if len(refusals) == 3:
            raise refusals[0]


def tltorch_kernels(family: str, conv: nn.Conv2d, ranks: list[int], seed: int) -> Iterator[Tensor]:
    """Yield tensorly-torch's fit of a convolution. Other families yield none."""
    kinds = {"cp": ranks[0], "tucker": (ranks[-1], ranks[0], *conv.kernel_size), "tt-chain": (1, *ranks, 1)}
    if family in kinds:
        own = {"factorization": family.partition("-")[0], "rank": kinds[family]}
        start = {} if family == "tt-chain" else {"random_state": seed}
        layer = import_module("tltorch").FactorizedConv.from_conv(conv, decomposition_kwargs=start, **own)
        yield tnlayers.from_tltorch(layer).weight


PEERS = {"tensorly": tensorly_kernels, "tltorch": tltorch_kernels}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Run peers with tensorly's torch backend, without gradients, output and warnings."""
    tensorly = import_module("tensorly")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImportError):
            import_module("tltorch")  # its first import sets the backend for good; inside the context that is undone
        with tensorly.backend_context("pytorch"):
            yield
