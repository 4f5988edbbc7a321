"""Facts of recipe, data, teacher and run folder lead to the right check with its fix, and to no other."""

from __future__ import annotations

import pytest

from dmae_ds.config.load import load_config
from dmae_ds.doctor.check import FAIL, OK, SKIP, WARN
from dmae_ds.doctor.inspect_recipe import inspect_teacher
from dmae_ds.doctor.judge_recipe import judge_teacher
from tests.doctor.facts import GIB, assert_check, assert_one_wrong, healthy, judge_all, meetings, target
from tests.messages import refused

NO_SHARD = {"error": "data.train '/data': shard-000001.tar is missing; copy it again"}
NO_WANDB = {"error": "log.trackers has wandb, which is not installed here; run pip install 'dmae-ds[wandb]'"}
NO_TEACHER = {"error": "teacher.weights '/t.pth' not found; copy it"}
BAD_BATCH = {"error": "optim.global_batch 63 doesn't divide by 2 ranks; take 62"}
NO_SHARDS = {
    f"node{index}:{part}": value
    for index in (0, 1)
    for part, value in (("shards", NO_SHARD), ("start", KeyError))
}
CASES = [
    ({"node1:recipe:digest": "d2"}, "recipe", "d1 on node0|d2 on node1", "copy it to node1"),
    (
        {"node1:shards": NO_SHARD, "node1:start": KeyError},
        "shards",
        "node1: data.train '/data'|shard-000001.tar",
        "copy it again",
    ),
    (NO_SHARDS, "shards", "every node: data.train", "copy it again"),
    ({"node1:shards:data.val:fingerprint": "zzz"}, "shards", "data.val|abc on node0|zzz on node1", "copy"),
    (
        {"node1:teacher:teacher:bytes": 5},
        "teacher",
        "/t.pth|10,485,760 bytes on node0|5 bytes on node1",
        "node1",
    ),
    (
        {"node1:trackers": NO_WANDB, "node1:start": KeyError},
        "trackers",
        "node1: log.trackers",
        "dmae-ds[wandb]",
    ),
    ({"node1:teacher": NO_TEACHER, "node1:start": KeyError}, "teacher", "node1: teacher.weights", "copy it"),
    ({"node0:start": BAD_BATCH}, "batch", "optim.global_batch 63", "take 62"),
    (
        {"node1:run_dir:cannot_write": "Read-only file system"},
        "run folder",
        "/shared/run|Read-only file system on node1",
        "permissions",
    ),
    (
        {"met:node0:tokens:seen": ["0"], "met:node1:tokens:seen": ["1"]},
        "run folder",
        "/shared/run|node0, node1",
        "share",
    ),
    ({"met:node1:tokens": {"error": "FileNotFoundError"}}, "run folder", "/shared/run", "share"),
    (
        {"node1:run_dir:path": "/home/run"},
        "run folder",
        "/shared/run on node0|/home/run on node1",
        "absolute path",
    ),
    ({"node0:run_dir:held": "process 7 on node3"}, "run folder", "/shared/run|process 7 on node3", "run.dir"),
    (
        {"node1:run_dir:free": 7 * GIB},
        "disk",
        "7.00 GiB|/shared/run on node1|3 + 1 checkpoints|2.00 GiB|8.00 GiB",
        "checkpoint.keep",
    ),
]


@pytest.mark.parametrize(
    "changes, name, detail, fix", CASES, ids=[f"{case[1]}: {case[2][:30]}" for case in CASES]
)
def test_one_wrong_fact_fails_one_check_with_its_fix(changes, name, detail, fix):
    assert_one_wrong(changes, name, FAIL, detail, fix)


def test_no_login_of_the_tracker_on_the_first_node_is_a_warning():
    changes = {"node0:trackers:logged_in": False}
    assert_one_wrong(changes, "trackers", WARN, "wandb|node0", "wandb login|WANDB_MODE=offline")


def test_a_full_disk_fails_one_check_only():
    facts = healthy()
    for node_facts in facts.values():
        node_facts["run_dir"] |= {"free": 0, "cannot_write": "disk full"}
    checks = judge_all(facts, meetings())
    assert [name for name, check in checks.items() if check.verdict == FAIL] == ["disk"]


def test_without_a_recipe_only_the_machines_are_judged():
    of_machines = ("hostname", "machine", "code", "network", "versions", "devices", "port")
    facts = {
        node: {name: part for name, part in node_facts.items() if name in of_machines}
        for node, node_facts in healthy().items()
    }
    checks = judge_all(facts, meetings(), target(recipe=None))
    assert_check(checks["recipe"], SKIP, "none")
    assert not {"shards", "disk", "run folder"} & set(checks)


def test_each_of_several_teachers_is_judged(tmp_path):
    files = {name: tmp_path / f"{name}.pth" for name in ("mae", "moco")}
    files["mae"].write_bytes(b"weights")
    words = [f"teachers.{name}.weights={file}" for name, file in files.items()]
    config = load_config("digits_two_teachers", words)
    with refused("teachers.moco.weights", "moco.pth"):
        inspect_teacher(config)
    files["moco"].write_bytes(b"more weights")
    facts = {"node0": {"teacher": inspect_teacher(config)}, "node1": {"teacher": inspect_teacher(config)}}
    assert set(facts["node0"]["teacher"]) == {"teachers.mae", "teachers.moco"}
    assert judge_teacher(facts).verdict == OK
    facts["node1"]["teacher"]["teachers.moco"] = {"path": str(files["moco"]), "bytes": 5}
    failed = judge_teacher(facts)
    assert failed.verdict == FAIL and "moco.pth" in failed.detail and "mae.pth" not in failed.detail
