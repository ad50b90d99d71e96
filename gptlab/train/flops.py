"""FLOPs of matrix products, counted from the architecture: what a step costs before it is compiled.

Everything is global (all devices) and exact: 2 FLOPs a multiply-add, attention in full (every query
meets every key, also those that the mask hides, as our attention computes it), rematerialised
products as often as they run. Not counted, here as in the compiled program's count: what is no
product of matrices (a head of one output, norms, softmax, the optimiser's elementwise work).
"""

from gptlab.model.transformer import ModelConfig


def weights(config: ModelConfig, tokens: int) -> dict[str, int]:
    """FLOPs of each product with a weight matrix in one layer's forward pass."""
    d, a, kv, f = config.d_model, config.d_attn, config.d_kv, config.d_ff
    widths = {"query": d * a, "key": d * kv, "value": d * kv, "out": a * d, "up": d * f}
    if config.activation == "swiglu":
        widths["gate"] = d * f
    widths["down"] = f * d
    return {name: 2 * tokens * size for name, size in widths.items()}


def attention(config: ModelConfig, rows: int, queries: int, keys: int) -> int:
    """FLOPs of queries x keys and of weights x values in one layer's forward pass, in full."""
    return 2 * 2 * rows * config.d_attn * queries * keys


def unembedding(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the product with the vocabulary, forward."""
    return 2 * tokens * config.d_model * config.vocab_size


def forward(config: ModelConfig, rows: int, length: int, predicted: int) -> int:
    """FLOPs of one forward pass over rows of `length` tokens.

    Args:
      config: the model.
      rows: B.
      length: T.
      predicted: tokens whose logits are computed; 0 for a scalar model.
    """
    layer = sum(weights(config, rows * length).values()) + attention(config, rows, length, length)
    return config.num_layers * layer + unembedding(config, predicted)


def train(config: ModelConfig, rows: int, length: int, predicted: int) -> int:
    """FLOPs of forward, backward and recomputation.

    The backward pass has two products for each of the forward's. 'full' runs a layer's forward once
    more, but for the last product, which no gradient reads; 'dots' keeps the products of weights
    and runs attention once more.
    """
    products = weights(config, rows * length)
    full = attention(config, rows, length, length)
    again = {
        "none": 0,
        "dots": full,
        "full": full + sum(products.values()) - products["down"],
    }[config.remat]
    return 3 * forward(config, rows, length, predicted) + config.num_layers * again


def generate(config: ModelConfig, rows: int, prompt: int, new_tokens: int) -> int:
    """FLOPs of a prefill and of decoding until the last slot: as if no reply ended early."""
    slots = prompt + new_tokens
    first = forward(config, rows, prompt, rows)
    layer = sum(weights(config, rows).values()) + attention(config, rows, 1, slots)
    step = config.num_layers * layer + unembedding(config, rows)
    return first + (new_tokens - 1) * step


def causal_train(config: ModelConfig, rows: int, length: int, predicted: int) -> int:
    """FLOPs that training needs, for MFU: no recomputation, and half of the attention's square."""
    saved = config.num_layers * attention(config, rows, length, length) // 2
    return 3 * (forward(config, rows, length, predicted) - saved)


def muon(config: ModelConfig) -> int:
    """FLOPs of Muon's five Newton-Schulz iterations on every matrix of every layer.

    An iteration on m x n (m <= n) is X X^T, the square of that, and their product with X.
    """
    d, a, kv, f = config.d_model, config.d_attn, config.d_kv, config.d_ff
    shapes = [(d, a), (d, kv), (d, kv), (a, d), (d, f), (f, d)]
    shapes += [(d, f)] if config.activation == "swiglu" else []
    total = 0
    for shape in shapes:
        m, n = sorted(shape)
        total += 5 * 2 * (2 * m * m * n + m**3)
    return config.num_layers * total
