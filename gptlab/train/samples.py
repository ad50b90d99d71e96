"""A look at what the model says: continuations of a few fixed prompts, while it trains."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptlab.model import decode
from gptlab.model.transformer import LanguageModel
from gptlab.run.errors import UserError

Sampler = Callable[[Any, jax.Array], list[list[int]]]


def make_sampler(
    model: LanguageModel, mesh: Mesh, prompts: Sequence[Sequence[int]], sampling: decode.Sampling
) -> Sampler:
    """Makes the function (params, key) -> the token ids of one continuation for each prompt.

    Raises:
      UserError: the longest prompt and max_new_tokens do not fit the context window together.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest + sampling.max_new_tokens > model.config.max_len:
        raise UserError(
            f"config.sample: a prompt of {longest} tokens and {sampling.max_new_tokens} new ones "
            f"do not fit the context window of {model.config.max_len}"
        )
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)

    def generate(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key, len(prompts))
        out = decode.generate(model, params, tokens, lengths, keys, sampling)
        return out.tokens, out.lengths

    jitted = jax.jit(generate, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def sample(params: Any, key: jax.Array) -> list[list[int]]:
        rows, counts = jax.device_get(jitted(params, key))
        return [row[:count].tolist() for row, count in zip(rows, counts, strict=True)]

    return sample
