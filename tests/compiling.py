"""How tests have XLA compile: quickly. Most of their time is the compiler's."""

import os

# What makes programs fast is left out: tests run each of them a few times.
FLAGS = {
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}


def environment(**extra: str) -> dict[str, str]:
    """This process's variables for a program with one device, instead of the 8 of this one."""
    flags = " ".join(f"{flag}={value}" for flag, value in FLAGS.items())
    return {**os.environ, "XLA_FLAGS": flags, **extra}
