"""TPU chips and their topologies, described without one being there.

Sources: Google Cloud's TPU documentation (peak FLOPs in bfloat16, HBM bandwidth); bandwidth of the
links between chips: Austin et al., How to Scale Your Model (jax-ml.github.io/scaling-book), table
of TPU specs. How much HBM a program may use is what the compiler says when one is too large
(libtpu 0.0.42.1). Clocks follow from peak FLOPs and the number of multiply units. The share of the
peak that a product reaches is what that libtpu rates [24576, 14336] x [14336, 4096] at in bfloat16,
one of a language model's (tests/train/test_estimate.py).
"""

import dataclasses
import importlib.metadata
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from gptlab.run.errors import UserError
from gptlab.train.log import PEAK_FLOPS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at best."""

    name: str
    flops: float  # bfloat16, a second
    hbm_bytes: float  # that a program may use
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second, one way, one link of the interconnect
    clock: float  # cycles a second
    kernel_share: float  # of the peak that hand-written kernels are assumed to reach
    # Of the peak that a large product reaches, as the compiler rates it; plans made before this was
    # known (340e844 to 8f7b8a2) have 1.
    product_share: float = 1.0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", PEAK_FLOPS["TPU v4"], 30.75 * GIB, 1.2e12, 4.5e10, 1.05e9, 0.5, 0.965),
        Chip("v5e", PEAK_FLOPS["TPU v5 lite"], 15.75 * GIB, 8.1e11, 4.5e10, 1.50e9, 0.5, 0.976),
        Chip("v5p", PEAK_FLOPS["TPU v5p"], 95.74 * GIB, 2.8e12, 9e10, 1.75e9, 0.5, 0.937),
        Chip("v6e", PEAK_FLOPS["TPU v6 lite"], 31.25 * GIB, 1.6e12, 9e10, 1.75e9, 0.35, 0.762),
    )
}


def describe(topology: str) -> tuple[Chip, Sequence[Any]]:
    """The chip and the devices of a topology like 'v5e:4x4', by libtpu alone.

    Raises:
      UserError: the name is unknown, or libtpu is not installed.
    """
    match = re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", topology)
    if match is None or match.group(1) not in CHIPS:
        raise UserError(
            f"--topology={topology!r} is not CHIP:AxB or CHIP:AxBxC with a chip of {list(CHIPS)}, "
            "like v5e:4x4 or v5p:4x4x8 (128 chips; Google's product v5p-128 has 64)"
        )
    if libtpu_version() is None:
        raise UserError(
            "--topology needs libtpu: pip install -c constraints.txt -e '.[tpu]' in an environment "
            "of its own, or --devices=cpu:8 for this machine"
        )
    # libtpu asks the machine it runs on what it is, unless it is told. No such machine is used.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if match.group(1) == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--topology={topology}: libtpu knows no such topology ({reason})"
        ) from error
    return CHIPS[match.group(1)], found.devices


def local(devices: str) -> Sequence[Any]:
    """The devices of --devices=cpu:N: virtual ones of this machine.

    Raises:
      UserError: it is no such name, or JAX runs on fewer of them.
    """
    count, found = _count(devices), jax.devices("cpu")
    if len(found) < count:
        raise UserError(f"--devices={devices}: JAX runs on {len(found)} already; unset XLA_FLAGS")
    return found[:count]


def divide(devices: str) -> None:
    """Makes this machine as many virtual devices as asked for, before JAX starts."""
    jax.config.update("jax_num_cpu_devices", _count(devices))


def _count(devices: str) -> int:
    match = re.fullmatch(r"cpu:([1-9]\d*)", devices)
    if match is None:
        raise UserError(f"--devices={devices!r} is not cpu:N, like cpu:8")
    return int(match.group(1))


def compiler() -> str | None:
    """libtpu's version and, where the environment sets them, its flags: what a plan depends on."""
    version, given = libtpu_version(), os.environ.get("LIBTPU_INIT_ARGS", "").strip()
    return f"{version} with {given}" if version and given else version


def libtpu_version() -> str | None:
    """The version of the installed libtpu, or None."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None
