"""Taps of a frozen MAE's decoder: only its first blocks exist, and they compute what transformers' does."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.models.decoder import Decoder, TokenDecoder
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import build_student
from dmae_ds.teacher.build import build_frozen_teacher
from tests.messages import refused

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
NAME = "vit_tiny_patch16_224"


def build(weights, *, taps, format="hf", **options):
    config = TeacherConfig(
        name=NAME,
        weights=str(weights),
        format=format,
        decoder_num_heads=2,
        **{"decoder_embed_dim": 24, "decoder_depth": 3, **SHAPE, **options},
    )
    return build_frozen_teacher(
        config, taps=taps, whole_blocks=2, mean=(0.5,) * 3, std=(0.5,) * 3, device=torch.device("cpu")
    )


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=3,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=96,
        mask_ratio=0.75,
    )
    model = transformers.ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_features_are_those_of_transformers_at_every_decoder_block(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    teacher = build(tmp_path, taps=("decoder/2", "decoder/1", "block/2"))
    assert len(teacher.top.decoder_blocks) == 2 and teacher.vit.depth == 2
    reconstructor = build(tmp_path, taps=("prediction", "decoder/3"))
    assert len(reconstructor.top.decoder_blocks) == 3
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        encoded = reference.vit(images, noise=noise)
        blocks = []

        def keep_output(module, inputs, output):
            blocks.append(output[0] if isinstance(output, tuple) else output)

        # transformers puts tokens back on the grid before its first decoder block; a hook gets each output.
        layers = next(
            module for module in reference.decoder.modules() if isinstance(module, torch.nn.ModuleList)
        )
        hooks = [layer.register_forward_hook(keep_output) for layer in layers]
        predicted = reference.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
    for hook in hooks:
        hook.remove()
    order = noise.argsort(dim=1, stable=True)
    keep, masked = order[:, :4], order[:, 4:]
    patches = images.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 8, 8, 3)
    rows = torch.arange(2)[:, None]
    batch = PatchBatch(
        visible=patches[rows, keep], masked=patches[rows, masked], ids_keep=keep, ids_masked=masked
    )
    features = teacher.features(batch)
    places = torch.cat([torch.zeros(2, 1, dtype=torch.long), 1 + order], dim=1)
    for tap, expected in (("decoder/1", blocks[0]), ("decoder/2", blocks[1])):
        expected = expected[rows, places]
        assert features[tap].shape == (2, 17, 24)
        torch.testing.assert_close(features[tap], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    reconstructed = reconstructor.features(batch)
    assert list(reconstructed) == ["prediction", "decoder/3"]
    assert reconstructed["prediction"].shape == (2, 12, 8, 8, 3)
    expected = predicted[rows, masked]  # [N, L - K, P * P * 3]
    torch.testing.assert_close(
        reconstructed["prediction"].flatten(2), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def full_mae(tmp_path, *, decoder: bool):
    torch.manual_seed(3)
    state = timm.create_model(NAME, num_classes=0, **SHAPE).state_dict()
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}
    if decoder:
        shape = {**SHAPE, "embed_dim": 24, "mlp_ratio": 4}
        blocks = timm.create_model(NAME, num_classes=0, **shape).blocks.state_dict()
        state |= {
            "decoder_embed.weight": torch.randn(24, 32),
            "decoder_embed.bias": torch.randn(24),
            "mask_token": torch.randn(1, 1, 24),
            "decoder_pos_embed": torch.randn(1, 17, 24),
        }
        state |= {f"decoder_blocks.{name}": tensor for name, tensor in blocks.items()}
    path = tmp_path / "mae.pth"
    torch.save({"model": state}, path)
    return path


def test_upper_decoder_blocks_stay_in_the_file(tmp_path):
    teacher = build(full_mae(tmp_path, decoder=True), taps=("decoder/1",), format="mae")
    assert len(teacher.top.decoder_blocks) == 1
    assert "upper decoder blocks" in teacher.parts.describe_dropped()


def test_a_run_folder_of_ours_has_its_decoder_next_to_the_student(tmp_path):
    generator = torch.Generator().manual_seed(0)
    student = build_student(NAME, SHAPE, generator=generator)
    decoder = Decoder(
        encoder_dim=32, patch_size=8, grid=(4, 4), depth=2, embed_dim=24, num_heads=2, generator=generator
    )
    about = {"timm_name": NAME, "timm_overrides": json.dumps(SHAPE)}
    save_file(student.state_dict(), tmp_path / "student.safetensors", metadata=about)
    whole = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()} | {
        "heads.0.weight": torch.zeros(1)
    }
    save_file(whole, tmp_path / "decoder.safetensors", metadata=about)
    order = torch.rand(2, 16, generator=generator).argsort(dim=1)
    pixels = torch.randn(2, 16, 8, 8, 3, generator=generator)
    batch = PatchBatch(
        visible=pixels[:, :4], masked=pixels[:, 4:], ids_keep=order[:, :4], ids_masked=order[:, 4:]
    )
    for weights in (tmp_path, tmp_path / "student.safetensors"):
        teacher = build(weights, taps=("prediction", "decoder/2"), format="dmae_ds", decoder_depth=2)
        features = teacher.features(batch)
        with torch.no_grad():
            latent, _ = student(batch.visible, batch.ids_keep)
            pixels = decoder(latent, batch.ids_keep, batch.ids_masked)
            tokens = TokenDecoder.forward(decoder, latent, batch.ids_keep, batch.ids_masked)
        torch.testing.assert_close(features["prediction"], pixels)
        torch.testing.assert_close(features["decoder/2"], tokens)
    with refused("teacher.decoder_depth is 1", tmp_path):
        build(tmp_path, taps=("prediction",), format="dmae_ds", decoder_depth=1)
    with refused("teacher.decoder_embed_dim is 48", tmp_path, "teacher.decoder_embed_dim=24"):
        build(tmp_path, taps=("decoder/1",), format="dmae_ds", decoder_embed_dim=48)
    (tmp_path / "decoder.safetensors").unlink()
    with refused("teacher.weights", tmp_path, "decoder block 1", "run folder"):
        build(tmp_path, taps=("decoder/1",), format="dmae_ds")


def test_a_file_without_a_decoder_is_refused(tmp_path):
    with refused("teacher.weights", "mae.pth", "without a decoder", "decoder block 4"):
        build(full_mae(tmp_path, decoder=False), taps=("decoder/4",), format="mae")


def test_a_decoder_that_is_too_short_or_has_other_heads_is_refused(tmp_path):
    path = full_mae(tmp_path, decoder=True)
    with refused("missing 12: decoder_blocks.2"):
        build(path, taps=("decoder/3",), format="mae")
    config = TeacherConfig(name=NAME, weights=str(path), format="mae", decoder_embed_dim=24, **SHAPE)
    with refused("teacher.decoder_num_heads 16", "teacher.decoder_embed_dim 24"):
        build_frozen_teacher(
            config,
            taps=("decoder/1",),
            whole_blocks=2,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            device=torch.device("cpu"),
        )
    with refused("teacher.sees=visible"):
        build(path, taps=("decoder/1",), format="mae", sees="all")


def test_a_tap_of_a_block_leaves_the_decoder_in_the_file(tmp_path):
    teacher = build(full_mae(tmp_path, decoder=True), taps=("block/1",), format="mae")
    assert teacher.top is None and "decoder" in teacher.parts.describe_dropped()
