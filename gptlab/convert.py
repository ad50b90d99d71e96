"""Models in and out: Hugging Face and GGUF checkpoints become artifacts, artifacts become folders.

    python -m gptlab.convert --config=configs/convert.py --workdir=runs/smollm2 \
        --config.source=SmolLM2-135M-Instruct

    python -m gptlab.convert --config=configs/convert.py:export --workdir=runs/exported \
        --config.inputs.model=runs/ppo --config.inputs.vocabulary=runs/vocabulary

'import' reads a folder (config.json and safetensors) or a .gguf file. Its workdir is one like
pretraining's, with a checkpoint of step 0: `inputs.init=runs/smollm2` for sft, reward and ppo, and
`inputs.vocabulary=runs/smollm2` for all of them, where the source has a tokenizer. Tensors go one
by one into sharded arrays: beside its shards, a host holds no more than two tensors, also while the
checkpoint is written (benchmarks/convert.py measures it).

'export' writes WORKDIR/hf, which transformers' from_pretrained loads and which gives the same
logits: float32, config.json, safetensors, and the tokenizer's files where the vocabulary is Hugging
Face's; where this has no chat template, with the one that training took instead. Importing it gives
back the same parameters, bit for bit, as the same digest says. A reward model becomes a sequence
classifier with one label, its normalisation within: gain times weight is the classifier's, and the
constant, for which it has no place, is `reward_offset` in config.json, to be added to the logit.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from gptlab.data import chat
from gptlab.data.chat_template import TemplateFormat
from gptlab.data.hf_tokenizer import CONFIG_FILE, GENERATION_FILE, HFTokenizer
from gptlab.data.tokenizer import Tokenizer
from gptlab.model import gguf, hf, hf_config, safetensors, weights
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.model.weights import Pretrained
from gptlab.rl import rewards
from gptlab.run import artifact, files, processes, program
from gptlab.run.errors import Interrupted, UserError
from gptlab.run.progress import Progress
from gptlab.train import checkpoint
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from gptlab.train.checkpoint import Checkpoints

TOKENIZER, EXPORTED = "tokenizer", "hf"  # folders of the workdir
PAD_NAMED_IN = (CONFIG_FILE, "special_tokens_map.json")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Nothing is computed here, only shapes are asked for.
_COMPUTE = {"dtype": "float32", "remat": "none", "unroll": 1, "dropout": 0.0, "attention": "xla"}


def run(config: ConfigDict, workdir: str) -> None:
    """Imports or exports a model, as config.mode says.

    Raises:
      UserError: the source is damaged or of another architecture, or no Hugging Face architecture
        computes what the model does.
      Interrupted: SIGTERM or SIGINT; the same command starts anew.
    """
    modes = {"import": run_import, "export": run_export}
    if config.mode not in modes:
        raise UserError(f"config.mode is {config.mode!r}; use 'import' or 'export'")
    modes[config.mode](config, workdir)


# --- import ---


def run_import(config: ConfigDict, workdir: str) -> None:
    """config.source -> checkpoints/0, and the tokenizer's files."""
    # (1) What the source says of itself, checked before anything is read.
    source = open_source(config)
    model_config = ModelConfig.build(source.architecture, _COMPUTE)
    model = ScalarModel(model_config) if source.is_reward else LanguageModel(model_config)
    mesh = mesh_lib.make_mesh(config.mesh)
    abstract, shardings = state_lib.param_shardings(functools.partial(init_params, model), mesh)
    weights.check(abstract, source.weights, source.tensors, config.source)
    tokenizer = source.tokenizer()

    # (2) The run. Its config holds the model, like pretraining's; what was read counts by content.
    recorded = config.copy_and_resolve_references()
    with recorded.unlocked():
        recorded.model = ConfigDict(dict(source.architecture))
        del recorded.source
    raw = {"source": source.files}
    with artifact.open_run(recorded.lock(), workdir, "convert", files=raw) as run:
        if run.finished:
            print(f"{workdir}: this model is already imported")
            return

        # (3) Tensor by tensor onto the mesh, then into a checkpoint.
        total = sum(1 for _ in weights.slots(abstract, source.weights))
        with jax.set_mesh(mesh), run.progress(total, "import", unit="tensor") as progress:

            def each() -> None:
                program.give_back_freed_memory()
                progress.update()
                if run.stop_requested():
                    raise Interrupted("stopped between two tensors")

            with run.goodput.measure("data"):
                params = weights.load(abstract, shardings, source.weights, source.tensors, each)
            largest = max(x.nbytes for x in jax.tree.leaves(params))
            with (
                run.goodput.measure("save"),
                Checkpoints(run.workdir, config.checkpoint, write_bytes=largest) as saved,
            ):
                saved.save(0, {"params": params}, {})
            program.give_back_freed_memory()
            digest = state_lib.digest(params)

        # (4) The tokenizer, and results.
        write_files(run.workdir / TOKENIZER, tokenizer)
        if "tokenizer.json" not in tokenizer:
            processes.say(
                f"{workdir}: the source has no tokenizer.json; give another inputs.vocabulary"
            )
        results: dict[str, Any] = {"parameters": sum(x.size for x in jax.tree.leaves(params))}
        if source.is_reward:  # which says that this is a reward model, too
            results["normalisation"] = {"kind": "none", "gain": 1.0, "bias": 0.0}
        run.results(**results, tokenizer=sorted(tokenizer))
        run.complete(digest)


def open_source(config: ConfigDict) -> Pretrained:
    """The folder or the .gguf file that config.source names."""
    if not config.source:
        raise UserError(
            "config.source is not set: give a folder with config.json and safetensors, or a .gguf"
        )
    if gguf.is_gguf(config.source):
        return gguf.open_file(config.source, config.max_len)
    if not Path(config.source).is_dir():
        raise UserError(f"config.source={config.source} is neither a folder nor a .gguf file")
    return hf.open_folder(config.source, config.max_len)


def write_files(folder: epath.Path, contents: Mapping[str, bytes]) -> None:
    """Writes files by name, on the first process; no folder for none."""
    if contents and processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            files.atomic_write(folder / name, content)


# --- export ---


def run_export(config: ConfigDict, workdir: str) -> None:
    """inputs.model -> WORKDIR/hf."""
    # (1) Inputs, checked before anything is read.
    artifact.check_inputs(config, ("model",))
    manifest = artifact.read_manifest(config.inputs.model)
    is_reward = "normalisation" in manifest["results"]
    architecture = checkpoint.load_model_config(config.inputs.model)
    model_config = ModelConfig.build(architecture, _COMPUTE)
    content = hf_config.config_json(model_config, is_reward)
    tokenizer, ids = read_vocabulary(config.inputs.vocabulary, is_reward)
    mesh = mesh_lib.make_mesh(config.mesh)
    with artifact.open_run(config, workdir, "convert") as run:
        if run.finished:
            print(f"{workdir}: this model is already exported")
            return

        # (2) Parameters; a reward model's with its normalisation.
        with jax.set_mesh(mesh), run.goodput.measure("data"):
            params = load(config, model_config, is_reward, mesh)
            digest = state_lib.digest(params)

        # (3) Files: the tokenizer's, config.json, and the tensors one at a time.
        folder = run.workdir / EXPORTED
        if is_reward:
            offset = weights.whole(params["head"].pop("bias"))
            content[hf_config.REWARD_OFFSET] = float(offset[0])
        generation = {**stated_generation(tokenizer), **ids}
        made = {hf.CONFIG: to_json({**content, **dict.fromkeys(_IDS), **ids}), **tokenizer}
        if generation:
            made[GENERATION_FILE] = to_json(generation)
        write_files(folder, made)
        processes.barrier("the folder is there")
        names = hf.weights(is_gpt2=content["model_type"] == "gpt2")
        shapes = weights.tensor_shapes(params, names)
        with jax.set_mesh(mesh), run.progress(len(shapes), "export", unit="tensor") as progress:
            stored = counted(weights.store(params, names, list(shapes)), progress)
            safetensors.write_folder(
                folder, shapes, stored, config.max_file_bytes, processes.is_first()
            )
        if is_reward:
            print(
                f"reward = logit {content[hf_config.REWARD_OFFSET]:+g} "
                f"({hf_config.REWARD_OFFSET} in {folder / hf.CONFIG})"
            )
        run.results(parameters=model_config.num_params(), tokenizer=sorted(tokenizer))
        processes.barrier("everything is written")
        run.complete(digest)


def load(config: ConfigDict, model_config: ModelConfig, is_reward: bool, mesh: Any) -> Any:
    """The parameters of inputs.model; of a reward model, with its normalisation folded in."""
    if not is_reward:
        init_fn = functools.partial(init_params, LanguageModel(model_config))
        return checkpoint.load_params(config.inputs.model, mesh, init_fn)
    _, params, gain, bias = rewards.load_reward_model(config.inputs.model, mesh, _COMPUTE)
    return jax.jit(rewards.fold_normalisation, donate_argnums=0)(params, gain, bias)


def counted(values: Iterator[np.ndarray], progress: Progress) -> Iterator[np.ndarray]:
    """The values, each counted when the next one is asked for."""
    for value in values:
        yield value
        progress.update()


def read_vocabulary(
    workdir: str | None, is_reward: bool
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A vocabulary's files, if it is Hugging Face's, and the ids of its special tokens.

    eos_token_id is all that ends a document or, by the chat format that training wrote, a reply.
    """
    if not workdir:
        return {}, {}
    own = Tokenizer.load(workdir)
    if not isinstance(own, HFTokenizer):
        ends = list(dict.fromkeys((own.eos_id, *chat.stop_tokens(own))))
        return {}, dict(zip(_IDS, (own.bos_id, ends, own.pad_id), strict=True))
    contents = dict(own.files)
    stops = own.end_ids
    try:
        chat_format = TemplateFormat(own)
    except UserError as error:  # nothing learnt to chat with it, but a model may go out
        processes.say(
            f"{workdir}: eos_token_id is what its files say; no chat format can be made: {error}"
        )
    else:
        stops = chat_format.stop_ids
        if own.chat_template is None and not is_reward:
            # Not chat_template.jinja: older versions of transformers don't read that.
            set_key(contents, CONFIG_FILE, "chat_template", chat_format.source)
            processes.say(
                f"{workdir}: no chat template; {CONFIG_FILE} gets the one that training takes"
            )
    ends = list(dict.fromkeys((own.eos_id, *stops)))
    named = {f"{name}_id": own.special.get(text) for name, text in own.names.items()}
    ids = {**named, **stated_generation(own.files), "eos_token_id": ends}
    if is_reward:
        pad_apart(contents, ids, own.special, workdir)
    return contents, {key: ids[key] for key in _IDS if ids.get(key) is not None}


def pad_apart(
    contents: dict[str, bytes], ids: dict[str, Any], special: Mapping[str, int], workdir: str
) -> None:
    """Changes a reward model's pad_token_id, in files and ids, if it is what ends a reply.

    A classifier scores a row's last token that isn't pad_token_id, so where that ends a reply, as
    in SmolLM2, it would read the one before. Without any it takes one row at a time.
    """
    ends = ids["eos_token_id"]
    if ids.get("pad_token_id") not in (None, *ends):
        return
    pads = [(text, i) for text, i in special.items() if i not in ends]
    if not pads:
        ids["pad_token_id"] = None
        processes.say(
            f"{workdir}: all its special tokens end a reply, so {hf.CONFIG} names no pad_token_id: "
            "score one row at a time, or set it to an id that no row ends with"
        )
        return
    text, ids["pad_token_id"] = pads[0]
    for name in PAD_NAMED_IN:
        if name in contents:
            set_key(contents, name, "pad_token", text)


def set_key(contents: dict[str, bytes], name: str, key: str, value: str) -> None:
    """Sets a key of the JSON file `name`, which need not be there yet."""
    contents[name] = to_json({**json.loads(contents.get(name, b"{}")), key: value})


def stated_generation(tokenizer: Mapping[str, bytes]) -> dict[str, Any]:
    """What generation_config.json among a tokenizer's files says; {} without one."""
    return json.loads(tokenizer.get(GENERATION_FILE, b"{}"))


def to_json(content: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file, as people read it."""
    return (files.to_json(content, indent=2) + "\n").encode()


if __name__ == "__main__":
    program.main(run, "convert")
