"""The study: runs that differ only in their seed are one row, with a name, mean, deviation and a plot."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from dmae_ds.cli.main import main
from dmae_ds.config.load import load_config
from dmae_ds.evaluate.results import METRICS, append_result, read_results
from dmae_ds.output.theme import light
from dmae_ds.report import study_names
from dmae_ds.report.results_page import write_results_page
from dmae_ds.report.runs import find_runs
from dmae_ds.report.study import Column, Setting, group, list_columns
from dmae_ds.report.study_names import LONGEST, describe_training, name_settings
from dmae_ds.report.study_plot import colour_of, draw_study
from dmae_ds.teacher.cache_layout import StoredTap
from tests.evaluate.conftest import SEGMENTATION
from tests.report.made_runs import KNN, make_run


def make_study(folder):
    """Write two DMAE settings and an MAE setting over two seeds, with one teacher for each seed."""
    small = ["data.num_workers=0"]
    for seed in (0, 1):
        teacher = make_run(
            folder / f"seed{seed}" / "teacher",
            "digits_teacher",
            f"run.seed={seed}",
            *small,
            results=[("knn", "all", 86.0 + seed, KNN)],
            num_images=1400,
        )
        weights = f"teacher.weights={teacher / 'student.safetensors'}"
        for name, recipe, overrides, top1 in (
            ("dmae", "digits_dmae", [weights], 80.0),
            ("mask", "digits_dmae", [weights, "objective.mask_ratio=0.9"], 78.0),
            ("mae", "digits_mae", [], 70.0),
        ):
            few = [("knn", "10%", draw, top1 - 20 - draw, KNN) for draw in (0, 1, 2)]
            results = [("knn", "all", top1 + 2 * seed, KNN), *few]
            if (name, seed) == ("mask", 1):
                results = [("knn", "all", top1, {**KNN, "k": 10})]
            make_run(
                folder / f"seed{seed}" / name,
                recipe,
                f"run.seed={seed}",
                *small,
                *overrides,
                results=results,
                num_images=1400,
            )
    return folder


def test_settings_are_runs_that_differ_in_their_seed_alone(tmp_path):
    settings = group(find_runs([make_study(tmp_path / "study")]))
    assert [setting.name for setting in settings] == ["dmae", "dmae, mask_ratio 0.9", "mae", "teacher: mae"]
    assert all(setting.seeds == [0, 1] for setting in settings)
    headings = list_columns(settings)
    assert list(headings.values()) == ["k-NN, k 10", "k-NN, k 20", "k-NN, 10% labels"]
    by_heading = {heading: settings[0].values.get(column) for column, heading in headings.items()}
    assert by_heading == {"k-NN, k 10": None, "k-NN, k 20": [80.0, 82.0], "k-NN, 10% labels": [59.0, 59.0]}


def test_a_study_that_was_moved_is_the_same_study(tmp_path, capsys):
    out = tmp_path / "RESULTS.md"
    write_results_page({"": [make_study(tmp_path / "study")]}, out)
    page = out.read_text()
    (tmp_path / "study").rename(tmp_path / "moved")
    assert write_results_page({"": [tmp_path / "moved"]}, out).read_text() == page
    assert not capsys.readouterr().err
    for seed in (0, 1):
        (tmp_path / "moved" / f"seed{seed}" / "teacher").rename(tmp_path / f"teacher{seed}")
    write_results_page({"": [tmp_path / "moved"]}, tmp_path / "OTHER.md")
    assert "2, first '" in capsys.readouterr().err


def test_a_long_option_is_not_written_out_and_sources_are_named_by_their_runs(tmp_path):
    """Students of one teacher, of another one, of both, and of other features of the first."""
    made = {"num_images": 1400, "results": [("knn", "all", 70.0, KNN)]}
    first = make_run(tmp_path / "first", "digits_teacher", **made)
    second = make_run(tmp_path / "second", "digits_mocov3_teacher", **made)
    both = [f"teachers.mae.weights={first}", f"teachers.moco.weights={second}"]
    for name, recipe, given in (
        ("plain", "digits_features", [f"teacher.weights={first}"]),
        ("masked", "digits_features_masked", [f"teacher.weights={first}"]),
        ("one", "digits_one_teacher", [f"teacher.weights={first}"]),
        ("other", "digits_one_teacher", [f"teacher.weights={second}"]),
        ("two", "digits_two_teachers", both),
    ):
        make_run(tmp_path / name, recipe, *given, **made)
    named = {run.path.name: setting.name for setting in group(find_runs([tmp_path])) for run in setting.runs}
    assert len(set(named.values())) == 7 and all("tap" not in name for name in named.values())
    parts = {name: set(named[name].split(", ")) for name in named}
    assert parts["other"] == parts["one"] | {"teacher.weights mocov3"} and len(named["two"]) < 80


def test_no_two_settings_have_one_name():
    plain = {"objective.name": "features", "precision": "fp32", "teacher.weights": "t.pth"}
    run = {"objective.name": "mae", "precision": "fp32", "optim.epochs": 9}
    targets = [{"tap": "x" * LONGEST, "head": head, "where": None} for head in ("mlp2", "linear")]
    trainings = {
        "plain": plain,
        "of a run": plain | {"teacher.weights": run},
        "of a longer run": plain | {"teacher.weights": run | {"optim.epochs": 99}},
        "one target": plain | {"objective.targets": targets[:1]},
        "another head": plain | {"objective.targets": targets[1:]},
        "both": plain | {"objective.targets": targets},
        "stored": plain | {"teacher.cache": "exact", "optim.epochs": 9},
        "stored, longer": plain | {"teacher.cache": "exact", "optim.epochs": 99},
        "live": plain | {"teacher.dtype": "fp32"},
        "here": plain | {"teacher.weights": "/here" + "/" * LONGEST + "a.pth"},
        "there": plain | {"teacher.weights": "/there" + "/" * LONGEST + "a.pth"},
        "a list": plain | {"objective.layers": [1]},
        "its text": plain | {"objective.layers": "[1]"},
    }
    names = name_settings(trainings, {})
    assert len(set(names.values())) == len(trainings) and names["plain"] == "features"
    assert name_settings(dict(reversed(trainings.items())), {}) == names
    assert "weights mae" in names["of a longer run"] and "(mae, optim.epochs 9)" in names["of a run"]
    assert "targets.0.head linear" in names["another head"] and "number of targets 2" in names["both"]
    assert names["there"] == f"{names['here']} (2)"  # the last resort, by the order of their recipes


def test_a_run_that_learns_nothing_is_named_random_weights(tmp_path):
    for name, rates in (("trained", []), ("random", ["optim.base_lr=1e-12"])):
        make_run(tmp_path / name, "digits_mae", *rates, results=[("knn", "all", 70.0, KNN)], num_images=1400)
    assert [setting.name for setting in group(find_runs([tmp_path]))] == ["mae", "random weights"]


def test_runs_are_told_by_how_features_are_stored_and_not_by_where_the_teacher_is(tmp_path, monkeypatch):
    def read(location, *, access):
        stored = {"stored": "int8", "width": 16} if "few" in location else {"stored": "float32", "width": 128}
        tap = StoredTap("block/6", (65, 128), "float32", **stored)
        return SimpleNamespace(layout=SimpleNamespace(taps=[tap]))

    monkeypatch.setattr(study_names, "read_manifest", read)
    caches = {name: ["teacher.placement=cache", f"teacher.cache={name}"] for name in ("few0", "few1", "all")}
    for seed, (name, keys) in enumerate({"live": [], "zero3": ["teacher.placement=zero3"], **caches}.items()):
        given = ["teacher.weights=t.pth", f"run.seed={seed}", *keys]
        make_run(tmp_path / name, "digits_dmae", *given, results=[("knn", "all", 70.0, KNN)], num_images=1400)
    named = {setting.name: setting.seeds for setting in group(find_runs([tmp_path]))}
    assert sorted(named.values()) == [[0, 1], [2, 3], [4]]
    assert sum("int8, PCA 16" in name for name in named) == 1 and sum("exact" in name for name in named) == 1


def test_a_metric_without_top1_is_a_column_next_to_lines_of_an_earlier_version(tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "segmentation", SEGMENTATION)
    run = make_run(tmp_path / "run", "digits_mae", results=[("knn", "all", 70.0, KNN)], num_images=1400)
    assert '"top1": 70.0' in (run / "results.jsonl").read_text()
    (knn,) = read_results(run)
    for val, miou in (("a", 41.5), ("b", 30.0)):
        append_result(run, {**knn, "metric": "segmentation", "scores": {"miou": miou}, "val": val})
    settings = group(find_runs([run]))
    headings = list_columns(settings)
    assert list(headings.values()) == ["k-NN", "linear segmentation, val a", "linear segmentation, val b"]
    assert [settings[0].values[column] for column in headings] == [[70.0], [41.5], [30.0]]
    labels = [axes.get_xlabel() for axes in draw_study(settings, headings).axes]
    assert labels == ["top-1, %", "mIoU, %", "mIoU, %"]


def test_runs_that_begin_with_other_runs_are_settings_too(tmp_path):
    """Each seed has its own first stage and its own fine-tuned teacher, trained alike."""
    for seed in (0, 1):
        folder = tmp_path / f"seed{seed}"
        teacher = make_run(folder / "teacher", "digits_teacher", f"run.seed={seed}", num_images=1400)
        generic = make_run(
            folder / "generic",
            "digits_g2sd_generic",
            f"run.seed={seed}",
            f"teacher.weights={teacher}",
            num_images=1400,
        )
        best = f"teacher.weights={teacher / 'finetune_digits' / 'best.safetensors'}"
        for name, weights in (("specific", generic), ("deit", "null")):
            settings = {"recipe": "g2sd_specific", "epochs": 15.0}
            result = ("finetune" if name == "specific" else "supervised", "all", 90.0 + seed, settings)
            make_run(
                folder / name,
                "digits_g2sd_specific",
                f"run.seed={seed}",
                best,
                f"student.weights={weights}",
                results=[result],
                num_images=1400,
            )
    settings = group(find_runs([tmp_path]))
    assert {setting.name: setting.seeds for setting in settings} == {
        "g2sd_generic": [0, 1],
        "g2sd_specific": [0, 1],
        "g2sd_specific, student.weights g2sd_generic": [0, 1],
        "teacher: mae": [0, 1],
    }
    # One has the MAE as its teacher, the other what it was fine-tuned to.
    teachers = [setting.training["teacher.weights"] for setting in settings[:2]]
    assert teachers[0] != teachers[1]


def test_training_data_is_told_by_its_content(tmp_path):
    places = [("/a/train", "1" * 64), ("/b/train", "1" * 64), ("/a/train", "2" * 64), ("/b/train", None)]
    for seed, (place, fingerprint) in enumerate(places):
        options = [f"run.seed={seed}", f"data.train={place}"]
        teacher = make_run(tmp_path / f"teacher{seed}", "digits_teacher", *options, fingerprint=fingerprint)
        weights = f"teacher.weights={teacher}"
        student = tmp_path / f"student{seed}"
        make_run(student, "digits_dmae", *options, weights, fingerprint=fingerprint, num_images=1400)
    students = [setting for setting in group(find_runs([tmp_path])) if setting.name.startswith("dmae")]
    places = [setting.training["data.train"] for setting in students]
    assert dict(zip(places, (setting.seeds for setting in students), strict=True)) == {
        "/a/train": [0, 1],
        "/a/train (22222222)": [2],
        "/b/train": [3],
    }
    teachers = [setting.training["teacher.weights"]["data.train"] for setting in students]
    assert teachers == places


def test_a_section_that_other_settings_lack_is_named_once():
    plain = {
        "precision": "fp32",
        "objective.name": "dino",
        "objective.distill": None,
        "teacher": None,
        "optim.epochs": 9,
    }
    one = {
        "precision": "fp32",
        "objective.name": "dino",
        "objective.distill.alpha": 1.0,
        "teacher.name": "vit",
        "optim.epochs": 9,
    }
    flats = {
        "a": plain,
        "b": one,
        "c": one | {"objective.distill.alpha": 2.0},
        "d": one | {"optim.epochs": 8},
    }
    names = name_settings(flats, {"dino": {"objective.name": "dino"}})
    assert names == {
        "a": "dino",
        "b": "dino, with distill, with teacher",
        "c": "dino, with distill, with teacher, distill.alpha 2.0",
        "d": "dino, with distill, with teacher, optim.epochs 8",
    }


def test_several_teachers_are_named_and_one_is_the_rule(tmp_path):
    rest = {"objective.name": "features", "precision": "fp32"}
    one = {**rest, "teacher.name": "vit"}
    two = {**rest, "teacher": None, "teachers.a.name": "vit", "teachers.b.name": "vit"}
    names = name_settings({"one": one, "two": two}, {"features": {"objective.name": "features"}})
    assert names == {"one": "features", "two": "features, with teachers.a, with teachers.b"}
    config = load_config("digits_two_teachers", ["teachers.mae.standardize=zscore", "teachers.mae.stats=x"])
    flat = describe_training(config, tmp_path, {})
    assert "teachers.mae.stats" not in flat and flat["teachers.moco.standardize"] == "layer_norm"
    assert "teachers" not in describe_training(load_config("digits_features"), tmp_path, {})


def test_the_effective_rank_of_a_setting_is_the_mean_and_the_lowest(tmp_path):
    for seed, value in ((0, 6.0), (1, 4.5)):
        run = make_run(
            tmp_path / f"run{seed}",
            "digits_mae",
            f"run.seed={seed}",
            results=[("knn", "all", 70.0, KNN)],
            num_images=1400,
        )
        (run / "metrics.jsonl").write_text(
            (run / "metrics.jsonl").read_text().replace('"pixel"', f'"rank/mean": {value}, "pixel"')
        )
    make_run(tmp_path / "other", "digits_dmae", results=[("knn", "all", 80.0, KNN)], num_images=1400)
    page = write_results_page({"": [tmp_path]}, tmp_path / "RESULTS.md").read_text()
    assert re.search(r"\| mae \| 70.0 ± 0.0 \| 0, 1 \| [^|]* \| 5.2 \(4.5\) \|", page) and re.search(
        r"\| dmae \| [^\n]* \| not watched \|", page
    )
    assert "effective rank" in page


def test_the_table_and_the_plot_of_the_study(tmp_path):
    study = make_study(tmp_path / "study")
    page = write_results_page({"": [study]}, tmp_path / "RESULTS.md").read_text()
    assert "| dmae | not run | 81.0 ± 1.4 | 59.0 ± 0.0 | 0, 1 |" in page
    assert (
        "| dmae, mask_ratio 0.9 | 78.0 (1 of 2) | 78.0 (1 of 2) | 57.0 (1 of 2) | 0, 1 |" in page
        and "| teacher: mae | not run | 86.5 ± 0.7 | not run |" in page
    )
    assert "| 84.0, 81.6 | 81.0, 71.0: **+10.0 ± 0.0** | 0, 1 | shows (k-NN) |" in page
    assert "8 runs on 1,400 images" in page and "(.github/results.png)" in page and "0 of 124 rows" in page
    plot = (tmp_path / ".github" / "results.png").read_bytes()
    assert plot[:4] == b"\x89PNG"
    again = write_results_page(
        {"": [study / "seed1", study / "seed0", study / "seed0" / "mae"]}, tmp_path / "RESULTS.md"
    )  # the same runs, named differently
    assert again.read_text() == page and (tmp_path / ".github" / "results.png").read_bytes() == plot


def test_each_data_set_has_a_section_with_columns_and_a_plot_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, score in (("digits", 70.0), ("scenes", 41.5)):
        results = [("knn", "all", score, KNN), ("knn", "10%", 0, score - 9, KNN)][: 2 - (name == "scenes")]
        make_run(tmp_path / "runs" / name, "digits_mae", results=results, num_images=1400)
    assert main(["report", "--results", "digits=runs/digits", "scenes=runs/scenes"]) == 0
    page = Path("RESULTS.md").read_text()
    digits, scenes = page.partition("## The papers' tables")[0].split("\n### On ")[1:]
    assert digits.startswith("digits\n") and scenes.startswith("scenes\n")
    assert "| mae | 70.0 | 61.0 | 0 |" in digits and "| mae | 41.5 | 0 |" in scenes
    plots = [f".github/results-{name}.png" for name in ("digits", "scenes")]
    assert "verdict" not in page and "above random weights" not in page  # without runs that it is about
    assert plots[0] in digits and plots[1] in scenes and all(Path(plot).is_file() for plot in plots)
    assert main(["report", "--results", "runs", "--out", "ONE.md"]) == 0  # without names it is one section
    page = Path("ONE.md").read_text()
    assert "### On" not in page and "2 runs on 1,400" in page and "(.github/results.png)" in page


def test_headings_of_the_plot_do_not_overlap_and_every_row_has_a_number():
    columns = {
        Column("knn", "all", str(number)): f"fine-tuned with many labels, recipe {number}"
        for number in range(5)
    }
    whole = Setting(
        "g2sd_specific, student.weights g2sd_generic, optim.epochs 15.0",
        [],
        {column: [80.0, 81.0] for column in columns},
    )
    half = Setting("mae", [], {column: [70.0] for column in list(columns)[:3]})
    figure = draw_study([whole, half], columns)
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes._left_title.get_window_extent() for axes in panels]
    assert [axes._left_title.get_text().replace("\n", " ") for axes in panels] == list(columns.values())
    assert all(title.x0 >= 0 and title.x1 <= figure.bbox.x1 for title in titles)
    assert not any(one.overlaps(other) for place, one in enumerate(titles) for other in titles[place + 1 :])
    rows = [
        [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
        for axes in (panels[0], panels[3])
    ]
    assert rows == [[whole.name, half.name], [whole.name]]


def test_a_point_of_the_plot_is_coloured_by_the_role_of_its_setting(tmp_path):
    settings = group(find_runs([make_study(tmp_path)]))
    colours = {setting.name: colour_of(setting) for setting in settings}
    assert colours["dmae"] == colours["dmae, mask_ratio 0.9"] == light("--series-0")
    assert (colours["mae"], colours["teacher: mae"]) == (light("--series-1"), light("--soft"))
