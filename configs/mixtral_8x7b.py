"""mixtral-8x7b with the paper's steps, optimizer and learning rate, and the paper's experiments.

    sami run --config=configs/mixtral_8x7b.py:summaries --workdir=runs/mixtral-8x7b-summaries

On queries, principles and prompts of your own:

    sami run --config=configs/mixtral_8x7b.py --workdir=runs/mixtral-8x7b --config.queries.train=... \\
        --config.queries.evaluation=... --config.constitutions.principles=...

Hardware: 16 TPU v5p chips (v5p:2x2x4, sold as v5p-32); a step takes 54.70 of a chip's 95 GiB (docs/models.md).
They are several hosts: docs/launch.md.
Duration: not measured, no TPU has run it. The matmuls of its 12 steps, 37 590 TFLOP each, take 3 minutes at 40 % of the
chips' peak; sampling of 1536 queries and the evaluations come on top.
Expected: the paper reports win rates of 56.8, 66.0 and 62.0 % against the base after iterations 1, 2 and 3 (TL;DR,
principles of its weak writer). Not reproduced here: no machine of that size has run it, the principles are our own,
and its judge is not part of this version.
"""

import pathlib
import runpy

import ml_collections


def get_config(experiment: str = "") -> ml_collections.ConfigDict:
    """mistral-7b's settings, the paper's other optimizer."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("mistral_7b.py")))["get_config"](experiment)
    config.model = "mistralai/Mixtral-8x7B-v0.1"
    config.mesh = ml_collections.ConfigDict({"fsdp": 16})
    config.train.optimizer = "rmsprop"
    return config
