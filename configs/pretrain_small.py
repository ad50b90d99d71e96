"""About 3M parameters on two CPU cores, made for 90 minutes at most: to beat the trigram.

    python -m gptlab.pretrain --config=configs/pretrain_small.py --workdir=runs/pretrain \
        --config.inputs.tokens=runs/tokens --config.inputs.vocabulary=runs/vocabulary

6.1M tokens, 1.4 passes over the quickstart's corpus. With seed 0 it took 33 minutes and 3.9 GiB
and reached 1.602 bits a byte (trigram: 1.712; EXPERIMENTS.md). Where the CPU has no AMX, bfloat16
is slower than float32: --config.compute.dtype=float32 there.

`configs/pretrain_small.py:init` declares no model: training goes on from config.inputs.init, as
configs/pretrain.py says.
"""

from ml_collections import ConfigDict

from configs import common

ARGS = ("init",)


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is 'init' for no model of its own."""
    if arg not in (None, *ARGS):
        raise ValueError(f"configs/pretrain_small.py takes no argument or 'init', got {arg!r}")
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs("init", "tokens", "vocabulary")
    config.data = {"name": "pretrain", "seq_len": 256}
    if arg != "init":
        config.model = common.model(
            "quickstart", num_layers=6, d_model=192, num_heads=3, num_kv_heads=3, head_dim=64,
            d_ff=512,
        )  # fmt: skip
    config.compute = common.compute(dtype="bfloat16", unroll=6)
    config.lora = common.lora()  # only beside inputs.init

    config.batch_size = 16
    config.accumulation_steps = 1
    config.update(common.duration(total_steps=1500))
    config.optimizer = common.muon(0.02, adam_lr=0.01, warmup_steps=50, final_fraction=0.05)
    config.z_loss = 0.0
    config.on_nonfinite = "stop"
    config.mesh = common.mesh()

    config.log_every_steps = 20
    config.eval_every_steps = 250
    config.eval_batches = 40
    config.ngram_baselines = True
    config.sample_every_steps = 500
    config.sample = common.sample(64, prompts=("", "i think"))
    config.checkpoint = common.checkpoint(250)
    config.profile = common.profile()
    return config
