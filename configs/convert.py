"""Models in and out.

    python -m gptlab.convert --config=configs/convert.py --workdir=runs/smollm2 \
        --config.source=SmolLM2-135M-Instruct

    python -m gptlab.convert --config=configs/convert.py:export --workdir=runs/exported \
        --config.inputs.model=runs/ppo --config.inputs.vocabulary=runs/vocabulary

'import' takes a folder of Hugging Face's (config.json, safetensors, tokenizer) or a .gguf file.
'export' writes runs/exported/hf for transformers, vLLM and whatever else reads that.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

ARGS = ("import", "export")


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: 'import' (also without one) or 'export'."""
    config = ConfigDict()
    config.mode = arg or "import"
    if config.mode == "import":
        config.source = placeholder(str)
        # A shorter window than the checkpoint's, where positions are rotary. Checkpoints whose
        # layers see a sliding window only need it; for others it saves memory of the KV cache.
        config.max_len = placeholder(int)
        config.checkpoint = common.checkpoint(1, keep=1, best_metric=None)
    elif config.mode == "export":
        config.inputs = common.inputs(
            "model",  # any stage with a language model, or a reward model
            "vocabulary",  # optional: its tokenizer's files go along
        )
        config.max_file_bytes = 5_000_000_000
    else:
        raise ValueError(f"configs/convert.py takes 'import' or 'export', got {arg!r}")
    config.mesh = common.mesh()
    return config
