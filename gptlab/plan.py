"""Plan before you pay: any training config, compiled for hardware you don't have.

    python -m gptlab.plan --config=configs/pretrain.py --topology=v5e:4x4

Compiles the very functions that the stage would run (the training step; for PPO also rollout,
scoring and the whole update) from shapes alone: no data, no checkpoint, no TPU. Says whether the
config fits the chips and by how much, what fills their memory, how many FLOPs a step takes, what
the chips send each other, and an estimated range for the time of a step. Where it does not fit, the
knobs that could help are turned and compiled too (not with `--noknobs`). `--search` tries meshes
and batch sizes.

What a config's `inputs.init` will be, and the topology it is meant for, stand in the `hardware`
function at its foot. `--model=PRESET` and `--topology=v5p:4x4x8` (chips, not the cores that Google
counts) say otherwise; `--devices=cpu:8` plans for this machine. With --workdir=DIR, every plan that
was compiled is kept there as JSON, by the hash of the config and libtpu's version, and read again.

TPUs need libtpu: `pip install -c constraints.txt -e '.[tpu]'` in an environment of its own. A step
of pretrain, sft and reward compiles in 1 to 4 minutes on two cores, of 124M parameters or of 70B,
PPO's in 3 to 18. What $LIBTPU_INIT_ARGS says counts, as it does on a TPU.
"""

import dataclasses
import functools
import hashlib
import json
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gptlab import ppo, pretrain, reward, sft
from gptlab.data.batches import ComparisonBatch, PromptBatch, TokenBatch
from gptlab.model import lora, sharding
from gptlab.model.decode import Sampling
from gptlab.model.heads import ScalarModel
from gptlab.model.presets import PRESETS
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.rl import actor, kl
from gptlab.rl.rollout import Rollout, Samples
from gptlab.run import artifact, files, program, storage
from gptlab.run.errors import UserError
from gptlab.train import chips, compiled, flops, plan_report, state
from gptlab.train import mesh as mesh_lib
from gptlab.train.checkpoint import load_model_config
from gptlab.train.chips import Chip
from gptlab.train.compiled import Phase, floats, ints, key_on, per_device
from gptlab.train.optimizer import make_optimizer
from gptlab.train.plan_report import Plan

# A stage is known by a key that only its configs have.
STAGES = {"z_loss": "pretrain", "loss_on": "sft", "normalise": "reward", "minibatches": "ppo"}
SCHEMA_VERSION = 2
LOSS_CHUNK = 8192  # rows of the vocabulary, where the loss is to take fewer at once


@dataclasses.dataclass(frozen=True)
class Target:
    """What a config is planned for."""

    name: str  # v5e:4x4 or cpu:8
    chip: Chip | None  # None: this machine
    devices: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """A config with what its inputs will hold."""

    stage: str
    config: ConfigDict
    model: ModelConfig  # of the policy, or what is trained
    paid_by: ModelConfig  # of the reward model and the critic; only PPO has them
    changes: str = ""  # of what the config's file says, as flags

    @property
    def name(self) -> str:
        """Of the config: FILE.py:argument, and what differs from it."""
        return f"{program.config_path()} {self.changes}".rstrip()


def run(
    config: ConfigDict,
    workdir: str | None,
    topology: str | None,
    devices: str | None,
    model: str | None,
    search: bool,
    knobs: bool,
) -> None:
    """Prints the plan of a config, and keeps it in `workdir`.

    Raises:
      UserError: no training stage's config, an unknown topology or architecture, a mesh that the
        model or batch can't be divided over.
    """
    jax.config.update("jax_platforms", "cpu")  # whatever else this machine has is left alone
    if devices:
        chips.divide(devices)
    named = hardware(program.config_path())
    target = make_target(topology, devices, named)
    if target.chip is not None:  # what is compiled for others can't be read back
        jax.config.update("jax_enable_compilation_cache", False)
    job = dataclasses.replace(make_job(config, model, named), changes=given(config, model))
    if search:
        print(plan_report.search_table(searched(job, target, workdir)))
        return
    plan = kept_plan(job, target, workdir)
    print(plan_report.describe(plan))
    if knobs and not plan.fits:
        print(plan_report.knob_table(plan, turned(job, target, workdir)))


def given(config: ConfigDict, preset: str | None) -> str:
    """What the command line says beside --config=FILE and a target, and the file doesn't."""
    plain = program.load_config(program.config_path())
    flags = as_flags(differing(plain, config, program.given_keys()))
    return f"{flags} --model={preset}".lstrip() if preset else flags


def hardware(path: str) -> Mapping[str, Any]:
    """What the config file says of where it runs, and of the models among its inputs."""
    return program.call_config(path, "hardware", lambda *argument: {})


def make_target(topology: str | None, devices: str | None, named: Mapping[str, Any]) -> Target:
    """The devices to plan for: --devices, --topology, or what the config names."""
    if topology and devices:
        raise UserError("--topology and --devices exclude each other: give one")
    if devices:
        return Target(devices, None, chips.local(devices))
    topology = topology or named.get("topology")
    if topology is None:
        raise UserError("this config names no topology: give --topology=v5e:4x4 or --devices=cpu:8")
    return Target(topology, *chips.describe(topology))


def make_job(config: ConfigDict, preset: str | None, named: Mapping[str, Any]) -> Job:
    """The config's stage and the architectures that it will meet."""
    stages = [stage for key, stage in STAGES.items() if key in config]
    if len(stages) != 1:
        raise UserError(
            f"--config is none of {', '.join(STAGES.values())}: those are what can be planned"
        )
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--model={preset!r} is not one of {', '.join(PRESETS)}")
    compute = config.compute.to_dict()

    def architecture(name: str, otherwise: str) -> Any:
        if preset is not None:
            return PRESETS[preset]
        if config.inputs[name]:
            return load_model_config(config.inputs[name])
        return named.get(otherwise)

    (stage,) = stages
    if stage == "pretrain" and "model" in config:
        pretrain.check_declared(config)
        found = config.model.to_dict()
    else:
        found = architecture("init", "model")
    if found is None:
        raise UserError(
            "the architecture is that of config.inputs.init: give that, or --model=PRESET "
            f"({', '.join(PRESETS)})"
        )
    paid_by = found
    if stage == "ppo" and config.reward.kind == "model":
        paid_by = architecture("reward", "reward_model") or found
    model, critic = (ModelConfig.build(a, compute) for a in (found, paid_by))
    return Job(stage, config, model, critic)


def kept_plan(job: Job, target: Target, workdir: str | None) -> Plan:
    """The plan that is in `workdir`; otherwise it is made, and kept there if there is one."""
    if workdir is None:
        return make_plan(job, target)
    path = storage.resolve(workdir) / f"{cache_key(job, target)}.json"
    if path.exists():
        return plan_report.from_json(path.read_text())
    plan = make_plan(job, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(path, plan_report.to_json(plan))
    return plan


def make_plan(job: Job, target: Target) -> Plan:
    """Compiles every phase of a step and puts their figures together."""
    mesh = mesh_lib.make_mesh(job.config.mesh, target.devices)
    with jax.set_mesh(mesh):
        phases, memory, tokens = PHASES[job.stage](job, target.chip, mesh)
    return Plan(
        schema_version=SCHEMA_VERSION,
        config=job.name,
        target=target.name,
        chips=mesh.size,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        params=job.model.num_params(),
        tokens=tokens,
        limit_bytes=plan_report.limit_bytes(target.chip, mesh.size),
        memory=memory,
        phases=phases,
        chip=target.chip,
        useful_flops=useful_flops(job),
        libtpu=chips.compiler(),
        commit=artifact.git_commit(),
    )


def trained(job: Job, model: Any, optimizer: ConfigDict, mesh: Mesh) -> tuple[Any, Any, Any, Any]:
    """(abstract state, shardings, optimiser, schedule) of a model that a stage trains."""
    # How long training lasts changes constants of the schedule only.
    tx, schedule = make_optimizer(optimizer, max(1, optimizer.warmup_steps))
    params = state.param_shardings(functools.partial(init_params, model), mesh)
    lora.check(job.config.lora, model.config)
    params = lora.extend(*params, job.config.lora)
    return *state.abstract_state(*params, tx, mesh), tx, schedule


def token_batch(rows: int, length: int) -> Any:
    """An abstract batch of packed rows."""
    shape = (rows, length)
    return TokenBatch(ints(*shape), ints(*shape), floats(*shape), ints(*shape), ints(*shape))


def supervised(job: Job, chip: Chip | None, mesh: Mesh) -> tuple[list[Phase], dict[str, int], int]:
    """The one phase of pretrain, sft and reward."""
    config, data = job.config, job.config.data
    stage: ModuleType = {"pretrain": pretrain, "sft": sft, "reward": reward}[job.stage]
    mesh_lib.check_batch_size("batch_size", config.batch_size, mesh, config.accumulation_steps)
    model: Any = LanguageModel(job.model)
    batch, rows = token_batch(config.batch_size, data.seq_len), config.batch_size
    predicted = rows * data.seq_len
    if job.stage == "reward":
        reward.check_loss_chunk(config)
        model, shape = ScalarModel(job.model), (config.batch_size, data.max_candidates)
        batch = ComparisonBatch(
            ints(*shape, data.seq_len), ints(*shape), ints(*shape), floats(config.batch_size)
        )
        rows, predicted = rows * data.max_candidates, 0
    abstract, shardings, tx, schedule = trained(job, model, config.optimizer, mesh)
    adapters = flops.Adapters.of(config)
    step = stage.jit_step(model, tx, schedule, config, shardings, mesh)
    counted = flops.train(job.model, rows, data.seq_len, predicted, mesh.shape, adapters)
    if config.optimizer.name == "muon":
        counted += flops.muon(job.model, adapters)
    phase, _ = compiled.measure(
        "step",
        step,
        (abstract, mesh_lib.abstract_batch(batch, mesh), key_on(mesh)),
        chip=chip,
        counted_flops=counted,
        kernel_flops=flops.splash(job.model, rows, data.seq_len, backward=True),
        beside_bytes=0,
    )
    memory = {
        "params": per_device(abstract.params),
        "optimizer": per_device(abstract.opt_state),
    }
    return [phase], memory, rows * data.seq_len


def reinforced(job: Job, chip: Chip | None, mesh: Mesh) -> tuple[list[Phase], dict[str, int], int]:
    """The phases of a step of PPO, each from the shardings that the one before left."""
    config, model, scalar = job.config, LanguageModel(job.model), ScalarModel(job.paid_by)
    rows, updates = config.batch_size, config.epochs * config.minibatches
    prompt, new = config.data.prompt_len, config.sampling.max_new_tokens
    length = prompt + new
    ppo.check_batches(config, mesh)
    adapters = flops.Adapters.of(config)
    policy, policy_sh, policy_tx, schedule = trained(job, model, config.optimizer, mesh)
    critic, critic_sh, critic_tx, _ = trained(job, scalar, config.value_optimizer, mesh)
    memory = {
        "params": per_device(policy.params),
        "optimizer": per_device(policy.opt_state),
        "critic": per_device(critic.params),
        "critic optimizer": per_device(critic.opt_state),
    }
    frozen = {}
    ppo.check_offload(config)
    if ppo.stands_apart(config):  # else it stands in what is trained
        plain = state.param_shardings(functools.partial(init_params, model), mesh)
        frozen["reference"] = per_device(state.abstract(*plain))
    if config.reward.kind == "model" and not adapters.rank:
        frozen["reward model"] = per_device(critic.params)
    memory |= {} if config.offload else frozen
    kept = sum(memory.values())
    fetched = frozen if config.offload else {}  # for as long as it scores
    critics = memory["critic"] + memory["critic optimizer"]
    away = critics if config.offload else 0  # while replies are drawn
    measure = functools.partial(compiled.measure, chip=chip)

    # What draws and scores; which tokens end a reply does not change what they cost.
    sampling = Sampling(**config.sampling.to_dict(), stop_tokens=(1,))
    functions = actor.jit_functions(model, scalar, sampling, pad_id=0)
    asked = PromptBatch(ints(rows, prompt), ints(rows), ints(rows))
    cache = abstract_cache(job.model, rows, length, mesh)
    own_rows = cache.sharding.shard_shape(cache.shape)[0]
    repeated = own_rows * mesh.size // (mesh.shape["tensor"] * rows)  # rows that don't divide
    rollout, samples = measure(
        "rollout",
        functions.sample,
        (policy.params, mesh_lib.abstract_batch(asked, mesh), key_on(mesh)),
        counted_flops=repeated * flops.generate(job.model, rows, prompt, new, adapters),
        beside_bytes=kept - memory["params"] - away,
    )
    if samples is None:  # as any batch lies, to go on with the other phases
        samples = mesh_lib.abstract_batch(abstract_samples(rows, prompt, new), mesh)
    score, scored = measure(
        "score",
        functions.logprobs,
        (policy.params, samples),
        counted_flops=flops.forward(job.model, rows, length, rows * new, mesh.shape, adapters),
        kernel_flops=flops.splash(job.model, rows, length, backward=False),
        beside_bytes=kept - memory["params"] + fetched.get("reference", 0),
        calls=2,  # policy and reference
    )
    value, _ = measure(
        "value",
        functions.scalars,
        (critic.params, samples),
        counted_flops=flops.forward(job.paid_by, rows, length, 0, mesh.shape, adapters),
        kernel_flops=flops.splash(job.paid_by, rows, length, backward=False),
        beside_bytes=kept - memory["critic"] + fetched.get("reward model", 0),
        calls=2 if config.reward.kind == "model" else 1,
    )
    per_token = mesh_lib.abstract_batch(floats(rows, new), mesh)
    logprobs, entropy = scored if scored is not None else (per_token, per_token)
    per_reply = mesh_lib.abstract_batch(floats(rows), mesh)
    data = Rollout(samples, logprobs, entropy, logprobs, per_token, per_reply)
    whole: Any = NamedSharding(mesh, PartitionSpec())
    coef: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    update = ppo.jit_update(
        model, scalar, (policy_tx, critic_tx), schedule, kl.make_controller(config.kl), config,
        ppo.PPOState(policy_sh, critic_sh, whole), mesh,
    )  # fmt: skip
    seen = rows * config.epochs
    counted = flops.train(job.model, seen, length, seen * new, mesh.shape, adapters)
    counted += flops.train(job.paid_by, seen, length, 0, mesh.shape, adapters)
    inside = sum(
        flops.splash(model, seen, length, backward=True) for model in (job.model, job.paid_by)
    )
    ptx = None
    if config.ptx.coef:
        width = config.ptx.seq_len
        ptx = mesh_lib.abstract_batch(token_batch(config.ptx.batch_size * updates, width), mesh)
        ptx_rows = config.ptx.batch_size * updates
        counted += flops.train(job.model, ptx_rows, width, ptx_rows * width, mesh.shape, adapters)
        inside += flops.splash(job.model, ptx_rows, width, backward=True)
    learn, _ = measure(
        "update",
        update,
        (ppo.PPOState(policy, critic, coef), data, ptx, key_on(mesh)),
        counted_flops=counted,
        kernel_flops=inside,
        beside_bytes=sum(frozen.values()) - sum(fetched.values()),
    )
    memory["KV cache (rollout)"] = 2 * job.model.num_layers * per_device(cache)
    memory |= {f"{name}, scoring only": size for name, size in fetched.items()}
    return [rollout, score, value, learn], memory, rows * length


def abstract_cache(model: ModelConfig, rows: int, slots: int, mesh: Mesh) -> Any:
    """The keys of a layer's cache while decoding; its values lie alike."""
    shape = (rows, model.num_kv_heads, slots, model.head_dim)
    with sharding.decoding():
        spec = sharding.activation_spec(shape, ("batch", "act_heads", "kv_length", None))
    return jax.ShapeDtypeStruct(shape, model.dtype, sharding=NamedSharding(mesh, spec))


def abstract_samples(rows: int, prompt: int, new: int) -> Samples:
    """Replies' shapes."""
    return Samples(
        tokens=ints(rows, prompt + new),
        prompt_lengths=ints(rows),
        lengths=ints(rows),
        scored_lengths=ints(rows),
        response=ints(rows, new),
        response_mask=floats(rows, new),
        finished=jax.eval_shape(lambda: jnp.zeros((rows,), bool)),  # type: ignore[arg-type]
        decode_logprobs=floats(rows, new),
    )


PHASES: Mapping[str, Callable[..., tuple[list[Phase], dict[str, int], int]]] = {
    "pretrain": supervised,
    "sft": supervised,
    "reward": supervised,
    "ppo": reinforced,
}


def useful_flops(job: Job) -> int | None:
    """FLOPs that a supervised step needs, causal attention; None for PPO, which has no MFU."""
    config = job.config
    if job.stage == "ppo":
        return None
    rows, length = config.batch_size, config.data.seq_len
    adapters = flops.Adapters.of(config)
    if job.stage == "reward":
        return flops.causal_train(job.model, rows * config.data.max_candidates, length, 0, adapters)
    return flops.causal_train(job.model, rows, length, rows * length, adapters)


def changed(config: ConfigDict, **changes: Any) -> ConfigDict:
    """A copy of the config with some keys, 'a.b' for b in a, replaced."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict(changes)
    return copy


def replan(
    job: Job, target: Target, changes: Mapping[str, Any], workdir: str | None
) -> Plan | UserError:
    """The plan with some keys of the config changed, or why there can be none."""
    config = changed(job.config, **changes)
    flags = f"{job.changes} {as_flags(differing(job.config, config, changes))}".strip()
    compute = config.compute.to_dict()
    model, paid_by = (dataclasses.replace(m, **compute) for m in (job.model, job.paid_by))
    try:
        return kept_plan(Job(job.stage, config, model, paid_by, flags), target, workdir)
    except UserError as error:
        return error


def differing(before: ConfigDict, after: ConfigDict, keys: Iterable[str]) -> dict[str, Any]:
    """Those of the keys, 'a.b' for b in a, that have another value after: with it."""
    values = {key: operator.attrgetter(key) for key in keys}
    return {key: get(after) for key, get in values.items() if get(before) != get(after)}


def as_flags(changes: Mapping[str, Any]) -> str:
    """What sets these keys on the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def turned(job: Job, target: Target, workdir: str | None) -> dict[str, Plan | UserError]:
    """What each knob that is not turned yet would make of a config that does not fit."""
    config = job.config
    knobs: dict[str, dict[str, Any]] = {}
    if config.compute.remat != "full":
        knobs["remat"] = {"compute.remat": "full"}
    if job.stage != "reward" and not config.compute.loss_chunk:
        chunk = min(LOSS_CHUNK, job.model.vocab_size // 4)
        knobs["loss_chunk"] = {"compute.loss_chunk": chunk}
    if target.chip is not None and config.compute.attention != "splash":
        knobs["attention"] = {"compute.attention": "splash"}
    if job.stage == "ppo" and not config.offload and not config.lora.rank:
        knobs["offload"] = {"offload": True}
    knobs["accumulation"] = {"accumulation_steps": 2 * config.accumulation_steps}
    alone: dict[str, Any] = {"mesh.replica": 1, "mesh.data": 1, "mesh.context": 1, "mesh.tensor": 1}
    if any(config.mesh[axis.partition(".")[2]] != 1 for axis in alone):
        knobs["fsdp"] = {**alone, "mesh.fsdp": -1}
    return {
        f"{name}: {as_flags(changes)}": replan(job, target, changes, workdir)
        for name, changes in knobs.items()
    }


def searched(job: Job, target: Target, workdir: str | None) -> dict[str, Plan | UserError]:
    """Meshes and batch sizes around the config's own."""
    count = len(target.devices)
    meshes = [(1, tensor) for tensor in (1, 2, 4, 8) if count % tensor == 0]
    meshes += [(data, 1) for data in (2, 4) if count % data == 0]
    found: dict[str, Plan | UserError] = {}
    for data, tensor in meshes:
        for factor in (0.5, 1, 2):
            rows = int(job.config.batch_size * factor)
            changes = {
                "mesh.replica": 1, "mesh.data": data, "mesh.fsdp": -1, "mesh.context": 1,
                "mesh.tensor": tensor, "batch_size": rows,
            }  # fmt: skip
            name = f"data {data}, fsdp {count // data // tensor}, tensor {tensor}; batch {rows}"
            found[name] = replan(job, target, changes, workdir)
            print(plan_report.search_line(name, found[name]), file=sys.stderr, flush=True)
    return found


def cache_key(job: Job, target: Target) -> str:
    """Names what a plan depends on: config, architectures, target and libtpu."""
    told = [
        job.stage,
        job.config.to_dict(),
        dataclasses.asdict(job.model),
        dataclasses.asdict(job.paid_by),
        target.name,
        chips.compiler() if target.chip else jax.__version__,
        SCHEMA_VERSION,
    ]
    text = json.dumps(told, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{job.stage}-{target.name.replace(':', '-')}-{digest}"


FLAGS: Mapping[str, tuple[bool | None, str]] = {
    "topology": (None, "A TPU slice: v5e:4x4, v5p:4x4x8. The config's own, if it names one."),
    "devices": (None, "cpu:N, virtual devices of this machine, in place of a topology."),
    "model": (None, "A preset, in place of what config.inputs will hold."),
    "search": (False, "Try meshes and batch sizes."),
    "knobs": (True, "Where it does not fit, compile what could help, too."),
}

if __name__ == "__main__":
    program.main(run, "plan", FLAGS, needs_workdir=False)
