"""Compiled sampling and scoring beside the frozen models: rollouts and held-out figures."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gptlab.data import chat
from gptlab.data.batches import PromptBatches
from gptlab.data.records import Prompt
from gptlab.data.tokenizer import Tokenizer
from gptlab.model import lora
from gptlab.model.decode import Sampling
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel
from gptlab.rl import kl, rewards, rollout
from gptlab.rl.rollout import Rollout, Samples
from gptlab.scorers import registry
from gptlab.train import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Functions:
    """What a rollout is made with, compiled: the same for the loop and for gptlab.plan."""

    sample: Any  # (policy, PromptBatch, key) -> Samples
    logprobs: Any  # (policy or reference, Samples) -> log-probs and entropy, [B, R] each
    scalars: Any  # (critic or reward model, Samples) -> [B, T]


def jit_functions(
    model: LanguageModel, scalar_model: ScalarModel, sampling: Sampling, pad_id: int
) -> Functions:
    """Jits the functions; `sampling` says where replies end."""
    return Functions(
        sample=jax.jit(
            lambda params, batch, key: rollout.sample(
                model, params, batch.tokens, batch.lengths, key, sampling, pad_id
            )
        ),
        logprobs=jax.jit(
            lambda params, samples: rollout.response_logprobs(
                model, params, samples, sampling.temperature
            )
        ),
        scalars=jax.jit(
            lambda params, samples: rollout.token_scalars(
                scalar_model, params, samples.tokens, samples.lengths
            )
        ),
    )


class Actor:
    """Compiled sampling and scoring, and the frozen models: what a rollout is made with.

    Policy and reference go through one executable, critic and reward model through another: equal
    parameters give equal numbers, bit for bit. (Not so a policy with adapters and a reference that
    is a model of its own.)
    """

    def __init__(
        self,
        config: ConfigDict,
        model: LanguageModel,
        scalar_model: ScalarModel,
        reference: Any,
        reward_params: Any | None,
        tokenizer: Tokenizer,
        mesh: Mesh,
    ):
        """Compiles nothing yet.

        Args:
          config: of the stage.
          model: policy and reference.
          scalar_model: critic and reward model.
          reference: its parameters; None where it is the policy with its adapters off.
          reward_params: with the normalisation folded in; only the head where the trunk is the
            critic's with its adapters off; None with reward.kind='scorer'.
          tokenizer: of all of them.
          mesh: of all of them.

        With config.offload, reference and reward model are given as `put_away` leaves them, and
        are on the device only while they score, one at a time.
        """
        sampling = Sampling(
            **config.sampling.to_dict(),
            stop_tokens=chat.stop_tokens(tokenizer),
            halt_tokens=rollout.halt_tokens(tokenizer, model.config.vocab_size),
        )
        rollout.check_sampling(sampling)
        self._offload = config.offload
        self._reference, self._reward_params = reference, reward_params
        self._tokenizer, self._mesh = tokenizer, mesh
        self._text_scorer = None
        if config.reward.kind == "scorer":
            self._text_scorer = registry.make(config.reward.scorer, config.inputs)
        functions = jit_functions(model, scalar_model, sampling, tokenizer.pad_id)
        self.sample, self.logprobs = functions.sample, functions.logprobs
        self.scalars = functions.scalars
        self._at_response = jax.jit(
            lambda x, s: rollout.at_response(x, s.prompt_lengths, s.response.shape[1])
        )
        self._at_last = jax.jit(lambda x, s: rollout.at_last(x, s.scored_lengths))
        self._held_out_sums = jax.jit(
            functools.partial(held_out_sums, no_eos_score=config.no_eos_score),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    def _fetched(self, params: Any) -> Any:
        return fetch(params) if self._offload else params

    def ref_logprobs(self, policy: Any, samples: Samples) -> jax.Array:
        """float32 [B, R] of the reference, beside a policy."""
        if self._reference is None:
            reference = lora.off(policy)
        else:
            reference = self._fetched(self._reference)
        logprobs, _ = self.logprobs(reference, samples)
        if self._offload:
            jax.block_until_ready(logprobs)  # or the reward model would be fetched beside it
        return logprobs

    def scores(self, critic: Any, samples: Samples, prompts: Sequence[Prompt]) -> jax.Array:
        """float32 [B] of whole replies; `prompts` are those of this process's rows."""
        if self._text_scorer is None:
            paid_by = self._fetched(self._reward_params)
            if lora.adapted(critic):
                paid_by = {**lora.off(self._fetched(critic)), "head": paid_by["head"]}
            return self._at_last(self.scalars(paid_by, samples), samples)
        scores = self._text_scorer(prompts, self.texts(samples))
        return mesh_lib.put_batch(np.asarray(scores, np.float32), self._mesh)

    def texts(self, samples: Samples) -> list[str]:
        """The replies of this process's rows."""
        response, mask = (rollout.local_rows(x) for x in (samples.response, samples.response_mask))
        return [
            chat.decode_reply(self._tokenizer, row[keep > 0].tolist())
            for row, keep in zip(response, mask, strict=True)
        ]

    def score(
        self, policy: Any, critic: Any, samples: Samples, prompts: Sequence[Prompt]
    ) -> Rollout:
        """The rollout of samples that `policy` drew."""
        old_logprobs, entropy = self.logprobs(policy, samples)
        ref_logprobs = self.ref_logprobs(policy, samples)
        values = self._at_response(self.scalars(critic, samples), samples)
        scores = self.scores(critic, samples, prompts)
        return Rollout(samples, old_logprobs, entropy, ref_logprobs, values, scores)

    def examples(
        self, data: Rollout, prompts: Sequence[Prompt], count: int = 4
    ) -> list[dict[str, Any]]:
        """The first few of this process's replies with prompt and score, for people to read."""
        rows = zip(prompts, self.texts(data.samples), rollout.local_rows(data.scores), strict=True)
        return [
            {
                "prompt": [message.content for message in prompt.messages],
                "reply": reply,
                "score": float(score),
            }
            for prompt, reply, score in itertools.islice(rows, count)
        ]

    def held_out(
        self,
        policy: Any,
        critic: Any,
        prompts: PromptBatches,
        max_batches: int | None,
        key: jax.Array,
    ) -> dict[str, float]:
        """Means over held-out prompts, one reply each, drawn with the same keys every time.

        score (after unfinished replies got theirs replaced), raw_score, kl (nats a response),
        response_len (tokens), eos_rate.
        """
        total: dict[str, float] = {}
        for i, batch in enumerate(prompts.eval(max_batches)):
            asked = [prompts.prompts[max(row, 0)] for row in batch.index]
            batch = mesh_lib.put_batch(batch, self._mesh)
            samples = self.sample(policy, batch, jax.random.fold_in(key, i))
            logprobs, _ = self.logprobs(policy, samples)
            ref_logprobs = self.ref_logprobs(policy, samples)
            scores = self.scores(critic, samples, asked)
            sums = self._held_out_sums(batch.index, samples, logprobs, ref_logprobs, scores)
            for name, value in jax.device_get(sums).items():
                total[name] = total.get(name, 0.0) + float(value)
        count = total.pop("count")
        return {name: value / count for name, value in total.items()}


def put_away(params: Any) -> Any:
    """A copy in the host's memory that is complete: the device needs the arrays no longer."""
    return jax.block_until_ready(_moved(params, "pinned_host"))


def fetch(params: Any) -> Any:
    """What was put away, on the device."""
    return _moved(params, "device")


def _moved(params: Any, memory: str) -> Any:
    """The same arrays, split as they are, in another memory of their devices."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(memory)), params)


def held_out_sums(
    index: jax.Array,
    samples: Samples,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    scores: jax.Array,
    *,
    no_eos_score: float | None,
) -> dict[str, jax.Array]:
    """Sums of per-reply figures over the rows that are no padding (index >= 0), and their count."""
    real = (index >= 0).astype(jnp.float32)
    mask = samples.response_mask
    rows = {
        "score": rewards.replace_unfinished(scores, samples.finished, no_eos_score),
        "raw_score": scores,
        "kl": jnp.sum(kl.k1(logprobs, ref_logprobs) * mask, axis=1),
        "response_len": jnp.sum(mask, axis=1),
        "eos_rate": samples.finished.astype(jnp.float32),
        "count": jnp.ones_like(scores),
    }
    return {name: jnp.sum(row * real) for name, row in rows.items()}
