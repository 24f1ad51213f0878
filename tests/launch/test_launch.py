"""The launch scripts: shellcheck, dry-runs against goldens, plain messages, no cloud needed.

After a wanted change: DOPSD_WRITE_GOLDENS=1 python -m pytest tests/launch, and read the diff.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDENS = Path(__file__).parent
SCRIPTS = ("gpu.sh", "gpu_bench.sh", "tpu_vm.sh", "xpk.sh", "slurm.sbatch")
TRAIN = ("--", "train", "--config", "configs/z_image_turbo_lora.py", "--workdir", "runs/a",
         "--config.sample_prompts=('a fox', \"it's\")")
TPU = ("--name", "a", "--zone", "us-east5-b", "--type", "v6e-16")
CASES = {
    "gpu": ("gpu.sh", *TRAIN),
    "gpu_devices": ("gpu.sh", "--devices", "0,3", "--", "sample", "--prompt", "a fox"),
    "tpu_vm": ("tpu_vm.sh", *TPU, *TRAIN),
    "tpu_vm_options": (
        "tpu_vm.sh", *TPU, "--spot", "--project", "p", "--python", "python3.12", "--setup",
        "sudo apt-get install -y python3.12-venv && cp -r /mnt/models .", *TRAIN,
    ),
    "xpk": ("xpk.sh", "--cluster", "c", *TPU, *TRAIN),
    "xpk_options": ("xpk.sh", "--cluster", "c", *TPU, "--slices", "2", "--project", "p",
                    "--image", "i", "--restarts", "0", *TRAIN),
    "slurm": ("slurm.sbatch", *TRAIN),
    "gpu_bench": ("gpu_bench.sh", "--vendor", "/tmp/vendor", "--", "--sides", "512", "--updates",
                  "20"),
    "gpu_bench_pack": ("gpu_bench.sh", "--python", "python3.12", "--pack", "vendor"),
}


def start(script, *args, folder=ROOT, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *args], cwd=folder, env=kept | env, text=True,
        capture_output=True, check=False, timeout=1800,
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize(
    "script", sorted(p.name for p in (ROOT / "launch").iterdir()), ids=lambda s: s
)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run(["shellcheck", "-x", f"launch/{script}"], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_exactly_these_commands(name, tmp_path):
    script, *args = CASES[name]
    done = start(script, "--dry-run", *args, folder=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    golden = GOLDENS / f"{name}.txt"
    if os.environ.get("DOPSD_WRITE_GOLDENS"):
        golden.write_text(done.stdout)
    assert done.stdout == golden.read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name, words in CASES.items() if "--" in words])
def test_arguments_arrive_as_they_were_given(name):
    """What a machine's shell makes of the printed line is what came after --."""
    given = list(CASES[name][CASES[name].index("--") + 1 :])
    words = shlex.split((GOLDENS / f"{name}.txt").read_text().splitlines()[-1])
    if name.startswith(("tpu_vm", "xpk")):
        words = shlex.split(words[-1])
    assert words[-len(given):] == given


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(script, tmp_path):
    done = start(script, "--help", folder=tmp_path)
    assert done.returncode == 0 and "--dry-run" in done.stdout and "set -e" not in done.stdout
    spec = (ROOT / "launch" / script).read_text().split("\nparse ")[1].split('"$@"')[0]
    for word in shlex.split(spec.replace("\\\n", " "))[-1].split():
        assert f"--{word.rstrip('!:').split('=')[0]}" in done.stdout


@pytest.mark.parametrize("script,args,message", [
    ("gpu.sh", ("--device", "0", *TRAIN), "unknown option --device; see launch/gpu.sh --help"),
    ("gpu.sh", ("train",), "unknown option train; "),
    ("gpu.sh", ("--devices", "--dry-run", *TRAIN), "--devices needs a value"),
    ("gpu.sh", ("--devices", "a", *TRAIN), "--devices: expected 0 or 0,1,.., got a"),
    ("gpu.sh", (), "give a dopsd_jax command after --, such as -- train --config .."),
    ("gpu.sh", ("--",), "give a dopsd_jax command after --"),
    ("gpu.sh", ("--", "trian"), "no such command: trian; there is: "),
    ("gpu.sh", ("--", "loop"), "no such command: loop; there is: "),
    ("gpu.sh", ("--", "../train"), "no such command: ../train"),
    ("tpu_vm.sh", TRAIN, "needed: --name --zone --type; see launch/tpu_vm.sh --help"),
    ("tpu_vm.sh", (*TPU[:5], "v9-8", *TRAIN), "--type v9-8: its software is not known here"),
    ("xpk.sh", (*TPU, *TRAIN), "needed: --cluster; "),
    ("xpk.sh", ("--cluster", "c", *TPU, "--slices", "0", *TRAIN),
     "--slices: expected a number from 1, got 0"),
    ("xpk.sh", ("--cluster", "c", *TPU, "--name", "A_b", *TRAIN), "--name: expected up to 39 of "),
    ("slurm.sbatch", ("--port", "x", *TRAIN), "--port: expected a number, got x"),
    ("slurm.sbatch", TRAIN, "not under Slurm; start it with sbatch launch/slurm.sbatch"),
])
def test_bad_arguments_get_a_plain_message(script, args, message):
    done = start(script, *args)
    assert done.returncode == 1 and not done.stdout, done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


FAKE = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in
  *describe*) read -r now < "$STATES" && [ "$now" != NONE ] && echo "$now"; sed -i 1d "$STATES"
    [ "$now" != NONE ] ;;
esac
"""


@pytest.mark.parametrize("states,calls", [
    ("NONE PROVISIONING ACTIVE", "describe create describe describe scp ssh"),
    ("ACTIVE", "describe scp ssh"),
    ("WAITING_FOR_RESOURCES ACTIVE", "describe describe scp ssh"),
    ("SUSPENDED PROVISIONING ACTIVE", "describe delete create describe describe scp ssh"),
])
def test_a_queued_resource_is_made_waited_for_or_taken_as_it_is(tmp_path, states, calls):
    (tmp_path / "gcloud").write_text(FAKE)
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
    done = start("tpu_vm.sh", *TPU, *TRAIN, PATH=f"{tmp_path}:{os.environ['PATH']}",
                 LOG=str(tmp_path / "log"), STATES=str(tmp_path / "states"), DOPSD_POLL="0")
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").read_text().splitlines()
    verbs = [next(w for w in line.split() if w in calls.split()) for line in log]
    assert " ".join(verbs) == calls
    assert "--worker=all" in log[-1] and "dopsd_jax && env PYTHON=python3 bash " in log[-1]


def test_slurm_starts_one_process_per_node_after_one_setup(tmp_path):
    for name in ("srun", "scontrol", "bash"):
        (tmp_path / name).write_text(
            '#!/bin/bash\n[[ "$1" == */slurm.sbatch ]] && exec /bin/bash "$@"\n'
            'echo "$(basename "$0") $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $*" >> "$LOG"\n'
            '[ "$1" != show ] || echo node7\n'
        )
        (tmp_path / name).chmod(0o755)
    spool = tmp_path / "spool" / "slurm.sbatch"  # Slurm runs a copy
    spool.parent.mkdir()
    shutil.copy(ROOT / "launch" / "slurm.sbatch", spool)
    done = subprocess.run(
        ["/bin/bash", spool, *TRAIN], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", LOG=str(tmp_path / "log"),
                 SLURM_JOB_ID="1", SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_NUM_NODES="2",
                 SLURM_SUBMIT_DIR=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr
    scontrol, setup, srun = (tmp_path / "log").read_text().splitlines()
    assert scontrol == "scontrol   show hostnames node[7-8]"
    assert "source launch/setup.sh cuda" in setup
    assert srun.startswith("srun node7:12321 2 --ntasks-per-node=1 ") and "run train" in srun
