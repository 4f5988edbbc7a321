"""The page of an export, README.md, which is a Hugging Face model card; made from the facts in card.json."""

from __future__ import annotations

import json
from pathlib import Path

from dmae_ds.evaluate.results import METRICS
from dmae_ds.export.teacher_facts import UNKNOWN

TASKS = {"classifier": "image-classification", "segmenter": "image-segmentation"}
LIBRARY = {"timm": "timm", "hf": "transformers", "onnx": "onnx", "safetensors": "timm", "original": "pytorch"}


def write_card(card: dict, usage: str, folder: Path) -> None:
    """Write card.json and README.md."""
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(render_card(card, usage), encoding="utf-8")


def render_card(card: dict, usage: str) -> str:
    """Return the model card as Markdown. usage: Python that loads the export."""
    lines = [*_front_matter(card), "", f"# {card['name']}", ""]
    if card["license"] == UNKNOWN:
        lines += [
            "The licence of these weights has not been stated; those of what it was made from follow.",
            "",
        ]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in _facts(card).items()]
    lines += ["", "```python", usage, "```", "", "## Measured", "", *_results(card["metrics"]), ""]
    lines += ["card.json has the whole recipe, the teacher's identity and the libraries' versions.", ""]
    return "\n".join(lines)


def _front_matter(card: dict) -> list[str]:
    """Return the YAML that the Hugging Face hub reads."""
    task = TASKS.get(card["what"], "image-feature-extraction")
    return [
        "---",
        f"license: {card['license']}",
        f"library_name: {LIBRARY[card['to']]}",
        f"pipeline_tag: {task}",
        "tags:",
        "- dmae-ds",
        "---",
    ]


def _facts(card: dict) -> dict[str, str]:
    student, check, data = card["student"], card["check"], card["data"]
    overrides = ", ".join(f"{key} {value}" for key, value in student["overrides"].items())
    network = f"{student['name']} ({overrides})" if overrides else student["name"]
    differences = ", ".join(
        f"{name} {value:.1e} (at most {check['limits'][name]:.1e})"
        for name, value in check["differences"].items()
    )
    initial = card["initial"]
    began = {}
    if initial is not None:
        began = {"began from": _weights(initial["weights"], initial["sha256"])}
        began["licence of those"] = f"{initial['license']} ({initial['license_from']})"
    return {
        "network": f"{network}, {student['parameters'] / 1e6:.3g} M parameters, "
        f"{student['img_size']} px, patches of {student['patch_size']} px",
        "part": card["what"],
        "trained by": f"{_trainer(card['trained_on'])}; {_training(card)}",
        "exported by": f"dmae-ds {card['versions']['dmae-ds']}",
        "pixels": _pixels(card["pixels"]),
        "teacher": _teacher(card["teacher"]),
        "teacher's licence": _licence(card["teacher"]),
        **began,
        "training data": f"{data['train']}, fingerprint {data['fingerprint']}",
        "compared with the trained network": "largest difference on random images, float32: " + differences,
    }


def _results(results: list[dict]) -> list[str]:
    """Return the table of measured results, one row each."""
    if not results:
        return ["Nothing has been measured with these weights yet."]
    lines = ["| metric | labels | scores | settings | step | device |", "|---|---|---|---|---|---|"]
    for result in results:
        settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
        known = METRICS[result["metric"]].scores
        scores = ", ".join(
            f"{known[name].title} {known[name].format(value, 2)}" for name, value in result["scores"].items()
        )
        labels = result["labels"]
        if result["subset_seed"] is not None:
            labels = f"{labels}, seed {result['subset_seed']}"
        cells = [result["metric"], labels, scores, settings, str(result["step"]), result["device"]]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return lines


def _trainer(trained_on: dict | None) -> str:
    """Return the versions of the training, which may be older than those of the export."""
    if trained_on is None:
        return "dmae-ds (version not recorded)"
    commit = f" ({trained_on['commit']})" if trained_on["commit"] else ""
    libraries = ", ".join(f"{name} {trained_on[name]}" for name in ("torch", "deepspeed", "timm"))
    return f"dmae-ds {trained_on['version']}{commit}, {libraries}"


def _pixels(pixels: dict) -> str:
    mean, std = (", ".join(f"{value:g}" for value in pixels[name]) for name in ("mean", "std"))
    size = "x".join(map(str, pixels["shape"][1:]))
    pool = {None: "", "mean": "; pool the mean of the patch tokens", "cls": "; pool CLS"}[pixels["pool"]]
    return f"RGB, {size}, centre crop {pixels['crop_pct']:g}, mean {mean}, std {std}{pool}"


def _training(card: dict) -> str:
    stages, evaluation = [], card["evaluation"]
    if card["objective"] is not None:
        stages.append(f"objective {card['objective']}")
    if evaluation is not None:
        labels = f", with {evaluation['labels']} labels" if "labels" in evaluation else ""
        stage, distill = f"then as a {card['what']}{labels}", evaluation.get("distill")
        method = "" if distill is None else distill.get("method", "logits")
        stages.append(f"{stage}, {method} from {distill['teacher']}" if distill else stage)
    return "; ".join([*stages, f"step {card['step']:,}"])


def _teacher(teacher: dict | None) -> str:
    if teacher is None:
        return "none"
    if "teachers" in teacher:
        return "; ".join(f"{name}: {_teacher(facts)}" for name, facts in teacher["teachers"].items())
    return f"{teacher['name']}, {_weights(teacher['weights'], teacher['sha256'])}"


def _weights(weights: str, sha256: str | None) -> str:
    return weights if sha256 is None else f"{Path(weights).name}, sha256 {sha256}"


def _licence(teacher: dict | None) -> str:
    return "no teacher" if teacher is None else f"{teacher['license']} ({teacher['license_from']})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
