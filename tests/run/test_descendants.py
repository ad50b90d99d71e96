"""What was made of an artifact is found, by whatever way, and what can't be told is said."""

import json
import os
import shutil

from ml_collections import ConfigDict

from gptlab.run import artifact, descendants


def made(workdir, stage, seed=0, **inputs):
    """A finished artifact of other ones; its identity."""
    inputs = {name: str(workdir.parent / source) for name, source in inputs.items()}
    config = ConfigDict({"seed": seed, "inputs": inputs})
    with artifact.open_run(config, workdir, stage) as run:
        run.complete("0" * 16)
        return run.identity


def tree(root):
    """Two exports, a model of each, and one of the first model; {name: identity}."""
    identities = {}
    for name, stage, inputs in (
        ("export", "export", {}), ("other", "export", {}), ("vocabulary", "train_tokenizer", {}),
        ("tokens", "prepare", {"corpus": "export", "vocabulary": "vocabulary"}),
        ("sft", "sft", {"tokens": "tokens"}), ("reward", "reward", {"comparisons": "other"}),
        ("ppo", "ppo", {"init": "sft", "reward": "reward"}), ("apart", "pretrain", {}),
    ):  # fmt: skip
        identities[name] = made(root / name, stage, seed=len(identities), **inputs)
    return identities


def names(found):
    return {one.path.rpartition("/")[2]: one for one in found}


def test_what_was_made_of_an_artifact_is_found_by_way_of_others(tmp_path):
    made_of = tree(tmp_path / "runs")
    found = names(descendants.find({made_of["export"]}, [tmp_path / "runs"]))
    assert set(found) == {"tokens", "sft", "ppo"}
    assert all(one.of == (made_of["export"],) and not one.unknown for one in found.values())
    manifest = artifact.read_manifest(tmp_path / "runs" / "ppo")
    policy = found["ppo"]
    assert (policy.stage, policy.identity) == ("ppo", made_of["ppo"])
    assert policy.created_at == manifest["created_at"]
    both = {made_of["export"], made_of["other"]}
    found = names(descendants.find(both, [tmp_path / "runs"]))
    assert set(found) == {"tokens", "sft", "reward", "ppo"} and set(found["ppo"].of) == both
    assert descendants.find(set(), [tmp_path / "runs"]) == []
    # Where it stands doesn't matter, nor whether the first of them is still there.
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "runs" / "ppo").rename(tmp_path / "elsewhere" / "deep" / "policy")
    shutil.rmtree(tmp_path / "runs" / "export")
    places = [tmp_path / "runs", tmp_path / "elsewhere"]
    found = names(descendants.find({made_of["export"]}, places))
    assert set(found) == {"tokens", "sft", "policy"}


def test_a_gap_in_the_lineage_is_said(tmp_path):
    made_of = tree(tmp_path)
    shutil.rmtree(tmp_path / "tokens")
    found = names(descendants.find({made_of["export"]}, [tmp_path]))
    assert set(found) == {"sft", "ppo"}
    for one in found.values():
        assert one.of == () and one.unknown == (f"prepare {made_of['tokens']}",)
    # What can't be read may be anything; what is no manifest of ours is nothing.
    (tmp_path / "sft" / "manifest.json").write_text("{")
    (tmp_path / "apart" / "manifest.json").write_text(json.dumps({"short_name": "an app"}))
    found = names(descendants.find({made_of["export"]}, [tmp_path]))
    broken = str(tmp_path / "sft" / "manifest.json")
    assert set(found) == {"manifest.json", "ppo"} and found["manifest.json"].unknown == (broken,)
    assert found["ppo"].unknown == (f"sft {made_of['sft']}",)
    odd = tmp_path / os.fsdecode(b"\xff")  # a name that is no text
    (tmp_path / "ppo").rename(odd)
    (shown,) = (one for one in descendants.find({"x"}, [tmp_path]) if one.stage == "ppo")
    assert shown.path.encode().decode() == f"{tmp_path}/\ufffd"
    newer = json.loads((tmp_path / "reward" / "manifest.json").read_text()) | {"schema": 99}
    (tmp_path / "reward" / "manifest.json").write_text(json.dumps(newer))
    found = descendants.find({made_of["export"]}, [tmp_path])
    assert str(tmp_path / "reward" / "manifest.json") in {one.path for one in found}
