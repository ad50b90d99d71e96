"""A look at what the model says: continuations of a few fixed prompts, while it trains."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gptlab.data.tokenizer import Tokenizer
from gptlab.model import decode
from gptlab.model.transformer import LanguageModel
from gptlab.run.errors import UserError

# (params, key) -> [{"prompt": text, "text": text}]
Sampler = Callable[[Any, jax.Array], list[dict[str, str]]]


def make_sampler(
    model: LanguageModel,
    mesh: Mesh,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    config: ConfigDict,
    stop_tokens: tuple[int, ...],
) -> Sampler:
    """Makes the function (params, key) -> one continuation of each prompt.

    Args:
      model: the model.
      mesh: of the parameters.
      tokenizer: turns continuations into text.
      prompts: token ids of each of config.prompts.
      config: prompts, temperature, top_k, top_p, max_new_tokens.
      stop_tokens: each ends a continuation.

    Raises:
      UserError: the longest prompt and max_new_tokens do not fit the context window together.
    """
    if not prompts:
        raise UserError("config.sample.prompts is empty: name at least one prompt ('' will do)")
    sampling = decode.Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        stop_tokens=stop_tokens,
    )
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
        # The state that is trained may leave no room for all weights on each device.
        out = decode.generate(model, params, tokens, lengths, keys, sampling, gather=False)
        return out.tokens, out.lengths

    jitted = jax.jit(generate, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def sample(params: Any, key: jax.Array) -> list[dict[str, str]]:
        rows, counts = jax.device_get(jitted(params, key))
        texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(rows, counts, strict=True)]
        return [{"prompt": p, "text": t} for p, t in zip(config.prompts, texts, strict=True)]

    return sample
