"""Training every family from every initialisation: rows complete and kept, nothing run twice, an honest choice."""

from pathlib import Path

import pytest
import torch
import yaml

import tnlayers
from benchmarks.common.chosen import chosen
from benchmarks.common.provenance import provenance
from benchmarks.common.rows import read_csv
from benchmarks.measure import convergence
from benchmarks.measure.convergence import Grid, Plain, Trial, main
from benchmarks.report import start_tables
from benchmarks.report.markdown import ReportError
from tnlayers.models import dense_conv

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "convergence.csv"
TINY = {
    "networks": ["plain"],
    "families": ["dense", "tr"],
    "arms": ["default"],
    "lrs": [0.01, 0.02, 0.03],
    "seeds": [0, 1, 2],
    "epochs": 2,
    "batch_size": 16,
    "images": 32,
    "channels": 4,
    "rank": 2,
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A plain network that is not as deep."""
    monkeypatch.setattr(convergence, "DEPTH", 6)
    monkeypatch.setattr(convergence, "STRIDED", (2, 4))


@pytest.fixture
def measured(monkeypatch):
    """The keys of the runs that were measured, in order."""
    keys, measure = [], convergence.measure

    def watched(grid, data_dir, row):
        keys.append(convergence.identity(row, convergence.KEY))
        return measure(grid, data_dir, row)

    monkeypatch.setattr(convergence, "measure", watched)
    return keys


@pytest.fixture
def run(tmp_path):
    """Runs the script on a tiny grid, or one that differs from it, and returns the rows of its file."""

    def call(*arguments, **different):
        config, out = tmp_path / "grid.yaml", tmp_path / "convergence.csv"
        config.write_text(yaml.safe_dump(TINY | different))
        main([*map(str, ("--config", config, "--out", out, *arguments))])
        return read_csv(out)

    return call


def numbers(row):
    """What a run measured, but for the time it took."""
    return {name: value for name, value in row.items() if name not in ("seconds", *provenance())}


# --------------------------------------------------------------------------------------------------------------- rows


def test_every_run_is_a_row_and_every_row_is_complete(run, capsys):
    rows = run()
    keys = [convergence.identity(row, convergence.KEY) for row in rows]
    assert keys == [
        ("digits", "plain", family, arm, str(lr), str(seed))
        for family, arm in (("dense", "kaiming"), ("tr", "default"))
        for lr in TINY["lrs"]
        for seed in TINY["seeds"]
    ]
    for row in rows:
        assert tuple(row) == (*convergence.COLUMNS, *provenance())
        assert {name for name, value in row.items() if not value} <= {
            "rank", "channels", "ema", "evaluated", "steps_to", "note",
        }  # fmt: skip
        assert (row["steps"], row["diverged"]) == ("4", "False")
        assert (row["rank"], row["channels"]) == ("" if row["family"] == "dense" else "2", "4")
        assert (float(row["keep_ratio"]) == 1) == (row["family"] == "dense")
        assert all(0 <= float(row[f"accuracy_{images}"]) <= 1 for images in ("heldout", "test"))
    assert int(rows[0]["parameters"]) == 9 * 4 + 5 * 9 * 16 + 50
    assert len({row["loss_first"] for row in rows[:3]}) == 3  # a seed each, at one rate
    assert [row["loss_first"] for row in rows[:3]] == [row["loss_first"] for row in rows[3:6]]
    assert "18/18" in capsys.readouterr().out


def test_several_processes_find_the_same(run, tmp_path):
    settings = {"networks": ["resnet"], "families": ["dense"], "epochs": 1, "lrs": [0.01, 0.02], "seeds": [0, 1]}
    here = run(**settings)
    (tmp_path / "convergence.csv").unlink()
    there = run("--workers", 2, **settings)
    assert sorted(map(str, map(numbers, there))) == sorted(map(str, map(numbers, here)))


def test_what_was_run_is_not_run_again(run, measured):
    rows = run()
    assert len(measured) == len({*measured}) == len(rows) == 18
    assert run() == rows
    assert len(measured) == 18
    more = run(seeds=[0, 1, 2, 3])
    assert len(measured) == len(more) == 24
    assert [row for row in more if row["seed"] != "3"] == rows


def test_rows_of_other_settings_make_way_for_their_group_alone(run, measured):
    before = run()
    after = run("--only", "tr", lrs=[0.04, 0.05, 0.06], batch_size=32)
    assert len(measured) == 18 + 9
    assert after[:9] == before[:9]
    assert {(row["family"], row["lr"], row["batch_size"]) for row in after[9:]} == {
        ("tr", lr, "32") for lr in ("0.04", "0.05", "0.06")
    }
    assert len(run(rank=3)) == 18
    assert {key[2] for key in measured[27:]} == {"tr"}  # a dense network has no rank


def test_parts_of_a_grid_are_run_by_name(run, measured):
    grid = {"networks": ["plain", "resnet"], "families": ["dense", "tr", "tt"], "arms": ["default", "paper", "xavier"]}
    run("--only", "plain", "tt", "paper", "xavier", **grid)
    assert {key[1:4] for key in measured} == {("plain", "tt", "paper"), ("plain", "tt", "xavier")}


def test_an_interrupted_command_leaves_a_good_file_and_goes_on(run, measured, monkeypatch, tmp_path):
    watched = convergence.measure

    def interrupted(*arguments):
        if len(measured) == 2:
            raise KeyboardInterrupt
        return watched(*arguments)

    monkeypatch.setattr(convergence, "measure", interrupted)
    with pytest.raises(SystemExit, match=r"interrupted: what was done is in .*convergence\.csv; the same command goes"):
        run()
    assert len(read_csv(tmp_path / "convergence.csv")) == 2
    monkeypatch.setattr(convergence, "measure", watched)
    assert len(run()) == len(measured) == 18


def test_a_run_that_diverges_stops_and_the_others_go_on(run):
    rows = run(families=["tr"], lrs=[0.01, 0.02, 1e30])
    assert [row["diverged"] for row in rows] == ["False"] * 6 + ["True"] * 3
    for row in rows[6:]:
        assert row["note"] == f"the loss is nan in step {row['steps']}"
        assert int(row["steps"]) < 4
        assert row["accuracy_heldout"] == row["accuracy_test"] == row["loss_last"] == ""
    (choice,) = chosen(rows)
    assert choice["lr"] in ("0.01", "0.02")
    assert choice["diverged"] == pytest.approx(1 / 3)


def test_a_loss_far_above_that_of_guessing_has_diverged(run, monkeypatch):
    monkeypatch.setattr(convergence, "LOST", 0.0)
    rows = run(families=["tr"])
    assert {row["diverged"] for row in rows} == {"True"}
    assert all(row["accuracy_test"] for row in rows)


def test_what_cannot_be_built_has_one_row_with_a_note(run, measured):
    rows = run(families=["tr", "btt"], arms=["default", "tltorch"], rank=0.01)
    assert [(row["family"], row["arm"], row["lr"], row["seed"]) for row in rows if row["note"]] == [
        (family, arm, "", "") for family in ("tr", "btt") for arm in ("default", "tltorch")
    ]
    assert "rank" in rows[0]["note"]
    ran = len(measured)
    assert len(run(families=["tr", "btt"], arms=["default", "tltorch"], rank=0.01)) == len(rows) == 4
    assert len(measured) == ran
    assert all(choice["note"] and choice["lr"] is None for choice in chosen(rows))


def test_a_peer_without_such_a_layer_is_told(run):
    rows = run(families=["tr"], arms=["default", "tltorch"])
    assert len(rows) == 10
    assert rows[-1]["note"] == "tltorch has no tr of these ranks"


# ----------------------------------------------------------------------------------------------------------- networks


def test_arms_differ_in_their_tensor_convolutions_alone():
    def network(arm):
        row = {"family": "tr", "arm": arm, "rank": 2, "seed": 3, "channels": 8}
        return [convergence.network(row | {"network": name}, (1, 8, 8))[0] for name in ("plain", "resnet")]

    for ours, theirs in zip(network("default"), network("kaiming"), strict=True):
        pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
        equal = {name: torch.equal(p, q) for (name, p), (_, q) in pairs}
        assert [name for name, same in equal.items() if not same] == [name for name in equal if "cores" in name]


def test_branches_are_scaled_where_there_are_some_without_normalisation():
    row = {"family": "tr", "rank": 2, "seed": 3, "channels": 8, "network": "resnet-no-norm"}
    ours, scaled = (convergence.network(row | {"arm": arm}, (1, 8, 8))[0] for arm in ("default", "scaled branches"))
    for (name, one), other in zip(ours.named_modules(), scaled.modules(), strict=True):
        if isinstance(one, tnlayers.TensorLayer):
            factor = 1 / 3 if name.endswith("conv2") else 1  # nine branches
            torch.testing.assert_close(other.weight, factor * one.weight)
    of_all, _ = convergence.network(row | {"arm": "default", "network": "resnet-scaled"}, (1, 8, 8))
    assert all(map(torch.equal, of_all.parameters(), scaled.parameters()))


@pytest.mark.parametrize(("rank", "channels", "width"), [(0.25, 8, 4), (0.5, 8, 6), (0.05, 8, 2), (1e-6, 8, 1)])
def test_the_narrow_network_keeps_what_is_asked_and_is_drawn_as_the_dense_one(rank, channels, width):
    row = {"family": "narrow", "arm": "kaiming", "rank": rank, "seed": 3, "channels": channels, "network": "plain"}
    narrow, kept = convergence.network(row, (1, 8, 8))
    small, whole = convergence.network(row | {"family": "dense", "channels": width}, (1, 8, 8))
    assert (kept, whole) == ((width / channels) ** 2, 1)
    for one, other in zip(narrow.parameters(), small.parameters(), strict=True):
        assert torch.equal(one, other)


def test_dead_branches_stay_dead_and_the_rest_learns():
    row = {"family": "dense", "arm": "dead branches", "seed": 3, "network": "resnet-no-norm", "channels": ""}
    model, _ = convergence.network(row, (1, 8, 8))
    torch.manual_seed(0)
    torch.nn.functional.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.arange(4)).backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad.any()}
    assert moved == {name for name, _ in model.named_parameters() if not name.startswith("layer")}
    assert len(moved) == 3
    live, _ = convergence.network(row | {"arm": "kaiming"}, (1, 8, 8))
    assert torch.equal(live.linear.weight, model.linear.weight)


def test_references_are_run_where_they_exist():
    names = {"families": ("dense", "narrow", "tr"), "arms": ("default", "scaled branches", "dead branches")}
    grid = Grid(networks=convergence.NETWORKS, lrs=(0.1, 0.2, 0.3), seeds=(0, 1, 2), **names)
    assert list(dict.fromkeys((row["network"], row["family"], row["arm"]) for row in grid.rows())) == [
        ("plain", "dense", "kaiming"),
        ("plain", "narrow", "kaiming"),
        ("plain", "tr", "default"),
        ("resnet", "dense", "kaiming"),
        ("resnet", "tr", "default"),
        ("resnet-no-norm", "dense", "kaiming"),
        ("resnet-no-norm", "dense", "scaled branches"),
        ("resnet-no-norm", "dense", "dead branches"),
        ("resnet-no-norm", "tr", "default"),
        ("resnet-no-norm", "tr", "scaled branches"),
        ("resnet-scaled", "dense", "kaiming"),
        ("resnet-scaled", "tr", "default"),
    ]
    assert {(row["family"], row["arm"]) for row in grid.rows(["scaled branches", "plain", "resnet-no-norm"])} == {
        ("dense", "kaiming"), ("narrow", "kaiming"), ("dense", "scaled branches"), ("tr", "scaled branches"),
    }  # fmt: skip


@pytest.mark.parametrize(("size", "end"), [(8, 2), (28, 7), (32, 8)])
def test_the_plain_network_halves_images_twice_and_keeps_the_signal(monkeypatch, size, end):
    monkeypatch.undo()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(1, 1, size, size)
        outs = []
        for _ in range(12):
            model = Plain(dense_conv, 32, (1, size, size))
            convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
            assert len(convolutions) == 30
            assert all(conv.bias is None for conv in convolutions)
            with torch.no_grad():
                outs.append(model.gain * model.convolutions(x))
    assert outs[0].shape == (1, 32, end, end)
    assert 0.2 < torch.stack(outs).square().mean() < 5


def test_as_many_images_are_evaluated_as_the_grid_says(run):
    """Of 7 images, a share is a number of sevenths."""
    for row in run(evaluated=7, families=["dense"]):
        assert row["evaluated"] == "7"
        for images in ("heldout", "test"):
            share = 7 * float(row[f"accuracy_{images}"])
            assert share == pytest.approx(round(share), abs=1e-4)


def test_the_moving_average_tells_the_step():
    trial = Trial.__new__(Trial)
    trial.losses = [2.0, 1.0, 1.0, 1.0]  # averages 2, 1.9, 1.81, 1.729
    assert [trial.steps_to(reference) for reference in (2.5, 1.95, 1.9, 1.8, 1.7)] == [1, 2, 3, 4, ""]
    trial.losses = [float("nan")]
    assert trial.steps_to(1.0) == ""


# ------------------------------------------------------------------------------------------------------------- choice


def written(lr, heldout, test, **different):
    row = dict.fromkeys((*convergence.COLUMNS, *provenance()), "") | {
        "dataset": "digits",
        "network": "plain",
        "family": "tr",
    }
    row |= {"arm": "paper", "lr": lr, "diverged": "False", "accuracy_heldout": heldout, "accuracy_test": test}
    return row | {"steps_to": "10"} | different


def test_the_rate_is_chosen_on_held_out_images():
    rows = [
        written("0.1", "0.8", "0.7", steps_to="20"),
        written("0.1", "0.9", "0.8", steps_to="30"),
        written("0.2", "0.7", "0.99"),
        written("0.2", "0.7", "0.99"),
        written("0.3", "0.95", "0.95"),
        written("0.3", "", "", diverged="True", steps_to=""),
    ]
    (choice,) = chosen(rows)
    assert choice == {
        "dataset": "digits", "network": "plain", "family": "tr", "arm": "paper", "lr": "0.1",
        "accuracy": pytest.approx(0.75), "error": pytest.approx(0.05), "diverged": pytest.approx(1 / 6),
        "lost": 0, "steps_to": 25, "note": "",
    }  # fmt: skip


def test_choices_of_groups_of_their_own():
    rows = [
        written("0.1", "0.5", "0.5", steps_to=""),
        written("0.03", "0.5", "0.6", steps_to=""),
        written("", "", "", arm="tltorch", note="tltorch has no tr of these ranks"),
        written("0.1", "0.99", "0.99", diverged="True", dataset="cifar10"),
    ]
    equal, missing, lost = chosen(rows)
    assert (equal["lr"], equal["accuracy"], equal["error"], equal["steps_to"]) == ("0.03", 0.6, None, None)
    assert (missing["arm"], missing["accuracy"]) == ("tltorch", None)
    assert missing["note"] == "tltorch has no tr of these ranks"
    assert (lost["dataset"], lost["accuracy"], lost["diverged"]) == ("cifar10", 0, 1)


def test_of_each_start_the_least_and_the_most_are_told():
    def reached(accuracy, **own):
        return written("0.1", "0.9", accuracy, **own)

    rows = [
        reached("0.8", family="dense", arm="kaiming"),
        reached("0.2", family="narrow", arm="kaiming"),
        reached("0.6", arm="default"),
        reached("0.72", family="tt", arm="default"),
        reached("0.4", arm="kaiming"),
        reached("0.9", family="tt", arm="kaiming", diverged="True"),
        reached("0.25", arm="tednet"),
        written("", "", "", family="tt", arm="tednet", note="none"),
        written("", "", "", arm="tltorch", note="none"),
        reached("0.5", family="dense", arm="kaiming", network="resnet-no-norm"),
        reached("0.7", family="dense", arm="scaled branches", network="resnet-no-norm"),
        reached("0.3", family="dense", arm="dead branches", network="resnet-no-norm"),
        reached("0.55", arm="default", network="resnet-no-norm"),
        reached("0.65", arm="scaled branches", network="resnet-no-norm"),
        reached("0.9", arm="default", network="resnet"),
        reached("0.9", family="dense", arm="kaiming", network="resnet", diverged="True"),
    ]
    first = [line.split(" | ") for line in start_tables.convergence(rows).splitlines()[:5]]
    title = ["| images", "network", "dense", "dense, otherwise", "default", "`scale_residual_`", "Kaiming per core"]
    assert first[0] == [*title, "tednet's own", "tensorly-torch's own |"]
    assert first[2:] == [
        ["| digits", "plain", "80.0%", "narrow 20.0%", "60.0% to 72.0%", "", "0.0% to 40.0%",
         "25.0% to 25.0%, 1 of 2 families", "none |"],
        ["| digits", "resnet-no-norm", "50.0%", "`scale_residual_` 70.0%, dead branches 30.0%", "55.0% to 55.0%",
         "65.0% to 65.0%", "", "", " |"],
        ["| digits", "resnet", "0.0%", "", "90.0% to 90.0%", "", "", "", " |"],
    ]  # fmt: skip
    for some in (rows[2:4], [*rows[:4], reached("0.5", seed="1")]):
        assert "dense, otherwise" not in start_tables.convergence(some)


def test_dense_networks_stand_under_what_they_are_held_against():
    rows = [
        written("0.1", "0.9", "0.8", family="dense", arm="kaiming", network="resnet-no-norm"),
        written("0.1", "0.9", "0.7", family="dense", arm="scaled branches", network="resnet-no-norm"),
        written("0.1", "0.9", "0.6", family="narrow", arm="kaiming"),
        written("0.1", "0.9", "0.5", arm="kaiming"),
    ]
    header, _, *lines = start_tables.convergence(rows).partition(":::{dropdown}")[2].splitlines()[2:7]
    assert header == "| images | network | family | default | `scale_residual_` | Kaiming per core |"
    assert lines == [
        "| digits | resnet-no-norm | dense | 80.0 ± 0.0 %, 10 steps | 70.0 ± 0.0 %, 10 steps |  |",
        "| digits | plain | narrow | 60.0 ± 0.0 %, 10 steps |  |  |",
        "| digits | plain | tr |  |  | 50.0 ± 0.0 %, 10 steps |",
    ]


def test_settings_that_differ_are_all_told():
    rows = [
        written("0.1", "0.9", "0.8", steps=steps, epochs="4", shrink="1", augment=augment, reference_loss="0.8")
        for steps, augment in (("50", "False"), ("7", "True"))
    ]
    assert start_tables._settings([*rows, written("", "", "", dataset="cifar10")]).splitlines()[2:] == [
        "| digits | plain | 4 | all | 1 | False, True | all | 0.8 | 50 |"
    ]


def normalised(family, arm, *steps, lr="0.1", heldout="0.9", seeds="012"):
    """Runs of a ResNet with batch normalisation."""
    return [
        written(lr, heldout, "0.5", network="resnet", steps="50", family=family, arm=arm, seed=seed, steps_to=step)
        for seed, step in zip(seeds, steps, strict=True)
    ]


def test_steps_are_compared_within_seeds():
    rows = [
        *normalised("dense", "kaiming", "1", "1", "1"),
        *normalised("tr", "default", "12", "30", "20"),
        *normalised("tr", "default", "3", "2", "1", lr="0.2", heldout="0.8"),
        *normalised("tr", "xavier", "19", "11", "29", seeds="201"),
        *normalised("tr", "xavier", "60", "60", "60", lr="0.2", heldout="0.8"),
        *normalised("tr", "kaiming", "40", "40", "40"),
        *normalised("tr", "kaiming", "41", "41", "41", lr="0.2"),
        *normalised("tt", "paper", "20", "30", ""),
        *normalised("tt", "default", "10", "25", "40"),
        written("", "", "", network="resnet", family="tr", arm="tednet", note="none"),
    ]
    ring = "20.7 | 19.7 (Xavier per core) | +1.0 (+1, +1, +1)"
    faster = "2.0 | 19.7 (Xavier per core) | -17.7 (-8, -27, -18)"
    train = "25.0 | 33.7 (the paper's rule) | -8.7 (-10, -5, -11)"
    assert start_tables._steps(rows).splitlines()[2:] == [
        f"| digits | tr | {ring} | {faster} |",
        f"| digits | tt | {train} | {train} |",
        "",
        "No other start needs fewer steps than the default, by the means, in 1 of 2 rows, and the default is behind in "
        "every seed in digits tr; each at its fastest rate, in 2 of 2 rows, and the default is behind in every seed in "
        "none.",
    ]
    for row in rows:
        row |= {"network": "plain"}
    assert start_tables._steps(rows) == ""


@pytest.mark.parametrize(
    "others",
    [
        [],
        [written("", "", "", network="resnet", arm="tednet", note="none")],
        normalised("tr", "paper", "22", "28", seeds="01"),
        normalised("tr", "paper", "22", "28", "30", seeds="013"),
        normalised("tr", "paper", "22", "28", "30", lr="0.2"),
    ],
    ids=["alone", "none", "seed missing", "another seed", "another rate"],
)
def test_steps_of_a_grid_that_is_not_complete_are_not_compared(others):
    assert start_tables._steps([*normalised("tr", "default", "22", "28", "41"), *others]) == ""


def test_a_default_behind_another_start_by_two_errors_is_named():
    def runs(family, arm, *tests, **different):
        return [written("0.1", "0.9", test, family=family, arm=arm, **different) for test in tests]

    rows = [
        *runs("tr", "default", "0.80", "0.82"),
        *runs("tr", "paper", "0.84", "0.86"),
        *runs("tr", "kaiming", "0.10", "0.10"),
        *runs("cp", "default", "0.80", "0.82"),
        *runs("cp", "paper", "0.79", "0.81"),
        *runs("cp", "kaiming", "0.1", "0.9", diverged="True"),
        *runs("dense", "kaiming", "0.1", "0.9"),
    ]
    table, note, *_ = start_tables.start(rows).split("\n\n")
    # Standard errors over two seeds: 0.01 in four starts, 0 in one. The lost start and the dense network do not count.
    assert table.splitlines()[2:] == [
        "| digits | plain | tr | 81.00% | 85.00% (the paper's rule) | -4.00 | 1.26 |",
        "| digits | plain | cp | 81.00% | 80.00% (the paper's rule) | +1.00 | 1.26 |",
    ]
    assert note.startswith("The default is behind by more than two standard errors in tr in `plain`. ")
    with pytest.raises(ReportError, match="no start has two runs that did not diverge"):
        start_tables.start([row for row in rows if row["accuracy_test"] in ("0.80", "0.84")])


def test_the_grids_that_are_shipped_are_complete():
    rows = read_csv(RESULTS)
    nowhere = {convergence.identity(row, convergence.GROUP) for row in rows if not row["lr"]}
    wanted = {
        convergence.identity(row, convergence.KEY)
        for path in (ROOT / "configs").glob("convergence-*.yaml")
        for row in Grid.from_yaml(path).rows()
        if convergence.identity(row, convergence.GROUP) not in nowhere
    }
    assert {convergence.identity(row, convergence.KEY) for row in rows if row["lr"]} == wanted


def test_what_is_compared_by_seed_saw_the_same_batches():
    """Before the first step, the loss of a network does not depend on the rate, nor on how cores share the scale."""
    found = {}
    for row in read_csv(RESULTS):
        if row["lr"]:
            arm = "default" if row["arm"] == "equal split" else row["arm"]
            start = (row["dataset"], row["network"], row["family"], arm, row["seed"])
            found.setdefault(start, []).append(float(row["loss_first"]))
    assert found
    for losses in found.values():
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("different", "sentence"),
    [
        ({"lr": 0.1}, r"grid\.yaml has the key 'lr', but only dataset, networks"),
        ({"families": []}, "families is .., but one at least is needed"),
        ({"networks": ["vgg"]}, r"networks is \['vgg'\], but tuple.* is accepted"),
        ({"arms": ["default", "he"]}, "arms is .*'he'.*, but tuple.* is accepted"),
        ({"lrs": [0.1]}, r"lrs is \[0\.1\], but two at least are needed"),
        ({"lrs": []}, "lrs is .., but two at least are needed"),
        ({"lrs": [0.1, 0.2, 0]}, "lrs is .*, but they must be above 0"),
        ({"lrs": [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]]}, "lrs is .*, but one list is needed, or one for each network"),
        ({"seeds": [0, 0]}, "seeds is .*, but two at least are needed"),
        ({"rank": 0}, "rank is 0, but it must be above 0"),
        ({"rank": 1, "families": ["narrow"]}, "rank is 1, but narrow needs a keep ratio of at most 1"),
        ({"rank": 1.5, "families": ["narrow"]}, "rank is 1.5, but narrow needs a keep ratio of at most 1"),
        ({"images": 0}, "images is 0, but it must be at least 1"),
        ({"shrink": 0}, "shrink is 0, but it must be at least 1"),
        ({"shrink": 3}, "shrink is 3, but images of 8 x 8 pixels cannot be divided by it"),
        ({"evaluated": 0}, "evaluated is 0, but it must be at least 1"),
        ({"epochs": 0}, "epochs is 0, but it must be at least 1"),
        ({"dataset": "mnist"}, "dataset is 'mnist', but Literal"),
    ],
)
def test_a_wrong_grid_is_told_in_a_sentence(run, different, sentence):
    with pytest.raises(SystemExit, match=rf"error: .*{sentence}") as told:
        run(**different)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "plain", "xavier"], "only names 'xavier', but the grid has only plain, dense, tr, default"),
        (["--workers", 0], "workers is 0, but it must be at least 1"),
        (["--out", "."], r"out is \., but .* cannot be written: it is there, and no regular file"),
        (["--config", "none.yaml"], r"none\.yaml cannot be read: No such file"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(run, arguments, sentence):
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        run(*arguments)


def test_missing_data_are_told(run):
    with pytest.raises(SystemExit, match=r"cifar10 needs .*, but nowhere is not a directory"):
        run("--data-dir", "nowhere", dataset="cifar10")


def test_a_file_with_other_columns_is_not_touched(run, tmp_path):
    (tmp_path / "convergence.csv").write_text("dataset,network\ndigits,plain\n")
    with pytest.raises(SystemExit, match="which has other columns than this script writes: move it away"):
        run()
    assert len((tmp_path / "convergence.csv").read_text()) == 29


@pytest.mark.parametrize(
    ("config", "file"), [("convergence-digits", "convergence"), ("start-cifar10", "start"), ("other", "other")]
)
def test_rows_are_in_the_file_that_has_the_config_s_name(config, file):
    assert convergence.Command(config=Path(f"{config}.yaml")).file == RESULTS.with_name(f"{file}.csv")
    assert convergence.Command(config=Path(f"{config}.yaml"), out=Path("a.csv")).file == Path("a.csv")


def test_the_grid_of_starts_has_every_format_with_and_without_normalisation():
    grid = Grid.from_yaml(ROOT / "configs" / "start-cifar10.yaml")
    assert {*grid.families} == {"dense", "cp", "tucker", "tt", "tr", "btt"}
    assert grid.networks == ("resnet", "resnet-scaled")
    assert {*grid.arms} == {"default", "paper", "kaiming", "tednet"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("convergence-*.yaml")), ids=lambda path: path.stem)
def test_the_grids_that_are_shipped(path):
    grid = Grid.from_yaml(path)
    assert path.stem == f"convergence-{grid.dataset}{'-plain' if grid.networks == ('plain',) else ''}"
    assert {"default", "paper", "kaiming", "xavier", "tednet", "tltorch normal"} <= {*grid.arms}
    formats = len({*grid.families} - {"dense", "narrow"})
    layers = len({*grid.arms} - {"scaled branches", "dead branches"})
    runs = {
        "plain": formats * layers + 2,  # dense and narrow
        "resnet": formats * layers + 1,
        "resnet-no-norm": formats * (layers + 1) + 3,  # branches of dense ones are scaled, or dead
    }
    assert len(grid.rows()) == len(grid.seeds) * sum(
        len(lrs) * runs[network] for network, lrs in zip(grid.networks, grid.rates(), strict=True)
    )
