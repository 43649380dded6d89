"""The launch scripts and manifests: syntax, what a dry run shows, and the fields of a JobSet."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from storm_jax.parallel import processes
from storm_jax.training import exits

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def shown(*command: str, **variables: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    shown("bash", "-n", str(script))
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck:
        shown(shellcheck, str(script))


def test_no_registry_is_named():
    for path in LAUNCH.iterdir():
        assert not re.search(r"\b[\w-]+\.(pkg\.dev|gcr\.io|docker\.io|ecr\.)", path.read_text()), (
            path
        )


def gke(kind: str, **variables: str) -> dict:
    common = {"NAME": "long", "IMAGE": "image", "WORKDIR": "gs://bucket/long", "HOSTS": "16"}
    text = shown("launch/gke.sh", "--dry-run", kind, **(common | variables))
    assert "$" not in text
    return yaml.safe_load(text)


@pytest.mark.parametrize(
    "kind, variables, chips",
    [
        ("tpu", {"ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "4x4x4", "SLICES": "2"}, 4),
        ("gpu", {"ACCELERATOR": "nvidia-h200-141gb"}, 8),
    ],
)
def test_jobsets(kind, variables, chips):
    manifest = gke(kind, **variables)
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    assert manifest["metadata"]["name"] == "long"
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 10
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert replicated["replicas"] == int(variables.get("SLICES", 1))
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (16, 16)
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes["values"] == [exits.PREEMPTED, exits.STUCK]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert variables["ACCELERATOR"] in pod["nodeSelector"].values()
    (container,) = pod["containers"]
    assert container["name"] == codes["containerName"] and container["image"] == "image"
    assert container["command"] == ["python", "-m", "storm_jax.train"]
    assert container["args"] == ["--config=configs/long.py", "--workdir=gs://bucket/long"]
    (resource,) = container["resources"]["limits"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"][resource] == chips
    environment = {item["name"]: item for item in container["env"]}
    if kind == "tpu":
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
        assert environment[processes.EXPECTED_PROCESSES]["value"] == "32"
    else:
        assert environment[processes.COUNT]["value"] == "16"
        assert environment[processes.COORDINATOR]["value"] == "long-node-0-0.long:8476"
        assert processes.INDEX in environment
        assert environment[processes.EXPECTED_DEVICES]["value"] == "128"


def test_missing_variables_are_named():
    done = subprocess.run(
        [LAUNCH / "gke.sh", "--dry-run", "tpu"],
        env={"PATH": os.environ["PATH"], "NAME": "x"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "IMAGE: the image that" in done.stderr


def test_tpu_vm():
    where = {"NAME": "long", "ZONE": "zone", "TYPE": "v5p-128", "RUNTIME": "v2-alpha-tpuv5"}
    script = ("launch/tpu_vm.sh", "--dry-run")
    assert (
        shown(*script, "create", SPOT="1", **where).split()
        == (
            "gcloud compute tpus queued-resources create long --node-id=long --zone=zone"
            " --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --spot"
        ).split()
    )
    assert "--node-prefix=long --node-count=2" in shown(*script, "create", SLICES="2", **where)
    run = shown(*script, "run", "--config=configs/long.py", "--workdir=gs://b/r", **where)
    assert run.startswith("gcloud compute tpus tpu-vm ssh long --zone=zone --worker=all")
    assert "storm_jax.train" in run and "--workdir=gs://b/r" in run
    two = shown(*script, "run", "--config=c", "--workdir=gs://b/r", SLICES="2", **where)
    assert "ssh long-0" in two and "ssh long-1" in two
    assert "./data" in shown(*script, "setup", **where)  # storm_jax/data must travel
    for action in ("stop", "status", "delete"):
        assert "long" in shown(*script, action, **where)


def test_what_tpu_vm_sends_holds_the_package(tmp_path):
    line = shown("launch/tpu_vm.sh", "--dry-run", "setup", NAME="x", ZONE="z", TMPDIR=str(tmp_path))
    subprocess.run(line.splitlines()[0], shell=True, check=True)
    names = shown("tar", "-tzf", str(tmp_path / "storm_jax_code.tar.gz")).splitlines()
    assert "./storm_jax/data/pipeline.py" in names and "./setup.py" in names
    assert not any(name.startswith(("./.git/", "./.venv")) for name in names)


def test_slurm():
    line = shown(
        *("bash", "launch/slurm.sbatch", "--config=configs/long.py", "--workdir=a b"),
        **{"DRY_RUN": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NUM_NODES": "4"},
    )
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7 " in line
    assert "STORM_EXPECT_PROCESSES=4 STORM_EXPECT_DEVICES=32 srun --kill-on-bad-exit=1" in line
    assert r"-m storm_jax.train --config=configs/long.py --workdir=a\ b" in line
    header = (LAUNCH / "slurm.sbatch").read_text()
    for option in ("--ntasks-per-node=1", "--signal=TERM@600", "--requeue"):
        assert f"#SBATCH {option}\n" in header


def test_local_processes():
    lines = shown(
        *("launch/local_processes.sh", "--dry-run", "2", "4", "python", "-m", "storm_jax.train"),
        STORM_PORT="1234",
    ).splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines):
        assert f"{processes.INDEX}={number} " in line and f"{processes.COUNT}=2 " in line
        assert f"{processes.COORDINATOR}=127.0.0.1:1234 " in line
        assert "--xla_force_host_platform_device_count=4" in line


def test_local_processes_end_together(tmp_path):
    """One fails: the others are ended, and its status is returned."""
    code = "import os, sys, time; os.environ['STORM_PROCESS_ID'] == '1' and sys.exit(3)"
    code += "; time.sleep(60)"
    done = subprocess.run(
        [LAUNCH / "local_processes.sh", "3", "1", "python3", "-c", code], timeout=30
    )
    assert done.returncode == 3


@pytest.mark.parametrize("name, extra", [("tpu", "tpu"), ("cuda", "cuda")])
def test_dockerfiles(name, extra):
    lines = (LAUNCH / f"Dockerfile.{name}").read_text().splitlines()
    words = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert set(words) <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    assert words[:2] == ["ARG", "FROM"] and "FROM ${BASE}" in lines
    assert any(f"'.[{extra},gcs]'" in line for line in lines)
    assert f'"{extra}": [' in (ROOT / "setup.py").read_text()
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
    ignored = (LAUNCH / f"Dockerfile.{name}.dockerignore").read_text().split()
    assert "data" in ignored and "**/data" not in ignored  # storm_jax/data is needed
