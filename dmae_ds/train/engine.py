"""DeepSpeed engine of a run: ZeRO, precision, accumulation, and full weights on request."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator

import torch
from torch import Tensor, nn

from dmae_ds.config.deepspeed import zero_stage
from dmae_ds.distributed import collectives
from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.errors import UserError
from dmae_ds.models.initial import match_key_bias
from dmae_ds.objectives.base import Objective
from dmae_ds.train.full_parameters import full_parameters

if TYPE_CHECKING:
    from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine

# Keys of an optimizer's parameter group that are no settings.
STATE_OF_GROUP = ("params", "step")


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError where DeepSpeed cannot run a precision on this device."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 requires a GPU; on CPUs use fp32, bf16_autocast or bf16")


def check_ops(config: dict, device: torch.device) -> None:
    """Raise UserError where a loaded DeepSpeed config needs a compiled op that this machine cannot have."""
    zero = config.get("zero_optimization", {})
    quantized = [key for key in zero if key.startswith("zero_quantized") and zero[key]]
    if quantized and device.type == "cpu":
        raise UserError(f"zero_optimization.{quantized[0]} requires a GPU; remove it from the DeepSpeed file")
    if not _offloads_to_disk(config):
        return
    builder = get_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise UserError(
            "zero_optimization offloads to nvme, which requires DeepSpeed's async_io op, and it cannot be "
            "built on this machine (`ds_report` says why: mostly libaio is missing); offload to cpu"
        )


def get_op_builder(name: str):
    """DeepSpeed's builder of a compiled op, for this machine's accelerator; None where it has none."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder(name)


def _offloads_to_disk(config: dict) -> bool:
    zero = config.get("zero_optimization", {})
    return any(zero.get(key, {}).get("device") == "nvme" for key in ("offload_param", "offload_optimizer"))


@contextlib.contextmanager
def logged_collectives() -> Iterator[Callable[[], float]]:
    """Turn on DeepSpeed's log of collectives, which waits for each; gives a function for their seconds."""
    from deepspeed.comm.comm import comms_logger

    comms_logger.enabled = comms_logger.prof_all = True
    comms_logger.comms_dict = {}

    def seconds() -> float:
        # {operation: {bytes: [count, [milliseconds], ...]}}
        entries = [entry for sizes in comms_logger.comms_dict.values() for entry in sizes.values()]
        return sum(sum(entry[1]) for entry in entries) / 1000

    try:
        yield seconds
    finally:
        comms_logger.enabled = False


def check_losses(losses: object, objective: str) -> None:
    """Raise UserError unless an objective's forward returned a scalar "loss" with a gradient, and parts."""
    loss = losses.get("loss") if isinstance(losses, dict) else None
    if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
        return
    found = type(losses).__name__
    if isinstance(losses, dict):
        found = f"a dict of {', '.join(map(str, losses)) or 'nothing'}"
    if isinstance(loss, Tensor):
        found = (
            f"a loss of shape {list(loss.shape)}, {'with' if loss.requires_grad else 'without'} a gradient"
        )
    error = UserError(
        f"objective {objective}: forward returned {found}; expected a dict of 'loss', a scalar with a "
        "gradient, and of its parts by name"
    )
    error.on_every_rank = True
    raise error


class Engine:
    """An objective under `deepspeed.initialize`, also for one process on a CPU.

    The process group must exist. `stage` is the ZeRO stage.
    """

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, config: dict, device: torch.device
    ):
        deepspeed = import_deepspeed(device)
        self.stage = zero_stage(config)
        self.objective, self.device = objective, device
        self._fp32_weights = not (config["bf16"]["enabled"] or config["fp16"]["enabled"])
        self._deepspeed = deepspeed
        self._offloads_to_disk = _offloads_to_disk(config)
        names = {parameter: name for name, parameter in objective.named_parameters()}
        self._groups = [
            [names[parameter] for parameter in group["params"]] for group in optimizer.param_groups
        ]
        # Buffers are constants here. Those that no file holds (rotary angles, `Objective.memory`) are left
        # out.
        saved = objective.state_dict().keys()
        buffers = [(name, buffer) for name, buffer in objective.named_buffers() if name in saved]
        self._buffers = {name: buffer.detach().cpu().clone() for name, buffer in buffers}
        # DeepSpeed reads LOCAL_RANK and takes the process group that exists.
        self._engine, _, _, _ = deepspeed.initialize(
            model=objective.to(device), optimizer=optimizer, config=config, dist_init_required=False
        )
        match_key_bias(objective)
        from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine

        self._engine.checkpoint_engine = self._files = SafeCheckpointEngine()
        # DeepSpeed's scripts for reading checkpoints unpickle anything, and to copy them raises on a full
        # disk.
        self._engine._copy_recovery_script = lambda folder: None

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group for the coming step.

        It is `lr`, scaled by layer decay and by the objective's `lr_scales`.
        """
        scales = self.objective.lr_scales
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0) * scales.get(group.get("scaled_by"), 1.0)

    def train_micro_batch(
        self, batch, features: dict[str, Tensor], *, lap: Callable[[str], None] = lambda part: None
    ) -> dict[str, Tensor]:
        """Do forward and backward, and at an accumulation boundary the optimizer's step.

        lap: called with "forward", "backward" and "optimizer" when each is over, for measuring time
        Returns the loss and its named parts, detached.
        """
        losses = self._engine(batch, features)
        check_losses(losses, type(self.objective).__name__)
        lap("forward")
        self._engine.backward(losses["loss"])
        lap("backward")
        self._engine.step()
        lap("optimizer")
        return {name: value.detach() for name, value in losses.items()}

    def evaluate_micro_batch(self, batch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Do forward alone, in evaluation mode and without gradients; returns the loss and its parts."""
        self._engine.eval()
        try:
            with torch.no_grad():
                return self._engine(batch, features)
        finally:
            self._engine.train()

    def full_weights(self, *, on_every_rank: bool = False) -> dict[str, Tensor]:
        """Gather the objective's full state dict in fp32 on the CPU, one tensor at a time. Collective.

        Returns {} on ranks other than 0, unless on_every_rank is set.
        """
        keep = on_every_rank or collectives.is_main()
        weights: dict[str, Tensor] = {}
        for name, full in self.full_parameters():
            if keep:
                weights[name] = full.cpu().clone()
        if keep:
            weights |= self._buffers
        return weights

    def full_parameters(self, parts: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full fp32 weight on this rank's device), one parameter after the other.

        parts: submodules of the objective; none: all of it
        Collective: every rank must go through all of them. A weight may only be read, and only before the
        next one is requested.
        """
        prefixes = tuple(f"{part}." for part in parts) or ("",)
        named = [item for item in self.objective.named_parameters() if item[0].startswith(prefixes)]
        if not self._offloads_to_disk:
            yield from full_parameters(named, stage=self.stage, has_masters=not self._fp32_weights)
            return
        for name, parameter in named:
            with self._read_from_disk(parameter) as full:
                yield name, full

    @contextlib.contextmanager
    def _read_from_disk(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """A full fp32 weight under ZeRO-3 with NVMe."""
        from deepspeed.utils import safe_get_full_fp32_param

        master = None if self._fp32_weights else safe_get_full_fp32_param(parameter)
        if master is not None:
            yield master.detach().float()
            return
        with self._deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.detach().float()

    def save(self, folder: str, tag: str) -> SafeCheckpointEngine:
        """Write DeepSpeed's files of all ranks under folder/tag, to the disk; `latest` stays. Collective.

        Returns what this rank wrote and its first problem; nothing is raised where a disk refuses, because
        the other ranks wait.
        """
        from dmae_ds.train.checkpoint.full_state import GROUPS

        self._files.start()
        self._engine.save_checkpoint(folder, tag=tag, save_latest=False, client_state={GROUPS: self._groups})
        return self._files

    def has_groups_of(self, checkpoint: Path) -> bool:
        """Whether the optimizer has the parameter groups that a checkpoint was written with, so far as known.

        They follow from optim.weight_decay and optim.layer_decay. No collective.
        """
        from dmae_ds.train.checkpoint.full_state import read_groups

        return read_groups(checkpoint) in (None, self._groups)

    def load(self, folder: str, tag: str) -> None:
        """Read what `save` wrote, at the same world size, ZeRO stage and parameter groups. Collective.

        The optimizer's settings, such as weight decay, stay the recipe's: DeepSpeed would read them too.
        """
        settings = [
            {key: value for key, value in group.items() if key not in STATE_OF_GROUP}
            for group in self._engine.optimizer.param_groups
        ]
        path, _ = self._engine.load_checkpoint(folder, tag=tag)
        assert path is not None, f"DeepSpeed found nothing to load in {folder}/{tag}"
        for group, of_recipe in zip(self._engine.optimizer.param_groups, settings, strict=True):
            group.update(of_recipe)
        self._load_buffers(Path(folder) / tag)

    def load_resharded(self, checkpoint: Path, *, stage: int, step: int, global_batch: int) -> None:
        """Read what another number of ranks wrote, another ZeRO stage (`stage`), or other parameter groups.

        Weights, Adam's moments and its counter are loaded; the optimizer's settings are the recipe's.
        Collective. Raises UserError.
        """
        from dmae_ds.train.checkpoint.full_state import FullState
        from dmae_ds.train.checkpoint.reshard import load_full_state

        if self._offloads_to_disk:
            raise UserError(
                f"checkpoint '{checkpoint}' cannot be resharded into an optimizer that is offloaded to NVMe; "
                "offload to cpu, or start with the world size, ZeRO stage, optim.weight_decay and "
                "optim.layer_decay that wrote it"
            )
        parameters = dict(self.objective.named_parameters())
        load_full_state(self._engine, parameters, FullState(checkpoint, stage=stage))
        self._engine.global_steps, self._engine.global_samples = step, step * global_batch
        self._load_buffers(checkpoint)

    @torch.no_grad()
    def _load_buffers(self, checkpoint: Path) -> None:
        """Read constants that a resumed run did not read again from student.weights, such as positions."""
        from dmae_ds.train.checkpoint.full_state import read_buffers

        for name, saved in read_buffers(checkpoint, self._buffers).items():
            self.objective.get_buffer(name).copy_(saved)
            self._buffers[name].copy_(saved)
