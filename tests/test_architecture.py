"""The house stands as drawn: who may import whom, no option that nobody reads, no table that differs from its schema."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path
from typing import get_args

import pytest

from dmae_ds.config import evaluation as evaluation_schemas
from dmae_ds.config import objectives as objective_schemas
from dmae_ds.config import run as run_schemas
from dmae_ds.config.objectives import Section

REPOSITORY = Path(__file__).resolve().parents[1]

# From the ground up; rooms of one floor are strangers, except where one of them is named as a guest of another.
FLOORS = [
    {"errors", "output"},
    {"distributed", "config"},
    {"models", "data"},
    {"weights"},
    {"teacher"},
    {"objectives"},
    {"plan"},
    {"evaluate"},
    {"train"},
    {"finetune"},
    {"report", "bench", "tools", "export", "doctor"},
    {"cli"},
    {"__main__"},
]
KNOWS_DEEPSPEED = {
    "dmae_ds/train/engine.py",
    "dmae_ds/train/checkpoint/deepspeed_files.py",
    "dmae_ds/train/checkpoint/full_state.py",
    "dmae_ds/train/checkpoint/reshard.py",
    "dmae_ds/tools/checkpoint_convert.py",
    "dmae_ds/teacher/sharded.py",
    "dmae_ds/bench/pipeline_engine.py",
    "dmae_ds/distributed/deepspeed_import.py",
}
COMMUNICATES = {
    "dmae_ds/distributed/async_flags.py",
    "dmae_ds/distributed/collectives.py",
    "dmae_ds/distributed/process_group.py",
    "dmae_ds/distributed/heartbeat.py",
    "dmae_ds/distributed/rendezvous.py",
    "dmae_ds/teacher/pipeline.py",
    "dmae_ds/bench/pipeline_engine.py",
    "dmae_ds/doctor/meeting.py",  # before there are ranks
}
TORCH_FREE = [
    "dmae_ds/cli",
    "dmae_ds/config",
    "dmae_ds/data/batch_spec.py",
    "dmae_ds/data/cache.py",
    "dmae_ds/data/corrupt.py",
    "dmae_ds/data/order.py",
    "dmae_ds/data/reader.py",
    "dmae_ds/data/shard_set.py",
    "dmae_ds/data/shards.py",
    "dmae_ds/data/storage.py",
    "dmae_ds/data/open.py",
    "dmae_ds/data/unindexed.py",
    "dmae_ds/distributed/world.py",
    "dmae_ds/doctor",
    "dmae_ds/errors.py",
    "dmae_ds/evaluate/results.py",
    "dmae_ds/output",
    "dmae_ds/evaluate/subsets.py",
    "dmae_ds/tools/checkpoint_find.py",
    "dmae_ds/tools/checkpoint_inspect.py",
    "dmae_ds/train/checkpoint/folder.py",
    "dmae_ds/train/preflight.py",
    "data_prep",
]
HEAVY = {"torch", "timm", "deepspeed", "accelerate", "webdataset", "torchvision"}

SOURCES = sorted(path for folder in ("dmae_ds", "data_prep") for path in (REPOSITORY / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of everything a file imports; `from a import b` counts as a.b."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if top_level_only and node not in tree.body:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(dotted: str) -> str | None:
    """dmae_ds.train.loop.train -> train; None for the package itself (its version) and for other packages."""
    parts = dotted.split(".")
    if parts[0] != "dmae_ds" or len(parts) < 2 or parts[1].startswith("__version"):
        return None
    return parts[1]


def floor_of(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", [path for path in SOURCES if "dmae_ds" in path.parts], ids=name_of)
def test_imports_point_down(path):
    own = path.relative_to(REPOSITORY / "dmae_ds").parts[0].removesuffix(".py")
    if own == "__init__":
        assert not {room_of(name) for name in imports_of(path)} - {None}
        return
    for name in imports_of(path):
        room = room_of(name)
        if room is not None and room != own:
            assert floor_of(room) < floor_of(own), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", [path for path in SOURCES if "data_prep" in path.parts], ids=name_of)
def test_the_shard_tool_knows_the_shard_format_alone(path):
    # the benchmark of reading measures the reader
    known = (
        ("dmae_ds.data.",)
        if path.name == "bench_reading.py"
        else ("dmae_ds.data.shards.", "dmae_ds.data.shard_set.", "dmae_ds.output.")
    )
    assert all(name.startswith(known) for name in imports_of(path) if name.startswith("dmae_ds"))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_few_files_know_deepspeed_and_fewer_communicate(path):
    names = imports_of(path)
    if any(name.split(".")[0] == "deepspeed" for name in names):
        assert name_of(path) in KNOWS_DEEPSPEED or name_of(path).startswith("dmae_ds/teacher/")
    communicates = (
        any(name.startswith("torch.distributed") for name in names) or "torch.distributed" in path.read_text()
    )
    assert not communicates or name_of(path) in COMMUNICATES


def test_what_a_recipe_is_checked_with_imports_nothing_heavy():
    files = [
        path
        for entry in TORCH_FREE
        for path in ([REPOSITORY / entry] if entry.endswith(".py") else (REPOSITORY / entry).rglob("*.py"))
    ]
    assert len(files) > 10
    for path in files:
        heavy = {name.split(".")[0] for name in imports_of(path, top_level_only=True)} & HEAVY
        assert not heavy, f"{name_of(path)} imports {heavy}"


def schema_classes() -> set[type[Section]]:
    classes, todo = set(), [Section]
    while todo:
        children = todo.pop().__subclasses__()
        classes |= set(children)
        todo += children
    return {
        cls
        for cls in classes
        if cls.__module__ in (run_schemas.__name__, objective_schemas.__name__, evaluation_schemas.__name__)
    }


def test_every_config_field_is_read_somewhere():
    read = set()
    for path in SOURCES:
        if "config" not in path.parts:
            read |= {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
    overrides = set(run_schemas.ModelConfig.model_fields) - {
        "name"
    }  # handed on whole, by ModelConfig.overrides
    assert "overrides" in read
    fields = {field for cls in schema_classes() for field in cls.model_fields}
    assert len(fields) > 30
    assert not fields - overrides - read


def test_the_tables_are_the_schemas():
    from dmae_ds.config.shipped import shipped_objectives
    from dmae_ds.finetune.network import GLOBAL_POOLS
    from dmae_ds.finetune.tasks import TASKS
    from dmae_ds.objectives import OBJECTIVES
    from dmae_ds.objectives.align import DISTANCES, HEADS
    from dmae_ds.teacher.frozen import DTYPES
    from dmae_ds.weights.formats import FORMATS

    def choices(cls, field):
        return set(get_args(cls.model_fields[field].annotation))

    named = [
        cls
        for cls in schema_classes()
        if cls.__module__ == objective_schemas.__name__ and "name" in cls.model_fields
    ]
    assert (
        set(OBJECTIVES)
        == {name for cls in named for name in choices(cls, "name")}
        == set(shipped_objectives())
    )
    assert set(HEADS) == choices(objective_schemas.DmaeConfig, "head")
    assert set(DISTANCES) == choices(objective_schemas.DmaeConfig, "distance")
    assert set(FORMATS) == set(run_schemas.TEACHER_FORMATS)
    assert set(DTYPES) == choices(run_schemas.TeacherConfig, "dtype")
    assert set(TASKS) == choices(evaluation_schemas.DistillConfig, "method")
    assert set(GLOBAL_POOLS) == choices(evaluation_schemas.ClassifierConfig, "pool")


# Rooms that wire what an objective declares (objectives/base.py).
WIRE = ("train", "data", "teacher", "models", "plan", "bench")


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.relative_to(REPOSITORY).parts[1] in WIRE], ids=name_of
)
def test_those_who_wire_an_objective_name_none(path):
    """Neither in a string, nor as an identifier, nor by importing its file. Plain MAE is exempt: a format of teachers, and bench step's yardstick."""
    from dmae_ds.objectives import OBJECTIVES

    names = set(OBJECTIVES) - {"mae"}
    in_text = names - {"dmae"} | {"g2sd"}  # as a word of a longer string dmae is this program
    identifiers = {name.replace("_", "") for name in in_text | {"dmae"}}
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            assert node.value not in names and not in_text & set(
                re.findall(r"[a-z0-9_]+", node.value.lower())
            ), f"{name_of(path)} says {node.value!r}"
        for field in ("id", "attr", "name", "arg"):
            found = getattr(node, field, None)
            assert not isinstance(found, str) or found.lower().replace("_", "") not in identifiers, (
                f"{name_of(path)} names {found}"
            )
    files = {objective.__module__ for name, objective in OBJECTIVES.items() if name != "mae"}
    imported = {name.rpartition(".")[0] for name in imports_of(path)} & files
    assert not imported, f"{name_of(path)} imports {imported}"


def test_every_package_is_installed_and_nothing_else_becomes_importable():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {name_of(path.parent).replace("/", ".") for path in SOURCES if path.name == "__init__.py"}
    assert listed == found | {"dmae_ds.shipped_recipes", "dmae_ds.shipped_ds_configs"}


def readme() -> str:
    return (REPOSITORY / "README.md").read_text()


def test_every_path_in_the_readme_exists():
    paths = set(
        re.findall(
            r"(?<![\w/.-])((?:dmae_ds|ds_configs|data_prep|launch|tests|\.ci|\.github)/[\w./-]*\w)", readme()
        )
    )
    assert len(paths) > 5
    missing = {path for path in paths if not (REPOSITORY / path).exists()}
    assert not missing


def test_every_command_in_the_readme_exists():
    from dmae_ds.cli.main import parser

    commands = re.findall(
        r"dmae-ds ((?:train|(?:eval|teacher|bench|checkpoint) [\w-]+|report|[a-z]+))", readme()
    )
    assert {"train", "report", "eval knn"} <= set(commands)
    for line in set(commands):
        positionals = {
            "teacher slice": ["x", "y"],
            "checkpoint convert": ["x", "y"],
            "bench teacher-load": [],
            "bench knn": [],
            "export": ["x", "--to", "timm"],
        }.get(line, ["x"])
        assert parser().parse_args([*line.split(), *positionals]).command
    for recipe in re.findall(r"(?:dmae-ds|dmae_ds) train (\w+)", readme()):
        assert (REPOSITORY / "launch" / "recipes" / f"{recipe}.yaml").exists()
