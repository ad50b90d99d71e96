"""FLOPs of matrix products, counted from the architecture: what a step costs before it is compiled.

Everything is global (all devices) and exact: 2 FLOPs a multiply-add, attention over every pair of
query and key that our attention computes, also those that the mask hides, and products that run
again going backward as often as they run. Not counted, here as in the compiled program's count:
what is no product of matrices (a head of one output, norms, softmax, the optimiser's elementwise
work), and what runs inside of kernels, which `kernels` counts apart.

`ways` are the sizes of the mesh's axes.
"""

from collections.abc import Mapping

from gptlab.model import context, kernels, vocabulary
from gptlab.model.transformer import ModelConfig

Ways = Mapping[str, int]


def weights(config: ModelConfig, tokens: int) -> dict[str, int]:
    """FLOPs of each product with a weight matrix in one layer's forward pass."""
    d, a, kv, f = config.d_model, config.d_attn, config.d_kv, config.d_ff
    widths = {"query": d * a, "key": d * kv, "value": d * kv, "out": a * d, "up": d * f}
    if config.activation == "swiglu":
        widths["gate"] = d * f
    widths["down"] = f * d
    return {name: 2 * tokens * size for name, size in widths.items()}


def attention(config: ModelConfig, rows: int, pairs: int) -> int:
    """FLOPs of one of attention's products, over pairs of query and key of each row, in a layer.

    Going forward there are two: queries x keys, weights x values.
    """
    return 2 * rows * config.d_attn * pairs


def forward(config: ModelConfig, rows: int, length: int, predicted: int, ways: Ways) -> int:
    """FLOPs of one forward pass over rows of `length` tokens.

    Args:
      config: the model.
      rows: B.
      length: T.
      predicted: tokens whose logits are computed; 0 for a scalar model.
      ways: of the mesh.
    """
    layer = sum(weights(config, rows * length).values()) + 2 * _scores(config, rows, length, ways)
    chunks, rows_each = _chunks(config, ways)
    return config.num_layers * layer + _unembedding(config, predicted, chunks * rows_each)


def train(config: ModelConfig, rows: int, length: int, predicted: int, ways: Ways) -> int:
    """FLOPs of forward, backward and recomputation; arguments as for `forward`.

    The backward pass has two products for each of the forward's. Those of a layer run again as
    `remat` says; a sequence that is split computes its scores once more in any case, and so does
    a loss that goes through the vocabulary in chunks with its logits.
    """
    products, scores = weights(config, rows * length), _scores(config, rows, length, ways)
    split = context.cuts(length, ways["context"])
    # An output that was kept spares weights x values, unless what the softmax was divided by, which
    # nothing keeps, is needed too.
    again, scores_again = {
        "none": (0, 0),
        "dots": (0, 2),
        # No gradient reads a layer's last product.
        "full": (sum(products.values()) - products["down"], 2),
        "minimal": (_beside_attention(config, products), 2 if split else 1),
        "offload": (_beside_attention(config, products), 2 if split else 1),
    }[config.remat]
    layer = 3 * sum(products.values()) + again + (6 + split + scores_again) * scores
    chunks, rows_each = _chunks(config, ways)
    # A loop of one trip is none, and what the compiler then sees twice it computes once.
    out = (4 if chunks > 1 else 3) * _unembedding(config, predicted, chunks * rows_each)
    return config.num_layers * layer + out


def generate(config: ModelConfig, rows: int, prompt: int, new_tokens: int) -> int:
    """FLOPs of a prefill and of decoding until the last slot: as if no reply ended early."""
    slots = prompt + new_tokens

    def step(queries: int, keys: int) -> int:
        layer = sum(weights(config, rows * queries).values())
        layer += 2 * attention(config, rows, queries * keys)
        return config.num_layers * layer + _unembedding(config, rows, config.vocab_size)

    return step(prompt, prompt) + (new_tokens - 1) * step(1, slots)


def causal_train(config: ModelConfig, rows: int, length: int, predicted: int) -> int:
    """FLOPs that training needs, for MFU: nothing twice, and half of the attention's square."""
    layer = sum(weights(config, rows * length).values())
    layer += attention(config, rows, length * length)  # two halves
    return 3 * (config.num_layers * layer + _unembedding(config, predicted, config.vocab_size))


def splash(config: ModelConfig, rows: int, length: int, *, backward: bool) -> int:
    """FLOPs inside of splash attention's kernels in all layers, which say nothing of themselves.

    They leave out blocks that causality hides as a whole. Going backward, one kernel makes the
    gradient of queries with three products and one those of keys and values with four; everything
    but remat='none' runs the forward kernel again.
    """
    if config.attention != "splash":
        return 0
    products = 2 + backward * (7 + 2 * (config.remat != "none"))
    return config.num_layers * products * attention(config, rows, kernels.splash_pairs(length))


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


def _scores(config: ModelConfig, rows: int, length: int, ways: Ways) -> int:
    """Of one of attention's products without a cache; a kernel's are no products of the program."""
    if config.attention in kernels.PLATFORMS:
        return 0
    return attention(config, rows, context.pairs(length, ways["context"]))


def _beside_attention(config: ModelConfig, products: Mapping[str, int]) -> int:
    """What runs again where all is kept that attention reads and gives, a layer's last excepted."""
    names = ["out", "up"] + ["gate"] * ("gate" in products)
    if config.qk_norm != "none":  # its gradient reads what was normalised
        names += ["query", "key"]
    return sum(products[name] for name in names)


def _unembedding(config: ModelConfig, tokens: int, rows: int) -> int:
    """Of the product with so many rows of the vocabulary, forward."""
    return 2 * tokens * config.d_model * rows


def _chunks(config: ModelConfig, ways: Ways) -> tuple[int, int]:
    """(chunks of a device, rows of the vocabulary in one, of all devices) that the loss takes."""
    if not config.loss_chunk:
        return 1, config.vocab_size
    chunks, rows = vocabulary.cut(config.vocab_size // ways["tensor"], config.loss_chunk)
    return chunks, ways["tensor"] * rows
