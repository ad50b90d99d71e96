"""Which of several cooperating processes this is. One process is the ordinary case.

Several processes (one per TPU host, or a few on one machine in tests) run the same program on the
same config. They share a workdir, in which only process 0 writes, Orbax's checkpoints excepted.
"""

import os

import jax

from gptlab.run.errors import UserError

# Of the process, not of one run: `rounds` opens several, and the service wants rising numbers.
_stop_polls = 0
_stop_reached = False

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


def stop_reached() -> bool:
    """Whether some process got SIGTERM and this is the step at which all of them are to stop.

    Every process must call this equally often, once per step. It costs nothing until a signal
    arrives: JAX's coordination service then fixes a step that no process has passed.
    """
    global _stop_polls, _stop_reached
    if not _stop_reached:
        from jax.experimental import multihost_utils

        _stop_polls += 1
        _stop_reached = multihost_utils.reached_preemption_sync_point(_stop_polls)
    return _stop_reached
