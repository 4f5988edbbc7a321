"""The papers' rows, and which run would be one of them.

`published.json` holds every number of the papers' tables with what the row says of itself. `wanted` turns a
row into conditions on a run's facts and on one of its results; a run that fulfils them fills the row's cell,
whoever made it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from dmae_ds.report.runs import Run

NUM_IMAGENET, NUM_IMAGENET_VAL = 1_281_167, 50_000
# DMAE, Sec. 4.1: what holds where a row says nothing else.
PRETRAINING = {
    "student": "vit_base_patch16_224",
    "mask_ratio": 0.75,
    "decoder_depth": 8,
    "epochs": 100,
    "warmup_epochs": 20,
    "global_batch": 4096,
    "base_lr": 1.5e-4,
    "weight_decay": 0.05,
    "betas": (0.9, 0.95),
    "num_images": NUM_IMAGENET,
    "finished": True,
}
DMAE = {
    **PRETRAINING,
    "objective": "dmae",
    "teacher": "vit_large_patch16_224",
    "pairs": ((9, 18),),
    "head": "mlp2",
    "distance": "l1",
    "alpha": 1.0,
    "normalize": "none",
    "standardize": "none",
}
MAE = {**PRETRAINING, "objective": "mae"}
FINETUNED = {
    "metric": "finetune",
    "labels": "all",
    "epochs": 100,
    "img_size": 224,
    "num_train": NUM_IMAGENET,
    "num_val": NUM_IMAGENET_VAL,
}
# Supervised students are trained from scratch: of the run beside which they lie, only the student counts.
SUPERVISED = {**FINETUNED, "metric": "supervised", "init": "random"}
DISTILLED = {
    "soft distillation": "deit_soft",
    "hard distillation": "deit_hard",
    "supervised feature alignment": "features",
}
SIZES = {size: f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
# What DMAE's Table 9 says of DINO and MoCo-v3 is nothing; 100 epochs and ViT-L's block 18 are those of the paper.
CONTRASTIVE = {"student": PRETRAINING["student"], "epochs": 100, "num_images": NUM_IMAGENET, "finished": True}
IMITATION = {
    key: DMAE[key] for key in ("teacher", "pairs", "head", "distance", "alpha", "normalize", "standardize")
}
# SdAE, Sec. 4.1 and its published script. Table 5's rows differ in what the EMA teacher sees.
SDAE = {
    "objective": "sdae",
    "student": PRETRAINING["student"],
    "mask_ratio": 0.75,
    "teacher_sees": "folds",
    "epochs": 300,
    "num_images": NUM_IMAGENET,
    "finished": True,
}
SDAE_METHODS = {
    "MoCo v3": {"objective": "mocov3", "distilled": False},
    "DINO": {"objective": "dino", "distilled": False},
    "MAE": {"objective": "mae", "mask_ratio": 0.75},
    "SdAE": SDAE,
}
SDAE_SEES = {
    "whole image, target normalised": "all",
    "masked patches only, target normalised": "masked",
    "multi-fold, target normalised": "folds",
}
# G2SD's supplement: ViT-S (Table 3 names it), 300 epochs of the first stage, 200 of whatever follows.
G2SD = {
    "objective": "g2sd_generic",
    "student": "vit_small_patch16_224",
    "mask_ratio": 0.75,
    "target": "features",
    "epochs": 300,
    "num_images": NUM_IMAGENET,
    "finished": True,
}
G2SD_SPECIFIC = {
    "objective": "g2sd_specific",
    "student": G2SD["student"],
    "num_images": NUM_IMAGENET,
    "finished": True,
}
G2SD_TARGETS = {
    "target: features (default)": "features",
    "target: the teacher's reconstruction": "reconstruction",
    "target: the teacher's reconstruction and the pixels": "reconstruction_and_pixels",
}
TEACHER_BLOCKS = {
    "student middle <- teacher middle": 18,
    "student middle <- teacher top": 24,
    "student middle <- teacher bottom": 6,
}  # of 24; the student's is 9


@dataclass(frozen=True)
class Wanted:
    """facts: of the run (`runs.facts_of`); result: of a line of its results.jsonl, in its fields or its settings; gives: the name of a score, or gpu_hours."""

    facts: dict[str, object]
    result: dict[str, object]
    gives: str = "top1"


def read_published() -> tuple[dict, list[dict]]:
    """(settings by name, rows in the papers' order)."""
    content = json.loads(files("dmae_ds.report").joinpath("published.json").read_text(encoding="utf-8"))
    return content["settings"], content["results"]


def wanted(row: dict) -> Wanted | None:
    """What a run has to be for this row; None where this project has no such method."""
    if row["paper"] == "sdae":
        return _of_sdae(row)
    if row["paper"] == "g2sd supplement":
        return _of_g2sd(row)
    table, what = row["table"], row["what"]
    if table == "1" or table == "8":
        blocks = row.get("student_block") or what.removeprefix("student block ")
        # the teacher's are at the same relative depth, of twice as many blocks
        return Wanted(
            {**DMAE, "pairs": tuple((int(block), 2 * int(block)) for block in blocks.split("+"))}, FINETUNED
        )
    if table == "2":
        return Wanted({**DMAE, "pairs": ((9, TEACHER_BLOCKS[what]),)}, FINETUNED)
    if table.startswith(("Figure 2", "3")):
        return Wanted(
            {
                **DMAE,
                **{
                    key: row[key]
                    for key in ("mask_ratio", "head", "decoder_depth", "distance", "alpha")
                    if key in row
                },
            },
            FINETUNED,
        )
    if table == "5":
        return Wanted(
            {**(DMAE if "teacher" in row else MAE), "student": SIZES[row["student"]], **_teacher(row)},
            FINETUNED,
        )
    if table in ("4", "6", "7"):
        return _baseline(row)
    method, distilled = what.split(" + ")[0], what.endswith(" + DMAE")  # Table 9
    return Wanted(
        {
            **CONTRASTIVE,
            "objective": {"DINO": "dino", "MoCo-v3": "mocov3"}[method],
            "distilled": distilled,
            **(IMITATION if distilled else {}),
        },
        FINETUNED,
    )


def _of_sdae(row: dict) -> Wanted | None:
    """Top-1 of Tables 2 and 5; seconds on a V100, segmentation and detection are not this project's."""
    if row["table"] == "5" and row["what"] in SDAE_SEES:
        return Wanted({**SDAE, "teacher_sees": SDAE_SEES[row["what"]]}, FINETUNED)
    if row["table"] != "2":
        return None
    if row["what"] == "from scratch":
        return Wanted(
            {"student": SDAE["student"]}, {**SUPERVISED, "epochs": row["pretrain_epochs"], "distill": None}
        )
    facts = SDAE_METHODS.get(row["what"])
    return (
        None
        if facts is None
        else Wanted({**CONTRASTIVE, **facts, "epochs": row["pretrain_epochs"]}, FINETUNED)
    )


def _of_g2sd(row: dict) -> Wanted | None:
    """Top-1 of Tables 2, 4 and 5: of the generic stage by fine-tuning, of the specific stage by the trainer itself."""
    finetuned = {**FINETUNED, "epochs": 200}
    if row["table"] == "5":
        return Wanted({**G2SD, "mask_ratio": row["mask_ratio"]}, finetuned)
    if row["table"] == "4":
        return Wanted({**G2SD, "target": G2SD_TARGETS[row["what"]]}, finetuned)
    if row["table"] != "2":
        return None
    if row["what"] == "DeiT":
        return Wanted({"student": G2SD["student"]}, {**SUPERVISED, "epochs": 500, "distill": None})
    own = (
        {"metric": "finetune", "init": "weights", "epochs": 200}
        if row["what"] == "G2SD"
        else {"metric": "supervised", "init": "random", "epochs": 500}
    )
    return Wanted({**G2SD_SPECIFIC, "epochs": own["epochs"]}, {**FINETUNED, **own, "recipe": "g2sd_specific"})


def _teacher(row: dict) -> dict:
    """Another teacher than ViT-L has other depths: three quarters of 12 blocks is 9."""
    return (
        {}
        if row.get("teacher") in (None, "large")
        else {"teacher": SIZES[row["teacher"]], "pairs": ((9, 9),)}
    )


def _baseline(row: dict) -> Wanted | None:
    """Tables 4, 6 and 7: MAE, DMAE and supervised baselines; as top-1, with few labels, or as GPU hours."""
    what, gives = row["what"], "gpu_hours" if row["table"] == "7" else "top1"
    finetuned, supervised = FINETUNED, SUPERVISED
    if row["table"] == "6":
        labels = row["metric"].split("with ")[1].split(" of")[0]
        finetuned, supervised = (
            {**_without(result, "num_train"), "labels": labels} for result in (FINETUNED, SUPERVISED)
        )
    if what.startswith(("MAE-B", "DMAE-B")):
        epochs = row.get("pretrain_epochs") or (int(what.split()[1]) if what.startswith("MAE-B") else 100)
        facts = {**(DMAE if what.startswith("DMAE") else MAE), "epochs": epochs}
        return Wanted(
            facts if epochs == 100 else _without(facts, "warmup_epochs"), finetuned, gives
        )  # the paper gives 100 epochs' warm-up alone
    distill = next((method for name, method in DISTILLED.items() if what.endswith(name)), None)
    if distill is None and what != "DeiT-B":
        return None  # CRD, SRRL, DearKD
    epochs = {"epochs": row["finetune_epochs"]} if "finetune_epochs" in row else {}
    return Wanted({"student": PRETRAINING["student"]}, {**supervised, **epochs, "distill": distill}, gives)


def _without(conditions: dict, key: str) -> dict:
    return {name: value for name, value in conditions.items() if name != key}


def matching_result(run: Run, row: Wanted) -> dict | None:
    """The newest result of a run that fills a row, or None."""
    if any(run.facts.get(key) != value for key, value in row.facts.items()):
        return None
    fitting = [
        result
        for result in run.results
        if all({**result["settings"], **result}.get(key) == value for key, value in row.result.items())
    ]
    return fitting[-1] if fitting else None
