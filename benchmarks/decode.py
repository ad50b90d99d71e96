"""Tokens per second of cached decoding: the whole of `generate`, its prefill and one step.

    python -m benchmarks.decode [--preset=quickstart] [--batch=64] [--prompt=64] [--new=32]

Prints a line per way of sampling, with the share of the sgemm peak measured in the same run. Takes
about a minute on two idle cores; on busy ones the figures say little.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptlab.model import decode
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params

COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
SAMPLINGS = {"plain": (1.0, 0, 1.0), "greedy": (0.0, 0, 1.0), "top-k, top-p": (1.0, 40, 0.95)}


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The best of some runs, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="quickstart", choices=sorted(PRESETS))
    for name, value in (("batch", 64), ("prompt", 64), ("new", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    square = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(jnp.matmul)
    peak = 2 * 1024**3 / seconds(lambda: product(square, square))
    print(f"sgemm peak {peak / 1e9:.0f} GFLOP/s")

    model = LanguageModel(ModelConfig.build(PRESETS[args.preset], COMPUTE))
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    vocab = model.config.vocab_size
    prompts = jax.random.randint(jax.random.key(1), (args.batch, args.prompt), 0, vocab)
    lengths = jnp.full((args.batch,), args.prompt, jnp.int32)
    keys = jax.random.split(jax.random.key(2), args.batch)
    for name, (temperature, top_k, top_p) in SAMPLINGS.items():
        sampling = decode.Sampling(temperature, top_k, top_p, args.new, ())
        first = dataclasses.replace(sampling, max_new_tokens=1)

        def run(sampling: decode.Sampling) -> decode.Generation:
            return decode.generate(model, params, prompts, lengths, keys, sampling)

        whole, prefill = (seconds(lambda s=s: run(s)) for s in (sampling, first))  # type: ignore[misc]
        step = (whole - prefill) / max(args.new - 1, 1)
        flops = 2 * model.config.num_params() * args.batch * (args.prompt + args.new)
        print(
            f"{name:13} {args.batch * args.new / whole:8.0f} tokens/s   prefill "
            f"{prefill * 1e3:7.1f} ms   step {step * 1e3:6.2f} ms  {flops / whole / peak:.0%} peak"
        )


if __name__ == "__main__":
    main()
