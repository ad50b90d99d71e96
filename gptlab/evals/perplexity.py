"""How surprised a language model is by held-out text: nats a token, bits a byte, perplexity."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptlab.data.batches import TokenBatch
from gptlab.model.transformer import LanguageModel


def make_nll(model: LanguageModel) -> Callable[[Any, TokenBatch], tuple[jax.Array, jax.Array]]:
    """Compiles the masked negative log-likelihood of each row of a batch.

    Returns:
      A function (params, batch of [B, T]) -> nats float32 [B] and counted tokens float32 [B].
    """

    @jax.jit
    def nll(params: Any, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids)
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)  # [B, T, V]
        chosen = jnp.take_along_axis(logprobs, batch.targets[..., None], axis=-1)[..., 0]  # [B, T]
        return -(chosen * batch.loss_mask).sum(-1), batch.loss_mask.sum(-1)

    return nll


def held_out(
    nll: Callable[[Any, TokenBatch], tuple[jax.Array, jax.Array]],
    params: Any,
    batches: Iterable[TokenBatch],
    token_bytes: np.ndarray,
    put: Callable[[TokenBatch], TokenBatch] = lambda batch: batch,
) -> dict[str, float]:
    """Held-out figures over all batches, each token counted once.

    Args:
      nll: from `make_nll`.
      params: of the model.
      batches: of NumPy arrays [B, T].
      token_bytes: int [V], UTF-8 bytes of each token; control tokens have none.
      put: places a batch on the mesh.

    Returns:
      loss (nats a token), perplexity, bits_per_byte (all nats, those of control tokens included,
      over the bytes of the text: comparable between vocabularies), num_tokens, num_bytes.
    """
    nats, num_tokens, num_bytes = 0.0, 0.0, 0
    for batch in batches:
        row_nats, row_tokens = jax.device_get(nll(params, put(batch)))
        nats += float(row_nats.sum(dtype=np.float64))
        num_tokens += float(row_tokens.sum(dtype=np.float64))
        num_bytes += int((token_bytes[batch.targets] * (batch.loss_mask > 0)).sum())
    if not num_tokens or not num_bytes:
        raise ValueError("no token to predict in the held-out batches")
    return {
        "loss": nats / num_tokens,
        "perplexity": math.exp(nats / num_tokens),
        "bits_per_byte": nats / math.log(2.0) / num_bytes,
        "num_tokens": num_tokens,
        "num_bytes": float(num_bytes),
    }


def continuation_batches(
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int,
    seq_len: int,
) -> Iterable[TokenBatch]:
    """Batches that predict each continuation after its context, one row each, in order.

    A row longer than `seq_len` slots loses the oldest tokens of its context, then the newest of
    its continuation. All batches have one shape; the last is filled up with rows of mask 0.
    """
    for start in range(0, len(contexts), batch_size):
        rows = range(start, min(start + batch_size, len(contexts)))
        arrays = {
            "tokens": np.zeros((batch_size, seq_len), np.int32),
            "targets": np.zeros((batch_size, seq_len), np.int32),
            "loss_mask": np.zeros((batch_size, seq_len), np.float32),
            "segment_ids": np.zeros((batch_size, seq_len), np.int32),
            "positions": np.zeros((batch_size, seq_len), np.int32),
        }
        for i, row in enumerate(rows):
            continuation = list(continuations[row])[:seq_len]
            room = seq_len + 1 - len(continuation)
            context = list(contexts[row])[-room:]
            if not context:
                raise ValueError("a continuation needs at least one token of context")
            line = np.asarray(context + continuation, np.int32)
            n = len(line) - 1
            arrays["tokens"][i, :n], arrays["targets"][i, :n] = line[:-1], line[1:]
            arrays["loss_mask"][i, len(context) - 1 : n] = 1.0
            arrays["segment_ids"][i, :n] = 1
            arrays["positions"][i, :n] = np.arange(n)
        yield TokenBatch(**arrays)


def continuation_nll(
    nll: Callable[[Any, TokenBatch], tuple[jax.Array, jax.Array]],
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int,
    seq_len: int,
    put: Callable[[TokenBatch], TokenBatch] = lambda batch: batch,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats and counted tokens of each continuation after its context: two float64 [P]."""
    nats, counts = [], []
    for batch in continuation_batches(contexts, continuations, batch_size, seq_len):
        row_nats, row_tokens = jax.device_get(nll(params, put(batch)))
        nats.append(row_nats)
        counts.append(row_tokens)
    size = len(contexts)
    return (
        np.concatenate(nats)[:size].astype(np.float64),
        np.concatenate(counts)[:size].astype(np.float64),
    )
