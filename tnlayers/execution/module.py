"""Base of all layers that run by plan: the forward, its settings, FLOPs and explanation."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from tnlayers import validate
from tnlayers.backend.input_checks import check_bias, check_dtypes, check_tensor
from tnlayers.backend.rate_tables import table_of
from tnlayers.backend.torch_state import sizes
from tnlayers.execution.attributes import check_geometry, fixed
from tnlayers.execution.executor import LayerExecutor
from tnlayers.execution.rank_dropout import thinned
from tnlayers.planning.setting import Setting
from tnlayers.spec.geometry import Geometry
from tnlayers.spec.network import TensorNetwork
from tnlayers.spec.notation import KERNEL_AXES


class ExecutableModule(nn.Module):
    """A module with cores, a bias, and an executor for them."""

    cores: nn.ParameterList
    bias: nn.Parameter | None
    executor_type: ClassVar[type[LayerExecutor]] = LayerExecutor
    """How the layer runs: by plans of products, or of lookups."""
    rank: Mapping[str, int]
    _executor: LayerExecutor

    network: TensorNetwork = fixed("network", lambda layer: layer._executor.network)

    @property
    def dense_params(self) -> int:
        """Number of entries of the dense kernel."""
        return self.network.dense_params

    @property
    def geometry(self) -> Geometry:
        """The validated arguments of the convolution or linear map. Setting it drops the cached plans."""
        return self._executor.geometry

    @geometry.setter
    def geometry(self, geometry: Geometry) -> None:
        check_geometry(self, geometry)
        self._executor = self._executor.anew(geometry=geometry)

    @property
    def strategy(self) -> str:
        """'auto', 'reconstruct', 'factorized' or an order such as '0 > 1*2'. Setting it drops the cached plans."""
        return self._executor.strategy

    @strategy.setter
    def strategy(self, strategy: str) -> None:
        self._executor = self._executor.anew(strategy=strategy)

    @property
    def memory(self) -> str:
        """'auto' or 'low'. Setting it drops the cached plans."""
        return self._executor.memory

    @memory.setter
    def memory(self, memory: str) -> None:
        self._executor = self._executor.anew(memory=memory)

    @property
    def frozen(self) -> bool:
        """Whether inference caches the contracted weights, see ``tnlayers.freeze_``. Read-only."""
        return self._executor.frozen

    @frozen.setter
    def frozen(self, value: object) -> None:
        raise AttributeError(
            f"frozen cannot be set to {value!r}; call tnlayers.freeze_(layer) or tnlayers.thaw_(layer)"
        )

    @property
    def rank_dropout(self) -> float:
        """Probability that training drops an entry of a bond, see ``tnlayers.rank_dropout_``; 0 at first."""
        return self._executor.rank_dropout

    @rank_dropout.setter
    def rank_dropout(self, p: float) -> None:
        self._executor.rank_dropout = validate.fraction("rank_dropout", p)

    def flops(self, input_shape: Sequence[int]) -> int:
        """Return the FLOPs of one forward on an input of this shape: two per multiply-add, without bias.

        In training mode, the forward records gradients. In eval mode it does not, and a frozen layer's weights are
        cached. The input is contiguous: a channels-last input may get another plan.
        """
        return self._executor.plan(self._setting(input_shape)).flops

    def explain(self, input_shape: Sequence[int]) -> str:
        """Return a table of the plan for an input shape: steps, FLOPs, bytes, shares of the time, and the runner-up.

        In training mode the plan is for a forward and backward, in eval mode for inference. The last line names the
        rate table that times were estimated with, and says whether it was measured; and when the order was tuned, if
        ``tnlayers.autotune`` kept it. The text is a string, which notebooks show as a table.

        Example:
            >>> import tnlayers
            >>> layer = tnlayers.TuckerConv2d(64, 64, 3, padding=1, rank=16)
            >>> print(layer.explain((32, 64, 32, 32)))  # doctest: +ELLIPSIS
            factorized plan of 'i ri, ri ro h w, ro o' for input (32, 64, 32, 32), training: 285,212,672 FLOPs
              step                                                          FLOPs        bytes  time
              matmul x[i:64] with ri:16 i:64                           67,108,864   10,489,856   ...%
              conv x[ri:16] with ro:16 ri:16 h:3 w:3                  150,994,944    4,203,520   ...%
              matmul x[ro:16] with o:64 ro:16                          67,108,864   10,489,856   ...%
            runner-up: factorized, 0 > 1 > 2 (matmul first last, conv ...
            rates: cpu ...
        """
        setting = self._setting(input_shape)
        chosen = self._executor.plan(setting)
        others = (plan for plan in self._executor.candidates(setting) if plan.steps != chosen.steps)
        table = table_of(setting.device, str(setting.dtype).removeprefix("torch."))
        choice = self._executor.tuned(setting)
        tuned = choice.date if choice and choice.order == chosen.order else ""
        return chosen.explain(next(others, None), str(table), tuned)

    def _setting(self, input_shape: Sequence[int]) -> Setting:
        batch, _, *size = self._batched(_counts(input_shape))
        core, mode = self.cores[0], "train" if self.training else "cached" if self._executor.keeps else "infer"
        return Setting(max(1, batch), tuple(size), mode=mode, device=core.device.type, dtype=core.dtype)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as ``nn.Module.train`` does. Training mode thaws a frozen layer."""
        if mode:
            self._executor.thaw()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._executor.forget()

        def flat(tensor: Tensor) -> Any:
            # A memory format applies to images and kernels. Cores are neither, even with four or five axes.
            if tensor.dim() < 4 or not tensor.is_contiguous() or hasattr(tensor, "device_mesh"):
                return fn(tensor)
            return fn(tensor.flatten()).reshape(tensor.shape)

        super()._apply(flat, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._executor.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _batched(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape with a batch axis. Raise ValueError if ``forward`` cannot take it."""
        ndim, channels = self.geometry.ndim, self.geometry.in_channels
        if len(shape) not in (ndim + 1, ndim + 2):
            inner = ", ".join((str(channels), *KERNEL_AXES[-ndim:]))
            raise ValueError(
                f"input has shape {tuple(shape)}; {type(self).__name__} takes (N, {inner}), or ({inner}) unbatched"
            )
        if shape[-ndim - 1] != channels:
            raise ValueError(
                f"input has shape {tuple(shape)}, so {shape[-ndim - 1]} channels; in_channels is {channels}"
            )
        return tuple(shape) if len(shape) == ndim + 2 else (1, *shape)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            input: shape ``(batch, in_channels, *spatial)``, or ``(in_channels, *spatial)`` unbatched; for a linear
                layer ``(*, in_features)``.

        Returns:
            Tensor: shape ``(batch, out_channels, *spatial')``, or without batch; for a linear layer
                ``(*, out_features)``.

        Raises:
            ValueError: the number of dimensions or channels is wrong.
        """
        return self._run(input)

    def _run(self, input: Tensor, output_padding: tuple[int, ...] | None = None) -> Tensor:
        """Compute ``forward``, with the given output padding in place of the geometry's."""
        if type(input) is not Tensor or input.is_nested:
            check_tensor(type(self).__name__, input)
            if input.is_nested:
                return self._nested(input)
        executor, shape = self._executor, sizes(input)
        batched = len(shape) == executor.dim and shape[1] == executor.channels
        x = input if batched else input.reshape(self._batched(shape))
        # Iterating over a ParameterList is slow: it looks up every name. Parametrized or pruned cores are not in it.
        held = self._modules["cores"]._parameters  # type: ignore[union-attr]
        cores: list[Any] = [*held.values()] if tuple(held) == executor.names else self._listed()
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias  # noqa: SIM401  (slow self.bias)
        if bias is not None and sizes(bias) != (executor.geometry.out_channels,):
            check_bias(bias, executor.geometry.out_channels)
        if self.training and executor.rank_dropout:
            cores = self._thinned(cores)
        dtype = cores[0].dtype  # all cores have this dtype, see build
        if x.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
            check_dtypes(x, dtype, bias)
        y = executor(x, cores, bias, self.training, output_padding)
        return y if batched or len(shape) == executor.dim else self._unbatched(y, shape)

    def _thinned(self, cores: list[Tensor]) -> list[Tensor]:
        """Return the cores that a forward uses: in training without the bond entries that dropout drops."""
        p = self.rank_dropout
        return thinned(self._executor.network, self.rank, cores, p) if p and self.training else cores

    def _nested(self, input: Tensor) -> Tensor:
        """Raise TypeError for a nested tensor."""
        raise TypeError(
            f"input is a nested tensor; {type(self).__name__} takes a torch.Tensor of one size, as torch's "
            "convolutions do: call it on each of input.unbind()"
        )

    def _listed(self) -> list[Any]:
        """Return the cores as a list, with parametrizations applied."""
        return [core for core in self.cores]  # noqa: C416  (torch 2.8 and 2.11 cannot compile a star)

    def _unbatched(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the output without the batch axis that ``_batched`` added to this input shape."""
        return y.squeeze(0)


def _counts(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"input_shape is {shape!r}; it must be a sequence of integers, the shape of an input")
    return tuple(validate.integer(f"input_shape[{k}]", size, minimum=0) for k, size in enumerate(shape))
