"""What `dmae-ds bench step --json` measured on a GPU, in place of the planner's guessed rates.

dmae-ds bench step RECIPE --json > step.json
dmae-ds plan RECIPE --gpus 64 --measured step.json
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError

COMPUTE = ("teacher", "ema", "forward", "backward")  # the parts of a step whose matrix products are counted


@dataclass(frozen=True)
class Measured:
    """Rates of one device: of its matrix products, and the share of them that a step reached."""

    efficiency: float
    tflops: float | None  # fastest products in bf16 or fp16, TFLOP/s; None: not measured
    fp32_tflops: float | None
    recipe: str  # what was measured, in words
    device: str

    def check(self, config: RunConfig) -> None:
        """Raise UserError where the recipe multiplies in a dtype that was not measured."""
        used = {config.precision} | {teacher.dtype for teacher in config.named_teachers().values()}
        missing = []
        if self.fp32_tflops is None and "fp32" in used:
            missing.append("fp32")
        if self.tflops is None and used != {"fp32"}:
            missing.append("bf16 or fp16")
        if missing:
            raise UserError(
                f"--measured has no matrix products in {' and '.join(missing)}, which this recipe uses "
                f"(precision {config.precision}); measure this recipe: dmae-ds bench step RECIPE --json"
            )

    def describe(self) -> str:
        """Line: what was measured, where, and the share of the peak."""
        return f"measured on {self.device}: {self.efficiency:.1%} of its fastest products; {self.recipe}"

    def machine(self) -> dict[str, float]:
        """Keyword arguments for `cost.Machine`."""
        rates = {"tflops": self.tflops, "fp32_tflops": self.fp32_tflops}
        return {name: rate for name, rate in rates.items() if rate} | {"efficiency": self.efficiency}


def read_measured(path: Path) -> Measured:
    """Read the recipe's own step in a file of `bench step --json`. Raises UserError for anything else.

    Its share of the peak counts only the parts that compute, so that waiting for data, the optimizer and
    exchanges, which the planner adds, are not counted twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--measured {path} cannot be read: {error}") from None
    try:
        found = json.loads(text)
        rates = {dtype: float(rate) for dtype, rate in found["gemm_gflops"].items()}
        parts = found["steps"][0]["parts"]
        parts = {name: part for name, part in parts.items() if name in COMPUTE and "gflop" in part}
        floor_s = sum(part["gflop"] / rates[part["dtype"]] for part in parts.values())
        efficiency = floor_s / sum(part["seconds"] for part in parts.values())
        recipe, device = str(found["recipe"]), str(found["device"])
    except (ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError):
        raise UserError(
            f"--measured {path} is not what `dmae-ds bench step RECIPE --json` prints; write that to a file"
        ) from None
    if not (math.isfinite(efficiency) and efficiency > 0 and all(rate > 0 for rate in rates.values())):
        raise UserError(f"--measured {path} has {efficiency:g} of the peak, expected above 0; measure again")
    tflops = {dtype: rate / 1e3 for dtype, rate in rates.items()}
    half = tflops.get("bf16", tflops.get("fp16"))
    return Measured(efficiency, half, tflops.get("fp32"), recipe, device)
