"""The paper's setting that every config here shares: they start from it and change what they are about.

    sami run --config=configs/common.py --workdir=runs/mine --config.model=... --config.queries.train=... \\
        --config.queries.evaluation=... --config.constitutions.principles=...

Hardware, duration, expected: those of the model that you name; configs/mistral_7b.py is an example.
Fields left out keep their defaults, which `sami run --help` lists with their meaning.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The paper's setting: three iterations of 2, 4 and 6 steps of 128 queries."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.iterations = 3
    config.train = ml_collections.ConfigDict()
    config.train.steps = (2, 4, 6)
    config.train.queries_per_step = 128
    return config
