"""RESULTS.md: it has every published row, a run fills exactly its rows, and equal runs give equal bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dmae_ds.cli.main import main
from dmae_ds.evaluate.results import METRICS, append_result, read_results
from dmae_ds.report.published import find_conditions, find_result, read_published
from dmae_ds.report.results_page import PAPERS, render_published, write_results_page
from dmae_ds.report.runs import read_run
from tests.messages import refused
from tests.report.made_runs import FINETUNE, KNN, make_run

REPOSITORY = Path(__file__).resolve().parents[2]


def filled(run):
    """The rows that a run fills, as "table: what"."""
    run, (_, rows) = read_run(run), read_published()
    return {
        f"{row['table']}: {row['what']}"
        for row in rows
        for conditions in [find_conditions(row)]
        if conditions and find_result(run, conditions)
    }


def test_every_published_row_is_on_the_page_as_it_was_published():
    _, rows = read_published()
    lines = [line for line in render_published([]) if re.match(r"\| (?!table|---)", line)]
    assert len(rows) == len(lines) > 100 and {row["paper"] for row in rows} == set(PAPERS)
    for row, line in zip(rows, lines, strict=True):
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        assert cells[:3] == [row["table"], row["what"], row["metric"]] and cells[4].split(" (")[0] == str(
            row["value"]
        )
        assert cells[5] == ("not run" if find_conditions(row) else "not run*")
    assert sum(find_conditions(row) is not None for row in rows) == 101


def test_the_committed_page_is_what_the_generator_prints(tmp_path):
    committed = (REPOSITORY / "RESULTS.md").read_text(encoding="utf-8")
    make_run(tmp_path / "run", "digits_mae", results=[("knn", "all", 70.0, KNN)], num_images=1400)
    study = write_results_page({"": [tmp_path]}, tmp_path / "RESULTS.md").read_text().split("\n")
    assert committed.startswith("\n".join(study[:5])) and "## The study" in study[:5]
    assert study[6].startswith("Top-1") and "\n".join(study[6:9]) in committed
    assert "\n".join(render_published([])) in committed
    assert all((REPOSITORY / path).is_file() for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", committed))


DEFAULT = {
    "1: one pair, three quarters",
    "2: student middle <- teacher middle",
    "Figure 2 and text: mask ratio 0.75",
    "3a: head mlp2",
    "3b: decoder depth 8",
    "3c: l1, alpha 1",
    "4: DMAE-B",
    "5: DMAE, large -> base",
    "7: DMAE-B",
    "8: student block 9",
}


@pytest.mark.parametrize(
    "recipe, overrides, rows",
    [
        ("dmae_vit_large_to_base", [], DEFAULT),
        (
            "dmae_vit_large_to_base",
            [
                "objective.pairs=[[9, 18]]",
                "teacher.placement=pipeline",
                "teacher.stages=2",
                "teacher.name=vit_large_patch16_224.mae",
            ],
            DEFAULT,
        ),
        (
            "dmae_vit_large_to_base",
            ["objective.pairs=[[6, 12]]"],
            {"1: one pair, middle", "8: student block 6"},
        ),
        ("dmae_vit_large_to_base", ["objective.pairs=[[12, 24], [6, 12]]"], {"1: two pairs"}),
        ("dmae_vit_large_to_base", ["objective.pairs=[[9, 24]]"], {"2: student middle <- teacher top"}),
        ("dmae_vit_large_to_base", ["objective.mask_ratio=0.9"], {"Figure 2 and text: mask ratio 0.9"}),
        ("dmae_vit_large_to_base", ["objective.head=linear"], {"3a: head linear"}),
        ("dmae_vit_large_to_base", ["objective.decoder.depth=2"], {"3b: decoder depth 2"}),
        ("dmae_vit_large_to_base", ["objective.distance=l2"], {"3c: l2, alpha 1"}),
        ("dmae_vit_large_to_base", ["objective.alpha=4"], {"3c: l1, alpha 4"}),
        ("dmae_vit_large_to_base", ["student.name=vit_small_patch16_224"], {"5: DMAE, large -> small"}),
        (
            "dmae_vit_large_to_base",
            ["student.name=vit_tiny_patch16_224", "teacher.name=vit_base_patch16_224"],
            {"5: DMAE, base -> tiny"},
        ),
        ("mae_vit_base", [], {"2: MAE", "4: MAE-B", "5: MAE, base", "7: MAE-B 100 epochs"}),
        (
            "mae_vit_base",
            ["optim.epochs=1600", "optim.warmup_epochs=40"],
            {"2: MAE", "4: MAE-B", "7: MAE-B 1600 epochs"},
        ),
        ("sdae_vit_base", [], {"2: SdAE", "5: multi-fold, target normalised"}),
        ("sdae_vit_base", ["objective.teacher_sees=masked"], {"5: masked patches only, target normalised"}),
        ("mocov3_vit_base", [], {"2: MoCo v3"}),
        ("mocov3_vit_base", ["optim.epochs=100"], {"9: MoCo-v3"}),
        ("mocov3_dmae_vit_base", [], {"9: MoCo-v3 + DMAE"}),
        ("dino_dmae_vit_base", [], {"9: DINO + DMAE"}),
        ("dino_dmae_vit_base", ["objective.distill.head=linear"], set()),
        # settings of no paper
        ("dmae_vit_large_to_base", ["objective.alpha=4", "objective.head=linear"], set()),
        ("dmae_vit_large_to_base", ["objective.normalize=l2"], set()),
        ("dmae_vit_large_to_base", ["teacher.standardize=phi_s"], set()),
        ("dmae_vit_large_to_base", ["optim.global_batch=2048"], set()),
        ("dmae_vit_large_to_base", ["student.depth=10"], set()),
        ("dmae_vit_huge_to_base", [], set()),
        ("mae_vit_base", ["optim.epochs=200"], set()),
    ],
)
def test_a_run_fills_its_rows(tmp_path, recipe, overrides, rows):
    assert (
        filled(make_run(tmp_path / "run", recipe, *overrides, results=[("finetune", "all", 83.9, FINETUNE)]))
        == rows
    )


@pytest.mark.parametrize(
    "result, rows",
    [
        (("finetune", "1%", 50.0, FINETUNE), {"6: DMAE-B"}),
        (("finetune", "all", 83.0, {**FINETUNE, "epochs": 50.0}), set()),
        (("finetune", "all", 83.0, {**FINETUNE, "img_size": 384}), set()),
        (("knn", "all", 60.0, KNN), set()),
        (
            ("supervised", "all", 80.0, {**FINETUNE, "init": "random", "distill": "deit_soft"}),
            {"4: DeiT-B soft distillation", "7: DeiT-B soft distillation"},
        ),
        (
            ("supervised", "all", 80.0, {**FINETUNE, "init": "random", "epochs": 300.0}),
            {"2: from scratch", "4: DeiT-B"},
        ),
        (("supervised", "all", 80.0, {**FINETUNE, "distill": "deit_soft"}), set()),
        (("supervised", "all", 80.0, {**FINETUNE, "init": "random", "distill": "crd"}), {"4: CRD"}),
        (("supervised", "all", 80.0, {**FINETUNE, "init": "random", "distill": "srrl"}), {"4: SRRL"}),
        (
            ("supervised", "10%", 60.0, {**FINETUNE, "init": "random", "distill": "features"}),
            {"6: supervised feature alignment"},
        ),
    ],
)
def test_the_evaluation_must_be_that_of_the_row(tmp_path, result, rows):
    assert filled(make_run(tmp_path / "run", results=[result])) == rows


@pytest.mark.parametrize(
    "recipe, metric, settings, num_images, rows",
    [
        ("sdae_vit_base", "detect", {"recipe": "maskrcnn_1x_coco"}, (118_287, 5_000), {"4: SdAE"}),
        ("sdae_vit_base", "detect", {"recipe": "vitdet_coco"}, (118_287, 5_000), set()),
        ("sdae_vit_base", "detect", {"recipe": "maskrcnn_1x_coco"}, (117_266, 5_000), set()),
        ("sdae_vit_base", "segment", {"recipe": "upernet_ade20k"}, (20_210, 2_000), {"3: SdAE"}),
        (
            "g2sd_generic_vit_base_to_small",
            "detect",
            {"recipe": "g2sd_detect_coco_small", "distill": True},
            (118_287, 5_000),
            {"3: G2SD-S 300 epochs"},
        ),
        (
            "g2sd_generic_vit_base_to_small",
            "detect",
            {"recipe": "vitdet_coco"},
            (118_287, 5_000),
            {"3: G2SD-S without the specific stage, 300 epochs"},
        ),
    ],
)
def test_detectors_and_segmenters_fill_their_rows(tmp_path, recipe, metric, settings, num_images, rows):
    run = make_run(tmp_path / "run", recipe, results=[("knn", "all", 60.0, KNN)])
    (line,) = read_results(run)
    scores = {METRICS[metric].headline: 44.5}
    settings = {"init": "weights", "distill": False, **settings}
    num_train, num_val = num_images
    changes = {"metric": metric, "scores": scores, "settings": settings, "num_train": num_train}
    append_result(run, {**line, **changes, "num_val": num_val})
    assert filled(run) == rows
    if rows:
        assert "| 44.50 |" in "\n".join(render_published([read_run(run)]))


def test_other_data_a_shorter_run_and_an_older_result_fill_nothing(tmp_path):
    results = [("finetune", "all", 83.9, FINETUNE)]
    assert filled(make_run(tmp_path / "other", results=results, num_images=1_200_000)) == set()
    assert (
        filled(make_run(tmp_path / "few", results=[("finetune", "1%", 50.0, FINETUNE)], num_images=1_200_000))
        == set()
    )
    assert filled(make_run(tmp_path / "val", results=results, num_val=10_000)) == set()
    assert filled(make_run(tmp_path / "short", results=results, progress=0.9)) == set()
    old = make_run(tmp_path / "old", results=results)
    (old / "results.jsonl").write_text(
        re.sub(r'"step": (\d+)', '"step": 100', (old / "results.jsonl").read_text())
    )
    assert filled(old) == set() and len(filled(make_run(tmp_path / "right", results=results))) == len(DEFAULT)


def test_seeds_hardware_and_cost_are_in_the_row(tmp_path):
    for seed, top1 in ((2, 84.2), (0, 83.8), (1, 84.0)):
        make_run(
            tmp_path / f"run{seed}",
            "dmae_vit_large_to_base",
            f"run.seed={seed}",
            results=[("finetune", "all", top1, FINETUNE), ("knn", "all", 60.0, KNN)],
            images_per_s=4096 / 1800,
        )
    out = write_results_page({"": [tmp_path]}, tmp_path / "RESULTS.md")
    page = out.read_text()
    # 8 ranks x (half an hour for the one logged step + an hour of fine-tuning)
    assert "| 84.0 | 84.00 ± 0.20 | 0, 1, 2 | 8 x NVIDIA H100 | 12.0 h |" in page
    assert "| 195 | 12.00 ± 0.00 | 0, 1, 2 | 8 x NVIDIA H100 | 12.0 h |" in page
    assert "10 of 124 rows" in page and "## The study\n\nnot run" in page
    assert not (tmp_path / ".github").exists()


def test_an_unfinished_run_is_left_out_and_counted(tmp_path):
    make_run(tmp_path / "study" / "whole", "digits_mae", results=[("knn", "all", 70.0, KNN)], num_images=1400)
    make_run(
        tmp_path / "study" / "half",
        "digits_mae",
        "run.seed=1",
        results=[("knn", "all", 50.0, KNN)],
        num_images=1400,
        progress=0.5,
    )
    nested = tmp_path / "study" / "whole" / "finetune_mae"  # an evaluation is not a run
    nested.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (nested / name).write_text("pool: mean\n")
    page = write_results_page({"": [tmp_path / "study"]}, tmp_path / "RESULTS.md").read_text()
    assert "Left out: 1 run " in page and "| mae | 70.0 | 0 |" in page


@pytest.fixture
def three_sections(tmp_path):
    """Folders by section: two studies on small data, which claims are about, and a run on ImageNet-1k."""
    for number, (section, seed, recipe) in enumerate(
        (section, seed, recipe)
        for section in ("a", "b")
        for seed in (0, 1)
        for recipe in ("digits_mae", "digits_dmae")
    ):
        results = [("knn", "all", 60.0 + number % 5, KNN)]
        folder = tmp_path / section / f"run{number}"
        make_run(folder, recipe, f"run.seed={seed}", results=results, num_images=1400)
    make_run(tmp_path / "imagenet" / "run", results=[("finetune", "all", 83.9, FINETUNE)])
    return {name: [tmp_path / name] for name in ("a", "b", "imagenet")}


def test_sections_that_are_kept_stay_as_they_were(tmp_path, three_sections):
    whole, out = tmp_path / "WHOLE.md", tmp_path / "RESULTS.md"
    page = write_results_page(three_sections, whole).read_text()
    assert "10 of 124 rows" in page and page.count("#### What the papers claim") == 2
    write_results_page({name: three_sections[name] for name in ("a", "imagenet")}, out)
    figure = tmp_path / ".github" / "results-a.png"
    old_figure = figure.read_bytes()
    assert main(["report", "--results", "--keep", f"b={tmp_path / 'b'}", "--out", str(out)]) == 0
    assert out.read_text() == page and figure.read_bytes() == old_figure
    for name in three_sections:
        write_results_page({name: three_sections[name]}, out, keep=True)
    assert out.read_text() == page
    for section, run in (("a", "run0"), ("imagenet", "run")):  # with one more number
        (line,) = read_results(tmp_path / section / run)
        append_result(tmp_path / section / run, line | {"scores": {"top1": 12.3}})
        write_results_page({section: three_sections[section]}, out, keep=True)
        assert page != out.read_text() == write_results_page(three_sections, whole).read_text()
        page = out.read_text()


@pytest.mark.parametrize("keep", [False, True])
def test_nothing_of_an_earlier_page_gets_lost(tmp_path, three_sections, keep):
    out = tmp_path / "RESULTS.md"
    out.write_text("# Results\n\nby hand\n")
    with refused(out):
        write_results_page({"b": three_sections["b"]}, out, keep=keep)
    assert out.read_text() == "# Results\n\nby hand\n"
    out.unlink()
    page = write_results_page(
        {"": three_sections["a"], "imagenet": three_sections["imagenet"]}, out
    ).read_text()
    unmeasured = make_run(tmp_path / "unmeasured", "digits_mae", num_images=1400)
    with refused(out, "without a name"):
        write_results_page({"": [unmeasured], "imagenet": three_sections["imagenet"]}, out, keep=keep)
    run = tmp_path / "a" / "run3"
    run.rename(tmp_path / "elsewhere")
    with refused("4 runs", "now 3"):
        write_results_page({"": [tmp_path / "a"], "imagenet": three_sections["imagenet"]}, out, keep=keep)
    (tmp_path / "elsewhere").rename(run)
    if keep:
        write_results_page({"b": three_sections["b"]}, out, keep=True)
        both = {"b": three_sections["b"], "": three_sections["a"], "imagenet": three_sections["imagenet"]}
        assert out.read_text() == write_results_page(both, tmp_path / "WHOLE.md").read_text()
        return
    with refused("--keep", "10 numbers"):
        write_results_page({"": three_sections["a"]}, out)
    with refused("--keep", "without a name"):
        write_results_page({name: three_sections[name] for name in ("b", "imagenet")}, out)
    assert out.read_text() == page


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    with refused(tmp_path):
        write_results_page({"": [tmp_path]}, tmp_path / "RESULTS.md")
    with refused("--out", tmp_path / "nowhere"):
        write_results_page({}, tmp_path / "nowhere" / "RESULTS.md")
    run = make_run(tmp_path / "runs" / "mae", "digits_mae", num_images=1400)
    with refused(run, "'a'", "'b'"):
        write_results_page({"a": [run], "b": [run.parent]}, tmp_path / "RESULTS.md")
    assert not (tmp_path / "RESULTS.md").exists()
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--results", "a/b=runs"]) == 2 and "a/b" in capsys.readouterr().err
    assert main(["report", "--keep", "runs"]) == 2 and "--results" in capsys.readouterr().err
    assert main(["report"]) == 2 and "--results" in capsys.readouterr().err
    assert main(["report", "--results"]) == 0 and (tmp_path / "RESULTS.md").read_text().count("not run") > 100
