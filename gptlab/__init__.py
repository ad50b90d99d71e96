"""gptlab: the training of ChatGPT, from raw documents to a chat model, as JAX research code."""

__version__ = "0.1.0"
