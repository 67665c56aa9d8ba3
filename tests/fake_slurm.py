"""Stands in for a SLURM cluster of one machine: sbatch, srun, sacct and scontrol, as far as they
are used. What it knows of a job lies in a folder below $FAKE_SLURM: its script and its state;
`calls` lists every call.

A node is a process; job arrays, queues and limits there are none.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])


def job_folder(job: str) -> Path:
    return HOME / job


def state_of(job: str) -> str:
    return (job_folder(job) / "state").read_text()


def sbatch(script: str) -> None:
    job = str(1000 + len(list(HOME.glob("1*"))))
    folder = job_folder(job)
    folder.mkdir()
    (folder / "script").write_text(Path(script).read_text())
    (folder / "state").write_text("RUNNING")
    command = [sys.executable, __file__, "controller", job]
    nowhere = subprocess.DEVNULL  # who submits waits for the end of what it can read
    subprocess.Popen(command, start_new_session=True, stdout=nowhere, stderr=nowhere)
    print(f"Submitted batch job {job}")


def controller(job: str) -> None:
    """Run a job, and again as often as it is queued again."""
    folder = job_folder(job)
    text = (folder / "script").read_text()
    nodes = re.search(r"--nodes=(\d+)", text)[1]
    env = os.environ | {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_JOB_NODELIST": "first" if nodes == "1" else f"localhost,node[2-{nodes}]",
    }
    while True:
        done = subprocess.run(["bash", str(folder / "script")], env=env)
        if not (folder / "requeue").exists():
            break
        (folder / "requeue").unlink()
    if state_of(job) == "RUNNING":
        (folder / "state").write_text("FAILED" if done.returncode else "COMPLETED")


def srun(*words: str) -> None:
    job, nodes = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_JOB_NUM_NODES"])
    output = words[words.index("--output") + 1].replace("%j", job)
    command = words[words.index("--output") + 2 :]
    tasks = []
    for node in range(nodes):
        env = os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
        with open(output.replace("%t", str(node)), "ab") as file:
            task = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        tasks.append(task)
    codes = [task.wait() for task in tasks]
    sys.exit(max(map(abs, codes)))


def sacct(*words: str) -> None:
    print("JobID|State|NodeList")
    for job in [words[i + 1] for i, word in enumerate(words) if word == "-j"]:
        if job_folder(job).exists():
            print(f"{job}|{state_of(job)}|localhost")


def scontrol(action: str, job: str) -> None:
    assert action == "requeue"
    (job_folder(job) / "requeue").touch()


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    with open(HOME / "calls", "a") as calls:
        calls.write(" ".join([name, *words]) + "\n")
    globals()[name](*words)
