"""A reward model from comparisons, on the SFT model's backbone.

    python -m gptlab.reward --config=configs/reward.py --workdir=runs/reward \
        --config.inputs.init=runs/sft --config.inputs.vocabulary=runs/vocabulary \
        --config.inputs.comparisons=runs/rank

One epoch over the comparisons of every round so far (`comparisons`, `comparisons_2`, ...), as in
InstructGPT, whose reward models overfit quickly with more (arXiv 2203.02155, appendix C.2). One to
two minutes on two CPU cores for some 1,340 sets of 4 replies in the quickstart. 576 such sets gave
62% accuracy against clean scores with this config's optimiser and batch; how to reach more is in
EXPERIMENTS.md.

Arguments: 'rounds' (K = 4 replies a prompt, simulated or people's rankings), 'reviews' (human
preferences between two film reviews; `comparisons` is the clean corpus itself).
"""

from ml_collections import ConfigDict

from configs import common

ARGS = ("rounds", "reviews")


def get_config(arg: str = "rounds") -> ConfigDict:
    """Learning rates are those of a 1M-parameter model; InstructGPT's 6B used 9e-6."""
    if arg not in ARGS:
        raise ValueError(f"configs/reward.py takes one of {ARGS}, got {arg!r}")
    reviews = arg == "reviews"
    config = ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs(
                "init",
                "vocabulary",
                "comparisons",
                "comparisons_2",
                "comparisons_3",
                "comparisons_4",
                "comparisons_feedback",
                "demonstrations",
            ),
            "compute": common.compute(unroll=4),
            "lora": common.lora(),
            "data": {
                "seq_len": 256 if reviews else 96,
                # As PPO and evaluation cut theirs, or the scores there would be of other prompts
                # than those of training.
                "prompt_len": 64,
                "max_candidates": 2 if reviews else 4,
                # Train on the labels of some folds of the prompts only, (0,) of 1 being all. The
                # held-out labels are whole: all models choose their checkpoint on the same ones.
                "num_folds": 1,
                "folds": (0,),
            },
            "batch_size": 32,
            "accumulation_steps": 1,
            "optimizer": common.adamw(3e-4, warmup_steps=4),
            "mesh": common.mesh(),
            # Once, after training, then frozen: 'samples' (mean 0, std 1 over the candidates),
            # 'demonstrations' (human replies average 0; needs inputs.demonstrations) or 'none'.
            "normalise": "samples",
            "normalise_examples": 512,  # comparisons or demonstrations; not read with 'none'
            "log_every_steps": 5,
            "eval_every_steps": 10,
            "eval_batches": 8,
            "checkpoint": common.checkpoint(every_steps=10),
            "profile": common.profile(),
            "on_nonfinite": "stop",
        }
    )
    config.update(common.duration(total_epochs=3.0 if reviews else 1.0))
    return config


def sweep(add) -> None:
    """One epoch or more? The validation loss decides, accuracy hardly moves."""
    for epochs in (0.5, 1.0, 2.0, 4.0):
        add(total_epochs=epochs)
