"""mixtral-8x7b on 16 TPU v5p chips (v5p:2x2x4, sold as v5p-32), trained as in the paper."""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """mistral-7b's settings, the paper's other optimizer."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("mistral_7b.py")))["get_config"]()
    config.model = "mistralai/Mixtral-8x7B-v0.1"
    config.mesh = ml_collections.ConfigDict({"fsdp": 16})
    config.train.optimizer = "rmsprop"
    return config
