"""FLOPs of matrix products, counted from the architecture: what a step costs before it is compiled.

Everything is global (all devices) and exact: 2 FLOPs a multiply-add, attention over every pair of
query and key that our attention computes, also those that the mask hides, and products that run
again going backward as often as they run. Not counted, here as in the compiled program's count:
what is no product of matrices (a head of one output, a head's only query while decoding, norms,
softmax, the optimiser's elementwise work), and what runs inside of kernels, which `kernels` counts
apart.

`ways` are the sizes of the mesh's axes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from gptlab.model import context, kernels, vocabulary
from gptlab.model.transformer import ModelConfig

Ways = Mapping[str, int]


class Adapters(NamedTuple):
    """What of `config.lora` counts."""

    rank: int = 0
    targets: Sequence[str] = ()

    @classmethod
    def of(cls, config: ConfigDict) -> "Adapters":
        """Of a stage's config."""
        return cls(config.lora.rank, config.lora.targets) if config.lora.rank else cls()


NO_ADAPTERS = Adapters()


def weights(config: ModelConfig, tokens: int) -> dict[str, int]:
    """FLOPs of each product with a weight matrix in one layer's forward pass."""
    return {name: 2 * tokens * i * o for name, (i, o) in config.kernel_shapes().items()}


def adapters(config: ModelConfig, lora: Adapters, tokens: int) -> tuple[dict[str, int], ...]:
    """The same of each adapted kernel's x A, and of its (x A) B."""
    sides = config.kernel_shapes()
    each = 2 * tokens * lora.rank
    inner, outer = ({name: each * sides[name][end] for name in lora.targets} for end in (0, 1))
    return inner, outer


def attention(config: ModelConfig, rows: int, pairs: int) -> int:
    """FLOPs of one of attention's products, over pairs of query and key of each row, in a layer.

    Going forward there are two: queries x keys, weights x values.
    """
    return 2 * rows * config.d_attn * pairs


def forward(
    config: ModelConfig,
    rows: int,
    length: int,
    predicted: int,
    ways: Ways,
    lora: Adapters = NO_ADAPTERS,
) -> int:
    """FLOPs of one forward pass over rows of `length` tokens.

    Args:
      config: the model.
      rows: B.
      length: T.
      predicted: tokens whose logits are computed; 0 for a scalar model.
      ways: of the mesh.
      lora: adapters, which are not merged.
    """
    layer = _layer(config, lora, rows * length) + 2 * _scores(config, rows, length, ways)
    chunks, rows_each = _chunks(config, ways)
    return config.num_layers * layer + _unembedding(config, predicted, chunks * rows_each)


def train(
    config: ModelConfig,
    rows: int,
    length: int,
    predicted: int,
    ways: Ways,
    lora: Adapters = NO_ADAPTERS,
) -> int:
    """FLOPs of forward, backward and recomputation; arguments as for `forward`.

    The backward pass has two products for each of the forward's, and one where the weights stand
    because adapters are trained (in every layer, as a loop over layers has it: unrolled as a whole,
    the first layer needs fewer). Those of a layer run again as `remat` says; a sequence that is
    split computes its scores once more in any case, and so does a loss that goes through the
    vocabulary in chunks with its logits.
    """
    products, scores = weights(config, rows * length), _scores(config, rows, length, ways)
    inner, outer = adapters(config, lora, rows * length)
    passes = 2 if lora.rank else 3
    split = context.cuts(length, ways["context"])
    # An output that was kept spares weights x values, unless what the softmax was divided by, which
    # nothing keeps, is needed too.
    out_learns = not lora.rank or "out" in lora.targets  # its gradient reads what attention gives
    again, scores_again = {
        "none": ([], 0),
        "dots": ([], 1 + out_learns),
        # No gradient reads a layer's last product.
        "full": (products.keys() - {"down"}, 2),
        "minimal": (_beside_attention(config), 2 if split else 1),
        "offload": (_beside_attention(config), 2 if split else 1),
    }[config.remat]
    layer = passes * sum(products.values()) + (6 + split + scores_again) * scores
    layer += 3 * (sum(inner.values()) + sum(outer.values()))
    layer += sum(products[name] + outer.get(name, 0) for name in again)
    layer += sum(inner.values()) if again else 0  # the gradient of B reads them all
    chunks, rows_each = _chunks(config, ways)
    # A loop of one trip is none, and what the compiler then sees twice it computes once.
    out = (passes + (chunks > 1)) * _unembedding(config, predicted, chunks * rows_each)
    return config.num_layers * layer + out


def generate(
    config: ModelConfig, rows: int, prompt: int, new_tokens: int, lora: Adapters = NO_ADAPTERS
) -> int:
    """FLOPs of a prefill and of decoding until the last slot: as if no reply ended early."""
    slots = prompt + new_tokens

    def step(queries: int, keys: int) -> int:
        layer = _layer(config, lora, rows * queries)
        if queries > 1 or config.num_heads > config.num_kv_heads:
            layer += 2 * attention(config, rows, queries * keys)
        return config.num_layers * layer + _unembedding(config, rows, config.vocab_size)

    return step(prompt, prompt) + (new_tokens - 1) * step(1, slots)


def causal_train(
    config: ModelConfig, rows: int, length: int, predicted: int, lora: Adapters = NO_ADAPTERS
) -> int:
    """FLOPs that training needs, for MFU: nothing twice, and half of the attention's square."""
    stands = sum(weights(config, rows * length).values())
    learns = _layer(config, lora, rows * length) - stands
    learns += attention(config, rows, length * length)  # two halves
    standing = config.num_layers * stands + _unembedding(config, predicted, config.vocab_size)
    return 3 * config.num_layers * learns + (2 if lora.rank else 3) * standing


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


def muon(config: ModelConfig, lora: Adapters = NO_ADAPTERS) -> int:
    """FLOPs of Muon's five Newton-Schulz iterations on every matrix of every layer that is trained.

    An iteration on m x n (m <= n) is X X^T, the square of that, and their product with X.
    """
    shapes = list(config.kernel_shapes().values())
    if lora.rank:
        sides = [side for name in lora.targets for side in config.kernel_shapes()[name]]
        shapes = [(lora.rank, side) for side in sides]
    total = 0
    for shape in shapes:
        m, n = sorted(shape)
        total += 5 * 2 * (2 * m * m * n + m**3)
    return config.num_layers * total


def _layer(config: ModelConfig, lora: Adapters, tokens: int) -> int:
    """Of a layer's products with weights and adapters, forward."""
    inner, outer = adapters(config, lora, tokens)
    parts = weights(config, tokens), inner, outer
    return sum(size for part in parts for size in part.values())


def _scores(config: ModelConfig, rows: int, length: int, ways: Ways) -> int:
    """Of one of attention's products without a cache; a kernel's are no products of the program."""
    if config.attention in kernels.PLATFORMS:
        return 0
    return attention(config, rows, context.pairs(length, ways["context"]))


def _beside_attention(config: ModelConfig) -> list[str]:
    """What runs again where all is kept that attention reads and gives, a layer's last excepted."""
    names = ["out", "up"] + ["gate"] * ("gate" in config.kernel_shapes())
    if config.qk_norm != "none":  # its gradient reads what was normalised
        names += ["query", "key"]
    return names


def _unembedding(config: ModelConfig, tokens: int, rows: int) -> int:
    """Of the product with so many rows of the vocabulary, forward."""
    return 2 * tokens * config.d_model * rows


def _chunks(config: ModelConfig, ways: Ways) -> tuple[int, int]:
    """(chunks of a device, rows of the vocabulary in one, of all devices) that the loss takes."""
    if not config.loss_chunk:
        return 1, config.vocab_size
    chunks, rows = vocabulary.cut(config.vocab_size // ways["tensor"], config.loss_chunk)
    return chunks, ways["tensor"] * rows
