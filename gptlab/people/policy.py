"""A trained model to talk to: found, loaded, and streaming one reply at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import AxisType, Mesh

from gptlab.data import chat
from gptlab.data.tokenizer import Tokenizer, find_vocabulary
from gptlab.model import decode
from gptlab.model.sharding import MESH_AXES
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.rl import rollout
from gptlab.run import artifact
from gptlab.run.errors import UserError
from gptlab.train import checkpoint

_prefill = jax.jit(decode.prefill, static_argnames=("model", "slots"))
_sample = jax.jit(decode.sample, static_argnames="sampling")


class Policy:
    """A language model with its vocabulary.

    Attributes:
      params: as decoding reads them (`decode.unstack_layers`).
      identity: of the artifact, as the `policy` of a records.Candidate.
      end_tokens: what ends a reply: its stop tokens and those no reply can contain.
    """

    def __init__(self, model: LanguageModel, params: Any, tokenizer: Tokenizer, identity: str):
        unstack = jax.jit(decode.unstack_layers, static_argnums=0)
        self.model, self.tokenizer, self.identity = model, tokenizer, identity
        self.params = unstack(model.config, params)
        halts = rollout.halt_tokens(tokenizer, model.config.vocab_size)
        self.end_tokens = (*chat.stop_tokens(tokenizer), *halts)

    def stream(
        self, prompt: Sequence[int], key: jax.Array, sampling: decode.Sampling
    ) -> Iterator[int]:
        """The reply's tokens, one by one, up to and without its stop token.

        What `decode.generate` would draw for this prompt and key. Prompt and reply together fit
        the context window (the caller sees to it). On one device.
        """
        window = self.model.config.max_len
        # A few widths only, so that few programs are compiled.
        width = min(window, max(16, 1 << (len(prompt) - 1).bit_length()))
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(prompt)] = prompt
        at, keys = jnp.array([len(prompt)], jnp.int32), key[None]
        cache, logits = _prefill(self.model, self.params, tokens, at, slots=window)
        token, _ = _sample(logits, keys, at, sampling=sampling)
        for _ in range(sampling.max_new_tokens):
            drawn = int(token[0])
            if drawn in sampling.stop_tokens:
                return
            yield drawn
            cache, token, _ = decode.decode_step(
                self.model, self.params, cache, token, at, keys, sampling, at[0] + 1
            )
            at = at + 1


def find(workdir: epath.PathLike) -> epath.Path:
    """The artifact to talk to: of a rounds workdir its promoted policy, else the workdir itself.

    Raises:
        UserError: there is no artifact, or no round has finished yet.
    """
    manifest = artifact.read_manifest(workdir, allow_unfinished=True)
    if manifest["stage"] != "rounds":
        return epath.Path(workdir)
    policy = manifest.get("results", {}).get("policy")
    if policy is None:
        raise UserError(
            f"{workdir}: no round has finished yet; give the workdir of a stage under "
            f"{epath.Path(workdir) / 'artifacts'}"
        )
    # The whole tree may have been moved since.
    for path in (epath.Path(policy), epath.Path(workdir) / "artifacts" / epath.Path(policy).name):
        if path.exists():
            return path
    raise UserError(f"{workdir}: its policy {policy} is gone")


def load(workdir: epath.PathLike, dtype: str, mesh: Mesh | None = None) -> Policy:
    """Loads a stage's best checkpoint, of what `find` gives for a workdir.

    Args:
        workdir: of a stage or of rounds.
        dtype: what it computes in.
        mesh: where the parameters live; None: this process's first device.

    Raises:
        UserError: no artifact, no language model or no vocabulary in its lineage.
    """
    workdir = find(workdir)
    tokenizer = find_tokenizer(workdir)
    compute = {"dtype": dtype, "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}
    model = LanguageModel(ModelConfig.build(checkpoint.load_model_config(workdir), compute))
    if mesh is None:
        mesh = jax.make_mesh(
            (1,) * 5, MESH_AXES, axis_types=(AxisType.Auto,) * 5, devices=jax.local_devices()[:1]
        )
    params = checkpoint.load_params(workdir, mesh, functools.partial(init_params, model))
    with jax.set_mesh(mesh):
        return Policy(model, params, tokenizer, artifact.read_manifest(workdir, True)["identity"])


def find_tokenizer(workdir: epath.PathLike) -> Tokenizer:
    """The nearest vocabulary in what an artifact was made from, and itself.

    Raises:
        UserError: there is none.
    """
    level: list[Mapping[str, Any]] = [artifact.lineage(workdir)]
    while level:
        for node in level:
            if find_vocabulary(node["path"]) is not None:
                return Tokenizer.load(node["path"])
        level = [child for node in level for child in node["inputs"].values()]
    raise UserError(
        f"{workdir} was made without a train_tokenizer artifact or an imported model: its "
        "vocabulary is unknown"
    )
