"""GPT-3's 1.3B and 6.7B, the models that InstructGPT starts from (arXiv 2005.14165, table 2.1).

    python -m gptlab.plan --config=configs/pretrain_instructgpt.py:1.3b

From there: batches of 1M and 2M tokens, learning rates 2e-4 and 1.2e-4, windows of 2,048 tokens,
weight decay 0.1, clipping at 1, warm-up over 375M tokens, cosine to 10% after 260B of the 300B.
Not as there: attention is dense in every layer (there in every other), the 1.3B has 16 heads of 128
(24 there, more than its width holds), the batch does not grow, and cosine lasts to the end. Trained
as configs/pretrain.py says; it was never run.
"""

from ml_collections import ConfigDict

from configs import common

ARGS = ("1.3b", "6.7b")


def get_config(arg: str = "1.3b") -> ConfigDict:
    """The size."""
    if arg not in ARGS:
        raise ValueError(f"configs/pretrain_instructgpt.py takes one of {ARGS}, got {arg!r}")
    small = arg == "1.3b"
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs("init", "tokens", "vocabulary")
    config.data = {"name": "pretrain", "seq_len": 2048}
    config.model = common.model(f"gpt3_{arg}", vocab_size=50304)
    config.compute = common.compute(dtype="bfloat16", remat="full")
    config.lora = common.lora()  # only beside inputs.init

    config.batch_size = 512 if small else 1024
    config.accumulation_steps = 1 if small else 2
    config.update(common.duration(total_tokens=300_000_000_000))
    config.optimizer = common.adamw(
        lr=2e-4 if small else 1.2e-4, warmup_steps=358 if small else 179, final_fraction=0.1
    )
    config.z_loss = 0.0
    config.on_nonfinite = "skip"
    config.mesh = common.mesh()

    config.log_every_steps = 10
    config.eval_every_steps = 2000
    config.eval_batches = 20
    config.ngram_baselines = False
    config.sample_every_steps = 2000
    config.sample = common.sample(128, prompts=("", "The"))
    config.checkpoint = common.checkpoint(2000)
    config.profile = common.profile()
    return config


def hardware(arg: str = "1.3b") -> dict:
    """What it is planned for."""
    return {"topology": {"1.3b": "v4:4x4x4", "6.7b": "v5p:4x4x4"}[arg]}
