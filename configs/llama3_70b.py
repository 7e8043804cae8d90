"""llama3-70b on 64 TPU v5p chips (v5p:4x4x4, sold as v5p-128), trained as in the paper."""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """mistral-7b's settings, the paper's other optimizer, and twice its steps."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("mistral_7b.py")))["get_config"]()
    config.model = "meta-llama/Meta-Llama-3-70B"
    config.mesh = ml_collections.ConfigDict({"fsdp": 64})
    config.train.optimizer = "rmsprop"
    config.train.steps = (4, 8, 12)
    return config
