"""The evaluation suite: what a policy gained over its SFT start, at what price, and who says so.

    python -m gptlab.evaluate --config=configs/evaluate.py --workdir=runs/evaluate \
        --config.inputs.policy=runs/ppo --config.inputs.baseline=runs/sft \
        --config.inputs.base=runs/pretrain --config.inputs.reward=runs/reward \
        --config.inputs.judge=runs/judge --config.inputs.vocabulary=runs/vocabulary \
        --config.inputs.prompts=runs/clean --config.inputs.reviews=runs/clean \
        --config.inputs.tokens=runs/tokens

On held-out prompts that no stage has trained on (which is checked), the policy, the SFT model and
(optionally) the previous round's policy give one reply each. Every system draws with keys of its
own: under shared ones most replies coincide, and the win rate's interval shows that coupling.
Reported: the gold score; win rates with bootstrap intervals over prompts, plain and
length-controlled, and the share of ties; the sequence KL to the SFT model; diversity; whether
replies depend on their prompts; three judges that PPO never saw; the held-out pretraining loss; and
whether the policy beats, at equal KL, the best of n SFT replies by PPO's own reward model. A gate
says whether the policy may be promoted. About a minute for 384 prompts and the quickstart's model
on 2 CPU cores.

Writes report.md, report.json, samples.jsonl (replies side by side), gold.png and gold_kl.png.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gptlab.data import batches, chat, mixtures
from gptlab.data.records import Prompt, RecordReader
from gptlab.data.tokenizer import Tokenizer
from gptlab.evals import best_of_n, contamination, perplexity, preference, report, suite
from gptlab.evals.preference import Bootstrap
from gptlab.evals.suite import Replies
from gptlab.model import transformer
from gptlab.model.decode import Sampling
from gptlab.model.heads import ScalarModel
from gptlab.model.transformer import LanguageModel, ModelConfig
from gptlab.rl import rewards, rollout
from gptlab.run import artifact, files, processes, program
from gptlab.run.errors import Interrupted, UserError
from gptlab.scorers import registry
from gptlab.train import checkpoint
from gptlab.train import mesh as mesh_lib
from gptlab.train.checks import check_vocabulary
from gptlab.train.held_out import make_held_out

Samples = dict[str, list[rollout.Samples]]  # by system, then by batch
Columns = dict[str, dict[str, np.ndarray]]  # by system, then by figure: float64, a row a reply


class Networks:
    """The models and their compiled functions. Outputs are whole on every process."""

    def __init__(self, config: ConfigDict, tokenizer: Tokenizer, mesh: Mesh):
        architecture = checkpoint.load_model_config(config.inputs.policy)
        self.config = ModelConfig.build(architecture, config.compute.to_dict())
        check_vocabulary(self.config, tokenizer, "config.inputs.policy")
        needed = config.data.prompt_len + config.sampling.max_new_tokens
        if needed > self.config.max_len:
            raise UserError(
                f"config.data.prompt_len + config.sampling.max_new_tokens = {needed} tokens, but "
                f"the model's window is {self.config.max_len}: lower one of them"
            )
        self.mesh, self.pad_id = mesh, tokenizer.pad_id
        self.language = LanguageModel(self.config)
        self._compute = config.compute.to_dict()
        self.sampling = Sampling(
            temperature=config.sampling.temperature, top_k=0, top_p=1.0,
            max_new_tokens=config.sampling.max_new_tokens, stop_tokens=chat.stop_tokens(tokenizer),
            halt_tokens=rollout.halt_tokens(tokenizer, self.config.vocab_size),
        )  # fmt: skip
        whole = NamedSharding(mesh, PartitionSpec())
        self.sample = jax.jit(self._sample, out_shardings=whole)
        self.logprob = jax.jit(self._logprob, out_shardings=whole)
        self.score = jax.jit(_score, static_argnums=0, out_shardings=whole)
        self.join = jax.jit(self._join, out_shardings=whole)
        self.nll = perplexity.make_nll(self.language, mesh)
        self.held_out = make_held_out(self.language, mesh, tokenizer.token_bytes, config.data.split)

    def load(self, workdir: str) -> Any:
        """A language model's parameters on this mesh."""
        return checkpoint.load_params(
            workdir, self.mesh, lambda key: transformer.init_params(self.language, key)
        )

    def load_reward(self, workdir: str) -> tuple[ScalarModel, Any]:
        """A reward model and its parameters, normalised as `reward` froze it."""
        model, params, gain, bias = rewards.load_reward_model(workdir, self.mesh, self._compute)
        return model, rewards.fold_normalisation(params, gain, bias)

    def _sample(self, params: Any, batch: Any, key: jax.Array) -> rollout.Samples:
        return rollout.sample(
            self.language, params, batch.tokens, batch.lengths, key, self.sampling, self.pad_id
        )

    def _logprob(self, params: Any, samples: rollout.Samples) -> jax.Array:
        temperature = self.sampling.temperature
        logprobs, _ = rollout.response_logprobs(self.language, params, samples, temperature)
        return logprobs.sum(-1)  # [B]

    def _join(self, batch: Any, samples: rollout.Samples) -> tuple[jax.Array, jax.Array]:
        tokens, lengths = rollout.join(
            batch.tokens, batch.lengths, samples.response, samples.response_mask, self.pad_id
        )
        return tokens, lengths - (samples.lengths - samples.scored_lengths)


def _score(model: ScalarModel, params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Reward at the last real token of each row [B]."""
    return rollout.at_last(rollout.token_scalars(model, params, tokens, lengths), lengths)


def run(config: ConfigDict, workdir: str) -> None:
    """Evaluates `config.inputs.policy`; UserError for inputs that don't belong together."""
    with artifact.open_run(config, workdir, "evaluate") as own:
        if own.finished:
            print(f"{workdir} is done: {own.workdir / 'report.md'}")
            return
        check(config)
        tokenizer = Tokenizer.load(config.inputs.vocabulary)
        mesh = mesh_lib.make_mesh(config.mesh)
        mesh_lib.check_batch_size("batch_size", config.batch_size, mesh)
        prompts = load_prompts(config)
        unchecked = check_held_out(config, prompts)
        with jax.set_mesh(mesh):
            networks = Networks(config, tokenizer, mesh)
            systems, held_out, draws = measure(config, own, networks, tokenizer, prompts)
        with own.goodput.measure("eval"):
            bootstrap = Bootstrap(
                config.bootstrap.resamples, config.bootstrap.seed, config.bootstrap.level
            )
            figures = suite.summarise(systems, held_out, bootstrap)
            if draws is not None:
                figures["best_of_n"] = best_of_n.summarise(
                    draws, config.best_of_n.sizes, systems["policy"].gold,
                    systems["baseline"].gold, systems["policy"].log_ratio, bootstrap,
                )  # fmt: skip
            failures = suite.gate(figures, config.gate)
        figures["unchecked_ancestors"] = unchecked
        plain = preference.to_json(figures)
        own.metrics.rewind(-1)
        own.metrics.write(0, dict(suite.flatten(plain, "eval")))
        if processes.is_first():
            write_files(own.workdir, config, prompts, systems, figures, failures)
        processes.barrier("evaluation is written")
        own.results(**plain, passed=not failures, failures=failures)
        own.complete(digest=files.digest_files([own.workdir / "samples.jsonl"]))


def check(config: ConfigDict) -> None:
    """UserError for a config that could only fail later."""
    artifact.check_inputs(
        config, [name for name in config.inputs if name not in ("previous", "reviews")]
    )
    if config.data.split == "train":
        raise UserError(
            "config.data.split='train': a model is evaluated on prompts that it has not been "
            "trained on; choose 'test', or 'validation' if nothing was chosen by it"
        )
    sizes, samples = config.best_of_n.sizes, config.best_of_n.samples
    if sizes and (min(sizes) < 2 or max(sizes) > samples):
        raise UserError(
            f"config.best_of_n.sizes={sizes} must be from 2 to best_of_n.samples={samples}, or "
            "empty to leave out that comparison"
        )
    if sizes and config.best_of_n.num_prompts < 1:
        raise UserError(
            f"config.best_of_n.num_prompts={config.best_of_n.num_prompts} must be at least 1"
        )
    registry.make(config.gold, config.inputs)


def check_held_out(config: ConfigDict, prompts: Sequence[Prompt]) -> list[str]:
    """UserError if any model involved was trained on a prompt; returns what could not be looked at.

    The three judges count as well: a reward model knows the prompts of its own comparisons better.
    """
    roles = ("policy", "baseline", "base", "previous", "reward", "judge")
    models = [config.inputs[role] for role in roles if config.inputs[role] is not None]
    return contamination.check_disjoint(prompts, models)


def load_prompts(config: ConfigDict) -> list[Prompt]:
    """Held-out prompts in a seeded order, `num_prompts` of them or all there are.

    Of each conversation there is one: prompts with a common beginning are not independent, which
    the intervals take them to be.
    """
    reader = RecordReader(
        epath.Path(config.inputs.prompts) / "records", "prompts", config.data.split, Prompt
    )
    order = np.random.default_rng(config.seed).permutation(len(reader))
    prompts: dict[str, Prompt] = {}
    for prompt in (reader[int(i)] for i in order):
        prompts.setdefault(prompt.conversation_id, prompt)
        if len(prompts) == config.data.num_prompts:
            break
    else:
        if config.data.num_prompts is not None:
            print(
                f"evaluate: {config.data.split} has prompts of {len(prompts)} conversations, fewer "
                f"than config.data.num_prompts={config.data.num_prompts}: all of them are used"
            )
    return list(prompts.values())


def measure(
    config: ConfigDict,
    own: artifact.Run,
    networks: Networks,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
) -> tuple[dict[str, Replies], dict[str, dict[str, float]], best_of_n.Draws | None]:
    """Samples every system and asks every judge; one network is loaded at a time.

    Returns:
      Replies by system ('policy', 'previous' if there is one, 'baseline'), held-out pretraining
      figures by model (those and 'base'), and what best of n chooses from, if that is asked for.
    """
    num_systems = 2 + (config.inputs.previous is not None)
    with own.progress(num_systems + 3, "evaluate", unit="network") as progress:

        def next_network() -> None:
            progress.update()
            if own.stop_requested():
                raise Interrupted("stopped during evaluation, which starts anew")

        asked = _ask(config, networks, tokenizer, prompts)
        drawn, columns, held_out, many = speak(config, networks, asked, next_network)
        # Turned by half: nobody keeps a prompt of their own.
        half = len(prompts) // 2
        others = _ask(config, networks, tokenizer, prompts[half:] + prompts[:half])
        chosen_by = judge(config, networks, others, drawn, columns, many, next_network)
        params = networks.load(config.inputs.base)
        held_out["base"] = _held_out(config, networks, params)
        systems = {}
        for name, samples in drawn.items():
            tokens = _token_lists(samples, len(prompts))
            columns[name]["base_nats"], columns[name]["base_tokens"] = _surprise(
                config, networks, tokenizer, params, prompts, tokens
            )
            systems[name] = _replies(config, tokenizer, prompts, samples, tokens, columns[name])
        next_network()
    return systems, held_out, _draws(config, tokenizer, prompts, many, chosen_by)


def speak(
    config: ConfigDict,
    networks: Networks,
    asked: Sequence[batches.PromptBatch],
    next_network: Callable[[], None],
) -> tuple[Samples, Columns, dict[str, dict[str, float]], list[list[rollout.Samples]]]:
    """One reply a prompt from each system, its log-ratio to the baseline, and held-out loss.

    Last of all what best of n chooses from: by draw, then by batch.
    """
    inputs = config.inputs
    # The baseline comes last: it is the reference that scores what all have said.
    paths = {"policy": inputs.policy, "previous": inputs.previous, "baseline": inputs.baseline}
    keys = system_keys(config.seed, [*paths, "best_of_n"])
    drawn: Samples = {}
    columns: Columns = {}
    held_out = {}
    params = None
    for name, path in paths.items():
        if path is None:
            continue
        params = networks.load(path)
        drawn[name] = [
            networks.sample(params, batch, jax.random.fold_in(keys[name], i))
            for i, batch in enumerate(asked)
        ]
        columns[name] = {"logprob": _rows([networks.logprob(params, s) for s in drawn[name]])}
        held_out[name] = _held_out(config, networks, params)
        next_network()
    few = asked[: -(-config.best_of_n.num_prompts // asked[0].tokens.shape[0])]
    many = []
    for draw in range(draws_of(config)):
        key = jax.random.fold_in(keys["best_of_n"], draw)
        many.append(
            [
                networks.sample(params, batch, jax.random.fold_in(key, i))
                for i, batch in enumerate(few)
            ]
        )
    for name, samples in drawn.items():
        reference = _rows([networks.logprob(params, s) for s in samples])
        columns[name]["log_ratio"] = columns[name].pop("logprob") - reference
    return drawn, columns, held_out, many


def draws_of(config: ConfigDict) -> int:
    """Replies to a prompt that best of n chooses from; 0 if nobody asks for it."""
    return config.best_of_n.samples if config.best_of_n.sizes else 0


def system_keys(seed: int, names: Sequence[str]) -> dict[str, jax.Array]:
    """A key for each system's replies, whichever of the systems take part.

    Systems that share keys share the random numbers of their draws. A policy near its reference
    then gives the very same reply to most prompts, and the win rate of the others and its interval
    show that coupling rather than the policies (EXPERIMENTS.md has it for shared Gumbel noise).
    Mean differences are unbiased either way.
    """
    key = jax.random.key(seed)
    return {name: jax.random.fold_in(key, number) for number, name in enumerate(names)}


def judge(
    config: ConfigDict,
    networks: Networks,
    others: Sequence[batches.PromptBatch],
    drawn: Samples,
    columns: Columns,
    many: Sequence[Sequence[rollout.Samples]],
    next_network: Callable[[], None],
) -> list[np.ndarray]:
    """Adds the scores of both reward models, PPO's also with every reply under another prompt.

    Returns PPO's reward model's scores of what best of n chooses from, by draw.
    """
    chosen_by: list[np.ndarray] = []
    for role in ("reward", "judge"):
        model, params = networks.load_reward(config.inputs[role])
        for name, samples in drawn.items():
            columns[name][role] = _rows(
                [networks.score(model, params, s.tokens, s.scored_lengths) for s in samples]
            )
            if role == "reward":
                moved = [networks.join(*pair) for pair in zip(others, samples, strict=True)]
                columns[name]["reward_shuffled"] = _rows(
                    [networks.score(model, params, *pair) for pair in moved]
                )
        if role == "reward":
            chosen_by = [
                _rows([networks.score(model, params, s.tokens, s.scored_lengths) for s in draw])
                for draw in many
            ]
        next_network()
    return chosen_by


def _ask(
    config: ConfigDict, networks: Networks, tokenizer: Tokenizer, prompts: list[Prompt]
) -> list[batches.PromptBatch]:
    """All prompts in order, in batches on the mesh; the last batch is padded."""
    size = mesh_lib.shrunk(config.batch_size, len(prompts), networks.mesh)
    block, blocks = mesh_lib.process_block(networks.mesh)
    source = batches.PromptBatches(
        prompts, tokenizer, size, config.data.prompt_len, config.seed, block, blocks
    )
    return [mesh_lib.put_batch(batch, networks.mesh) for batch in source.eval()]


def _rows(parts: Sequence[jax.Array]) -> np.ndarray:
    """Per-row figures of all batches as float64 [batches B]; padding rows are still there."""
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


def _token_lists(samples: Sequence[rollout.Samples], num_prompts: int) -> list[list[int]]:
    """The replies' tokens without padding, stop token included and halt token left out."""
    response = np.concatenate([np.asarray(s.response) for s in samples])[:num_prompts]
    lengths = np.concatenate([np.asarray(s.scored_lengths - s.prompt_lengths) for s in samples])
    return [row[: int(n)].tolist() for row, n in zip(response, lengths, strict=False)]


def _held_out(config: ConfigDict, networks: Networks, params: Any) -> dict[str, float]:
    """Loss on held-out pretraining text: its rise is the alignment tax."""
    data = config.data
    source = mixtures.packed(
        config.inputs.tokens,
        data.pretraining,
        data.split,
        data.seq_len,
        key="config.data.pretraining",
    )
    block, blocks = mesh_lib.process_block(networks.mesh)
    rows = batches.eval_batches(source, config.batch_size, data.pretraining_batches, block, blocks)
    figures = networks.held_out(params, rows)
    return {name.split("/")[-1]: value for name, value in figures.items()}


def _surprise(
    config: ConfigDict,
    networks: Networks,
    tokenizer: Tokenizer,
    params: Any,
    prompts: list[Prompt],
    tokens: list[list[int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of the replies' text under the pretrained model.

    That model has never seen a control token, so it reads what the documents look like: the
    dialogue as plain text, one turn a line, without the stop token.
    """
    contexts = [
        tokenizer.encode_document("".join(m.content + "\n" for m in prompt.messages))
        for prompt in prompts
    ]
    stops = chat.stop_tokens(tokenizer)
    replies = [[token for token in reply if token not in stops] for reply in tokens]
    return perplexity.continuation_nll(
        networks.nll, params, contexts, replies, config.batch_size, config.data.seq_len,
        networks.mesh,
    )  # fmt: skip


def _replies(
    config: ConfigDict,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    samples: Sequence[rollout.Samples],
    tokens: list[list[int]],
    columns: Mapping[str, np.ndarray],
) -> Replies:
    """Texts, and what judges who read text say of them."""
    texts = [chat.decode_reply(tokenizer, reply) for reply in tokens]
    finished = np.concatenate([np.asarray(s.finished) for s in samples])[: len(prompts)]
    gold = registry.make(config.gold, config.inputs)(prompts, texts)
    reviews = None
    if config.inputs.reviews is not None:
        reviews = np.asarray(registry.make(config.reviews, config.inputs)(prompts, texts))
    return Replies(
        tokens=tokens,
        texts=texts,
        finished=finished,
        lengths=np.array([len(reply) for reply in tokens]) - finished,
        gold=np.asarray(gold, np.float64),
        reviews=reviews,
        **{name: column[: len(prompts)] for name, column in columns.items()},
    )


def _draws(
    config: ConfigDict,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    many: Sequence[Sequence[rollout.Samples]],
    chosen_by: Sequence[np.ndarray],
) -> best_of_n.Draws | None:
    """What best of n chooses from, with its gold scores."""
    if not many:
        return None
    asked = prompts[: config.best_of_n.num_prompts]
    scorer = registry.make(config.gold, config.inputs)
    gold = [
        scorer(asked, [chat.decode_reply(tokenizer, r) for r in _token_lists(draw, len(asked))])
        for draw in many
    ]
    return best_of_n.Draws(
        reward=np.stack([row[: len(asked)] for row in chosen_by], axis=1),
        gold=np.stack(gold, axis=1).astype(np.float64),
    )


def write_files(
    workdir: epath.Path,
    config: ConfigDict,
    prompts: list[Prompt],
    systems: Mapping[str, Replies],
    figures: Mapping[str, Any],
    failures: list[str],
) -> None:
    """report.md, report.json, samples.jsonl, gold.png and gold_kl.png."""
    plain = {**preference.to_json(figures), "passed": not failures, "failures": failures}
    files.atomic_write(workdir / "report.json", files.to_json(plain, indent=1) + "\n")
    lines = [files.to_json(_sample(prompt, i, systems)) for i, prompt in enumerate(prompts)]
    files.atomic_write(workdir / "samples.jsonl", "\n".join(lines) + "\n")
    share = (np.arange(len(prompts)) + 0.5) / len(prompts)
    report.plot_curves(
        workdir / "gold.png",
        {suite.TITLES[name]: (share, np.sort(replies.gold)) for name, replies in systems.items()},
        title=f"Gold score ({config.gold.name}) of held-out replies, sorted",
        x_label="share of prompts", y_label="score",
    )  # fmt: skip
    sections = {
        name: report.markdown_table(header, rows)
        for name, (header, rows) in suite.tables(figures).items()
    }
    plot_gold_against_kl(workdir / "gold_kl.png", figures)
    if "best_of_n" in figures:
        table = report.markdown_table(*best_of_n.table(figures["best_of_n"]))
        sections["Best of n replies of SFT"] = f"{table}\n\n{_about_best_of_n(figures)}"
    sections["Gate"] = "\n".join(f"- {line}" for line in failures) or "Passed."
    sections["Replies side by side"] = report.markdown_table(
        ["prompt", *(suite.TITLES[name] for name in systems)],
        [
            [prompts[i].messages[-1].content, *(replies.texts[i] for replies in systems.values())]
            for i in range(min(config.report_samples, len(prompts)))
        ],
    )
    sections["How it was measured"] = _method(config, figures)
    files.atomic_write(workdir / "report.md", report.document("Evaluation", sections))


def _sample(prompt: Prompt, i: int, systems: Mapping[str, Replies]) -> dict[str, Any]:
    """One line of samples.jsonl: a prompt and what everybody made of it."""
    return {
        "id": prompt.id,
        "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
        **{
            name: {
                "reply": replies.texts[i],
                "finished": bool(replies.finished[i]),
                "gold": float(replies.gold[i]),
                "reward_model": float(replies.reward[i]),
                "judge_model": float(replies.judge[i]),
                "log_ratio": float(replies.log_ratio[i]),
            }
            for name, replies in systems.items()
        },
    }


def plot_gold_against_kl(path: epath.Path, figures: Mapping[str, Any]) -> None:
    """What each system gained at which KL, beside what choosing from n replies of SFT does."""
    curves = {}
    if "best_of_n" in figures:
        curves["best of n by PPO's reward model (KL: upper bound)"] = best_of_n.curve(
            figures["best_of_n"]
        )
    markers = {
        suite.TITLES[name]: (figures[name]["kl"], figures[name]["gold"])
        for name in suite.TITLES
        if name in figures
    }
    report.plot_curves(
        path, curves, markers=markers, title="Gold score of held-out replies",
        x_label="KL to SFT, nats a reply", y_label="gold score",
    )  # fmt: skip


def _about_best_of_n(figures: Mapping[str, Any]) -> str:
    own = figures["best_of_n"]
    return (
        f"By PPO's reward model, on the first {own['num_prompts']} prompts, from {own['samples']} "
        "replies to each; the policy's figures are those of the same prompts. The KL of best of n "
        "is the bound log n - (n - 1) / n. 'Mixed down to equal KL' takes, of the one with the "
        "larger KL, the mixture that answers with it with probability p and with SFT otherwise: p "
        "times the gain for at most p times the KL, a lower bound of what it could be at that KL. "
        "So it is surely ahead if the mixture is, and surely behind only if it has the lower score "
        "as it is."
    )


def _method(config: ConfigDict, figures: Mapping[str, Any]) -> str:
    return (
        f"One reply to each of {figures['num_prompts']} prompts of the {config.data.split} split "
        f"at temperature {config.sampling.temperature}, at most {config.sampling.max_new_tokens} "
        f"tokens, every system with keys of its own. Intervals: {config.bootstrap.level:.0%}, "
        f"bootstrap over prompts, {config.bootstrap.resamples} resamples. The gold score is "
        f"`{config.gold.name}`, a program, not a person. Ties count one half. Length control is a "
        "logistic regression on the difference of lengths (AlpacaEval 2). Distinct-2 is pooled "
        f"over the first {figures['diversity_tokens']:,} tokens of each system. KL is the mean "
        "log-ratio of a system's own replies. 'At equal KL' compares gains over SFT after the "
        "system with the larger KL is mixed with SFT down to the other's KL, which is a lower "
        "bound of what it could gain there; its interval resamples gains and KLs together."
    )


if __name__ == "__main__":
    program.main(run, "evaluate")
