"""A small base model from scratch: the miniature's, written as an ordinary Hugging Face folder."""

import dataclasses
import functools
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sami_jax.checkpoints import Checkpoints
from sami_jax.config.fields import to_dict
from sami_jax.config.pretraining import PretrainingConfig
from sami_jax.data.tokenizer import Tokenizer, load_tokenizer
from sami_jax.errors import NonFiniteError
from sami_jax.files import append_jsonl, content_hash, read_log, write_json, write_jsonl
from sami_jax.huggingface.families import config_to_huggingface
from sami_jax.huggingface.folder import save_model
from sami_jax.losses import token_logps
from sami_jax.miniature import world
from sami_jax.model.decoder import init_params, make_model
from sami_jax.model.shape import DecoderConfig
from sami_jax.progress import Progress
from sami_jax.safe_point import SafePoint
from sami_jax.scoring.head import logits_of
from sami_jax.scoring.matrices import causal_rows
from sami_jax.seeds import jax_key
from sami_jax.stage_folder import check_sealed, locked, seal, seal_of
from sami_jax.types import Array, Params, RowModel, TrainState

BOS, EOS = "<s>", "</s>"

# Raise it where a change makes other weights or data of the same settings (tests/test_pretraining.py tells): a finished
# base is then made anew, and no longer taken for what this code would make.
BASE_VERSION = 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "transformers")


def pretrained_folder(config: PretrainingConfig) -> Path:
    """The folder that keeps a base, named by the hash of its settings, BASE_VERSION and the libraries' versions."""
    made_by = {
        "config": _deciding(config),
        "base_version": BASE_VERSION,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    return Path(config.cache_dir) / content_hash(made_by)[:16]


def pretrain(config: PretrainingConfig, *, safe_point: SafePoint) -> Path:
    """Makes the base model and its world, once; an interrupted pretraining goes on from its newest checkpoint.

    Args:
      config: what to make.
      safe_point: called every few steps; a StoppedError that it raises stops the work after a save.

    Returns:
      A folder with `model/` (Hugging Face), `data/principles.json`, `data/train.jsonl`, `data/validation.jsonl`,
      `data/test.jsonl`, `metrics.jsonl` and DONE.json.
    """
    folder = pretrained_folder(config)
    # A finished folder is not locked, so that any number of runs may read it at once.
    if not is_finished(config):
        with locked(folder):
            if not is_finished(config):
                _make(config, folder, safe_point)
    check_sealed(folder)
    # Delete them only behind the seal, since a kill before it would repeat all steps; at each call, since a kill may
    # have come in the middle of this line.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def is_finished(config: PretrainingConfig) -> bool:
    """Whether the base stands. Raises BadDataError where it was changed since."""
    return seal_of(pretrained_folder(config), inputs=_deciding(config)) is not None


def base_shape(config: PretrainingConfig) -> DecoderConfig:
    """The decoder that is pretrained."""
    return DecoderConfig(
        model_type="mistral",
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.embed_dim // config.n_heads,
        mlp_dim=config.mlp_dim,
        n_experts=None,
        experts_per_token=None,
        max_positions=config.max_positions,
        rope_theta=10000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        sliding_window=None,
        tied_embeddings=True,
    )


def weighted_cross_entropy(model: RowModel, params: Params, tokens: Array, weights: Array) -> Array:
    """Mean cross-entropy of the next token, in nats.

    Args:
      model: the model.
      params: its parameters.
      tokens: [B, T] int32, padded on the right.
      weights: [B, T] float32; entry t weighs the prediction of tokens[:, t]; 0 for padding and the first token.

    Returns:
      sum(weights * -log p) / sum(weights).
    """
    hidden = model.hidden(params, causal_rows(tokens))[:, :-1]
    logps = jax.vmap(token_logps)(logits_of(hidden, model.head(params)), tokens[:, 1:])
    return -jnp.sum(logps * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def pretraining_optimizer(config: PretrainingConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on the layers' matrices, AdamW on embedding and norms; warm-up, then linear to 0.

    Both have Nesterov momentum, which optax' Muon hands on to its AdamW.
    """

    def schedule(peak: float) -> optax.Schedule:
        warmup = max(1, round(config.warmup_share * config.steps))
        return optax.join_schedules(
            [optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, 0.0, config.steps - warmup)],
            [warmup],
        )

    return optax.contrib.muon(
        schedule(config.matrix_learning_rate),
        adam_learning_rate=schedule(config.other_learning_rate),
        adam_b2=0.98,
        adam_weight_decay=0.01,
        muon_weight_dimension_numbers=muon_dimensions,
    )


def muon_dimensions(params: Params) -> Params:
    """For each stacked leaf [L, in..., out...], which axes make a matrix for Muon; None leaves the leaf to AdamW."""
    into_heads = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2, 3))
    from_heads = optax.contrib.MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(3,))
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    blocks = {
        "attention_norm": None,
        "attention": {"query": into_heads, "key": into_heads, "value": into_heads, "out": from_heads},
        "mlp_norm": None,
        "mlp": {"gate": matrix, "up": matrix, "down": matrix},
    }
    return {name: blocks if name == "blocks" else None for name in params}


def _make(config: PretrainingConfig, folder: Path, safe_point: SafePoint) -> None:
    documents = list(world.draw_corpus(config.seed, config.steps * config.batch_size))
    tokenizer = _train_tokenizer(documents, config, folder / "tokenizer")
    shape = base_shape(config)
    bos, eos = tokenizer.prompt_ids(BOS)[0], tokenizer.end_id()
    sequences = [_tokenize(document, tokenizer, config.prompt_weight) for document in documents]
    params = _train(config, shape, sequences, folder, safe_point)
    shutil.rmtree(folder / "model", ignore_errors=True)  # only ever one that was cut off before the seal
    save_model(
        folder / "model",
        params,
        shape,
        dtype="float32",
        huggingface_config=config_to_huggingface(shape, bos_token_id=bos, eos_token_id=eos),
        generation_config={"bos_token_id": bos, "eos_token_id": eos, "do_sample": False},
        tokenizer_folder=folder / "tokenizer",
        card=_CARD.format(config=json.dumps(_deciding(config), indent=1)),
    )
    splits = world.draw_queries(
        config.seed, train=config.train_queries, validation=config.validation_queries, test=config.test_queries
    )
    for split, queries in splits.items():
        write_jsonl(folder / "data" / f"{split}.jsonl", [dataclasses.asdict(query) for query in queries])
    principles = [dataclasses.asdict(p) for p in world.draw_principles(config.seed)]
    write_json(folder / "data" / "principles.json", principles)
    counts = {"documents": len(documents), "steps": config.steps}
    seal(folder, inputs=_deciding(config), counts=counts, outside="checkpoints")


def _train(
    config: PretrainingConfig,
    shape: DecoderConfig,
    sequences: list[tuple[list[int], list[float]]],
    folder: Path,
    safe_point: SafePoint,
) -> Params:
    model, optimizer = make_model(shape).rows, pretraining_optimizer(config)
    params = init_params(shape, jax_key(config.seed, "init"))
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, tokens: Array, weights: Array) -> tuple[TrainState, Array]:
        loss, gradients = jax.value_and_grad(weighted_cross_entropy, argnums=1)(model, state.params, tokens, weights)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Muon's matrices in a stack
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), loss

    log, log_every = folder / "metrics.jsonl", max(1, min(50, config.steps // 40))
    save_every = 10 * log_every  # a checkpoint ends with a logged step, so that the means go on as if never interrupted
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        state = checkpoints.restore_latest(state) or state
        first = int(state.step)
        write_jsonl(log, [line for line in read_log(log) if line["step"] <= first])
        progress = Progress("pretraining", config.steps, unit="steps", done=first)
        losses = []
        for index in range(first, config.steps):
            rows = sequences[index * config.batch_size : (index + 1) * config.batch_size]
            state, loss = update(state, *_pad(rows))
            losses.append(loss)
            if (index + 1) % log_every and index + 1 < config.steps:
                continue
            mean = float(np.mean(jax.device_get(losses)))
            if not np.isfinite(mean):
                raise NonFiniteError(f"Pretraining: the loss is {mean} at step {index + 1}; lower its learning rates.")
            append_jsonl(log, {"step": index + 1, "loss": mean})
            progress.update(index + 1, f"loss {mean:.3f}")
            losses = []
            if (index + 1) % save_every == 0:
                checkpoints.save(state)
                safe_point()
            else:
                checkpoints.save_if_stopped(state, safe_point)
    return state.params


def _tokenize(document: tuple[str, str], tokenizer: Tokenizer, prompt_weight: float) -> tuple[list[int], list[float]]:
    prompt, response = document
    prompt_ids = tokenizer.prompt_ids(prompt)
    response_ids = [*tokenizer.response_ids(response, prompt=prompt), tokenizer.end_id()]
    return prompt_ids + response_ids, [0.0] + [prompt_weight] * (len(prompt_ids) - 1) + [1.0] * len(response_ids)


def _pad(rows: list[tuple[list[int], list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    width = -(-max(len(ids) for ids, _ in rows) // 32) * 32  # few shapes, few compilations
    tokens, weights = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
    for row, (ids, weight) in enumerate(rows):
        tokens[row, : len(ids)], weights[row, : len(ids)] = ids, weight
    return tokens, weights


def _train_tokenizer(documents: list[tuple[str, str]], config: PretrainingConfig, folder: Path) -> Tokenizer:
    """A byte-level BPE of the corpus' first documents, in a folder that transformers reads."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((f"{prompt} {response}" for prompt, response in documents[:20000]), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # as it stands in tokenizer.json, whatever the model type
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": config.max_positions,
    }
    write_json(folder / "tokenizer_config.json", described)
    return load_tokenizer(folder)


def _deciding(config: PretrainingConfig) -> dict[str, Any]:
    return {key: value for key, value in to_dict(config).items() if key not in ("cache_dir", "enabled")}


_CARD = """# A miniature base model

Pretrained from scratch by `sami pretrain` on a generated world of posts and summaries; it is good for nothing else.

```json
{config}
```
"""
