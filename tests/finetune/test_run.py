"""`dmae-ds eval finetune` and `eval linear` in this process: what they write, resume and refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmae_ds.data import shards as shard_format
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.evaluate.results import read_results
from dmae_ds.finetune import checkpoint, loop, network, record
from dmae_ds.finetune.augment import Prepare
from dmae_ds.finetune.run import evaluate
from dmae_ds.train.checkpoint import run_lock
from tests.evaluate.conftest import STEP, make_shards
from tests.finetune.conftest import PLAIN, finetune
from tests.messages import refused

LINEAR = [
    "optim.global_batch=20",
    "optim.base_lr=100",
    "optim.epochs=40",
    "optim.warmup_epochs=0",
    "data.num_workers=0",
]
LOGITS = ["distill.method=logits", "distill.teacher=x", "distill.temperature=1"]


def rows(out):
    return [
        {name: value for name, value in json.loads(line).items() if name != "seconds"}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def assert_same_outcome(one, other):
    for name in ("last.safetensors", "best.safetensors"):
        expected, actual = load_file(one / name), load_file(other / name)
        assert expected.keys() == actual.keys(), name
        assert all(torch.equal(expected[key], actual[key]) for key in expected), name
    assert rows(one) == rows(other)


def test_it_learns_and_leaves_files_that_timm_loads(run, capsys):
    result = finetune(run, *PLAIN, "optim.epochs=6", "optim.global_batch=10")
    out = run / "finetune_mae"
    assert result["scores"] == {"top1": 100.0}  # red, green and blue are easy to separate
    assert "augment.mixup 0" in result["settings"]["changed"] and "num_w" not in result["settings"]["changed"]
    assert "finetune top-1 100.0%" in capsys.readouterr().out
    assert read_results(run) == [{**result, "when": read_results(run)[0]["when"]}]
    expected = {
        "metric": "finetune",
        "labels": "all",
        "subset_seed": None,
        "step": STEP,
        "num_train": 20,
        "num_val": 11,
        "device": "cpu",
        "world_size": 1,
    }
    assert {name: result[name] for name in expected} == expected
    assert [row["epoch"] for row in rows(out)] == [1, 2, 3, 4, 5, 6] and rows(out)[-1]["top1"] == 100.0
    assert rows(out)[0]["loss"] > rows(out)[-1]["loss"] > 0
    with safe_open(out / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    alone = timm.create_model(
        metadata["timm_name"],
        **json.loads(metadata["timm_overrides"]),
        **json.loads(metadata["classifier"])["keys"],
    )
    alone.load_state_dict(load_file(out / "best.safetensors"), strict=True)
    assert not list(out.glob("*.tmp"))


def test_a_linear_probe_trains_only_its_head(run, monkeypatch):
    clipped = []
    monkeypatch.setattr(
        "dmae_ds.finetune.run.train",
        lambda *args, **more: clipped.append(args[3].clip_grad) or loop.train(*args, **more),
    )
    result = evaluate("linear", str(run), recipe="linear_mae", overrides=[*LINEAR, "pool=mean"])
    assert result["metric"] == "linear" and result["scores"]["top1"] > 90
    kept, student = load_file(run / "linear_mae" / "last.safetensors"), load_file(run / "student.safetensors")
    assert all(torch.equal(kept[name], student[name]) for name in student)
    assert set(kept) - set(student) == {"head.weight", "head.bias"} and clipped == [0.0]


# Write 1 is config.yaml; 2 to 5 are best, last, metrics and resume of the first epoch; and so on.
@pytest.mark.parametrize(
    "overrides, writes",
    [
        ([], (2, 5, 6)),
        (
            ["ema=0.5", "optim.micro_batch=4", "augment.mixup=0", "augment.cutmix=0", "augment.erase=0"],
            (4, 8),
        ),
    ],
    ids=["mixed", "averaged, accumulated, not mixed"],
)
def test_killed_at_a_write_and_resumed_it_ends_bit_for_bit_the_same(
    run, tmp_path, monkeypatch, overrides, writes
):
    """The disk does not change between writes, so a kill between two of them equals a kill at the second."""
    finetune(run, *overrides, f"run.dir={tmp_path / 'whole'}")
    plain = shard_format.replacing
    for fatal in writes:
        out, count = tmp_path / f"killed{fatal}", 0

        def dies(path, fatal=fatal):
            nonlocal count
            count += 1
            if count == fatal:
                raise KeyboardInterrupt
            return plain(path)

        for module in (record, network, checkpoint):
            monkeypatch.setattr(module, "replacing", dies)
        with pytest.raises(KeyboardInterrupt):
            finetune(run, *overrides, f"run.dir={out}")
        for module in (record, network, checkpoint):
            monkeypatch.setattr(module, "replacing", plain)
        AcceleratorState._reset_state(reset_partial_state=True)
        finetune(run, *overrides, f"run.dir={out}", resume="auto")
        assert_same_outcome(tmp_path / "whole", out)


def test_resuming_a_finished_evaluation_repeats_its_result(run):
    first = finetune(run)
    before = (run / "finetune_mae" / "last.safetensors").stat().st_mtime_ns
    again = finetune(run, resume="auto")
    assert again == first and (run / "finetune_mae" / "last.safetensors").stat().st_mtime_ns == before
    assert len(read_results(run)) == 1
    AcceleratorState._reset_state(reset_partial_state=True)
    student = load_file(run / "student.safetensors")
    student["norm.bias"] += 1
    with safe_open(run / "student.safetensors", "pt") as file:
        save_file(student, run / "student.safetensors", file.metadata())
    with refused("weights", "run.dir"):
        finetune(run, resume="auto")
    saved = torch.load(run / "finetune_mae" / "resume.pt", weights_only=True)
    saved["identity"] = {key: value for key, value in saved["identity"].items() if "crc32" not in key}
    torch.save(saved, run / "finetune_mae" / "resume.pt")  # as earlier versions wrote it
    assert finetune(run, resume="auto")["scores"] == first["scores"]


def test_workers_change_nothing(run, tmp_path):
    for workers in (0, 2):
        finetune(run, f"data.num_workers={workers}", f"run.dir={tmp_path / str(workers)}")
    assert_same_outcome(tmp_path / "0", tmp_path / "2")


def test_accumulated_micro_batches_are_one_batch(run, tmp_path):
    """Without mixing, which pairs images of a micro-batch, and without draws in the network."""
    for micro in (8, 4):
        finetune(
            run,
            *PLAIN,
            "optim.base_lr=1e-3",
            "augment.erase=0.25",
            f"optim.micro_batch={micro}",
            f"run.dir={tmp_path / str(micro)}",
        )
    expected, actual = (load_file(tmp_path / name / "last.safetensors") for name in ("8", "4"))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


def test_only_the_drawn_labels_are_trained_on(run, monkeypatch):
    seen = set()
    plain = Prepare.__call__
    monkeypatch.setattr(
        Prepare,
        "__call__",
        lambda self, batch, **place: seen.update(batch.sample_ids.tolist()) or plain(self, batch, **place),
    )
    result = finetune(run, labels="2-shot", subset_seed=3)
    assert result["num_train"] == 6 and result["labels"] == "2-shot" and result["subset_seed"] == 3
    assert len(seen) == 6 and (run / "finetune_mae-2-shot-seed3" / "last.safetensors").exists()
    assert len((run / "subsets" / "2-shot-seed3.txt").read_text().splitlines()) == 7


def test_a_weights_file_requires_data_and_a_folder(run, tmp_path, shards):
    file = tmp_path / "copy.safetensors"
    shutil.copy(run / "student.safetensors", file)
    data = [f"data.train={shards[0]}", f"data.val={shards[1]}"]
    geometry = [
        f"network.{name}={value}"
        for name, value in (
            ("name", "vit_tiny_patch16_224"),
            ("img_size", 16),
            ("patch_size", 4),
            ("embed_dim", 24),
            ("depth", 2),
            ("num_heads", 2),
        )
    ]
    with pytest.raises(UserError) as error:  # one line per missing key
        finetune(file, *data)
    assert all(key in str(error.value) for key in ("run.dir", "network.name"))
    assert finetune(file, *data, *geometry, f"run.dir={tmp_path / 'out'}")["step"] == STEP
    assert read_results(tmp_path / "out")[0]["metric"] == "finetune"
    with refused(tmp_path / "nothing.pth", "run folder", "weights file"):
        finetune(tmp_path / "nothing.pth")


def test_mistakes_are_refused_before_anything_is_written(run, tmp_path):
    gone = tmp_path / "gone.safetensors"
    alone = make_shards(tmp_path / "alone", num=9, seed=3, classes=["all"], labels=0)
    for overrides, options, words in (
        (
            ["optim.global_batch=9", "optim.micro_batch=2"],
            {},
            ("optim.micro_batch 2", "optim.global_batch 9"),
        ),
        (["optim.global_batch=7"], {}, ("optim.micro_batch", 7, "odd", "augment.mixup=0")),
        (["optim.layer_dekay=1"], {}, ("optim.layer_dekay", "optim.layer_decay")),
        (["augment.rand_augment=random"], {}, ("augment.rand_augment", "random", "timm")),
        ([f"data.train={alone}"], {}, ("data.train", alone, "1 class")),
        (["data.block=2"], {"labels": "2-shot"}, ("data.block 2", "data.block=1")),
        ([], {"labels": "1000-shot"}, ("1000-shot", "class")),
        ([], {"labels": "some"}, ("labels", "some", "10%", "5-shot")),
        (["distill.method=deit_hard", "distill.teacher=x"], {}, ("distill.method deit_hard", "pool=cls")),
        (["distill.method=logits", "distill.teacher=x"], {}, ("distill.method logits", "temperature None")),
        (["distill.method=features", f"distill.teacher={gone}"], {}, ("distill.teacher", gone)),
        (["distill.method=crd", "distill.teacher=x"], {}, ("distill.method crd", "augment.mixup=0")),
        (["distill.srrl.logit_weight=2", *LOGITS], {}, ("distill.srrl", "distill.method srrl", "logits")),
        (
            ["distill.method=srrl", "distill.teacher=x", "optim.global_batch=1", *PLAIN],
            {},
            ("distill.method srrl", "optim.micro_batch"),
        ),
        (
            ["distill.method=features", "distill.teacher=x", "distill.pool=cls"],
            {},
            ("distill.pool", "distill.name"),
        ),
        (["weights=other.pth"], {}, ("weights", "other.pth", run)),
        (["data.repeat=2"], {}, ("data.repeat", 2)),
        (["precision=fp64"], {}, ("precision", "fp64", "fp32", "bf16")),
    ):
        with refused(*words):
            finetune(run, *overrides, **options)
        AcceleratorState._reset_state(reset_partial_state=True)
    with refused("optim.micro_batch", 2):
        evaluate("linear", str(run), recipe="linear_mae", overrides=[*LINEAR, "optim.micro_batch=1"])
    # The corrected command may start.
    assert not list(run.glob("*_mae*")) and not (run / "results.jsonl").exists()


def test_an_evaluation_is_neither_overwritten_nor_continued_as_another(run, monkeypatch):
    finetune(run)
    with refused(run / "finetune_mae", "--resume auto", "run.dir"):
        finetune(run)
    with refused("optim.base_lr", 0.2, 0.4):
        finetune(run, "optim.base_lr=0.4", resume="auto")
    (run / "finetune_mae" / "resume.pt").write_bytes(b"half")
    with refused(run / "finetune_mae" / "resume.pt", "delete it"):
        finetune(run, resume="auto")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with refused("--mixed_precision fp16", "precision fp32"):
        finetune(run, f"run.dir={run / 'other'}")


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_second_job_in_the_same_folder_is_refused(run, monkeypatch, resume):
    monkeypatch.setattr(run_lock, "WAIT_S", 0.1)
    out = run / "finetune_mae"
    out.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-uc", hold, str(out / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with refused(out, "in use"):
            finetune(run, resume=resume)
        other.kill()
    assert [path.name for path in out.iterdir()] == ["lock"]


def test_a_loss_that_is_not_finite_ends_the_run(run):
    with refused("finite", "optim.base_lr", error=RunFailed):
        finetune(run, *PLAIN, "optim.base_lr=1e30")
    assert not (run / "results.jsonl").exists()


def test_weights_that_the_last_step_broke_are_not_saved(run, monkeypatch):
    """The loss before it was finite."""
    take_step = loop.take_step

    def break_a_weight(model, optimizer, *args, **kwargs):
        result = take_step(model, optimizer, *args, **kwargs)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].view(-1)[0] = float("nan")
        return result

    monkeypatch.setattr(loop, "take_step", break_a_weight)
    with refused("weights", "step 1", "--resume auto", "optim.base_lr", error=RunFailed):
        finetune(run, *PLAIN, "optim.global_batch=20", "optim.epochs=1")
    assert not (run / "results.jsonl").exists() and not list((run / "finetune_mae").glob("*.safetensors"))


def test_an_evaluation_in_bf16_continues_in_fp32(run):
    """The way on that the message of a loss that is not finite names."""
    finetune(run, *PLAIN, "precision=bf16", "optim.epochs=1")
    AcceleratorState._reset_state(reset_partial_state=True)
    result = finetune(run, *PLAIN, "precision=fp32", "optim.epochs=1", resume="auto")
    assert result["settings"]["precision"] == "fp32"


def test_an_evaluation_in_which_nothing_can_be_learned_is_refused(run):
    with refused("optim.global_batch 80", "1 step", "optim.warmup_epochs"):
        finetune(run, "optim.global_batch=80", "optim.warmup_epochs=1")


def test_bf16_trains_with_autocast_and_saves_fp32(run):
    assert (
        finetune(run, *PLAIN, "optim.epochs=6", "optim.global_batch=10", "precision=bf16")["scores"]["top1"]
        > 90
    )
    assert {tensor.dtype for tensor in load_file(run / "finetune_mae" / "last.safetensors").values()} == {
        torch.float32
    }
