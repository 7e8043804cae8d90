"""Small real tokenizers and model folders for the tests, made without torch and without a network."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sami_jax.huggingface.folder import load_params
from sami_jax.model.decoder import abstract_params
from sami_jax.model.shape import DecoderConfig, RopeScaling
from sami_jax.types import Params

KINDS = ("byte_level", "metaspace", "mistral")
CORPUS = [
    "SUBREDDIT: r/relationships POST: My sister will not talk to me. Summary: The post asks how to make peace.",
    "Summaries should be concise. Summaries should be comprehensive. The post is about a trip to the sea.",
    "Human: How do I bake bread? Assistant: Mix flour, water, salt and yeast; wait, then bake.",
] * 3


def tiny_config(**changes: Any) -> DecoderConfig:
    """A Mistral shape where no two axes agree by accident: D is not N x H, and N is not K."""
    shape: dict[str, Any] = {
        "model_type": "mistral",
        "vocab_size": 61,
        "embed_dim": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 10,
        "mlp_dim": 36,
        "n_experts": None,
        "experts_per_token": None,
        "max_positions": 64,
        "rope_theta": 100.0,
        "rope_scaling": None,
        "norm_eps": 1e-5,
        "sliding_window": None,
        "tied_embeddings": False,
    }
    return DecoderConfig(**shape | changes)


_EVEN = tiny_config(vocab_size=32, n_layers=2, embed_dim=32, head_dim=4, mlp_dim=24)
# Shapes that every layout of eight devices shares evenly.
FAMILIES = {
    "mistral": dataclasses.replace(_EVEN, sliding_window=4),
    "llama3": dataclasses.replace(
        _EVEN,
        model_type="llama",
        tied_embeddings=True,
        rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=8),
    ),
    "mixtral": dataclasses.replace(_EVEN, model_type="mixtral", n_experts=4, experts_per_token=2),
}


def random_params(config: DecoderConfig, *, seed: int = 0, stddev: float = 0.3) -> Params:
    """Weights large enough that every part of the model shows in the logits; the norms' gains differ from one."""
    rng = np.random.default_rng(seed)
    shapes, axes = abstract_params(config)

    def leaf(spec: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> np.ndarray:
        gain = "features" in names and "router" not in names
        return (gain + rng.normal(0.0, stddev, spec.shape)).astype(np.float32)

    return jax.tree.map(leaf, shapes, axes)


def load_float32(folder: Path, config: DecoderConfig) -> Params:
    """A model folder's weights on one device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_params(
        folder, config, dtype=np.float32, shardings=jax.tree.map(lambda _: one, abstract_params(config)[0])
    )


def write_tokenizer(folder: Path, kind: str, *, bos: bool, vocab_size: int = 340) -> Tokenizer:
    """Writes tokenizer.json and tokenizer_config.json; returns the `tokenizers` object for comparison.

    Args:
      folder: made if missing.
      kind: "byte_level" (GPT-2, Llama 3), "metaspace" (a Metaspace pre-tokenizer) or "mistral" (Mistral 7B and Llama 2:
        a normalizer puts the space symbol in front, and nothing splits before the merges).
      bos: whether the tokenizer puts `<s>` in front.
      vocab_size: about how many tokens.
    """
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
    else:
        tokenizer = _metaspace(kind, specials, vocab_size)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"clean_up_tokenization_spaces": False}))
    return tokenizer


def _metaspace(kind: str, specials: list[str], vocab_size: int) -> Tokenizer:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    # As in Llama's: the special tokens, one token per byte, then what was learned.
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(specials)
    return tokenizer
