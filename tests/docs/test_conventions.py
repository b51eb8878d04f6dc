"""What a published project promises: metadata that agree, and files for the forge that name what is there."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import tnlayers

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FORGE = sorted(path for path in (ROOT / ".github").rglob("*") if path.is_file())
WORKFLOWS = [path for path in FORGE if path.parent.name == "workflows"]
FORMS = [path for path in FORGE if path.parent.name == "ISSUE_TEMPLATE" and path.stem != "config"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
EXTRAS = set(PROJECT["project"]["optional-dependencies"])
SECTIONS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
PROSE = [ROOT / name for name in ("CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "GOVERNANCE.md", "SECURITY.md")]
GENERATED = {"docs/_build", "docs/tutorials"}


def test_the_guide_names_the_order_of_the_folders():
    """As the contract in pyproject.toml has it."""
    contract = next(each for each in PROJECT["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    order = [re.split(r" *\| *", level) for level in contract["layers"]]
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"(?:^    .*\n)+(?=\n`pyproject.toml` states)", guide, re.MULTILINE)[0]
    assert [re.split(r",\s*", level.strip()) for level in block.split(">")] == order


def content(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


TESTED = content(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]


def commands(path):
    """Return what a workflow runs in a shell, with what its matrices put in."""
    found = []
    for job in content(path)["jobs"].values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [])
        found += [row["run"] for row in rows]
        found += [step["run"] for step in job.get("steps", ()) if "run" in step]
    return found


def pages():
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]


def generated(path):
    return any(path.relative_to(ROOT).is_relative_to(folder) for folder in GENERATED)


def test_versions_agree():
    citation = content(ROOT / "CITATION.cff")
    assert citation["version"] == tnlayers.__version__
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "tnlayers/_version.py"
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert tnlayers.__version__ in re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[:2]


def test_the_changelog_has_the_five_sections_in_order():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for release in text.split("\n## ")[1:]:
        sections = re.findall(r"^### (\w+)$", release, re.MULTILINE)
        order = [
            name for name in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security") if name in sections
        ]
        assert sections == order != []


def test_the_citation_agrees_with_the_project():
    citation, project = content(ROOT / "CITATION.cff"), PROJECT["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == project["license"] == "BSD-3-Clause"
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert citation["repository-code"] == project["urls"]["Repository"]
    assert citation["keywords"] == project["keywords"]
    assert project["license-files"] == ["LICENSE"]
    assert not [name for name in project["classifiers"] if name.startswith("License")]


def test_classifiers_begin_with_the_oldest_python():
    prefix = "Programming Language :: Python :: 3."
    minors = [int(name.removeprefix(prefix)) for name in PROJECT["project"]["classifiers"] if name.startswith(prefix)]
    assert f">=3.{min(minors)}" == PROJECT["project"]["requires-python"]
    tested = {row["python"] for row in TESTED["include"]}
    assert {f"3.{min(minors)}", f"3.{max(minors)}"} <= tested


@pytest.mark.parametrize("path", [path for path in FORGE if path.suffix == ".yml"], ids=lambda path: path.name)
def test_yaml_is_read(path):
    assert isinstance(content(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_there(path):
    found = commands(path)
    assert found
    for command in found:
        for target in re.findall(r"\bmake ([a-z-]+)", command):
            assert target in TARGETS
        for script in re.findall(r"(?:^|\s)(\.ci/\S+)", command):
            assert (ROOT / script).stat().st_mode & 0o100
    jobs = content(path)["jobs"]
    for job in jobs.values():
        needed = job.get("needs", [])
        assert set([needed] if isinstance(needed, str) else needed) <= set(jobs)
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()


def test_two_minors_of_torch_are_tested():
    minors = set()
    for row in TESTED["include"]:
        pins = (ROOT / row["constraints"]).read_text(encoding="utf-8")
        minors.add(re.search(r"^torch==(\d+\.\d+)", pins, re.MULTILINE)[1])
    assert len(minors) == 2


def test_the_site_that_is_deployed_is_what_make_docs_writes():
    steps = content(ROOT / ".github/workflows/docs.yml")["jobs"]["build"]["steps"]
    assert steps[-1]["with"]["path"].split("/html")[0] in GENERATED


def test_only_the_job_that_publishes_may_identify_itself():
    jobs = content(ROOT / ".github/workflows/publish.yml")["jobs"]
    assert [name for name, job in jobs.items() if job.get("permissions", {}).get("id-token")] == ["publish"]
    assert "test" in jobs["publish"]["needs"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_have_the_fields_of_forms(path):
    form = content(path)
    assert {"name", "description", "body"} <= form.keys()
    names = [field["id"] for field in form["body"]]
    assert len(names) == len(set(names)) > 0
    assert all(field["attributes"]["label"] for field in form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_files_named_in_the_forge_exist():
    for path in [*FORGE, *PROSE]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"\b([A-Z_]{5,}\.(?:md|cff))\b", text):
            assert (ROOT / name).is_file() or (ROOT / ".github" / name).is_file(), f"{path.name} names {name}"


def test_pre_commit_has_the_linters_of_make_lint():
    repositories = content(ROOT / ".pre-commit-config.yaml")["repos"]
    ruff = next(entry for entry in repositories if entry["repo"].endswith("ruff-pre-commit"))
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in pins.splitlines()
    hooks = {hook["id"] for entry in repositories for hook in entry["hooks"]}
    assert hooks == {"ruff-check", "ruff-format", "mypy", "lint-imports"}


def test_the_source_distribution_has_every_file():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, to know the project's files")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    target = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]
    included = {name.strip("/") for name in target["include"]}
    assert included | {".gitignore", "pyproject.toml"} == {name.split("/")[0] for name in listed}
    assert {name.strip("/") for name in target["exclude"]} == GENERATED


def test_the_wheel_has_types_and_data():
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["tnlayers"]
    assert (ROOT / "tnlayers" / "py.typed").is_file()
    assert len([*(ROOT / "tnlayers" / "backend" / "rates").glob("*.csv")]) >= 3


def test_extras_that_pages_and_messages_name_exist():
    found = set()
    sources = [path for path in [*pages(), *(ROOT / "tnlayers").rglob("*.py")] if not generated(path)]
    for path in sources:
        for names in re.findall(r"(?:tnlayers|'\.|\"\.)\[([a-z, ]+)\]'?\"?", path.read_text(encoding="utf-8")):
            found |= {name.strip() for name in names.split(",")}
    assert found
    assert found <= EXTRAS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for names in re.findall(r"EXTRAS \??= ?([a-z,]+)|EXTRAS=([a-z,]+)", makefile):
        assert set("".join(names).split(",")) <= EXTRAS
