"""YAML that means what it says: every text below is read as written here, or refused with its line."""

import math
from pathlib import Path

import pytest
import yaml

from tnlayers import TensorizeConfig
from tnlayers.tensorize import yaml_text
from tnlayers.tensorize.yaml_text import dump_yaml, load_yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-1", 0.1),
        ("1E5", 1e5),
        ("-.5e+3", -500.0),
        ("3.", 3.0),
        ("-12", -12),
        ("0", 0),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("yes", "yes"),
        ("off", "off"),
        ("y", "y"),
        ("'010'", "010"),
        ("TRUE", True),
        ("tRUE", "tRUE"),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("inf", "inf"),
        ("<<", "<<"),
        ("=", "="),
        ("!!float 1", 1.0),
        ("!!str 1", "1"),
    ],
)
def test_words_are_those_of_yaml_1_2(text, value):
    found = load_yaml(f"[{text}]" if text else "- ")
    assert found == [value]
    assert type(found[0]) is type(value)
    assert math.isnan(load_yaml(".NaN"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice, first in line 1"),
        ('a: 1\n"a": 2', "line 2: the key 'a' is there twice"),
        ("a: {b: 1,\n b: 2}", "line 2: the key 'b' is there twice, first in line 1"),
        ("1: a\ntrue: b", "line 2: the key True is there twice"),  # one key to Python
        ("a: 1\nb: &x [1]\nc: *x", "line 2: &x is an anchor or an alias"),
        ("a: *x", r"line 1: \*x is an anchor or an alias"),
        ("&a [*a]", "line 1: &a is an anchor or an alias"),
        ("a:\n  - 010", "line 2: 010 is octal in YAML 1.1 and decimal in 1.2"),
        ("-00", "line 1: -00 is octal in YAML 1.1"),
        ("9" * 5000, "line 1: 9{64}... is no number"),
        ("? [1, 2]\n: b", r"line 1: the key is \[1, 2\]; it must be"),
        ("!!python/object/apply:os.getcwd []", "line 1: the tag !!python/object/apply:os.getcwd is not read"),
        ("!!set {a}", "line 1: the tag !!set is not read"),
        ("!!int abc", "line 1: 'abc' is no int"),
        ("!!bool yes", "line 1: 'yes' is no bool"),
        ("!!map [1]", "line 1: this is no mapping"),
        ("!!seq {a: 1}", "it is not YAML: "),
        ("[", "it is not YAML: "),
        ("a: 1\n---\nb: 2", "it is not YAML: expected a single document"),
        ("[" * 1000 + "]" * 1000, "line 1: lists and mappings are more than 32 deep"),
        ("- " * 1000 + "a", "line 1: lists and mappings are more than 32 deep"),
    ],
)
def test_all_else_is_refused(text, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        load_yaml(text)


def test_long_text_is_refused_before_it_is_parsed(monkeypatch, tmp_path):
    monkeypatch.setattr(yaml_text, "LONGEST", 20)
    assert load_yaml("a: " + 17 * "b") == {"a": 17 * "b"}
    with pytest.raises(ValueError, match="it has more than 20 characters"):
        load_yaml("[" * 21)
    (tmp_path / "long.yaml").write_text("[" * 10_000)
    with pytest.raises(ValueError, match=r"long\.yaml: it has more than 20 characters"):
        TensorizeConfig.from_yaml(tmp_path / "long.yaml")
    with pytest.raises(TypeError, match="text is of type bytes"):
        load_yaml(b"a: 1")


@pytest.mark.parametrize(
    "value",
    ["on", "010", "1e-1", "1_000", "1:30", "2001-01-01", "=", "<<", "null", "~", "0o7", ".nan", "", "a: b", "*x", "1.",
     "a\nb", " a ", 1e-5, 1e300, -3, True, None, math.inf, [], {}],
)  # fmt: skip
def test_what_is_written_is_read_as_the_same_by_both_versions(value):
    plain = {"a": [value, value], str(value): {"b": value}}
    assert load_yaml(dump_yaml(plain)) == plain
    assert yaml.safe_load(dump_yaml(plain)) == plain
    one = [value]
    assert load_yaml(dump_yaml([one, one])) == [one, one]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_shipped_files_are_the_same_in_both_versions(path):
    assert load_yaml(path.read_text()) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("format: [", ValueError, r"config\.yaml: it is not YAML"),
        ("rank: 3\nrank: 4", ValueError, r"config\.yaml: line 2: the key 'rank' is there twice"),
        ("options: {a: &a [1], b: [*a, *a]}", ValueError, r"config\.yaml: line 1: &a is an anchor"),
        ("rank: 010", ValueError, r"config\.yaml: line 1: 010 is octal"),
        ("rank: .nan", ValueError, "rank is nan; it must be a share"),
        ("rank: 1_000", TypeError, "rank is '1_000'; it must be an integer"),
        ("decompose: no", TypeError, "decompose is 'no'; it must be True or False"),
        ("- rank", TypeError, "config is .*; it must be a mapping"),
        ("", TypeError, "config is None; it must be a mapping"),
        (b"\xff\xfe\xff", ValueError, r"config\.yaml is not YAML: "),
    ],
)
def test_a_bad_file_is_named(text, kind, sentence, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(kind, match=sentence):
        TensorizeConfig.from_yaml(path)


def test_a_configuration_by_hand(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("\ufeffformat: tucker\nrank: 1e-1\noverrides: {on: {rank: 4}, off: null}\n", encoding="utf-8")
    config = TensorizeConfig.from_yaml(path)
    assert config == TensorizeConfig("tucker", rank=0.1, overrides={"on": {"rank": 4}, "off": None})
    config.to_yaml(path)
    assert TensorizeConfig.from_yaml(path) == config


@pytest.mark.parametrize(
    ("path", "kind", "sentence"),
    [
        ("format: tr\nrank: 0.1", ValueError, r"path is text of 2 lines, not the name of a file; .*load_yaml\(text\)"),
        ("format: tr", ValueError, "path is text of 1 line, not the name of a file"),
        (str(Path(__file__).parent), IsADirectoryError, "cannot be read: Is a directory"),
        ("none.yaml", FileNotFoundError, r"none\.yaml cannot be read: No such file"),
        ("a\0b", ValueError, "cannot be read: embedded null"),
        (0, TypeError, "path is 0; it must be the name of a file"),
        (None, TypeError, "path is None; it must be the name of a file"),
        (b"config.yaml", TypeError, r"path is b'config\.yaml'; it must be the name of a file"),
    ],
)
def test_what_is_no_file(path, kind, sentence):
    with pytest.raises(kind, match=sentence):
        TensorizeConfig.from_yaml(path)
