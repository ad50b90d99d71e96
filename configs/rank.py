"""Rank candidate replies by a simulated labeller.

    python -m gptlab.rank --config=configs/rank.py --workdir=runs/rank \
        --config.inputs.candidates=runs/collect

Seconds. With VADER on four random human replies to a prompt (chitchat), the default noise of 0.25
gives labels that the clean order predicts at 83% and on which two labellers agree at 75%, near the
72.6 +- 1.5% of InstructGPT's (arXiv 2203.02155); noise 0.2 gives 87% and 80%, noise 0.4 76% and
66%.

Arguments: 'vader' (be upbeat), 'words' (a share of words that is known exactly: a canary), 'people'
(those who work on a campaign of a store, for as long as they need):

    python -m gptlab.rank --config=configs/rank.py:people --workdir=runs/rank_people \
        --config.inputs.candidates=runs/collect --config.campaign.name='first campaign' \
        --config.store.url=sqlite:///runs/serve/store.sqlite
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common
from gptlab.run.errors import UserError

ARGS = ("vader", "words", "people")


def get_config(arg: str | None = None) -> ConfigDict:
    """A labeller with the scorer that `arg` names, by default 'vader'."""
    arg = arg or "vader"
    if arg not in ARGS:
        raise UserError(f"configs/rank.py:{arg}: the argument is one of {', '.join(ARGS)}")
    if arg == "people":
        return common.rank_by_people()
    scorers = {
        "vader": {"name": "vader"},
        "words": {"name": "word_fraction", "words": ("you", "your", "yours", "yourself")},
    }
    # In units of the score: VADER's spread over human replies is 0.41, this share's about 0.1.
    noise = {"vader": 0.25, "words": 0.06}
    return ConfigDict(
        {
            "seed": 0,
            "inputs": {"candidates": placeholder(str)},
            "backend": "simulated",
            "scorer": scorers[arg],
            "labeller": {"noise": noise[arg], "tie_margin": 0.05 if arg == "vader" else 0.0},
        }
    )


def sweep(add) -> None:
    """How much label noise can a reward model take?"""
    for noise in (0.0, 0.1, 0.2, 0.25, 0.3, 0.4):
        add(**{"labeller.noise": noise})
