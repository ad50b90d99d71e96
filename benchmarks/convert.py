"""A host's memory and time while a model is imported, beside its shards and its largest tensor.

    python -m benchmarks.convert --sizes=64,128,256

Writes a random Llama in safetensors (bfloat16, a file a layer) whose float32 parameters take about
that many MiB, imports it by the program itself, in a process of its own, and prints the largest
resident memory when everything is loaded, and when it is saved and digested. The constants are
what a model of 2 MiB took by then (JAX, compiled programs). `tensors_beside` is what loading took
above its constant and the shards, in largest tensors; `tensors_beside_in_all` the same of all.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

VOCAB, LAYERS = 8192, 8
_IMPORT = """
import json, resource, sys, time
from configs import convert as convert_config
from gptlab import convert
from gptlab.model import weights
from gptlab.run import program
program.keep_freed_memory()
config = convert_config.get_config()
config.source = sys.argv[1]
load, loaded = weights.load, []

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

def measured(*arguments):
    params = load(*arguments)
    loaded.append(peak())
    return params

weights.load = measured
begin = time.perf_counter()
convert.run(config, sys.argv[2])
found = {"seconds": time.perf_counter() - begin, "loaded_mib": loaded[0], "saved_mib": peak()}
print(json.dumps(found))
"""


def architecture(mib: int) -> dict[str, int]:
    """Widths of a Llama whose parameters take about so many MiB as float32."""
    params = mib * 2**20 // 4
    # Per layer 4 D^2 of attention and 3 D F with F = 4 D; two tables.
    width = 32
    while 2 * VOCAB * (width + 32) + LAYERS * 16 * (width + 32) ** 2 <= params:
        width += 32
    return {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": VOCAB}


def write_model(folder: Path, mib: int) -> dict[str, tuple[int, ...]]:
    """Random tensors, a layer at a time; returns their shapes."""
    import safetensors.numpy

    sizes = architecture(mib)
    width, hidden = sizes["hidden_size"], sizes["intermediate_size"]
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes,
        "num_hidden_layers": LAYERS, "num_attention_heads": width // 32, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    square, wide = (width, width), (hidden, width)
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": square for name in "qkvo"}
    layer |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
    layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    parts: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        for i in range(LAYERS)
    ]
    parts.append({"model.embed_tokens.weight": (VOCAB, width), "model.norm.weight": (width,)})
    parts.append({"lm_head.weight": (VOCAB, width)})
    rng = np.random.default_rng(0)
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            for name, shape in part.items()
        }
        safetensors.numpy.save_file(tensors, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return {name: shape for part in parts for name, shape in part.items()}


def measure(mib: int) -> dict[str, float]:
    """Time and memory of one import."""
    with tempfile.TemporaryDirectory() as place:
        shapes = write_model(Path(place) / "source", mib)
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT, f"{place}/source", f"{place}/run"],
            env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    sizes = [4 * int(np.prod(shape)) / 2**20 for shape in shapes.values()]
    return {**found, "shards_mib": sum(sizes), "largest_tensor_mib": max(sizes)}


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="64,128,256", help="MiB of float32 parameters")
    args = parser.parse_args()
    begin = time.perf_counter()
    tiny = measure(1)
    figures: dict[str, object] = {
        f"constant_{when}_mib": round(tiny[f"{when}_mib"]) for when in ("loaded", "saved")
    }
    for mib in map(int, args.sizes.split(",")):
        found = measure(mib)
        beside = {}
        for name, when in (("tensors_beside", "loaded"), ("tensors_beside_in_all", "saved")):
            above = found[f"{when}_mib"] - tiny[f"{when}_mib"] - found["shards_mib"]
            beside[name] = round(above / found["largest_tensor_mib"], 2)
        figures[f"{mib}_mib"] = {
            **{name: round(value, 1) for name, value in found.items()},
            **beside,
        }
    figures["own_peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    figures["total_s"] = round(time.perf_counter() - begin, 1)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
