"""Similarity of two networks' features of any width: linear CKA (Kornblith et al. 2019, Eq. 4), debiased.

The plain estimate is high for all features that are wide compared with the number of tokens: independent
features of width 768 and 1024 on 3,000 tokens have .22. So the inner product of the Gram matrices is the
unbiased one of Song et al. (2012, Eq. 4; used by Nguyen et al. 2021), in the form of U-centred matrices
(Szekely and Rizzo 2014, Sec. 3).
"""

from __future__ import annotations

from typing import Iterable

import torch
from torch import Tensor

LEAST_ROWS = 4  # the unbiased estimate does not exist for fewer


def cka_grid(rows: Iterable[Tensor], columns: Iterable[Tensor]) -> Tensor:
    """Linear CKA of every pair of features, each [n, any width]; row i of all features is the same token.

    Returns [len(rows), len(columns)] float64: 1 for features that are equal up to rotation, scale and shift,
    about 0 (also slightly below) for independent ones. Raises ValueError for fewer than 4 tokens.
    """
    # Each [n, n]; columns are taken one by one, so their features need not all exist at once.
    grams = torch.stack([_direction(features) for features in rows])
    return torch.stack(
        [torch.einsum("bij,ij->b", grams, _direction(features)) for features in columns], dim=1
    )


def u_centred_gram(features: Tensor) -> Tensor:
    """Inner products [n, n] float64 of all tokens [n, D], with a zero diagonal and rows that sum to zero."""
    num = len(features)
    if num < LEAST_ROWS:
        raise ValueError(f"CKA is not defined for {num} tokens; give at least {LEAST_ROWS}")
    features = features.double()
    features = features - features.mean(dim=0)  # changes only the rounding
    gram = (features @ features.T).fill_diagonal_(0)
    sums = gram.sum(dim=0)
    gram -= (sums[:, None] + sums[None, :]) / (num - 2)
    gram += sums.sum() / ((num - 1) * (num - 2))
    return gram.fill_diagonal_(0)


def _direction(features: Tensor) -> Tensor:
    gram = u_centred_gram(features)
    return gram / gram.norm().clamp(min=torch.finfo(gram.dtype).tiny)
