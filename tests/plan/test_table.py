"""`dmae-ds plan` as a user sees it: a table, a command that parses, one line for every mistake."""

from __future__ import annotations

import re
import shlex

import pytest

from dmae_ds.cli.main import build_parser, main
from dmae_ds.config.load import load_config
from dmae_ds.plan import geometry, table

TINY = [
    "digits_dmae",
    "data.train=nowhere",
    "teacher.weights=nowhere",
    "teacher.embed_dim=48",
    "teacher.depth=8",
    "teacher.num_heads=3",
    "student.embed_dim=32",
    "student.num_heads=2",
]


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_table_is_complete_and_the_command_parses(capsys):
    code, out, _ = run(capsys, *TINY, "deepspeed=zero3", "--gpus", "4", "--gpu-memory-gib", "16", "--all")
    assert code == 0 and "predicted; never measured on a GPU" in out
    rows = [line.split() for line in out.splitlines() if re.match(r"(replicated|pipeline|zero3) ", line)]
    assert len(rows) == 16 and {row[1] for row in rows if row[0] == "pipeline"} == {"P=2", "P=4"}
    assert rows[0][1] == "zero3"  # the recipe's own DeepSpeed file comes first
    assert "1,281,167 images (ImageNet-1k's" in out
    command = next(line for line in out.splitlines() if line.startswith("deepspeed "))
    arguments = shlex.split(command.partition("--module dmae_ds ")[2])
    args = build_parser().parse_args(arguments)
    config = load_config(args.recipe, args.overrides)
    assert config.teacher.placement == "replicated" and config.student.embed_dim == 32
    assert command.startswith("deepspeed -q --num_gpus 4 ")
    assert sum("deepspeed=" in word for word in arguments) == 1


def test_a_micro_batch_that_fits_is_found_and_set_by_the_command(capsys):
    _, out, _ = run(
        capsys,
        *TINY,
        "optim.global_batch=4096",
        "optim.micro_batch=1024",
        "--gpus",
        "2",
        "--gpu-memory-gib",
        "1.8",
    )
    assert "nothing fits with optim.micro_batch=1024" in out
    command = next(line for line in out.splitlines() if line.startswith("deepspeed "))
    micro_batch = int(re.search(r"optim.micro_batch=(\d+)", command)[1])
    assert micro_batch < 1024 and "optim.micro_batch=1024" not in command
    assert f"2 x {micro_batch} x {2048 // micro_batch} accumulated" in out


def test_where_nothing_fits_the_least_memory_is_named(capsys):
    code, out, _ = run(capsys, *TINY, "--gpus", "2", "--gpu-memory-gib", "0.5")
    assert code == 0 and "deepspeed -q" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("nothing fits")]
    assert "optim.micro_batch=1:" in line and "GiB a rank" in line


def test_an_objective_over_the_whole_batch_is_not_cut(capsys):
    code, out, _ = run(
        capsys, "digits_mocov3", "data.train=nowhere", "--gpus", "2", "--gpu-memory-gib", "0.5"
    )
    assert code == 0 and "deepspeed -q" not in out
    assert "optim.micro_batch=32:" in out and "objective mocov3" in out


def test_without_a_teacher_only_the_student_is_planned_and_images_may_be_given(capsys):
    code, out, _ = run(
        capsys, "digits_mae", "data.train=nowhere", "--gpus", "16", "--gpus-per-node", "8", "--images", "6400"
    )
    assert code == 0 and "no teacher" in out
    assert "pipeline" not in out and "teacher.placement" not in out
    assert "6,400 images (--images); " in out and "--hostfile" in out


def test_seconds_come_with_a_band_and_are_compared_with_what_feeds_them(capsys):
    for rate, storage, workers in (("1", "1e-9", 2), ("1e9", "1e9", 2)):
        options = ["--gpus", "2", "--worker-images-s", rate, "--storage-gb-s", storage]
        _, out, _ = run(capsys, *TINY, "data.num_workers=1", *options)
        (band,) = [line for line in out.splitlines() if line.startswith("at 12% / 25% / 35% / 45%")]
        seconds, images, hours, gpu_hours = [
            [float(number.replace(",", "")) for number in part.split(" ")[::2]]
            for part in re.findall(r"[\d.,]+(?: / [\d.,]+){3}", band)
        ]
        assert seconds == sorted(seconds, reverse=True) and images == sorted(images)
        assert all(2 * one == pytest.approx(all_, abs=1) for one, all_ in zip(hours, gpu_hours, strict=True))
        (loader,) = [line for line in out.splitlines() if line.startswith("loader: ")]
        assert f"{workers} workers" in loader and f"{float(rate):g} images/s" in loader
        assert ("data.num_workers=" in loader) == (rate == "1")
        (read,) = [line for line in out.splitlines() if line.startswith("storage: ")]
        assert ("the limit" in read) == (rate == "1") and "108 kB" in read


def test_few_rows_are_shown_the_best_first_and_all_on_request(capsys):
    few, every = (
        [line for line in out.splitlines() if re.match(r"(replicated|pipeline|zero3) ", line)]
        for _, out, _ in (
            run(capsys, *TINY, "--gpus", "4", "--efficiency", ".3", *more) for more in ([], ["--all"])
        )
    )
    assert len(few) == 5 and len(every) == 16
    columns = [row.replace(" P=", "P=").split() for row in few]
    best, *others = [float(row[-5]) for row in columns]
    assert others == sorted(others) and best <= 1.1 * others[0]


def test_where_torch_cannot_fake_cuda_the_plan_says_so(capsys, monkeypatch):
    code, before, _ = run(capsys, *TINY, "--gpus", "2")
    for module in (geometry, table):
        monkeypatch.setattr(module, "obstacle", lambda: "no guard for CUDA")
    assert code == 0 and "CPU's kernels" not in before
    code, out, _ = run(capsys, *TINY, "--gpus", "2")
    assert code == 0 and "no guard for CUDA" in out and "deepspeed -q --num_gpus 2" in out


def test_images_are_counted_from_the_manifest(capsys, digits):
    _, out, _ = run(capsys, "digits_mae", f"data.train={digits / 'train'}", "--gpus", "2")
    assert f"1,400 images (the manifest of {digits / 'train'})" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([*TINY, "--gpus", "12", "--gpus-per-node", "8"], ["--gpus 12", "--gpus-per-node 8"]),
        ([*TINY, "--gpus", "0"], ["--gpus", 0]),
        ([*TINY, "--gpu-memory-gib", "-1"], ["--gpu-memory-gib", -1]),
        ([*TINY, "--tflops", "0"], ["--tflops", 0]),
        ([*TINY, "--fp32-tflops", "-1"], ["--fp32-tflops", -1]),
        ([*TINY, "--worker-images-s", "0"], ["--worker-images-s", 0]),
        ([*TINY, "--storage-gb-s", "0"], ["--storage-gb-s", 0]),
        ([*TINY, "--efficiency", "35"], ["--efficiency", 35]),
        ([*TINY, "--gpus", "12"], ["--gpus 12", "--gpus-per-node 8"]),
        ([*TINY, "--gpu", "h10"], ["h10", "h100?", "l40s", "--tflops"]),
        ([*TINY, "precision=bf16_autocast", "--gpu", "v100"], ["bf16", "precision=fp16"]),
        ([*TINY, "--measured", "no.json"], ["--measured no.json"]),
        ([*TINY, "--link-gbps", "0"], ["--link-gbps", 0]),
        (["digits_mae", "--images", "0"], ["--images", 0]),
        ([*TINY, "--gpus", "3"], ["optim.global_batch 64", 3]),
        (["no_such_recipe"], ["no_such_recipe", "digits_mae"]),
        ([*TINY, "student.depht=2"], ["student.depht", "student.depth?"]),
        ([*TINY, "teacher.patch_size=8"], ["patch"]),
        ([*TINY, "deepspeed=zero9"], ["zero9", "zero3"]),
        ([*TINY, "objective.name=mae"], ["objective mae", "teacher"]),
        ([*TINY, "compile=true", "deepspeed=zero3"], ["compile", "zero3"]),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    (line,) = err.strip().splitlines()
    assert code == 2 and out == ""
    assert [word for word in map(str, words) if word not in line] == []
