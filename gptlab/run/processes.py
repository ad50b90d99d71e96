"""Which of several cooperating processes this is. One process is the ordinary case.

Several processes (one per TPU host, or a few on one machine in tests) run the same program on the
same config. They share a workdir, in which only process 0 writes, Orbax's checkpoints excepted.
"""

import os

import jax
import numpy as np

from gptlab.run.errors import UserError

_VARIABLES = ("GPTLAB_COORDINATOR", "GPTLAB_NUM_PROCESSES", "GPTLAB_PROCESS_ID")


def initialize() -> None:
    """Joins the other processes if the environment asks for it; otherwise does nothing.

    GPTLAB_COORDINATOR=host:port with GPTLAB_NUM_PROCESSES and GPTLAB_PROCESS_ID names everything;
    GPTLAB_COORDINATOR=auto lets JAX find it out from the cluster (TPU pods, Slurm, Open MPI).
    """
    coordinator = os.environ.get("GPTLAB_COORDINATOR")
    if not coordinator:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # only CPUs look at this
    if coordinator == "auto":
        jax.distributed.initialize()
        return
    try:
        num_processes, process_id = (int(os.environ[name]) for name in _VARIABLES[1:])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"GPTLAB_COORDINATOR={coordinator} needs whole numbers in {_VARIABLES[1]} and "
            f"{_VARIABLES[2]} ({error}); set both, or set GPTLAB_COORDINATOR=auto on a TPU pod"
        ) from error
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"GPTLAB_PROCESS_ID={process_id} must lie in [0, {num_processes}), "
            f"where {num_processes} is GPTLAB_NUM_PROCESSES"
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)


def index() -> int:
    """This process's number. Does not start a JAX backend in a single-process program."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes artifacts, prints progress and so on."""
    return index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here. `name` must be the same in all of them."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in at least one process; every process must call it."""
    if count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
