"""Sliding windows: their places, and averages compared with a loop over pixels."""

import pytest
import torch

from dmae_ds.evaluate.windows import slide, window_starts


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (512, 512, 341, [0]),
        (300, 512, 341, [0]),
        (513, 512, 341, [0, 1]),
        (683, 512, 341, [0, 171]),
        (1024, 512, 341, [0, 341, 512]),
        (1194, 512, 341, [0, 341, 682]),
        (7, 3, 3, [0, 3, 4]),
        (1, 1, 1, [0]),
    ],
)
def test_places_of_windows(length, window, stride, starts):
    assert window_starts(length, window, stride) == starts
    covered = {pixel for start in starts for pixel in range(start, start + window)}
    assert set(range(length)) <= covered and (starts[-1] + window == length or length < window)


@pytest.mark.parametrize("stride", [0, 4])
def test_a_stride_that_leaves_pixels_out_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        window_starts(9, 3, stride)


def test_overlapping_predictions_are_averaged():
    images = torch.rand(2, 3, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def predict(pixels):
        # Depends on the window's place by its mean, and on the pixel's place within the window.
        ramp = torch.arange(pixels.shape[2], dtype=pixels.dtype)[:, None]
        return torch.cat(
            [pixels.mean(dim=(1, 2, 3), keepdim=True) * pixels[:, :1], ramp + 0 * pixels[:, 1:2]], 1
        )

    result = slide(images, predict, window=4, stride=3)
    tops, lefts = (0, 3, 5), (0, 1)
    for row in range(9):
        for column in range(5):
            values = [
                predict(images[:, :, top : top + 4, left : left + 4])[:, :, row - top, column - left]
                for top in tops
                for left in lefts
                if top <= row < top + 4 and left <= column < left + 4
            ]
            expected = torch.stack(values).mean(dim=0)
            assert torch.allclose(result[:, :, row, column], expected, atol=1e-12)


def test_an_image_within_a_window_is_predicted_whole():
    images = torch.rand(1, 3, 4, 6)
    seen = []
    result = slide(images, lambda pixels: seen.append(pixels.shape) or pixels, window=8, stride=5)
    assert seen == [(1, 3, 4, 6)] and torch.equal(result, images)
