"""Cached decoding: its prefill, its steps, and what recomputing without a cache would take.

    python -m benchmarks.decode [--preset=quickstart] [--batches=1,8,64] [--prompt=64] [--new=32]

Two to three minutes on two idle cores. For each batch size, in turns with one another and with
products of square matrices in one process: prefill, one decode step, a reply of `new` tokens by the
jitted loop that rollouts use, plain, greedy and with top-k and top-p, and one token by a forward
pass over the whole window, which is what each token costs without a cache. Prints a table, then the
same figures as one line of JSON; medians with quartiles.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from gptlab.model import decode
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.run import program

COMPUTE = {"remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
SAMPLINGS = {"plain": (1.0, 0, 1.0), "greedy": (0.0, 0, 1.0), "top_k_top_p": (1.0, 40, 0.95)}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="quickstart", choices=sorted(PRESETS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", default="1,8,64", help="batch sizes, with commas")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9, help="turns that everything gets")
    args = parser.parse_args()
    program.keep_freed_memory()
    if args.new < 2:
        parser.error("--new must be at least 2: a step's time is a difference of two replies")
    model = LanguageModel(ModelConfig.build(PRESETS[args.preset], {**COMPUTE, "dtype": args.dtype}))
    params = jax.jit(lambda key: nn.unbox(init_params(model, key)))(jax.random.key(0))
    figures: dict[str, Any] = {
        "jax": jax.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "shape": {key: getattr(args, key) for key in ("preset", "dtype", "prompt", "new")},
    }
    for batch in map(int, args.batches.split(",")):
        figures[f"batch_{batch}"] = one_batch(model, params, batch, args)
    figures["peak_rss_mib"] = measure.peak_rss_mib()
    print("\n".join(measure.table(figures)))
    print(json.dumps(figures))


def one_batch(
    model: LanguageModel, params: Any, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything at one batch size."""
    whole = args.prompt + args.new
    vocab = model.config.vocab_size
    prompts = jax.random.randint(jax.random.key(1), (batch, args.prompt), 0, vocab)
    lengths = jnp.full((batch,), args.prompt, jnp.int32)
    keys = jax.random.split(jax.random.key(2), batch)
    figures: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {}
    runs["product"], flops = measure.square_product(args.dtype)

    def read(params: Any, prompts: jax.Array, lengths: jax.Array) -> Any:
        return decode.prefill(model, params, prompts, lengths, whole)

    prefill, figures["prefill"] = measure.compile_timed(jax.jit(read), params, prompts, lengths)
    runs["prefill"] = functools.partial(prefill, params, prompts, lengths)

    def naive(params: Any, tokens: jax.Array) -> jax.Array:
        """The token after the last one of [B, P + N], from a pass over all of them."""
        hidden: Any = model.apply({"params": params}, tokens, method="hidden")
        logits = decode.next_logits(model, params, hidden[:, -1])
        return jnp.argmax(logits, axis=-1)

    tokens = jnp.pad(prompts, ((0, 0), (0, args.new)))
    recompute, figures["naive"] = measure.compile_timed(jax.jit(naive), params, tokens)
    runs["naive"] = functools.partial(recompute, params, tokens)

    for name, (temperature, top_k, top_p) in SAMPLINGS.items():
        sampling = decode.Sampling(temperature, top_k, top_p, args.new, ())
        reply, figures[name] = measure.compile_timed(
            decode.generate, model, params, prompts, lengths, keys, sampling
        )
        runs[name] = functools.partial(reply, params, prompts, lengths, keys)

    times = measure.in_turns(runs, args.rounds)
    peak = flops / times["product"].min()
    # A forward pass is a third of what flops_per_token counts.
    forward = model.config.flops_per_token(whole) / 3
    figures["prefill"] |= {
        "ms": measure.spread(1e3 * times["prefill"]),
        "tokens_per_sec": round(batch * args.prompt / np.median(times["prefill"])),
        "share_of_peak": round(
            batch * args.prompt * forward / np.median(times["prefill"]) / peak, 3
        ),
    }
    figures["naive"] |= {"ms_per_token": measure.spread(1e3 * times["naive"])}
    for name in SAMPLINGS:
        # The first of `new` tokens comes from the prefill.
        step = (times[name] - times["prefill"]) / (args.new - 1)
        figures[name] |= {
            "ms": measure.spread(1e3 * times[name]),
            "ms_per_token": measure.spread(1e3 * step, 3),
            "tokens_per_sec": round(batch / np.median(step)),
            "share_of_peak": round(batch * forward / np.median(step) / peak, 3),
            "time_to_naive": measure.spread(step / times["naive"], 4),
        }
    figures["product_peak_gflops"] = round(peak / 1e9, 1)
    return figures


if __name__ == "__main__":
    main()
