"""The embedded default: SAMI on a laptop, on a generated world of posts and summaries.

    sami run --config=configs/miniature.py --workdir=runs/miniature

Hardware: any; two CPU cores are enough, and nothing is downloaded.
Duration: 9 minutes on two cores (docs/benchmarks.md), of which 5 pretrain a base model of 0.7M parameters from scratch,
which is kept for the next run; three iterations follow.
Expected: win rates of 0.75 to 0.80 against the base on the learned principles after three iterations (README.md has the
table, with intervals over several bases).
`configs/miniature.py:smoke` is the same in a minute, for tests: nothing can be learned from its numbers.
"""

import pathlib
import runpy

import ml_collections

_PROMPT = "Follow the constitution.\n\nConstitution:\n{constitution}\n\nPOST: {query}\n\nSummary:"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The run's settings; `variant` is empty or "smoke"."""
    if variant not in ("", "smoke"):
        raise ValueError(f"unknown variant {variant!r}; there is only 'smoke'")
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))["get_config"]()
    config.model = "{pretrained}/model"
    config.queries = ml_collections.ConfigDict(
        {
            "train": "{pretrained}/data/train.jsonl",
            "evaluation": "{pretrained}/data/test.jsonl",
            "evaluation_count": 250,
        }
    )
    config.constitutions = ml_collections.ConfigDict(
        {
            "principles": "{pretrained}/data/principles.json",
            "count": 2,
            "principles_per_query": 2,
            "pairing": "symmetric",
        }
    )
    config.prompts = ml_collections.ConfigDict({"generation": _PROMPT, "training": _PROMPT})
    config.sampling = ml_collections.ConfigDict(
        {"max_new_tokens": 40, "stop": ("\n",), "slots": 64, "shard_queries": 64, "prefill_tokens": 512}
    )
    config.train.steps = (8, 16, 24)
    config.train.queries_per_step = 64
    config.train.rows_per_device = 16
    config.train.passes = 1.5
    config.train.learning_rate = 5e-4
    config.train.kl_beta = 1.0
    config.train.train_eos = True  # else some bases forget how to stop: docs/miniature.md
    config.train.remat = "none"  # the activations of a model this small fit anywhere
    config.evaluation = ml_collections.ConfigDict({"judge": "miniature"})
    config.pretraining = ml_collections.ConfigDict({"enabled": True, "seed": 0, "steps": 2000})
    if variant == "smoke":
        config.iterations = 2
        config.queries.evaluation_count = 8
        config.sampling.shard_queries = 8
        config.train.steps = (1, 1)
        config.train.queries_per_step = 4
        config.train.rows_per_device = 4
        config.pretraining.steps = 300
        config.pretraining.embed_dim = 64
        config.pretraining.mlp_dim = 128
        config.pretraining.n_layers = 2
        config.pretraining.batch_size = 8
        config.pretraining.train_queries = 128
    return config
