"""Supervised fine-tuning of Llama 3 at 8B and 70B: all parameters, or adapters alone.

    python -m gptlab.plan --config=configs/sft_llama3.py:8b

Rows of 2,048 tokens, 64 of them a step, learning rate 1e-5 (arXiv 2407.21783, section 4.1.3, where
SFT of the largest model has that rate and 8.5k to 9k steps). Starts from an imported checkpoint and
is trained as configs/sft.py says; it was never run. '8b_lora' and '70b_lora' train adapters of rank
16 beside every kernel (model/lora.py) at ten times that rate.
"""

from ml_collections import ConfigDict

from configs import common

TOPOLOGIES = {
    "8b": "v5e:4x4",
    "70b": "v5p:4x4x8",
    "8b_lora": "v5e:2x4",
    "70b_lora": "v6e:4x8",
}


def get_config(arg: str = "8b") -> ConfigDict:
    """The size, and whether adapters alone are trained."""
    if arg not in TOPOLOGIES:
        raise ValueError(f"configs/sft_llama3.py takes one of {tuple(TOPOLOGIES)}, got {arg!r}")
    size, _, with_lora = arg.partition("_")
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs("init", "tokens", "vocabulary")
    config.data = {
        "name": "dialogues", "seq_len": 2048, "overlong": "split", "max_reply_tokens": 0,
    }  # fmt: skip
    config.loss_on = "assistant"
    config.compute = common.compute(dtype="bfloat16", remat="full")
    config.lora = common.llama_lora() if with_lora else common.lora()

    config.batch_size = 64
    config.accumulation_steps = 4 if size == "8b" else 1
    config.update(common.duration(total_epochs=2.0))
    config.optimizer = common.adamw(lr=1e-4 if with_lora else 1e-5, weight_decay=0.1)
    config.on_nonfinite = "stop"
    config.mesh = common.mesh(tensor=1 if size == "8b" else 2)

    config.log_every_steps = 10
    config.eval_every_steps = 200
    config.eval_batches = 20
    config.sample_every_steps = 200
    config.sample = common.sample(256, prompts=("hi, how are you?", "do you like music?"))
    config.checkpoint = common.checkpoint(200)
    config.profile = common.profile()
    return config


def hardware(arg: str = "8b") -> dict:
    """What it is planned for, and what inputs.init is."""
    return {
        "topology": TOPOLOGIES[arg],
        "model": common.model(f"llama3_{arg.partition('_')[0]}"),
    }
