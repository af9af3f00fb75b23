"""The Slurm script of the documentation: the job that it would submit is run here as Slurm would run it."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from kvjax.units.cluster import Cluster
from kvjax.units.unit import Unit
from tests.helpers import units
from tests.helpers.clusters import ONE_DEVICE

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "slurm_cluster.py"


@pytest.fixture
def documented():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("slurm_cluster", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_job_of_several_workers(documented):
    """A job asks for its cores, memory and time, and starts one worker of one thread for each core."""
    with documented.open_workers(queue="cpu", account="my-group", scheduler_options={"dashboard_address": None}) as one:
        job = one.job_script()
    for line in ("#SBATCH -p cpu", "#SBATCH -A my-group", "#SBATCH --cpus-per-task=4", "#SBATCH -t 04:00:00"):
        assert line in job.splitlines()
    assert re.search(r"#SBATCH --mem=1\dG", job)
    worker = job.splitlines()[-1]
    assert "--nthreads 1" in worker and "--nworkers 4" in worker and "--lifetime=220m" in worker


def test_job_runs_units(documented, tmp_path):
    """Without Slurm the job's script starts a worker all the same, whose environment is the script's."""
    with documented.open_workers(processes=1, scheduler_options={"dashboard_address": None}) as one:
        job = tmp_path / "job.sh"
        job.write_text(one.job_script())
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = subprocess.Popen(["bash", job], env=ONE_DEVICE, cwd=tmp_path, start_new_session=True, **streams)
        try:
            asked = ("JAX_NUM_CPU_DEVICES", "NPROC")
            given = [Unit("look", name, units.environment, (name,)) for name in asked]
            assert Cluster(one.scheduler_address).run(given, lambda done: None) == ["1", "1"]
        finally:
            os.killpg(running.pid, signal.SIGTERM)  # bash and its workers
            running.wait()
