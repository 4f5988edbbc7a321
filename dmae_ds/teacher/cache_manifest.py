"""The manifest of stored features, `cache.json`: what they are features of, and how the files lie. No torch.

Identities are flat: {key of a recipe: value}, so that a cache of something else is refused with the key, the
value that was stored, and the one of the recipe.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from dmae_ds.config.family import objectives_of
from dmae_ds.config.networks import TeacherConfig, looks_like_hub_id
from dmae_ds.config.run import RunConfig
from dmae_ds.data.order import ORDER_VERSION, num_in_share
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.errors import UserError
from dmae_ds.output.durable import write_atomically
from dmae_ds.teacher.cache_file import LABEL, open_cache
from dmae_ds.teacher.cache_layout import Layout
from dmae_ds.weights.content import identify

MANIFEST = "cache.json"
VERSION = 1
MOST_BYTES = 2**24  # of a manifest
# Keys of the teacher section that change its features, apart from its weights.
TEACHER_KEYS = (
    *("name", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans"),
    *("dtype", "sees", "mask_ratio", "mean", "std", "standardize", "pool"),
    *("decoder_depth", "decoder_embed_dim", "decoder_num_heads"),
)
DATA_KEYS = ("block", "repeat", "crop_scale", "flip", "mean", "std", "bits")
OBJECTIVE_KEYS = ("mask_ratio", "patch_count", "augment")  # of those objectives that have them


@dataclass(frozen=True)
class Manifest:
    """What a cache says about itself.

    recipe: see `recipe_identity`; inputs: see `train/stored_inputs.py`; weights: see `weights_identity`
    fingerprint: of the teacher's features of a fixed input (identity.py)
    codec_crc32: of the file with means and directions; None where there is none
    errors: {tap: {"relative", "cosine"}} of storing, once it is complete
    stats: what identifies the teacher's statistics (weights/content.py), where it is standardised by them
    """

    recipe: dict
    inputs: dict
    weights: dict
    fingerprint: dict
    layout: Layout
    codec_crc32: int | None
    is_complete: bool = False
    errors: dict = field(default_factory=dict)
    stats: list[int] | None = None

    def write(self, folder: Path) -> None:
        """Replace the manifest in a folder. Raises OSError."""
        values = {**vars(self), "version": VERSION, "layout": self.layout.as_json()}
        write_atomically(folder / MANIFEST, json.dumps(values, indent=1).encode() + b"\n")

    def finished(self, errors: dict) -> Manifest:
        """The manifest of the complete cache."""
        return replace(self, is_complete=True, errors=errors)


def read_manifest(location: str, *, access: Access) -> Manifest:
    """Read the manifest in a folder or behind a URL. Raises UserError; FileNotFoundError without a cache."""
    folder = open_cache(location, access=access)
    try:
        values = json.loads(folder.read_all(MANIFEST, limit=MOST_BYTES))
        version = values.pop("version")
        if version != VERSION:
            raise UserError(
                f"{LABEL} '{location}' has format version {version}, this program reads {VERSION}; make it "
                "again with dmae-ds teacher cache"
            )
        return Manifest(**{**values, "layout": Layout.from_json(values["layout"])})
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{LABEL} '{location}': {MANIFEST} can't be read ({type(error).__name__}: {error}); make the "
            "cache again with dmae-ds teacher cache"
        ) from None


def recipe_identity(config: RunConfig, teacher: TeacherConfig, shards: ShardSet | UnindexedShards) -> dict:
    """What decides the features of one of a recipe's teachers, by its keys; plain JSON values.

    Raises UserError for unindexed tars, which have no order that comes again.
    """
    if isinstance(shards, UnindexedShards):
        raise UserError(
            "stored features need the exact order of indexed shards, and data.num_samples streams tars "
            "without one; run `dmae-shards index`, and remove data.num_samples"
        )
    data = {f"data.{key}": getattr(config.data, key) for key in DATA_KEYS}
    needy = [each for each in objectives_of(config) if each.needs_teacher]  # of a family they see the same
    objective = needy[0].model_dump(mode="json")
    section = teacher.model_dump(mode="json")
    identity = {
        "data.train (fingerprint)": shards.fingerprint,
        "data.train (images)": num_in_share(shards.num_samples, config.data.share),
        "run.seed": config.run.seed,
        "optim.global_batch": config.optim.global_batch,
        "order": ORDER_VERSION,
        **data,
        **{f"objective.{key}": objective[key] for key in OBJECTIVE_KEYS if key in objective},
        **{f"teacher.{key}": section[key] for key in TEACHER_KEYS},
    }
    return json.loads(json.dumps(identity))


def check_same(stored: dict, now: dict, *, where: str) -> None:
    """Raise UserError that names the first key in which a cache and a recipe differ.

    where: the key that names the cache, and the cache, for the message
    """
    for key in [*now, *(key for key in stored if key not in now)]:
        if key not in now or key not in stored or stored[key] != now[key]:
            was, found = (identity.get(key, "not set") for identity in (stored, now))
            raise UserError(
                f"{where} was made with {key} {was}, and the recipe has {found}; make them agree, "
                "or make another cache with dmae-ds teacher cache"
            )


def weights_identity(teacher: TeacherConfig) -> dict:
    """What tells weights from others without reading them whole; {} where they are not here.

    A hub id or a tag of timm's is its name; of files, sizes and the crc32 of pieces spread over them.
    """
    if teacher.pretrained:
        return {"teacher.weights": f"timm's {teacher.name}"}
    path = None if teacher.weights is None else Path(teacher.weights).expanduser()
    if path is None or not path.exists():
        is_hub = teacher.weights is not None and looks_like_hub_id(teacher.weights)
        return {"teacher.weights": teacher.weights} if is_hub else {}
    return {"teacher.weights (bytes, crc32)": identify(path)}
