"""The stages of a run, each a function of files that writes files: sample, train, export, evaluate."""

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sami_jax import files, stage_folder
from sami_jax.checkpoints import Checkpoints, fingerprint
from sami_jax.config import PromptsConfig, RunConfig, SamplingConfig, TrainConfig
from sami_jax.data.constitutions import Constitution, draw_constitutions
from sami_jax.data.filters import REASONS, drop_reason
from sami_jax.data.pairs import Pair, read_pairs, write_pairs
from sami_jax.data.principles import Principle, read_principles
from sami_jax.data.prompts import render
from sami_jax.data.queries import Query, alternating_half, read_queries
from sami_jax.data.tokenizer import Tokenizer, load_tokenizer
from sami_jax.errors import BadDataError, NonFiniteError, SaveFailedError, enough_memory
from sami_jax.evaluation.judges import check_judged, get_judge
from sami_jax.evaluation.summary import query_mi_nats, summarize
from sami_jax.losses import sami_loss
from sami_jax.model.config import DecoderConfig
from sami_jax.model.decoder import Model, make_model, sharded_params
from sami_jax.model.huggingface import load_params, model_files, read_config, read_end_ids, save_finetuned
from sami_jax.processes import agreed, writes
from sami_jax.progress import Progress
from sami_jax.safe_point import SafePoint
from sami_jax.sampling import Response, make_stops, sample_responses
from sami_jax.scoring import batch_widths, make_batch, score_pairs
from sami_jax.seeds import generator
from sami_jax.sharding import (
    batch_sharding,
    batch_shards,
    device_bytes,
    gather,
    make_mesh,
    micro_batch_sharding,
    place,
    shared_rows,
)
from sami_jax.training import (
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
    micro_batches,
    nonfinite_examples,
    pairs_needed,
    query_indices,
)
from sami_jax.types import Dtype, Params, TrainState

Log = Callable[[dict[str, Any]], None]  # takes one line of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model folder, its weights still on disk.

    Attributes:
      folder: where it is.
      model: the pure functions.
      tokenizer: text to ids.
      end_ids: tokens that end a text: the tokenizer's own, and those of config.json and generation_config.json.
      mesh: the devices.
    """

    folder: Path
    model: Model
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    mesh: jax.sharding.Mesh

    @agreed()
    def load(self, dtype: Dtype) -> Params:
        """Reads the weights onto the mesh. Raises BadDataError where they do not fit config.json."""
        specs = sharded_params(self.model.config, self.mesh, dtype)
        shardings = jax.tree.map(lambda spec: spec.sharding, specs)
        with enough_memory(
            f"loading {self.folder}, whose weights take {device_bytes(specs) / 1e9:.1f} GB of each device",
            _more_devices(self.mesh),
        ):
            return load_params(self.folder, self.model.config, dtype=jnp.dtype(dtype), shardings=shardings)

    def loaded(self, dtype: Dtype) -> "LoadedModel":
        """The model with its weights in memory. Raises BadDataError as `load` does."""
        return LoadedModel(self.folder, self.model, self.tokenizer, self.end_ids, self.mesh, self.load(dtype))

    def state(self, train: TrainConfig) -> TrainState:
        """What a training of it has for a state, none of it in memory."""
        return abstract_state(sharded_params(self.model.config, self.mesh, train.weights_dtype), make_optimizer(train))


@dataclasses.dataclass(frozen=True)
class LoadedModel(OpenModel):
    """A model folder in memory.

    Attributes:
      params: the weights, on the mesh.
    """

    params: Params


@dataclasses.dataclass(frozen=True)
class Task:
    """A query and the constitutions it is to be answered under."""

    query: Query
    constitutions: tuple[Constitution, ...]


@agreed()
def open_model(folder: Path, config: RunConfig) -> OpenModel:
    """A Hugging Face folder's model for the config's mesh. Raises BadDataError where it cannot be used."""
    shape = read_config(folder)
    if writes():  # one process for all: the bytes are the same, and reading them may take minutes
        stage_folder.check_sealed(folder)
    mesh = make_mesh(config.mesh)
    model = make_model(shape, remat=config.train.remat, mesh=mesh, dtype=config.compute_dtype)
    tokenizer = load_tokenizer(folder)
    end_ids = read_end_ids(folder, shape)
    if tokenizer.eos_id is not None:
        if tokenizer.eos_id >= shape.vocab_size:
            raise BadDataError(
                f"{folder}: the tokenizer's end token has the id {tokenizer.eos_id}, beyond the model's vocabulary of "
                f"{shape.vocab_size}; the tokenizer and the weights do not belong together."
            )
        end_ids |= {tokenizer.eos_id}
    return OpenModel(folder, model, tokenizer, end_ids, mesh)


def load_model(folder: Path, config: RunConfig) -> LoadedModel:
    """`open_model`, and its weights in memory, in the dtype they are computed in."""
    return open_model(folder, config).loaded(config.compute_dtype)


def _more_devices(mesh: jax.sharding.Mesh) -> str:
    return f"share the weights between more devices by config.mesh.fsdp, now {mesh.shape['fsdp']}"


def _fewer_queries(train: TrainConfig) -> str:
    rows = train.micro_batch_queries
    return f"lower config.train.micro_batch_queries, now {rows}" if rows > 1 else ""


def check_mesh(config: RunConfig, shape: DecoderConfig) -> None:
    """Raises BadConfigError where the config's mesh does not fit the devices or a model of this shape."""
    sharded_params(shape, make_mesh(config.mesh), config.train.weights_dtype)


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that are read of a model folder.

    Other tools may put more into a folder of the Hub's cache, and change nothing.

    Raises:
      BadDataError: its weights are missing.
    """
    return files.content_hash([[name, files.file_hash(folder / name)] for name in model_files(folder)])


def check_prompts(opened: OpenModel, prompts: Sequence[str], config: SamplingConfig) -> list[list[int]]:
    """The prompts' token ids. Raises BadDataError where one has none, or may not fit with its response."""
    ids = [opened.tokenizer.prompt_ids(prompt) for prompt in prompts]
    for number, (prompt, row) in enumerate(zip(prompts, ids, strict=True), start=1):
        if problem := _prompt_problem(opened, row, config.max_new_tokens):
            raise BadDataError(f"Prompt {number} ({prompt[:60]!r}...) {problem}")
    return ids


def _prompt_problem(opened: OpenModel, ids: Sequence[int], new_tokens: int) -> str:
    """What is wrong with a prompt, and the remedy; "" where nothing is."""
    shape = opened.model.config
    if not ids:
        return "has no tokens; remove it."
    if max(ids) >= shape.vocab_size:
        return (
            f"has token ids beyond the model's vocabulary of {shape.vocab_size}; the tokenizer and the weights in "
            f"{opened.folder} do not belong together."
        )
    if len(ids) + new_tokens > shape.max_positions:
        return (
            f"has {len(ids)} tokens; with {new_tokens} new ones it exceeds the model's {shape.max_positions} "
            "positions. Shorten it, or lower config.sampling.max_new_tokens."
        )
    return ""


def check_queries(config: RunConfig, *, iterations: int) -> None:
    """Refuses, before any work, the first query whose prompt may not fit the model together with a response.

    Args:
      config: the run's; its model and files are there.
      iterations: how many times the training queries are sampled from; 0 looks at the evaluation's alone.

    Raises:
      BadConfigError: the constitutions cannot be drawn.
      BadDataError: the file and the query, or an iteration has fewer queries than its training needs.
    """
    opened = open_model(Path(config.model), config)
    for tasks in evaluation_tasks(config).values():
        _check_tasks(opened, config, tasks, config.queries.evaluation)
    principles = [p for p in read_principles(Path(config.constitutions.principles)) if not p.held_out]
    queries = read_queries(Path(config.queries.train)) if iterations else []
    for iteration in range(1, iterations + 1):
        half = alternating_half(queries, iteration)
        if len(half) < (needed := pairs_needed(config.train, iteration)):
            raise BadDataError(
                f"{config.queries.train}: iteration {iteration} samples from {len(half)} queries, every second one, "
                f"but its {config.train.steps[iteration - 1]} steps need {needed}; give more queries, or lower "
                "config.train.steps or config.train.queries_per_step, or raise config.train.passes."
            )
        drawn = (_draw_task(config, query, principles, "sample", iteration) for query in half)
        _check_tasks(opened, config, drawn, config.queries.train)


def _check_tasks(opened: OpenModel, config: RunConfig, tasks: Iterable[Task], file: str) -> None:
    templates = {"generation": config.prompts.generation, "training": config.prompts.training}
    new_tokens = config.sampling.max_new_tokens + config.train.train_eos
    # A token is a byte at least, but for those that the tokenizer puts in front: of prompts below this, and but for
    # the first, no ids are needed.
    fitting = opened.model.config.max_positions - new_tokens - len(opened.tokenizer.leading_ids) - 1
    for number, task in enumerate(tasks):
        for constitution in task.constitutions:
            for name, template in templates.items():
                prompt = render(template, constitution=constitution.text, query=task.query.text)
                if number and len(prompt.encode()) <= fitting:
                    continue
                if problem := _prompt_problem(opened, opened.tokenizer.prompt_ids(prompt), new_tokens):
                    raise BadDataError(f"{file}: the {name} prompt of query {task.query.example_id!r} {problem}")


def respond(loaded: LoadedModel, prompts: Sequence[str], config: SamplingConfig, *, rows: int) -> list[Response]:
    """Greedy responses to prompt texts, in batches of `rows`, or as many more as the mesh can share evenly.

    Raises:
      BadDataError: as `check_prompts` does.
    """
    ids = check_prompts(loaded, prompts, config)
    stops = make_stops(
        loaded.tokenizer,
        end_ids=loaded.end_ids,
        markers=config.stop,
        vocab_size=loaded.model.config.vocab_size,
    )
    rows = shared_rows(rows, loaded.mesh)
    responses = []
    for start in range(0, len(ids), rows):
        responses += sample_responses(
            loaded.model.decode,
            loaded.params,
            ids[start : start + rows],
            loaded.tokenizer,
            stops=stops,
            max_new_tokens=config.max_new_tokens,
            rows=rows,
            round_to=config.round_prompt_tokens_to,
            sharding=batch_sharding(loaded.mesh),
        )
    return responses


def score_file(config: RunConfig, *, model: Path, pairs: Path) -> tuple[list[dict[str, Any]], str]:
    """Scores a pairs file.

    Returns:
      One JSON value per query (example_id, logps [C][R], loss, over_responses, over_constitutions, mi_nats, normalize;
      nats), and a sentence that sums up.

    Raises:
      BadDataError: model or pairs cannot be used.
      NonFiniteError: a log-prob is NaN or infinite.
    """
    opened = open_model(model, config)
    shape = opened.model.config
    data = read_pairs(
        pairs,
        opened.tokenizer,
        boundary=config.prompts.boundary,
        max_positions=shape.max_positions,
        vocab_size=shape.vocab_size,
    )
    loaded = opened.loaded(config.compute_dtype)
    matrices = score_all(loaded, loaded.params, data, config, progress=Progress("scoring", len(data), unit="queries"))
    bad = [pair.example_id for pair, logps in zip(data, matrices, strict=True) if not np.isfinite(logps).all()]
    if bad:
        raise NonFiniteError(
            f"{pairs}: the log-probs of queries {bad} are not finite; the model in {model} is damaged."
        )
    loss_of = functools.partial(
        sami_loss,
        over_responses_weight=config.train.over_responses_weight,
        over_constitutions_weight=config.train.over_constitutions_weight,
    )
    losses = jax.vmap(loss_of)(jnp.asarray(matrices))
    lines = [
        {
            "example_id": pair.example_id,
            "logps": logps.tolist(),
            "loss": float(losses.loss[i]),
            "over_responses": float(losses.over_responses[i]),
            "over_constitutions": float(losses.over_constitutions[i]),
            "mi_nats": float(query_mi_nats(logps[None])[0]),
            "normalize": config.train.normalize,
        }
        for i, (pair, logps) in enumerate(zip(data, matrices, strict=True))
    ]
    loss, mi = (float(np.mean([line[key] for line in lines])) for key in ("loss", "mi_nats"))
    count = matrices.shape[1]
    summary = (
        f"{len(lines)} queries, {count} constitutions, {config.train.normalize} log-probs: loss {loss:.6f} nats, "
        f"MI bound {mi:.6f} of at most {math.log(count):.6f} nats"
    )
    return lines, summary


def sample_stage(
    config: RunConfig, *, model: Path, iteration: int, inputs: Any, out: Path, safe_point: SafePoint
) -> str:
    """Samples responses until enough contrastive pairs are kept, and writes `pairs.json` (Algorithm 1, sampling).

    Args:
      config: the run's.
      model: the previous iteration's model folder.
      iteration: 1, 2, ...: which half of the queries, and how many pairs its steps need.
      inputs: JSON value of everything this depends on.
      out: gets `chunks/00000.jsonl` ..., `pairs.json`, `rejects.jsonl` and DONE.json.
      safe_point: called between chunks.

    Returns:
      The stage's fingerprint.

    Raises:
      BadDataError: the queries run out before enough pairs are kept.
    """
    principles = [p for p in read_principles(Path(config.constitutions.principles)) if not p.held_out]
    queries = alternating_half(read_queries(Path(config.queries.train)), iteration)
    stage_folder.begin(out, inputs=inputs)
    order = generator(config.seed, "sample", iteration).permutation(len(queries))
    needed = pairs_needed(config.train, iteration)
    loaded = load_model(model, config)
    kept: list[Pair] = []
    rejects: list[dict[str, Any]] = []
    asked = 0
    progress = Progress(f"iteration {iteration}: sampling", needed, unit="pairs")
    size = config.sampling.chunk_queries
    for number, start in enumerate(range(0, len(order), size)):
        tasks = [_draw_task(config, queries[i], principles, "sample", iteration) for i in order[start : start + size]]
        answers = _answer_chunk(loaded, tasks, config, out / "chunks" / f"{number:05d}.jsonl")
        for task, responses in zip(tasks, answers, strict=True):
            reason = drop_reason(responses, config.filters)
            if reason is None:
                kept.append(_training_pair(config, task, responses, loaded.tokenizer, iteration))
            else:
                texts = [response.text for response in responses]
                rejects.append({"example_id": task.query.example_id, "reason": reason, "responses": texts})
        asked += len(tasks)
        progress.update(min(len(kept), needed), f"{len(kept)} of {asked} queries kept")
        if len(kept) >= needed:
            break
        safe_point()
    dropped = {reason: sum(reject["reason"] == reason for reject in rejects) for reason in REASONS}
    if len(kept) < needed:
        raise BadDataError(
            f"Iteration {iteration} kept {len(kept)} pairs of {asked} queries ({dropped}), but its "
            f"{config.train.steps[iteration - 1]} steps need {needed}; start a run in another folder with more "
            "queries, fewer config.train.steps, or higher config.train.passes."
        )
    write_pairs(out / "pairs.json", kept)
    files.write_jsonl(out / "rejects.jsonl", rejects)
    counts = {"queries": len(queries), "sampled": asked, "kept": len(kept), "dropped": dropped}
    return stage_folder.seal(out, inputs=inputs, counts=counts)


def train_stage(
    config: RunConfig,
    *,
    base: Path,
    pairs: Path,
    iteration: int,
    inputs: Any,
    out: Path,
    log: Log,
    safe_point: SafePoint,
) -> str:
    """Trains the base model on contrastive pairs (Algorithm 1, training), from the newest checkpoint on.

    Args:
      config: the run's; `train.steps[iteration - 1]` steps are made.
      base: the base model's folder.
      pairs: the pairs' file.
      iteration: 1, 2, ....
      inputs: JSON value of everything this depends on.
      out: gets `checkpoints/`, `data.json` (the example ids of every step) and DONE.json.
      log: takes the metrics of every step.
      safe_point: called between steps, after a save where it would stop.

    Returns:
      The stage's fingerprint.

    Raises:
      BadDataError: model or pairs cannot be used, or there are fewer pairs than the steps need.
      NonFiniteError: loss or gradient became NaN or infinite; the queries are named.
    """
    train = config.train
    opened = open_model(base, config)
    shape = opened.model.config
    steps, size = train.steps[iteration - 1], train.queries_per_step
    eos_id = opened.tokenizer.end_id() if train.train_eos else None
    room = shape.max_positions - train.train_eos
    data = read_pairs(
        pairs,
        opened.tokenizer,
        boundary=config.prompts.boundary,
        max_positions=room,
        vocab_size=shape.vocab_size,
    )
    needed, passes = pairs_needed(train, iteration), steps * size / len(data)
    if len(data) < needed:
        raise BadDataError(
            f"{pairs} holds {len(data)} pairs, but {steps} steps of {size} queries need {needed}: each pair would be "
            f"used {passes:.1f} times, more than config.train.passes={train.passes:g}. Give more pairs, lower "
            "config.train.steps or config.train.queries_per_step, or set "
            f"config.train.passes={math.ceil(100 * passes) / 100:g}."
        )
    # Before anything is written, so that weights that are refused leave nothing behind.
    fresh = None if (out / "checkpoints").is_dir() else fresh_state(opened, train)
    reference = opened.load(config.compute_dtype) if train.kl_beta > 0 else None
    stage_folder.begin(out, inputs=inputs)
    schedule = [
        query_indices(len(data), step, seed=config.seed, iteration=iteration, queries_per_step=size)
        for step in range(steps)
    ]
    ids = [[data[i].example_id for i in indices] for indices in schedule]
    files.write_json(out / "data.json", ids)
    width, response_width = batch_widths(data, round_to=train.round_tokens_to, eos_id=eos_id)
    step_fn = make_train_step(opened.model.score, train, seed=config.seed)
    sharding = micro_batch_sharding(opened.mesh)
    with Checkpoints(out / "checkpoints") as checkpoints:
        state = fresh or checkpoints.restore_latest(opened.state(train)) or fresh_state(opened, train)
        first = int(state.step)
        progress = Progress(f"iteration {iteration}: training", steps, unit="steps", done=first, log_every_s=5.0)
        for step in range(first, steps):
            started = time.monotonic()
            rows = [data[i] for i in schedule[step]]
            with enough_memory(
                f"in step {step + 1} of iteration {iteration}, on sequences of {width} tokens",
                _fewer_queries(train),
                "set config.train.remat=full" if train.remat != "full" else "",
                _more_devices(opened.mesh),
                "set config.train.weights=bfloat16_stochastic" if train.weights == "float32" else "",
            ):
                batch = make_batch(rows, width=width, response_width=response_width, eos_id=eos_id)
                micro = micro_batches(batch, train.micro_batch_queries * batch_shards(opened.mesh))
                state, metrics = step_fn(state, reference, place(micro, sharding))
                finite = bool(metrics.finite)
            if not finite:
                bad = nonfinite_examples(metrics, ids[step])
                raise NonFiniteError(
                    f"Step {step + 1} of iteration {iteration}: loss {float(metrics.loss)}, gradient norm "
                    f"{float(metrics.grad_norm)} are not finite (queries {bad or ids[step]}); the update was not "
                    "applied. Look at these queries, and lower config.train.learning_rate if they are sound."
                )
            scalars = {k: float(v) for k, v in metrics._asdict().items() if k not in ("finite", "query_losses")}
            seconds = time.monotonic() - started
            log({"iteration": iteration, "stage": "train", "step": step + 1, **scalars, "step_time_s": seconds})
            note = f"loss {scalars['loss']:.4f}, MI {scalars['mi_nats']:.4f} nats"
            progress.update(step + 1, f"{len(data)} pairs, {passes:.1f} passes, {note}")
            if (step + 1) % train.checkpoint_every == 0 or step + 1 == steps:
                checkpoints.save(state)
                safe_point()
            else:
                checkpoints.save_if_stopped(state, safe_point)
    widths = {"width": width, "response_width": response_width}
    counts = {"steps": steps, "pairs": len(data), **widths, "state": fingerprint(state)}
    return stage_folder.seal(out, inputs=inputs, counts=counts, outside="checkpoints")


def fresh_state(opened: OpenModel, train: TrainConfig) -> TrainState:
    """The state before the first step: the folder's weights, and the optimizer's beside them."""
    specs = opened.state(train)
    with enough_memory(
        f"making the optimizer's state; with the weights it takes {device_bytes(specs) / 1e9:.1f} GB of each device",
        _more_devices(opened.mesh),
        "set config.train.weights=bfloat16_stochastic" if train.weights == "float32" else "",
    ):
        state = init_state(opened.load(train.weights_dtype), make_optimizer(train))
        return place(state, jax.tree.map(lambda spec: spec.sharding, specs))


def export_stage(
    config: RunConfig, *, base: Path, trained: Path, inputs: Any, out: Path, card: str, safe_point: SafePoint
) -> str:
    """Writes the weights of a finished training as a Hugging Face folder. Returns the stage's fingerprint.

    Raises:
      BadDataError: the training's last checkpoint is damaged.
    """
    safe_point()
    shutil.rmtree(out, ignore_errors=True)  # only ever an export that was cut off before its seal
    step = save_trained(config, base=base, trained=trained, out=out, card=card)
    made_of = "" if config.train.keep_checkpoints else trained.name
    return stage_folder.seal(out, inputs=inputs, counts={"step": step}, made_of=made_of)


def drop_checkpoints(train: TrainConfig, *, trained: Path) -> None:
    """Deletes the checkpoints of a finished training whose exported model stands, unless they are to be kept."""
    if not train.keep_checkpoints:
        shutil.rmtree(trained / "checkpoints", ignore_errors=True)  # what is left of it goes at the next start


def save_trained(config: RunConfig, *, base: Path, trained: Path, out: Path, card: str) -> int:
    """Writes the weights of a finished training as a Hugging Face folder. Returns the number of its steps.

    Raises:
      BadDataError: its last checkpoint is damaged.
    """
    finished = stage_folder.read_done(trained)["counts"]
    opened = open_model(base, config)
    with Checkpoints(trained / "checkpoints") as checkpoints:
        state = checkpoints.restore_latest(opened.state(config.train))
    if state is None or fingerprint(state) != finished["state"]:
        raise BadDataError(
            f"{trained}: the checkpoint of its last step, {finished['steps']}, is missing or damaged; delete this "
            "folder to have it made anew."
        )
    save_finetuned(out, state.params, opened.model.config, dtype=config.train.weights_dtype, source=base, card=card)
    return int(state.step)


def convert(config: RunConfig, *, model: Path, out: Path, dtype: str, verify: bool) -> None:
    """Writes a model folder anew, its weights in another dtype.

    Args:
      config: whose mesh is used.
      model: the folder.
      out: the new one.
      dtype: "float32", "bfloat16" or "float16".
      verify: load `out` again, and compare the logits of random tokens.

    Raises:
      BadDataError: `model` cannot be used, or `out` holds files.
      NonFiniteError: a weight is not finite in `dtype`.
      SaveFailedError: the disk is full or not writable, or `out` gives other logits than the rounded weights do.
    """
    config = dataclasses.replace(config, compute_dtype="float32")  # bfloat16 would round differences away
    loaded = load_model(model, config)
    card = (model / "README.md").read_text(encoding="utf-8") if (model / "README.md").is_file() else ""
    save_finetuned(out, loaded.params, loaded.model.config, dtype=dtype, source=model, card=card)
    if verify:
        _verify(out, loaded, config, dtype=dtype)


def _verify(out: Path, loaded: LoadedModel, config: RunConfig, *, dtype: str) -> None:
    """Loads a written model folder and compares its logits with those of the weights it was written from.

    Args:
      out: the written folder.
      loaded: the float32 weights.
      config: whose mesh is used.
      dtype: what they were rounded to.

    Raises:
      SaveFailedError: the logits of random tokens are others.
    """
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), loaded.params)
    shape = (batch_shards(loaded.mesh), min(64, loaded.model.config.max_positions))
    tokens = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, shape).astype(np.int32)
    at = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    placed = place((tokens, at), batch_sharding(loaded.mesh))
    score = jax.jit(loaded.model.score)
    written = load_model(out, config).params
    before, after = (gather(score(params, *placed)) for params in (rounded, written))
    if not np.array_equal(before, after):
        raise SaveFailedError(
            f"{out} does not give the logits of the weights it was made from (largest difference "
            f"{np.abs(before - after).max():.3g}); do not use it, and export again."
        )


def model_card(config: RunConfig, iteration: int, *, base: str) -> str:
    """README.md of a trained folder: what it was made from (`hub.model_name` of the base), and how."""
    train = config.train
    return (
        f"# {base.partition('@')[0]} after SAMI, iteration {iteration}\n\n"
        f"Trained from `{base}` by sami_jax with SAMI (arXiv:2404.14313): "
        f"{train.steps[iteration - 1]} optimizer steps of {train.queries_per_step} queries, learning rate "
        f"{train.learning_rate:g} ({train.optimizer}), {train.normalize} log-probs, KL weight {train.kl_beta:g}.\n"
    )


def evaluate_stage(
    config: RunConfig,
    *,
    model: Path,
    base: Path,
    baseline: Path | None,
    iteration: int,
    inputs: Any,
    out: Path,
    safe_point: SafePoint,
) -> str:
    """Answers the evaluation queries, judges and scores the answers (paper, section 4).

    Args:
      config: the run's.
      model: the folder of the model to evaluate.
      base: the base model's folder; the answers' log-prob under it shows over-optimisation.
      baseline: the base's finished evaluation folder, to compare with; None for the base itself.
      iteration: 0 for the base.
      inputs: JSON value of everything this depends on.
      out: gets `responses/*/00000.jsonl`, `results.jsonl`, `summary.json` and DONE.json.
      safe_point: called between chunks.

    Returns:
      The stage's fingerprint.

    Raises:
      BadDataError: queries, principles or baseline cannot be used.
      NonFiniteError: a log-prob is NaN or infinite.
    """
    all_tasks = evaluation_tasks(config)
    theirs = _read_baseline(baseline, all_tasks, config) if baseline else None
    loaded = load_model(model, config)
    base_params = loaded.params if model == base else load_model(base, config).params
    stage_folder.begin(out, inputs=inputs)
    records: list[dict[str, Any]] = []
    splits: dict[str, Any] = {}
    for split, tasks in all_tasks.items():
        answers: list[list[Response]] = []
        progress = Progress(f"iteration {iteration}: evaluating {split}", len(tasks), unit="queries")
        for number, start in enumerate(range(0, len(tasks), config.sampling.chunk_queries)):
            chunk = tasks[start : start + config.sampling.chunk_queries]
            answers += _answer_chunk(loaded, chunk, config, out / "responses" / split / f"{number:05d}.jsonl")
            progress.update(len(answers))
            safe_point()
        mine = _evaluate_split(config, loaded, base_params, tasks, answers, split)
        splits[split] = summarize(mine, None if theirs is None else [r for r in theirs if r["split"] == split])
        splits[split]["judge"] = None if config.evaluation.judge == "none" else config.evaluation.judge
        records += mine
    files.write_jsonl(out / "results.jsonl", records)
    summary = {
        "iteration": iteration,
        "normalize": config.train.normalize,
        "ceiling_nats": math.log(config.constitutions.count),
        "splits": splits,
    }
    files.write_json(out / "summary.json", summary)
    return stage_folder.seal(out, inputs=inputs, counts={name: split["n_queries"] for name, split in splits.items()})


def _read_baseline(folder: Path, tasks: dict[str, list[Task]], config: RunConfig) -> list[dict[str, Any]]:
    """The base's results. Raises BadDataError where they answer other tasks or were not judged alike."""
    stage_folder.check_sealed(folder / "results.jsonl")
    records = files.read_jsonl(folder / "results.jsonl")
    judged = config.evaluation.judge != "none"
    wanted = [
        [name, task.query.example_id, [constitution.text for constitution in task.constitutions], judged]
        for name, split in tasks.items()
        for task in split
    ]
    found = [[r["split"], r["example_id"], r["constitutions"], r["verdicts"] is not None] for r in records]
    if found != wanted:
        raise BadDataError(
            f"{folder} is no baseline for this evaluation: its queries, constitutions or judge are others. Evaluate "
            "the base with the same config first."
        )
    return records


def evaluation_tasks(config: RunConfig) -> dict[str, list[Task]]:
    """The queries and constitutions of each split, the same for every iteration.

    "learned": principles SAMI trains on; "held_out": the others, where there are enough of them for a constitution.

    Raises:
      BadConfigError: the constitutions cannot be drawn.
      BadDataError: queries or principles cannot be used, or the judge cannot read them.
    """
    queries = read_queries(Path(config.queries.evaluation))[: config.queries.evaluation_count]
    principles = read_principles(Path(config.constitutions.principles))
    check_judged(config.evaluation.judge, queries, principles)
    held_out = [p for p in principles if p.held_out]
    splits = {"learned": [p for p in principles if not p.held_out]}
    if config.evaluation.held_out and len(held_out) >= config.constitutions.principles_per_query:
        splits["held_out"] = held_out
    return {name: [_draw_task(config, q, drawn, "evaluate", name) for q in queries] for name, drawn in splits.items()}


def _draw_task(config: RunConfig, query: Query, principles: Sequence[Principle], *names: str | int) -> Task:
    drawn = draw_constitutions(
        principles,
        generator(config.seed, "constitutions", *names, query.example_id),
        count=config.constitutions.count,
        per_query=config.constitutions.principles_per_query,
        pairing=config.constitutions.pairing,
    )
    return Task(query, tuple(drawn))


def _answer_chunk(loaded: LoadedModel, tasks: Sequence[Task], config: RunConfig, path: Path) -> list[list[Response]]:
    """The responses of each task, read from `path` where it stands, else sampled and written there."""
    count = config.constitutions.count
    if not path.exists():
        prompts = [
            render(config.prompts.generation, constitution=constitution.text, query=task.query.text)
            for task in tasks
            for constitution in task.constitutions
        ]
        with enough_memory(
            f"sampling {len(prompts)} responses of up to {config.sampling.max_new_tokens} tokens at once",
            f"lower config.sampling.chunk_queries, now {config.sampling.chunk_queries}",
            _more_devices(loaded.mesh),
        ):
            flat = respond(loaded, prompts, config.sampling, rows=config.sampling.chunk_queries * count)
        lines = [
            {
                "example_id": task.query.example_id,
                "constitutions": [constitution.text for constitution in task.constitutions],
                "responses": [dataclasses.asdict(response) for response in flat[i * count : (i + 1) * count]],
            }
            for i, task in enumerate(tasks)
        ]
        files.write_jsonl(path, lines)
    records = files.read_jsonl(path)
    if [record["example_id"] for record in records] != [task.query.example_id for task in tasks]:
        raise BadDataError(f"{path} holds other queries than the run asks for; delete it to have it sampled anew.")
    return [[Response(r["text"], tuple(r["ids"]), r["finished"]) for r in record["responses"]] for record in records]


def _training_pair(
    config: RunConfig, task: Task, responses: Sequence[Response], tokenizer: Tokenizer, iteration: int
) -> Pair:
    rng = generator(config.seed, "reshuffle", iteration, task.query.example_id)
    constitutions = [c.shuffled(rng) if config.constitutions.reshuffle else c for c in task.constitutions]
    return _pair(config.prompts, task.query, constitutions, responses, tokenizer)


def _pair(
    templates: PromptsConfig,
    query: Query,
    constitutions: Sequence[Constitution],
    responses: Sequence[Response],
    tokenizer: Tokenizer,
) -> Pair:
    """The pair that is trained or scored: responses as sampled, or tokenised anew with the prompt as the authors do."""
    prompts = [render(templates.training, constitution=c.text, query=query.text) for c in constitutions]
    response_ids = [response.ids for response in responses]
    if templates.boundary == "authors":
        response_ids = [
            tuple(tokenizer.response_ids(response.text, prompt=prompt, boundary="authors"))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    return Pair(
        query.example_id,
        tuple(prompts),
        tuple(response.text for response in responses),
        tuple(tuple(tokenizer.prompt_ids(prompt)) for prompt in prompts),
        tuple(response_ids),
    )


def _evaluate_split(
    config: RunConfig,
    loaded: LoadedModel,
    base_params: Params,
    tasks: Sequence[Task],
    answers: Sequence[Sequence[Response]],
    split: str,
) -> list[dict[str, Any]]:
    pairs = [
        _pair(config.prompts, task.query, task.constitutions, responses, loaded.tokenizer)
        for task, responses in zip(tasks, answers, strict=True)
    ]
    ours, bases = (score_all(loaded, params, pairs, config) for params in (loaded.params, base_params))
    for pair, logps, base_logps in zip(pairs, ours, bases, strict=True):
        if not (np.isfinite(logps).all() and np.isfinite(base_logps).all()):
            raise NonFiniteError(f"The log-probs of query {pair.example_id} are not finite; a model is damaged.")
    mi_nats = query_mi_nats(ours)
    judge = get_judge(config.evaluation.judge)
    records = []
    rows = zip(tasks, answers, pairs, ours, bases, mi_nats, strict=True)
    for task, responses, pair, logps, base_logps, mi in rows:
        defined = all(pair.response_ids)  # an empty response has no log-prob; such queries are counted, not averaged
        verdicts = None
        if judge:
            judged = [judge(task.query, c, r.text) for c, r in zip(task.constitutions, responses, strict=True)]
            verdicts = [
                {**dataclasses.asdict(v), "adherence": v.adherence, "score": v.score, "strict_score": v.strict_score}
                for v in judged
            ]
        records.append(
            {
                "split": split,
                "example_id": task.query.example_id,
                "query": task.query.text,
                "constitutions": [constitution.text for constitution in task.constitutions],
                "responses": list(pair.responses),
                "response_tokens": [len(ids) for ids in pair.response_ids],
                "logps": logps.tolist() if defined else None,
                "base_logps": np.diagonal(base_logps).tolist() if defined else None,
                "mi_nats": float(mi) if defined else None,
                "verdicts": verdicts,
            }
        )
    return records


def score_all(
    loaded: LoadedModel, params: Params, pairs: Sequence[Pair], config: RunConfig, *, progress: Progress | None = None
) -> np.ndarray:
    """[Q, C, R] log-probs of the pairs by the config's `train.normalize`."""
    rows = config.train.micro_batch_queries * batch_shards(loaded.mesh)
    with enough_memory(f"scoring {rows} queries at once", _fewer_queries(config.train), _more_devices(loaded.mesh)):
        return score_pairs(
            loaded.model.score,
            params,
            pairs,
            normalize=config.train.normalize,
            rows=rows,
            round_to=config.train.round_tokens_to,
            sharding=batch_sharding(loaded.mesh),
            scored=progress.update if progress else lambda done: None,
        )
