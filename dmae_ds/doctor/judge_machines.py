"""Checks of what is installed and plugged in, from the facts of all nodes. Pure functions, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dmae_ds.doctor.check import FAIL, OK, SKIP, WARN, Check, group_nodes, join_names, list_values
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.inspect_node import COMPARED
from dmae_ds.doctor.reach import Trouble
from dmae_ds.output.units import GIB

MIN_FREE = 0.9  # share of a GPU's memory that should be free
MAX_SKEW_S = 1.0  # between two clocks
SAME_EVERYWHERE = ("python", *COMPARED, "dmae-ds")


@dataclass(frozen=True)
class Target:
    """Where a run would start: what a check needs in addition to the facts."""

    nodes: list[Node]
    kind: str  # of start.Launch
    master_address: str | None
    port: int
    recipe: str | None = None

    @property
    def world(self) -> int:
        return sum(node.slots for node in self.nodes)


Facts = dict[str, dict]  # {node: its facts by part}


def judge_ssh(answers: dict[str, dict | Trouble], *, pdsh: str | None) -> list[Check]:
    """Check ssh to every node and pdsh here. pdsh: the output of `pdsh -V`; None if it is not installed."""
    if pdsh is None:
        fix = "install pdsh (apt-get install pdsh), which the launcher uses; or --no_ssh on every node"
        pdsh_check = Check("pdsh", FAIL, "not installed here", fix)
    elif "ssh" not in pdsh.partition("rcmd modules:")[2].split("\n")[0]:
        fix = "install the package with pdsh's ssh module (pdsh-rcmd-ssh)"
        pdsh_check = Check("pdsh", FAIL, "it has no ssh module", fix)
    else:
        pdsh_check = Check("pdsh", OK, pdsh.split("\n")[0].split(" (")[0])
    good = f"{join_names(answers)} accept a login without a password"
    return [_check_troubles("ssh", answers, good), pdsh_check]


def judge_python(answers: dict[str, dict | Trouble]) -> Check:
    """Check that the interpreter, the working folder and the package exist on every node that ssh reaches."""
    reached = {
        node: answer
        for node, answer in answers.items()
        if not (isinstance(answer, Trouble) and answer.where == "ssh")
    }
    if not reached:
        return Check("python", SKIP, "no node can be reached")
    return _check_troubles("python", reached, f"{join_names(reached)} reported their facts")


def _check_troubles(where: str, answers: dict[str, dict | Trouble], good: str) -> Check:
    troubles = {
        node: answer
        for node, answer in answers.items()
        if isinstance(answer, Trouble) and answer.where == where
    }
    if not troubles:
        return Check(where, OK, good)
    details, fixes = [], []
    for what, nodes in group_nodes({node: trouble.what for node, trouble in troubles.items()}).items():
        details.append(f"{join_names(nodes)}: {what}")
        fix = troubles[nodes[0]].fix
        fixes.append(f"{fix}; the same for {join_names(nodes[1:])}" if len(nodes) > 1 else fix)
    return Check(where, FAIL, "; ".join(details), "; ".join(fixes))


def list_errors(facts: Facts, part: str) -> list[str]:
    """List "node: error" for the nodes where gathering a part of the facts failed."""
    return [
        f"{node}: {node_facts[part]['error']}"
        for node, node_facts in facts.items()
        if "error" in node_facts.get(part, {})
    ]


def judge_versions(facts: Facts) -> Check:
    """Check that versions are the same everywhere and fulfil setup.cfg."""
    from packaging.requirements import Requirement

    if errors := list_errors(facts, "versions"):
        fix = "run `python -c 'import torch'` there, and install what is missing: pip install dmae-ds"
        return Check("versions", FAIL, "; ".join(errors), fix)
    installed = {node: node_facts["versions"]["found"] for node, node_facts in facts.items()}
    details, fixes = [], []
    for name in SAME_EVERYWHERE:
        versions = {node: by_package[name] for node, by_package in installed.items()}
        if len(set(versions.values())) > 1:
            (commonest, _), *others = group_nodes(versions).items()
            package = f"Python {commonest}" if name == "python" else f"{name}=={commonest}"
            details.append(f"{name} {list_values(versions)}")
            fixes.append(f"install {package} on {join_names(node for _, nodes in others for node in nodes)}")
    for node, node_facts in facts.items():
        for requirement in map(Requirement, node_facts["versions"]["asked"]):
            version = installed[node].get(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                needed = requirement.specifier or "any version"
                details.append(f"{node}: {requirement.name} {version or 'is missing'}, {needed} is needed")
                fixes.append(f"pip install '{requirement}' on {node}")
    if details:
        return Check("versions", FAIL, "; ".join(details), "; ".join(dict.fromkeys(fixes)))
    first = next(iter(installed.values()))
    return Check("versions", OK, ", ".join(f"{name} {first[name]}" for name in SAME_EVERYWHERE))


def judge_code(facts: Facts) -> Check:
    """Check that the package, the recipes and the DeepSpeed files are the same everywhere."""
    if errors := list_errors(facts, "code"):
        return Check("code", FAIL, "; ".join(errors), "install dmae-ds there again")
    folders = {node: node_facts["code"]["folder"] for node, node_facts in facts.items()}
    digests = {node: tuple(sorted(node_facts["code"]["files"].items())) for node, node_facts in facts.items()}
    (commonest, majority), *others = group_nodes(digests).items()
    if not others:
        return Check("code", OK, f"the same {len(commonest)} files: {list_values(folders)}")
    details = []
    for files, nodes in others:
        different = sorted({name for name, _ in set(files) ^ set(commonest)})
        verb = "has" if len(nodes) == 1 else "have"
        details.append(
            f"{join_names(nodes)} {verb} other code than {join_names(majority)}: {join_names(different)}"
        )
    wrong = [node for _, nodes in others for node in nodes]
    fix = (
        f"install the same commit on {join_names(wrong)} ({folders[wrong[0]]}), "
        "or run all nodes from one shared folder"
    )
    return Check("code", FAIL, "; ".join(details), fix)


def judge_devices(facts: Facts, target: Target) -> Check:
    """Check that every rank has a GPU, free and like the others; without GPUs, list cores and memory."""
    if errors := list_errors(facts, "devices"):
        return Check("devices", FAIL, "; ".join(errors), "run `nvidia-smi` there")
    slots = {node.name: node.slots for node in target.nodes}
    devices = {node: node_facts["devices"] for node, node_facts in facts.items()}
    counts = {node: len(of_node["gpus"]) for node, of_node in devices.items()}
    if not any(counts.values()):
        return Check("devices", OK, f"no GPU: on CPUs; {list_values(_describe_cpus(facts))}")
    short = [
        f"{node} has {count} GPUs for {slots[node]} slots"
        for node, count in counts.items()
        if count < slots[node]
    ]
    if short:
        fix = (
            "put as many slots into the hostfile (--num_gpus) as there are GPUs; "
            "where some are not visible: nvidia-smi, CUDA_VISIBLE_DEVICES"
        )
        return Check("devices", FAIL, "; ".join(short), fix)
    kinds = {
        node: f"{slots[node]} x {of_node['gpus'][0]['name']}, driver {of_node['driver']}"
        for node, of_node in devices.items()
    }
    used = [text for node, of_node in devices.items() for text in _list_used_gpus(node, of_node, slots[node])]
    if used:
        detail = f"{list_values(kinds)}; GPUs in use: {join_names(used)}"
        fix = "end what runs there (nvidia-smi lists it), or leave those nodes out"
        return Check("devices", WARN, detail, fix)
    if len(set(kinds.values())) > 1:
        fix = "the slowest GPU sets the pace, and NCCL may fail between other drivers; take equal nodes"
        return Check("devices", WARN, list_values(kinds), fix)
    return Check("devices", OK, list_values(kinds))


def _describe_cpus(facts: Facts) -> dict[str, str]:
    machines = {node: node_facts["machine"] for node, node_facts in facts.items()}
    return {
        node: f"{machine['cores']} cores, {machine['memory'] / GIB:.0f} GiB of memory free"
        for node, machine in machines.items()
        if "cores" in machine
    }


def _list_used_gpus(node: str, devices: dict, slots: int) -> list[str]:
    processes = f" (process {join_names(devices['processes'])})" if devices["processes"] else ""
    return [
        f"{node}: {gpu['free'] / GIB:.0f} of {gpu['total'] / GIB:.0f} GiB free on GPU {index}{processes}"
        for index, gpu in enumerate(devices["gpus"][:slots])
        if gpu["free"] < MIN_FREE * gpu["total"]
    ]


def judge_cores(facts: Facts, workers: int | None, target: Target) -> list[Check]:
    """Check that ranks on GPUs and their loader workers have a core each; [] without GPUs or a recipe.

    workers: of a rank
    """
    cores, needed = {}, {}
    for node in target.nodes:
        part = facts.get(node.name, {})
        if part.get("devices", {}).get("gpus") and "cores" in part.get("machine", {}):
            cores[node.name] = part["machine"]["cores"]
            needed[node.name] = node.slots * (1 + (workers or 0))
    if workers is None or not cores:
        return []
    short = {name: f"{cores[name]} for {needed[name]}" for name in cores if cores[name] < needed[name]}
    if not short:
        return [Check("cores", OK, list_values(cores))]
    detail = f"cores for ranks x (1 + {workers} loader workers): {list_values(short)}"
    fix = (
        f"give the job more cores (Slurm: --cpus-per-task={max(needed.values())}, for srun too; docker: "
        "--cpus), or lower data.num_workers"
    )
    return [Check("cores", WARN, detail, fix)]


def judge_limits(facts: Facts, needs: dict, max_shards: int) -> Check:
    """Check the limit of open files and the shared memory, which the loader's workers need."""
    if errors := list_errors(facts, "machine"):
        return Check("limits", FAIL, "; ".join(errors), "look at that node")
    # Tar and index of the shards that a worker keeps open (data/reader.py), and libraries.
    files_needed = 2 * min(256, max_shards) + 256
    machines = {node: node_facts["machine"] for node, node_facts in facts.items()}
    open_files = {node: machine["open_files"] for node, machine in machines.items()}
    too_few = {node: limit for node, limit in open_files.items() if 0 <= limit < files_needed}
    if too_few:
        detail = f"open files a process: {list_values(too_few)}; {files_needed} are needed"
        fix = "ulimit -n 65536 on those nodes (in /etc/security/limits.conf, or sshd's and slurmd's unit)"
        return Check("limits", FAIL, detail, fix)
    batches = needs.get("batches_a_node", 0)
    shm = {node: machine["shm"] for node, machine in machines.items() if machine["shm"] is not None}
    too_small = {node: f"{free / 2**20:,.0f} MiB" for node, free in shm.items() if free < batches}
    if too_small:
        detail = (
            f"/dev/shm has {list_values(too_small)} free; "
            f"prefetched batches take {batches / 2**20:,.0f} MiB a node"
        )
        fix = "enlarge it (docker: --shm-size, --ipc=host), or lower data.num_workers"
        return Check("limits", FAIL, detail, fix)
    smallest = min(shm.values(), default=0)
    detail = f"at least {min(open_files.values()):,} open files, {smallest / GIB:.1f} GiB in /dev/shm"
    return Check("limits", OK, detail)


def judge_clocks(skews: dict[str, tuple[float, float]]) -> Check:
    """Check that clocks agree. skews: node -> (seconds ahead of this machine, possible error of that)."""
    wrong = {node: skew for node, (skew, error) in skews.items() if abs(skew) - error > MAX_SKEW_S}
    if wrong:
        texts = [
            f"{node} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}" for node, skew in wrong.items()
        ]
        fix = f"logs and files will be out of order; run an NTP client (chrony) on {join_names(wrong)}"
        return Check("clocks", WARN, ", ".join(texts), fix)
    worst = max((abs(skew) + error for skew, error in skews.values()), default=0.0)
    return Check("clocks", OK, f"within {max(worst, 0.1):.1f} s")
