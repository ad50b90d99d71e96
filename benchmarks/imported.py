"""Decoding an imported model, beside Hugging Face's `generate` with the same weights and cores.

    python -m benchmarks.imported --model=runs/smollm2 [--torch=PYTHON]

`runs/smollm2` is a workdir of gptlab.convert. Greedy, one row, a prompt of `prompt` tokens of plain
text and exactly `new` new ones, in float32 and in bfloat16: by the jitted loop that rollouts use,
and token by token, as chat does, which has a cache of the whole window. A token's time is that of
`new` tokens less that of the first, which is mostly the prompt's.

--torch names a Python with PyTorch and transformers, which are no dependencies of gptlab. The model
is exported, and imported_torch.py loads it there and takes turns with us. `same_tokens` is how much
of its reply is ours, up to the first difference. Both processes keep the memory that they free.
Prints a table, then the same figures as one line of JSON; medians with quartiles.
"""

import argparse
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.torch_process import TorchProcess
from configs import convert as convert_config
from gptlab import convert
from gptlab.model import decode
from gptlab.people import policy as policies
from gptlab.run import program

DTYPES = ("float32", "bfloat16")
TEXT = Path(__file__).parents[1] / "README.md"  # what the prompt is the beginning of


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a workdir with a model and a vocabulary")
    parser.add_argument("--torch", help="a Python with PyTorch and transformers")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9, help="turns that everything gets")
    args = parser.parse_args()
    program.keep_freed_memory()
    if args.new < 2:
        parser.error("--new must be at least 2: a token's time is a difference of two replies")
    ours = {dtype: Ours(args.model, dtype, args.prompt) for dtype in DTYPES}
    prompt = ours["float32"].prompt
    figures: dict[str, Any] = {
        "jax": jax.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "shape": {key: getattr(args, key) for key in ("model", "prompt", "new")},
        "parameters": ours["float32"].parameters,
    }
    ways: dict[tuple[str, str], Callable[[int], tuple[float, list[int]]]] = {}
    for dtype in DTYPES:
        ways[dtype, "gptlab"], ways[dtype, "chat"] = ours[dtype].reply, ours[dtype].stream
    if args.torch:
        other = start_torch(args.torch, args.model)
        figures |= other.about
        for dtype in DTYPES:
            ways[dtype, "transformers"] = functools.partial(torch_reply, other, dtype, prompt)
    times, replies = in_turns(ways, args.new, args.rounds)
    for dtype in DTYPES:
        names = [name for kind, name in ways if kind == dtype]
        figures[dtype] = {
            name: one_way(times[dtype, name], args.new, args.prompt)
            | {"same_tokens": same(replies[dtype, name], replies[dtype, "gptlab"])}
            for name in names
        }
        if args.torch:
            theirs = step(times[dtype, "transformers"], args.new)
            for name in names[:-1]:
                ratio = step(times[dtype, name], args.new) / theirs
                figures[dtype][name]["time_to_transformers"] = measure.spread(ratio, 3)
    figures["peak_rss_mib"] = measure.peak_rss_mib()
    print("\n".join(measure.table(figures)))
    print(json.dumps(figures))


class Ours:
    """The model as gptlab decodes it, with one dtype."""

    def __init__(self, workdir: str, dtype: str, prompt: int):
        """Loads it; compiles nothing yet."""
        self._policy = policies.load(workdir, dtype)
        config = self._policy.model.config
        self.parameters = config.num_params()
        self.prompt = self._policy.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:prompt]

    def reply(self, new: int) -> tuple[float, list[int]]:
        """Seconds of a reply by the loop that rollouts use, and its tokens."""
        prompts = jnp.array([self.prompt], jnp.int32)
        lengths, keys = (
            jnp.array([len(self.prompt)], jnp.int32),
            jax.random.split(jax.random.key(0), 1),
        )
        model, params = self._policy.model, self._policy.params
        found: list[decode.Generation] = []

        def run() -> jax.Array:
            found.append(decode.generate(model, params, prompts, lengths, keys, greedy(new)))
            return found[0].tokens

        return measure.seconds(run), found[0].tokens[0].tolist()

    def stream(self, new: int) -> tuple[float, list[int]]:
        """The same by chat's loop."""
        found: list[int] = []
        key = jax.random.key(0)
        seconds = measure.seconds(
            lambda: found.extend(self._policy.stream(self.prompt, key, greedy(new)))
        )
        return seconds, found


def greedy(new: int) -> decode.Sampling:
    """`new` tokens, whatever they are."""
    return decode.Sampling(0.0, 0, 1.0, new, ())


def start_torch(python: str, workdir: str) -> TorchProcess:
    """Exports the model and loads it with transformers."""
    with tempfile.TemporaryDirectory() as place:
        config = convert_config.get_config("export")
        config.inputs.model = config.inputs.vocabulary = workdir
        convert.run(config, f"{place}/exported")
        folder = f"--folder={place}/exported/{convert.EXPORTED}"
        return TorchProcess(python, "imported_torch.py", folder)  # which has read everything


def torch_reply(
    other: TorchProcess, dtype: str, prompt: list[int], new: int
) -> tuple[float, list[int]]:
    """Seconds of a reply by transformers, and its tokens."""
    found = other.ask(dtype=dtype, prompt=prompt, new=new)
    return found["seconds"], found["tokens"]


Times = dict[int, np.ndarray]  # by new tokens, 1 and all: seconds of each round


def in_turns(
    ways: dict[tuple[str, str], Callable[[int], tuple[float, list[int]]]], new: int, rounds: int
) -> tuple[dict[tuple[str, str], Times], dict[tuple[str, str], list[int]]]:
    """(times, the last replies), after one reply of each kind that is not measured."""
    seconds: dict[tuple[str, str], dict[int, list[float]]] = {k: {1: [], new: []} for k in ways}
    replies = {}
    for number in range(rounds + 1):
        for key, way in ways.items():
            for count in (1, new):
                taken, replies[key] = way(count)
                if number:
                    seconds[key][count].append(taken)
    times = {k: {n: np.array(row) for n, row in rows.items()} for k, rows in seconds.items()}
    return times, replies


def step(times: Times, new: int) -> np.ndarray:
    """Seconds a token after the first, of each round."""
    return (times[new] - times[1]) / (new - 1)


def one_way(times: Times, new: int, prompt: int) -> dict[str, Any]:
    """The figures of one way to reply."""
    return {
        "first_token_ms": measure.spread(1e3 * times[1]),
        "prompt_tokens_per_sec": round(prompt / np.median(times[1])),
        "ms_per_token": measure.spread(1e3 * step(times, new), 3),
        "tokens_per_sec": round(float(1 / np.median(step(times, new))), 1),
        "whole_reply_tokens_per_sec": round(float(new / np.median(times[new])), 1),
    }


def same(reply: list[int], other: list[int]) -> float:
    """How much of two replies is the same, from the beginning, as a share."""
    equal = np.array(reply) == np.array(other)
    return round(float(np.logical_and.accumulate(equal).mean()), 3)


if __name__ == "__main__":
    main()
