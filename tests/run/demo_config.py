"""python -m tests.run.demo_program --config=tests/run/demo_config.py --workdir=DIR"""

from ml_collections import ConfigDict, config_dict


def get_config(arg=None):
    if arg not in (None, "slow", "counted"):
        raise ValueError(f"unknown argument {arg!r}; there are 'slow' and 'counted'")
    config = ConfigDict(
        {
            "seed": 0,
            "inputs": {"corpus": config_dict.placeholder(str)},
            "num_steps": 2000 if arg == "slow" else 3,
            "seconds_per_step": 0.02 if arg == "slow" else 0.0,
            "optimizer": {"lr": 1e-3},
            "total_tokens": config_dict.placeholder(int),
            "fail": {"step": 0, "kind": ""},
        }
    )
    if arg == "counted":
        config.total_tokens = 7
    return config
