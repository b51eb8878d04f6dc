"""Check that each pattern of a configuration covers a layer."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches

from tnlayers.backend.name_patterns import matches
from tnlayers.tensorize.config import TensorizeConfig


def check_patterns(
    config: TensorizeConfig, layers: Sequence[Sequence[str]], weights: Callable[[], Sequence[Sequence[str]]] = tuple
) -> None:
    """Raise if a pattern covers no layer, and say what it names instead.

    Args:
        config: the configuration.
        layers: each layer's names, and those of weights that are looked at.
        weights: returns the names of further weights that ``parametrize`` would add.
    """
    for field_name in ("include", "exclude", "overrides"):
        for entry in getattr(config, field_name):
            pattern = entry if isinstance(entry, str) else entry[0]
            if not any(matches(pattern, names) for names in layers):
                raise ValueError(
                    f"{field_name} has the pattern {pattern!r}, which covers no layer that can be replaced; "
                    f"{_instead(pattern, [name for names in layers for name in names], weights())}"
                )


def _instead(pattern: str, names: Sequence[str], weights: Sequence[Sequence[str]]) -> str:
    """Return what a pattern that covers no layer may have meant."""
    if around := next((name for name in names if pattern.startswith(f"{name}.")), ""):
        return f"{around} is one layer, and patterns cover it as a whole"
    if any(matches(pattern, each) for each in weights):
        return "it matches weights that no layer covers (parametrize=True looks at them)"
    paths = dict.fromkeys(".".join(n.split(".")[:k]) for n in names for k in range(n.count(".") + 1, 0, -1))
    near = get_close_matches(pattern.removeprefix("re:").strip("*."), paths, n=3, cutoff=0.5) or names[:3]
    return f"near names: {', '.join(near)}"
