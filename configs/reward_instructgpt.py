"""InstructGPT's reward model, 6B, and one of 1.3B (arXiv 2203.02155, appendix C.2).

    python -m gptlab.plan --config=configs/reward_instructgpt.py:6.7b

From there: one epoch, learning rate 9e-6, cosine to 10%, batches of 64 prompts with up to 9 ranked
replies each, human replies average 0. Starts from configs/sft_instructgpt.py (there from a GPT-3
that was fine-tuned on public data) and is trained as configs/reward.py says; it was never run.
"""

from ml_collections import ConfigDict

from configs import common

ARGS = ("1.3b", "6.7b")


def get_config(arg: str = "1.3b") -> ConfigDict:
    """The size."""
    if arg not in ARGS:
        raise ValueError(f"configs/reward_instructgpt.py takes one of {ARGS}, got {arg!r}")
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs(
        "init", "vocabulary", "comparisons", "comparisons_2", "comparisons_3", "comparisons_4",
        "comparisons_feedback", "demonstrations",
    )  # fmt: skip
    config.data = {
        "seq_len": 2048, "prompt_len": 1024, "max_candidates": 9, "num_folds": 1, "folds": (0,),
    }  # fmt: skip
    config.compute = common.compute(dtype="bfloat16", remat="full")
    config.lora = common.lora()

    config.batch_size = 64
    config.accumulation_steps = 1
    config.update(common.duration(total_epochs=1.0))
    config.optimizer = common.adamw(lr=9e-6)
    config.on_nonfinite = "stop"
    config.mesh = common.mesh()
    config.normalise = "demonstrations"
    config.normalise_examples = 512

    config.log_every_steps = 5
    config.eval_every_steps = 50
    config.eval_batches = 8
    config.checkpoint = common.checkpoint(50)
    config.profile = common.profile()
    return config


def hardware(arg: str = "1.3b") -> dict:
    """What it is planned for, and what inputs.init is."""
    return {
        "topology": {"1.3b": "v4:4x4x4", "6.7b": "v5p:4x4x4"}[arg],
        "model": common.model(f"gpt3_{arg}", vocab_size=50304),
    }
