"""A run of three iterations of a tiny random model, small enough for a test's own process."""

import json
import pathlib

from sami_jax.config.run import RunConfig, from_dict
from sami_jax.huggingface.families import config_to_huggingface
from sami_jax.huggingface.folder import save_model
from tiny_models import random_params, tiny_config, write_tokenizer

LEARNING_RATE = 0.01  # of single AdamW steps: each weight moves by about so much, and what is sampled changes
POSTS = {f"q{i}": f"Post {i}" for i in range(80)}


def tiny_run_config(folder: pathlib.Path) -> RunConfig:
    """Writes model, queries and principles into a folder. Returns the config of a run on them."""
    size = write_tokenizer(folder / "tokenizer", "byte_level", bos=True).get_vocab_size()
    shape = tiny_config(vocab_size=size, max_positions=256)
    save_model(
        folder / "model",
        random_params(shape),
        shape,
        dtype="float32",
        huggingface_config=config_to_huggingface(shape, bos_token_id=1, eos_token_id=2),
        generation_config={"eos_token_id": list(range(2, size, 6))},  # a random model ends its responses by chance only
        tokenizer_folder=folder / "tokenizer",
        card="# Tiny\n",
    )
    queries = [json.dumps({"example_id": name, "text": text}) + "\n" for name, text in POSTS.items()]
    (folder / "train.jsonl").write_text("".join(queries[4:]))
    (folder / "evaluation.jsonl").write_text("".join(queries[:4]))
    principles = [{"name": n, "definition": f"Be {n}.", "antithesis": f"Do not be {n}."} for n in ("brief", "kind")]
    (folder / "principles.json").write_text(json.dumps(principles))
    template = "{constitution}\n{query}:"
    return from_dict(
        {
            "model": str(folder / "model"),
            "queries": {"train": str(folder / "train.jsonl"), "evaluation": str(folder / "evaluation.jsonl")},
            "constitutions": {"principles": str(folder / "principles.json")},
            "prompts": {"generation": template, "training": template},
            "sampling": {"max_new_tokens": 24, "stop": [], "slots": 16, "shard_queries": 8, "prefill_tokens": 64},
            # Whatever a random model writes is good enough.
            "filters": {"placeholders": [], "sentence_ends": "".join(map(chr, range(33, 0x800))) + "\ufffd"},
            "train": {
                "steps": [1, 1, 1],
                "queries_per_step": 2,
                "learning_rate": LEARNING_RATE,
                "remat": "none",
                "keep_checkpoints": True,
            },
        }
    )
