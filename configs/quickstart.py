"""Documents to a chat model, with two rounds of feedback, in about 20 minutes on 2 CPU cores.

    python -m gptlab.rounds --config=configs/quickstart.py --workdir=runs/quickstart

About 1M parameters on human dialogues; the feedback is simulated ('be upbeat', by VADER), and the
model talks like small talk at best. What to expect: held-out bits a byte below a bigram's, replies
that end by themselves, and policies that are more upbeat than the SFT model in both rounds.

`configs/quickstart.py:smoke` is the same loop on a sliver of the data with a toy model, in under 4
minutes, to see that everything works: its figures mean nothing. With `:people` (or both, as
`:smoke,people`) replies are ranked by the people of a store, for as long as they need: they work on
the campaign 'quickstart' of a server (`gptlab.serve`) with the same store, which is
--config.stages.rank.store.url or $GPTLAB_STORE.

What people said in the chat comes in at a round of its own: --config.num_rounds=3
--config.inputs.feedback_3=runs/export (an artifact of `gptlab.export`).

Your own files: --config.data.documents=DIR_OR_GLOB. Another seed: --config.seed=1.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

ARGS = ("", "smoke", "people", "smoke,people")
PROMPT_TOKENS, REPLY_TOKENS = 64, 48
LEARNT_REPLY_TOKENS = 40  # SFT learns from no longer replies, so that nearly all end in time
FOLDS = 4  # of the training labels, by prompt: the last one is the unseen judge's


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None for the quickstart, 'smoke' for the toy, 'people' to have people rank."""
    if (arg or "") not in ARGS:
        raise ValueError(
            f"configs/quickstart.py takes no argument, 'smoke', 'people' or both, got {arg!r}"
        )
    chosen = (arg or "").split(",")
    config = ConfigDict()
    config.seed = 0
    config.num_rounds = 2
    # What people said (artifacts of gptlab.export), by the round at which it comes in.
    config.inputs = common.inputs("feedback_1", "feedback_2", "feedback_3", "feedback_4")
    config.ppo_init = "sft"  # what PPO starts from in later rounds: sft | previous
    config.backend = "in_process"  # or subprocess: slower to start, memory freed after each stage
    # Of all training but PPO. bfloat16 is twice as fast as float32 on a CPU with AMX, but slower on
    # one without: --config.dtype=float32 there.
    config.dtype = "bfloat16"
    config.data = ConfigDict({"documents": placeholder(str)})
    config.stages = ConfigDict(
        {
            "clean": clean(),
            "vocabulary": vocabulary(),
            "tokenize": tokenize(),
            "pretrain": pretrain(),
            "sft": sft(),
            "feedback_tokens": feedback_tokens(),
            "demonstrations": demonstrations(),
            "reviews": reward(comparisons="reviews"),
            "collect": collect(),
            "rank": people() if "people" in chosen else rank(),
            "reward": reward(folds=tuple(range(FOLDS - 1))),
            "judge": reward(folds=(FOLDS - 1,)),
            "ppo": ppo(),
            "evaluate": evaluate(),
        }
    )
    # How long each stage takes on 2 cores, for the remaining-time estimate only.
    config.expected_seconds = {
        "clean": 17, "vocabulary": 14, "tokenize": 42, "pretrain": 235, "sft": 93, "reviews": 80,
        "feedback_tokens": 20, "demonstrations": 30, "collect": 50, "rank": 1, "reward": 95,
        "judge": 45, "ppo": 87, "evaluate": 71,
    }  # fmt: skip
    if "smoke" in chosen:
        shrink(config)
    for name, stage in config.stages.items():
        if "seed" in stage:
            stage.seed = config.get_ref("seed") + (1 if name == "judge" else 0)
    for name in ("pretrain", "sft", "demonstrations", "reviews", "reward", "judge"):
        config.stages[name].compute.dtype = config.get_ref("dtype")
    config.stages.clean.data.documents = config.data.get_ref("documents")
    return config


def clean() -> ConfigDict:
    """Packages with human dialogues, human-rated reviews and prose -> clean text."""
    return ConfigDict(
        {
            "mode": "clean",
            "data": {
                "sources": (
                    "package:chitchat",
                    "package:reviews",
                    "package:pydoc_topics",
                    "package:idlelib_help",
                ),
                "documents": placeholder(str),
                # Dialogues to fine-tune on, and human preferences, whatever is read beside them.
                "beside": ("package:chitchat", "package:reviews"),
                "keep_fraction": 1.0,
                "max_line_bytes": 10_000_000,
                "max_html_bytes": 10_000_000,
                "stretch_bytes": 100_000,
                "sides": 1,
                "pairs_per_review": 2,
                "review_documents": True,
                "tfds_dir": placeholder(str),
                "tfds_feature": "text",
            },
            "module": placeholder(str),
            "clean": {
                "min_chars": 20,
                "max_chars": 1_000_000,
                "min_letters": 0.4,
                "max_repeated_lines": 0.3,
                "min_compressed": 0.12,
                "straight_quotes": True,
            },
            "split": {"test_fraction": 0.1, "validation_fraction": 0.05, "seed": 2},
            "prompts": {"per_conversation": 2, "min_chars": 10},
            "max_bad_fraction": 0.05,
            "num_shards": 1,
            "beam": beam(),
        }
    )


def beam() -> dict[str, Any]:
    """In one process: starting more takes as long as they would save."""
    return {"runner": "DirectRunner", "num_workers": 1, "options": ()}


def vocabulary() -> ConfigDict:
    """2,048 tokens."""
    return ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs("corpus"),
            "vocab_size": 2048,
            "model_type": "bpe",
            "character_coverage": 0.9995,
            "max_sentences": 0,
            "num_threads": 1,
        }
    )


def tokenize() -> ConfigDict:
    """Documents for pretraining and dialogues for SFT, as tokens."""
    return ConfigDict(
        {
            "mode": "tokenize",
            "inputs": common.inputs("corpus", "vocabulary"),
            "module": placeholder(str),
            "tasks": ("pretrain", "dialogues"),
            "mixtures": {},
            "slices": 8,
            "num_shards": 1,
            "beam": beam(),
        }
    )


def pretrain() -> ConfigDict:
    """About 2.3M tokens, 1,100 steps."""
    config = ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs("init", "tokens", "vocabulary"),
            "data": {"name": "pretrain", "seq_len": 128},
            "model": common.model("quickstart"),
            "compute": common.compute(unroll=4),
            "lora": common.lora(),
            "batch_size": 16,
            "accumulation_steps": 1,
            "optimizer": common.muon(0.02, adam_lr=0.01, warmup_steps=30, final_fraction=0.05),
            "z_loss": 0.0,
            "on_nonfinite": "stop",
            "mesh": common.mesh(),
            "log_every_steps": 10,
            "eval_every_steps": 200,
            "eval_batches": 10,
            "ngram_baselines": True,
            "sample_every_steps": 400,
            "sample": common.sample(48, prompts=("hello", "i think")),
            "checkpoint": common.checkpoint(200),
            "profile": common.profile(),
        }
    )
    config.update(common.duration(total_steps=1100))
    return config


def sft() -> ConfigDict:
    """About 0.7M tokens of dialogues, a fifth of an epoch."""
    config = ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs("init", "tokens", "vocabulary"),
            "data": {
                "name": "dialogues",
                "seq_len": 256,
                "overlong": "split",
                "max_reply_tokens": LEARNT_REPLY_TOKENS,
            },
            "loss_on": "assistant",
            "compute": common.compute(unroll=4),
            "lora": common.lora(),
            "batch_size": 8,
            "accumulation_steps": 1,
            "optimizer": common.muon(0.005, adam_lr=0.002, warmup_steps=10),
            "on_nonfinite": "stop",
            "mesh": common.mesh(),
            "log_every_steps": 10,
            "eval_every_steps": 100,
            "eval_batches": 20,
            "sample_every_steps": 200,
            "sample": common.sample(48, prompts=("hi, how are you?", "do you like music?")),
            "checkpoint": common.checkpoint(100),
            "profile": common.profile(),
        }
    )
    config.update(common.duration(total_steps=360))
    return config


def feedback_tokens() -> ConfigDict:
    """What people wrote in the chat, as tokens."""
    config = tokenize()
    config.tasks = ("dialogues",)
    return config


def demonstrations() -> ConfigDict:
    """Two epochs of what people wrote in the chat, from the SFT model on and more gently."""
    config = sft()
    config.data.max_reply_tokens = 0  # what people took the trouble to write counts to its end
    config.optimizer = common.muon(0.001, adam_lr=0.0004, warmup_steps=2)
    config.total_steps, config.total_epochs = None, 2.0
    return config


def collect() -> ConfigDict:
    """4 replies to each of 1,792 prompts, drawn anew in each round."""
    return ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs("policy", "prompts", "vocabulary"),
            "compute": common.compute(unroll=4),
            "data": {"prompt_len": PROMPT_TOKENS},
            "num_replies": 4,
            "num_prompts": {"train": 1792, "validation": 320},
            "sampling": {
                "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": REPLY_TOKENS,
            },
            "batch_size": 32,
            "mesh": common.mesh(),
        }
    )  # fmt: skip


def rank() -> ConfigDict:
    """A simulated labeller who likes upbeat replies, and errs as often as people disagree."""
    return ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs("candidates"),
            "backend": "simulated",
            "scorer": {"name": "vader"},
            "labeller": {"noise": 0.25, "tie_margin": 0.05},
        }
    )


def people() -> ConfigDict:
    """The people of a store, in one campaign for all rounds."""
    config = common.rank_by_people()
    config.campaign.name = "quickstart"
    return config


def reward(comparisons: str = "rounds", folds: tuple[int, ...] | None = None) -> ConfigDict:
    """A reward model from the rounds' rankings, or from human preferences between reviews."""
    reviews = comparisons == "reviews"
    config = ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs(
                "init",
                "vocabulary",
                "comparisons",
                "comparisons_2",
                "comparisons_3",
                "comparisons_4",
                "comparisons_feedback",
                "demonstrations",
            ),
            "compute": common.compute(unroll=4),
            "lora": common.lora(),
            "data": {
                "seq_len": PROMPT_TOKENS + REPLY_TOKENS,
                "prompt_len": PROMPT_TOKENS,
                "max_candidates": 2 if reviews else 4,
                "num_folds": 1 if folds is None else FOLDS,
                "folds": (0,) if folds is None else folds,
            },
            "batch_size": 8,
            "accumulation_steps": 1,
            "optimizer": common.muon(0.005, adam_lr=0.001, warmup_steps=10),
            "mesh": common.mesh(),
            "normalise": "samples",
            "normalise_examples": 512,  # comparisons or demonstrations; not read with 'none'
            "log_every_steps": 10,
            "eval_every_steps": 100,
            "eval_batches": 16,
            "checkpoint": common.checkpoint(every_steps=100),
            "profile": common.profile(),
            "on_nonfinite": "stop",
        }
    )
    if reviews:  # a review and its prompt take about 70 tokens
        config.data.seq_len, config.batch_size = 96, 16
        config.optimizer = common.muon(0.01, adam_lr=0.002, warmup_steps=10)
        config.update(common.duration(total_steps=200))
    else:
        config.update(common.duration(total_epochs=1.0))
    return config


def ppo() -> ConfigDict:
    """36 steps of 64 episodes: more, or a smaller KL coefficient, and one reply takes over."""
    config = ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs(
                "init", "reference", "reward", "prompts", "vocabulary", "tokens"
            ),
            "compute": common.compute(unroll=4),
            "lora": common.lora(),
            "data": {"prompt_len": PROMPT_TOKENS},
            "sampling": {
                "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": REPLY_TOKENS,
            },
            "total_steps": placeholder(int),
            "total_episodes": placeholder(int),
            "batch_size": 64,
            "samples_per_prompt": 1,
            "minibatches": 4,
            "epochs": 1,
            "accumulation_steps": 1,
            "optimizer": common.adamw(4e-4, schedule="linear", warmup_steps=10, weight_decay=0.0),
            "value_optimizer": common.adamw(
                1e-3, schedule="linear", warmup_steps=10, weight_decay=0.0
            ),
            "policy_clip": 0.2,
            "value_clip": 0.2,
            "vf_coef": 1.0,
            # configs/ppo.py says which keys are read only beside another choice (kind, coef).
            "reward": {
                "kind": "model",
                "scorer": {"name": "word_fraction", "words": ("you", "your", "yours", "yourself")},
            },
            "kl": {"kind": "fixed", "coef": 0.25, "target": 6.0, "horizon": 10_000},
            "no_eos_score": -1.0,
            "score_position": "last",
            "whiten_rewards": False,
            "advantage": "gae",
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_advantages": "minibatch",
            "ptx": {"coef": 0.0, "name": "pretrain", "batch_size": 8, "seq_len": 128},
            "offload": False,
            "mesh": common.mesh(),
            "log_every_steps": 1,
            "eval_every_steps": 24,
            "eval_batches": 2,
            "sample_every_steps": 12,
            "checkpoint": common.checkpoint(every_steps=12, best_metric=None),
            "profile": common.profile(),
            "on_nonfinite": "stop",
        }
    )  # fmt: skip
    config.total_steps = 36
    return config


def evaluate() -> ConfigDict:
    """384 held-out prompts, and what a policy must reach to be promoted."""
    return ConfigDict(
        {
            "seed": 0,
            "inputs": common.inputs(
                "policy", "baseline", "base", "previous", "reward", "judge", "vocabulary",
                "prompts", "reviews", "tokens",
            ),
            "data": {
                "split": "test",
                "num_prompts": 384,
                "prompt_len": PROMPT_TOKENS,
                "seq_len": 256,
                "pretraining": "pretrain",
                "pretraining_batches": 4,
            },
            "compute": common.compute(unroll=4),
            "mesh": common.mesh(),
            "batch_size": 64,
            "sampling": {"temperature": 1.0, "max_new_tokens": REPLY_TOKENS},
            "gold": {"name": "vader"},
            "reviews": {
                "name": "tfidf_comparisons",
                "input": "reviews",
                "records_name": "comparisons",
                "split": "train",
                "min_count": 2,
                "inverse_penalty": 1.0,
            },
            "best_of_n": {"sizes": (2, 4, 8, 16), "samples": 16, "num_prompts": 96},
            "bootstrap": {"resamples": 2000, "seed": 0, "level": 0.95},
            "gate": common.gate(),
            "report_samples": 20,
        }
    )  # fmt: skip


def shrink(config: ConfigDict) -> None:
    """Turns the quickstart into the smoke test: every stage is there, none has time to learn."""
    stages = config.stages
    stages.clean.data.keep_fraction = 0.12
    stages.vocabulary.vocab_size = 512
    pretrain = stages.pretrain
    pretrain.model = common.model("tiny", max_len=128)
    pretrain.update(batch_size=8, total_steps=12, eval_every_steps=12, eval_batches=2)
    pretrain.update(log_every_steps=4, sample_every_steps=12)
    pretrain.data.seq_len, pretrain.optimizer.warmup_steps = 96, 2
    sft = stages.sft
    sft.update(batch_size=8, total_steps=12, eval_every_steps=12, eval_batches=2)
    for stage in (sft, stages.demonstrations):
        stage.update(log_every_steps=4, sample_every_steps=12)
        stage.data.seq_len, stage.optimizer.warmup_steps = 96, 2
    for stage in stages.values():
        if "compute" in stage:
            stage.compute.unroll = 2
    for stage in (pretrain, sft, stages.demonstrations):
        stage.checkpoint.every_steps, stage.sample.max_new_tokens = 6, 12
    for name in ("reviews", "reward", "judge"):
        stages[name].update(batch_size=8, total_epochs=None, total_steps=4, eval_every_steps=4)
        stages[name].update(eval_batches=2, log_every_steps=1)
        stages[name].data.seq_len, stages[name].checkpoint.every_steps = 56, 2
        stages[name].optimizer.warmup_steps = 1
    stages.reviews.data.seq_len = 128  # reviews are longer than replies
    for name in ("collect", "reviews", "reward", "judge", "ppo", "evaluate"):
        stages[name].data.prompt_len = 40
    for name in ("collect", "ppo", "evaluate"):
        stages[name].sampling.max_new_tokens = 16
    stages.collect.update(batch_size=16, num_prompts={"train": 64, "validation": 16})
    ppo = stages.ppo
    ppo.update(total_steps=4, batch_size=16, minibatches=2, eval_every_steps=4)
    ppo.update(eval_batches=1, sample_every_steps=2)
    ppo.checkpoint.every_steps = 2
    for optimizer in (ppo.optimizer, ppo.value_optimizer):
        optimizer.warmup_steps = 1
    stages.evaluate.update(batch_size=16, report_samples=4)
    stages.evaluate.data.update(num_prompts=32, seq_len=96, pretraining_batches=1)
    stages.evaluate.best_of_n.update(sizes=(2, 4), samples=4, num_prompts=16)
    stages.evaluate.bootstrap.resamples = 200
    # Nothing is learnt here; the second round is to start from a promoted policy all the same.
    stages.evaluate.gate.update(
        min_win_rate_low=0.0, min_gold_difference=-2.0, max_most_common_share=1.0
    )
    stages.evaluate.gate.min_distinct_2_ratio = 0.0
    config.expected_seconds.update(
        clean=15, vocabulary=5, tokenize=20, pretrain=15, sft=15, reviews=12,
        feedback_tokens=15, demonstrations=10, collect=8, rank=2,
        reward=10, judge=5, ppo=20, evaluate=15,
    )  # fmt: skip
