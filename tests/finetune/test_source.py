"""finetune/source.py: what tells results of one run apart."""

from __future__ import annotations

from dmae_ds.config.evaluation import FinetuneConfig
from dmae_ds.finetune.source import find_source


def find(run, *overrides, recipe="finetune_mae"):
    return find_source(str(run), schema=FinetuneConfig, recipe=str(recipe), overrides=list(overrides))


def test_own_recipes_of_one_name_and_teachers_of_one_name_are_told_apart(run, tmp_path):
    names, teachers = [], []
    for folder, number in (("a", 0.1), ("b", 0.2)):
        recipe, teacher = tmp_path / folder / "own.yaml", tmp_path / folder / "best.safetensors"
        recipe.parent.mkdir()
        recipe.write_text(f"drop_path: {number}\n")
        teacher.write_text(folder)
        distill = ["distill.method=features", f"distill.teacher={teacher}"]
        names.append(find(run, recipe=recipe).recipe)
        teachers.append(find(run, *distill).teacher())
    assert len(set(names)) == 2 and all(name.startswith("own ") for name in names)
    assert teachers[0] != teachers[1] and find(run).teacher() == {} and find(run).recipe == "finetune_mae"
