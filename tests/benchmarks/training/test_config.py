"""Presets: what they may hold, and what is told of wrong ones."""

from pathlib import Path

import pytest

from benchmarks.common.errors import ConfigError
from benchmarks.training.config import Config

ROOT = Path(__file__).parents[3]


PRESETS = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if path.parent.name != "compress" and not path.stem.startswith(("convergence-", "results", "start-"))
]
"""Those of other scripts have tests of their own."""


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_states_only_what_differs(path):
    preset, default = Config.from_yaml(path), Config()
    stated = [line.partition(":")[0] for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert [name for name in stated if getattr(preset, name) == getattr(default, name)] == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rate: 1", "has the key 'learning_rate', but only dataset, model, conv"),
        ("lr: fast", "lr is 'fast', but float is accepted"),
        ("lr: 1_000", "lr is '1_000', but float is accepted"),
        ("epochs: 010", "line 1: 010 is octal in YAML 1.1"),
        ("epochs: 3\nepochs: 4", "line 2: the key 'epochs' is there twice"),
        ("name: &a x\nconv: *a", "line 1: &a is an anchor or an alias"),
        ("epochs: 1.5", "epochs is 1.5, but int is accepted"),
        ("epochs: true", "epochs is True, but int is accepted"),
        ("augment: 1", "augment is 1, but bool is accepted"),
        ("dataset: mnist", r"dataset is 'mnist', but Literal\['digits', 'fashion-mnist', 'cifar10', 'image"),
        ("rank: [4, x]", r"rank is \[4, 'x'\], but int \| float \| tuple\[int, \.\.\.\] \| None is accepted"),
        ("epochs: 0", "epochs is 0, but it must be at least 1"),
        ("lr: .nan", "lr is nan, but it must be above 0"),
        ("rank: 3", "rank is 3, but dense convolutions have none"),
        ("rank_schedule: 0.1", "rank_schedule is 0.1, but dense convolutions have no ranks"),
        ("rank_schedule: 0.1\nconv: tr\nepochs: 1", "rank_schedule is 0.1, but one epoch would not train the last"),
        ("rank_schedule: 1.5\nconv: tr", r"rank_schedule is 1.5, but it must be in \(0, 1\]"),
        ("rank_schedule: 0.1\nconv: tr\nema: 0.9", "rank_schedule is 0.1, but ema, compile and shard need ranks"),
        ("distil: 0.5", "distil is 0.5, but there is no teacher"),
        ("distil: 2\nteacher: t.th", "distil is 2.0, but it must be from 0 to 1"),
        ("held_out: 0.1", "held_out is 0.1, but split test holds nothing out"),
        ("held_out: 1\nsplit: validation", "held_out is 1.0, but it must be above 0 and below 1"),
        ("decay: kernels\nconv: tr\nshard: true", "decay is kernels, but shard needs decay of cores"),
        ("pad: reflect\naugment: false", "pad is reflect, but augment is off, so no image is shifted"),
        ("pad: reflect\ndataset: image-folder", "pad is reflect, but large images are cropped, not shifted"),
        ("- epochs", r"holds \['epochs'\], but lines of the form"),
        ("", "holds None, but lines of the form"),
        ("epochs: [", "it is not YAML: "),
    ],
)
def test_a_wrong_preset_is_told(tmp_path, text, sentence):
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"preset\.yaml:? {sentence}"):
        Config.from_yaml(path)


def test_a_preset_can_hold_every_type(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("conv: tucker\nrank: [8, 8]\nlr: 1\nweight_decay: 5e-4\namp: true\nthreads: null\ndata_dir: here\n")
    assert Config.from_yaml(path) == Config(
        conv="tucker", rank=(8, 8), lr=1.0, weight_decay=5e-4, amp=True, threads=None, data_dir=Path("here")
    )
