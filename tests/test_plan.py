"""Plans of tiny models: the programs' own steps, products counted exactly, memory, figures."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plans
from configs import common, ppo, pretrain, reward, sft
from gptlab import plan
from gptlab.model.presets import PRESETS
from gptlab.run import program
from gptlab.run.errors import UserError
from gptlab.train import chips, compiled, estimate, flops, plan_report
from gptlab.train.chips import CHIPS, GIB
from tests.tpu import compile_for_tpu, needs_libtpu

ROOT = Path(__file__).parents[1]
COMMAND = ["plan", "--config=configs/tiny.py"]
TINY = {name: dict(PRESETS[name]) for name in ("tiny", "tiny_gpt2", "tiny_qwen3")}


def tiny_config(stage, **changes):
    """A config of a stage ('pretrain:init' without a model), small enough to compile in seconds."""
    stage, _, arg = stage.partition(":")
    module = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo}[stage]
    config = module.get_config(*[arg] * bool(arg))
    config.compute = common.compute()
    if "model" in config:
        config.model = common.model("tiny")
    if stage in ("pretrain", "sft"):
        config.data.seq_len = 64
    if stage == "reward":
        config.data.update(seq_len=64, max_candidates=2)
    if stage == "ppo":
        config.data.prompt_len, config.sampling.max_new_tokens = 24, 8
        config.minibatches = 2
    config.batch_size = 16
    config.update_from_flattened_dict(changes)
    return config


def make(config, model="tiny", devices="cpu:8", **named):
    target = plan.make_target(None, devices, {})
    job = plan.make_job(config, None, {"model": TINY[model], **named})
    return plan.make_plan(job, target)


@pytest.fixture(autouse=True)
def a_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", COMMAND)


@pytest.fixture(scope="module")
def alone():
    """SFT on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", COMMAND)
        return make(tiny_config("sft"), devices="cpu:1")


@pytest.fixture(scope="module")
def split():
    """The same on eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", COMMAND)
        return make(tiny_config("sft"))


def check_products(found):
    for phase in found.phases:
        assert phase.flops == phase.counted_flops > 0, phase.name


def test_products_are_exactly_those_counted(split):
    """On eight devices: nothing is multiplied twice, and no loop is missed."""
    check_products(split)
    assert split.fits and split.chips == 8 and split.mesh == {"fsdp": 8}
    assert set(split.phases[0].sent_bytes) >= {"all-gather", "all-reduce"}


SLOW_PPO = pytest.param("ppo", (1, 2), marks=pytest.mark.slow)


@pytest.mark.parametrize("stage, mesh", [("pretrain", (2, 2)), ("reward", (2, 2)), SLOW_PPO])
def test_products_are_exactly_those_counted_on_other_meshes(stage, mesh):
    data, tensor = mesh
    found = make(tiny_config(stage, **{"mesh.data": data, "mesh.tensor": tensor}))
    assert [phase.name for phase in found.phases] == (
        ["rollout", "score", "value", "update"] if stage == "ppo" else ["step"]
    )
    check_products(found)


@pytest.mark.parametrize(
    "model, remat",
    [("tiny", "full"), ("tiny_gpt2", "dots"), ("tiny_qwen3", "minimal"), ("tiny_gpt2", "offload")],
)
def test_what_is_computed_again_is_counted(model, remat):
    config = tiny_config("sft", **{"compute.remat": remat, "accumulation_steps": 2})
    check_products(make(config, model, "cpu:1"))


@pytest.mark.parametrize("chunk, rows", [(200, 4 * 3 * 171), (512, 3 * 512)])
def test_a_loss_in_chunks_is_counted(alone, chunk, rows):
    """512 rows are three chunks of 171, with logits computed again; or one, kept as without."""
    config = tiny_config("sft", **{"compute.loss_chunk": chunk})
    found = make(config, devices="cpu:1")
    check_products(found)
    more = 2 * found.tokens * TINY["tiny"]["d_model"] * (rows - 3 * 512)
    assert found.phases[0].flops - alone.phases[0].flops == more
    assert found.useful_flops == alone.useful_flops


def test_a_loss_in_chunks_is_counted_on_a_mesh():
    """The two devices' 256 rows are three chunks of 86."""
    changes = {"mesh.tensor": 2, "compute.loss_chunk": 100, "compute.remat": "minimal"}
    check_products(make(tiny_config("sft", **changes)))


def test_ppos_log_probabilities_in_chunks_are_counted():
    check_products(make(tiny_config("ppo", **{"compute.loss_chunk": 200}), devices="cpu:1"))


@pytest.mark.parametrize("ways, remat", [(2, "none"), (4, "minimal")])
def test_a_split_sequence_is_counted(split, ways, remat):
    """Fewer products than a whole one has: most of what causality hides is left out."""
    found = make(tiny_config("sft", **{"mesh.context": ways, "compute.remat": remat}))
    check_products(found)
    if remat == "none":
        assert found.phases[0].flops < split.phases[0].flops


def test_splash_attention_is_counted_apart():
    """By hand: four blocks of 1,024 leave 10 of 16; 2 products forward, 3 and 4 backward."""
    config = plan.make_job(tiny_config("sft"), None, {"model": TINY["tiny"]}).model
    kernel = dataclasses.replace(config, attention="splash")
    one = 2 * 32 * (10 * 1024**2) * 3 * config.num_layers  # of 3 rows
    assert flops.splash(config, 3, 4096, backward=True) == 0
    assert flops.splash(kernel, 3, 4096, backward=False) == 2 * one
    assert flops.splash(kernel, 3, 4096, backward=True) == 9 * one
    again = dataclasses.replace(kernel, remat="full")
    assert flops.splash(again, 3, 4096, backward=True) == 11 * one
    ways = {"context": 1, "tensor": 1}
    whole, without = (flops.forward(c, 3, 4096, 0, ways) for c in (config, kernel))
    assert whole - without == 2 * 2 * 3 * 32 * 4096**2 * config.num_layers


@pytest.mark.parametrize("rows, repeated", [pytest.param(16, 1, marks=pytest.mark.slow), (8, 2)])
def test_a_context_axis_splits_the_rows_of_a_rollout(rows, repeated):
    """Where they divide: eight rows on data 2 x fsdp 4 have none left for context 2."""
    changes = {"mesh.context": 2, "mesh.data": 4 // repeated, "batch_size": rows}
    changes |= {"mesh.fsdp": 1, "mesh.tensor": repeated, "accumulation_steps": 1}
    found = make(tiny_config("ppo", **changes))
    check_products(found)


def test_muons_products_are_counted():
    config = tiny_config("sft")
    config.optimizer = common.muon(0.02, adam_lr=0.01)
    check_products(make(config, devices="cpu:1"))


def test_ptx_and_a_larger_reward_model_are_counted():
    config = tiny_config(
        "ppo", **{"ptx.coef": 1.0, "ptx.batch_size": 8, "ptx.seq_len": 32, "epochs": 2}
    )
    larger = {**TINY["tiny"], "num_layers": 3}
    found = make(config, devices="cpu:1", reward_model=larger)
    check_products(found)
    assert found.memory["critic"] > found.memory["params"]
    # In a rollout the rest of the state stays where it is.
    assert found.phases[0].beside_bytes > 6 * found.memory["params"]


def test_memory_is_what_a_chip_holds(alone, split):
    params = 4 * alone.params
    assert alone.memory["params"] == params
    assert alone.memory["optimizer"] == pytest.approx(2 * params, rel=1e-3)
    assert split.memory["params"] < 1.1 * params / 8
    (phase,) = alone.phases
    assert phase.needed_bytes >= phase.argument_bytes > 3 * params


def test_the_step_is_the_programs_own(monkeypatch):
    """A changed loop is planned changed: there is no copy of it."""
    asked = []
    real = plan.sft.jit_step
    monkeypatch.setattr(plan.sft, "jit_step", lambda *args: asked.append(args) or real(*args))
    make(tiny_config("sft"), devices="cpu:1")
    assert len(asked) == 1


def test_a_plan_comes_back_from_json(alone):
    text = plan_report.to_json(alone)
    assert plan_report.from_json(text) == alone
    assert json.loads(text)["derived"]["fits"] is True


@pytest.mark.parametrize("communication, warned", [(0.5, False), (0.52, True)])
def test_sending_for_more_than_a_quarter_of_a_step_is_warned_of(alone, communication, warned):
    seconds = estimate.Seconds(1.0, 2.0, communication)
    phase = dataclasses.replace(alone.phases[0], seconds=seconds)
    text = plan_report.describe(
        dataclasses.replace(alone, phases=[phase], chip=CHIPS["v5e"], useful_flops=None)
    )
    line = "WARNING: sending takes 0.52 s by itself, 26% of a step: it may not hide"
    assert "a step takes 1 s (floor) to 2 s (mixed)" in text
    assert ("WARNING" in text, line in text) == (warned, warned)


def test_running_out_of_memory_is_read():
    text = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 21.95G of 15.75G hbm. Exceeded hbm capacity by 6.20G."
    )
    used, line = compiled.exhausted(RuntimeError(text), argument_bytes=GIB)
    assert used == round(21.95 * GIB) and "21.95 GiB of 15.75 GiB" in line
    with pytest.raises(UserError, match="blocks are too large"):
        compiled.exhausted(RuntimeError(text.replace("hbm", "vmem")), 0)
    with pytest.raises(RuntimeError, match="something else"):
        compiled.exhausted(RuntimeError("something else"), 0)
    early = RuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (41.50G) exceeds available HBM (31.25G)."
    )
    used, line = compiled.exhausted(early, argument_bytes=GIB)
    assert used == round(42.5 * GIB) and "41.50 GiB of 31.25 GiB of HBM for temporaries" in line


@pytest.mark.slow  # each knob is a compilation; which are turned is tested below
def test_what_does_not_fit_says_so_and_knobs_are_turned():
    config = tiny_config("sft", **{"data.seq_len": 128, "mesh.data": -1, "mesh.fsdp": 1})
    target = plan.make_target(None, "cpu:2", {})
    job = plan.make_job(config, None, {"model": {**TINY["tiny"], "vocab_size": 2048}})
    before, turned = plan.make_plan(job, target), plan.turned(job, target, None)
    assert [name.split(":")[0] for name in turned] == [
        "remat",
        "loss_chunk",
        "accumulation",
        "fsdp",
    ]
    for name, other in turned.items():
        assert other.needed_bytes < before.needed_bytes, name
    small = dataclasses.replace(before, limit_bytes=before.needed_bytes - 1)
    assert not small.fits and "DOES NOT FIT" in plan_report.describe(small)
    assert plan_report.knob_table(small, turned).count("saves") == 4


@pytest.mark.parametrize(
    "stage, chip, compute, names",
    [
        ("pretrain", "v5e", {}, ["remat", "loss_chunk", "attention", "accumulation"]),
        ("pretrain", None, {"remat": "full", "loss_chunk": 64}, ["accumulation"]),
        ("reward", "v5e", {"attention": "splash"}, ["remat", "accumulation"]),
        ("ppo", None, {"remat": "full", "loss_chunk": 64}, ["offload", "accumulation"]),
    ],
)
def test_knobs_that_are_turned_or_have_no_meaning_are_left_out(
    monkeypatch, stage, chip, compute, names
):
    monkeypatch.setattr(plan, "replan", lambda job, target, changes, workdir: changes)
    target = plan.Target("v5e:2x2", CHIPS.get(chip), ())
    config = tiny_config(stage, **{f"compute.{key}": value for key, value in compute.items()})
    found = plan.turned(plan.make_job(config, None, {"model": TINY["tiny"]}), target, None)
    assert [name.split(":")[0] for name in found] == names
    given = {key: value for changes in found.values() for key, value in changes.items()}
    assert given.get("compute.attention") == ("splash" if "attention" in names else None)
    assert given.get("compute.loss_chunk") == (128 if "loss_chunk" in names else None)


def test_search_ranks_and_keeps_what_it_tried(alone, monkeypatch, capsys, tmp_path):
    """Without compiling: larger batches are made to look faster, odd ones not to fit."""
    made = []

    def planned(job, target):
        made.append(job.name)
        rows = job.config.batch_size
        if job.config.mesh.tensor == 8:
            raise UserError("heads can't be divided")
        seconds = estimate.Seconds(1.0, 2.0 + job.config.mesh.tensor / 10, 0.5)
        phase = dataclasses.replace(alone.phases[0], seconds=seconds)
        limit = 0.0 if rows == 8 else 1e12
        return dataclasses.replace(
            alone, config=job.name, phases=[phase], tokens=rows * 64, limit_bytes=limit,
            chip=CHIPS["v5e"],
        )  # fmt: skip

    monkeypatch.setattr(plan, "make_plan", planned)
    job = plan.make_job(tiny_config("sft"), None, {"model": TINY["tiny"]})
    target, workdir = plan.make_target(None, "cpu:8", {}), str(tmp_path / "plans")
    found = plan.searched(job, target, workdir)
    lines = plan_report.search_table(found).splitlines()[1:]
    assert len(lines) == len(found) == 18
    assert "tensor 1; batch 32" in lines[0] and "sending 24%" in lines[0]
    assert [("not fit" in x, "not possible" in x) for x in (lines[10], lines[-1])] == [
        (True, False), (False, True),
    ]  # fmt: skip
    assert capsys.readouterr().err.count("batch 16") == 6
    kept = {plan_report.from_json(path.read_text()).config for path in Path(workdir).iterdir()}
    assert kept == {name for name in made if "mesh.tensor=8" not in name} and len(kept) == 15
    assert {"configs/tiny.py", "configs/tiny.py --config.batch_size=32"} < kept
    again = plan_report.search_table(plan.searched(job, target, workdir))
    assert again.splitlines()[1:] == lines and len(made) == 18 + 3  # where there is none, again


MISTAKES = [
    (["--config=configs/collect.py", "--devices=cpu:8"], "none of pretrain, sft, reward, ppo"),
    (["--config=configs/sft.py", "--devices=cpu:8"], "give that, or --model=PRESET"),
    (["--config=configs/sft.py", "--devices=cpu:8", "--model=tinny"], "--model='tinny'"),
    (["--config=configs/sft.py", "--model=tiny"], "names no topology"),
    (["--config=configs/sft.py", "--model=tiny", "--topology=v5e"], "CHIP:AxB"),
    (["--config=configs/sft.py", "--model=tiny", "--devices=gpu:8"], "cpu:N"),
    (["--config=configs/sft.py", "--topologie=v5e:4x4"], "Did you mean --topology?"),
]


def start(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "gptlab.plan", *arguments],
        cwd=ROOT, text=True, capture_output=True, timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize("arguments, message", MISTAKES[-1:])
def test_mistakes_end_in_one_line(arguments, message):
    done = start(*arguments)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments, message", MISTAKES[:-1])
def test_mistakes_name_what_to_do(arguments, message):
    given = dict(a.removeprefix("--").split("=", 1) for a in arguments)
    config = program.load_config(given["config"])
    named = program.call_config(given["config"], "hardware", lambda *_: {})
    with pytest.raises(UserError) as caught:
        plan.make_target(given.get("topology"), given.get("devices"), named)
        plan.make_job(config, given.get("model"), named)
    assert message in str(caught.value)


def test_the_command_prints_a_plan_and_keeps_it(tmp_path):
    arguments = (
        "--config=configs/sft.py", "--model=tiny", "--devices=cpu:8", f"--workdir={tmp_path}",
        "--config.data.seq_len=64",
    )  # fmt: skip
    done = start(*arguments)
    assert done.returncode == 0, done.stderr
    assert "FITS" in done.stdout and "equal" in done.stdout and "DIFFERENT" not in done.stdout
    (kept,) = tmp_path.glob("sft-cpu-8-*.json")
    named = plan_report.from_json(kept.read_text()).config
    assert named == "configs/sft.py --config.data.seq_len=64 --model=tiny"
    before = kept.stat().st_mtime_ns
    again = start(*arguments)
    assert again.stdout == done.stdout and kept.stat().st_mtime_ns == before


@pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="buckets need gcsfs: the extra 'cloud'"
)
def test_a_plan_is_kept_in_a_bucket_as_well(bucket, alone, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(sys, "argv", ["plan", f"--config={ROOT}/configs/sft.py"])
    monkeypatch.setattr(plan.chips, "divide", lambda devices: None)  # only before JAX starts
    monkeypatch.setattr(plan, "make_plan", lambda *_: made.append(alone) or alone)
    printed = []
    for _ in range(2):
        plan.run(tiny_config("sft"), "gs://lab/plans/", None, "cpu:1", "tiny", False, False)
        printed.append(capsys.readouterr().out)
    (name,) = bucket.names("lab/plans")
    assert name.startswith("lab/plans/sft-cpu-1-")
    assert len(made) == 1 and "FITS" in printed[0] and printed[0] == printed[1]


def test_results_are_kept_by_what_they_depend_on():
    target = plan.make_target(None, "cpu:1", {})

    def key(stage="sft", model="tiny", **changes):
        job = plan.make_job(tiny_config(stage, **changes), None, {"model": TINY[model]})
        return plan.cache_key(job, target)

    assert key() == key()
    assert len({key(), key(model="tiny_qwen3"), key(batch_size=64), key("reward")}) == 4


@needs_libtpu
def test_a_small_topology_is_planned_from_the_command_line(tmp_path):
    text = compile_for_tpu(
        "-m", "gptlab.plan", "--config=configs/ppo.py", "--model=tiny", "--topology=v5e:2x2",
        "--config.compute.dtype=bfloat16", "--config.compute.unroll=1", "--config.lora.rank=4",
        f"--workdir={tmp_path}", timeout=280,
    )  # fmt: skip
    assert "FITS" in text and "DIFFERENT" not in text
    (path,) = tmp_path.glob("ppo-v5e-2x2-*.json")
    found = plan_report.from_json(path.read_text())
    check_products(found)
    assert [phase.name for phase in found.phases] == ["rollout", "score", "value", "update"]
    assert all(phase.seconds.mixed >= phase.seconds.floor > 0 for phase in found.phases)


@pytest.mark.slow
@pytest.mark.skipif(
    chips.libtpu_version() is None, reason="libtpu is not installed: pip install -e .[tpu]"
)
@pytest.mark.parametrize(
    "stage, changes",
    [
        ("pretrain", {"compute.remat": "full"}),
        ("reward", {"compute.remat": "full"}),
        ("ppo", {"compute.remat": "full"}),
        ("pretrain", {"compute.remat": "minimal", "compute.loss_chunk": 200}),
        ("pretrain", {"compute.loss_chunk": 512, "mesh.context": 2}),
        ("sft", {"compute.attention": "splash", "data.seq_len": 128}),
    ],
)
def test_a_tpu_topology_multiplies_what_was_counted(stage, changes):
    config = tiny_config(stage, **{"compute.dtype": "bfloat16", **changes})
    target = plan.make_target("v5e:2x2", None, {})
    job = plan.make_job(config, None, {"model": TINY["tiny"]})
    found = plan.make_plan(job, target)
    check_products(found)
    for phase in found.phases:
        assert phase.seconds.mixed >= phase.seconds.floor > 0
        assert (phase.kernel_flops > 0) == (config.compute.attention == "splash")
    assert found.fits and found.limit_bytes == 15.75 * GIB


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(10_000)
@pytest.mark.parametrize("name", plans.CONFIGS)
def test_a_shipped_config_fits_what_it_names_and_multiplies_what_was_counted(name, tmp_path):
    """1 to 20 minutes each on two cores. $GPTLAB_PLANS is a workdir that keeps them."""
    workdir = os.environ.get("GPTLAB_PLANS", tmp_path)
    command = ["-m", "gptlab.plan", f"--config=configs/{name}", "--noknobs"]
    text = compile_for_tpu(*command, f"--workdir={workdir}", timeout=9000)
    assert "\nFITS: " in text and "DOES NOT FIT" not in text
    assert "DIFFERENT" not in text


@needs_libtpu
@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_llama_8b_needs_no_more_than_elsewhere(tmp_path):
    """MaxText's own compile of this model, batch and slice needs 9.39 GiB a chip."""
    compile_for_tpu(
        "-m", "gptlab.plan", "--config=configs/pretrain.py:llama3_8b", "--topology=v5e:4x4",
        "--config.model.vocab_size=128256", "--config.batch_size=16", "--config.data.seq_len=2048",
        "--config.compute.remat=full", "--config.compute.loss_chunk=8192",
        "--config.compute.attention=splash", "--noknobs", f"--workdir={tmp_path}", timeout=3600,
    )  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    found = plan_report.from_json(path.read_text())
    check_products(found)
    assert found.needed_bytes <= 9.39 * GIB and found.chips == 16


LORA = {"lora.rank": 4, "lora.targets": ("query", "value", "up", "down")}


@pytest.mark.parametrize(
    "stage, model, devices, changes",
    [
        ("sft", "tiny", "cpu:8", {"mesh.data": 2, "mesh.tensor": 2}),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                (
                    "sft",
                    "tiny_qwen3",
                    "cpu:1",
                    {"compute.remat": "minimal", "compute.loss_chunk": 200},
                ),
                (
                    "reward",
                    "tiny_gpt2",
                    "cpu:1",
                    {"compute.remat": "full", "accumulation_steps": 2},
                ),
                (
                    "sft",
                    "tiny",
                    "cpu:1",
                    {"compute.remat": "dots", "lora.frozen_dtype": "bfloat16"},
                ),
            )
        ),
        pytest.param("ppo", "tiny", "cpu:1", {"compute.remat": "full"}, marks=pytest.mark.slow),
        pytest.param("pretrain:init", "tiny_qwen3", "cpu:1", {}, marks=pytest.mark.slow),
    ],
)
def test_what_adapters_spare_is_counted(stage, model, devices, changes):
    """No product for the gradient of what stands."""
    found = make(tiny_config(stage, **LORA, **changes), model, devices)
    check_products(found)
    assert found.memory["optimizer"] < 0.5 * found.memory["params"]  # of all: twice as much
    if stage == "ppo":  # they stand in policy and critic
        assert not found.memory.keys() & {"reference", "reward model"}


def test_frozen_models_in_the_hosts_memory_are_not_beside_the_update():
    kept, moved = (
        make(tiny_config("ppo", offload=offload), devices="cpu:1") for offload in (False, True)
    )
    before, after = (
        {phase.name: phase.beside_bytes for phase in found.phases} for found in (kept, moved)
    )
    both = kept.memory["reference"] + kept.memory["reward model"]
    assert before["update"] == both and after["update"] == 0
    critics = kept.memory["critic"] + kept.memory["critic optimizer"]
    assert before["rollout"] - after["rollout"] == both + critics
    assert before["score"] - after["score"] == kept.memory["reward model"]
    assert moved.memory["reference, scoring only"] == kept.memory["reference"]


def test_pretraining_is_planned_from_what_its_input_will_be():
    config, named = tiny_config("pretrain:init", **LORA), {"model": TINY["tiny_gpt2"]}
    of_input, of_preset = (plan.make_job(config, x, named).model for x in (None, "tiny"))
    assert (of_input.norm, of_preset.norm) == tuple(TINY[x]["norm"] for x in ("tiny_gpt2", "tiny"))
    with pytest.raises(UserError, match="that of config.inputs.init: give that, or --model"):
        plan.make_job(config, None, {})
    with pytest.raises(UserError, match="config.model begins with random weights"):
        plan.make_job(tiny_config("pretrain", **LORA), None, {})


def test_adapters_of_a_kernel_that_is_not_there_are_refused():
    config = tiny_config("sft", **{"lora.rank": 4, "lora.targets": ("gate",)})
    with pytest.raises(UserError, match="has no 'gate'"):
        make(config, "tiny_gpt2")


def test_what_a_stage_refuses_is_not_planned():
    with pytest.raises(UserError, match="loss_chunk=100 has no meaning for a reward model"):
        make(tiny_config("reward", **{"compute.loss_chunk": 100}))
