"""Every test runs on 8 virtual CPU devices, with implicit rank promotion forbidden."""

import gc
import importlib.util
import os
from pathlib import Path

from tests import compiling

# Before the first import of jax: it reads these once. Programs started by tests inherit them.
# Eight devices on two busy cores may wait for each other longer than the 40 s after which XLA
# takes a collective for stuck.
for flag, value in {
    "--xla_force_host_platform_device_count": "8",
    "--xla_cpu_collective_call_terminate_timeout_seconds": "300",
    **compiling.FLAGS,
}.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("GPTLAB_CACHE", str(Path.home() / ".cache" / "gptlab" / "tests"))

import jax  # noqa: E402

from gptlab.run import program  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
program.enable_compilation_cache()

# Fixtures that several folders share.
if importlib.util.find_spec("tests.fixtures") is not None:
    pytest_plugins = ["tests.fixtures", "tests.databases"]


def pytest_collection_finish():
    """What is imported by now stays: a collection need not look through it again.

    Rounds collect after every stage, JAX's tracing allocates much: half of the time of some tests.
    """
    gc.collect()
    gc.freeze()
