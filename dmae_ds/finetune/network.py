"""timm's classifier with a checkpoint's trunk in it: read strictly, saved so that timm alone loads it again.

    model = timm.create_model(name, **overrides, **classifier); model.load_state_dict(..., strict=True)

with the three out of the file's metadata: `timm_name`, `timm_overrides` and `classifier`, the last two in JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmae_ds.config.evaluation import DistillConfig
from dmae_ds.config.run import ModelConfig
from dmae_ds.errors import UserError
from dmae_ds.models.vit import build_timm_vit
from dmae_ds.output.durable import replacing
from dmae_ds.weights.label import CLASSIFIER, WEIGHTS, Label
from dmae_ds.weights.load import LoadedNetwork, load_network
from dmae_ds.weights.metadata import own_network_if_readable
from dmae_ds.weights.named import open_weights

GLOBAL_POOLS = {"mean": "avg", "cls": "token"}
HEAD_STD = 2e-5  # of a new head: it starts at nearly equal logits (MAE's published fine-tuning)


def classifier_keys(pool: str, num_classes: int, *, norm_first: bool = False, drop_path: float = 0.0) -> dict:
    """What `timm.create_model` is told beside the geometry.

    pool `mean`: the mean of the patch tokens is normed (MAE's fine-tuning); norm_first: each token is, by the network's
    own final norm, and then the mean is taken, as frozen features are
    """
    keys = {"num_classes": num_classes, "global_pool": GLOBAL_POOLS[pool]}
    keys |= {"fc_norm": False} if norm_first and pool == "mean" else {}
    return keys | ({"drop_path_rate": drop_path} if drop_path else {})


def build_classifier(
    network: ModelConfig, keys: dict, *, seed: int, mean: tuple, std: tuple, where: str = "network"
) -> VisionTransformer:
    """timm's own network with a head for these classes; initial weights are timm's, drawn from `seed`, and a head near zero.

    keys: of `classifier_keys`. Raises UserError for a name or numbers that timm can't build, or another kind of network.
    """
    if (
        not isinstance(build_timm_vit(network.name, network.overrides(), where=where), VisionTransformer)
        or ":" in network.name
    ):
        raise UserError(
            f"{where}.name '{network.name}' is not a VisionTransformer of timm's; classifiers are trained on those, such as vit_base_patch16_224"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # tasks read the data's statistics out of pretrained_cfg
        model = timm.create_model(
            network.name,
            **network.overrides(),
            **keys,
            pretrained_cfg_overlay={"mean": tuple(mean), "std": tuple(std)},
        )
        nn.init.trunc_normal_(model.head.weight, std=HEAD_STD)
        nn.init.zeros_(model.head.bias)
    return model


def fill_trunk(model: VisionTransformer, path: Path, format: str, network: ModelConfig) -> tuple[int, str]:
    """Read everything but the head from a weights file; a norm behind the pooling stays new (MAE's fine-tuning).

    Position codes of another grid are fitted: sin-cos ones computed anew, learned ones interpolated by timm.
    Returns (the step that the file says it was trained to, or 0; a line about what was left in the file or changed).
    Raises UserError where the file doesn't fit.
    """
    needed = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(("head.", "fc_norm."))
    }
    loaded = _load(model, needed, path, format, network, WEIGHTS)
    dropped, notes = loaded.dropped, loaded.notes
    left = [
        f"{len(part)} tensors of {name}"
        for name, part in (("decoder", dropped.decoder), ("head and norm", dropped.rest))
        if part
    ]
    notes += [f"left in the file: {', '.join(left)}"] if left else []
    step = loaded.weights.container.metadata.get("step", "0")
    return (int(step) if step.isdigit() else 0), "; ".join(notes)


def load_teacher(
    config: DistillConfig, *, num_classes: int, img_size: int, mean: tuple, std: tuple
) -> VisionTransformer:
    """A fine-tuned classifier, frozen, in eval mode; its pretrained_cfg has the statistics of its own pixels.

    mean, std: of the data, for a file that doesn't say its own

    Raises UserError for a file that isn't a classifier of as many classes.
    """
    path = Path(config.teacher).expanduser()
    weights = open_weights(path, "dmae_ds", label=CLASSIFIER) if config.name is None else None
    own = None if weights is None else own_network_if_readable(weights.container)
    if config.name is None and (own is None or "classifier" not in weights.container.metadata):
        raise UserError(
            f"distill.teacher '{path}' doesn't say what it is; give best.safetensors of an `eval finetune`, or set distill.name, such as vit_large_patch16_224"
        )
    if own is None:
        network, keys = (
            ModelConfig(name=config.name, img_size=img_size),
            classifier_keys(config.pool, num_classes),
        )
    else:
        about = json.loads(weights.container.metadata["classifier"])
        network, keys, mean, std = (
            ModelConfig(name=own[0], **own[1]),
            about["keys"],
            about["mean"],
            about["std"],
        )
    if keys["num_classes"] != num_classes:
        raise UserError(
            f"distill.teacher '{path}' tells {keys['num_classes']} classes apart, data.train has {num_classes}; fine-tune a teacher on the same classes"
        )
    model = build_classifier(network, keys, seed=0, mean=mean, std=std, where="distill")
    if model.patch_embed.img_size[0] != img_size:
        raise UserError(
            f"distill.teacher '{path}' sees pictures of {model.patch_embed.img_size[0]} px, the network of {img_size} px; both see the same ones: set network.img_size"
        )
    format = config.format if own is None else "dmae_ds"
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
    # All of `needed` was there; the rest stays as it was initialised.
    model.load_state_dict(loaded.tensors, strict=False)
    return loaded


def with_distillation_token(model: VisionTransformer, *, seed: int) -> tuple[VisionTransformer, ModelConfig]:
    """The same network with DeiT's second token, its head beside the first, and a zero position code for it (DeiT, Sec. 4).

    Returns it and its name and numbers. Raises UserError for a network that isn't a plain ViT.
    """
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
    keys = {
        "num_classes": model.num_classes,
        "drop_path_rate": getattr(model.blocks[-1].drop_path1, "drop_prob", 0.0),
    }
    statistics = {key: model.pretrained_cfg[key] for key in ("mean", "std")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(
            numbers.name, **numbers.overrides(), **keys, pretrained_cfg_overlay=statistics
        )
        nn.init.trunc_normal_(network.head_dist.weight, std=HEAD_STD)
        nn.init.zeros_(network.head_dist.bias)
    positions = model.pos_embed.detach()
    # [1, 1 + L, D] -> [1, 2 + L, D]: CLS, the new token, patches
    both = torch.cat([positions[:, :1], torch.zeros_like(positions[:, :1]), positions[:, 1:]], dim=1)
    try:
        network.load_state_dict({**network.state_dict(), **model.state_dict(), "pos_embed": both})
    except RuntimeError as error:  # registers, layer scale
        raise UserError(
            f"a distillation token goes beside the CLS of a plain ViT, not into this network ({' '.join(str(error).split())[:160]}); choose distill.method logits or features"
        ) from None
    return network, numbers


def save_classifier(
    path: Path,
    tensors: dict[str, Tensor],
    network: ModelConfig,
    keys: dict,
    *,
    mean: tuple,
    std: tuple,
    **said: object,
) -> None:
    """Write a classifier in timm's names, whole or not at all; `said` goes into the metadata as text."""
    about = {
        "keys": {name: value for name, value in keys.items() if name != "drop_path_rate"},
        "mean": list(mean),
        "std": list(std),
    }
    metadata = {
        "format": "pt",
        "timm_name": network.name,
        "timm_overrides": json.dumps(network.overrides()),
        "classifier": json.dumps(about),
        **{name: str(value) for name, value in said.items()},
    }
    with replacing(path) as file:
        file.write(
            save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
        )
