"""A small dense set in memory, a network, and processes: what `eval dense` computes with, without files."""

from types import SimpleNamespace

import numpy as np
import timm
import torch

from dmae_ds.data.dense import DenseSample
from dmae_ds.evaluate.dense_features import DenseNetwork, DenseOptions

NO_CLASS = 255
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class MemorySet:
    """Images tinted by their class, block by block; sizes [(height, width), ...] may be odd."""

    ignore_index, fingerprint = NO_CLASS, "f" * 64
    shard_set = SimpleNamespace(folder="memory")

    def __init__(self, sizes, *, num_classes=3, seed=0, empty=(), used=None):
        rng = np.random.default_rng(seed)
        self.classes = [f"class {number}" for number in range(num_classes)]
        self.samples = []
        for number, (height, width) in enumerate(sizes):
            blocks = rng.integers(0, used or num_classes, (-(-height // 5), -(-width // 5)))
            label_map = np.kron(blocks, np.ones((5, 5), int))[:height, :width]
            image = rng.integers(0, 90, (3, height, width))
            for which in range(num_classes):
                image[which % 3][label_map == which] += 60 + 40 * (which // 3)
            label_map[rng.random(label_map.shape) < 0.1] = NO_CLASS
            if number in empty:
                label_map[:] = NO_CLASS
            tensors = torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(label_map).long()
            self.samples.append(DenseSample(f"{number:09d}", *tensors))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, number):
        return self.samples[number]


class OneProcess:
    """The only process, on the CPU; or one of several whose tensors are joined by `exchange`."""

    num_processes, process_index, is_main_process = 1, 0, True
    device, mixed_precision = torch.device("cpu"), "no"

    def autocast(self):
        return torch.no_grad()

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor):
        return tensor


def make_network(*, img_size=16, patch_size=4, seed=0, **kwargs):
    """A ViT of width 24 with random weights."""
    torch.manual_seed(seed)
    shape = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model(
        kwargs.pop("name", "vit_tiny_patch16_224"),
        img_size=img_size,
        patch_size=patch_size,
        **shape,
        **kwargs,
    )
    return DenseNetwork(vit)


def make_options(**kwargs):
    """No resizing, windows of 12 px every 8, three images a batch."""
    kwargs = {"size": 0, "window": 12, "stride": 8, "batch_size": 3, "num_workers": 0} | kwargs
    return DenseOptions(mean=MEAN, std=STD, **kwargs)
