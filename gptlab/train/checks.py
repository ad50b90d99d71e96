"""Do a stage's inputs go together? Asked before anything is compiled."""

from gptlab.data.tokenizer import Tokenizer
from gptlab.model.transformer import ModelConfig
from gptlab.run.errors import UserError

_MAX_UNUSED_ROWS = 1023  # embeddings are rounded up to a multiple of 64, 128, ... 1024


def check_declared_model(model_config: ModelConfig, tokenizer: Tokenizer, seq_len: int) -> None:
    """UserError unless the model that config.model declares fits the tokenizer and seq_len."""
    if not _has_rows(model_config, tokenizer):
        raise UserError(
            f"the model has vocab_size={model_config.vocab_size} and config.inputs.vocabulary has "
            f"{tokenizer.vocab_size} tokens: set config.model.vocab_size={tokenizer.vocab_size}"
        )
    _check_window(model_config, seq_len, "or raise config.model.max_len")


def check_fits(model_config: ModelConfig, tokenizer: Tokenizer, seq_len: int) -> None:
    """UserError unless the model of config.inputs.init fits the tokenizer and seq_len."""
    check_vocabulary(model_config, tokenizer, "config.inputs.init")
    _check_window(model_config, seq_len, "which its pretraining fixed")


def _has_rows(model_config: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Whether a model has a row for each token, and no more than its makers may have rounded up."""
    unused = model_config.vocab_size - tokenizer.vocab_size
    return 0 <= unused <= (_MAX_UNUSED_ROWS if tokenizer.rounds_up else 0)


def _check_window(model_config: ModelConfig, seq_len: int, otherwise: str) -> None:
    if not 1 <= seq_len <= model_config.max_len:
        raise UserError(
            f"config.data.seq_len={seq_len} does not fit the model's window of "
            f"{model_config.max_len} tokens (max_len): set it to 1..{model_config.max_len}, "
            f"{otherwise}"
        )


def check_vocabulary(model_config: ModelConfig, tokenizer: Tokenizer, name: str) -> None:
    """UserError unless a model that was trained already, `name`, has the tokenizer's vocabulary.

    No gather refuses an id beyond the rows of an embedding: what came of it would be rubbish.
    """
    if not _has_rows(model_config, tokenizer):
        raise UserError(
            f"{name} has a vocabulary of {model_config.vocab_size} tokens, "
            f"config.inputs.vocabulary of {tokenizer.vocab_size}: give the one it was trained with"
        )
