"""Fragments that configs are put together from. Each returns one subtree with every key in it."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from gptlab.model.presets import PRESETS


def model(name: str, **overrides: Any) -> ConfigDict:
    """The architecture of a preset, with fields replaced."""
    return ConfigDict({**PRESETS[name], **overrides})


def compute(
    dtype: str = "float32",
    *,
    remat: str = "none",
    unroll: int = 1,
    dropout: float = 0.0,
    attention: str = "xla",
    loss_chunk: int = 0,
) -> ConfigDict:
    """How the network is evaluated; see ModelConfig in model/transformer.py for each key."""
    return ConfigDict(
        {
            "dtype": dtype,
            "remat": remat,
            "unroll": unroll,
            "dropout": dropout,
            "attention": attention,
            "loss_chunk": loss_chunk,
        }
    )


def lora(
    rank: int = 0,
    *,
    alpha: float = 16.0,
    targets: Sequence[str] = ("query", "value"),
    frozen_dtype: str = "float32",
) -> ConfigDict:
    """Low-rank adapters of the layers' `targets`, everything else frozen; rank 0: all is trained.

    See model/lora.py. frozen_dtype='bfloat16' keeps the frozen matrices in half the memory, rounded
    for all who share them: in PPO also the reference and the reward model.
    """
    return ConfigDict(
        {"rank": rank, "alpha": alpha, "targets": tuple(targets), "frozen_dtype": frozen_dtype}
    )


def llama_lora() -> ConfigDict:
    """Adapters of every kernel of a Llama's layers, its own weights in bfloat16."""
    targets = ("query", "key", "value", "out", "up", "gate", "down")
    return lora(16, alpha=32.0, targets=targets, frozen_dtype="bfloat16")


def mesh(**sizes: int) -> ConfigDict:
    """Sizes of the five mesh axes; `fsdp` takes the devices that are left."""
    return ConfigDict({"replica": 1, "data": 1, "fsdp": -1, "context": 1, "tensor": 1, **sizes})


def adamw(
    lr: float,
    *,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    final_fraction: float | None = None,
    decay_fraction: float | None = None,
    betas: Sequence[float] = (0.9, 0.95),
    mu_dtype: str = "float32",
    eps: float = 1e-8,
    adam_eps_style: str = "torch",
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> ConfigDict:
    """AdamW; see train/optimizer.py for what each key means.

    final_fraction is by default 0.1, and 1.0 with schedule='constant', which has no other.
    """
    config = ConfigDict(
        {
            "name": "adamw",
            "lr": lr,
            "betas": tuple(betas),
            "mu_dtype": mu_dtype,  # of the first moment
            "eps": eps,
            "adam_eps_style": adam_eps_style,
            "weight_decay": weight_decay,
            "clip_norm": placeholder(float),
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "final_fraction": 1.0 if schedule == "constant" else 0.1,
            "decay_fraction": placeholder(float),
        }
    )
    if final_fraction is not None:
        config.final_fraction = final_fraction
    config.clip_norm = clip_norm
    config.decay_fraction = decay_fraction
    return config


def muon(lr: float, *, adam_lr: float, momentum: float = 0.95, **given: Any) -> ConfigDict:
    """Muon for the layers' matrices, Adam with adam_lr for the rest; `given` as for adamw."""
    config = adamw(lr, **{"weight_decay": 0.0, **given})
    del config.adam_eps_style, config.mu_dtype
    config.update(name="muon", adam_lr=adam_lr, momentum=momentum)
    return config


def duration(**given: float) -> ConfigDict:
    """total_steps, total_tokens and total_epochs, to be updated into a config; one of them set."""
    config = ConfigDict(
        {
            "total_steps": placeholder(int),
            "total_tokens": placeholder(int),
            "total_epochs": placeholder(float),
        }
    )
    config.update(given)
    return config


def checkpoint(
    every_steps: int,
    *,
    keep: int = 2,
    best_metric: str | None = "eval/validation/loss",
    best_mode: str = "min",
) -> ConfigDict:
    """The newest `keep` checkpoints and the best one by a metric are kept."""
    config = ConfigDict(
        {
            "every_steps": every_steps,
            "keep": keep,
            "best_metric": placeholder(str),
            "best_mode": best_mode,
        }
    )
    config.best_metric = best_metric
    return config


def profile() -> ConfigDict:
    """A jax.profiler trace of num_steps steps from start_step on; 0 steps means none."""
    return ConfigDict({"start_step": 10, "num_steps": 0})


def sample(
    max_new_tokens: int = 64,
    *,
    prompts: Sequence[str] = ("",),
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
) -> ConfigDict:
    """What a loop answers or continues every sample_every_steps, into samples.jsonl."""
    return ConfigDict(
        {
            "prompts": tuple(prompts),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
    )


def inputs(*names: str) -> ConfigDict:
    """Artifacts (workdirs of earlier stages) that a stage reads; given on the command line."""
    return ConfigDict({name: placeholder(str) for name in names})


def gate() -> ConfigDict:
    """What a policy must reach in an evaluation to be promoted."""
    return ConfigDict(
        {
            "min_win_rate_low": 0.5,  # over SFT by gold score: lower end of the interval
            "min_gold_difference": 0.0,
            "max_most_common_share": 0.05,
            "min_distinct_2_ratio": 0.5,  # against SFT's
        }
    )


def rank_by_people() -> ConfigDict:
    """The stage `rank`, by the people of a store: they work on a campaign in the web app."""
    return ConfigDict(
        {
            "seed": 0,
            "inputs": inputs("candidates"),
            "backend": "store",
            "store": {
                "url": placeholder(str),  # None: $GPTLAB_STORE
                "poll_seconds": 5.0,
            },
            # Settings are of a campaign that isn't there yet; one that is, stays as it is.
            "campaign": {
                "name": placeholder(str),
                "instructions": "Rank the replies from the best to the worst. Ties are allowed.",
                "overlap": 2,
                "lease_seconds": 900.0,
                "gold_rate": 0.05,
                "disagreement": 0.5,
                "max_skips": 3,
            },
            "filters": feedback_filters(),
        }
    )


def feedback_filters() -> ConfigDict:
    """What people said that may become training data; see people/feedback.py for each key."""
    return ConfigDict(
        {
            "consent": "training",
            "roles": ("user", "labeller", "reviewer", "admin"),
            "simulated": True,
            "max_disagreement": 0.5,
            "min_gold": 0.6,
            "gold_checks": 5,
        }
    )
