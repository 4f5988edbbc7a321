"""How alike two networks' features are, whatever their width: linear CKA (Kornblith et al. 2019, Eq. 4), debiased.

The plain estimate is high for any features that are wide beside the number of tokens: two independent ones of width 768
and 1024 on 3,000 tokens have .22. So the inner product of the Gram matrices is Song et al.'s unbiased one (2012,
Eq. 4; as Nguyen et al. 2021 use it), in the form of U-centred matrices (Szekely and Rizzo 2014, Sec. 3).
"""

from __future__ import annotations

from typing import Iterable

import torch
from torch import Tensor

LEAST_ROWS = 4  # below, the unbiased estimate does not exist


def cka_grid(rows: Iterable[Tensor], columns: Iterable[Tensor]) -> Tensor:
    """Linear CKA of every pair of features, each [n, any width], row i of each being the same token.

    Returns [len(rows), len(columns)] float64: 1 for features that are equal up to rotation, scale and shift, about 0
    (a little below, too) for independent ones. Raises ValueError for fewer than 4 tokens.
    """
    # [n, n] each; columns come one by one, so that their features needn't all exist at once
    grams = torch.stack([_direction(features) for features in rows])
    return torch.stack(
        [torch.einsum("bij,ij->b", grams, _direction(features)) for features in columns], dim=1
    )


def u_centred_gram(features: Tensor) -> Tensor:
    """[n, D] -> [n, n] float64: inner products of all tokens, with a diagonal of zeros and rows that sum to zero."""
    num = len(features)
    if num < LEAST_ROWS:
        raise ValueError(f"CKA of {num} tokens does not exist; give at least {LEAST_ROWS}")
    features = features.double()
    features = features - features.mean(dim=0)  # changes nothing but rounding
    gram = (features @ features.T).fill_diagonal_(0)
    sums = gram.sum(dim=0)
    gram -= (sums[:, None] + sums[None, :]) / (num - 2)
    gram += sums.sum() / ((num - 1) * (num - 2))
    return gram.fill_diagonal_(0)


def _direction(features: Tensor) -> Tensor:
    gram = u_centred_gram(features)
    return gram / gram.norm().clamp(min=torch.finfo(gram.dtype).tiny)
