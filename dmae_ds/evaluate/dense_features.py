"""Patch features of images of any size, for `dmae-ds eval dense`, the same on any number of ranks.

An image is resized (its short side), cut into windows, and each window is padded to whole patches. Images are
embedded in chunks of consecutive ids, and a chunk is always embedded by one rank alone: so the composition of
every pass, and with it every bit of a feature, does not depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2.functional import resize

from dmae_ds.config.data import DataConfig
from dmae_ds.data.dense import DenseSample, DenseSet
from dmae_ds.data.loader import iterate_numbered
from dmae_ds.data.shards import ShardError
from dmae_ds.errors import UserError
from dmae_ds.evaluate.features import Processes
from dmae_ds.evaluate.windows import Place, window_places
from dmae_ds.models.patches import Normalize
from dmae_ds.models.positions import stretch_positions
from dmae_ds.output.progress import LINE_EVERY_S, Progress

PATCHES_OF_WINDOW = 32  # on a side: 512 px of 16 px patches, as published for ADE20K
STRIDE = 341 / 512  # of the window


@dataclass(frozen=True)
class DenseOptions:
    """How images become patch features.

    size: px of an image's short side, 0: as stored; window, stride: px; batch_size: images of a chunk and
    windows of a pass; mean, std, num_workers: as in DataConfig
    """

    size: int
    window: int
    stride: int
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_workers: int

    @classmethod
    def of(
        cls,
        data: DataConfig,
        *,
        patch_size: int,
        batch_size: int,
        size: int | None = None,
        window: int | None = None,
        stride: int | None = None,
    ) -> DenseOptions:
        """Fill in what is None: a window of 32 x 32 patches, a stride of 2/3, images as large as a window.

        Raises UserError for numbers out of range.
        """
        window = PATCHES_OF_WINDOW * patch_size if window is None else window
        stride = max(1, int(window * STRIDE)) if stride is None else stride
        size = window if size is None else size
        if window < patch_size or not 1 <= stride <= window or size < 0 or batch_size < 1:
            raise UserError(
                f"window {window}, stride {stride}, size {size}, batch size {batch_size}: expected a window "
                f"of at least a patch ({patch_size} px), a stride from 1 to it, 1 image a batch or more"
            )
        return cls(size, window, stride, batch_size, data.mean, data.std, data.num_workers)


class DenseNetwork(nn.Module):
    """A frozen timm network that gives the patch features of images of any size.

    Positional embeddings are stretched to the image (`models/positions.py`), rotary ones are computed for its
    grid. Sides that are no multiple of the patch are padded with the mean pixel, right and below.
    """

    def __init__(self, vit: VisionTransformer | Eva):
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.patch_size = vit.patch_embed.patch_size[0]
        self.embed_dim = vit.num_features
        self.num_prefix = vit.num_prefix_tokens
        self.own_grid = self.grid = tuple(vit.patch_embed.grid_size)
        self.own_positions = vit.pos_embed

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features after the final norm [N, D, h, w] float32 of normalised images [N, C, H, W].

        h and w are H and W divided by the patch size, rounded up.
        """
        grid = grid_of(images.shape[2:], self.patch_size)
        height, width = (side * self.patch_size for side in grid)
        images = functional.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
        self._fit(grid)
        tokens = self.vit.forward_features(images)[:, self.num_prefix :]
        # [N, L, D] -> [N, D, L] -> [N, D, h, w]
        return tokens.float().transpose(1, 2).unflatten(2, grid)

    def _fit(self, grid: tuple[int, int]) -> None:
        """Give the network the positions of another grid."""
        if grid == self.grid:
            return
        self.vit.set_input_size(img_size=tuple(side * self.patch_size for side in grid))
        if self.own_positions is not None:
            num_prefix = 0 if self.vit.no_embed_class else self.num_prefix
            positions = stretch_positions(
                self.own_positions, num_prefix=num_prefix, old=self.own_grid, new=grid
            )
            self.vit.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.grid = grid


class Embedded(NamedTuple):
    """One image: its place in the set, the image itself, and the features of its windows.

    height, width: px after it was resized; places: of the windows in it; features: [D, h, w] for each window
    """

    number: int
    sample: DenseSample
    height: int
    width: int
    places: list[Place]
    features: list[Tensor]


def embed_chunks(
    network: DenseNetwork,
    dense_set: DenseSet,
    options: DenseOptions,
    *,
    processes: Processes,
    title: str | None,
) -> Iterator[list[Embedded]]:
    """Yield this rank's chunks of images, with their features on its device.

    title: of the progress that is shown, None for none
    """
    num_chunks = -(-len(dense_set) // options.batch_size)
    mine = range(processes.process_index, num_chunks, processes.num_processes)
    read = partial(_read_chunk, dense_set=dense_set, size=options.batch_size)
    normalize = Normalize(options.mean, options.std).to(processes.device)
    progress = Progress(
        total=len(mine) * options.batch_size,
        unit="img",
        title=title,
        every_s=LINE_EVERY_S,
        is_shown=title is not None and processes.is_main_process,
    )
    with progress:
        for chunk in load_numbered(read, mine, num_workers=min(options.num_workers, len(mine))):
            yield _embed(network, chunk, options, normalize=normalize, processes=processes)
            progress.advance(options.batch_size)


def _embed(
    network: DenseNetwork,
    chunk: list[tuple[int, DenseSample]],
    options: DenseOptions,
    *,
    normalize: Normalize,
    processes: Processes,
) -> list[Embedded]:
    """Embed the windows of a chunk; those of one size share a pass."""
    embedded, by_size = [], {}
    for number, sample in chunk:
        image = resize_short_side(sample.image, options.size)
        height, width = image.shape[1:]
        places = window_places(height, width, window=options.window, stride=options.stride)
        one = Embedded(number, sample, height, width, places, [None] * len(places))
        embedded.append(one)
        for spot, place in enumerate(places):
            window = image[(..., *place)]
            by_size.setdefault(tuple(window.shape), []).append((window, one.features, spot))
    for same in by_size.values():
        for start in range(0, len(same), options.batch_size):
            some = same[start : start + options.batch_size]
            images = torch.stack([window for window, *_ in some]).to(processes.device)
            with processes.autocast():
                # [N, 3, H, W] -> [N, H, W, 3] to be normalised -> [N, 3, H, W]
                features = network(normalize(images.movedim(1, -1)).movedim(-1, 1))
            for one, (_, target, spot) in zip(features, some, strict=True):
                target[spot] = one
    return embedded


def load_numbered(load: Callable[[int], list], numbers: range, *, num_workers: int) -> Iterator[list]:
    """Load what `load` returns for each number, in order, in workers. Raises ShardError, as of this rank."""
    try:
        for (item,) in iterate_numbered(load, numbers, num_workers=num_workers, pin_memory=False):
            yield item
    except ShardError as error:
        error.of_one_rank = True  # no other rank reads this image
        raise


def _read_chunk(number: int, *, dense_set: DenseSet, size: int) -> list[tuple[int, DenseSample]]:
    """The images of a chunk with their numbers in the set."""
    numbers = range(number * size, min((number + 1) * size, len(dense_set)))
    return [(one, dense_set[one]) for one in numbers]


def grid_of(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches that cover an image of (height, width) px."""
    return tuple(-(-side // patch_size) for side in size)


def resize_short_side(image: Tensor, size: int) -> Tensor:
    """Resize a uint8 image [C, H, W] so that its short side has `size` px; 0: leave it as it is."""
    height, width = image.shape[1:]
    short = min(height, width)
    if size in (0, short):
        return image
    shape = [max(1, round(side * size / short)) for side in (height, width)]
    return resize(image, shape, antialias=True)


def resize_map(label_map: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize a label map [H, W] to a shape by its nearest pixels."""
    if label_map.shape == shape:
        return label_map
    # The numbers of classes are exact in float64, and the nearest pixel is copied.
    return functional.interpolate(label_map[None, None].double(), shape, mode="nearest-exact")[0, 0].long()


def patch_labels(label_map: Tensor, patch_size: int, *, num_classes: int, no_class: int) -> Tensor:
    """The share of each class among a patch's pixels that have one: [L, C] float32, patches row by row.

    label_map: [H, W] int64, no_class where there is none; patches that reach beyond the map count the pixels
    within it
    A patch without such a pixel has zeros.
    """
    rows, columns = grid_of(label_map.shape, patch_size)
    height, width = label_map.shape
    padding = (0, columns * patch_size - width, 0, rows * patch_size - height)
    padded = functional.pad(label_map, padding, value=no_class)
    # [H, W] -> [rows, P, columns, P] -> [L, P * P]
    cells = padded.reshape(rows, patch_size, columns, patch_size).transpose(1, 2).reshape(rows * columns, -1)
    patch = torch.arange(len(cells), device=cells.device)[:, None].expand_as(cells)
    has_class = cells != no_class
    counts = torch.bincount(
        patch[has_class] * num_classes + cells[has_class], minlength=len(cells) * num_classes
    )
    counts = counts.view(len(cells), num_classes).float()
    return counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
