"""Backward passes in Python, node by node, for fake CUDA tensors on a machine without a GPU.

torch's own engine asks the CUDA driver for a context before it runs a node on a CUDA tensor, also on a fake
one. This one visits the same nodes in the same order, checks what torch's engine checks, runs the same hooks,
and lets go of a node, with all it saved, as soon as it has run. It is slow and only for tracing.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import defaultdict
from typing import Any, Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

_FIRST = -(2**62)  # priority of gradients that are ready for their parameters


class PythonEngine:
    """Takes the place of torch's engine while `installed`."""

    def __init__(self):
        self._real = torch.autograd.Variable._execution_engine
        self._hooks: dict[tuple[Any, int], list[Callable]] = defaultdict(list)  # (node, output) -> hooks
        self._callbacks: list[Callable[[], None]] = []
        self._num_tasks, self._task = 0, -1

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Use this engine for every `Tensor.backward` and `Tensor.register_hook` in the block."""
        register = torch.Tensor.register_hook
        replaced = [
            (torch.Tensor, "backward", lambda loss, gradient=None, *_, **__: self.backward(loss, gradient)),
            (torch.Tensor, "register_hook", lambda t, hook: self._register(register, t, hook)),
            (torch.autograd.Variable, "_execution_engine", self),
            (torch._C, "_current_graph_task_id", lambda: self._task),
            (torch._C, "_will_engine_execute_node", lambda node: True),
        ]
        with patched(replaced):
            try:
                yield
            finally:
                self._hooks.clear()

    def queue_callback(self, callback: Callable[[], None]) -> None:
        """Call a function at the end of the backward pass that is under way."""
        self._callbacks.append(callback)

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Compute the gradients of all parameters that the loss depends on.

        The loss loses its graph: who held it would hold all saved tensors.
        """
        self._num_tasks += 1
        self._task = self._num_tasks
        try:
            with torch.no_grad():
                self._run(loss, torch.ones_like(loss) if gradient is None else gradient)
            while self._callbacks:
                self._callbacks.pop(0)()
        finally:
            self._task = -1

    def _run(self, loss: Tensor, gradient: Tensor) -> None:
        start, output = loss.grad_fn, loss.output_nr
        if not loss._is_view():
            loss.detach_()
        waiting = _count_uses(start)
        inputs: dict[Any, dict[int, Tensor]] = {start: {output: gradient}}
        del gradient
        numbers = itertools.count()
        ready = [(-start._sequence_nr(), next(numbers), start)]
        del start, waiting[ready[0][2]]
        while ready:
            _, _, node = heapq.heappop(ready)
            given = inputs.pop(node, {})
            if _is_leaf(node):
                if 0 in given:
                    _accumulate(node.variable, given)
                continue
            following = node.next_functions
            outputs = self._call(node, given)
            given.clear()
            for (child, index), value in zip(following, outputs, strict=False):
                if child is None:
                    continue
                if value is not None:
                    _add(inputs.setdefault(child, {}), index, _checked(value, child, index, node))
                waiting[child] -= 1
                if waiting[child] == 0:
                    del waiting[child]
                    priority = _FIRST if _is_leaf(child) else -child._sequence_nr()
                    heapq.heappush(ready, (priority, next(numbers), child))
            value = child = following = outputs = node = None

    def _call(self, node, given: dict[int, Tensor]) -> tuple:
        """Gradients of a node's inputs; Nones where none of its outputs has a gradient."""
        arguments = []
        for index in range(_num_outputs(node, given)):
            gradient = given.pop(index, None)
            for hook in self._hooks.pop((node, index), ()):
                changed = hook(gradient) if gradient is not None else None
                gradient = gradient if changed is None else changed
            arguments.append(gradient)
        if all(argument is None for argument in arguments):
            return (None,) * len(node.next_functions)
        outputs = node.apply(*arguments) if isinstance(node, BackwardCFunction) else node(*arguments)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _register(self, register: Callable, tensor: Tensor, hook: Callable):
        if tensor.grad_fn is None:
            return register(tensor, hook)
        hooks = self._hooks[tensor.grad_fn, tensor.output_nr]
        hooks.append(hook)
        return _Handle(hooks, hook)


class _Handle:
    """What `Tensor.register_hook` returns."""

    def __init__(self, hooks: list[Callable], hook: Callable):
        self.hooks, self.hook = hooks, hook

    def remove(self) -> None:
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


@contextlib.contextmanager
def patched(replaced: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes, (owner, name, value), for the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


def _count_uses(start) -> dict[Any, int]:
    """How many edges lead to each node that can be reached from `start`."""
    counts: dict[Any, int] = defaultdict(int, {start: 0})
    todo = [start]
    while todo:
        for child, _ in todo.pop().next_functions:
            if child is not None:
                if child not in counts:
                    todo.append(child)
                counts[child] += 1
    return counts


def _num_outputs(node, given: dict[int, Tensor]) -> int:
    metadata = getattr(node, "_input_metadata", None)
    return max(given, default=0) + 1 if metadata is None else len(metadata)


def _is_leaf(node) -> bool:
    return type(node).__name__ == "AccumulateGrad"


def _accumulate(parameter: Tensor, given: dict[int, Tensor]) -> None:
    """Add a gradient to a parameter's, and run the parameter's hooks; `given` is emptied."""
    gradient = given.pop(0)
    for hook in (parameter._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    if parameter.grad is None:
        parameter.grad = gradient.detach()
    else:
        parameter.grad += gradient
    del gradient
    for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
        hook(parameter)


def _add(gradients: dict[int, Tensor], index: int, value: Tensor) -> None:
    gradients[index] = gradients[index] + value if index in gradients else value


def _checked(gradient: Tensor, node, index: int, source) -> Tensor:
    """A gradient with the device, shape and dtype that a node expects, as torch's engine asks for."""
    like = node.variable if _is_leaf(node) else node._input_metadata[index]
    if gradient.device != like.device:
        raise RuntimeError(f"{source} gave a gradient on {gradient.device}, {node} is on {like.device}")
    if gradient.shape != like.shape:
        gradient = gradient.sum_to_size(like.shape)
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)
