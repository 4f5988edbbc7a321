"""The commands of quickstart and g2sd, with stand-ins for the programs they call."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launch.conftest import LAUNCH, PARTS, run_of


def test_quickstart_trains_a_teacher_and_two_students(start):
    done, calls = start("quickstart.sh", SEED="3")
    assert done.returncode == 0, done.stderr
    assert [run_of(call) for call in calls[:3]] == ["teacher", "dmae", "mae"]
    assert all("--num_gpus 2" in call and "run.seed=3" in call for call in calls[:3])
    assert "teacher.weights=OUT/teacher/student.safetensors" in calls[1]
    assert calls[3:] == [
        "dmae-ds eval knn OUT/teacher",
        "dmae-ds eval knn OUT/dmae",
        "dmae-ds eval knn OUT/mae",
        "dmae-ds report OUT/dmae OUT/mae OUT/teacher",
    ]


def test_quickstart_shows_why_an_evaluation_failed(start):
    done, calls = start("quickstart.sh", BROKEN="eval knn")
    assert done.returncode == 1 and "it broke" in done.stderr
    assert not [call for call in calls if "report" in call]


def test_g2sd_prints_the_accuracy_of_four_classifiers(start):
    done, calls = start("g2sd.sh")
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[-4:]] == [
        "94.5%",
        "94.5%",
        "93.4%",
        "93.4%",
    ]
    specific, deit = (call for call in calls if "digits_g2sd_specific" in call)
    assert "student.weights=OUT/generic" in specific and "student.weights=null" in deit
    done, calls = start("g2sd.sh")
    assert not [call for call in calls if "finetune" in call and "eval" in call]  # they are not repeated


@pytest.mark.parametrize("task, score", [("detect", "31.5"), ("segment", "62.5%")])
def test_g2sd_has_the_same_stages_on_scenes(start, task, score):
    done, calls = start("g2sd.sh", TASK=task)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[-4:]] == [score] * 4
    trained = [run_of(call) for call in calls if " train " in call]
    evaluated = [call.split()[3:] for call in calls if f"eval {task}" in call]
    assert trained == ["teacher", "generic"]
    assert [(words[0], run_of(" ".join(words))) for words in evaluated] == [
        ("OUT/teacher", task),
        ("OUT/generic", task),
        ("OUT/generic", f"{task}-specific"),
        ("OUT/generic", f"{task}-random"),
    ]
    teacher = f"distill.teacher=OUT/teacher/{task}/best.safetensors"
    assert [teacher in words for words in evaluated] == [False, False, True, True]
    assert ["init=random" in words for words in evaluated] == [False, False, False, True]
    for call in calls:
        assert "data.train=OUT/shards/scenes/train" in call and "data.val=OUT/shards/scenes/val" in call
    done, calls = start("g2sd.sh", TASK=task)
    assert not [call for call in calls if "eval" in call]  # they are not repeated


def test_g2sd_refuses_another_task(start):
    done, calls = start("g2sd.sh", TASK="depth")
    assert done.returncode == 2 and "depth" in done.stderr and "detect" in done.stderr
    assert not calls


def test_digits_that_were_cut_off_are_written_again(tmp_path):
    out = tmp_path / "images"
    (tmp_path / "images.tmp" / "train" / "11").mkdir(parents=True)  # of a run that was killed
    command = [sys.executable, LAUNCH / "digits.py", out]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert [len(list((out / part).rglob("*.jpg"))) for part in PARTS] == [1400, 397]
    assert not (out / "train" / "11").exists() and not (tmp_path / "images.tmp").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(out) in done.stderr
    done = subprocess.run([*command, "other"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "OUT" in done.stderr
