"""python -m tests.run.demo_program --config=tests/run/demo_config.py --workdir=DIR"""

from ml_collections import ConfigDict, config_dict


def get_config(arg=None):
    if arg not in (None, "slow"):
        raise ValueError(f"unknown argument {arg!r}; there is 'slow'")
    config = ConfigDict(
        {
            "seed": 0,
            "inputs": {"corpus": config_dict.placeholder(str)},
            "num_steps": 2000 if arg == "slow" else 3,
            "seconds_per_step": 0.02 if arg == "slow" else 0.0,
            "optimizer": {"lr": 1e-3},
            "total_tokens": config_dict.placeholder(int),
            "optional": {"clip_norm": config_dict.placeholder(float)},
            "fail": {"step": 0, "kind": ""},
        }
    )
    config.optional.clip_norm = 1.0
    return config
