"""The rows of the papers' tables, and the conditions under which a run of ours is one of them.

`published.json` holds every number of the tables with the settings that its row names. `find_conditions`
turns a row into conditions on a run's facts and on one of its results; any run that fulfils them fills it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from dmae_ds.report.runs import Run

NUM_IMAGENET, NUM_IMAGENET_VAL = 1_281_167, 50_000
# DMAE, Sec. 4.1: the settings of a row that names no others.
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
# Supervised students start from scratch: only the student counts of the run in whose folder they are stored.
SUPERVISED = {**FINETUNED, "metric": "supervised", "init": "random"}
DISTILLED = {
    "soft distillation": "deit_soft",
    "hard distillation": "deit_hard",
    "supervised feature alignment": "features",
    "CRD": "crd",
    "SRRL": "srrl",
}
SIZES = {size: f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
# DMAE's Table 9 gives no settings of DINO and MoCo-v3; 100 epochs and block 18 are the paper's usual ones.
CONTRASTIVE = {"student": PRETRAINING["student"], "epochs": 100, "num_images": NUM_IMAGENET, "finished": True}
DISTILLATION = {
    key: DMAE[key] for key in ("teacher", "pairs", "head", "distance", "alpha", "normalize", "standardize")
}
# SdAE, Sec. 4.1 and its published script. Rows of Table 5 differ in the patches that the EMA teacher sees.
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
# G2SD's supplement: ViT-S (named in Table 3), 300 epochs of the first stage, 200 of the next.
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
# The shipped recipes of both tasks on all images of COCO's train2017 and of ADE20K.
DENSE = {"init": "weights", "distill": False}
COCO = {**DENSE, "metric": "detect", "num_train": 118_287, "num_val": 5_000}
ADE20K = {**DENSE, "metric": "segment", "num_train": 20_210, "num_val": 2_000}
G2SD_ON_COCO = {
    "DINO-S 3200 epochs": (
        {**CONTRASTIVE, "student": G2SD["student"], "objective": "dino", "distilled": False, "epochs": 3200},
        {**COCO, "recipe": "vitdet_coco"},
    ),
    "G2SD-S without the specific stage, 300 epochs": (G2SD, {**COCO, "recipe": "vitdet_coco"}),
    "G2SD-S 300 epochs": (G2SD, {**COCO, "recipe": "g2sd_detect_coco_small", "distill": True}),
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
}  # of 24 blocks; the student's block is 9
METHODS_OF_TABLE_9 = {"DINO": "dino", "MoCo-v3": "mocov3"}


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a run fills a row.

    facts: of the run (`runs.collect_facts`); result: of a line of its results.jsonl, in its fields or its
    settings
    gives: the name of the score that the row shows, or gpu_hours
    """

    facts: dict[str, object]
    result: dict[str, object]
    gives: str = "top1"


def read_published() -> tuple[dict, list[dict]]:
    """Read (settings by name, rows in the papers' order)."""
    content = json.loads(files("dmae_ds.report").joinpath("published.json").read_text(encoding="utf-8"))
    return content["settings"], content["results"]


def find_conditions(row: dict) -> Conditions | None:
    """The conditions of a row; None if this project does not have the row's method."""
    return {"dmae": _dmae, "g2sd supplement": _g2sd, "sdae": _sdae}[row["paper"]](row)


def find_result(run: Run, conditions: Conditions) -> dict | None:
    """The newest result of a run that fulfils the conditions, or None."""
    if any(run.facts.get(key) != value for key, value in conditions.facts.items()):
        return None
    for result in reversed(run.results):
        fields = {**result["settings"], **result}
        if all(fields.get(key) == value for key, value in conditions.result.items()):
            return result
    return None


# ---- DMAE


def _dmae(row: dict) -> Conditions | None:
    table, what = row["table"], row["what"]
    if table in ("4", "6", "7"):
        return _dmae_baseline(row)
    if table in ("1", "8"):
        # The teacher has twice as many blocks; its block is at the same relative depth.
        blocks = [int(block) for block in (row.get("student_block") or what.split()[-1]).split("+")]
        facts = {**DMAE, "pairs": tuple((block, 2 * block) for block in blocks)}
    elif table == "2":
        facts = {**DMAE, "pairs": ((9, TEACHER_BLOCKS[what]),)}
    elif table.startswith(("Figure 2", "3")):
        options = ("mask_ratio", "head", "decoder_depth", "distance", "alpha")
        facts = {**DMAE, **{key: row[key] for key in options if key in row}}
    elif table == "5":
        facts = {**(DMAE if "teacher" in row else MAE), "student": SIZES[row["student"]]}
        if row.get("teacher") not in (None, "large"):
            # Three quarters of 12 blocks is 9.
            facts |= {"teacher": SIZES[row["teacher"]], "pairs": ((9, 9),)}
    else:  # Table 9
        distilled = what.endswith(" + DMAE")
        objective = METHODS_OF_TABLE_9[what.split(" + ")[0]]
        facts = {**CONTRASTIVE, "objective": objective, "distilled": distilled}
        facts |= DISTILLATION if distilled else {}
    return Conditions(facts, FINETUNED)


def _dmae_baseline(row: dict) -> Conditions | None:
    """Conditions of Tables 4, 6 and 7: MAE, DMAE and supervised baselines."""
    what, gives = row["what"], "gpu_hours" if row["table"] == "7" else "top1"
    finetuned, supervised = FINETUNED, SUPERVISED
    if row["table"] == "6":
        labels = row["metric"].split("with ")[1].split(" of")[0]
        finetuned = {**_without(FINETUNED, "num_train"), "labels": labels}
        supervised = {**_without(SUPERVISED, "num_train"), "labels": labels}
    if what.startswith(("MAE-B", "DMAE-B")):
        facts = DMAE if what.startswith("DMAE") else MAE
        epochs = row.get("pretrain_epochs") or 100
        if what.startswith("MAE-B "):  # "MAE-B 1600 epochs"
            epochs = int(what.split()[1])
        if epochs != 100:  # the paper gives a warm-up for 100 epochs only
            facts = {**_without(facts, "warmup_epochs"), "epochs": epochs}
        return Conditions(facts, finetuned, gives)
    distill = next((method for name, method in DISTILLED.items() if what.endswith(name)), None)
    if distill is None and what != "DeiT-B":
        return None  # DearKD: the row says why
    epochs = {"epochs": row["finetune_epochs"]} if "finetune_epochs" in row else {}
    result = {**supervised, **epochs, "distill": distill}
    return Conditions({"student": PRETRAINING["student"]}, result, gives)


def _without(conditions: dict, key: str) -> dict:
    return {name: value for name, value in conditions.items() if name != key}


# ---- G2SD and SdAE


def _g2sd(row: dict) -> Conditions | None:
    """Conditions of Tables 2 to 5; only the generic stage is followed by fine-tuning."""
    finetuned = {**FINETUNED, "epochs": 200}
    if row["table"] == "5":
        return Conditions({**G2SD, "mask_ratio": row["mask_ratio"]}, finetuned)
    if row["table"] == "4":
        return Conditions({**G2SD, "target": G2SD_TARGETS[row["what"]]}, finetuned)
    if row["table"] == "3":  # other rows start from weights that no run of ours makes
        on_coco = G2SD_ON_COCO.get(row["what"])
        return None if on_coco is None else Conditions(*on_coco, "box_ap")
    if row["table"] != "2":
        return None
    if row["what"] == "DeiT":
        return Conditions({"student": G2SD["student"]}, {**SUPERVISED, "epochs": 500, "distill": None})
    stage = {"metric": "supervised", "init": "random", "epochs": 500}
    if row["what"] == "G2SD":
        stage = {"metric": "finetune", "init": "weights", "epochs": 200}
    facts = {**G2SD_SPECIFIC, "epochs": stage["epochs"]}
    return Conditions(facts, {**FINETUNED, **stage, "recipe": "g2sd_specific"})


def _sdae(row: dict) -> Conditions | None:
    """Conditions of Tables 2 to 5; seconds on a V100 are not measured here."""
    if row["table"] == "5" and row["what"] in SDAE_SEES:
        return Conditions({**SDAE, "teacher_sees": SDAE_SEES[row["what"]]}, FINETUNED)
    if row["table"] not in ("2", "3", "4"):
        return None
    epochs = row["pretrain_epochs"]
    if row["what"] == "from scratch":
        return Conditions({"student": SDAE["student"]}, {**SUPERVISED, "epochs": epochs, "distill": None})
    facts = SDAE_METHODS.get(row["what"])
    if facts is None:
        return None
    measured = {
        "2": (FINETUNED,),
        "3": ({**ADE20K, "recipe": "upernet_ade20k"}, "miou"),
        "4": ({**COCO, "recipe": "maskrcnn_1x_coco"}, "box_ap"),
    }
    return Conditions({**CONTRASTIVE, **facts, "epochs": epochs}, *measured[row["table"]])
