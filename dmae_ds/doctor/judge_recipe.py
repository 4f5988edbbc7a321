"""Facts of all nodes -> checks of the recipe, its data, teacher and run folder. Pure; no torch."""

from __future__ import annotations

from dmae_ds.doctor.check import FAIL, OK, SKIP, Check, by_value, groups, names, split_mend
from dmae_ds.doctor.judge_machines import Asked, Facts
from dmae_ds.output.units import GIB

SHARE = "put it on a file system that all nodes share, or copy it to each of them"


def judge_recipe(facts: Facts, meetings: Facts, asked: Asked) -> list[Check]:
    """Everything that concerns the recipe; one skipped line where none was given."""
    if asked.recipe is None:
        return [Check("recipe", SKIP, "none was given: nothing is said of data, teacher, checkpoints")]
    read = _recipe(facts)
    facts = {node: part for node, part in facts.items() if "error" not in part["recipe"]}
    if not facts:
        return [read]
    return [
        read,
        _shards(facts),
        _teacher(facts),
        _start(facts, asked),
        _shared(facts, meetings),
        _space(facts),
    ]


def _failed(name: str, facts: Facts, part: str, mend: str) -> Check | None:
    """The first node's error, and which others have one."""
    found = {node: facts[node][part]["error"] for node in facts if "error" in facts[node].get(part, {})}
    if not found:
        return None
    kinds = {error: nodes for error, nodes in groups(found).items()}
    error, nodes = next(iter(kinds.items()))
    text, own_mend = split_mend(error)
    more = (
        f" (and otherwise on {names(node for other, those in kinds.items() if other != error for node in those)})"
        if len(kinds) > 1
        else ""
    )
    where = "every node" if len(nodes) == len(facts) > 1 else names(nodes)
    return Check(name, FAIL, f"{where}: {text}{more}", own_mend or mend)


def _recipe(facts: Facts) -> Check:
    if failed := _failed("recipe", facts, "recipe", f"mend the recipe; {SHARE}"):
        return failed
    digests = {node: part["recipe"]["digest"] for node, part in facts.items()}
    if len(set(digests.values())) > 1:
        _, *others = groups(digests).values()
        return Check(
            "recipe",
            FAIL,
            f"it says other things on other nodes: {by_value(digests)}",
            f"copy it to {names(node for nodes in others for node in nodes)}; {SHARE}",
        )
    return Check(
        "recipe",
        OK,
        f"the same on {names(facts)} ({next(iter(digests.values()))})" if len(facts) > 1 else "readable",
    )


def _shards(facts: Facts) -> Check:
    if failed := _failed("shards", facts, "shards", SHARE):
        return failed
    for name in next(iter(facts.values()))["shards"]:
        prints = {node: part["shards"][name]["fingerprint"] for node, part in facts.items()}
        if len(set(prints.values())) > 1:
            return Check(
                "shards",
                FAIL,
                f"{name} holds other data on other nodes: {by_value(prints)}",
                f"copy one of them everywhere; {SHARE}",
            )
    parts = next(iter(facts.values()))["shards"]
    return Check(
        "shards",
        OK,
        ", ".join(f"{name} {part['samples']:,} in {part['shards']:,} tars" for name, part in parts.items())
        + ", of the right size",
    )


def _teacher(facts: Facts) -> Check:
    if failed := _failed("teacher", facts, "teacher", SHARE):
        return failed
    sizes = {node: part["teacher"].get("bytes") for node, part in facts.items()}
    if len(set(sizes.values())) > 1:
        _, *others = groups(sizes).values()
        path = next(iter(facts.values()))["teacher"].get("path")
        return Check(
            "teacher",
            FAIL,
            f"{path}: {by_value({node: f'{count:,} bytes' if count is not None else 'none' for node, count in sizes.items()})}",
            f"copy it to {names(node for nodes in others for node in nodes)} again",
        )
    found = next(iter(sizes.values()))
    if found is None:
        return Check("teacher", SKIP, "no file of weights in the recipe")
    return Check("teacher", OK, f"{size(found)}{' on every node' if len(facts) > 1 else ''}")


def _start(facts: Facts, asked: Asked) -> Check:
    """What `dmae-ds train` would refuse."""
    if failed := _failed("batch", facts, "start", "mend the recipe"):
        return failed
    parts = [part["start"] for part in facts.values() if "start" in part]
    if not parts:
        return Check("batch", SKIP, "needs shards and teacher")
    first = parts[0]
    resumes = f", resumes from {first['resumes']}" if first["resumes"] else ""
    return Check(
        "batch",
        OK,
        f"{asked.world} x {first['micro_batch']} images x {first['accumulation']} accumulated, {first['steps']:,} steps{resumes}",
    )


def _shared(facts: Facts, meetings: Facts) -> Check:
    """One run folder for all: every node sees every node's token."""
    if failed := _failed("run folder", facts, "run_dir", SHARE):
        return failed
    paths = {node: part["run_dir"]["path"] for node, part in facts.items()}
    path = next(iter(paths.values()))
    if all(part["run_dir"].get("cannot_write") == "disk full" for part in facts.values()):
        return Check("run folder", SKIP, "nothing can be written: see disk")
    if closed := {
        node: part["run_dir"]["cannot_write"]
        for node, part in facts.items()
        if "cannot_write" in part["run_dir"]
    }:
        return Check(
            "run folder",
            FAIL,
            f"{path} cannot be written: {by_value(closed)}",
            "free space or mend its permissions and quota; or choose another run.dir",
        )
    if holders := [part["run_dir"]["held"] for part in facts.values() if part["run_dir"]["held"]]:
        return Check(
            "run folder",
            FAIL,
            f"{path} is in use by {holders[0]}",
            "wait for it or stop it, or choose another run.dir",
        )
    if len(facts) == 1:
        return Check("run folder", OK, f"{path} can be written")
    if len(set(paths.values())) > 1:
        return Check(
            "run folder",
            FAIL,
            f"run.dir is another folder on other nodes: {by_value(paths)}",
            "give an absolute path that all nodes share",
        )
    seen = {node: meeting["tokens"].get("seen") for node, meeting in meetings.items() if node in facts}
    if not seen:
        return Check("run folder", SKIP, "the nodes did not meet")
    alone = [node for node, tokens in seen.items() if tokens is None or len(tokens) < len(facts)]
    if alone:
        return Check(
            "run folder",
            FAIL,
            f"{path} is not the same folder on {names(seen)}",
            "set run.dir to a file system that all nodes share (NFS, Lustre): a checkpoint has parts of every rank",
        )
    return Check("run folder", OK, f"{path} is shared by {names(seen)}")


def _space(facts: Facts) -> Check:
    needs = next((part["needs"] for part in facts.values() if "needs" in part), {})
    if "save" not in needs:
        return (
            Check("disk", FAIL, f"the size of a checkpoint is not known: {needs['error']}", "mend the recipe")
            if needs
            else Check("disk", SKIP, "the first node did not answer")
        )
    needed = needs["save"] * (needs["keep"] + 1)
    free = {node: part["run_dir"]["free"] for node, part in facts.items() if "free" in part["run_dir"]}
    if not free:
        return Check("disk", SKIP, "the run folder cannot be looked at")
    node, least = min(free.items(), key=lambda item: item[1])
    what = f"{needs['keep']} + 1 checkpoints of {size(needs['save'])}"
    if least < needed:
        return Check(
            "disk",
            FAIL,
            f"{size(least)} free in {facts[node]['run_dir']['path']} on {node}; {what} need {size(needed)}",
            "free some, choose another run.dir, or lower checkpoint.keep",
        )
    return Check("disk", OK, f"{size(least)} free for {what}")


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"
