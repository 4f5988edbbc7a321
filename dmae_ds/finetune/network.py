"""timm's classifiers: a checkpoint's trunk is read into them strictly, and timm alone loads the saved file.

    model = timm.create_model(name, **overrides, **classifier); model.load_state_dict(..., strict=True)

The three are in the file's metadata as `timm_name`, `timm_overrides` and `classifier`, the last two in JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmae_ds.config.evaluation import DistillConfig
from dmae_ds.config.networks import ModelConfig
from dmae_ds.errors import UserError
from dmae_ds.models.vit import build_timm_vit
from dmae_ds.output.durable import replacing
from dmae_ds.weights.label import CLASSIFIER, WEIGHTS, Label
from dmae_ds.weights.load import LoadedNetwork, load_network
from dmae_ds.weights.metadata import own_network_if_readable
from dmae_ds.weights.named import open_weights

GLOBAL_POOLS = {"mean": "avg", "cls": "token"}
HEAD_STD = 2e-5  # of a new head, for nearly equal logits at the start (MAE's published fine-tuning)


def classifier_kwargs(
    pool: str, num_classes: int, *, norm_first: bool = False, drop_path: float = 0.0
) -> dict:
    """Arguments of `timm.create_model` for a classifier, in addition to the geometry.

    pool `mean`: the mean of the patch tokens is normed (MAE's fine-tuning); norm_first: each token is normed
    by the network's own final norm, and then the mean is taken, as for frozen features. timm's Eva does one
    or the other by its name (DINOv3 norms first, EVA-02 the mean): give it norm_first=False
    """
    kwargs = {"num_classes": num_classes, "global_pool": GLOBAL_POOLS[pool]}
    if norm_first and pool == "mean":
        kwargs["fc_norm"] = False
    if drop_path:
        kwargs["drop_path_rate"] = drop_path
    return kwargs


def build_classifier(
    network: ModelConfig, kwargs: dict, *, seed: int, mean: tuple, std: tuple, where: str = "network"
) -> VisionTransformer:
    """Build timm's network with a head for these classes, with timm's initial weights, drawn from `seed`.

    kwargs: from `classifier_kwargs`; mean, std: of the pixels; the head's initial weights are near zero
    Raises UserError for a name or numbers that timm cannot build, or another kind of network.
    """
    vit = build_timm_vit(network.name, network.overrides(), where=where)
    if ":" in network.name:
        raise UserError(
            f"{where}.name '{network.name}' is a network of your own, and classifiers are built by timm; "
            "choose a timm name such as vit_base_patch16_224"
        )
    if kwargs.get("global_pool") == "token" and vit.cls_token is None:
        raise UserError(
            f"pool cls requires a network with a CLS token, and {network.name} has none; set pool=mean"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # timm's tasks read the pixel statistics from pretrained_cfg.
        model = timm.create_model(
            network.name,
            **network.overrides(),
            **kwargs,
            pretrained_cfg_overlay={"mean": tuple(mean), "std": tuple(std)},
        )
        nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)
        nn.init.zeros_(model.head.bias)
    return model


def is_eva(network: ModelConfig, *, where: str = "network") -> bool:
    """Whether timm builds this network as an Eva. Raises UserError for a name or numbers that don't fit."""
    return isinstance(build_timm_vit(network.name, network.overrides(), where=where), Eva)


def fill_trunk(model: VisionTransformer, path: Path, format: str, network: ModelConfig) -> tuple[int, str]:
    """Read everything but the head from a weights file.

    A norm behind the pooling keeps its initial weights (MAE's fine-tuning).
    Positional embeddings of another grid are fitted: sin-cos ones are computed for it, learned ones
    interpolated.
    Returns the step in the file's metadata (or 0), and a line about tensors that were not read or were
    changed.
    Raises UserError for a file that does not fit.
    """
    needed = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(("head.", "fc_norm."))
    }
    loaded = _load(model, needed, path, format, network, WEIGHTS)
    dropped, notes = loaded.dropped, loaded.notes
    not_read = [
        f"{len(tensors)} tensors of {name}"
        for name, tensors in (("decoder", dropped.decoder), ("head and norm", dropped.rest))
        if tensors
    ]
    notes += [f"not read: {', '.join(not_read)}"] if not_read else []
    step = loaded.weights.container.metadata.get("step", "0")
    return (int(step) if step.isdigit() else 0), "; ".join(notes)


def load_teacher(
    config: DistillConfig, *, num_classes: int, img_size: int, mean: tuple, std: tuple
) -> VisionTransformer:
    """Load a fine-tuned classifier, frozen and in eval mode; its pretrained_cfg has its own pixel statistics.

    mean, std: of the data, for a file that does not have its own
    Raises UserError for a file that is not a classifier of as many classes.
    """
    path = Path(config.teacher).expanduser()
    weights = open_weights(path, "dmae_ds", label=CLASSIFIER) if config.name is None else None
    in_file = None if weights is None else own_network_if_readable(weights.container)
    if config.name is None and (in_file is None or "classifier" not in weights.container.metadata):
        raise UserError(
            f"distill.teacher '{path}' does not name its network; "
            "give best.safetensors of an `eval finetune`, or set distill.name, such as vit_large_patch16_224"
        )
    if in_file is None:
        network = ModelConfig(name=config.name, img_size=img_size)
        kwargs = classifier_kwargs(config.pool, num_classes)
    else:
        described = json.loads(weights.container.metadata["classifier"])
        network, kwargs = ModelConfig(name=in_file[0], **in_file[1]), described["keys"]
        mean, std = described["mean"], described["std"]
    if kwargs["num_classes"] != num_classes:
        raise UserError(
            f"distill.teacher '{path}' has {kwargs['num_classes']} classes, data.train has {num_classes}; "
            "fine-tune a teacher on the same classes"
        )
    model = build_classifier(network, kwargs, seed=0, mean=mean, std=std, where="distill")
    teacher_size = model.patch_embed.img_size[0]
    if teacher_size != img_size:
        raise UserError(
            f"distill.teacher '{path}' takes images of {teacher_size} px, the network of {img_size} px; "
            "both get the same images: set network.img_size"
        )
    format = config.format if in_file is None else "dmae_ds"
    _load(model, model.state_dict(), path, format, network, CLASSIFIER)
    return model.eval().requires_grad_(False)


def _load(
    model: VisionTransformer,
    needed: dict[str, Tensor],
    path: Path,
    format: str,
    network: ModelConfig,
    label: Label,
) -> LoadedNetwork:
    """Read the tensors named in `needed` into the model."""
    loaded = load_network(
        path,
        needed,
        network=(network.name, network.overrides()),
        depth=len(model.blocks),
        grid=model.patch_embed.grid_size,
        num_prefix=0 if model.no_embed_class else model.num_prefix_tokens,
        label=label,
        format=format,
    )
    # `needed` is complete; other tensors keep their initial values.
    model.load_state_dict(loaded.tensors, strict=False)
    return loaded


def with_distillation_token(model: VisionTransformer, *, seed: int) -> tuple[VisionTransformer, ModelConfig]:
    """Add DeiT's distillation token and its head to a network (DeiT, Sec. 4).

    The token's positional embedding is zero. Returns the network, and its name and numbers. Raises UserError
    for a network that is not a plain ViT.
    """
    if not isinstance(model, VisionTransformer) or model.pos_embed is None or model.num_prefix_tokens != 1:
        raise UserError(
            "a distillation token requires a plain ViT, this network is not one; "
            "choose distill.method logits or features"
        )
    block = model.blocks[0]
    numbers = ModelConfig(
        name="deit_base_distilled_patch16_224",
        img_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
    )
    kwargs = {
        "num_classes": model.num_classes,
        "drop_path_rate": getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0),
    }
    statistics = {key: model.pretrained_cfg[key] for key in ("mean", "std")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(
            numbers.name, **numbers.overrides(), **kwargs, pretrained_cfg_overlay=statistics
        )
        nn.init.trunc_normal_(network.head_dist.weight, std=HEAD_STD)
        nn.init.zeros_(network.head_dist.bias)
    positions = model.pos_embed.detach()
    # [1, 1 + L, D] -> [1, 2 + L, D]: CLS, the new token, patches
    both = torch.cat([positions[:, :1], torch.zeros_like(positions[:, :1]), positions[:, 1:]], dim=1)
    try:
        network.load_state_dict({**network.state_dict(), **model.state_dict(), "pos_embed": both})
    except RuntimeError as error:  # registers, layer scale
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"a distillation token requires a plain ViT, this network is not one ({reason}); "
            "choose distill.method logits or features"
        ) from None
    return network, numbers


def save_classifier(
    path: Path,
    tensors: dict[str, Tensor],
    network: ModelConfig,
    kwargs: dict,
    *,
    mean: tuple,
    std: tuple,
    **extra: object,
) -> None:
    """Write a classifier in timm's names, complete or not at all; `extra` goes into the metadata as text."""
    described = {
        "keys": {name: value for name, value in kwargs.items() if name != "drop_path_rate"},
        "mean": list(mean),
        "std": list(std),
    }
    metadata = {
        "format": "pt",
        "timm_name": network.name,
        "timm_overrides": json.dumps(network.overrides()),
        "classifier": json.dumps(described),
        **{name: str(value) for name, value in extra.items()},
    }
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as file:
        file.write(save(plain, metadata))
