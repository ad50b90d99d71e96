"""InstructGPT's supervised fine-tuning at 1.3B and 6B (arXiv 2203.02155, appendix C.1).

    python -m gptlab.plan --config=configs/sft_instructgpt.py:1.3b

From there: residual dropout 0.2, 16 epochs, cosine to 10% without warm-up, learning rate 9.65e-6,
batches of 32, the checkpoint chosen by held-out loss. Starts from configs/pretrain_instructgpt.py
and is trained as configs/sft.py says; it was never run.
"""

from ml_collections import ConfigDict

from configs import common

ARGS = ("1.3b", "6.7b")


def get_config(arg: str = "1.3b") -> ConfigDict:
    """The size."""
    if arg not in ARGS:
        raise ValueError(f"configs/sft_instructgpt.py takes one of {ARGS}, got {arg!r}")
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs("init", "tokens", "vocabulary")
    config.data = {
        "name": "dialogues", "seq_len": 2048, "overlong": "split", "max_reply_tokens": 0,
    }  # fmt: skip
    config.loss_on = "assistant"
    config.compute = common.compute(dtype="bfloat16", remat="full", dropout=0.2)

    config.batch_size = 32
    config.accumulation_steps = 1
    config.update(common.duration(total_epochs=16.0))
    config.optimizer = common.adamw(lr=9.65e-6, weight_decay=0.1)
    config.on_nonfinite = "stop"
    config.mesh = common.mesh()

    config.log_every_steps = 10
    config.eval_every_steps = 200
    config.eval_batches = 20
    config.sample_every_steps = 200
    config.sample = common.sample(256, prompts=("hi, how are you?", "do you like music?"))
    config.checkpoint = common.checkpoint(200)
    config.profile = common.profile()
    return config


def hardware(arg: str = "1.3b") -> dict:
    """What it is planned for, and what inputs.init is."""
    return {
        "topology": {"1.3b": "v5e:4x4", "6.7b": "v4:2x2x4"}[arg],
        "model": common.model(f"gpt3_{arg}", vocab_size=50304),
    }
