"""What it costs that processes train together: the same work for each, with and without talking.

    python -m benchmarks.weak_scaling

About two minutes on two idle cores. Each process has one core to itself and `--batch_size` rows of
its own. Three ways to run the step of gptlab.pretrain take turns: one process alone; two that know
nothing of each other, which shows what sharing the machine costs; two as one run over loopback,
`--axis` of their mesh being 2, whose difference from the second is communication. Prints a table
(milliseconds a step: medians with quartiles), then the same as one line of JSON.
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from benchmarks import measure
from configs import common
from configs import pretrain as pretrain_config
from gptlab import pretrain
from gptlab.data.batches import TokenBatch
from gptlab.model import transformer
from gptlab.run import processes
from gptlab.train import mesh as mesh_lib
from gptlab.train import optimizer
from gptlab.train import state as state_lib

WARM_UP = 2


def main() -> None:
    """Runs the processes in turns and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--axis", default="data", choices=("data", "fsdp", "tensor"))
    parser.add_argument("--batch_size", type=int, default=16, help="rows of each process")
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="of each process and turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help="be one of the processes")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args)), flush=True)
        processes.leave(0)
        return
    ways = {"one": (1, False), "two_apart": (2, False), "two_together": (2, True)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, (count, together) in ways.items():
            times[name] += run(count, together)
    median = {name: float(np.median(values)) for name, values in times.items()}
    figures: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "shape": {key: getattr(args, key) for key in ("preset", "axis", "batch_size", "seq_len")},
        "step_ms": {name: measure.spread(np.array(values)) for name, values in times.items()},
        "sharing_overhead": round(median["two_apart"] / median["one"] - 1, 3),
        "communication_overhead": round(median["two_together"] / median["two_apart"] - 1, 3),
        "weak_scaling_efficiency": round(median["one"] / median["two_together"], 3),
    }
    print("\n".join(measure.table(figures)))
    print(json.dumps(figures))


def run(count: int, together: bool) -> list[float]:
    """Milliseconds of every step of `count` workers at once, each on a core of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    cores = sorted(os.sched_getaffinity(0))
    started = []
    for number in range(count):
        joined = {
            "GPTLAB_COORDINATOR": address,
            "GPTLAB_NUM_PROCESSES": str(count),
            "GPTLAB_PROCESS_ID": str(number),
        }
        environment = {**os.environ, "XLA_FLAGS": "", **(joined if together else {})}
        environment["GPTLAB_BENCHMARK_CORE"] = str(cores[number % len(cores)])
        command = [sys.executable, "-m", "benchmarks.weak_scaling", "--worker", *sys.argv[1:]]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a worker failed; what it said stands above")
    return [ms for output in outputs for ms in json.loads(output.splitlines()[-1])]


def worker(args: argparse.Namespace) -> list[float]:
    """One process's milliseconds a step, the first few left out."""
    # Before JAX starts its threads, which stay where they were started.
    os.sched_setaffinity(0, {int(os.environ["GPTLAB_BENCHMARK_CORE"])})
    processes.initialize("weak_scaling")
    config = step_config(args)
    config.mesh = common.mesh(**{"fsdp": 1, args.axis: jax.process_count()})
    mesh = mesh_lib.make_mesh(config.mesh)
    # Tensor-parallel processes share their rows: the same work for each is twice the rows.
    config.batch_size = args.batch_size * jax.process_count()
    with jax.set_mesh(mesh):
        step, state, batch = make_step(config, mesh)
        key, times = jax.random.key(1), []
        for _ in range(WARM_UP + args.steps):

            def once() -> Any:
                nonlocal state
                state, metrics = step(state, batch, key)
                return metrics

            times.append(1e3 * measure.seconds(once))
    return times[WARM_UP:]


def step_config(args: argparse.Namespace) -> ConfigDict:
    """A pretraining config of the shape that the flags ask for."""
    config = pretrain_config.get_config()
    config.model = common.model(args.preset)
    config.compute = common.compute(unroll=4)
    config.data.seq_len = args.seq_len
    config.optimizer = common.adamw(1e-3, warmup_steps=1)
    return config


def make_step(config: ConfigDict, mesh: Mesh) -> tuple[Any, Any, Any]:
    """(the jitted step as gptlab.pretrain makes it, its state, this process's rows on the mesh)."""
    model_config = transformer.ModelConfig.build(config.model.to_dict(), config.compute.to_dict())
    model = transformer.LanguageModel(model_config)
    tx, schedule = optimizer.make_optimizer(config.optimizer, config.total_steps)
    state, shardings = state_lib.init_state(
        functools.partial(transformer.init_params, model), tx, mesh, jax.random.key(0)
    )
    step = jax.jit(
        pretrain.make_train_step(pretrain.make_loss_fn(model, 0.0), tx, schedule, config),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    _, blocks = mesh_lib.process_block(mesh)
    shape = config.batch_size // blocks, config.data.seq_len
    rng = np.random.default_rng(jax.process_index() if blocks > 1 else 0)
    tokens, targets = rng.integers(0, model_config.vocab_size, (2, *shape)).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    batch = TokenBatch(tokens, targets, ones.astype(np.float32), ones, positions)
    return step, state, mesh_lib.put_batch(batch, mesh)


if __name__ == "__main__":
    main()
