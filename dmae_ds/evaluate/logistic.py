"""Multinomial logistic regression on standardised features, also on a GPU and in several processes.

It fits what scikit-learn's LogisticRegression fits: mean cross-entropy + l2 / 2 * |W|^2 is minimised by
L-BFGS with strong Wolfe steps, the bias is not regularised. (scikit-learn's C is 1 / (l2 * n).) Features are
standardised one block at a time and never copied as a whole. L-BFGS and the sums over blocks are float64; the
products of a block are float64 too, unless there are so many that the speed of float32 is worth its last
digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dmae_ds.errors import UserError

BLOCK = 16_384  # rows at a time; with D = 768 and 1,000 classes they take 200 MB
MANY_PRODUCTS = 2**32  # of one pass; in float64 they take a CPU core a second

MAX_ITERATIONS = 500  # of L-BFGS, where the user gives no number


class Alone:
    """A single process, as `fit_probe` sees processes."""

    num_processes, process_index = 1, 0

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes, which is the tensor itself."""
        return tensor


ALONE = Alone()


@dataclass(frozen=True)
class Probe:
    """A fitted classifier. weight [C, D], bias [C], mean and std [D], all float64."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    gradient: float  # largest entry of the gradient where the fit stopped
    iterations: int
    converged: bool  # stopped before max_iterations

    def scores(self, features: Tensor) -> Tensor:
        """Scores [n, C] float32 of features [n, D] float32; a higher score is a likelier class."""
        rows = _standardise(features, self.mean, self.std, dtype=torch.float32)
        return _scores(rows, self.weight, self.bias)


def fit_probe(
    features: Tensor,
    labels: Tensor,
    *,
    l2: float,
    num_classes: int,
    max_iterations: int = MAX_ITERATIONS,
    start: Probe | None = None,
    processes=ALONE,
) -> Probe:
    """Fit features [n, D] float32 and labels [n] int64.

    start: a probe to start from, such as that of a similar l2
    Collective: each process holds all rows and works on its share. Raises UserError for features that are not
    finite.
    """
    mean, std = _statistics(features)
    mine = slice(processes.process_index, None, processes.num_processes)
    features, labels, num = features[mine], labels[mine], len(features)
    # [C, D + 1]: weights, and the bias in the last column
    parameters = torch.zeros(num_classes, features.shape[1] + 1, dtype=torch.float64, device=features.device)
    if start is not None:
        weight = start.weight * (std / start.std)
        bias = start.bias + start.weight @ ((mean - start.mean) / start.std)
        parameters.copy_(torch.cat([weight, bias[:, None]], dim=1))
    parameters.requires_grad_()
    dtype = torch.float64 if num * parameters.numel() < MANY_PRODUCTS else torch.float32
    optimizer = torch.optim.LBFGS(
        [parameters],
        lr=1,
        max_iter=max_iterations,
        max_eval=25 * max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        weight, bias = parameters.detach()[:, :-1], parameters.detach()[:, -1]
        # The loss, then its gradient.
        total = torch.zeros(1 + parameters.numel(), dtype=torch.float64, device=parameters.device)
        for rows, classes in zip(features.split(BLOCK), labels.split(BLOCK), strict=True):
            rows = _standardise(rows, mean, std, dtype=dtype)
            logs = _scores(rows, weight, bias).log_softmax(dim=1)
            total[0] += functional.nll_loss(logs, classes, reduction="none").double().sum()
            wrong = logs.exp_() - functional.one_hot(classes, num_classes)  # [b, C]
            gradient = torch.cat([wrong.T @ rows, wrong.sum(dim=0)[:, None]], dim=1)
            total[1:] += gradient.double().flatten()
        total = processes.reduce(total) / num
        parameters.grad = total[1:].view_as(parameters)
        parameters.grad[:, :-1] += l2 * weight
        return total[0] + l2 / 2 * weight.square().sum()

    optimizer.step(closure)
    closure()
    weight, bias = parameters.detach()[:, :-1].clone(), parameters.detach()[:, -1].clone()
    largest = parameters.grad.abs().max().item()
    iterations = optimizer.state[parameters]["n_iter"]
    return Probe(weight, bias, mean, std, largest, iterations, iterations < max_iterations)


def _scores(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias.to(rows.dtype), rows, weight.to(rows.dtype).T)


def _standardise(rows: Tensor, mean: Tensor, std: Tensor, *, dtype: torch.dtype) -> Tensor:
    return (rows.to(dtype) - mean.to(dtype)) / std.to(dtype)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation [D] float64; a constant feature has 1."""
    blocks, num = features.split(BLOCK), len(features)
    mean = sum(rows.double().sum(dim=0) for rows in blocks) / num
    variance = sum((rows.double() - mean).square().sum(dim=0) for rows in blocks) / num
    if not variance.isfinite().all():
        raise UserError("the student's features are not finite; check its training with `dmae-ds report`")
    std = variance.sqrt()
    return mean, std.where(std > 1e-6 * mean.abs().clamp_min(1e-12), 1.0)
