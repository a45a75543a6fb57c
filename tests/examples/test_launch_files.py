"""The launcher examples: their shell parses, and torchrun and examples/train.py know every option in them."""

import re
import shlex
import subprocess

import pytest
import train
import typer
import yaml
from support.paths import EXAMPLES
from torch.distributed.run import get_args_parser

LAUNCH = EXAMPLES / "launch"
SLURM, JOBSET, SKYPILOT = (LAUNCH / name for name in ("slurm.sbatch", "jobset.yaml", "skypilot.yaml"))
# Those of https://slurm.schedmd.com/sbatch.html that the example uses.
SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue", "open-mode"),
    "output",
}


def pod():
    jobset = yaml.safe_load(JOBSET.read_text())
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def script_of(path):
    if path == SLURM:
        return path.read_text()
    return pod()["containers"][0]["args"][0] if path == JOBSET else yaml.safe_load(path.read_text())["run"]


@pytest.mark.parametrize("path", [SLURM, JOBSET, SKYPILOT], ids=lambda path: path.name)
def test_the_script_starts_the_example_with_options_that_exist(path):
    script = script_of(path)
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    command = re.search(r"torchrun +(--.*)", script.replace("\\\n", " "))[1]
    words = shlex.split(re.sub(r"\$\(\([^)]*\)\)|\$\{?\w+(:-\d+)?\}?", "1", command))

    known = get_args_parser().parse_args(words)
    assert known.training_script == "examples/train.py"
    app = typer.Typer()
    app.command()(train.main)
    parsed = typer.main.get_command(app).make_context("train", known.training_script_args)
    assert parsed.params["states"]
    assert parsed.params["data_parallel"] == "fsdp"


def test_slurm_reads_each_directive():
    lines = SLURM.read_text().splitlines()
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert max(directives) < commands[0], "Slurm ignores directives after the first command"
    for i in directives:
        assert re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", lines[i])[1] in SBATCH


def test_the_jobset_fits_together():
    jobset = yaml.safe_load(JOBSET.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    replicated = jobset["spec"]["replicatedJobs"][0]
    job, words = replicated["template"]["spec"], shlex.split(script_of(JOBSET).replace("\\\n", " "))
    assert job["completionMode"] == "Indexed", "it sets JOB_COMPLETION_INDEX"
    assert str(job["parallelism"]) == str(job["completions"]) == words[words.index("--nnodes") + 1]
    # JobSet names the pods NAME-JOB-REPLICA-INDEX, and gives each that name below the subdomain.
    host = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    assert words[words.index("--master-addr") + 1] == host
    container = pod()["containers"][0]
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == words[words.index("--nproc-per-node") + 1]
    assert str(container["ports"][0]["containerPort"]) == words[words.index("--master-port") + 1]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}


def test_the_skypilot_task_fits_together():
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task["num_nodes"] == 2
    assert subprocess.run(["bash", "-n"], input=task["setup"], text=True, capture_output=True).stderr == ""
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["run"]))
    set_by_skypilot = {f"SKYPILOT_{name}" for name in ("NODE_IPS", "NODE_RANK", "NUM_NODES", "NUM_GPUS_PER_NODE")}
    assert used == set_by_skypilot | set(task["envs"])
