"""Changes of a layer's ranks in place: ``truncate_`` and ``grow_``."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from tnlayers.backend.optimizers import check_exchange, exchange_parameter, holders, wrappers
from tnlayers.backend.sharding import place, whole
from tnlayers.execution.module import ExecutableModule
from tnlayers.fitting.cuts import by_rule
from tnlayers.fitting.resizing import Resized, grow, padded, truncate
from tnlayers.init.variance import Init, Variance, solve
from tnlayers.layers import core_memory
from tnlayers.layers.zero_kernels import learnable
from tnlayers.ops.contraction import reconstruct
from tnlayers.ops.squared_norm import squared
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.rank import BondsError, Rank, resize

Move = Callable[[int, Tensor, bool], Tensor]
"""Returns a buffer of an optimizer for a new core: from the core's number, the buffer, and whether it holds squares."""


class ChangesRanks(ExecutableModule):
    """A layer whose ranks can change. Its function is kept, or the nearest one is found."""

    rank: Mapping[str, int]
    init: Init
    variance: Variance

    def _variance_of(self, network: TensorNetwork) -> Variance:
        """Return the solver's result for a network of this layer."""
        return solve(network, replace(self.geometry, input_size=self.init.input_size), self.init)

    def truncate_(
        self,
        rank: Rank | str | None = None,
        *,
        energy: float | None = None,
        error: float | None = None,
        optimizer: Optimizer | None = None,
    ) -> float:
        """Make the bonds smaller, with the nearest kernel.

        A tree (TT, Tucker, HT, BlockTT) is rounded: its cores are made orthogonal, and each bond is cut by a singular
        value decomposition. The squared error is at most the number of bonds times the least possible one. Other
        networks (TR, CP, BTT) are fitted again, as in ``set_weight_``, also from the largest slices of their cores.

        The cores become new parameters, without gradients. Bias, geometry, dtype, device and flags stay. Cached plans
        are dropped. Give the optimizer that holds the cores: it gets the new parameters. Its sums of gradients are
        multiplied as gradients are by the rounding, and sums of squared gradients by squares. After a fit, or with
        buffers of another meaning, the new cores start without state.

        Args:
            rank: as for the class, or ``"vbmf"``. A single number cuts the bonds that are larger. A mapping may name
                some of the bonds; the others keep their size.
            energy: share, in (0, 1], of the squared singular values that each unfolding of the kernel keeps.
            error: largest relative error of the kernel, in [0, 1). The ranks are the smallest that were found.
            optimizer: an optimizer that holds the cores; None: none does.

        Returns:
            float: ``||new kernel - old kernel|| / ||old kernel||``, before rounding to the layer's dtype. A layer that
            is small enough stays as it is, and this is 0.

        Raises:
            TypeError: an argument has another type, or cores are parametrized or pruned.
            ValueError: not one of rank, energy and error is given; it is out of range; a bond would become larger; the
                network has no bond to cut; the layer is on the meta device, or its cores hold NaN, infinity or hooks;
                or ``optimizer`` holds no core. The layer is then unchanged.

        Warns:
            UserWarning: an optimizer holds the cores, and none is given; or a DistributedDataParallel holds them.

        Example:
            >>> import tnlayers
            >>> layer = tnlayers.TTConv2d(16, 16, 3, rank=8)
            >>> error = layer.truncate_(rank=4)
            >>> dict(layer.rank), 0 < error < 1
            ({'r1': 4, 'r2': 4}, True)
        """
        with torch.inference_mode(False), torch.no_grad():  # cores of inference mode could not be trained
            return self._truncate(rank, energy, error, optimizer)

    def grow_(self, rank: Rank, *, optimizer: Optimizer | None = None) -> None:
        """Make the bonds larger, with the same kernel.

        The new entries of the last core that has a bond are zero; those of the other cores are random, as large as
        their other entries. So the function stays, and training changes it in the new directions from the first step.
        What is kept and dropped is as for ``truncate_``; the optimizer's buffers get zeros for the new entries.

        Args:
            rank: as for the class. A single number raises the bonds that are smaller. A mapping may name some of the
                bonds; the others keep their size.
            optimizer: an optimizer that holds the cores; None: none does.

        Raises:
            TypeError: an argument has another type, or cores are parametrized or pruned.
            ValueError: a bond would become smaller; the network has no bond; the layer is on the meta device, or its
                cores hold NaN, infinity or hooks; the cores would not fit into memory; or ``optimizer`` holds no core.
                The layer is then unchanged.

        Warns:
            UserWarning: an optimizer holds the cores, and none is given; or a DistributedDataParallel holds them.
            LargerThanDense: the cores have more parameters than the dense kernel.

        Example:
            >>> import tnlayers
            >>> layer, x = tnlayers.TRLinear(64, 64, rank=2), torch.randn(4, 64)
            >>> before = layer(x)
            >>> layer.grow_(rank=4)
            >>> layer.keep_ratio, torch.allclose(layer(x), before, atol=1e-5)
            (0.5, True)
        """
        with torch.inference_mode(False), torch.no_grad():  # as in truncate_
            self._grow(rank, optimizer)

    def _truncate(
        self, rank: Rank | str | None, energy: float | None, error: float | None, optimizer: Optimizer | None
    ) -> float:
        given = {
            name: value for name, value in (("rank", rank), ("energy", energy), ("error", error)) if value is not None
        }
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'none'} given; one of rank, energy and error chooses the bonds")
        for name in {*given} - {"rank"}:
            _check_share(name, given[name], zero=name == "error")
        cores = self._changeable(optimizer)
        network, free = self.network, [*self.rank]
        norm = math.sqrt(max(0.0, float(squared(network, cores))))
        sizes = None
        if isinstance(rank, str):
            found = by_rule(network, free, reconstruct(network, cores), rank, own=True)
            sizes = {bond: min(size, network.sizes[bond]) for bond, size in found.items()}
        elif rank is not None:
            sizes = resize(network, free, rank, larger=False)
        if norm == 0:
            if sizes is None:
                raise ValueError(f"{next(iter(given))} is given, but the kernel is zero; give a rank")
            smaller = network.resize(sizes)
            zeros = [core.new_zeros(shape) for core, shape in zip(cores, smaller.core_shapes, strict=True)]
            changed = Resized(smaller, zeros, 0.0, network)
        elif sizes == dict(self.rank):
            return 0.0
        else:
            changed = truncate(network, cores, free, sizes=sizes, energy=energy, error=error)
        if changed.network == network:
            return 0.0
        variance = self._variance_of(changed.network)
        new = learnable(changed.network, self.geometry, variance, self.init, changed.cores, norm)
        same = changed.legs and all(a is b for a, b in zip(new, changed.cores, strict=True))
        move: Move | None = (lambda k, value, squares: changed.moved(k, value, squares=squares)) if same else None
        self._replace_cores(changed.network, variance, new, optimizer, move)
        return changed.error

    def _grow(self, rank: Rank, optimizer: Optimizer | None) -> None:
        self._changeable(optimizer)
        network = self.network.resize(resize(self.network, [*self.rank], rank, larger=True))
        if network == self.network:
            return
        core_memory.check(type(self).__name__, network, rank, self.cores[0])
        new = grow(self.network, network, [whole(core) for core in self.cores])
        shapes = network.core_shapes
        self._replace_cores(
            network, self._variance_of(network), new, optimizer, lambda k, value, squares: padded(value, shapes[k])
        )

    def _changeable(self, optimizer: Optimizer | None) -> list[Tensor]:
        """Check that the cores can be replaced. Return them in float64."""
        cores = [*self.cores]
        if is_parametrized(self.cores) or not all(isinstance(core, nn.Parameter) for core in cores):
            raise TypeError("cores are parametrized or pruned, so they cannot be replaced; make them plain first")
        if not self.rank:
            raise BondsError(f"network '{self.network}' has no bond that could change")
        if any(core.is_meta for core in cores):
            raise ValueError("the layer is on the meta device and has no values; call to_empty first")
        for k, core in enumerate(cores):
            if core._backward_hooks or getattr(core, "_post_accumulate_grad_hooks", None):
                raise ValueError(f"core {k} has a hook, which a new parameter would lack; remove it first")
            if not torch.isfinite(core).all():
                raise ValueError(f"core {k} holds NaN or infinity; only finite cores can be changed")
        if optimizer is not None:
            check_exchange(optimizer, cores)
        fine = [whole(core).detach() for core in cores]
        return [core.to("cpu" if core.device.type == "mps" else core.device, torch.float64) for core in fine]

    def _replace_cores(
        self,
        network: TensorNetwork,
        variance: Variance,
        values: Sequence[Tensor],
        optimizer: Optimizer | None,
        move: Move | None,
    ) -> None:
        """Put new parameters in the place of the cores, here and in the optimizer."""
        new = []
        for old, value in zip(self.cores, values, strict=True):
            cast = value.to(old.device, old.dtype).contiguous()
            if not torch.isfinite(cast).all():
                raise ValueError(
                    f"{old.dtype} cannot hold the new cores, whose largest entry is {value.abs().max():.3g}"
                )
            new.append(nn.Parameter(place(cast, old), requires_grad=old.requires_grad))
        for other in holders([*self.cores]) if optimizer is None else ():  # this looks at all objects
            warnings.warn(
                f"{type(other).__name__} holds the old cores, so it will not train the new ones; give it as "
                "optimizer, or make a new one",
                stacklevel=core_memory.outside(),
            )
        for wrapper in wrappers([*self.cores]):
            warnings.warn(
                f"{type(wrapper).__name__} holds the old cores, so it will not synchronise the new ones between "
                "processes; wrap its module anew",
                stacklevel=core_memory.outside(),
            )
        executor = self._executor.anew(network=network)
        for k, parameter in enumerate(new):
            if optimizer is not None:
                exchange_parameter(optimizer, self.cores[k], parameter, _of(move, k))
            self.cores[k] = parameter
        self._executor, self.variance = executor, variance
        self.__dict__["rank"] = {bond: network.sizes[bond] for bond in self.rank}


def _of(move: Move | None, k: int) -> Callable[[Tensor, bool], Tensor] | None:
    return None if move is None else lambda value, squares: move(k, value, squares)


def _check_share(name: str, value: Any, *, zero: bool) -> None:
    """Raise unless a value is a share: zero or one, as stated, is the only end that is accepted."""
    accepted = "[0, 1)" if zero else "(0, 1]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be a number in {accepted}")
    if not 0 <= float(value) <= 1 or value == (1 if zero else 0):
        raise ValueError(f"{name} is {value!r}; it must be in {accepted}")
