"""Unambiguous YAML: YAML 1.2's core schema, unique keys, no aliases, limited size.

PyYAML reads YAML 1.1, in which ``1e-1`` is text, ``010`` is eight, ``on`` is true, ``1:30`` is ninety, and of two equal
keys the last one counts. Nested aliases can expand to more text than any memory holds.
"""

import os
import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

LONGEST = 2**18
"""Maximum characters of a text: one line for each of five thousand layers, read in some ten seconds."""
DEEPEST = 32
"""Maximum nesting depth of lists and mappings."""
_DIGITS = 64
"""Maximum characters of a number."""

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
}
"""The core schema (yaml.org/spec/1.2.2, 10.3.2): pattern and first characters of each type's words."""
_WORDS = {kind: re.compile(rf"(?:{form})\Z") for kind, (form, _) in _CORE.items()}


class _Loader(yaml.SafeLoader):
    """Loader of the core schema. Everything else raises an error with its line."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (as the stubs have it)
    yaml_constructors: ClassVar[dict[Any, Any]] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if name := getattr(event, "anchor", None):
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise _at(event, f"{sign}{name} is an anchor or an alias, which are not read; write the value out")
        if self.depth > DEEPEST:
            raise _at(event, f"lists and mappings are more than {DEEPEST} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def word(self, node: Any) -> Any:
        """Return a value of the tag's type. A missing tag is inferred from the text."""
        text: str = self.construct_scalar(node)
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return text
        if not _WORDS[kind].match(text):
            raise _at(node, f"{text!r} is no {kind}")
        if len(text) > _DIGITS:
            raise _at(node, f"{text[:_DIGITS]}... is no number that could be meant")
        if kind == "int" and re.match(r"[-+]?0[0-9]", text):
            raise _at(node, f"{text} is octal in YAML 1.1 and decimal in 1.2; drop the zero, write 0o, or quote it")
        if kind == "int":
            return int(text, 0)
        if kind == "float":  # Python writes .inf and .nan without the point
            return float(text.replace(".", "") if text[-1] in "fFnN" else text)
        return text.lower() == "true" if kind == "bool" else None

    def sequence(self, node: Any) -> list[Any]:
        """Return a list."""
        return self.construct_sequence(node, deep=True)

    def mapping(self, node: Any) -> dict[Hashable, Any]:
        """Return a mapping; raise on duplicate keys."""
        if not isinstance(node, yaml.MappingNode):
            raise _at(node, "this is no mapping, as its tag says")
        lines: dict[Hashable, int] = {}
        found: dict[Hashable, Any] = {}
        for left, right in node.value:
            key: Any = self.construct_object(left, deep=True)
            if not isinstance(key, Hashable):
                raise _at(left, f"the key is {key!r}; it must be text, a number or a boolean")
            if key in found:
                raise _at(left, f"the key {key!r} is there twice, first in line {lines[key]}")
            lines[key] = left.start_mark.line + 1
            found[key] = self.construct_object(right, deep=True)
        return found

    def unknown(self, node: Any) -> Any:
        """Raise on any other tag."""
        raise _at(node, f"the tag {node.tag.replace(_TAG, '!!')} is not read")


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which either version of YAML would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, (_, _first) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, _WORDS[_kind], _first)
    _Loader.add_constructor(_TAG + _kind, _Loader.word)
_Loader.add_constructor(_TAG + "str", _Loader.word)
_Loader.add_constructor(_TAG + "seq", _Loader.sequence)
_Loader.add_constructor(_TAG + "map", _Loader.mapping)
_Loader.add_constructor(None, _Loader.unknown)


def _at(place: Any, sentence: str) -> ValueError:
    return ValueError(f"line {place.start_mark.line + 1}: {sentence}")


def load_yaml(text: str) -> Any:
    r"""Read YAML 1.2 text with the core schema.

    ``1e-1`` is a number, and ``yes``, ``on``, ``1_000``, ``1:30`` and ``2001-01-01`` are text.

    Args:
        text: one document.

    Returns:
        Any: mappings, lists, text, numbers, booleans and None.

    Raises:
        TypeError: ``text`` is no text.
        ValueError: it is not YAML, or longer than ``LONGEST``; or, with its line: a duplicate key, an anchor or
            alias, a number with a leading zero, which the versions read differently, a tag of another type than
            these, or lists and mappings nested deeper than ``DEEPEST``.

    Example:
        >>> load_yaml("{rank: 1e-1, on: [0o10, yes, null]}")
        {'rank': 0.1, 'on': [8, 'yes', None]}
        >>> load_yaml("rank: 3\nrank: 4")
        Traceback (most recent call last):
            ...
        ValueError: line 2: the key 'rank' is there twice, first in line 1
    """
    if not isinstance(text, str):
        raise TypeError(f"text is of type {type(text).__name__}; it must be text")
    if len(text) > LONGEST:
        raise ValueError(f"it has more than {LONGEST:,} characters, the most that are read")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file as ``load_yaml`` does.

    Raises:
        OSError: the file does not exist or cannot be read.
        TypeError: ``path`` is no name of a file.
        ValueError: ``path`` is YAML text; or as for ``load_yaml``, with the file's name.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is {path!r}; it must be the name of a file")
    name = os.fsdecode(path)
    try:
        with open(name, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not YAML: {error}") from None
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        if "\n" in name or ": " in name:
            count = len(name.splitlines())
            raise ValueError(
                f"path is text of {count} line{'s' * (count > 1)}, not the name of a file; YAML text is read by "
                "TensorizeConfig.from_dict(tnlayers.tensorize.yaml_text.load_yaml(text))"
            ) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise type(error)(f"{name} cannot be read: {reason}") from None
    try:
        return load_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def dump_yaml(plain: Any) -> str:
    """Write YAML that ``load_yaml`` and YAML 1.1 readers read as the same value.

    Example:
        >>> print(dump_yaml({"on": ["1e-1", 0.1, "010"]}), end="")
        'on':
        - '1e-1'
        - 0.1
        - '010'
    """
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False)
