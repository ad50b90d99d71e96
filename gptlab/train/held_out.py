"""Held-out loss inside a loop: the same figures whatever the mesh and the number of processes."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptlab.data.batches import TokenBatch
from gptlab.model.transformer import LanguageModel
from gptlab.run.errors import UserError
from gptlab.train import losses
from gptlab.train.mesh import put_batch

HeldOut = Callable[[Any, Iterable[TokenBatch]], dict[str, float]]


def make_held_out(model: LanguageModel, mesh: Mesh, token_bytes: np.ndarray, name: str) -> HeldOut:
    """Makes the function (params, this process's batches of [B, T]) -> {eval/<name>/...: figure}.

    Figures: loss (nats a token), perplexity, accuracy, bits_per_byte. Bits of all predicted
    tokens, control tokens included, over the bytes of the text: comparable between vocabularies.

    Args:
      model: dropout is off.
      mesh: of the parameters.
      token_bytes: int [V'], UTF-8 bytes of each token, V' <= V; control tokens have none.
      name: of the figures, 'validation' say.
    """
    table = np.zeros(model.config.vocab_size, np.float32)
    table[: len(token_bytes)] = token_bytes
    replicated = NamedSharding(mesh, PartitionSpec())
    table = jax.device_put(table, replicated) if jax.process_count() == 1 else table

    def count(params: Any, batch: Any, table: jax.Array) -> dict[str, jax.Array]:
        stats: Any = model.apply(
            {"params": params},
            batch.tokens,
            batch.targets,
            batch.positions,
            batch.segment_ids,
            method=model.score,
        )
        _, weight, figures = losses.cross_entropy_sums(stats, batch.loss_mask, 0.0)
        num_bytes = jnp.sum(jnp.take(table, batch.targets, axis=0) * batch.loss_mask)
        return {**figures, "tokens": weight, "bytes": num_bytes}

    jitted = jax.jit(count, out_shardings=replicated)

    def held_out(params: Any, batches: Iterable[TokenBatch]) -> dict[str, float]:
        total: dict[str, float] = {}
        for batch in batches:
            sums = jax.device_get(jitted(params, put_batch(batch, mesh), table))
            for key, value in sums.items():
                total[key] = total.get(key, 0.0) + float(value)
        if not total or not total["tokens"]:
            raise UserError("the held-out split has no token to predict: prepare more text")
        loss = total["nll"] / total["tokens"]
        figures = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": total["accuracy"] / total["tokens"],
            "bits_per_byte": total["nll"] / math.log(2.0) / max(total["bytes"], 1.0),
        }
        return {f"eval/{name}/{figure}": value for figure, value in figures.items()}

    return held_out
