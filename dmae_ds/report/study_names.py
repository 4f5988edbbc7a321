"""Names for runs by the options in which they differ, without seed and folders."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from dmae_ds.config.load import flatten, read_saved_config
from dmae_ds.config.objective_base import NULL_WORDS
from dmae_ds.config.run import RunConfig
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError
from dmae_ds.report.runs import Run, find_fingerprint
from dmae_ds.report.sources import find_source_run, is_student_of, locate_weights
from dmae_ds.teacher.cache_manifest import read_manifest

# Sections and keys that don't change what is trained.
_IRRELEVANT = {
    "run",
    "log",
    "checkpoint",
    "data.num_workers",
    "data.cache_dir",
    "data.cache_gib",
    "data.retries",
    "data.timeout_s",
    "data.val",
}
_IRRELEVANT_OF_TEACHER = {"stats", "placement", "stages"}

UNTRAINED = "random weights"
LONGEST = 60  # characters of an option's value in a name


def is_untrained(training: dict) -> bool:
    """Whether a run's rate is so low that its student is the initial one; `training`: its flat config."""
    return training["optim.base_lr"] < 1e-9


def describe_training(config: RunConfig, run: Path, data_names: dict[str, str]) -> dict[str, object]:
    """The config without seed and folders, flat: {"optim.epochs": 20.0}.

    Weights that a run of this project wrote are described by that run's training, not by their path: each
    seed may have its own. run: the run's folder; data_names: see `name_data`
    """
    flat = {
        key: value
        for key, value in flatten(config.model_dump(mode="json")).items()
        if key not in _IRRELEVANT
        and key.split(".")[0] not in _IRRELEVANT
        and not (
            key.startswith(("teacher.", "teachers.")) and key.rpartition(".")[2] in _IRRELEVANT_OF_TEACHER
        )
    }
    flat["data.train"] = name_data(config.data.train, find_fingerprint(run), data_names)
    if config.teachers is None:
        flat.pop("teachers", None)  # a newer key, which older runs lack
    networks = {teacher.section: teacher for teacher in config.named_teachers().values()}
    for section, teacher in networks.items():
        if teacher.cache is None:
            flat.pop(f"{section}.cache", None)  # a newer key, which older runs lack
        else:
            flat[f"{section}.cache"] = describe_cache(teacher.cache)
    for name, model in {**networks, "student": config.student}.items():
        weights = locate_weights(model, config, run)
        folder = weights and find_source_run(weights)
        if folder is not None:
            source_config = read_saved_config(folder, student_only=True)
            source = describe_training(source_config, folder, data_names)
            if not is_student_of(folder, weights):
                source["evaluation"] = Path(model.weights).parent.name
            flat[f"{name}.weights"] = source
    return flat


def name_data(path: str, fingerprint: str | None, names: dict[str, str]) -> str:
    """Name training data by its content: the path where a run was first seen to train on it.

    So the same shards on two machines have one name, and others that were made at the same place have
    another. fingerprint: of the shards, None if not known; names: those given so far, by fingerprint
    """
    if fingerprint is None:
        return path
    if fingerprint not in names:
        names[fingerprint] = f"{path} ({fingerprint[:8]})" if path in names.values() else path
    return names[fingerprint]


def describe_cache(location: str) -> str:
    """How the features of a local cache are stored; the location where that can't be read."""
    try:
        manifest = read_manifest(str(Path(location).expanduser()), access=Access())
    except (OSError, UserError):
        return location
    taps = manifest.layout.taps
    lossy = {tap.stored if tap.width == tap.shape[-1] else f"{tap.stored}, PCA {tap.width}" for tap in taps}
    return "exact" if all(tap.is_exact for tap in taps) else "; ".join(sorted(lossy))


def list_defaults(runs: list[Run]) -> dict[str, dict]:
    """The default options of each objective of these runs, flat, by the objective's name."""
    schemas = {run.config.objective.name: type(run.config.objective) for run in runs}
    return {
        name: flatten({"objective": schema(name=name).model_dump(mode="json")})
        for name, schema in schemas.items()
    }


def name_settings(trainings: dict, defaults: dict[str, dict]) -> dict:
    """Name trainings by what tells them apart: {key: flat config} -> {key: name}; no name is given twice.

    A name is the objective, then the sections that not every training of this objective has, then the options
    that differ from the commonest value among the trainings that have this section. defaults: the options of
    each objective, flat; the default is taken for the commonest value if others are as common.
    """
    trainings = _name_sources(trainings, defaults)
    names = {}
    for key, training in trainings.items():
        objective = training["objective.name"]
        peers = [other for other in trainings.values() if other["objective.name"] == objective]
        differing = [f"with {section}" for section in _extra_sections(training, peers)]
        for field in _list_fields(training, peers):
            value = training.get(field)
            usual = _commonest(field, peers, defaults.get(objective, {}).get(field))
            if _as_text(value) != usual:
                differing.append(f"{field.removeprefix('objective.')} {_short(field, value)}")
        names[key] = ", ".join([objective, *differing])
    return _tell_apart(names, trainings)


def _name_sources(trainings: dict, defaults: dict[str, dict]) -> dict:
    """The trainings with a name in place of each run that weights come from, named like settings."""
    sources: dict[str, dict[str, dict]] = {}
    for training in trainings.values():
        for field, value in training.items():
            if isinstance(value, dict):
                sources.setdefault(field, {})[_as_text(value)] = value
    names = {field: name_settings(runs, defaults) for field, runs in sources.items()}
    return {
        key: {
            field: names[field][_as_text(value)] if isinstance(value, dict) else value
            for field, value in training.items()
        }
        for key, training in trainings.items()
    }


def _list_fields(training: dict, peers: list[dict]) -> list[str]:
    """Options of a training, and those that only peers have in the sections of this training."""
    sections = _sections(training)
    theirs = [field for peer in peers for field in peer if field.rpartition(".")[0] in sections]
    return list(dict.fromkeys([*training, *theirs]))


def _tell_apart(names: dict, trainings: dict) -> dict:
    """Add to equal names what differs inside long options, or where even that is equal a number."""
    for name, count in Counter(names.values()).items():
        keys = [key for key in names if names[key] == name]
        inner = {key: _list_inner_options(trainings[key]) for key in keys if count > 1}
        for field in dict.fromkeys(field for options in inner.values() for field in options):
            longer = {key: f"{names[key]}, {field} {_short(field, inner[key].get(field))}" for key in keys}
            if len(set(longer.values())) > len({names[key] for key in keys}):
                names |= longer
    seen: Counter[str] = Counter()
    numbered = {}
    for key in sorted(names, key=lambda key: _as_text(trainings[key])):
        seen[names[key]] += 1
        numbered[key] = names[key] + (f" ({seen[names[key]]})" if seen[names[key]] > 1 else "")
    return {key: numbered[key] for key in names}


def _list_inner_options(training: dict) -> dict[str, object]:
    """What a name does not write out: how many entries a list has, their options, the end of a long text."""
    inner: dict[str, object] = {}
    for field, value in training.items():
        field = field.removeprefix("objective.")
        if isinstance(value, list):
            entries = {f"{field}.{place}": entry for place, entry in enumerate(value)}
            inner |= {f"number of {field}": len(value), **flatten(entries)}
        elif isinstance(value, str) and len(value) > LONGEST:
            inner[field] = "..." + value[3 - LONGEST :]
    return inner


def _extra_sections(training: dict, peers: list[dict]) -> list[str]:
    """Sections that not all peers have; next to several teachers one is the rule, and is not named."""
    every = list(map(_sections, peers))
    extra = _sections(training) - set.intersection(*every)
    if any(section.startswith("teachers.") for section in set().union(*every)):
        extra -= {"teacher"}
    return [section.removeprefix("objective.") for section in sorted(extra)]


def _sections(training: dict) -> set[str]:
    return {field.rpartition(".")[0] for field in training}  # optim.epochs is in section "optim"


def _commonest(field: str, peers: list[dict], default: object) -> str:
    """The commonest value of an option, as JSON, among the peers that have its section."""
    holders = [peer for peer in peers if field.rpartition(".")[0] in _sections(peer)]
    counts = Counter(_as_text(peer.get(field)) for peer in holders)
    return max(counts, key=lambda text: (counts[text], text == _as_text(default), text))


def _as_text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _short(field: str, value: object) -> str:
    """A value as a name shows it, in brackets if it is a name of several parts."""
    if value is None and field in NULL_WORDS:
        return NULL_WORDS[field]
    if isinstance(value, list):  # of sections: without what they leave open
        value = [
            {key: inner for key, inner in entry.items() if inner is not None}
            if isinstance(entry, dict)
            else entry
            for entry in value
        ]
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > LONGEST:
        return "of its own"
    return f"({text})" if isinstance(value, str) and ", " in text else text
