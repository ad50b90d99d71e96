"""A vocabulary of 2,048 tokens, for a model of about 1M parameters; 15 s for 25 MB of text.

    python -m gptlab.train_tokenizer --config=configs/train_tokenizer.py \
        --config.inputs.corpus=runs/clean --workdir=runs/vocabulary

To expect: 3.3 bytes a token on the quickstart's corpus, held out as in training.
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
