"""The store's feedback as training data.

    python -m gptlab.export --config=configs/export.py --workdir=runs/export \
        --config.store.url=sqlite:///runs/serve/store.sqlite

Seconds. report.md says what went in, and what was left out and why. The weights are choices, not
measurements: a thumb compares two replies that nobody has seen side by side.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    """Takes no argument."""
    if arg is not None:
        raise ValueError(f"configs/export.py takes no argument, got {arg!r}")
    return ConfigDict(
        {
            "seed": 0,  # of the split
            "store": {
                "url": placeholder(str),  # None: $GPTLAB_STORE
                "until": placeholder(int),  # a row of the audit; None: all there is
            },
            "filters": common.feedback_filters(),
            # Of comparisons; 0 leaves a kind out. A flag's by its severity: low, medium, high.
            "weights": {
                "ranking": 1.0, "choice": 1.0, "better": 1.0, "thumb": 0.25,
                "flag": (0.25, 0.5, 1.0),
            },
            "scrub": True,  # people/scrubbing.py: e-mail, phone, IP, card, IBAN
            "validation_fraction": 0.1,
            # Of flagged conversations: they are evaluated on, and nothing is learnt from them.
            "safety_test_fraction": 0.2,
        }
    )  # fmt: skip
