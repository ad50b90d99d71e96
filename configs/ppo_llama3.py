"""PPO on Llama 3 at 8B and 70B: all parameters, or adapters; all models of one size.

    python -m gptlab.plan --config=configs/ppo_llama3.py:8b

InstructGPT's recipe (configs/ppo_instructgpt.py) without pretraining rows: of a Llama there is no
pretraining corpus to mix in. Learning rate 1e-6 for the policy, 5e-6 for the critic. Starts from
configs/sft_llama3.py and configs/reward_llama3.py; it was never run.

'8b_lora' and '70b_lora' train adapters of rank 16 (model/lora.py) at ten times these rates:
reference and reward model then stand in the weights of policy and critic, which makes two models in
bfloat16 instead of four in float32.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

TOPOLOGIES = {
    "8b": "v5p:4x4x8",
    "70b": "v5p:4x4x8",
    "8b_lora": "v5p:2x2x4",
    "70b_lora": "v5p:4x4x4",
}


def get_config(arg: str = "8b") -> ConfigDict:
    """The size, and whether adapters alone are trained."""
    if arg not in TOPOLOGIES:
        raise ValueError(f"configs/ppo_llama3.py takes one of {tuple(TOPOLOGIES)}, got {arg!r}")
    size, _, with_lora = arg.partition("_")
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs("init", "reference", "reward", "prompts", "vocabulary", "tokens")
    config.compute = common.compute(dtype="bfloat16", remat="full")
    config.lora = common.llama_lora() if with_lora else common.lora()
    config.data = {"prompt_len": 1024}
    config.sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 1024}
    config.total_steps = placeholder(int)
    config.total_episodes = placeholder(int)
    config.total_episodes = 256_000
    config.batch_size = 512
    config.samples_per_prompt = 1
    config.minibatches = 8
    config.epochs = 1
    config.accumulation_steps = 1
    for name, lr in (("optimizer", 1e-6), ("value_optimizer", 5e-6)):
        lr = 10 * lr if with_lora else lr
        config[name] = common.adamw(lr, schedule="constant", warmup_steps=80, weight_decay=0.0)
    config.policy_clip = config.value_clip = 0.2
    config.vf_coef = 1.0
    config.reward = {"kind": "model", "scorer": {"name": "word_fraction", "words": ("you",)}}
    config.kl = {"kind": "fixed", "coef": 0.02, "target": 6.0, "horizon": 10_000}
    config.no_eos_score = placeholder(float)
    config.no_eos_score = -1.0
    config.score_position = "last"
    config.whiten_rewards = False
    config.advantage = "gae"
    config.gamma, config.lam = 1.0, 0.95
    config.whiten_advantages = "minibatch"
    config.ptx = {"coef": 0.0, "name": "pretrain", "batch_size": 512, "seq_len": 1024}
    config.offload = False
    # Decoding reads all weights at every token: over `tensor`, a device reads a part of them.
    config.mesh = common.mesh(tensor=4 if size == "8b" else 8)

    config.log_every_steps = 1
    config.eval_every_steps = 20
    config.eval_batches = 4
    config.sample_every_steps = 10
    config.checkpoint = common.checkpoint(every_steps=20, best_metric=None)
    config.profile = common.profile()
    config.on_nonfinite = "stop"
    return config


def hardware(arg: str = "8b") -> dict:
    """What it is planned for, and what inputs.init and inputs.reward are."""
    return {"topology": TOPOLOGIES[arg], "model": common.model(f"llama3_{arg.partition('_')[0]}")}
