"""The world the tests run in, fixed before any JAX backend starts: eight CPU devices, strict dtypes, no network."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start, as well as for this one
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # in this process; commands in others share what they compile
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit it
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import jax

# A pytest plugin may have imported JAX before us, and then the variable above comes too late for this process.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A minute or more each, the longest first: handed out before the others, so that no worker is left alone with one.
SLOW_FILES = [
    "test_run_directory.py",
    "test_run_in_processes.py",
    "test_multiprocess.py",
    "test_process_group.py",
    "test_sharding.py",
    "test_huggingface.py",
    "test_hub.py",
]


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
