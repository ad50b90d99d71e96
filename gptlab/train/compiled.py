"""A function compiled for devices that may not be there: its memory, products and traffic."""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptlab.run.errors import UserError
from gptlab.train import estimate, hlo, repeated
from gptlab.train.chips import GIB, Chip
from gptlab.train.estimate import Seconds


@dataclasses.dataclass(frozen=True)
class Phase:
    """One compiled function of a step; of one chip, where nothing else is said."""

    name: str
    calls: int  # in a step
    peak_bytes: int  # at once, of what this function holds: arguments, results and temporaries
    argument_bytes: int
    beside_bytes: int  # of what it does not read and what stays there all the same
    exhausted: str  # what the compiler ran out of; '' if it found room
    flops: int  # of products of matrices in a call, all chips, as parsed from the program
    counted_flops: int  # the same, counted from the architecture
    kernel_flops: int  # beside these, inside of kernels, where nothing can be parsed; counted too
    hbm_bytes: int
    sent_bytes: dict[str, int]  # by kind of collective
    seconds: Seconds | None  # None where nothing is known of the device
    compile_seconds: float
    repeated_flops: int = 0  # of `flops`, what the compiler computes again rather than keep it

    @property
    def as_counted(self) -> bool:
        """Whether the program multiplies what was counted and, repetitions apart, no more."""
        return self.flops - self.repeated_flops == self.counted_flops

    @property
    def needed_bytes(self) -> int:
        """All that has to be there at once while it runs."""
        return self.peak_bytes + self.beside_bytes

    @property
    def intensity(self) -> float:
        """FLOPs of products for each byte of HBM traffic, on one chip."""
        return self.flops / max(1, self.hbm_bytes)


def key_on(mesh: Mesh) -> Any:
    """An abstract key of random numbers."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct((), key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def ints(*shape: int) -> Any:
    """Abstract int32."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int) -> Any:
    """Abstract float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def measure(
    name: str,
    jitted: Any,
    args: tuple[Any, ...],
    *,
    chip: Chip | None,
    counted_flops: int,
    beside_bytes: int,
    kernel_flops: int = 0,
    calls: int = 1,
) -> tuple[Phase, Any]:
    """Compiles `jitted` for abstract arguments; nothing is run.

    Args:
      name: of the phase.
      jitted: what the program itself calls.
      args: pytrees of ShapeDtypeStructs with shardings.
      chip: what it is estimated for; None for this machine.
      counted_flops: of a call, counted from the architecture.
      beside_bytes: on each chip, held by what is not an argument.
      kernel_flops: of a call, of kernels that don't tell them; all chips.
      calls: in a step.

    Returns:
      (figures, abstract results with the shardings that the compiler gave them; None where it ran
      out of memory).

    Raises:
      UserError: a kernel does not fit the chip's own memory.
    """
    started = time.monotonic()
    lowered = jitted.lower(*args)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, text = exhausted(error, per_device(args))
        phase = Phase(
            name, calls, used, per_device(args), beside_bytes, text, 0, counted_flops, kernel_flops,
            0, {}, None, time.monotonic() - started,
        )  # fmt: skip
        return phase, None
    program = hlo.Program(compiled.as_text())
    memory = compiled.memory_analysis()
    devices = next(x.sharding.num_devices for x in jax.tree.leaves(args))
    # The peak that the CPU backend reports leaves temporaries out.
    together = memory.argument_size_in_bytes + memory.output_size_in_bytes
    together += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    phase = Phase(
        name=name,
        calls=calls,
        peak_bytes=memory.peak_memory_in_bytes if chip else together,
        argument_bytes=memory.argument_size_in_bytes,
        beside_bytes=beside_bytes,
        exhausted="",
        flops=program.flops * devices,
        counted_flops=counted_flops,
        kernel_flops=kernel_flops,
        hbm_bytes=estimate.hbm_bytes(program) * devices,
        sent_bytes=program.bytes_sent(),
        seconds=estimate.seconds(program, chip, kernel_flops // devices) if chip else None,
        compile_seconds=time.monotonic() - started,
        repeated_flops=repeated.repeated_flops(program) * devices,
    )
    results = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        compiled.output_shardings,
    )
    return phase, results


def exhausted(error: Exception, argument_bytes: int) -> tuple[int, str]:
    """(bytes of HBM that the program would need, one line) of a compile that ran out of memory.

    What the compiler tells is all of it or, where it gave up early, its temporaries alone.
    """
    text = str(error)
    match = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) (\w+)", text)
    early = re.search(
        r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)(\w)\)", text
    )
    if "RESOURCE_EXHAUSTED" not in text or not (match or early):
        raise error
    used, unit, limit, limit_unit = (match or early).groups()[:4]  # type: ignore[union-attr]
    space = match[5] if match else "HBM for temporaries alone"
    line = f"the compiler needs {used} {unit}iB of {limit} {limit_unit}iB of {space}"
    if match and space.lower() != "hbm":
        raise UserError(f"{line}: a kernel's blocks are too large for this chip")
    scale = {"K": GIB >> 20, "M": GIB >> 10, "G": GIB, "T": GIB << 10}[unit]
    return round(float(used) * scale) + (0 if match else argument_bytes), line


def per_device(tree: Any) -> int:
    """Bytes of a pytree of sharded (abstract) arrays that lie on one device."""

    def size(x: Any) -> int:
        sharding: NamedSharding = x.sharding
        itemsize = jax.dtypes.prng_key if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else 0
        count = 1
        for length in sharding.shard_shape(x.shape):
            count *= length
        return count * (8 if itemsize else x.dtype.itemsize)

    return sum(size(x) for x in jax.tree.leaves(tree))
