"""The README's commands: every program, config and key of them exists, and the stages run.

Commands in docstrings are the README's: what they name exists, and they use the same workdirs.
"""

import ast
import dataclasses
import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from gptlab import plan
from gptlab.run import artifact
from tests import compiling

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# What makes minutes of hours: overrides that are added to the command of each program and argument.
# Nothing is learnt with them; every stage has something to do.
_TOKENS = "--config.data.seq_len=96"
_TRAINED = ("--config.batch_size=8", "--config.log_every_steps=2", "--config.eval_batches=2")
SHRUNK: dict[str, tuple[str, ...]] = {
    "prepare:clean": ("--config.data.keep_fraction=0.08",),
    "train_tokenizer": ("--config.vocab_size=512",),
    "prepare:tokenize": (),
    "pretrain": (
        *_TRAINED, _TOKENS, "--config.total_steps=4", "--config.checkpoint.every_steps=2",
        "--config.model.vocab_size=512", "--config.model.num_layers=2", "--config.compute.unroll=2",
        "--config.model.d_model=32", "--config.model.num_heads=4", "--config.model.num_kv_heads=2",
        "--config.model.head_dim=8", "--config.model.d_ff=64", "--config.sample.max_new_tokens=8",
        "--config.sample_every_steps=2", "--config.eval_every_steps=2",
        "--config.optimizer.warmup_steps=1",
    ),
    "sft": (
        *_TRAINED, _TOKENS, "--config.total_epochs=0.2", "--config.eval_every_steps=4",
        "--config.sample_every_steps=4", "--config.sample.max_new_tokens=8",
        "--config.checkpoint.every_steps=4",
    ),
    "collect": (
        "--config.num_prompts.train=64", "--config.num_prompts.validation=16",
        "--config.compute.unroll=2", "--config.sampling.max_new_tokens=16",
    ),
    "rank": (),
    "reward": (
        *_TRAINED, "--config.data.seq_len=80", "--config.compute.unroll=2",
        "--config.eval_every_steps=2", "--config.checkpoint.every_steps=2",
        "--config.optimizer.warmup_steps=1",
    ),
    "ppo": (
        "--config.batch_size=16", "--config.minibatches=2", "--config.total_episodes=32",
        "--config.sampling.max_new_tokens=16", "--config.compute.unroll=2",
        "--config.eval_batches=1", "--config.sample_every_steps=1",
        "--config.optimizer.warmup_steps=1", "--config.value_optimizer.warmup_steps=1",
    ),
    "evaluate": (
        "--config.batch_size=16", "--config.data.num_prompts=32", _TOKENS,
        "--config.data.pretraining_batches=1", "--config.sampling.max_new_tokens=16",
        "--config.bootstrap.resamples=200",
    ),
    "chat": ("--max_new_tokens=8",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Command:
    """One line of a bash block, continuation lines joined, comments and variables left out."""

    block: int
    words: tuple[str, ...]

    @property
    def module(self) -> str | None:
        """What `python -m` runs, if that is what the command does."""
        return self.words[2] if self.words[:2] == ("python", "-m") else None

    @property
    def launched(self) -> tuple[str, ...]:
        """The program that a script is told to start, and its flags."""
        if self.words[0] != "bash":
            return ()
        starts = (i for i, word in enumerate(self.words) if word.startswith("gptlab."))
        return self.words[next(starts, len(self.words)) :]

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.words[3:]

    def value(self, flag: str) -> str | None:
        start = f"--{flag}="
        return next((w.removeprefix(start) for w in self.words if w.startswith(start)), None)

    @property
    def stage(self) -> tuple[str | None, str]:
        """The program and its config's argument: what the workdirs and inputs depend on."""
        return self.module, (self.value("config") or "").partition(":")[2]

    @property
    def places(self) -> dict[str, str]:
        """Its workdir, and those of its inputs."""
        flags = (word.partition("=") for word in self.arguments)
        return {f: at for f, _, at in flags if f == "--workdir" or f.startswith("--config.inputs.")}

    @property
    def shrunk(self) -> tuple[str, ...]:
        """The same command with the overrides of SHRUNK."""
        assert self.module is not None
        program, argument = self.module.removeprefix("gptlab."), self.stage[1]
        return self.words + SHRUNK[f"{program}:{argument}" if argument else program]


def commands():
    found = []
    for number, block in enumerate(re.findall(r"^```bash\n(.*?)^```", README, re.S | re.M)):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(Command(number, tuple(words)))
    return found


def documented_commands():
    """Those of module docstrings, as they stand in the source: that is what people copy."""
    found = []
    for path in sorted([*ROOT.glob("gptlab/*.py"), *ROOT.glob("configs/*.py")]):
        source = path.read_text()
        docstring = "\n".join(source.splitlines()[: ast.parse(source).body[0].end_lineno])
        for line in docstring.replace("\\\n", " ").splitlines():
            if line.startswith("    python -m "):
                command = Command(-1, tuple(shlex.split(line, comments=True)))
                found.append(pytest.param(command, id=f"{path.relative_to(ROOT)}: {ids(command)}"))
    return found


def ids(command):
    return " ".join(command.words)[:70]


COMMANDS = commands()
DOCUMENTED = documented_commands()
STAGES = [
    c
    for c in COMMANDS
    if c.block == next(x.block for x in COMMANDS if x.module == "gptlab.prepare")
]


def module_path(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def test_the_commands_are_found():
    programs = {c.module for c in STAGES}
    loops = {"pretrain", "sft", "reward", "ppo"}
    assert programs >= {f"gptlab.{name}" for name in loops | {"prepare", "evaluate", "chat"}}
    assert any(c.words[:2] == ("bash", "launch/quickstart.sh") for c in COMMANDS)
    programs = {c.module for c in COMMANDS if c.module and c.value("config")}
    assert programs <= {command.values[0].module for command in DOCUMENTED}


@pytest.mark.parametrize("command", [*(pytest.param(c, id=ids(c)) for c in COMMANDS), *DOCUMENTED])
def test_what_a_command_names_is_there(command):
    if command.words[0] == "bash":
        assert (ROOT / command.words[1]).is_file()
        if launched := command.launched:
            module, *flags = launched
            assert module_path(module).is_file() and any(w.startswith("--workdir=") for w in flags)
            config, *overrides = (w for w in flags if w.startswith("--config"))
            check_config(config.removeprefix("--config="), overrides)
            assert set(flags) <= {config, *overrides, f"--workdir={command.value('workdir')}"}
            return
        if command.words[1] == "launch/quickstart.sh":  # whose flags are those of its program
            variant = [f":{w}" for w in command.words[2:3] if not w.startswith("-")]
            overrides = [w for w in command.words[2:] if w.startswith("-")]
            check_config(f"configs/quickstart.py{''.join(variant)}", overrides)
        return
    assert command.module is not None, "neither `bash FILE` nor `python -m MODULE`: say how to test"
    if command.module in ("pip", "pytest"):
        return
    assert module_path(command.module).is_file()
    config = command.value("config")
    if config is None:
        check_options(command.module, command.arguments)
        return
    given = [w for w in command.arguments if not w.startswith(("--config=", "--workdir="))]
    own = [w for w in given if not w.startswith("--config.")]
    if command.module == "gptlab.plan":  # it makes no artifact and has flags beside the config
        assert {w.partition("=")[0].removeprefix("--") for w in own} <= set(plan.FLAGS)
    else:
        assert command.value("workdir") and not own
    check_config(config, [w for w in given if w not in own])


@pytest.mark.parametrize("command", DOCUMENTED)
def test_docstrings_name_the_workdirs_of_the_readme(command):
    if command.module == "gptlab.plan":
        assert not command.places  # nothing is read, nothing has to be kept
    elif command.value("config"):
        known = [c.places for c in COMMANDS if c.stage == command.stage]
        assert command.places in known
    else:  # chat takes any workdir with a language model
        assert command.value("workdir") in [c.value("workdir") for c in COMMANDS]


def check_config(config, overrides):
    """The config file builds, and takes every override: what the program's own flag does."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    path, *argument = config.split(":", 1)
    place = ":".join([str(ROOT / path), *argument])
    line = ["program", f"--config={place}", *overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line)  # where the flag looks for its overrides
        assert values(line) == ["program"]
    assert values["config"].value.is_locked


def check_options(module, arguments):
    """A program with flags of its own: its --help names them."""
    options = {word.partition("=")[0] for word in arguments}
    assert all(option.startswith("--") for option in options)
    assert options <= options_of(module)


@functools.cache
def options_of(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--\w+", done.stdout))


@pytest.mark.parametrize("folder", ["gptlab/run", "launch", "benchmarks", "configs", "notebooks"])
def test_the_map_names_every_file(folder):
    tree = README.partition("## Map")[2]
    part = tree.partition(f"\n{folder.replace('gptlab/', '  ')}/ ")[2]
    # Lines of the next folder begin as this one's did.
    part = re.split(r"\n  \w+/ " if "gptlab/" in folder else r"\n\w+/ ", part)[0]
    files = {p.name for p in (ROOT / folder).iterdir() if re.fullmatch(r"\w+\.\w+", p.name)}
    assert files - {"__init__.py"} <= set(re.findall(r"\w+\.\w+", part))


def test_a_wrong_key_in_a_command_is_noticed():
    with pytest.raises(AttributeError):
        check_config("configs/sft.py", ["--config.inputs.model=runs/pretrain"])
    with pytest.raises((flags.Error, ValueError, TypeError)):
        check_config("configs/sft.py", ["--config.batch_size=many"])


def test_programs_named_in_the_text_are_there():
    named = set(re.findall(r"python -m ((?:gptlab|benchmarks)\.\w+)", README))
    assert named and all(module_path(module).is_file() for module in named)
    for path in re.findall(r"\b(?:configs|launch|notebooks|benchmarks)/[\w/]+\.\w+", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.smoke
@pytest.mark.timeout(900)
def test_the_stages_by_hand_end_in_a_chat(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = compiling.environment(PYTHONPATH=str(ROOT))
    for command in STAGES:
        done = subprocess.run(
            [sys.executable, *command.shrunk[1:]], cwd=tmp_path, env=environment,
            input="hello, how are you?\n", capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command.words)}\n{done.stderr}"
        if workdir := command.value("config") and command.value("workdir"):
            assert artifact.read_manifest(tmp_path / workdir)["status"] == "done"
    assert STAGES[-1].module == "gptlab.chat" and done.stdout.endswith("\n")
