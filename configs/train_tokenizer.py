"""A vocabulary of 2,048 tokens, for a model of about 1M parameters; half a minute on 12 MB.

    python -m gptlab.train_tokenizer --config=configs/train_tokenizer.py \\
        --config.inputs.corpus=runs/corpus --workdir=runs/vocabulary
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is unused: everything varies by one key."""
    if arg:
        raise ValueError(f"configs/train_tokenizer.py takes no argument, got {arg!r}")
    config = ConfigDict()
    config.inputs = ConfigDict(dict(corpus=placeholder(str)))
    config.vocab_size = 2048
    config.model_type = "bpe"  # or 'unigram'
    config.character_coverage = 0.9995
    config.max_sentences = 0  # stretches of text drawn from a large corpus; 0: all
    config.num_threads = 1  # part of the result with unigram
    config.seed = 0
    return config
