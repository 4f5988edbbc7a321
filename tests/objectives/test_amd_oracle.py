"""AMD compared with numbers of its published code: teacher's features, losses and gradients."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from torch import nn

from dmae_ds.config.imitation import AmdConfig
from dmae_ds.config.networks import TeacherConfig
from dmae_ds.models.masking import gather_patches
from dmae_ds.models.patches import patchify
from dmae_ds.models.positions import sincos_positions_1d
from dmae_ds.models.vit import MaskedViT, build_timm_vit
from dmae_ds.objectives.amd import Amd, AmdBatch
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.teacher.build import load_frozen_teacher

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DISTANCES = {"mse": "l2", "l1": "l1", "sml1": "smooth_l1"}
CASES = ["a", "a.l1", "a.smooth_l1", "a.raw_pixels", "a.factors", "b"]


def network(**kwargs) -> nn.Module:
    """The published code's: no CLS; the one-dimensional code is set later, keys have a bias of zero."""
    more = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return timm.create_model("vit_tiny_patch16_224", **more, **kwargs)


def thin(**kwargs) -> nn.Module:
    return network(mlp_ratio=1, **kwargs)


def half(**kwargs) -> nn.Module:
    return network(mlp_ratio=2, **kwargs)


NETWORKS = {1: f"{__name__}:thin", 2: f"{__name__}:half"}


class TwoFrames(Amd):
    """The oracle's case b: the decoder predicts an image twice, as two frames normalised together."""

    def pixel_loss(self, latent, batch):
        predicted = self.decoder(latent, batch.ids_keep, batch.ids_masked)
        pixels = (batch.masked - batch.black) / (batch.white - batch.black)
        frames = torch.stack([pixels, pixels], dim=2).flatten(2, 4)  # [N, M, 2 * P * P, C]
        std, mean = torch.std_mean(frames, dim=2, keepdim=True)
        return nn.functional.mse_loss(predicted, ((frames - mean) / (std + 1e-6)).flatten(2))


def our_state(state: dict) -> dict:
    """Published names and shapes -> ours: biases of q and v joined, frames added up."""
    found = {}
    for name, tensor in state.items():
        if name.endswith("v_bias"):
            q, v = state[name.replace("v_bias", "q_bias")], tensor
            found[name.replace("v_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
        elif not name.endswith("q_bias"):
            found[name] = tensor.sum(2) if tensor.ndim == 5 else tensor
    return found


def our_name(name: str) -> str:
    for theirs, ours in (
        ("encoder.projection_heads.", "direct_maps."),
        ("encoder_to_decoder.", "decoder.embed."),
        ("decoder.head.", "decoder.pred."),
        ("encoder.", "student."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if name == "mask_token":
        return "decoder.mask_token"
    if name.startswith("generator_mask_tokens."):
        return f"generators.{name.rpartition('.')[2]}.mask_token"
    return name


def blocks(depth: int, width: int, heads: int, ratio: int) -> nn.ModuleList:
    norm = partial(nn.LayerNorm, eps=1e-6)
    return nn.ModuleList(Block(width, heads, ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))


def build_published(tensors: dict, options: dict) -> Amd:
    """The objective with the oracle's networks, options and weights."""
    shape = {"img_size": options["img"], "patch_size": options["patch"]}
    numbers = {key: options[f"student_{key}"] for key in ("depth",)}
    student = MaskedViT(
        build_timm_vit(
            NETWORKS[options["mlp_ratio"]],
            {**shape, **numbers, "embed_dim": options["student_dim"], "num_heads": options["student_heads"]},
        )
    ).to_empty(device="cpu")
    student.pos_embed = sincos_positions_1d(student.embed_dim, student.num_patches)[:, 1:]
    pairs = {
        name: list(zip(options[f"student_{short}"], options[f"teacher_{short}"], strict=True))
        for name, short in (("direct", "dir"), ("generative", "gen"))
    }
    config = AmdConfig(
        name="amd",
        mask_ratio=options["mask_student"],
        patch_count="int",
        projection="shared",
        pixels="channel" if options.get("norm", True) else "raw",
        distance=DISTANCES[options.get("align_loss", "mse")],
        pixel_weight=options.get("recfac", 1.0),
        direct_weight=options.get("dirfac", 1.0),
        generative_weight=options.get("genfac", 1.0),
        decoder={
            "depth": options["decoder_depth"],
            "embed_dim": options["decoder_dim"],
            "num_heads": options["decoder_heads"],
        },
        generator={"depth": options["generator_depth"]},
        **pairs,
    )
    num_seen = student.num_patches - round(student.num_patches * options["mask_teacher"])
    teacher = TeacherShape(
        options["teacher_depth"], options["teacher_dim"], has_cls=False, num_superset=num_seen
    )
    cls = Amd if options["frames"] == 1 else TwoFrames
    objective = cls(config, student=student, teacher=teacher, generator=torch.Generator().manual_seed(0))
    decoder, ratio = objective.decoder, options["mlp_ratio"]
    decoder.blocks = blocks(options["decoder_depth"], options["decoder_dim"], options["decoder_heads"], ratio)
    if options["frames"] == 2:
        num_pixels = 2 * decoder.pred.out_features
        decoder.pred, decoder.shape = nn.Linear(options["decoder_dim"], num_pixels), (num_pixels,)
    for generator in objective.generators:
        width = options["teacher_dim"]
        generator.blocks = blocks(options["generator_depth"], width, width // 64, ratio)
    for part in (decoder, *objective.generators):
        part.pos_embed = sincos_positions_1d(part.pos_embed.shape[2], student.num_patches)
    state = {our_name(name): tensor for name, tensor in our_state(tensors).items()}
    state = {
        name: tensor for name, tensor in state.items() if ".norm." not in name or "generators" not in name
    }
    missing, unexpected = objective.load_state_dict(state, strict=False)
    assert not unexpected and all("pos_embed" in name or name == "decoder.embed.bias" for name in missing)
    nn.init.zeros_(decoder.embed.bias)
    return objective


def published_batch(tensors: dict, patch_size: int) -> AmdBatch:
    patches = patchify(tensors["images"].float(), patch_size)
    seen = tensors["mask_student"]
    # Raster order; of the masked patches those first that the teacher sees.
    order = torch.argsort(seen * (2 - tensors["mask_difference"]), dim=1, stable=True)
    num_visible = int((seen[0] == 0).sum())
    ids_keep, ids_masked = order[:, :num_visible], order[:, num_visible:]
    mean, std = (torch.tensor(numbers) for numbers in IMAGENET)
    return AmdBatch(
        *(gather_patches(patches, ids) for ids in (ids_keep, ids_masked)),
        ids_keep,
        ids_masked,
        black=-mean / std,
        white=(1 - mean) / std,
    )


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_published_ones(oracles, tmp_path, case):
    whole = case[0]
    every = load_file(oracles / "amd.safetensors")
    with safe_open(oracles / "amd.safetensors", "pt") as file:
        cases, names = (json.loads(file.metadata()[key]) for key in ("cases", "names"))
    options = {**cases[whole], **cases[case]}
    tensors = {
        name.removeprefix(f"{whole}."): tensor.float() if tensor.dtype == torch.float16 else tensor
        for name, tensor in every.items()
        if name.startswith(f"{whole}.")
    }
    sides = {
        side: {
            name.removeprefix(f"{side}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{side}.")
        }
        for side in ("student", "teacher")
    }
    objective = build_published(sides["student"], options)
    batch = published_batch(tensors, options["patch"])
    codes = sincos_positions_1d(options["teacher_dim"], objective.student.num_patches)[:, 1:]
    save_file({**our_state(sides["teacher"]), "pos_embed": codes.clone()}, tmp_path / "teacher.safetensors")
    teacher = load_frozen_teacher(
        TeacherConfig(
            name=NETWORKS[options["teacher_mlp_ratio"]],
            weights=str(tmp_path / "teacher.safetensors"),
            format="timm",
            sees="superset",
            mask_ratio=options["mask_teacher"],
            img_size=options["img"],
            patch_size=options["patch"],
            embed_dim=options["teacher_dim"],
            depth=options["teacher_depth"],
            num_heads=options["teacher_heads"],
        ),
        taps=objective.taps,
        whole_blocks=options["teacher_depth"],
        mean=IMAGENET[0],
        std=IMAGENET[1],
        device=torch.device("cpu"),
    )
    features = teacher.features(batch)
    num_visible = batch.ids_keep.shape[1]
    for number, (_, block) in enumerate(objective.direct):
        found = features[f"block/{block}"][:, :num_visible]
        torch.testing.assert_close(found, tensors[f"teacher_dir.{number}"], rtol=1e-4, atol=1e-5)
    for number, (_, block) in enumerate(objective.generative):
        found = features[f"block/{block}"][:, num_visible:]
        torch.testing.assert_close(found, tensors[f"teacher_gen.{number}"], rtol=1e-4, atol=1e-5)
    out = objective(batch, features)
    expected = {
        name: every[f"{case}.{name}"]
        for name in ("loss", "rec_loss", "dir_loss", "gen_loss", "grad_norm_float64")
    }
    pairs = [name for name in out if name.startswith("align/")]
    generated = [out[name] for name in pairs if name.endswith("-generated")]
    direct = [out[name] for name in pairs if not name.endswith("-generated")]
    for found, name in (
        (out["loss"], "loss"),
        (out["pixel"], "rec_loss"),
        (torch.stack(direct).mean(), "dir_loss"),
        (torch.stack(generated).mean(), "gen_loss"),
    ):
        assert found.item() == pytest.approx(expected[name].item(), rel=1e-6), name
    out["loss"].backward()
    compare_gradients(objective, dict(zip(names[whole], expected["grad_norm_float64"], strict=True)), options)


def compare_gradients(objective: Amd, norms: dict, options: dict) -> None:
    ours = {name: p.grad for name, p in objective.named_parameters()}
    compared = {"decoder.embed.bias"}  # which is not there
    for name, norm in norms.items():
        if math.isnan(norm):
            assert name.startswith("generators.") and ".norm." in name
            continue
        if name.endswith(("q_bias", "v_bias")):
            mine = our_name(name[: -len("q_bias")] + "qkv.bias")
            gradient = ours[mine].chunk(3)[0 if name.endswith("q_bias") else 2]
        else:
            mine = our_name(name)
            gradient = ours[mine]
        compared.add(mine)
        # The gradient of each frame's weights is that of their sum.
        factor = math.sqrt(options["frames"]) if "patch_embed.proj.weight" in name else 1.0
        assert gradient.norm().item() * factor == pytest.approx(norm.item(), rel=1e-5, abs=1e-9), name
    assert compared == set(ours)
