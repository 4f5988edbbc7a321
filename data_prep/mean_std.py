"""Mean and standard deviation of a shard folder's pixels: `dmae-shards info DST --mean-std`.

Per channel, of values from 0 to 1, as training decodes them (8-bit RGB; arrays with all their bits). Every
image counts the same whatever its size, since training takes crops of one size. Up to `--images` images are
read, drawn once and for all.
"""

import io
import random
import warnings

import numpy as np
from PIL import Image
from tqdm import tqdm

from dmae_ds.data.arrays import decode_array, is_array
from dmae_ds.data.pixels import check_size, to_rgb
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError


def mean_and_std(shard_set: ShardSet, *, num_images: int) -> tuple[list[float], list[float], int]:
    """(mean, std) of the channels, and the number of images read.

    Raises ShardError for an image that cannot be read, and where all pixels of a channel are equal.
    """
    count = min(num_images, shard_set.num_samples)
    chosen = sorted(random.Random(0).sample(range(shard_set.num_samples), count))
    reader, sums = SampleReader(shard_set), 0
    for sample_id in tqdm(chosen, unit=" images", disable=None):
        sample = reader.read(sample_id)
        pixels = decode_pixels(sample.data, where=f"{sample.shard}: sample {sample.key}") / 255
        of_image = np.stack([pixels.mean(axis=(0, 1)), (pixels**2).mean(axis=(0, 1))])
        if np.shape(sums) not in ((), of_image.shape):
            raise ShardError(
                f"{sample.shard}: sample {sample.key} has {of_image.shape[1]} channels, and those before it "
                f"{sums.shape[1]}; make shards of one kind"
            )
        sums = sums + of_image
    mean, square = sums / count
    variance = square - mean**2
    if (variance < 1e-12).any():
        raise ShardError(
            f"{shard_set.folder}: all pixels of a channel are equal in the {count:,} images read (mean "
            f"{mean.round(4).tolist()}); their standard deviation is 0, which no recipe takes"
        )
    return mean.tolist(), np.sqrt(variance).tolist(), count


def decode_pixels(data: bytes, *, where: str) -> np.ndarray:
    """Decode an image to [H, W, C], from 0 to 255, as training does. Raises ShardError."""
    try:
        if is_array(data):
            return decode_array(data, bits=16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PIL, for images that training reads
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
            check_size(*image.size)
            return np.asarray(to_rgb(image))
    except Exception as error:  # PIL's decoders raise nearly anything
        raise ShardError(f"{where} cannot be decoded ({type(error).__name__}: {error})") from None
