"""The Dockerfile and the SLURM script of docs/cluster, as far as they can be tried without either."""

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "cluster"
SCRIPT = FOLDER / "train.slurm"
SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
tasks = int(os.environ["SLURM_NTASKS"])
processes = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(tasks)
]
open("tasks", "w").write(" ".join(str(process.pid) for process in processes))
codes = [process.wait() for process in processes]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> scontrol; fi
"""
PYTHON = """#!/bin/sh
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" >> python
exit $STATUS
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with ``srun`` and ``scontrol``, and the variables of a job of two processes."""
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "srun", SRUN.format(python=sys.executable))
    executable(tmp_path / "bin" / "scontrol", SCONTROL)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = {"JOB_NAME": "shike", "JOB_ID": str(os.getpid()), "JOB_NODELIST": "localhost", "NTASKS": "2"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path


def requeued(cluster):
    file = cluster / "scontrol"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("status", [0, 1, 2, 137, 143])
def test_only_a_stopped_run_comes_back(cluster, programs, monkeypatch, status):
    executable(cluster / "bin" / "python", PYTHON)
    monkeypatch.setenv("STATUS", str(status))
    done = programs.run([SCRIPT, "--dataset", "of mine"], cwd=cluster)
    job = os.getpid()
    assert done.returncode == status, done.stderr
    assert requeued(cluster) == ([f"requeue {job}"] if status == 143 else [])
    arguments = f"-m shike_fast.train --dataset of mine --output-dir runs/shike-{job} --resume auto"
    lines = sorted((cluster / "python").read_text().splitlines())
    assert lines == [f"{rank} {rank} 2 127.0.0.1 {arguments}" for rank in (0, 1)]


def test_a_cancelled_job_does_not_come_back(cluster, programs, monkeypatch):
    """scancel signals the script and the processes."""
    executable(cluster / "bin" / "python", "#!/bin/sh\ntouch began\nsleep 1\nexit 143\n")
    process = programs.start([SCRIPT], cwd=cluster, stdout=subprocess.DEVNULL)
    programs.wait_until(lambda: (cluster / "began").exists(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143 and requeued(cluster) == []


@pytest.mark.slow
def test_a_run_over_two_jobs(cluster, programs, monkeypatch):
    """SIGTERM to the processes, as --signal sends it; the next start of the same job finishes the run."""
    monkeypatch.setenv("RUN_DIR", "run")
    executable(cluster / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support"))
    settings = ["--model", "resnet8", "--batch-size", "64", "--epochs", "40", "--stage2-epochs", "1", "--device", "cpu"]
    command = [SCRIPT, *settings, "--plugin", "torchvision_operators"]
    process = programs.start(command, cwd=cluster)
    metrics = cluster / "run" / "metrics.jsonl"
    programs.wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2, process)
    for number in (cluster / "tasks").read_text().split():
        os.kill(int(number), signal.SIGTERM)
    assert process.wait() == 143 and requeued(cluster) == [f"requeue {os.getpid()}"]
    done = torch.load(cluster / "run" / "last.pt", weights_only=True)["epoch"]
    assert 2 <= done < 40
    again = programs.run(command, cwd=cluster)
    assert again.returncode == 0, again.stderr
    assert f"going on after epoch {done}" in again.stdout and metrics.read_bytes().count(b"\n") == 40
    assert len(requeued(cluster)) == 1


def test_the_scripts_options():
    text = SCRIPT.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    assert {"requeue": "", "signal": "TERM@120", "open-mode": "append"}.items() <= options.items()
    body = [line for line in text.splitlines() if line and not line.startswith("#")]
    first = text.index(body[0])
    assert "#SBATCH" not in text[first:]  # SLURM reads none behind the first command
    assert os.access(SCRIPT, os.X_OK)


def test_the_image_is_made_of_what_is_there():
    lines = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text()).splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    sources = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
    assert {"pyproject.toml", "csrc", "kernels", "shike_fast"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
    words = [name for name, _ in steps]
    assert words.count("FROM") == 2 and [rest for name, rest in steps if name == "USER"] == ["shike"]
    last_root = max(i for i, name in enumerate(words) if name == "RUN")
    assert words.index("USER") > last_root
