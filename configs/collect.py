"""K replies of a policy to each prompt, for ranking.

    python -m gptlab.collect --config=configs/collect.py --workdir=runs/collect \
        --config.inputs.policy=runs/sft --config.inputs.prompts=runs/clean \
        --config.inputs.vocabulary=runs/vocabulary

1,024 training and 256 validation prompts, 4 replies each, at temperature 1. InstructGPT's labellers
ranked 4 to 9 replies (arXiv 2203.02155). The quickstart's 1.1M parameters take 45 seconds on two
CPU cores for 7,400 replies of at most 48 tokens. Nearly all replies should differ
(`duplicate_rate`), and end by themselves (`finished_rate`) if SFT learnt from short ones.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is unused: everything varies by one key."""
    if arg:
        raise ValueError(f"configs/collect.py takes no argument, got {arg!r}")
    config = ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs("policy", "prompts", "vocabulary"),
            "compute": common.compute(unroll=4),
            "data": {"prompt_len": 64},
            "num_replies": 4,
            # None: all there are.
            "num_prompts": {"train": placeholder(int), "validation": placeholder(int)},
            "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 32},
            "batch_size": 32,
            "mesh": common.mesh(),
        }
    )
    config.num_prompts.train, config.num_prompts.validation = 1024, 256
    return config


def sweep(add) -> None:
    """Does a reward model learn more from more replies a prompt, at the same number of replies?"""
    for num_replies in (2, 4, 8):
        add(num_replies=num_replies, **{"num_prompts.train": 4096 // num_replies})
