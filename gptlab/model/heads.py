"""A scalar at every token: the reward model and the critic are the language model's backbone with
this head instead of the unembedding.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptlab.model.transformer import Backbone, Dense, ModelConfig


class ScalarModel(nn.Module):
    """Reward model or critic: float32 [B, T], one number after each token.

    `init_scheme='reward'`: weights ~ N(0, 1/(D+1)), bias 0 (Stiennon et al. 2020, appendix B).
    `init_scheme='zero'`: all zero, for a value head on a shared trunk (Ziegler et al. 2019).
    """

    config: ModelConfig
    init_scheme: str = "reward"

    def setup(self) -> None:
        """Declares the backbone (without unembedding) and the head."""
        if self.init_scheme not in ("reward", "zero"):
            raise ValueError(f"init_scheme must be 'reward' or 'zero', not {self.init_scheme!r}")
        scale = (self.config.d_model + 1) ** -0.5 if self.init_scheme == "reward" else 0.0
        self.backbone = Backbone(self.config, unembed=False)
        self.head = Dense(1, ("embed", None), scale, use_bias=True, dtype="float32")

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Tokens int32 [B, T] (positions, segment_ids alike) -> float32 [B, T]."""
        hidden = self.backbone(tokens, positions, segment_ids, deterministic)
        return self.head(hidden.astype(jnp.float32))[..., 0]


def scalar_from_language(
    lm_params: Mapping[str, Any], head_params: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters of a ScalarModel: a language model's backbone (not its unembedding) and a head."""
    backbone = {k: v for k, v in lm_params["backbone"].items() if k != "unembedding"}
    return {"backbone": backbone, "head": dict(head_params)}
