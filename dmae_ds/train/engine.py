"""The student's DeepSpeed engine: ZeRO, precision, accumulation."""

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
from dmae_ds.objectives.base import Objective

if TYPE_CHECKING:
    from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError where DeepSpeed can't run a precision on this device."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; on CPUs use fp32, bf16_autocast or bf16")


@contextlib.contextmanager
def logged_collectives() -> Iterator[Callable[[], float]]:
    """DeepSpeed's own log of collectives, each waited for; gives what says how many seconds they have taken since."""
    from deepspeed.comm.comm import comms_logger

    comms_logger.enabled = comms_logger.prof_all = True
    comms_logger.comms_dict = {}
    try:
        # {operation: {bytes: [how often, [milliseconds], ...]}}
        yield (
            lambda: (
                sum(sum(entry[1]) for sizes in comms_logger.comms_dict.values() for entry in sizes.values())
                / 1000
            )
        )
    finally:
        comms_logger.enabled = False


class Engine:
    """An objective under `deepspeed.initialize`, also when it runs alone on a CPU.

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
        self._offloads_to_disk = any(
            config.get("zero_optimization", {}).get(f"offload_{what}", {}).get("device") == "nvme"
            for what in ("param", "optimizer")
        )
        names = {parameter: name for name, parameter in objective.named_parameters()}
        self._groups = [
            [names[parameter] for parameter in group["params"]] for group in optimizer.param_groups
        ]
        # Buffers are constants here; DeepSpeed casts its own copies to the engine's precision.
        self._buffers = {name: buffer.detach().cpu().clone() for name, buffer in objective.named_buffers()}
        # DeepSpeed reads LOCAL_RANK and takes the process group that exists.
        self._engine, _, _, _ = deepspeed.initialize(
            model=objective.to(device), optimizer=optimizer, config=config, dist_init_required=False
        )
        from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine

        self._engine.checkpoint_engine = self._files = SafeCheckpointEngine()
        # Its scripts for reading checkpoints unpickle anything, and a full disk would raise while they are copied.
        self._engine._copy_recovery_script = lambda folder: None

    def set_lr(self, lr: float) -> None:
        """Set the rate of every parameter group for the coming step: its share of `lr`, by layer and by the objective's `lr_scales`."""
        scales = self.objective.lr_scales
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0) * scales.get(group.get("scaled_by"), 1.0)

    def train_micro_batch(
        self, batch, features: dict[str, Tensor], *, lap: Callable[[str], None] = lambda part: None
    ) -> dict[str, Tensor]:
        """Forward and backward; at an accumulation boundary also the optimiser's step. Returns the loss's parts, detached.

        lap: is told when "forward", "backward" and "optimizer" are over, for who takes the time
        """
        parts = self._engine(batch, features)
        lap("forward")
        self._engine.backward(parts["loss"])
        lap("backward")
        self._engine.step()
        lap("optimizer")
        return {name: value.detach() for name, value in parts.items()}

    def full_weights(self, *, on_every_rank: bool = False) -> dict[str, Tensor]:
        """The objective's whole state dict in fp32 on the CPU, gathered a tensor at a time; {} on ranks other than 0, unless asked.

        Collective: every rank must call it.
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
        """(name, whole fp32 weight on this rank's device), one parameter after the other; each is only to be read, before the next is asked for.

        parts: submodules of the objective; none: all of it
        Collective: every rank must go through all of it.
        """
        for name, parameter in self.objective.named_parameters():
            if not parts or name.startswith(tuple(f"{part}." for part in parts)):
                with self._whole(parameter) as full:
                    yield name, full

    @contextlib.contextmanager
    def _whole(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        if not self._fp32_weights:
            from deepspeed.utils import safe_get_full_fp32_param

            master = safe_get_full_fp32_param(parameter)
            if master is not None:
                yield master.detach().float()
                return
        with (
            self._deepspeed.zero.GatheredParameters([parameter])
            if self.stage == 3
            else contextlib.nullcontext()
        ):
            yield parameter.detach().float()

    def save(self, folder: str, tag: str) -> SafeCheckpointEngine:
        """Write DeepSpeed's files of all ranks under folder/tag, to the disk. Collective; says nothing of `latest`.

        Returns what this rank wrote, and what went wrong: nothing is raised where a disk refuses, for the other ranks wait.
        """
        from dmae_ds.train.checkpoint.full_state import GROUPS

        self._files.start()
        self._engine.save_checkpoint(folder, tag=tag, save_latest=False, client_state={GROUPS: self._groups})
        return self._files

    def load(self, folder: str, tag: str) -> None:
        """Read what `save` wrote, at the same world size and ZeRO stage."""
        path, _ = self._engine.load_checkpoint(folder, tag=tag)
        assert path is not None, f"DeepSpeed found nothing to load in {folder}/{tag}"

    def load_moved(self, checkpoint: Path, *, stage: int, step: int, global_batch: int) -> None:
        """Read what another number of ranks wrote, or another ZeRO stage: `stage`, at a step. Collective; raises UserError.

        Weights, Adam's moments and its counter move; the optimiser's settings are the recipe's.
        """
        from dmae_ds.train.checkpoint.full_state import WholeState
        from dmae_ds.train.checkpoint.reshard import load_whole

        if self._offloads_to_disk:
            raise UserError(
                f"checkpoint '{checkpoint}' does not move into an optimiser that is offloaded to NVMe; offload to cpu, or start as it was written"
            )
        load_whole(self._engine, dict(self.objective.named_parameters()), WholeState(checkpoint, stage=stage))
        self._engine.global_steps, self._engine.global_samples = step, step * global_batch
