"""The evaluation suite on up to 500 held-out prompts, one of each conversation.

    python -m gptlab.evaluate --config=configs/evaluate.py --workdir=runs/evaluate \
        --config.inputs.policy=runs/ppo --config.inputs.baseline=runs/sft \
        --config.inputs.base=runs/pretrain --config.inputs.reward=runs/reward \
        --config.inputs.judge=runs/judge --config.inputs.vocabulary=runs/vocabulary \
        --config.inputs.prompts=runs/clean --config.inputs.reviews=runs/clean \
        --config.inputs.tokens=runs/tokens

`inputs.reviews` (a clean corpus with human comparisons) adds the judge fitted on them and may be
left out; `inputs.previous` (another policy) adds a paired and a KL-matched comparison. With the
quickstart's model and 384 prompts it takes 70 seconds on two CPU cores. What to expect: intervals
of the win rate that hold 1/2 wherever a policy is compared with itself.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is not used."""
    if arg:
        raise ValueError(f"configs/evaluate.py takes no argument, got {arg!r}")
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs(
        "policy",  # what is evaluated
        "baseline",  # the SFT model, also the KL's reference
        "base",  # the pretrained model
        "previous",  # optional: another policy to compare with
        "reward",  # the reward model that PPO maximised
        "judge",  # one that it never saw: other labels, other seed
        "vocabulary",
        "prompts",  # a clean corpus
        "reviews",  # optional: a clean corpus with human comparisons
        "tokens",  # a tokenised corpus, for the held-out pretraining loss
    )
    config.data = {
        "split": "test",
        "num_prompts": 500,  # or all there are; one of each conversation
        "prompt_len": 64,
        "seq_len": 256,
        "pretraining": "pretrain",
        "pretraining_batches": 8,
    }
    config.compute = common.compute()
    config.mesh = common.mesh()
    config.batch_size = 64
    config.sampling = {"temperature": 1.0, "max_new_tokens": 32}
    config.gold = {"name": "vader"}
    # Read only with inputs.reviews.
    config.reviews = {
        "name": "tfidf_comparisons",
        "input": "reviews",
        "records_name": "comparisons",
        "split": "train",
        "min_count": 2,
        "inverse_penalty": 1.0,
    }
    # The baseline of PPO: n replies of SFT, the best by PPO's reward model. sizes=(): left out.
    config.best_of_n = {"sizes": (2, 4, 8, 16), "samples": 16, "num_prompts": 128}
    config.bootstrap = {"resamples": 2000, "seed": 0, "level": 0.95}
    config.gate = common.gate()
    config.report_samples = 20
    return config
