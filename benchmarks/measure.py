"""How the benchmarks measure: repetitions that take turns, peaks, compiles, memory, a table.

Other work on the machine slows everything for seconds at a time. What is to be compared is
therefore run in turns, and reported as the median with the quartiles beside it.
"""

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, its arrays included."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each run in each round [rounds], after one call of each that is not measured."""
    for run in runs.values():
        seconds(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: np.array(values) for name, values in times.items()}


def spread(values: np.ndarray, digits: int = 2) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {
        "median": round(float(median), digits),
        "q25": round(float(low), digits),
        "q75": round(float(high), digits),
    }


def square_product(dtype: str, size: int = 1024) -> tuple[Callable[[], jax.Array], int]:
    """(a product of two square matrices, its FLOPs): the peak is its fastest repetition."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(x, x), 2 * size**3


class CompileCounter:
    """Counts what XLA compiles, or reads compiled from the cache, from now on."""

    def __init__(self) -> None:
        """Starts counting."""
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def compile_timed(jitted: Any, *args: Any) -> tuple[Any, dict[str, float]]:
    """(the compiled function, seconds to trace and compile it and the memory that it asks for)."""
    start = time.perf_counter()
    lowered = jitted.lower(*args)
    middle = time.perf_counter()
    compiled = lowered.compile()
    figures = {
        "trace_s": round(middle - start, 2),
        "compile_s": round(time.perf_counter() - middle, 2),
    }
    memory = compiled.memory_analysis()
    for name in ("argument", "output", "alias", "temp"):
        figures[f"{name}_mib"] = mib(getattr(memory, f"{name}_size_in_bytes"))
    return compiled, figures


def mib(size: float) -> float:
    """Bytes -> MiB."""
    return round(size / 2**20, 1)


def peak_rss_mib() -> float:
    """The most memory that this process has had so far."""
    return mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def table(figures: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line a figure, nested names joined by dots, spreads on one line."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, Mapping) and set(value) == {"median", "q25", "q75"}:
            value = f"{value['median']:g}  ({value['q25']:g} to {value['q75']:g})"
        if isinstance(value, Mapping):
            lines += table(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix + name:44} {value}")
    return lines
