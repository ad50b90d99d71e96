"""GPT-2 small (124M) as nanoGPT trains it: 0.49M tokens a batch, 600k steps.

    python -m gptlab.pretrain --config=configs/pretrain.py --workdir=runs/pretrain \
        --config.inputs.tokens=runs/tokens --config.inputs.vocabulary=runs/vocabulary

For a pod or a GPU cluster; nanoGPT takes 4 days on 8 A100 and reaches a held-out loss of 2.85 on
OpenWebText. The vocabulary has 50,304 tokens (train_tokenizer with that vocab_size).

`configs/pretrain.py:init` declares no model: training goes on from that of config.inputs.init, a
pretrained or an imported one, on tokens of its own vocabulary. The duration and the rate are still
those for random weights, so give your own; it was never run with these.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` names another preset of model/presets.py, gpt2_350m say; or 'init', for none."""
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs("init", "tokens", "vocabulary")
    config.data = {"name": "pretrain", "seq_len": 1024}  # a task or a mixture of the tokens
    if arg != "init":
        # 50,304 = 393 x 128 and not GPT-2's 50,257: a multiple of what the hardware multiplies by.
        config.model = common.model(arg or "gpt2_124m", vocab_size=50304)
    config.compute = common.compute(dtype="bfloat16", remat="dots")
    config.lora = common.lora()  # only beside inputs.init

    config.batch_size = 480
    config.accumulation_steps = 1
    config.update(common.duration(total_steps=600_000))
    config.optimizer = common.adamw(lr=6e-4, warmup_steps=2000, final_fraction=0.1)
    config.z_loss = 0.0
    config.on_nonfinite = "skip"
    config.mesh = common.mesh()

    config.log_every_steps = 10
    config.eval_every_steps = 2000
    config.eval_batches = 20
    config.ngram_baselines = False  # for small corpora: all grams are counted in memory
    config.sample_every_steps = 2000
    config.sample = common.sample(128, prompts=("", "The"))
    config.checkpoint = common.checkpoint(2000)
    config.profile = common.profile()
    return config


def hardware(arg: str | None = None) -> dict:
    """What it is planned for, and what inputs.init is."""
    if arg == "init":
        return {"topology": "v5e:4x8", "model": common.model("gpt2_124m", vocab_size=50304)}
    return {"topology": "v5e:4x8" if arg in (None, "gpt2_124m") else "v5p:2x4x4"}
