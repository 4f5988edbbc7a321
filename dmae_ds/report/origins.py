"""Where the numbers of a data set come from: machines, versions and commands, out of RUN/starts.jsonl."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from pathlib import Path, PurePosixPath

from dmae_ds.config.saved import read_starts
from dmae_ds.report.runs import Run
from dmae_ds.report.study import Setting, list_columns

_VERSIONS = ("python", "torch", "deepspeed", "timm")
# Commands of `dmae-ds eval` that are not named as their metric.
_EVALUATIONS = {"supervised": "finetune", "dense_knn": "dense", "dense_linear": "dense"}
OUT = "OUT"  # stands for the folder of the runs


def render_origins(settings: list[Setting]) -> list[str]:
    """Lines with the machines of all runs, and the commands of each setting's first run."""
    runs = [run for setting in settings for run in setting.runs]
    evaluations = [f"`dmae-ds eval {name}`" for name in evaluations_of(settings)]
    machines = Counter(machine for run in runs for machine in dict.fromkeys(_machines(run)))
    lines = [
        "Trained on "
        + "; ".join(
            f"{machine} ({count} run{'s' * (count > 1)})" for machine, count in machines.most_common()
        )
        + ".",
        f"Evaluated by {', '.join(evaluations)}." if evaluations else "Not evaluated.",
        "",
        f"<details><summary>Commands of the first seed; {OUT} is the folder of the runs</summary>",
        "",
        "```",
    ]
    for setting in settings:
        lines += [f"# {setting.name}", command_of(setting.runs[0]) or "# not recorded"]
    return [*lines, "```", "", "</details>", ""]


def evaluations_of(settings: list[Setting]) -> list[str]:
    """Names of the commands of `dmae-ds eval` that measured the numbers of these settings."""
    metrics = [column.metric for column in list_columns(settings)]
    return list(dict.fromkeys(_EVALUATIONS.get(name, name) for name in metrics))


def _machines(run: Run) -> list[str]:
    """Ranks, device and versions of each start; a run from before starts were kept has none."""
    environments = [start["environment"] for start in read_starts(run.path)]
    return [_describe(environment) for environment in environments] or ["machines that were not recorded"]


def _describe(environment: dict) -> str:
    device = environment["device"]
    if device == "cpu":
        device = environment.get("processor") or "CPU"
    versions = [f"{name} {environment[name]}" for name in _VERSIONS if environment.get(name)]
    return f"{environment['world_size']} x {device}, {', '.join(versions)}"


def command_of(run: Run) -> str | None:
    """The last command that started a run, without folders of its machine; None where none is recorded."""
    starts = read_starts(run.path)
    if not starts:
        return None
    program, *words = shlex.split(starts[-1]["environment"]["command"])
    name = PurePosixPath(program).name
    out = next((word[len("run.dir=") :] for word in words if word.startswith("run.dir=")), "")
    short = [
        _without_folders(word, os.path.dirname(out)) for word in words if not word.startswith("--local_rank")
    ]
    return " ".join(["python -m dmae_ds" if name == "__main__.py" else name, *map(shlex.quote, short)])


def _without_folders(word: str, out: str) -> str:
    """In a word, `out` becomes OUT in front of a path; of other absolute paths the last name is left."""
    key, separator, value = word.rpartition("=")
    if out and (value + "/").startswith(out + "/"):
        return key + separator + OUT + value[len(out) :]
    return key + separator + "FOLDER/" + Path(value).name if value.startswith("/") else word
