"""GPUs that `dmae-ds plan --gpu NAME` knows: the numbers of their data sheets, and a share of them to expect.

Sources: NVIDIA's data sheets (V100 SXM2 32 GB, A100 80 GB SXM, H100 and H200 SXM, B200 in an HGX B200, L4,
L40S, A10), the whitepapers of Ampere GA102 (RTX A6000) and Ada (RTX 4090). Rates of matrix products are
dense, with fp32 sums. GiB are what torch reports, rounded down. A rate inside a node is one direction of
NVLink, or of PCIe 4.0 x16 where a GPU has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError
from dmae_ds.plan.cost import DEVICE_SHARE, EFFICIENCY

PCIE_GBPS = 256.0  # PCIe 4.0 x16, one direction
HOPPER = 0.25  # published on H100: 22.9% (ViT-5-S) and 28.9% (ViT-g)


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet."""

    memory_gib: float
    tflops: float  # in bf16 and fp16
    fp32_tflops: float  # in TF32; of a V100, which has none, in fp32
    memory_gb_s: float  # GB/s of its memory
    node_link_gbps: float = PCIE_GBPS
    efficiency: float = EFFICIENCY  # share of `tflops` to expect
    has_bf16: bool = True

    def check(self, config: RunConfig) -> None:
        """Raise UserError where the recipe uses bf16 and this GPU has none."""
        teachers = config.named_teachers().values()
        if self.has_bf16:
            return
        dtypes = ", ".join(f"{teacher.key('dtype')} {teacher.dtype}" for teacher in teachers)
        if config.precision.startswith("bf16") or {t.dtype for t in teachers} & {"bf16", "fp8"}:
            raise UserError(
                f"precision {config.precision}, {dtypes or 'no teacher'}: this GPU has no bf16; "
                "set precision=fp16 (and the teacher's dtype=fp16)"
            )

    def machine(self) -> dict[str, float]:
        """Keyword arguments for `cost.Machine`."""
        return {
            "memory_gib": self.memory_gib,
            "tflops": self.tflops,
            "fp32_tflops": self.fp32_tflops,
            "node_link_gbps": self.node_link_gbps,
            "device_gb_s": self.memory_gb_s * DEVICE_SHARE,
            "efficiency": self.efficiency,
        }


GPUS = {
    "v100": Gpu(31, 125, 15.7, 900, 1200, has_bf16=False),
    "a100": Gpu(79, 312, 156, 2039, 2400, HOPPER),  # published: 44.5% (ViT-g), by other kernels than ours
    "h100": Gpu(79, 989, 494, 3350, 3600, HOPPER),
    "h200": Gpu(139, 989, 494, 4800, 3600, HOPPER),
    "b200": Gpu(178, 2250, 1100, 8000, 7200),
    "l4": Gpu(22, 121, 60, 300),
    "l40s": Gpu(44, 362, 183, 864),
    "a10": Gpu(22, 125, 62.5, 600),
    "a6000": Gpu(47, 154.8, 77.4, 768),
    "rtx4090": Gpu(23, 165.2, 82.6, 1008),
}


def gpu_called(name: str) -> Gpu:
    """Find a GPU by name. Raises UserError with the known names."""
    key = name.lower()
    if key not in GPUS:
        near = get_close_matches(key, GPUS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--gpu {name} is not known; {hint}choose {', '.join(GPUS)}, or give --gpu-memory-gib, --tflops "
            "and --node-link-gbps"
        )
    return GPUS[key]
