"""The documented commands of benchmarks/ start, and at a tiny size give the figures they promise.

No time is asserted: the machine that runs the tests is busy.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plans
from gptlab.train import plan_report
from gptlab.train.compiled import Phase
from gptlab.train.plan_report import Plan
from tests import compiling, serving
from tests.data import hf_vocabularies
from tests.rl import artifacts

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()
)
SPREAD = {"median", "q25", "q75"}


def run(*arguments, timeout=280):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=compiling.environment(),
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " was killed " not in done.stderr  # what is said of a process that does not take leave
    return done.stdout


def figures_of(*arguments):
    """The last line of what a benchmark prints."""
    return json.loads(run(*arguments).splitlines()[-1])


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_the_documented_command_starts(path):
    command = re.search(r"^    (python .*?)( \[.*)?$", path.read_text(), re.MULTILINE)[1]
    try:
        assert "usage:" in run(*shlex.split(command)[1:], "--help")
    except AssertionError as error:
        if "No module named 'torch'" not in str(error):
            raise
        pytest.skip("PyTorch is not installed, and need not be")


def test_a_plan_that_failed_is_in_the_exit_code(monkeypatch, tmp_path, capsys):
    """The others are made, and the table is printed."""
    planned = []

    def run_plan(command, **_):
        planned.append(command)
        return subprocess.CompletedProcess(command, int("--config=configs/sft.py:b" in command))

    monkeypatch.setattr(plans, "CONFIGS", ("sft.py:a", "sft.py:b", "sft.py:c", "ppo.py"))
    monkeypatch.setattr(plans.subprocess, "run", run_plan)
    monkeypatch.setattr(sys, "argv", ["plans", f"--workdir={tmp_path}", "--only=sft"])
    with pytest.raises(SystemExit, match="not planned, as said above: sft.py:b$"):
        plans.main()
    assert len(planned) == 3 and capsys.readouterr().out.count("not planned yet") == 4
    sys.argv[-1] = "--only=sft.py:a"
    plans.main()


def test_the_table_of_plans_is_of_what_is_shipped(tmp_path):
    """Not of what somebody tried since: another batch size, another slice."""
    name, changed = "configs/sft_llama3.py:8b", " --config.batch_size=8"
    tried = [(name, "v5e:4x4"), (name, "v5e:4x8"), (name + changed, "v5e:4x4")]
    step = Phase("step", 1, 1, 1, 0, "", 0, 0, 0, 0, {}, None, 0.0)
    for i, (config, target) in enumerate(tried):
        plan = Plan(2, config, target, 16, {}, 1, 1, 1.0, {}, [step], None, None, None, None)
        path = tmp_path / f"{i}.json"
        path.write_text(plan_report.to_json(plan))
        os.utime(path, (i, i))
    assert [(plan.config, plan.target) for plan in plans.newest(tmp_path).values()] == tried[:1]


@pytest.mark.slow
def test_a_step_and_the_loop_around_it_are_measured():
    tiny = "--preset=tiny --batch_size=8 --seq_len=32 --unroll=2 --rounds=3 --stretch=2".split()
    figures = figures_of("-m", "benchmarks.train_step", *tiny)
    for dtype in ("float32", "bfloat16"):
        of_dtype = figures[dtype]
        assert set(of_dtype["step_ms"]) == SPREAD and of_dtype["step_ms"]["median"] > 0
        assert of_dtype["forward_ms"]["median"] > 0 and of_dtype["tokens_per_sec"] > 0
        assert 0 < of_dtype["share_of_peak"] < 1 and of_dtype["compile_s"] > 0
        assert of_dtype["argument_mib"] > 0 and of_dtype["temp_mib"] > 0
    assert set(figures["loop"]["overhead"]) == SPREAD
    assert figures["loop"]["compiles_after_first_steps"] == 0
    assert figures["peak_rss_mib"] > 0


@pytest.mark.slow
def test_decoding_is_measured_at_every_batch_size():
    tiny = "--preset=tiny --batches=1,3 --prompt=8 --new=4 --rounds=2".split()
    figures = figures_of("-m", "benchmarks.decode", *tiny)
    for name in ("batch_1", "batch_3"):
        of_batch = figures[name]
        assert of_batch["prefill"]["tokens_per_sec"] > 0 and of_batch["prefill"]["compile_s"] > 0
        assert of_batch["naive"]["ms_per_token"]["median"] > 0
        for way in ("plain", "greedy", "top_k_top_p"):
            assert set(of_batch[way]["ms_per_token"]) == SPREAD
            assert {"tokens_per_sec", "share_of_peak", "time_to_naive", "temp_mib"} <= set(
                of_batch[way]
            )


@pytest.mark.slow
def test_the_recipe_trains_on_a_text(tmp_path):
    text = tmp_path / "input.txt"
    text.write_text("to be, or not to be: that is the question.\n" * 200)
    figures = figures_of("-m", "benchmarks.nanogpt", f"--text={text}", "--steps=8", "--stretch=4")
    assert 0 < figures["gptlab"]["held_out_loss"] < 4  # ln 15 is 2.7
    assert set(figures["gptlab"]["ms"]) == SPREAD
    assert figures["products"]["ms"]["median"] > 0


def test_products_of_the_recipe_are_those_of_a_step():
    """Forward and for both gradients: 6 FLOPs a weight and token, and next to nothing else."""
    code = (
        "import jax\n"
        "from benchmarks import nanogpt\n"
        "model = nanogpt.recipe_config(10, 65).model\n"
        "weights = nanogpt.random_weights(model, jax.random.key(0))\n"
        "x = jax.random.normal(jax.random.key(1), (12, 64, 128))\n"
        "step = jax.jit(jax.grad(nanogpt.linear_network, (0, 1))).lower(weights, x).compile()\n"
        "print(step.cost_analysis()['flops'], sum(w.size for w in weights))\n"
    )
    flops, size = map(float, run("-c", code).split())
    assert size == 4 * 12 * 128**2 + 128 * 65
    assert flops == pytest.approx(6 * size * 12 * 64, rel=0.02)


def test_compiles_are_counted():
    code = (
        "import jax, jax.numpy as jnp\n"
        "from benchmarks.measure import CompileCounter\n"
        "f = jax.jit(lambda x: 2 * x)\n"
        "x, y = jnp.zeros(2), jnp.zeros(3)\n"
        "f(x); counter = CompileCounter(); f(x); print(counter.count)\n"
        "f(y); print(counter.count)\n"
    )
    assert run("-c", code).split() == ["0", "1"]


@pytest.mark.slow
def test_weak_scaling_is_measured_with_and_without_talking():
    tiny = "--preset=tiny --batch_size=4 --seq_len=16 --steps=3 --rounds=1".split()
    figures = figures_of("-m", "benchmarks.weak_scaling", *tiny)
    for way in ("one", "two_apart", "two_together"):
        assert set(figures["step_ms"][way]) == SPREAD and figures["step_ms"][way]["median"] > 0
    assert {"sharing_overhead", "communication_overhead", "weak_scaling_efficiency"} <= set(figures)


@pytest.mark.slow
def test_an_imported_model_decodes_in_both_dtypes(tmp_path, tiny_model):
    tokenizer = hf_vocabularies.tokenizer("chatml")
    model = {**tiny_model, "vocab_size": tokenizer.vocab_size}
    workdir = artifacts.write_policy(tmp_path / "imported", model, contrast=8.0)
    hf_vocabularies.write(workdir, hf_vocabularies.files("chatml"))
    tiny = f"--model={workdir} --prompt=8 --new=4 --rounds=2".split()
    if other := os.environ.get("TRANSFORMERS_PYTHON"):
        tiny.append(f"--torch={other}")
    figures = figures_of("-m", "benchmarks.imported", *tiny)
    assert figures["float32"]["chat"]["same_tokens"] == 1
    for dtype in ("float32", "bfloat16"):
        for way in figures[dtype].values():
            assert set(way["ms_per_token"]) == SPREAD and way["first_token_ms"]["median"] > 0
    if other:
        assert figures["float32"]["transformers"]["same_tokens"] == 1
        assert set(figures["float32"]["chat"]["time_to_transformers"]) == SPREAD


@pytest.mark.slow
def test_the_server_is_measured_under_several_clients(tmp_path, tiny_model, tiny_vocabulary):
    workdir = serving.write_model(tmp_path / "model", tiny_model, tiny_vocabulary)
    tiny = f"--model={workdir} --prompt=8 --new=4 --rounds=2 --requests=4 --clients=1,2 --slots=2"
    figures = figures_of("-m", "benchmarks.serve", *tiny.split(), "--chunk=8")
    for name in ("clients_1", "clients_2"):
        of_clients = figures["gptlab"][name]
        assert all(set(of_clients[key]) == SPREAD for key in of_clients)
        assert of_clients["tokens_per_sec"]["median"] > 0
        assert of_clients["first_token_ms"]["median"] > 0
    assert figures["gptlab"]["clients_1"]["speedup"]["median"] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="apt-get install chromium")
def test_a_walk_through_ends_in_the_exported_data(tmp_path, tiny_model, tiny_vocabulary):
    """A random model can't answer what only the notes say: that check fails, and is told."""
    model = {**tiny_model, "max_len": 1024}
    workdir = serving.write_model(tmp_path / "model", model, tiny_vocabulary)
    images = tmp_path / "images"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.walkthrough", f"--model={workdir}", "--tokens=12",
         "--temperature=1.0", f"--images={images}"],
        cwd=ROOT, env=compiling.environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    checks = json.loads(done.stdout.splitlines()[-1])["checks"]
    assert list(checks.values()) == [False, True, True, True, True]
    assert {path.stem for path in images.iterdir()} == {
        "chat", "chat-phone", "ranking", "ranking-phone"
    }  # fmt: skip


@pytest.mark.slow
def test_labellers_are_measured_while_the_engine_serves(tmp_path, tiny_model, tiny_vocabulary):
    workdir = serving.write_model(tmp_path / "model", tiny_model, tiny_vocabulary)
    tiny = f"--model={workdir} --labellers=3 --tasks=20 --think=0.01 --chats=1 --new=4 --alone=0.5"
    figures = figures_of("-m", "benchmarks.labelling", *tiny.split())
    of_labelling = figures["labelling"]
    for name in ("judge_ms", "lease_ms"):
        assert 0 < of_labelling[name]["p50"] <= of_labelling[name]["p95"]
    assert of_labelling["judgements_per_sec"] > 0 and figures["chats_alone"]["tokens_per_sec"] > 0
