"""A student from its file; its features compared with single images, the trained module, and two ranks."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from dmae_ds.config.load import read_saved_config
from dmae_ds.data.decode import decode
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.transforms import eval_view
from dmae_ds.evaluate import features
from dmae_ds.evaluate.features import FeatureOptions, extract_features, load_student
from dmae_ds.models.patches import Normalize, patchify
from dmae_ds.objectives.build import build_objective
from tests.messages import refused
from tests.train.conftest import free_port


def _extract(run, accelerator, *, pool="mean", batch_size=4):
    config = read_saved_config(run)
    return extract_features(
        load_student(run),
        ShardSet.open(config.data.val, label="data.val"),
        FeatureOptions.of(config.data, pool=pool, batch_size=batch_size),
        processes=accelerator,
        title="val",
    )


@pytest.fixture
def accelerator(on_the_cpu):
    return Accelerator()


def _images(run):
    """The validation images one by one, [1, 3, H, W] uint8, and their labels."""
    data = read_saved_config(run).data
    reader = SampleReader(ShardSet.open(data.val, label="data.val"))
    for sample in map(reader.read, range(reader.shard_set.num_samples)):
        yield (
            torch.from_numpy(eval_view(decode(sample), img_size=16, crop_pct=data.crop_pct).copy())[None],
            sample.label,
        )


@pytest.mark.parametrize("pool", ["mean", "cls", "patches"])
def test_features_equal_those_of_one_image_at_a_time_in_the_order_of_ids(run, accelerator, pool, capsys):
    data, student = read_saved_config(run).data, load_student(run)
    expected, labels = [], []
    for image, label in _images(run):
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
        pixels = (image / 255 - mean) / std
        with torch.no_grad():
            tokens = student.forward_features(pixels)[0]
        expected.append({"mean": tokens[1:].mean(0), "cls": tokens[0], "patches": tokens[1:]}[pool])
        labels.append(label)
    features, features_labels = _extract(run, accelerator, pool=pool)
    assert capsys.readouterr().err == ""  # in a log file there is no bar
    assert features.dtype == torch.float32 and features_labels.tolist() == labels and set(labels) == {0, 1, 2}
    torch.testing.assert_close(features, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_timm_computes_what_the_trained_module_computed(run, accelerator):
    config = read_saved_config(run)
    trained = build_objective(config)[0].student
    trained.load_state_dict(load_file(run / "student.safetensors"))
    images = torch.cat([image for image, _ in _images(run)])
    with torch.no_grad():
        patches = Normalize(config.data.mean, config.data.std)(patchify(images, 4))
        tokens, _ = trained(patches, torch.arange(16).expand(len(images), -1))
    torch.testing.assert_close(_extract(run, accelerator)[0], tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


_ON_ONE_RANK = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from tests.evaluate.test_features import _extract
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
result = _extract(Path(sys.argv[1]), accelerator)
torch.save(result, Path(sys.argv[1]) / f"features{accelerator.process_index}.pt")
accelerator.end_training()
"""


def test_two_processes_gather_what_one_computes(run, accelerator):
    here = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    common = {
        **os.environ,
        "PYTHONPATH": here,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _ON_ONE_RANK, str(run)], env={**common, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    features, labels = _extract(run, accelerator)
    for rank in "01":
        gathered, gathered_labels = torch.load(run / f"features{rank}.pt")
        assert torch.equal(gathered_labels, labels)
        torch.testing.assert_close(gathered, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "patches"])
def test_rows_of_three_processes_come_back_in_the_order_of_ids(run, accelerator, pool):
    alone, labels = _extract(run, accelerator, pool=pool)
    gathered_rows = []

    def ranks(gather):
        return [
            SimpleNamespace(
                num_processes=3,
                process_index=rank,
                device=torch.device("cpu"),
                is_main_process=False,
                autocast=accelerator.autocast,
                gather=gather,
            )
            for rank in range(3)
        ]

    for rank in ranks(lambda rows: gathered_rows.append(rows) or torch.cat([rows] * 3)):
        _extract(run, rank, pool=pool)
    for which, expected in ((0, alone), (1, labels)):
        gathered = torch.cat(gathered_rows[which::2])
        ordered = _extract(run, ranks(lambda rows, gathered=gathered: gathered)[0], pool=pool)[which]
        torch.testing.assert_close(ordered, expected, rtol=1e-4, atol=1e-5)


def test_a_student_that_is_missing_damaged_or_another_network_is_refused(run):
    path = run / "student.safetensors"
    weights = load_file(path)
    without_bias = {key: value for key, value in weights.items() if key != "norm.bias"}
    for break_it, word in (
        (lambda: save_file(without_bias, path), "norm.bias"),
        (lambda: save_file({**weights, "head.bias": torch.zeros(3)}, path), "head.bias"),
        (lambda: path.write_bytes(np.random.default_rng(0).bytes(99)), "safetensors file"),
        (path.unlink, "not found"),
    ):
        break_it()
        with refused(path, word):
            load_student(run)


@pytest.mark.parametrize(
    ("on_gpu", "precision", "given", "expected"),
    [
        (True, "bf16_autocast", None, {"mixed_precision": "bf16"}),
        (True, "bf16", None, {"mixed_precision": "bf16"}),
        (True, "fp32", None, {"mixed_precision": "no"}),
        (True, "bf16", "no", {}),  # accelerate reads it
        (False, "bf16", None, {}),
    ],
)
def test_on_a_gpu_passes_are_in_the_run_s_precision(monkeypatch, on_gpu, precision, given, expected):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if given is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(features, "Accelerator", lambda **kwargs: kwargs)
    monkeypatch.setattr(features, "read_saved_config", lambda run, **_: SimpleNamespace(precision=precision))
    assert features.start_processes(Path("run")) == expected
