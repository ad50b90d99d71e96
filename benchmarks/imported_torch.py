"""Hugging Face's `generate`: what benchmarks/imported.py compares itself with.

    python benchmarks/imported_torch.py --folder=PATH/TO/hf

Needs PyTorch and transformers only, so it runs in any Python. It takes its orders from standard
input, so that both sides can work in turns, one a line: {"dtype": "float32" or "bfloat16",
"prompt": ids, "new": number of tokens} is answered with {"seconds": ..., "tokens": the reply}.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch
import transformers


@torch.inference_mode()
def reply(model: Any, prompt: list[int], new: int) -> dict[str, Any]:
    """A greedy reply of exactly `new` tokens, and the seconds it took."""
    ids = torch.tensor([prompt])
    start = time.perf_counter()
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False,
        min_new_tokens=new, max_new_tokens=new,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": found[0, len(prompt) :].tolist()}


def main() -> None:
    """Answers orders until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="what gptlab.convert exports")
    args = parser.parse_args()
    models = {}
    for name in ("float32", "bfloat16"):
        models[name] = transformers.AutoModelForCausalLM.from_pretrained(
            args.folder, dtype=getattr(torch, name)
        ).eval()
        # Ours stops nowhere either; nor is a token forbidden, as min_new_tokens would an end.
        models[name].generation_config.eos_token_id = None
    about = {
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(reply(models[order["dtype"]], order["prompt"], order["new"])), flush=True)


if __name__ == "__main__":
    main()
