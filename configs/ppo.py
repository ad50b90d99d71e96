"""PPO from an SFT model against a reward model; for about 1M parameters on two CPU cores.

    python -m gptlab.ppo --config=configs/ppo.py --workdir=runs/ppo \
        --config.inputs.init=runs/sft --config.inputs.reward=runs/reward \
        --config.inputs.prompts=runs/clean --config.inputs.vocabulary=runs/vocabulary

Arguments name a recipe:
  'cpu' (the default): 60 steps of 64 episodes, a few minutes on two cores. What to expect depends
    on the reward model and the KL coefficient: EXPERIMENTS.md has a table.
  'scorer': the same, paid by a program, the share of some words: a canary.
  'instructgpt' (arXiv 2203.02155, appendix C.4): one inner epoch of 8 minibatches, fixed KL
    coefficient, constant learning rate, PPO-ptx (on inputs.tokens). Not as there: no moving average
    of the policy (0.992 there); ptx.coef is 1.0 on a mean over tokens (27.8 there, of a loss whose
    reduction is not given); the policy has the learning rate that is given for the value function.
  'ziegler' (arXiv 1909.08593, sentiment): 4 epochs, adaptive KL, whitened rewards. Not as there:
    the critic is a network of its own that starts as the reward model, where theirs was a head,
    zero at first, on the policy's trunk; replies may end, and score -1 if they don't within 24
    tokens, where theirs all had 24.
The last two are for large models and batches, and were not run to their end.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

ARGS = ("cpu", "instructgpt", "ziegler", "scorer")


def get_config(arg: str = "cpu") -> ConfigDict:
    """Batch sizes of 'instructgpt' and 'ziegler' are the papers'; see above for what is not."""
    if arg not in ARGS:
        raise ValueError(f"configs/ppo.py takes one of {ARGS}, got {arg!r}")
    config = ConfigDict(
        {
            "seed": 0,
            # `reference` is what the KL is measured against; without it, `init` itself.
            "inputs": common.inputs(
                "init", "reference", "reward", "prompts", "vocabulary", "tokens"
            ),
            "compute": common.compute(unroll=4),
            "lora": common.lora(),
            "data": {"prompt_len": 64},
            "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 32},
            # One of the two is set; a step is one rollout of batch_size episodes.
            "total_steps": placeholder(int),
            "total_episodes": placeholder(int),
            "batch_size": 64,
            "samples_per_prompt": 1,
            "minibatches": 4,
            "epochs": 1,
            "accumulation_steps": 1,
            "optimizer": common.adamw(1e-4, schedule="linear", warmup_steps=10, weight_decay=0.0),
            "value_optimizer": common.adamw(
                2e-4, schedule="linear", warmup_steps=10, weight_decay=0.0
            ),
            "policy_clip": 0.2,
            "value_clip": 0.2,
            "vf_coef": 1.0,  # of a critic of its own: matters to its clip_norm
            # 'model': inputs.reward, normalised. 'scorer': a program, scorers/registry.py.
            "reward": {
                "kind": "model",
                # Read only with kind 'scorer'; inputs.reward only with 'model'.
                "scorer": {"name": "word_fraction", "words": ("you", "your", "yours", "yourself")},
            },
            # target (nats a reply) and horizon (episodes) are read only with kind 'adaptive'.
            "kl": {"kind": "fixed", "coef": 0.05, "target": 6.0, "horizon": 10_000},
            "no_eos_score": placeholder(float),  # replaces an unfinished reply's score; None: kept
            "score_position": "last",  # or 'after_last'
            "whiten_rewards": False,
            "advantage": "gae",
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_advantages": "minibatch",  # or 'rollout', 'none'
            # PPO-ptx: rows of inputs.tokens with each optimiser step. coef 0 is off; inputs.tokens
            # and the other keys are read only when it is on.
            "ptx": {"coef": 0.0, "name": "pretrain", "batch_size": 8, "seq_len": 128},
            # Keep in the host's memory: reference and reward model while they do not score, critic
            # and its optimiser's state while replies are drawn.
            "offload": False,
            "mesh": common.mesh(),
            "log_every_steps": 1,
            "eval_every_steps": 20,
            "eval_batches": 4,
            "sample_every_steps": 10,
            "checkpoint": common.checkpoint(every_steps=20, best_metric=None),
            "profile": common.profile(),
            "on_nonfinite": "stop",
        }
    )
    config.no_eos_score = -1.0
    config.total_episodes = 60 * 64
    if arg == "instructgpt":
        config.update(batch_size=512, minibatches=8, total_episodes=256_000)
        config.data.prompt_len, config.sampling.max_new_tokens = 1024, 1024
        # 10 iterations of 8 optimiser steps of warm-up, then constant.
        config.optimizer = common.adamw(
            9e-6, schedule="constant", warmup_steps=80, weight_decay=0.0
        )
        config.value_optimizer = common.adamw(
            9e-6, schedule="constant", warmup_steps=80, weight_decay=0.0
        )
        config.kl.coef = 0.02
        config.ptx.update(coef=1.0, batch_size=512, seq_len=1024)
    if arg == "ziegler":
        config.update(
            batch_size=512,
            minibatches=1,
            epochs=4,
            total_episodes=1_000_000,
            whiten_rewards=True,
        )
        config.sampling.update(temperature=0.7, max_new_tokens=24)
        config.kl.update(kind="adaptive", coef=0.15)
        config.vf_coef = 0.1
        for optimizer in (config.optimizer, config.value_optimizer):
            optimizer.update(lr=1e-5, final_fraction=0.0, warmup_steps=0, clip_norm=None)
            optimizer.update(betas=(0.9, 0.999), eps=1e-5, adam_eps_style="tensorflow")
    if arg == "scorer":
        config.reward.kind = "scorer"
    return config


def sweep(add) -> None:
    """What does a larger KL penalty cost in reward, and what does it save in drift?"""
    for coef in (0.0, 0.02, 0.05, 0.1, 0.2):
        add(**{"kl.coef": coef})
