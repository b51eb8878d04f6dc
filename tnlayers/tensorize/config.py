"""Configuration of a swap: a frozen dataclass, also as a dictionary or YAML."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any, Self

from tnlayers import validate
from tnlayers.backend.name_patterns import check_pattern, matches
from tnlayers.fitting.cuts import RULES
from tnlayers.formats import FORMATS
from tnlayers.init.like import LIKE
from tnlayers.init.variance import Init
from tnlayers.planning.setting import MEMORY
from tnlayers.spec.rank import Rank
from tnlayers.spec.recurrence import names_weight
from tnlayers.tensorize.swappable import DEFAULT_GROUPS, groups

VERSION = 1
OVERRIDABLE = ("format", "options", "rank", "in_shape", "out_shape", "init", "decompose", "strategy", "memory")


@dataclass(frozen=True)
class TensorizeConfig:
    """Choice of the layers of a model that become tensor layers, and of their form.

    A pattern is a qualified name, a glob (``*`` also matches dots), or ``re:`` and a regular expression for the whole
    name. A pattern that matches a module covers every layer inside it.

    Args:
        format: the name of a registered format.
        rank: the ``rank`` argument of every layer; a float is a keep ratio; ``"vbmf"``: the ranks that variational
            Bayes finds in the unfoldings of each kernel, which needs ``decompose``. Recurrent layers take mappings from
            their weights. None: the layers' default, but a layer whose smallest network saves nothing stays plain.
            Excludes budget and energy.
        budget: ``{"params": share}`` or ``{"flops": share}`` of the chosen layers' dense kernels together, in (0, 1];
            layers with a rank from an override do not count.
            With ``decompose`` it is distributed by each kernel's singular values, else all get one keep ratio.
        energy: share of each unfolding's squared singular values that the ranks must keep, in (0, 1]; needs
            ``decompose``.
        options: the format's own arguments, such as ``{"layout": "chain"}``.
        include: patterns of the layers to swap.
        exclude: patterns of layers that stay plain; they override ``include``.
        min_params: layers whose kernels have fewer entries stay plain.
        overrides: maps a pattern to other settings for its layers (``format``, ``options``, ``rank``, ``in_shape``,
            ``out_shape``, ``init``, ``decompose``, ``strategy``, ``memory``), or to None: they stay plain. The first
            pattern that matches a layer counts. A mapping, or a sequence of pairs.
        depthwise: also swap convolutions with one channel per group. They have few parameters and stay plain by
            default; 1x1 convolutions and linear layers, which mostly have many, are swapped.
        subclasses: also swap subclasses of torch's layers, which lose their own forward.
        kinds: which layers: 'conv' (convolutions and transposed ones), 'linear', 'embedding' (also bags), 'recurrent'.
            An embedding and the linear layers with its weight are swapped together, or stay together.
        parametrize: also make networks of weights that no layer covers, as ``parametrize_`` does: parameters with two
            axes or more, such as the joint projection of ``nn.MultiheadAttention``, experts held as one parameter, and
            the weights of subclasses of torch's layers. They save parameters, not time. Patterns cover them by their
            names.
        parametrized: what becomes of layers whose weight is computed by torch's parametrizations, such as
            ``weight_norm``: 'leave' them, or 'fold' the computed weight into the kernel and drop the parametrization.
        init: initialisation of cores that are not fitted. 'like': kernels are drawn with the root mean square of the
            weights that they replace (0.02 in BERT), so that a recipe for the plain model keeps its scale; needs
            ``decompose=False``. Layers whose weight is zero have no such scale and stay plain.
        decompose: fit the cores to the model's kernels. Use False for a model to be trained from scratch: fits of
            random kernels lose much of their variance, drawn cores have all of it.
        strategy, memory: arguments of the layers.

    Raises:
        TypeError, ValueError: a field is invalid; the message names it.

    Example:
        >>> config = TensorizeConfig("tucker", rank=0.5, exclude=["stem"], overrides={"head.*": None})
        >>> TensorizeConfig.from_dict(config.to_dict()) == config
        True
    """

    format: str = "tr"
    rank: Rank | str | None = None
    budget: Mapping[str, float] | None = None
    energy: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    min_params: int = 0
    overrides: Any = ()
    depthwise: bool = False
    subclasses: bool = False
    kinds: Sequence[str] = DEFAULT_GROUPS
    parametrize: bool = False
    parametrized: str = "leave"
    init: str | Init | Mapping[str, Any] = "fan_in"
    decompose: bool = True
    strategy: str = "auto"
    memory: str = "auto"

    def __post_init__(self) -> None:
        validate.choice("format", self.format, FORMATS)
        object.__setattr__(self, "min_params", validate.integer("min_params", self.min_params, minimum=0))
        for name in ("depthwise", "subclasses", "parametrize", "decompose"):
            validate.boolean(name, getattr(self, name))
        validate.choice("parametrized", self.parametrized, ("leave", "fold"))
        object.__setattr__(self, "kinds", _kinds(self.kinds))
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        object.__setattr__(self, "options", _mapping("options", self.options))
        object.__setattr__(self, "overrides", _overrides(self.overrides))
        object.__setattr__(self, "init", _init(self.init))
        object.__setattr__(self, "rank", _rank("rank", self.rank))
        validate.choice("memory", self.memory, MEMORY)
        given = [name for name in ("rank", "budget", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; one of them chooses the ranks")
        if self.budget is not None:
            budget = _mapping("budget", self.budget)
            if list(budget) not in (["params"], ["flops"]):
                raise ValueError(f"budget is {dict(budget)!r}; it must be {{'params': share}} or {{'flops': share}}")
            object.__setattr__(self, "budget", {name: _share("budget", value) for name, value in budget.items()})
        if self.energy is not None:
            object.__setattr__(self, "energy", _share("energy", self.energy))
            if not self.decompose:
                raise ValueError("energy is given, but decompose is False: only kernels to be fitted have an energy")
        _check_like(self)
        if isinstance(self.rank, str) and not self.decompose:
            raise ValueError(f"rank is {self.rank!r}, but decompose is False: this rank is for kernels to be fitted")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, in JSON's and YAML's types, and the form's version."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        default = type(self)()
        return {"version": VERSION} | {
            name: _as_yaml(value) for name, value in values.items() if value != getattr(default, name)
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Make a configuration from the result of ``to_dict``.

        Raises:
            TypeError, ValueError: a key is unknown, the version is newer than this library's, or a field is invalid.
        """
        given = _mapping("config", plain)
        version = given.pop("version", VERSION)
        if validate.integer("version", version) > VERSION:
            raise ValueError(f"version is {version}; this library reads up to {VERSION}")
        _known("config", given, [each.name for each in fields(cls)])
        return cls(**given)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_dict`` as a YAML file."""
        from tnlayers.tensorize.yaml_text import dump_yaml  # noqa: PLC0415  (loaded only when used)

        Path(path).write_text(dump_yaml(self.to_dict()), encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a YAML 1.2 file, written by ``to_yaml`` or by hand; see ``tnlayers.tensorize.yaml_text``.

        Raises:
            OSError: the file cannot be read.
            TypeError, ValueError: ``path`` is no name of a file; the file is not YAML, or has a duplicate key, an
                alias, or a number that versions of YAML read differently; or as for ``from_dict``.
        """
        from tnlayers.tensorize.yaml_text import read_yaml  # noqa: PLC0415

        plain = read_yaml(path)
        try:
            return cls.from_dict(plain)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None

    def of(self, names: Iterable[str]) -> dict[str, Any] | None:
        """Return the settings of the layer with these names, including overrides; None if it stays plain."""
        here = {
            name: getattr(self, name)
            for name in ("format", "options", "rank", "init", "decompose", "strategy", "memory")
        }
        for pattern, changes in self.overrides:
            if matches(pattern, names):
                if changes is None:
                    return None
                # The options belong to the old format.
                return here | ({"options": {}} if "format" in changes else {}) | dict(changes)
        return here


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}; it must be a sequence of patterns, such as [{str(value)!r}]")
    return tuple(check_pattern(name, pattern) for pattern in value)


def _kinds(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"kinds is {value!r}; it must be a sequence, such as {list(DEFAULT_GROUPS)}")
    return tuple(validate.choice("kinds", kind, groups()) for kind in value)


def _overrides(value: Any) -> tuple[tuple[str, Mapping[str, Any] | None], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        pairs = [(pattern, changes) for pattern, changes in pairs]
    except (TypeError, ValueError):
        raise TypeError(f"overrides is {value!r}; it must map patterns to mappings or None") from None
    return tuple(
        (check_pattern("overrides", key), None if changes is None else _changes(key, changes)) for key, changes in pairs
    )


def _changes(pattern: str, value: Any) -> dict[str, Any]:
    name = f"overrides[{pattern!r}]"
    changes = _mapping(name, value)
    _known(name, changes, OVERRIDABLE)
    if "format" in changes:
        validate.choice(f"{name}: format", changes["format"], FORMATS)
    if "decompose" in changes:
        validate.boolean(f"{name}: decompose", changes["decompose"])
    if "options" in changes:
        changes["options"] = _mapping(f"{name}: options", changes["options"])
    if "init" in changes:
        changes["init"] = _init(changes["init"])
    if "rank" in changes:
        changes["rank"] = _rank(f"{name}: rank", changes["rank"])
    return {key: tuple(each) if isinstance(each, list) else each for key, each in changes.items()}


def _rank(name: str, value: Any) -> Any:
    """Convert a rank to Python's own numbers, as JSON and YAML need them."""
    if value is None:
        return None
    if isinstance(value, str) and value in RULES:
        return value
    if isinstance(value, Mapping):
        named = {key: (f"{name}[{key!r}]", each) for key, each in _mapping(name, value).items()}
        return {k: (_rank if names_weight(k) else validate.integer)(*each) for k, each in named.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(validate.integer(f"{name}[{k}]", size) for k, size in enumerate(value))
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return validate.integer(name, value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(
            f"{name} is {value!r}; it must be an integer, integers, a keep ratio in (0, 1], or {RULES[0]!r}"
        )
    return _share(name, float(value))


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} is {value!r}; it must be a mapping with text as keys")
    return dict(value)


def _known(name: str, given: Mapping[str, Any], accepted: Sequence[str]) -> None:
    for key in given:
        if key not in accepted:
            near = get_close_matches(key, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} has the key {key!r}{hint}; accepted: {', '.join(accepted)}")


def _init(value: Any) -> str | Init:
    if isinstance(value, str) and value == LIKE:
        return value
    if not isinstance(value, Mapping):
        return Init.of(value)
    given = _mapping("init", value)
    _known("init", given, [each.name for each in fields(Init)])
    if isinstance(given.get("input_size"), list):
        given["input_size"] = tuple(given["input_size"])
    return Init(**given)


def _check_like(config: TensorizeConfig) -> None:
    """Raise if an ``init`` of 'like' is given where nothing is drawn."""
    drawn, given = not config.decompose, {"init"} if config.init == LIKE else set()
    for pattern, changes in config.overrides:
        here: dict[str, Any] = {"init": None, "decompose": config.decompose} | dict(changes or {})
        drawn |= not here["decompose"] and here["init"] is None
        given |= {f"overrides[{pattern!r}]: init"} if here["init"] == LIKE and here["decompose"] else set()
    for name in given - ({"init"} if drawn else set()):
        raise ValueError(
            f"{name} is {LIKE!r}, but decompose is True: fitted kernels are not drawn; say decompose=False"
        )


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} is {value!r}; it must be a share in (0, 1]")
    return float(value)


def _as_yaml(value: Any) -> Any:
    """Convert a value to JSON's and YAML's types."""
    if isinstance(value, Init):
        return {key: _as_yaml(each) for key, each in asdict(value).items() if each != getattr(Init(), key)}
    if isinstance(value, Mapping):
        return {key: _as_yaml(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_as_yaml(each) for each in value]
    return value
