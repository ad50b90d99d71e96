"""Candidate replies: K samples from a policy to each prompt, queued for ranking.

    python -m gptlab.collect --config=configs/collect.py --workdir=runs/collect \
        --config.inputs.policy=runs/sft --config.inputs.prompts=runs/clean \
        --config.inputs.vocabulary=runs/vocabulary

Writes records/candidates-{train,validation}; a prompt's split stays its split, so labels are split
by prompt before anything is trained on them. The key of a reply is a function of (seed, split,
prompt, number of the reply) alone: batch size and interruptions change nothing, and a killed run
goes on after its last finished batch.

Replies that a policy gives twice to one prompt are kept and counted (`duplicate_rate`): they are
what it says, a set without them would show a more varied policy than there is. They teach a reward
model nothing and cost it nothing: equal rewards have a gradient of exactly zero. A text may be
encoded into other tokens than were drawn, which a reward model is then trained on:
`reencoding_mismatch` is the share of replies where that is so.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gptlab.data import chat, records
from gptlab.data.batches import PromptBatch, PromptBatches
from gptlab.data.records import Candidate, CandidateSet, Prompt
from gptlab.data.tokenizer import Tokenizer
from gptlab.evals import diversity
from gptlab.model import decode
from gptlab.model.transformer import LanguageModel, ModelConfig, init_params
from gptlab.rl import rollout
from gptlab.run import artifact, files, processes, program
from gptlab.run.errors import Interrupted, UserError
from gptlab.train import checkpoint
from gptlab.train import mesh as mesh_lib
from gptlab.train.checks import check_vocabulary

SPLITS = ("train", "validation")
_SAMPLES = 5  # candidate sets of each split shown in samples.jsonl
_PARTS = "parts"  # finished batches, until all of them are


def run(config: ConfigDict, workdir: str) -> None:
    """Collects replies to the prompts of each split, or goes on where `workdir` stands.

    Raises:
      UserError: an input or a config value is wrong.
      Interrupted: SIGTERM or SIGINT; finished batches are saved.
    """
    with artifact.open_run(config, workdir, "collect") as run:
        if run.finished:
            print(f"{workdir}: these replies are already collected")
            return
        # (1) Inputs, checked before anything is compiled.
        check(config)
        tokenizer = Tokenizer.load(config.inputs.vocabulary)
        architecture = checkpoint.load_model_config(config.inputs.policy)
        model_config = ModelConfig.build(architecture, config.compute.to_dict())
        check_vocabulary(model_config, tokenizer, "config.inputs.policy")
        model = LanguageModel(model_config)
        mesh = mesh_lib.make_mesh(config.mesh)
        mesh_lib.check_batch_size("batch_size", config.batch_size, mesh)
        prompts = {split: choose_prompts(config, split) for split in SPLITS}

        # (2) Every split, batch by batch.
        with jax.set_mesh(mesh):
            params = checkpoint.load_params(
                config.inputs.policy, mesh, functools.partial(init_params, model)
            )
            generate = make_generate(model, config, tokenizer, mesh)
            for number, split in enumerate(SPLITS):
                key = jax.random.fold_in(jax.random.key(config.seed), number)
                collect_split(run, split, prompts[split], tokenizer, mesh, generate, params, key)

        # (3) The batches become records, and the figures a result.
        policy = artifact.read_manifest(config.inputs.policy)["identity"]
        run.metrics.rewind(-1)  # of a run that was killed while it wrote
        for split in SPLITS:
            rows = read_parts(run.workdir, split)
            write_split(run, split, prompts[split], tokenizer, policy, rows)
        run.complete(records.digest(run.workdir / "records"))
        if processes.is_first():
            (run.workdir / _PARTS).rmtree()


def check(config: ConfigDict) -> None:
    """UserError for a config that could only fail later."""
    artifact.check_inputs(config)
    if config.num_replies < 2:
        raise UserError(f"config.num_replies={config.num_replies}: ranking takes at least 2")


def choose_prompts(config: ConfigDict, split: str) -> list[tuple[int, Prompt]]:
    """(number, prompt) of the prompts to answer: the first of a seeded order, back in their own
    order.

    config.num_prompts[split] says how many; None is all. A prompt's number is its place in the
    records.
    """
    directory = epath.Path(config.inputs.prompts) / "records"
    reader = records.RecordReader(directory, "prompts", split, Prompt)
    order = np.random.default_rng([config.seed, SPLITS.index(split)]).permutation(len(reader))
    chosen = np.sort(order[: config.num_prompts[split]])
    return [(int(i), reader[int(i)]) for i in chosen]


def make_generate(
    model: LanguageModel, config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh
) -> Any:
    """Compiled (params, batch of prompts, numbers [B], key) -> (tokens [B, K, R], lengths,
    finished).

    A halt token is no part of a reply. Outputs are whole on every process.
    """
    sampling = decode.Sampling(
        temperature=config.sampling.temperature,
        top_k=config.sampling.top_k,
        top_p=config.sampling.top_p,
        max_new_tokens=config.sampling.max_new_tokens,
        stop_tokens=chat.stop_tokens(tokenizer),
        halt_tokens=rollout.halt_tokens(tokenizer, model.config.vocab_size),
    )
    replies = config.num_replies

    def generate(params: Any, batch: PromptBatch, numbers: jax.Array, key: jax.Array) -> Any:
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys = jax.vmap(fold, in_axes=(0, None))(fold(key, numbers), jnp.arange(replies))  # [B, K]
        tokens = jnp.repeat(batch.tokens, replies, axis=0)  # [B K, P]
        lengths = jnp.repeat(jnp.where(batch.index >= 0, batch.lengths, 0), replies)  # [B K]
        out = decode.generate(
            model, params, tokens, lengths, keys.reshape(-1), sampling, tokenizer.pad_id
        )
        split = lambda x: x.reshape(-1, replies, *x.shape[1:])  # noqa: E731
        return split(out.tokens), split(out.lengths - out.halted), split(out.finished)

    return jax.jit(generate, out_shardings=NamedSharding(mesh, PartitionSpec()))


def collect_split(
    run: artifact.Run,
    split: str,
    prompts: Sequence[tuple[int, Prompt]],
    tokenizer: Tokenizer,
    mesh: Mesh,
    generate: Any,
    params: Any,
    key: jax.Array,
) -> None:
    """Answers the prompts of one split; every finished batch is a file in parts/."""
    config = run.config
    size = mesh_lib.shrunk(config.batch_size, len(prompts), mesh)
    data = PromptBatches(
        [prompt for _, prompt in prompts],
        tokenizer,
        size,
        config.data.prompt_len,
        config.seed,
        *mesh_lib.process_block(mesh),
    )
    numbers = np.asarray([number for number, _ in prompts], np.int32)
    with run.progress(len(prompts), f"collect {split}", unit="prompt") as progress:
        for i, batch in enumerate(data.eval()):
            rows = range(i * size, min((i + 1) * size, len(prompts)))
            # By its rows and not by its number: on another mesh, a batch may be of another size.
            path = run.workdir / _PARTS / f"{split}-{rows.start:06d}-{rows.stop:06d}.jsonl"
            if not path.exists():
                own = numbers[np.maximum(batch.index, 0)]
                with run.goodput.measure("step" if i else "compile"):
                    out = generate(params, *mesh_lib.put_batch((batch, own), mesh), key)
                    tokens, lengths, finished = jax.device_get(out)
                if processes.is_first():
                    with run.goodput.measure("save"):
                        write_part(path, rows, tokens, lengths, finished)
                processes.barrier(f"{split} {i}")
            progress.update(len(rows))
            if run.stop_requested():
                raise Interrupted(f"saved {rows.stop} of {len(prompts)} prompts of {split}")


def write_part(
    path: epath.Path, rows: range, tokens: np.ndarray, lengths: np.ndarray, finished: np.ndarray
) -> None:
    """One line a prompt: its row, and the token ids of each reply. Atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row, ids, counts, ended in zip(rows, tokens, lengths, finished, strict=False):
        replies = [own[:n].tolist() for own, n in zip(ids, counts, strict=True)]
        lines.append(json.dumps({"row": row, "tokens": replies, "finished": ended.tolist()}))
    files.atomic_write(path, "\n".join(lines) + "\n")


def read_parts(workdir: epath.Path, split: str) -> list[dict[str, Any]]:
    """What write_part wrote for a split, in the order of the prompts, each prompt once."""
    paths = sorted((workdir / _PARTS).glob(f"{split}-*.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    by_row = {row["row"]: row for row in rows}
    return [by_row[row] for row in sorted(by_row)]


def write_split(
    run: artifact.Run,
    split: str,
    prompts: Sequence[tuple[int, Prompt]],
    tokenizer: Tokenizer,
    policy: str,
    rows: Iterable[dict[str, Any]],
) -> None:
    """Records, figures and a few samples of one split."""
    sets, tokens, finished, changed = [], [], [], []
    for row in rows:
        prompt = prompts[row["row"]][1]
        candidates = tuple(
            Candidate(
                f"{prompt.id}:{run.identity}:{k}", chat.decode_reply(tokenizer, ids), policy, ended
            )
            for k, (ids, ended) in enumerate(zip(row["tokens"], row["finished"], strict=True))
        )
        changed += [
            chat.encode_reply(tokenizer, c.content, c.finished) != ids
            for c, ids in zip(candidates, row["tokens"], strict=True)
        ]
        sets.append(CandidateSet(f"{prompt.id}:{run.identity}", prompt, candidates))
        tokens += row["tokens"]
        finished += row["finished"]
    if processes.is_first():
        records.write_shards(run.workdir / "records", "candidates", split, sets)
    processes.barrier(f"records {split}")
    figures = {
        "sets": len(sets),
        "replies": len(tokens),
        "finished_rate": float(np.mean(finished)),
        "mean_tokens": float(np.mean([len(ids) for ids in tokens])),
        "distinct_2": diversity.distinct_ngrams(tokens, 2, sum(len(ids) for ids in tokens)),
        "duplicate_rate": float(np.mean([duplicates(s) for s in sets])),
        # What is ranked is a text. Of these replies, a reward model is trained on other tokens than
        # PPO's rollouts of the same text would show it.
        "reencoding_mismatch": float(np.mean(changed)),
    }
    run.results(**{f"{split}/{name}": value for name, value in figures.items()})
    for item in sets[:_SAMPLES]:
        run.metrics.write_sample(
            {
                "step": 0,
                "split": split,
                "prompt": [message.content for message in item.prompt.messages],
                "replies": [candidate.content for candidate in item.candidates],
            }
        )


def duplicates(item: CandidateSet) -> float:
    """Share of a set's replies that repeat an earlier one of it."""
    return 1.0 - len({c.content for c in item.candidates}) / len(item.candidates)


if __name__ == "__main__":
    program.main(run, "collect")
