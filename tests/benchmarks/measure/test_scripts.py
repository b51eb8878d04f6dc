"""Every script refuses first what it could not do at the end."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def scripts():
    """Names of all scripts that write rows where --out says."""
    paths = sorted((ROOT / "benchmarks" / "measure").glob("*.py"))
    return [path.stem for path in paths if re.search(r'"--out"|    out: Path', path.read_text())]


@pytest.mark.parametrize("script", scripts())
def test_every_script_refuses_before_it_measures_what_it_could_not_write(script, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.measure.{script}")
    needed = {
        "convergence": ("--config", "configs/convergence-digits.yaml"),
        "results": ("--config", "configs/results-smoke.yaml"),
        "compress": ("--weights", "resnet20-12fca82f.th"),
        "encoder": ("--model", "all-minilm-l6-v2"),
    }
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [script, "--out", str(tmp_path), *needed.get(script, ())])
    for name in ("write_csv", "measure", "cached_load", "layers", "measure_all"):  # nothing is begun
        monkeypatch.setattr(module, name, None, raising=False)
    with pytest.raises(SystemExit) as told:
        module.main()
    text = " ".join(f"{told.value.code} {capsys.readouterr().err}".split())
    assert f"out is {tmp_path}, but {tmp_path} cannot be written: it is there, and no regular file" in text
