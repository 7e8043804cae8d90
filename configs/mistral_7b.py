"""mistral-7b on 16 TPU v5e chips (v5e:4x4), trained as in the paper.

    sami run --config=configs/mistral_7b.py --workdir=runs/mistral-7b --config.queries.train=... \\
        --config.queries.evaluation=... --config.constitutions.principles=...
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Pure FSDP: every chip has a sixteenth of the weights and of the batch. docs/benchmarks.md has what it takes."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("common.py")))["get_config"]()
    config.model = "mistralai/Mistral-7B-v0.1"
    config.compute_dtype = "bfloat16"
    config.mesh = ml_collections.ConfigDict({"fsdp": 16})
    config.train.optimizer = "adamw"
    config.train.learning_rate = 5e-7
    config.train.micro_batch_queries = 1
    config.train.remat = "full"
    return config
