"""Runs a kvjax command on Slurm: asks for jobs with workers, runs the command on them, and gives the jobs back.

python docs/slurm_cluster.py checkpoint-sweep --run_dirs='runs/*' --benchmark_dir=data/benchmark

Start it where it may stay for hours, such as in a small job of its own. Set partition, account and sizes for your site;
`print(open_workers().job_script())` shows a job.
"""

import subprocess
import sys

import dask
from dask_jobqueue import SLURMCluster

JOBS = 8
ENVIRONMENT = [
    "export JAX_NUM_CPU_DEVICES=1 NPROC=1",  # else XLA starts a thread for every core of the node
    "export KVJAX_CACHE_DIR=$HOME/.cache/kvjax/$SLURM_JOB_PARTITION",  # compiled programs differ between kinds of CPU
]


def open_workers(processes=4, **site):
    """Opens a scheduler in this process, to which jobs of so many workers connect; each has one core and 4 GB."""
    # A run waits at the scheduler, not behind another on a worker, whose death would count against both.
    dask.config.set({"distributed.scheduler.worker-saturation": 1.0})
    return SLURMCluster(
        cores=processes,
        processes=processes,  # else Dask makes few workers of many threads
        memory=f"{4 * processes}GB",
        walltime="04:00:00",  # else 30 minutes
        # Ends workers before Slurm does: what they had not ended runs again on others, and nothing counts as a death.
        worker_extra_args=["--lifetime=220m", "--lifetime-stagger=10m"],
        job_script_prologue=ENVIRONMENT,
        **site,
    )


if __name__ == "__main__":
    with open_workers(queue="cpu", account="my-group") as workers:
        workers.scale(jobs=JOBS)
        command = ["kvjax", *sys.argv[1:], f"--scheduler={workers.scheduler_address}"]
        sys.exit(subprocess.run(command).returncode)
