"""llama3-70b with the paper's optimizer and learning rate and twice its steps, and the paper's experiments.

    sami run --config=configs/llama3_70b.py:diverse --workdir=runs/llama3-70b-diverse
    sami run --config=configs/llama3_70b.py:diverse_reasoning --workdir=runs/llama3-70b-diverse-reasoning

On queries, principles and prompts of your own:

    sami run --config=configs/llama3_70b.py --workdir=runs/llama3-70b --config.queries.train=... \\
        --config.queries.evaluation=... --config.constitutions.principles=...

Hardware: 64 TPU v5p chips (v5p:4x4x4, sold as v5p-128); a step takes 26.36 of a chip's 95 GiB (docs/models.md).
They are several hosts: docs/launch.md.
Duration: not measured, no TPU has run it. The matmuls of its 24 steps, 190 296 TFLOP each, take 7 minutes at 40 % of
the chips' peak; sampling of 3072 queries and the evaluations come on top.
Expected: the paper reports win rates of 54.0, 59.8 and 60.2 % against the base after iterations 1, 2 and 3, and of
63.0, 61.0 and 63.4 % on held-out principles. Not reproduced here: no machine of that size has run it, the principles
are our own, and its judge is not part of this version.
"""

import pathlib
import runpy

import ml_collections


def get_config(experiment: str = "") -> ml_collections.ConfigDict:
    """mistral-7b's settings, the paper's other optimizer, and twice its steps."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("mistral_7b.py")))["get_config"](experiment)
    config.model = "meta-llama/Meta-Llama-3-70B"
    config.mesh = ml_collections.ConfigDict({"fsdp": 64})
    config.train.optimizer = "rmsprop"
    config.train.steps = (4, 8, 12)
    return config
