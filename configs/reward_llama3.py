"""A reward model on Llama 3 at 8B and 70B: all parameters, or adapters and the head alone.

    python -m gptlab.plan --config=configs/reward_llama3.py:8b

One epoch over 64 prompts a step with up to 4 ranked replies each, as InstructGPT's
(configs/reward_instructgpt.py). Starts from configs/sft_llama3.py and is trained as
configs/reward.py says; it was never run. '8b_lora' and '70b_lora' train adapters of rank 16
(model/lora.py) at ten times the rate.
"""

from ml_collections import ConfigDict

from configs import common

TOPOLOGIES = {
    "8b": "v6e:4x8",
    "70b": "v5p:4x4x8",
    "8b_lora": "v5e:4x4",
    "70b_lora": "v5p:4x4x4",
}


def get_config(arg: str = "8b") -> ConfigDict:
    """The size, and whether adapters alone are trained."""
    if arg not in TOPOLOGIES:
        raise ValueError(f"configs/reward_llama3.py takes one of {tuple(TOPOLOGIES)}, got {arg!r}")
    size, _, with_lora = arg.partition("_")
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs(
        "init", "vocabulary", "comparisons", "comparisons_2", "comparisons_3", "comparisons_4",
        "comparisons_feedback", "demonstrations",
    )  # fmt: skip
    config.data = {
        "seq_len": 2048, "prompt_len": 1024, "max_candidates": 4, "num_folds": 1, "folds": (0,),
    }  # fmt: skip
    config.compute = common.compute(dtype="bfloat16", remat="full")
    config.lora = common.llama_lora() if with_lora else common.lora()

    config.batch_size = 64
    config.accumulation_steps = {"8b": 2, "8b_lora": 4}.get(arg, 1)
    config.update(common.duration(total_epochs=1.0))
    config.optimizer = common.adamw(lr=9e-5 if with_lora else 9e-6)
    config.on_nonfinite = "stop"
    config.mesh = common.mesh(tensor=1 if size == "8b" else 2)
    config.normalise = "samples"
    config.normalise_examples = 512

    config.log_every_steps = 5
    config.eval_every_steps = 50
    config.eval_batches = 8
    config.checkpoint = common.checkpoint(50)
    config.profile = common.profile()
    return config


def hardware(arg: str = "8b") -> dict:
    """What it is planned for, and what inputs.init is."""
    return {
        "topology": TOPOLOGIES[arg],
        "model": common.model(f"llama3_{arg.partition('_')[0]}"),
    }
