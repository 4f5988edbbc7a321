"""What an export says of itself: card.json for programs, README.md (a Hugging Face model card) for people."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dmae_ds import __version__
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.errors import UserError
from dmae_ds.evaluate.results import METRICS, read_results
from dmae_ds.export.source import Source
from dmae_ds.export.teacher_of import UNKNOWN, describe_teacher
from dmae_ds.train.checkpoint.folder import CheckpointFolder

CARD_VERSION = 1
LIBRARIES = ("torch", "timm", "safetensors", "transformers", "onnx", "onnxruntime", "onnxscript")


def make_card(
    source: Source, *, to: str, differences: dict[str, float], limits: dict[str, float], license: str
) -> dict:
    """Everything that is known of an export. differences, limits: of each output, as `export.export` has them."""
    data = source.evaluation["data"] if source.evaluation else source.config.data.model_dump(mode="json")
    fingerprint, fingerprint_from = _fingerprint_of_data(source, data["train"])
    return {
        "version": CARD_VERSION,
        "name": (source.run or source.results).resolve().name,
        "what": source.what,
        "to": to,
        "license": license,
        "student": {
            "name": source.name,
            "overrides": source.overrides,
            "keys": source.keys,
            "img_size": source.img_size,
            "patch_size": source.patch_size,
            "parameters": sum(parameter.numel() for parameter in source.vit.parameters()),
        },
        "step": source.step,
        "objective": None if source.config is None else source.config.objective.summary(),
        "teacher": _teacher_facts(source),
        "data": {
            "train": data["train"],
            "val": data["val"],
            "fingerprint": fingerprint,
            "fingerprint_from": fingerprint_from,
        },
        "metrics": read_results(source.results),
        "check": {
            "differences": differences,
            "largest": max(differences.values()),
            "limits": limits,
            "inputs": "standard normal pixels, float32, on the CPU",
        },
        "versions": {
            "dmae-ds": __version__,
            "python": platform.python_version(),
            **{name: found for name in LIBRARIES if (found := _version(name))},
        },
        "config": None if source.config is None else source.config.model_dump(mode="json"),
        "evaluation": source.evaluation,
    }


def _teacher_facts(source: Source) -> dict | None:
    """The pre-training's teacher; of a classifier of somebody else's weights, those weights."""
    if source.config is not None:
        return describe_teacher(source.config)
    weights = {key: None for key in ("sha256", "fingerprint", "teacher")}
    return {
        "name": source.name,
        "overrides": source.overrides,
        "weights": source.evaluation["weights"],
        "format": source.evaluation["format"],
        "license": UNKNOWN,
        "license_from": "the weights that were fine-tuned are no run of ours",
        **weights,
    }


def _fingerprint_of_data(source: Source, train: str) -> tuple[str, str]:
    """The training shards' fingerprint and who said it: the newest checkpoint, else the shards as they are now."""
    reasons = []
    if source.run is not None:
        folder = CheckpointFolder(source.run)
        try:
            latest = folder.latest()
            if latest is not None:
                return folder.read_state(latest)["fingerprint"], "the newest checkpoint"
            reasons.append("no checkpoint")
        except UserError as error:
            reasons.append(str(error))
    path = Path(train).expanduser()
    if path.is_dir():  # shards behind a URL are not asked
        try:
            return ShardSet.open(
                str(path), label="data.train"
            ).fingerprint, "the shards in data.train, as they are now"
        except UserError as error:
            reasons.append(str(error))
    return UNKNOWN, "; ".join(reasons)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_card(card: dict, usage: str, folder: Path) -> None:
    """card.json and README.md."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(render_card(card, usage), encoding="utf-8")


def render_card(card: dict, usage: str) -> str:
    """The model card. usage: Python that loads the export."""
    student, check = card["student"], card["check"]
    library = {"timm": "timm", "hf": "transformers", "onnx": "onnx", "safetensors": "timm"}[card["to"]]
    overrides = ", ".join(f"{key} {value}" for key, value in student["overrides"].items())
    differences = ", ".join(
        f"{name} {value:.1e} (at most {check['limits'][name]:.1e})"
        for name, value in check["differences"].items()
    )
    rows = {
        "network": f"{student['name']}{f' ({overrides})' if overrides else ''}, {student['parameters'] / 1e6:.3g} M parameters, {student['img_size']} px, patches of {student['patch_size']} px",
        "part": card["what"],
        "trained by": f"dmae-ds {card['versions']['dmae-ds']}, {_training(card)}",
        "teacher": _teacher(card["teacher"]),
        "teacher's licence": _licence(card["teacher"]),
        "training data": f"{card['data']['train']}, fingerprint {card['data']['fingerprint']}",
        "compared with the trained network": f"largest difference on random pictures, float32: {differences}",
    }
    task = "image-classification" if card["what"] == "classifier" else "image-feature-extraction"
    lines = [
        "---",
        f"license: {card['license']}",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags:",
        "- dmae-ds",
        "---",
        "",
        f"# {card['name']}",
        "",
    ]
    if card["license"] == UNKNOWN:
        lines += [
            "Nobody has said under which licence these weights may be used; the teacher's is below.",
            "",
        ]
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(text)} |" for name, text in rows.items()),
        "",
        "```python",
        usage,
        "```",
        "",
        "## Measured",
        "",
    ]
    if card["metrics"]:
        lines += ["| metric | labels | scores | settings | step | device |", "|---|---|---|---|---|---|"]
        for result in card["metrics"]:
            settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
            known = METRICS[result["metric"]].scores
            scores = ", ".join(
                f"{known[name].title} {known[name].format(value, 2)}"
                for name, value in result["scores"].items()
            )
            labels = (
                result["labels"]
                if result["subset_seed"] is None
                else f"{result['labels']}, seed {result['subset_seed']}"
            )
            lines.append(
                f"| {result['metric']} | {labels} | {scores} | {_cell(settings)} | {result['step']} | {_cell(result['device'])} |"
            )
    else:
        lines += ["Nothing has been measured with these weights yet."]
    lines += [
        "",
        "The whole recipe, the teacher's identity and the libraries' versions stand in card.json.",
        "",
    ]
    return "\n".join(lines)


def _training(card: dict) -> str:
    parts, evaluation = [], card["evaluation"]
    if card["objective"] is not None:
        parts.append(f"objective {card['objective']}")
    if evaluation is not None:
        distill = evaluation.get("distill")
        parts.append(
            f"then as a classifier, with {evaluation['labels']} labels"
            + (f", {distill['method']} from {distill['teacher']}" if distill else "")
        )
    return "; ".join([*parts, f"step {card['step']:,}"])


def _teacher(teacher: dict | None) -> str:
    if teacher is None:
        return "none"
    weights = Path(teacher["weights"]).name if teacher["sha256"] else teacher["weights"]
    return f"{teacher['name']}, {weights}" + (f", sha256 {teacher['sha256']}" if teacher["sha256"] else "")


def _licence(teacher: dict | None) -> str:
    return "no teacher" if teacher is None else f"{teacher['license']} ({teacher['license_from']})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
