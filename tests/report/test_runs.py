"""Run folders as the results page reads them: facts, distilled blocks, hours, ranks, results that count."""

from __future__ import annotations

import timm
import torch

from dmae_ds.report.runs import DEPTHS, find_runs, read_run
from tests.report.made_runs import FINETUNE, KNN, make_run


def test_depths_are_those_of_timm():
    patches = {"huge": 14, "giant": 14, "gigantic": 14}
    with torch.device("meta"):
        for size, depth in DEPTHS.items():
            model = timm.create_model(f"vit_{size}_patch{patches.get(size, 16)}_224")
            assert len(model.blocks) == depth, size


def test_facts_name_networks_without_tags_and_blocks_at_three_quarters(tmp_path):
    recipe = "dmae_vit_large_to_base"
    facts = read_run(make_run(tmp_path / "run", recipe, "teacher.name=vit_large_patch16_224.mae")).facts
    assert (facts["student"], facts["teacher"]) == ("vit_base_patch16_224", "vit_large_patch16_224")
    assert facts["pairs"] == ((9, 18),) and facts["distilled"] and facts["finished"]
    shallow = read_run(make_run(tmp_path / "shallow", recipe, "student.depth=4")).facts
    assert "4" in shallow["student"] and shallow["pairs"] == ((3, 18),)
    plain = read_run(make_run(tmp_path / "plain", "mae_vit_base", progress=0.5)).facts
    assert plain["pairs"] is None and not plain["distilled"] and not plain["finished"]
    several = read_run(make_run(tmp_path / "several", "radio_like")).facts
    assert several["teacher"].count("vit_large_patch16") == 2 and several["standardize"] == "phi_s"


def test_hours_and_ranks_are_those_of_training(tmp_path):
    run = read_run(make_run(tmp_path / "run", "mae_vit_base", images_per_s=4096 / 1800, world_size=8))
    assert run.hours == 0.5 and run.world_size == 8 and run.gpu_hours == 4.0


def test_results_of_the_last_step_count_and_those_from_random_weights(tmp_path):
    random = {**FINETUNE, "init": "random"}
    results = [("knn", "all", 60.0, KNN), ("supervised", "all", 80.0, random)]
    folder = make_run(tmp_path / "run", "mae_vit_base", results=results)
    assert [result["metric"] for result in read_run(folder).results] == ["knn", "supervised"]
    step = read_run(folder).results[0]["step"]
    lines = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(lines.replace(f'"step": {step}', '"step": 1'))
    assert [result["metric"] for result in read_run(folder).results] == ["supervised"]


def test_runs_are_found_once_at_any_depth_in_the_order_of_their_seeds(tmp_path):
    for name, seed in (("a/b/first", 1), ("second", 0)):
        make_run(tmp_path / name, "mae_vit_base", f"run.seed={seed}")
    runs = find_runs([tmp_path, tmp_path / "a", tmp_path / "second"])
    assert [run.path.name for run in runs] == ["second", "first"]


def test_runs_are_found_through_links_and_once(tmp_path):
    run = make_run(tmp_path / "disk" / "run", "mae_vit_base")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "mae").symlink_to(run)
    (tmp_path / "study" / "again").symlink_to(tmp_path / "study")
    (found,) = find_runs([tmp_path / "study"])
    assert found.path == tmp_path / "study" / "mae"
