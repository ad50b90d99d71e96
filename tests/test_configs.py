"""Every config, with every argument it declares, builds; its models take shape; none is stale."""

import importlib
import math
import re
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import common, quickstart
from gptlab import plan, rounds
from gptlab.model import transformer
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel, ModelConfig

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(
    path.stem for path in CONFIGS.glob("*.py") if path.stem not in ("common", "__init__")
)
STAGES = set(plan.STAGES.values())
# Arguments of configs that do not list them as ARGS.
ARGUMENTS = {
    "prepare": ("clean", "tokenize"),
    "pretrain": ("gpt2_350m", "llama3_8b", "qwen3_0.6b", "init"),
}
# The config that each of the quickstart's stages must agree with, key by key.
OWN = {
    "clean": ("prepare", "clean"),
    "vocabulary": ("train_tokenizer", None),
    "tokenize": ("prepare", "tokenize"),
    "pretrain": ("pretrain", None),
    "sft": ("sft", None),
    "feedback_tokens": ("prepare", "tokenize"),
    "demonstrations": ("sft", None),
    "reviews": ("reward", "reviews"),
    "collect": ("collect", None),
    "rank": ("rank", None),
    "reward": ("reward", None),
    "judge": ("reward", None),
    "ppo": ("ppo", None),
    "evaluate": ("evaluate", None),
}


def load(name, arg=None):
    module = importlib.import_module(f"configs.{name}")
    return module.get_config() if arg is None else module.get_config(arg)


def module_of(name):
    return importlib.import_module(f"configs.{name}")


def cases():
    for name in NAMES:
        yield name, None
        module = importlib.import_module(f"configs.{name}")
        listed = getattr(module, "ARGS", None) or getattr(module, "TOPOLOGIES", ())
        for arg in (*listed, *ARGUMENTS.get(name, ())):
            yield name, arg


def stage_of(name):
    """The stage of configs/STAGE_VARIANT.py."""
    return name.partition("_")[0]


def subtrees(config):
    """The config itself and every ConfigDict inside."""
    yield config
    for value in config.values():
        if isinstance(value, ConfigDict):
            yield from subtrees(value)


def keys(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def check_same_keys(used, own):
    """Both have each other's, but for those of another optimiser."""
    for name in ("optimizer", "value_optimizer"):
        if name in used:
            fragment = {"adamw": common.adamw(1.0), "muon": common.muon(1.0, adam_lr=1.0)}
            assert set(keys(used[name])) == set(keys(fragment[used[name].name]))
            used[name] = own[name]
    assert set(keys(used)) == set(keys(own))


@pytest.mark.parametrize("name, arg", list(cases()))
def test_builds_and_its_model_takes_shape(name, arg):
    config = load(name, arg)
    assert isinstance(config, ConfigDict)
    assert config.to_json() == load(name, arg).to_json()  # no state, no clock
    for tree in subtrees(config):
        # config.x.keys is a method, whatever the file says, and always true.
        assert not [key for key in tree if hasattr(ConfigDict, key)]
        if "compute" not in tree or "model" not in tree:
            continue
        model_config = ModelConfig.build(tree.model.to_dict(), tree.compute.to_dict())
        for model in (LanguageModel(model_config), ScalarModel(model_config)):
            shapes = jax.eval_shape(
                lambda key, model=model: transformer.init_params(model, key), jax.random.key(0)
            )
            assert jax.tree.leaves(shapes)
        if "data" in tree:
            assert tree.data.seq_len <= model_config.max_len


@pytest.mark.parametrize("name, arg", [c for c in cases() if hasattr(module_of(c[0]), "hardware")])
def test_hardware_says_what_can_be_planned(name, arg):
    named = module_of(name).hardware(*[arg] if arg else [])
    assert set(named) <= {"topology", "model", "reward_model"}
    assert re.fullmatch(r"(v4|v5e|v5p|v6e):\d+x\d+(x\d+)?", named["topology"])
    chips = math.prod(int(n) for n in named["topology"].split(":")[1].split("x"))
    config = load(name, arg)
    job = plan.make_job(config, None, named)
    assert job.stage in name and job.model.num_params() > 1e8
    mesh = {axis: size for axis, size in config.mesh.items() if size != -1}
    assert chips % math.prod(mesh.values()) == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_sweep_entry_applies(name):
    module = importlib.import_module(f"configs.{name}")
    entries = []
    if hasattr(module, "sweep"):
        module.sweep(lambda **changes: entries.append(changes))
        assert entries
    made = set()
    for changes in entries:
        config = load(name).lock()
        config.update_from_flattened_dict(changes)
        made.add(config.to_json())
    assert len(made) == len(entries)  # no entry is another one by mistake


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(Exception, match="nonsense"):
        load(name, "nonsense")


@pytest.mark.parametrize("arg", [None, "smoke", "smoke,people"])
@pytest.mark.parametrize("stage", rounds.PROGRAMS)
def test_quickstart_stages_have_the_keys_of_their_programs_config(stage, arg):
    by_people = stage == "rank" and arg == "smoke,people"
    own = load(*(("rank", "people") if by_people else OWN[stage]))
    check_same_keys(quickstart.get_config(arg).stages[stage], own)


@pytest.mark.parametrize("name, arg", [c for c in cases() if stage_of(c[0]) in STAGES])
def test_variants_have_the_keys_of_their_stages_config(name, arg):
    """What only the loop's last step reads is missed after days of training."""
    # 'init' starts from another artifact's model, and has none of its own.
    check_same_keys(load(name, arg), load(stage_of(name), arg if arg == "init" else None))


@pytest.mark.parametrize("arg", [None, "smoke"])
def test_quickstart_lengths_fit_together(arg):
    stages = quickstart.get_config(arg).stages
    window = stages.pretrain.model.max_len
    assert stages.pretrain.model.vocab_size == stages.vocabulary.vocab_size
    for name in ("collect", "ppo", "evaluate"):
        stage = stages[name]
        reply = stage.sampling.max_new_tokens
        assert stage.data.prompt_len + reply <= min(window, stages.reward.data.seq_len)
        # What is ranked, optimised and judged is drawn alike.
        assert (stage.data.prompt_len, reply) == (
            stages.ppo.data.prompt_len, stages.ppo.sampling.max_new_tokens,
        )  # fmt: skip
        assert stage.sampling.temperature == stages.ppo.sampling.temperature
    for name in ("sft", "reviews", "reward", "judge", "evaluate"):
        assert stages[name].data.seq_len <= window
    for name in ("reward", "judge"):  # trained on the prompts that they will score
        assert stages[name].data.prompt_len == stages.ppo.data.prompt_len
        assert stages[name].data.seq_len >= stages.ppo.data.prompt_len + reply
    assert not set(stages.reward.data.folds) & set(stages.judge.data.folds)
    assert stages.reward.data.num_folds == stages.judge.data.num_folds


def test_stages_by_hand_ask_and_answer_alike():
    stages = {name: load(name) for name in ("collect", "reward", "ppo", "evaluate")}
    assert len({stage.data.prompt_len for stage in stages.values()}) == 1
    replies = {stages[name].sampling.max_new_tokens for name in ("collect", "ppo", "evaluate")}
    assert replies == {stages["reward"].data.seq_len - stages["reward"].data.prompt_len}


def test_quickstart_passes_on_seed_and_documents():
    config = quickstart.get_config().lock()
    config.seed = 7
    config.data.documents = "my/files"
    assert config.stages.clean.data.documents == "my/files"
    seeds = {name: stage.seed for name, stage in config.stages.items() if "seed" in stage}
    assert seeds.pop("judge") == 8  # never the seed of the reward model beside it
    assert set(seeds.values()) == {7} and len(seeds) == 10
