"""The commands of study and scenes_study, with stand-ins for the programs they call."""

from __future__ import annotations

import shutil

import pytest

from dmae_ds.config.load import load_config
from tests.launch.conftest import LAUNCH, PARTS, run_of


def test_study_trains_every_setting_of_every_seed_once(start):
    wanted = {
        "SEEDS": "0 1",
        "ONLY": "random mae mae-25 dmae adapt dmae-int8 two-teachers g2sd-generic g2sd-specific",
    }
    done, calls = start("study.sh", **wanted)
    assert done.returncode == 0, done.stderr
    trained = [run_of(call) for call in calls if call.startswith("dmae-ds train")]
    names = ("teacher", *wanted["ONLY"].split())
    assert sorted(trained) == sorted(f"{name}-seed{seed}" for name in names for seed in (0, 1))
    for call in calls:
        if "digits_g2sd_specific" in call:
            seed = run_of(call)[-1]
            assert f"student.weights=OUT/g2sd-generic-seed{seed}" in call
            assert f"teacher.weights=OUT/teacher-seed{seed}/finetune_digits/best.safetensors" in call
        if "digits_mae" in call:
            assert "teacher.weights" not in call
            assert ("data.share=.25 optim.epochs=64" in call) == ("mae-25" in call)
        if "digits_adapt" in call:
            assert f"student.weights=OUT/mae-seed{run_of(call)[-1]}/student.safetensors" in call
        if "digits_two_teachers" in call:
            assert f"teachers.moco.weights=OUT/mocov3-teacher-seed{run_of(call)[-1]}" in call
    stored = [call for call in calls if "teacher cache" in call]
    assert len(stored) == 2 and all("--dtype int8" in call and "run.seed=" in call for call in stored)
    of_random = [call for call in calls if "eval finetune OUT/random-seed1" in call]
    assert sorted(call.split()[5] for call in of_random) == [
        "supervised_crd_digits",
        "supervised_srrl_digits",
    ]
    assert all("distill.teacher=OUT/teacher-seed1/" in call for call in of_random)
    evaluated = [call for call in calls if call.startswith(("dmae-ds eval knn", "dmae-ds eval probe"))]
    assert len(evaluated) == 6 and all(call.count("-seed") == 10 for call in evaluated[:2])
    assert calls[-1] == "dmae-ds report --results digits=OUT --out OUT/RESULTS.md"
    done, calls = start("study.sh", **wanted)
    assert calls == ["dmae-ds report --results digits=OUT --out OUT/RESULTS.md"]


@pytest.mark.parametrize("broken", ["mae-seed0", "--pool cls"])
def test_study_stops_at_a_failure_and_continues(start, tmp_path, broken):
    wanted = {"SEEDS": "0", "ONLY": "mae", "JOBS": "1"}
    (tmp_path / "out" / "dino-seed0").mkdir()  # of a run that was stopped, and is not wanted now
    done, calls = start("study.sh", BROKEN=broken, **wanted)
    assert done.returncode != 0 and "it broke" in done.stderr
    assert not [call for call in calls if "report" in call]
    done, calls = start("study.sh", **wanted)
    assert done.returncode == 0 and calls[-1] == "dmae-ds report --results digits=OUT --out OUT/RESULTS.md"
    assert not [call for call in calls if "digits_teacher" in call or "dino-seed0" in call]


def test_study_on_clipart_changes_the_recipes_on_digits(start, tmp_path):
    val = tmp_path / "out" / "shards" / "val"
    val.mkdir(parents=True)
    (val / "manifest.json").touch()
    (tmp_path / "out" / "RESULTS.md").write_text("| setting | k-NN |\n| mae | 62.5 |\n\nmore\n")
    done, calls = start("study.sh", SEEDS="0", DATA="clipart")
    assert done.returncode == 0, done.stderr
    assert calls[-1] == "dmae-ds report --results clipart=OUT --out OUT/RESULTS.md"
    assert "| mae | 62.5 |" in done.stdout and "more" not in done.stdout
    configs = {
        run_of(call): load_config(call.split()[2], [word for word in call.split() if "=" in word])
        for call in calls
        if call.startswith("dmae-ds train")
    }
    assert {"teacher-seed0", "random-seed0", "mae-seed0", "dmae-seed0", "dino-seed0"} < set(configs)
    assert all(
        config.data.share == 1 for config in configs.values()
    )  # parts are trained where they are named
    for config in configs.values():
        networks = (config.student, config.teacher or config.student)
        assert {(network.img_size, network.patch_size) for network in networks} == {(64, 8)}
        assert config.data.flip and getattr(config.objective, "local_size", 64) % 8 == 0
    assert configs["random-seed0"].optim.epochs < 1
    assert configs["mocov3-seed0"].optim.base_lr == 2 * load_config("digits_mocov3").optim.base_lr
    assert configs["dmae-seed0"].optim.base_lr == load_config("digits_dmae").optim.base_lr
    for name in ("teacher", "mae", "dmae"):
        config = configs[f"{name}-seed0"]
        shipped = load_config(f"clipart_{name}")
        assert config.model_copy(update={"run": shipped.run, "data": shipped.data}).model_dump(
            exclude={"teacher": {"weights"}}
        ) == shipped.model_dump(exclude={"teacher": {"weights"}})
        assert config.data.model_copy(update={"train": "", "val": ""}) == shipped.data.model_copy(
            update={"train": "", "val": ""}
        )
    wanted = "random mae adapt sdae mae-25 dmae-int8"
    (tmp_path / "out" / "study").unlink()
    _, calls = start("study.sh", SEEDS="3", DATA="clipart", TIMES="5", ONLY=wanted)
    assert " clipart-x5=OUT " in calls[-1]
    longer = {
        run_of(call): load_config(call.split()[2], call.split()[5:]) for call in calls if " train " in call
    }
    assert {run: (config.optim.epochs, config.optim.warmup_epochs) for run, config in longer.items()} == {
        "teacher-seed3": (120, 6),
        "random-seed3": (0.005, 0),
        "mae-seed3": (80, 5),
        "sdae-seed3": (80, 5),
        "mae-25-seed3": (320, 20),
        "adapt-seed3": (40, 2.5),
        "dmae-int8-seed3": (80, 5),
    }
    (stored,) = [call.split() for call in calls if " teacher cache " in call]
    assert "optim.epochs=80" in stored and "teacher.img_size=64" in stored
    assert configs["sdae-seed0"].objective.momentum == load_config("digits_sdae").objective.momentum
    assert longer["sdae-seed3"].objective.momentum == (0.85, 0.96)


@pytest.mark.parametrize(
    "script, found, variables",
    [
        ("study.sh", "'dmea'|dmae-mask-.90", {"ONLY": "mae dmea"}),
        ("study.sh", "'mae,dmae'|two-teachers", {"ONLY": "mae,dmae"}),
        ("study.sh", "'mae'|mae-x.5", {"ONLY": "mae", "DATA": "clipart_rates"}),
        ("scenes_study.sh", "'dino'|g2sd-generic", {"ONLY": "dino"}),
        ("scenes_study.sh", "'detection'|detect-specific", {"TASKS": "detection"}),
        ("study.sh", "JOBS|'0'", {"JOBS": "0"}),
        ("scenes_study.sh", "JOBS|'two'", {"JOBS": "two"}),
        ("study.sh", "SEEDS|'0,1'", {"SEEDS": "0,1"}),
        ("scenes_study.sh", "SEEDS|empty", {"SEEDS": " "}),
        ("study.sh", "TIMES|'two'", {"DATA": "clipart", "TIMES": "two"}),
        ("study.sh", "TIMES|'0'", {"DATA": "clipart", "TIMES": "0"}),
        ("study.sh", "TIMES=5|clipart", {"TIMES": "5"}),
        ("study.sh", "'photos'|clipart", {"DATA": "photos"}),
        ("study.sh", "OUT|'two words'", {"OUT": "two words"}),
        ("scenes_study.sh", "OUT|'it's'", {"OUT": "it's"}),
        ("study.sh", "TIMES=5|TIMES=1", {"DATA": "clipart"}),
        ("study.sh", "DATA=clipart|DATA=digits", {}),
    ],
)
def test_a_study_refuses_mistakes_before_it_begins(start, tmp_path, script, found, variables):
    if variables.get("DATA") != "clipart_rates":
        (tmp_path / "out" / "study").write_text("DATA=clipart TIMES=5\n")
    done, calls = start(script, **variables)
    assert done.returncode == 2 and not calls and len(done.stderr.splitlines()) == 1
    assert all(words in done.stderr for words in found.split("|")), done.stderr


def test_study_of_rates_trains_on_nine_tenths_with_three_rates(start, tmp_path):
    images = tmp_path / "study" / "images" / "train" / "a class"
    images.mkdir(parents=True)
    for number in range(20):
        (images / f"{number:02} é.png").symlink_to("/somewhere")
    wanted = {"DATA": "clipart_rates", "STUDY": str(tmp_path / "study")}
    done, calls = start("study.sh", **wanted)
    assert done.returncode == 0, done.stderr
    parts = [{path.name for path in (tmp_path / "out" / "images" / part).rglob("*.png")} for part in PARTS]
    assert [len(names) for names in parts] == [18, 2] and len(set.union(*parts)) == 20
    trained = {
        run_of(call): load_config(call.split()[2], [word for word in call.split() if "=" in word])
        for call in calls
        if call.startswith("dmae-ds train")
    }
    assert len(trained) == 1 + 9 * 3 and all(config.student.img_size == 64 for config in trained.values())
    rates = [trained[f"sdae-x{factor}-seed0"].optim.base_lr for factor in (".5", "1", "2")]
    assert rates == [0.00025, 0.0005, 0.001]
    evaluated = [call for call in calls if " eval " in call]
    assert len(evaluated) == 3 and not [call for call in evaluated if "finetune" in call]


def test_study_on_clipart_makes_shards_where_it_looks_for_them(start, tmp_path):
    shutil.copytree(LAUNCH, tmp_path / "launch")
    settings = {"OUT": None, "SEEDS": "0", "DATA": "clipart", "SRC": "photos", "BROKEN": "digits_teacher"}
    _, calls = start(str(tmp_path / "launch" / "study.sh"), **settings)
    assert calls[0] == "python launch/clipart.py photos runs/study_clipart"
    assert "data.train=runs/study_clipart/shards/train" in calls[1]


def test_scenes_study_trains_and_evaluates_every_student_once(start, tmp_path):
    shards = tmp_path / "out" / "shards" / "scenes" / "val"
    shards.mkdir(parents=True)
    (shards / "manifest.json").touch()
    (tmp_path / "out" / "RESULTS.md").write_text(
        "# Results\n\n| setting | dense k-NN |\n| mae | 12.5 |\n\nother"
    )
    done, calls = start("scenes_study.sh", SEEDS="0 1", BROKEN="eval dense")
    assert done.returncode != 0 and "it broke" in done.stderr
    trained = [run_of(call) for call in calls if call.startswith("dmae-ds train")]
    names = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("random", "mae", "dmae", "g2sd-generic")]
    assert sorted(trained) == sorted(["teacher-seed0", *names])
    for call in calls:
        if "scenes_dmae" in call or "scenes_g2sd_generic" in call:
            assert "teacher.weights=OUT/teacher-seed0 " in f"{call} "
            assert "data.train=OUT/shards/scenes/train" in call
    before = [call for call in calls if "eval" in call and "eval dense" not in call]
    done, calls = start("scenes_study.sh", SEEDS="0 1", JOBS="1")
    assert done.returncode == 0, done.stderr
    assert calls.pop() == "dmae-ds report --results scenes=OUT --out OUT/RESULTS.md"
    assert done.stdout.endswith("| setting | dense k-NN |\n| mae | 12.5 |\n\n")
    evaluated = [call.split()[2:4] for call in before + calls]
    students = [f"OUT/{name}" for name in ("teacher-seed0", *names)]
    assert all(call.startswith("dmae-ds eval ") for call in calls)
    for task in ("dense", "segment", "detect"):
        whole = [run for name, run in evaluated if name == task]
        assert sorted(set(whole)) == sorted(students)
        times = 2 if task == "segment" else 1  # also on frozen features
        assert len(whole) == times * len(students) + 2 * (task != "dense")  # the specific stage, of each seed
    specific = [call for call in calls if "distill.teacher=" in call]
    assert calls[-4:] == specific
    for call, seed, task in zip(specific, (0, 0, 1, 1), ("segment", "detect") * 2, strict=True):
        assert f"distill.teacher=OUT/teacher-seed0/{task}/best.safetensors" in call
        assert f"run.dir=OUT/g2sd-generic-seed{seed}/{task}-specific" in call
        assert "data.val=OUT/shards/scenes/val" in call
    for task in ("dense", "detect-specific"):
        (call,) = start("scenes_study.sh", SEEDS="0 1", TASKS=task, ONLY="mae")[1]
        assert call.startswith("dmae-ds report")
