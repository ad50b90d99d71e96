"""Supervised fine-tuning as in InstructGPT (arXiv 2203.02155, appendix C.1), for a small model.

    python -m gptlab.sft --config=configs/sft.py --workdir=runs/sft \
        --config.inputs.init=runs/pretrain --config.inputs.tokens=runs/tokens \
        --config.inputs.vocabulary=runs/vocabulary

From InstructGPT: residual dropout 0.2, cosine to 10% without warm-up, batch 32 of dialogues, the
checkpoint chosen by held-out loss (it overfits after the first epochs). A model of a few million
parameters is given a learning rate 30 times as large and 3 epochs instead of 16.

A dialogue that is longer than a row is split. InstructGPT drops long prompts; of the public
dialogues that would leave 39%, which hold 4% of the tokens (--config.data.overlong=drop). Three
epochs of all 3.5M tokens take a quarter of an hour at the quickstart's 10.7k tokens/s (1.1M
parameters, bfloat16, no dropout); they were not run to their end yet. The quickstart takes held-out
replies from a perplexity of 129 to 57 in a fifth of an epoch.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Takes no argument."""
    if arg is not None:
        raise ValueError(f"configs/sft.py takes no argument, got {arg!r}")
    config = ConfigDict()
    config.seed = 0
    config.inputs = common.inputs("init", "tokens", "vocabulary")
    # The name is of a task or a mixture of the tokens; an overlong dialogue is dropped or split.
    # A reply of more than max_reply_tokens, its end-of-turn token included, is only context in
    # training; 0 is off.
    config.data = {
        "name": "dialogues", "seq_len": 256, "overlong": "split", "max_reply_tokens": 0,
    }  # fmt: skip
    config.loss_on = "assistant"
    config.compute = common.compute(dropout=0.2)
    config.lora = common.lora()

    config.batch_size = 32
    config.accumulation_steps = 1
    config.update(common.duration(total_epochs=3.0))
    config.optimizer = common.adamw(lr=3e-4, weight_decay=0.1)
    config.on_nonfinite = "stop"
    config.mesh = common.mesh()

    config.log_every_steps = 10
    config.eval_every_steps = 50
    config.eval_batches = 20
    config.sample_every_steps = 100
    config.sample = common.sample(64, prompts=("hi, how are you?", "do you like music?"))
    config.checkpoint = common.checkpoint(50)
    config.profile = common.profile()
    return config
