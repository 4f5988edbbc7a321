"""Teachers in `dmae-ds train`: wrong files are refused; other grids and standardised features work."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmae_ds.config.load import load_config
from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.models.patches import Normalize
from dmae_ds.tools.teacher_stats import _batches, write_stats
from dmae_ds.train.networks import build_objective, build_teacher, teachers_in, verify_named
from dmae_ds.train.summary import describe_teacher
from tests.messages import refused
from tests.train.conftest import command, environment, losses, run

# Several recipes in one process, because imports take longer than the refusals.
TRY_ALL = """
import contextlib, io, json, sys
from dmae_ds.cli.main import main
from dmae_ds.objectives import dmae
wanted = json.loads(sys.stdin.read())
init = dmae.Dmae.__init__
results = {}
for name, (arguments, taps) in wanted.items():
    def with_taps(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.taps = tuple(taps) or self.taps  # an objective that asks for something else
    dmae.Dmae.__init__ = with_taps
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main(arguments)
    results[name] = (code, stderr.getvalue())
print("RESULTS" + json.dumps(results))
"""


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def refusals(tiny_recipe, tmp_path_factory):
    """{name: (exit code, stderr)} for every way in which a teacher's file can be wrong."""
    folder = tmp_path_factory.mktemp("broken")
    tensors = load_file(
        next(word for word in tiny_recipe if word.startswith("teacher.weights=")).partition("=")[2]
    )
    wanted = {}

    def case(name, content, *, suffix=".safetensors", taps=(), format="timm", **more):
        path = folder / f"{name}{suffix}"
        if suffix == ".safetensors":
            save_file(content, path)
        elif content is not None:
            torch.save(content, path)
        wanted[name] = (
            [
                "train",
                *tiny_recipe,
                f"run.dir={folder / 'run'}",
                f"teacher.weights={path}",
                f"teacher.format={format}",
                *more.get("extra", []),
            ],
            taps,
        )
        return path

    without = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.mlp.fc1.weight"}
    case("removed", without)
    case(
        "transposed",
        {**tensors, "blocks.1.mlp.fc1.weight": tensors["blocks.1.mlp.fc1.weight"].T.contiguous()},
    )
    case("renamed", {**without, "blocks.1.mlp.fc.weight": tensors["blocks.1.mlp.fc1.weight"]})
    case("encoder_only", tensors, taps=["decoder/4"])
    whole = case("truncated", tensors)
    whole.write_bytes(whole.read_bytes()[:-1000])
    path = case("truncated_pth", tensors, suffix=".pth")
    path.write_bytes(path.read_bytes()[:-1000])
    case("code", {"model": tensors, "extra": Evil(folder / "marker")}, suffix=".pth", format="mae")
    case("other_format", tensors, format="hf")
    case("auto", without, format="auto")
    done = subprocess.run(
        [sys.executable, "-c", TRY_ALL],
        input=json.dumps(wanted),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS"))
    found = json.loads(line.removeprefix("RESULTS"))
    assert not (folder / "run").exists(), f"a refused run left something behind: {found}"
    assert not (folder / "marker").exists(), "code in a pickle was run"
    return found


@pytest.mark.parametrize(
    "name, words",
    [
        ("removed", ["blocks.1.mlp.fc1.weight"]),
        ("transposed", ["blocks.1.mlp.fc1.weight", "[48, 192]", "[192, 48]"]),
        ("renamed", ["blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc.weight"]),
        ("encoder_only", ["encoder", "decoder block 4"]),
        ("truncated", ["truncated.safetensors"]),
        ("truncated_pth", ["truncated_pth.pth"]),
        ("code", ["code.pth"]),
        ("other_format", ["teacher.format=timm"]),
        ("auto", ["timm", "blocks.1.mlp.fc1.weight"]),
    ],
)
def test_a_wrong_file_is_refused(refusals, name, words):
    code, stderr = refusals[name]
    assert code == 2
    lines = [line for line in stderr.strip().splitlines() if "WARNING" not in line]
    assert len(lines) == 1 and lines[0].startswith("dmae-ds: error: "), stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def measured(tiny_recipe, tmp_path_factory):
    """A recipe with statistics, patches of 5 px (student) and 4 px (teacher, which sees all of them)."""
    stats = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    recipe = [
        *tiny_recipe,
        "student.img_size=40",
        "student.patch_size=5",
        "teacher.sees=all",
        f"teacher.stats={stats}",
        "teacher.standardize=zscore",
    ]
    with redirect_stderr(io.StringIO()) as printed:
        text = write_stats(load_config(recipe[0], [*recipe[1:], "run.dir=unused"]), num_images=100, out=stats)
    assert "100 images" in text and printed.getvalue() == ""
    return recipe


def test_features_are_standardised_by_the_measured_statistics(measured):
    config = load_config(measured[0], [*measured[1:], "run.dir=unused"])
    objective, shape = build_objective(config)
    teachers = {
        kind: verified(with_kind(config, kind), shape, objective.taps) for kind in ("none", "zscore", "phi_s")
    }
    images = torch.randint(
        0, 256, (64, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    batch = objective.prepare(
        Batch(images, torch.rand(64, 64, generator=torch.Generator().manual_seed(1))),
        Normalize(config.data.mean, config.data.std),
    )
    features = {kind: teacher.features(batch)["block/3"] for kind, teacher in teachers.items()}
    stats = load_file(config.teacher.stats)
    expected = (features["none"] - stats["block/3.mean"]) / stats["block/3.covariance"].diagonal().sqrt()
    torch.testing.assert_close(features["zscore"], expected, rtol=1e-4, atol=1e-4)
    # PHI-S is a rotation and one scale: squared distances from the mean keep their ratio to the raw ones.
    ratio = features["phi_s"].square().sum(-1) / (features["none"] - stats["block/3.mean"]).square().sum(-1)
    assert ratio.std() < 1e-3 * ratio.mean()
    torch.testing.assert_close(
        ratio.mean(), 1 / stats["block/3.covariance"].diagonal().mean(), rtol=1e-3, atol=0
    )


def verified(config, shape, taps):
    teacher = build_teacher(config, shape, taps, torch.device("cpu"))
    for name, one in teachers_in(teacher).items():
        verify_named(one, config.named_teachers()[name])
    return teacher


def with_kind(config, kind):
    teacher = config.teacher.model_dump() | {"standardize": kind}
    if kind == "none":
        teacher["stats"] = None
    return RunConfig.model_validate({**config.model_dump(), "teacher": teacher})


@pytest.mark.slow
def test_a_larger_crop_all_patches_and_z_scores_train(measured, tmp_path):
    recipe = [
        *measured,
        f"run.dir={tmp_path / 'run'}",
        f"optim.epochs={5 * 16 / 1400}",
        "optim.warmup_epochs=0.01",
    ]
    done = run(command(["train", *recipe], ranks=2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("8x8 patches", "40 px", "sees all patches", "zscore", "block 4, norm", "compute"):
        assert words in done.stderr
    assert "UNTRAINED" in done.stderr  # it has random weights
    assert len(losses(tmp_path / "run")) == 5


@pytest.mark.parametrize("micro_batch, sizes", [(8, [8, 8, 4]), (None, [20]), (32, [20])])
def test_statistics_are_taken_in_micro_batches(tiny_recipe, monkeypatch, micro_batch, sizes):
    config = load_config(tiny_recipe[0], [*tiny_recipe[1:], "run.dir=unused"])
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"micro_batch": micro_batch})})
    objective, _ = build_objective(config)
    shards = ShardSet.open(config.data.train, label="data.train", access=Access.of(config.data))
    loaded, first = [], Batch.first
    monkeypatch.setattr(Batch, "first", lambda batch, n: loaded.append(len(batch.images)) or first(batch, n))
    batches = _batches(config, shards, objective, num_images=20, device=torch.device("cpu"))
    assert [len(batch.images) for batch in batches] == sizes and set(loaded) == {sizes[0]}


def test_statistics_are_written_next_to_the_weights_unless_a_file_is_named(tiny_recipe, tmp_path):
    weights = next(word for word in tiny_recipe if word.startswith("teacher.weights=")).partition("=")[2]
    shutil.copy(weights, tmp_path / "teacher.safetensors")
    overrides = [*tiny_recipe[1:], "run.dir=unused", f"teacher.weights={tmp_path / 'teacher.safetensors'}"]
    config = load_config(tiny_recipe[0], overrides)
    for out, name in (
        (None, "teacher.safetensors.stats.safetensors"),
        (tmp_path / "named.safetensors", "named.safetensors"),
    ):
        assert name in write_stats(config, num_images=8, out=out) and (tmp_path / name).is_file()
    assert len(list(tmp_path.iterdir())) == 3
    part = load_config(tiny_recipe[0], [*overrides, "data.share=0.01"])
    assert "over 14 images" in write_stats(part, num_images=100, out=tmp_path / "part.safetensors")


def two_teachers(tiny_recipe, tmp_path) -> list[str]:
    """A recipe with two teachers of other grids of pixels, whose features are standardised."""
    weights = next(word for word in tiny_recipe if word.startswith("teacher.weights=")).partition("=")[2]
    shutil.copy(weights, tmp_path / "b.safetensors")
    shape = "name: vit_tiny_patch16_224, img_size: 32, patch_size: 4, embed_dim: 48, depth: 4, num_heads: 3"
    stats = f"standardize: zscore, stats: {tmp_path}/stats"
    teachers = [
        f"a: {{{shape}, weights: {weights}, {stats}/a.stats.safetensors, sees: all}}",
        f"b: {{{shape}, weights: {tmp_path}/b.safetensors, {stats}/b.stats.safetensors, mean: [0, 0, 0], "
        "std: [1, 1, 1]}",
    ]
    kept = [word for word in tiny_recipe[1:] if not word.startswith("teacher.")]
    targets = '[{tap: "a:tokens"}, {tap: "b:block/3", student: tokens, where: patches}]'
    own = ["teacher=null", f"teachers={{{', '.join(teachers)}}}", f"objective.targets={targets}"]
    return ["digits_features", *kept, *own, f"run.dir={tmp_path / 'run'}"]


def test_several_teachers_are_measured_in_one_pass_checked_and_described(tiny_recipe, tmp_path):
    recipe = two_teachers(tiny_recipe, tmp_path)
    config = load_config(recipe[0], recipe[1:])
    objective, shapes = build_objective(config)
    with refused("teachers.a", "a.stats.safetensors", "dmae-ds teacher stats"):
        verified(config, shapes, objective.taps)
    out = tmp_path / "stats"
    with redirect_stderr(io.StringIO()):
        lines = write_stats(config, num_images=64, out=out).splitlines()
    assert ["teachers.a.stats" in lines[0], "teachers.b.stats" in lines[1]] == [True, True]
    assert {path.name for path in out.iterdir()} == {"a.stats.safetensors", "b.stats.safetensors"}
    assert set(load_file(out / "b.stats.safetensors")) == {"block/3.mean", "block/3.covariance"}
    teacher = verified(config, shapes, objective.taps)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    batch = objective.prepare(Batch(images, torch.rand(16, 64)), Normalize(config.data.mean, config.data.std))
    ((_, _, features),) = teacher.stream([(None, batch)])
    assert {tap: tuple(each.shape) for tap, each in features.items()} == {
        "a:tokens": (16, 65, 48),
        "b:block/3": (16, 65, 48),
    }
    for name, tap in (("a", "tokens"), ("b", "block/3")):  # as each teacher alone
        alone = teacher.teachers[name]
        assert torch.equal(alone.features(batch)[tap], features[f"{name}:{tap}"]) and alone.target is not None
    rows = describe_teacher(config, objective, teacher)
    assert "a: " in rows["teacher"] and "b: " in rows["teacher"] and "b: pixels" in rows["checked"]
    assert len(teacher.networks()) == 2 and teacher.where() == ""
    with refused("same weights", "--out"):
        write_stats(config.with_teachers(dict.fromkeys("ab", config.teachers["a"])), num_images=8, out=None)
    with refused(out / "a.stats.safetensors", "folder"):
        write_stats(config, num_images=8, out=out / "a.stats.safetensors")


def test_statistics_of_other_weights_are_refused(measured, tiny_recipe, tmp_path):
    weights = next(word for word in tiny_recipe if word.startswith("teacher.weights=")).partition("=")[2]
    save_file(
        {name: tensor * 1.5 for name, tensor in load_file(weights).items()}, tmp_path / "other.safetensors"
    )
    config = load_config(
        measured[0], [*measured[1:], "run.dir=unused", f"teacher.weights={tmp_path / 'other.safetensors'}"]
    )
    objective, shape = build_objective(config)
    with refused("fingerprint", "stats.safetensors"):
        verified(config, shape, objective.taps)
    visible = load_config(measured[0], [*measured[1:], "run.dir=unused", "teacher.sees=visible"])
    with refused("teacher.sees=all", "visible"):
        verified(visible, shape, objective.taps)
