"""InstructGPT's PPO-ptx at 1.3B and 6B, paid by a reward model of 6B (arXiv 2203.02155, appendix
C.4).

    python -m gptlab.plan --config=configs/ppo_instructgpt.py:1.3b

From there: 256k episodes, 512 a step, one inner epoch of 8 minibatches, prompts and replies of up
to 1,024 tokens, fixed KL coefficient 0.02, 8 times as many pretraining rows as episodes, the value
function of 6B starts as the reward model. Not as there: what configs/ppo.py:instructgpt names. It
was never run.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

ARGS = ("1.3b", "6.7b")


def get_config(arg: str = "1.3b") -> ConfigDict:
    """The size of the policy."""
    if arg not in ARGS:
        raise ValueError(f"configs/ppo_instructgpt.py takes one of {ARGS}, got {arg!r}")
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs("init", "reference", "reward", "prompts", "vocabulary", "tokens")
    config.compute = common.compute(dtype="bfloat16", remat="full")
    config.lora = common.lora()
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
    for name in ("optimizer", "value_optimizer"):
        config[name] = common.adamw(9e-6, schedule="constant", warmup_steps=80, weight_decay=0.0)
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
    config.ptx = {"coef": 1.0, "name": "pretrain", "batch_size": 512, "seq_len": 1024}
    config.offload = False
    # Decoding reads all weights at every token: over `tensor`, a device reads a fourth of them.
    config.mesh = common.mesh(tensor=4)

    config.log_every_steps = 1
    config.eval_every_steps = 20
    config.eval_batches = 4
    config.sample_every_steps = 10
    config.checkpoint = common.checkpoint(every_steps=20, best_metric=None)
    config.profile = common.profile()
    config.on_nonfinite = "stop"
    return config


def hardware(arg: str = "1.3b") -> dict:
    """What it is planned for, and what inputs.init and inputs.reward are."""
    return {
        "topology": "v5p:4x4x4",
        "model": common.model(f"gpt3_{arg}", vocab_size=50304),
        "reward_model": common.model("gpt3_6.7b", vocab_size=50304),
    }
