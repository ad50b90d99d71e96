"""How surprised a language model is by given continuations, row by row.

Held-out loss as a figure of a whole split is `train.held_out`; here every row has its own, so that
judges can be compared reply by reply.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptlab.data.batches import TokenBatch
from gptlab.model.transformer import LanguageModel
from gptlab.train import mesh as mesh_lib

RowNll = Callable[[Any, TokenBatch], tuple[jax.Array, jax.Array]]


def make_nll(model: LanguageModel, mesh: Mesh) -> RowNll:
    """Compiles the masked negative log-likelihood of each row of a batch.

    Returns:
      A function (params, batch of [B, T]) -> nats float32 [B] and counted tokens float32 [B],
      whole on every process.
    """

    def nll(params: Any, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        stats: Any = model.apply(
            {"params": params},
            batch.tokens,
            batch.targets,
            batch.positions,
            batch.segment_ids,
            method=model.score,
        )
        return -(stats.logprob * batch.loss_mask).sum(-1), batch.loss_mask.sum(-1)

    return jax.jit(nll, out_shardings=NamedSharding(mesh, PartitionSpec()))


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
    nll: RowNll,
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int,
    seq_len: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Nats and counted tokens of each continuation after its context: two float64 [P].

    Args:
      nll: from `make_nll`.
      params: of that model.
      contexts: P lists of tokens, at least one in each.
      continuations: P lists of tokens; an empty one has 0 nats and 0 tokens.
      batch_size: global rows of a batch.
      seq_len: T, slots of a row.
      mesh: of the parameters.
    """
    block, blocks = mesh_lib.process_block(mesh)
    nats, counts = [], []
    for batch in continuation_batches(contexts, continuations, batch_size, seq_len):
        rows = slice(block * batch_size // blocks, (block + 1) * batch_size // blocks)
        local = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        row_nats, row_tokens = nll(params, mesh_lib.put_batch(local, mesh))
        nats.append(np.asarray(row_nats, np.float64))
        counts.append(np.asarray(row_tokens, np.float64))
    return np.concatenate(nats)[: len(contexts)], np.concatenate(counts)[: len(contexts)]
