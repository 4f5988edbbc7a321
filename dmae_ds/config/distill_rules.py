"""The rules by which `dmae-ds distill` chooses the keys of a recipe: pure functions, no torch.

Each choice comes with its reason, which is printed and written above the recipe. Values that the user gave
are taken as they are, and the others follow them. dmae_ds/distill/README.md lists the rules and their
evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dmae_ds.config.objective_base import DecoderConfig
from dmae_ds.errors import UserError

OBJECTIVE = "dmae"  # takes any teacher, and needs neither labels nor a decoder of the teacher

PAPER_IMAGES, PAPER_BATCH, PAPER_WIDTH, PAPER_EPOCHS = 1_281_167, 4096, 768, 100  # DMAE, Sec. 4.1
PAPER_PEAK_LR = 1.5e-4 * PAPER_BATCH / 256
MAX_EPOCHS, MAX_WARMUP_EPOCHS = 1600, 40  # the longest of MAE's runs, and their warm-up (MAE, Table 1f, 8)
STEPS_PER_EPOCH, MIN_BATCH = 16, 16
CPU_MICRO_BATCH = 32
CPU_MINUTES, CPU_FLOPS = 10, 20e9  # what a run may take on CPUs, by a guess of a core's FLOP/s in fp32
CORES_PER_RANK = 8
HEAD_WIDTH = 32  # of an attention head of the decoder, as in MAE's (512 / 16)
WHOLE_DECODER_WIDTH = 512  # a narrower decoder has half of the blocks


@dataclass(frozen=True)
class Shape:
    """What a vision transformer's work depends on: width of a token, blocks, patches of an image."""

    width: int
    depth: int
    num_patches: int


@dataclass(frozen=True)
class Facts:
    """What the choices depend on.

    num_images: of data.train
    drops_tokens: whether the teacher was trained on a part of the patches, as masked autoencoders are
    can_measure_loss: whether losses on held-out images can be measured while training
    num_gpus, num_cores: of this machine; has_bf16: of its GPUs
    """

    num_images: int
    student: Shape
    teacher: Shape
    drops_tokens: bool
    can_measure_loss: bool
    num_ranks: int
    num_gpus: int
    num_cores: int
    has_bf16: bool = True


class Choice(NamedTuple):
    """A key of the recipe, its value, and why."""

    key: str
    value: object
    reason: str


def choose(facts: Facts, given: Mapping[str, object], *, has_decoder: bool = True) -> list[Choice]:
    """Choose every key that the user has not given.

    given: {key: value} of the user's; has_decoder: whether the objective's section has one
    Raises UserError where no batch fits.
    """
    choices: list[Choice] = []

    def add(key: str, value: object, reason: str) -> object:
        if key in given:
            return given[key]
        choices.append(Choice(key, value, reason))
        return value

    sees = add("teacher.sees", *_sees(facts))
    if sees == "all":
        add("teacher.standardize", "layer_norm", "features of such teachers have a few very large channels")
    decoder = choose_decoder(facts.student)
    share = None
    if has_decoder:
        width = add("objective.decoder.embed_dim", decoder.embed_dim, "2/3 of the student's width, to 512")
        depth = add("objective.decoder.depth", decoder.depth, "8 blocks at width 512, 4 below")
        share = decoder_share(facts, width=width, depth=depth, sees=sees)
        default = decoder_share(facts, width=512, depth=8, sees=sees)
        text = f"heads of {HEAD_WIDTH}; this decoder is {share:.0%} of a step's work, 8 x 512 {default:.0%}"
        add("objective.decoder.num_heads", max(1, width // HEAD_WIDTH), text)
        decoder = decoder.model_copy(update={"embed_dim": width, "depth": depth})
    batch = add("optim.global_batch", *_batch(facts))
    share_of_rank = batch // facts.num_ranks
    if not facts.num_gpus and share_of_rank > CPU_MICRO_BATCH:
        add("optim.micro_batch", CPU_MICRO_BATCH, "on CPUs, for memory")
    flops = image_flops(facts, decoder=decoder if has_decoder else None, sees=sees)
    epochs = add("optim.epochs", *choose_epochs(facts, flops))
    warmup = min(epochs / 5, MAX_WARMUP_EPOCHS)
    add("optim.warmup_epochs", _short(warmup), f"a fifth of the epochs, at most {MAX_WARMUP_EPOCHS}")
    add("optim.base_lr", *_base_lr(batch, facts.student.width))
    _choose_for_machine(facts, epochs, add)
    return choices


def _choose_for_machine(facts: Facts, epochs: float, add) -> None:
    if facts.num_gpus:
        precision = "bf16_autocast" if facts.has_bf16 else "fp32"
        add("precision", precision, "bf16 products where the GPUs have them")
    else:
        add("checkpoint.every_minutes", 1.0, "on CPUs, whose runs are short")
    workers = min(max(facts.num_cores // facts.num_ranks - 1, 1), 8)
    add("data.num_workers", workers, "cores of a rank but one, at most 8")
    if facts.can_measure_loss:
        add("eval.loss_every", float(max(1, epochs // 10)), "epochs; ten losses on held-out images in a run")


def choose_ranks(*, num_gpus: int, num_cores: int, global_batch: int | None = None) -> int:
    """Number of ranks on this machine: one a GPU, else one for every 8 cores.

    global_batch: where it is known, the ranks must divide it
    """
    ranks = num_gpus or max(1, num_cores // CORES_PER_RANK)
    if global_batch is not None:
        ranks = max(number for number in range(1, ranks + 1) if global_batch % number == 0)
    return ranks


def choose_decoder(student: Shape) -> DecoderConfig:
    """The decoder of a student: 2/3 of its width (as 512 is of ViT-B's 768), in steps of 32."""
    width = min(student.width * 2 // 3 // HEAD_WIDTH * HEAD_WIDTH, WHOLE_DECODER_WIDTH) or HEAD_WIDTH
    return DecoderConfig(
        depth=8 if width == WHOLE_DECODER_WIDTH else 4, embed_dim=width, num_heads=width // HEAD_WIDTH
    )


def choose_epochs(facts: Facts, flops: float) -> tuple[float, str]:
    """Epochs of a run and the reason; flops: of a training image."""
    by_data = PAPER_EPOCHS * (PAPER_IMAGES / facts.num_images) ** 0.5
    by_data = min(max(_two_digits(by_data), PAPER_EPOCHS), MAX_EPOCHS)
    text = f"{by_data:g} by the number of images, 100 x sqrt(ImageNet's / its own), 100 to 1600"
    if facts.num_gpus:
        return by_data, text
    speed = CPU_FLOPS * facts.num_cores
    minutes = flops * facts.num_images / speed / 60
    epochs = min(by_data, max(1, int(CPU_MINUTES / minutes)))
    if epochs == by_data:
        return by_data, text
    return epochs, (
        f"CUT FOR CPUS to about {CPU_MINUTES} minutes, one epoch at least: an epoch takes {minutes:.2g} "
        f"minutes at {speed / 1e9:g} GFLOP/s; it would be {text}: --epochs {by_data:g}"
    )


def image_flops(facts: Facts, *, decoder: DecoderConfig | None, sees: str) -> float:
    """FLOPs of one training image: student and decoder forward and backward, the teacher to 3/4 of its depth.

    Matrix products alone, at mask ratio .75.
    """
    student, teacher = facts.student, facts.teacher
    visible = student.num_patches // 4 + 1
    trained = student.depth * block_flops(student.width, visible)
    if decoder is not None:
        trained += decoder.depth * block_flops(decoder.embed_dim, student.num_patches + 1)
    tokens = visible if sees == "visible" else teacher.num_patches + 1
    return 3 * trained + teacher.depth * 3 // 4 * block_flops(teacher.width, tokens)


def decoder_share(facts: Facts, *, width: int, depth: int, sees: str) -> float:
    """The decoder's share of a step's work."""
    decoder = DecoderConfig(depth=depth, embed_dim=width)
    of_decoder = 3 * depth * block_flops(width, facts.student.num_patches + 1)
    return of_decoder / image_flops(facts, decoder=decoder, sees=sees)


def block_flops(width: int, tokens: int) -> float:
    """FLOPs of a transformer block's forward pass, with an MLP of four times the width."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def _sees(facts: Facts) -> tuple[str, str]:
    if facts.drops_tokens:
        return "visible", "the teacher is a masked autoencoder: it was trained on visible patches alone"
    return "all", "not known to be a masked autoencoder: it sees whole images, as it was trained"


def _batch(facts: Facts) -> tuple[int, str]:
    """The largest power of two up to a 16th of the images, then a multiple of the ranks."""
    ranks, images = facts.num_ranks, facts.num_images
    if images < ranks:
        raise UserError(f"{images} training images are fewer than the {ranks} ranks; give --ranks {images}")
    largest = min(PAPER_BATCH, max(images // STEPS_PER_EPOCH, min(MIN_BATCH, images)))
    batch = 1 << (largest.bit_length() - 1)
    batch = max(ranks, round(batch / ranks) * ranks)
    text = f"a power of two up to 1/{STEPS_PER_EPOCH} of the images, {MIN_BATCH} to {PAPER_BATCH}"
    return batch, text if ranks == 1 else f"{text}; a multiple of {ranks} ranks"


def _base_lr(batch: int, width: int) -> tuple[float, str]:
    peak = PAPER_PEAK_LR * (batch / PAPER_BATCH) ** 0.5 * (PAPER_WIDTH / width) ** 0.5
    return _two_digits(peak * 256 / batch), (
        f"peak {peak:.2g}: the paper's 2.4e-3 of batch 4096 and width 768, by the roots of batch and 1/width"
    )


def _two_digits(number: float) -> float:
    return float(f"{number:.2g}")


def _short(number: float) -> float:
    return float(f"{number:.4g}")
