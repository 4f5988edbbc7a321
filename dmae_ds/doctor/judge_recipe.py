"""Checks of recipe, data, teacher and run folder, from the facts of all nodes. Pure functions, no torch."""

from __future__ import annotations

from dmae_ds.doctor.check import FAIL, OK, SKIP, WARN, Check, group_nodes, join_names, list_values, split_fix
from dmae_ds.doctor.judge_machines import Facts, Target
from dmae_ds.output.units import size_text

SHARE = "put it on a file system that all nodes share, or copy it to each of them"


def judge_recipe(facts: Facts, meetings: Facts, target: Target) -> list[Check]:
    """Check all that concerns the recipe; without a recipe, one skipped line."""
    if target.recipe is None:
        return [Check("recipe", SKIP, "none was given: data, teacher and checkpoints are not checked")]
    recipe = _judge_equal_recipes(facts)
    facts = {node: node_facts for node, node_facts in facts.items() if "error" not in node_facts["recipe"]}
    if not facts:
        return [recipe]
    return [
        recipe,
        _judge_shards(facts),
        judge_teacher(facts),
        _judge_trackers(facts),
        _judge_batch(facts, target),
        _judge_run_folder(facts, meetings),
        _judge_disk(facts),
    ]


def _check_errors(name: str, facts: Facts, part: str, fix: str) -> Check | None:
    """A failed check with the commonest error in a part of the facts; None without errors."""
    errors = {node: facts[node][part]["error"] for node in facts if "error" in facts[node].get(part, {})}
    if not errors:
        return None
    (error, nodes), *others = group_nodes(errors).items()
    problem, fix_of_error = split_fix(error)
    where = "every node" if len(nodes) == len(facts) > 1 else join_names(nodes)
    detail = f"{where}: {problem}"
    if others:
        detail += f" (and another error on {join_names(node for _, nodes in others for node in nodes)})"
    return Check(name, FAIL, detail, fix_of_error or fix)


def _minority(values: dict[str, object]) -> str:
    """The nodes whose value is not the commonest one."""
    _, *others = group_nodes(values).values()
    return join_names(node for nodes in others for node in nodes)


def _judge_equal_recipes(facts: Facts) -> Check:
    if failed := _check_errors("recipe", facts, "recipe", f"fix the recipe; {SHARE}"):
        return failed
    digests = {node: node_facts["recipe"]["digest"] for node, node_facts in facts.items()}
    if len(set(digests.values())) > 1:
        detail = f"it differs between nodes: {list_values(digests)}"
        return Check("recipe", FAIL, detail, f"copy it to {_minority(digests)}; {SHARE}")
    if len(facts) == 1:
        return Check("recipe", OK, "readable")
    return Check("recipe", OK, f"the same on {join_names(facts)} ({next(iter(digests.values()))})")


def _judge_shards(facts: Facts) -> Check:
    if failed := _check_errors("shards", facts, "shards", SHARE):
        return failed
    first = next(iter(facts.values()))["shards"]
    for name in first:
        fingerprints = {node: node_facts["shards"][name]["fingerprint"] for node, node_facts in facts.items()}
        if len(set(fingerprints.values())) > 1:
            detail = f"{name} differs between nodes: {list_values(fingerprints)}"
            return Check("shards", FAIL, detail, f"copy one of them everywhere; {SHARE}")
    sizes = [f"{name} {part['samples']:,} in {part['shards']:,} tars" for name, part in first.items()]
    return Check("shards", OK, f"{', '.join(sizes)}, of the right size")


def judge_teacher(facts: Facts) -> Check:
    """Check that the teachers' weights are found, and of the same size on every node."""
    if failed := _check_errors("teacher", facts, "teacher", SHARE):
        return failed
    files = {
        section: file for node_facts in facts.values() for section, file in node_facts["teacher"].items()
    }
    for section, file in files.items():
        sizes = {
            node: node_facts["teacher"].get(section, {}).get("bytes") for node, node_facts in facts.items()
        }
        if len(set(sizes.values())) > 1:
            texts = {node: "none" if size is None else f"{size:,} bytes" for node, size in sizes.items()}
            detail = f"{file['path']}: {list_values(texts)}"
            return Check("teacher", FAIL, detail, f"copy it to {_minority(sizes)} again")
    if not files:
        return Check("teacher", SKIP, "no file of weights in the recipe")
    texts = [
        f"{section.removeprefix('teacher').removeprefix('s.')} {size_text(file['bytes'])}".strip()
        for section, file in files.items()
    ]
    return Check("teacher", OK, f"{', '.join(texts)}{' on every node' if len(facts) > 1 else ''}")


def _judge_trackers(facts: Facts) -> Check:
    """Check that trackers are installed, and that W&B knows who logs, on the first node, which has rank 0."""
    if failed := _check_errors("trackers", facts, "trackers", "install it on every node"):
        return failed
    first = next(iter(facts.values()))["trackers"]
    names = ", ".join(first["names"]) or "none: metrics.jsonl alone"
    if "project" not in first:
        return Check("trackers", OK, names)
    if not first["logged_in"]:
        fix = "wandb login there, WANDB_API_KEY, or WANDB_MODE=offline"
        return Check("trackers", WARN, f"{names}: no login of W&B found on {next(iter(facts))}", fix)
    return Check("trackers", OK, f"{names}, project {first['project']}")


def _judge_batch(facts: Facts, target: Target) -> Check:
    """Check what `dmae-ds train` would refuse before it builds a model."""
    if failed := _check_errors("batch", facts, "start", "fix the recipe"):
        return failed
    starts = [node_facts["start"] for node_facts in facts.values() if "start" in node_facts]
    if not starts:
        return Check("batch", SKIP, "needs shards, teacher and trackers")
    start = starts[0]
    batch = f"{target.world} x {start['micro_batch']} images x {start['accumulation']} accumulated"
    resumes = f", resumes from {start['resumes']}" if start["resumes"] else ""
    return Check("batch", OK, f"{batch}, {start['steps']:,} steps{resumes}")


def _judge_run_folder(facts: Facts, meetings: Facts) -> Check:
    """Check that all nodes share one run folder: every node sees every node's token in it."""
    if failed := _check_errors("run folder", facts, "run_dir", SHARE):
        return failed
    folders = {node: node_facts["run_dir"] for node, node_facts in facts.items()}
    paths = {node: folder["path"] for node, folder in folders.items()}
    path = next(iter(paths.values()))
    refusals = {node: folder["cannot_write"] for node, folder in folders.items() if "cannot_write" in folder}
    if len(refusals) == len(facts) and set(refusals.values()) == {"disk full"}:
        return Check("run folder", SKIP, "nothing can be written: see disk")
    if refusals:
        fix = "free space or fix its permissions and quota; or choose another run.dir"
        return Check("run folder", FAIL, f"{path} cannot be written: {list_values(refusals)}", fix)
    if holders := [folder["held"] for folder in folders.values() if folder["held"]]:
        fix = "wait for it or stop it, or choose another run.dir"
        return Check("run folder", FAIL, f"{path} is in use by {holders[0]}", fix)
    if len(facts) == 1:
        return Check("run folder", OK, f"{path} can be written")
    if len(set(paths.values())) > 1:
        detail = f"run.dir is another folder on other nodes: {list_values(paths)}"
        return Check("run folder", FAIL, detail, "give an absolute path that all nodes share")
    seen = {node: meeting["tokens"].get("seen") for node, meeting in meetings.items() if node in facts}
    if not seen:
        return Check("run folder", SKIP, "the nodes did not meet")
    if any(tokens is None or len(tokens) < len(facts) for tokens in seen.values()):
        fix = (
            "set run.dir to a file system that all nodes share (NFS, Lustre): "
            "a checkpoint has parts of every rank"
        )
        return Check("run folder", FAIL, f"{path} is not the same folder on {join_names(seen)}", fix)
    return Check("run folder", OK, f"{path} is shared by {join_names(seen)}")


def _judge_disk(facts: Facts) -> Check:
    needs = next((node_facts["needs"] for node_facts in facts.values() if "needs" in node_facts), {})
    if not needs:
        return Check("disk", SKIP, "the first node did not answer")
    if "save" not in needs:
        detail = f"the size of a checkpoint is not known: {needs['error']}"
        return Check("disk", FAIL, detail, "fix the recipe")
    folders = {node: node_facts["run_dir"] for node, node_facts in facts.items()}
    free = {node: folder["free"] for node, folder in folders.items() if "free" in folder}
    if not free:
        return Check("disk", SKIP, "the run folder cannot be looked at")
    node, least = min(free.items(), key=lambda item: item[1])
    needed = needs["save"] * (needs["keep"] + 1)
    checkpoints = f"{needs['keep']} + 1 checkpoints of {size_text(needs['save'])}"
    if least < needed:
        where = f"{size_text(least)} free in {folders[node]['path']} on {node}"
        fix = "free some, choose another run.dir, or lower checkpoint.keep"
        return Check("disk", FAIL, f"{where}; {checkpoints} need {size_text(needed)}", fix)
    return Check("disk", OK, f"{size_text(least)} free for {checkpoints}")
