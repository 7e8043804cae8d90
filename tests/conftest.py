"""The world the tests run in, fixed before any JAX backend starts: eight CPU devices, strict dtypes, no network."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start, as well as for this one
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import jax

# A pytest plugin may have imported JAX before us, and then the variable above comes too late for this process.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
