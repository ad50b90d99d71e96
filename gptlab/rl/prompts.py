"""The prompts that RL answers, as batches."""

from __future__ import annotations

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptlab.data import records
from gptlab.data.batches import PromptBatch, PromptBatches
from gptlab.data.tokenizer import Tokenizer
from gptlab.train import mesh as mesh_lib


def read_prompts(
    config: ConfigDict, tokenizer: Tokenizer, split: str, batch_size: int, mesh: Mesh
) -> PromptBatches:
    """Prompts of a split; the held-out ones may be fewer than a batch."""
    directory = epath.Path(config.inputs.prompts) / "records"
    prompts = list(records.RecordReader(directory, "prompts", split, records.Prompt))
    if split != "train":
        batch_size = mesh_lib.shrunk(batch_size, len(prompts), mesh)
    return PromptBatches(
        prompts,
        tokenizer,
        batch_size,
        config.data.prompt_len,
        config.seed,
        *mesh_lib.process_block(mesh),
    )


def repeat_rows(batch: PromptBatch, times: int) -> PromptBatch:
    """Every prompt `times` in a row."""
    return jax.tree.map(lambda x: np.repeat(x, times, axis=0), batch)
