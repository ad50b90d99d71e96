"""A server for people and programs: web app and OpenAI's API for models of this machine.

    python -m gptlab.serve --config=configs/serve.py --workdir=runs/serve

The argument names models: NAME=WORKDIR,NAME=WORKDIR. Without one, the quickstart's promoted policy
is served as 'gptlab'. On two CPU cores the quickstart's model is ready after some seconds.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

ARGS = ("tuned=runs/sft,film=runs/ppo",)


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: the models, as NAME=WORKDIR with commas between; the first is the default."""
    models = ConfigDict({"gptlab": placeholder(str)})
    models.gptlab = "runs/quickstart"
    if arg:
        models = ConfigDict()
        for part in arg.split(","):
            name, equals, workdir = part.partition("=")
            if not (name and equals and workdir):
                raise ValueError(f"configs/serve.py takes NAME=WORKDIR,..., got {part!r}")
            models[name] = workdir
    return ConfigDict(
        {
            "host": "127.0.0.1",
            "port": 8000,  # 0: any that is free
            # What a request's Host may be; add the name that a proxy passes on.
            "allowed_hosts": ("127.0.0.1", "localhost"),
            "models": models,
            # URL of another server with OpenAI's API, in place of `models` and of `engine` but for
            # its deadline_seconds and watch_seconds.
            "upstream": placeholder(str),
            # How control tokens begin in the chat templates of such servers: text that is sent
            # there is freed of these. (): it is sent as it is.
            "upstream_controls": tuple(
                "<| <｜ <s> </s> <bos> <eos> [INST] [/INST] <start_of_turn> <end_of_turn>".split()
            ),
            "engine": {
                "slots": 8,  # replies that are written at the same time
                "chunk": 32,  # tokens of a prompt that are read between two steps of the others
                "max_len": placeholder(int),  # of prompt and reply; None: the model's window
                # Positions of the cache that are read at once: of a longer window a step reads as
                # many blocks as the longest running reply needs.
                "block": 256,
                "queue": 64,  # requests that may wait for a slot; others are told to come later
                "deadline_seconds": 120.0,  # of a request, waiting included
                # How often to look for a newly promoted policy, or at the models of an upstream.
                "watch_seconds": 5.0,
            },
            "dtype": "float32",
            "mesh": common.mesh(),
            "api": {
                "requests_per_minute": placeholder(int),  # of each caller; None: any number
                "max_choices": 16,  # n, times the prompts of one request
                "max_body_bytes": 1 << 20,
                "body_seconds": 30.0,  # in which a request has to arrive
                "require_keys": False,  # True: /v1 is for holders of API keys, which admins make
                "open": False,  # True: an address that others reach may be served without keys
            },
            # What people say: sqlite:///PATH or postgresql+psycopg://HOST/NAME. None: that of
            # $GPTLAB_STORE, or else store.sqlite in the workdir.
            "store": {"url": placeholder(str)},
            "web": {
                "name": "gptlab",  # what the app is called on its pages
                "open_chat": False,  # True: anybody may chat; False: by invitation
                "secure": False,  # True where people come by https: cookies are for https alone
                # Below it, admins may queue collect artifacts, and see what exports were used for.
                "artifacts": placeholder(str),
                "temperature": 0.8,
                "top_p": 0.95,
                "max_tokens": placeholder(int),  # of a reply; None: as many as fit
                "reply_seconds": 120.0,  # after which a reply is cut off
                "replies_at_once": 3,  # of one person
            },
            # A scorer of gptlab/scorers that prompts or replies have to please; None: off.
            "moderation": {
                "scorer": {"name": placeholder(str)},
                "least": 0.0,  # a lower score is refused
                "input": True,
                "output": False,  # replies are then shown when they are complete
            },
            "drain_seconds": 30.0,  # that running replies have after SIGTERM
        }
    )
