"""A frozen network's own output, for objectives that tap `tokens`, `cls` or `pooled`.

It is what timm's `forward_features` gives, without registers, and the network's own attention pool (SigLIP,
PE), which is timm's `forward_head(pre_logits=True)`. A network whose norm comes after its pooling (EVA-02)
has no norm here, as in timm.
"""

from __future__ import annotations

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.models.vit import build_timm_vit

OUTPUT_TAPS = ("tokens", "cls", "pooled")


class TeacherOutput(nn.Module):
    """The final norm, and where `pooled` is tapped the attention pool, under timm's names.

    vit: timm's network, whose modules it takes over
    """

    def __init__(self, vit: VisionTransformer | Eva, *, taps: tuple[str, ...]):
        super().__init__()
        self.taps = tuple(tap for tap in taps if tap in OUTPUT_TAPS)
        self.norm = vit.norm
        self.num_skipped = 0  # tokens in front that the pool does not read
        if "pooled" in self.taps:
            self.attn_pool, self.fc_norm = vit.attn_pool, vit.fc_norm
            if not pools_prefix(vit):
                self.num_skipped = int(vit.cls_token is not None)

    def forward(self, encoded: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> dict[str, Tensor]:
        """Return what is tapped.

        encoded: [N, 1 + K, D_t], [N, K, D_t] without CLS: right after the encoder's last block
        Returns {"tokens": of encoded's shape, "cls": [N, D_t], "pooled": [N, D_t]}.
        """
        tokens = self.norm(encoded)
        outputs = {"tokens": tokens}
        if "cls" in self.taps:
            outputs["cls"] = tokens[:, 0]
        if "pooled" in self.taps:
            outputs["pooled"] = self.fc_norm(self.attn_pool(tokens[:, self.num_skipped :]))
        return {tap: outputs[tap] for tap in self.taps}


def meta_output(name: str, overrides: dict, *, taps: tuple[str, ...]) -> TeacherOutput:
    """Build a network's output on the meta device. Raises UserError for a tap that the network lacks."""
    vit = build_timm_vit(name, overrides, depth=1, where="teacher")
    check_output(name, vit, taps)
    return TeacherOutput(vit, taps=taps)


def check_output(
    name: str, vit: VisionTransformer | Eva, taps: tuple[str, ...], *, section: str = "teacher"
) -> None:
    """Raise UserError for a tap of the output that timm's network `vit` lacks."""
    for tap in taps:
        reason = why_no_output(vit, tap)
        if reason:
            raise UserError(
                f"the objective taps '{tap}' and {section}.name '{name}' {reason}; "
                f"it gives {', '.join(output_taps(vit))}"
            )


def output_taps(vit: VisionTransformer | Eva) -> list[str]:
    """The taps of its output that timm's network gives."""
    return [tap for tap in OUTPUT_TAPS if not why_no_output(vit, tap)]


def why_no_output(vit: VisionTransformer | Eva, tap: str) -> str:
    """Why timm's network does not give a tap, as the end of a sentence; empty where it does."""
    if tap == "cls" and vit.cls_token is None:
        return "has no CLS token"
    if tap == "pooled" and vit.attn_pool is None:
        return "has no attention pool of its own"
    if tap == "pooled" and pools_prefix(vit) and vit.num_prefix_tokens > 1:
        return "pools its registers too, which are never imitated"
    return ""


def pools_prefix(vit: VisionTransformer | Eva) -> bool:
    """Whether the attention pool reads CLS and registers, as timm's Eva does, next to the patches."""
    return isinstance(vit, Eva) or vit.pool_include_prefix
