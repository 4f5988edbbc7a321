"""launch/: every way to start a run that we ship is run here over two nodes, broken and stopped on the way, to the end.

What cannot be had here has a stand-in: Slurm's srun and scontrol are a few lines of shell, Kubernetes is an environment variable.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
import yaml

from tests.multi_node.nodes import LIMIT_S, Process, TwoNodes, ssh_available
from tests.train.conftest import REPOSITORY, command, losses, run
from tests.train.test_resume import wait_for_step

LAUNCH = REPOSITORY / "launch"
TRAIN = ["bash", LAUNCH / "train.sh"]
# Long enough to be stopped on the way.
STEPS = 60
LONGER = [
    f"optim.epochs={(STEPS - 0.5) * 64 / 1400}",
    "optim.global_batch=64",
    "student.embed_dim=128",
    "log.every_steps=1",
    "checkpoint.every_steps=10",
]
FINISHED, STOPPED = 0, 75


@pytest.fixture(scope="module")
def expected(tiny_recipe, tmp_path_factory) -> list[float]:
    """The losses of two ranks of one node that nobody disturbs."""
    folder = tmp_path_factory.mktemp("expected")
    done = run(command(["train", *tiny_recipe, *LONGER, f"run.dir={folder / 'run'}"], ranks=2), cwd=folder)
    assert done.returncode == 0, done.stderr
    return losses(folder / "run")


@pytest.fixture
def recipe(tiny_recipe, tmp_path) -> list[str]:
    return [*tiny_recipe, *LONGER, f"run.dir={tmp_path / 'run'}"]


def start(nodes: TwoNodes, commands: list[list], **more: str) -> list[Process]:
    """One command a node, output into NODE.log, at the repository's root as a user of launch/ would stand."""
    started = []
    for rank, (node, words) in enumerate(zip(nodes.nodes, commands)):
        with open(nodes.folder / f"{node.name}.log", "ab") as log:
            env = {"NODE_RANK": str(rank), "JOB_COMPLETION_INDEX": str(rank), "MASTER_ADDR": "node-a", **more}
            started.append(
                node.popen(
                    words,
                    env=env,
                    stdout=log,
                    stderr=log,
                    cwd=nodes.folder if "HOSTFILE" in more else REPOSITORY,
                )
            )
    return started


def said(nodes: TwoNodes) -> str:
    return "\n".join(log.read_text() for log in sorted(nodes.folder.glob("*.log")))


def ends(nodes: TwoNodes, started: list[Process], codes: set[int]) -> None:
    """All end, each with one of these codes, and leave nothing behind."""
    found = [process.wait(LIMIT_S) for process in started]
    assert set(found) <= codes, f"exit codes {found}\n{said(nodes)}"
    end = time.monotonic() + 60
    while any(node.processes() for node in nodes.nodes):
        assert time.monotonic() < end, [node.processes() for node in nodes.nodes]
        time.sleep(0.1)


def same_losses(nodes: TwoNodes, expected: list[float]) -> None:
    found = losses(nodes.folder / "run")
    assert len(found) == STEPS and found == expected, said(nodes)  # as many ranks: to the last bit


@pytest.mark.parametrize(
    "path", [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"], ids=lambda path: path.name
)
def test_the_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_train_sh_names_what_it_misses(tmp_path):
    for more, words in (
        ({}, "name a recipe"),
        ({"LAUNCHER": "no_ssh"}, "NODE_RANK"),
        ({"LAUNCHER": "mpi"}, "choose one_node, pdsh"),
    ):
        done = subprocess.run(
            [*TRAIN, *(["digits_mae"] if more else [])],
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2 and words in done.stderr


def test_the_kubernetes_job_fits_together():
    service, job = yaml.safe_load_all((LAUNCH / "k8s-job.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    name = job["metadata"]["name"]
    assert (
        service["spec"]["selector"] == {"job-name": name} and pod["subdomain"] == service["metadata"]["name"]
    )
    assert environment["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["GPUS"])
    assert {
        rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]
    } == {"FailJob": [2], "Ignore": [STOPPED]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


@pytest.mark.slow
def test_the_kubernetes_container_s_command(nodes, recipe, expected):
    _, job = yaml.safe_load_all((LAUNCH / "k8s-job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]} | {
        "GPUS": "1",
        "MASTER_ADDR": "node-a",
    }
    pods = start(nodes, [[*container["command"], *recipe]] * 2, **environment)
    wait_for_step(nodes.folder / "run", 15, pods[0], nodes.folder / "node-a.log")
    pods[1].send_signal(signal.SIGTERM)  # a node is drained: the kubelet tells process 1 of its pod
    ends(nodes, pods, {STOPPED})
    ends(nodes, start(nodes, [[*container["command"], *recipe]] * 2, **environment), {FINISHED})
    same_losses(nodes, expected)
    # A pod that is started once more, after all are through, waits for nobody.
    ends(nodes, start(nodes, [[*container["command"], *recipe]], **environment), {FINISHED})


@pytest.mark.slow
def test_pdsh_stopped_and_continued(nodes, recipe, expected):
    if reason := ssh_available():
        pytest.skip(f"NOT RUN OVER SSH: {reason}")
    options = {"HOSTFILE": str(nodes.hostfile), "NODE_RANK": ""}
    (job,) = start(nodes, [[*TRAIN, *recipe]], **options)
    wait_for_step(nodes.folder / "run", 15, job, nodes.folder / "node-a.log")
    job.send_signal(signal.SIGTERM)
    ends(nodes, [job], {STOPPED})
    ends(nodes, start(nodes, [[*TRAIN, *recipe]], **options), {FINISHED})
    same_losses(nodes, expected)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["deepspeed.launcher.launch", "--local_rank"])
def test_a_broken_run_is_started_again(nodes, recipe, expected, victim):
    # DeepSpeed says 0 when its launch.py was killed.
    options = {"LAUNCHER": "no_ssh", "HOSTFILE": str(nodes.hostfile), "RESTARTS": "2"}
    jobs = start(nodes, [[*TRAIN, *recipe, "dist.timeout_s=30"]] * 2, **options)
    wait_for_step(nodes.folder / "run", 15, jobs[0], nodes.folder / "node-a.log")
    os.kill(next(pid for pid, line in nodes.b.processes().items() if victim in line), signal.SIGKILL)
    ends(nodes, jobs, {FINISHED})
    assert "restart 1 of 2" in (nodes.folder / "node-b.log").read_text()
    same_losses(nodes, expected)


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again(nodes, recipe, expected):
    jobs = start(nodes, [[*TRAIN, *recipe]] * 2, LAUNCHER="torchrun", NODES="2", GPUS="1", RESTARTS="2")
    wait_for_step(nodes.folder / "run", 15, jobs[0], nodes.folder / "node-a.log")
    os.kill(
        next(
            pid
            for pid, line in nodes.b.processes().items()
            if "-m dmae_ds" in line and "--rdzv_id" not in line
        ),
        signal.SIGKILL,
    )
    wait_for_step(nodes.folder / "run", 30, jobs[0], nodes.folder / "node-a.log")
    jobs[0].send_signal(signal.SIGTERM)
    ends(nodes, jobs, {STOPPED, 1})
    ends(nodes, start(nodes, [[*TRAIN, *recipe]] * 2, LAUNCHER="torchrun", NODES="2", GPUS="1"), {FINISHED})
    same_losses(nodes, expected)


@pytest.mark.slow
def test_accelerate(nodes, recipe, expected):
    base = [
        "accelerate",
        "launch",
        "--config_file",
        LAUNCH / "accelerate.yaml",
        "--num_machines",
        "2",
        "--num_processes",
        "2",
        "--main_process_ip",
        "node-a",
    ]
    words = [[*base, "--machine_rank", str(rank), "-m", "dmae_ds", "train", *recipe] for rank in range(2)]
    ends(nodes, start(nodes, words), {FINISHED})
    same_losses(nodes, expected)


SRUN = """#!/usr/bin/env bash
# Stand-in: one task a node, in the nodes' namespaces; the highest exit code.
while [[ $1 == --* ]]; do shift; done
codes=()
for node in 0 1; do
    pid=NODE_$node
    SLURM_NODEID=$node nsenter --target "${!pid}" --net --pid --mount --uts --ipc env -C "$PWD" "$@" &
    tasks[$node]=$!
done
highest=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; [ $code -le $highest ] || highest=$code; done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) printf 'node-a\\nnode-b\\n' ;;
requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


@pytest.mark.slow
def test_slurm_s_time_limit_and_requeue(nodes, recipe, expected):
    programs = nodes.folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    requeued = nodes.folder / "requeued"
    environment = {
        **os.environ,
        **nodes.environment,
        "PATH": f"{programs}:{nodes.environment['PATH']}",
        "REQUEUED": str(requeued),
        "NODE_0": str(nodes.a.pid),
        "NODE_1": str(nodes.b.pid),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }

    def submit(restarts: int) -> subprocess.Popen:
        with open(nodes.folder / "slurm.log", "ab") as log:
            return subprocess.Popen(
                ["bash", LAUNCH / "slurm.sbatch", *recipe],
                env={**environment, "SLURM_RESTART_COUNT": str(restarts)},
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
            )

    job = submit(0)
    wait_for_step(nodes.folder / "run", 15, job, nodes.folder / "slurm.log")
    for node in nodes.nodes:  # Slurm signals the first process of each task
        os.kill(
            next(pid for pid, line in node.processes().items() if "launch/train.sh" in line), signal.SIGUSR1
        )
    assert job.wait(LIMIT_S) == 0, said(nodes)
    assert requeued.read_text() == "17\n" and "exit code 75" in said(nodes)
    assert 15 <= len(losses(nodes.folder / "run")) < STEPS
    job = submit(1)
    assert job.wait(LIMIT_S) == 0, said(nodes)
    assert requeued.read_text() == "17\n"
    same_losses(nodes, expected)
