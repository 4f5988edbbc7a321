"""Layers of UperNet in float64 with numpy and loops, as their definitions say; nothing of torch."""

import numpy as np


def convolve(maps, weight, bias=None):
    """Convolution of [N, C, H, W] by [D, C, k, k], padded by k // 2 zeros."""
    side = weight.shape[2]
    pad = side // 2
    padded = np.pad(maps, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    height, width = maps.shape[2:]
    out = np.zeros((len(maps), len(weight), height, width))
    for row in range(height):
        for column in range(width):
            window = padded[:, :, row : row + side, column : column + side]
            out[:, :, row, column] = np.einsum("nchw,dchw->nd", window, weight)
    return out if bias is None else out + bias[:, None, None]


def enlarge_twice(maps, weight, bias):
    """Transposed convolution of [N, C, H, W] by [C, D, 2, 2] with stride 2: every pixel becomes four."""
    num, _, height, width = maps.shape
    out = np.zeros((num, weight.shape[1], 2 * height, 2 * width))
    for row in range(2 * height):
        for column in range(2 * width):
            kernel = weight[:, :, row % 2, column % 2]
            out[:, :, row, column] = maps[:, :, row // 2, column // 2] @ kernel
    return out + bias[:, None, None]


def normalise(maps, tensors, name, eps=1e-5):
    """Batch norm with the running statistics."""
    mean, var = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
    scale = tensors[f"{name}.weight"] / np.sqrt(var + eps)
    return (maps - mean[:, None, None]) * scale[:, None, None] + tensors[f"{name}.bias"][:, None, None]


def conv_module(maps, tensors, name):
    """Convolution without bias, batch norm, ReLU."""
    maps = convolve(maps, tensors[f"{name}.conv.weight"])
    return np.maximum(normalise(maps, tensors, f"{name}.batch_norm"), 0)


def pool_to(maps, side):
    """Mean of side x side regions whose borders are floor(i H / side) and ceil((i + 1) H / side)."""
    height, width = maps.shape[2:]
    out = np.zeros((*maps.shape[:2], side, side))
    for row in range(side):
        for column in range(side):
            rows = slice(row * height // side, -(-(row + 1) * height // side))
            columns = slice(column * width // side, -(-(column + 1) * width // side))
            out[:, :, row, column] = maps[:, :, rows, columns].mean(axis=(2, 3))
    return out


def halve(maps):
    """Largest of 2 x 2 pixels; an odd last row or column stands alone."""
    height, width = maps.shape[2:]
    out = np.zeros((*maps.shape[:2], -(-height // 2), -(-width // 2)))
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            block = maps[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            out[:, :, row, column] = block.max(axis=(2, 3))
    return out


def resize(maps, height, width):
    """Bilinear, with the centres of pixels at half integers and the edge repeated."""
    old_height, old_width = maps.shape[2:]
    out = np.zeros((*maps.shape[:2], height, width))
    for row in range(height):
        for column in range(width):
            y = min(max((row + 0.5) * old_height / height - 0.5, 0), old_height - 1)
            x = min(max((column + 0.5) * old_width / width - 0.5, 0), old_width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, old_height - 1), min(left + 1, old_width - 1)
            above = (1 - x + left) * maps[:, :, top, left] + (x - left) * maps[:, :, top, right]
            below = (1 - x + left) * maps[:, :, bottom, left] + (x - left) * maps[:, :, bottom, right]
            out[:, :, row, column] = (1 - y + top) * above + (y - top) * below
    return out


def gelu(values):
    """x times the normal distribution's share below x."""
    from math import erf, sqrt

    return values * np.vectorize(lambda value: 0.5 * (1 + erf(value / sqrt(2))))(values)


def neck(maps, tensors):
    """Four maps of one grid to x4, x2, x1, /2."""
    first = enlarge_twice(maps[0], tensors["neck.levels.0.0.weight"], tensors["neck.levels.0.0.bias"])
    first = gelu(normalise(first, tensors, "neck.levels.0.1"))
    first = enlarge_twice(first, tensors["neck.levels.0.3.weight"], tensors["neck.levels.0.3.bias"])
    second = enlarge_twice(maps[1], tensors["neck.levels.1.weight"], tensors["neck.levels.1.bias"])
    return [first, second, maps[2], halve(maps[3])]


def upernet(maps, tensors, scales):
    """Logits, and the auxiliary head's, [N, classes, ...], of four maps of one grid [N, D, h, w]."""
    levels = neck(maps, tensors)
    last = levels[3]
    pooled = [last]
    for number, scale in enumerate(scales):
        small = conv_module(pool_to(last, scale), tensors, f"head.psp_modules.{number}.1")
        pooled.append(resize(small, *last.shape[2:]))
    laterals = [conv_module(level, tensors, f"head.lateral_convs.{n}") for n, level in enumerate(levels[:3])]
    laterals.append(conv_module(np.concatenate(pooled, axis=1), tensors, "head.bottleneck"))
    for number in (2, 1, 0):
        laterals[number] = laterals[number] + resize(laterals[number + 1], *laterals[number].shape[2:])
    outs = [conv_module(laterals[n], tensors, f"head.fpn_convs.{n}") for n in range(3)] + [laterals[3]]
    outs = [resize(out, *outs[0].shape[2:]) for out in outs]
    joined = conv_module(np.concatenate(outs, axis=1), tensors, "head.fpn_bottleneck")
    logits = convolve(joined, tensors["head.classifier.weight"], tensors["head.classifier.bias"])
    side = conv_module(levels[2], tensors, "auxiliary.convs.0")
    return logits, convolve(
        side, tensors["auxiliary.classifier.weight"], tensors["auxiliary.classifier.bias"]
    )


def kl_of_pixels(student, teacher, temperature):
    """Mean over pixels of KL(teacher || student) at a temperature, times its square; [N, classes, h, w]."""
    total, count = 0.0, 0
    for image in range(len(student)):
        for row in range(student.shape[2]):
            for column in range(student.shape[3]):
                one, other = (
                    np.exp(logits[image, :, row, column] / temperature) for logits in (student, teacher)
                )
                p, q = other / other.sum(), one / one.sum()
                total += float((p * np.log(p / q)).sum())
                count += 1
    return total / count * temperature**2
