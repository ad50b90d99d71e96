"""nanoGPT's CPU recipe in plain PyTorch: what benchmarks/nanogpt.py compares itself with.

    python benchmarks/nanogpt_torch.py --text=PATH/TO/input.txt

Needs PyTorch and NumPy only, so it runs in any Python. It takes its orders from standard input, one
a line, so that both sides can work in turns: {"train": N} is answered with {"seconds": of N steps},
{"evaluate": true} with {"held_out_loss": nats a character}. Batches, schedule and held-out windows
are those of benchmarks/nanogpt.py, drawn alike from the same seed.
"""

import argparse
import json
import math
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

LAYERS, HEADS, WIDTH, LENGTH, BATCH = 4, 4, 128, 64, 12
RATE, FINAL, WARM_UP, DECAY, BETAS = 1e-3, 1e-4, 100, 0.1, (0.9, 0.99)


class Layer(nn.Module):
    """Pre-norm attention and GELU layer, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        rows, length, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(rows, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """GPT-2's architecture with one matrix for embedding and unembedding."""

    def __init__(self, characters: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, x in self.named_parameters():
            if x.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(x, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of targets [B, T] after tokens [B, T]."""
        x = self.embedding(tokens) + self.positions.weight
        for layer in self.layers:
            x = layer(x)
        logits = functional.linear(self.norm(x), self.embedding.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Trainer:
    """Model, optimiser and the order of batches."""

    def __init__(self, text: str, steps: int):
        characters = sorted(set(text))
        ids = np.searchsorted(np.array(characters), np.array(list(text)))
        cut = int(0.9 * len(ids))
        self.train_ids, self.held_out_ids = ids[:cut], ids[cut:]
        torch.manual_seed(0)
        self.model = Model(len(characters))
        matrices = [x for x in self.model.parameters() if x.ndim == 2]
        gains = [x for x in self.model.parameters() if x.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": DECAY}, {"params": gains, "weight_decay": 0.0}],
            lr=RATE, betas=BETAS,
        )  # fmt: skip
        self.rng, self.step, self.steps = np.random.default_rng(0), 0, steps

    def rate(self) -> float:
        """Linear warm-up, then a cosine down to FINAL at the last step."""
        update, warm_up = self.step + 1, min(WARM_UP, self.steps)
        if update <= warm_up:
            return RATE * update / warm_up
        share = (update - warm_up) / (self.steps - warm_up)
        return FINAL + (RATE - FINAL) * 0.5 * (1 + math.cos(math.pi * share))

    def train(self, steps: int) -> float:
        """Makes some steps; returns the seconds they took."""
        start = time.perf_counter()
        for _ in range(steps):
            starts = self.rng.integers(0, len(self.train_ids) - LENGTH, BATCH)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(self.train_ids, starts).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
        return time.perf_counter() - start

    def loss(self, ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        """Mean loss of the windows that begin at `starts`."""
        rows = torch.from_numpy(ids[starts[:, None] + np.arange(LENGTH + 1)[None]])
        return self.model(rows[:, :-1], rows[:, 1:])

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean over all held-out windows, side by side."""
        starts = np.arange(0, len(self.held_out_ids) - LENGTH, LENGTH)
        parts = [starts[i : i + 64] for i in range(0, len(starts), 64)]
        total = sum(len(part) * self.loss(self.held_out_ids, part).item() for part in parts)
        return total / len(starts)


def main() -> None:
    """Answers orders until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=2000, help="over which the rate decays")
    args = parser.parse_args()
    with open(args.text, encoding="utf-8") as file:
        trainer = Trainer(file.read(), args.steps)
    about = {"torch_version": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "train" in order:
            answer = {"seconds": trainer.train(order["train"])}
        else:
            answer = {"held_out_loss": trainer.held_out_loss()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
