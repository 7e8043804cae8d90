"""Compiled programs are kept between processes, so that a command that was run before begins at once."""

import hashlib
import os
import platform
from pathlib import Path

import jax

_WORTH_KEEPING_S = 0.3  # of compilation


def keep_compiled() -> None:
    """Has JAX keep compiled programs in the user's cache folder, unless JAX was told where, or not to.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing. A folder that
    cannot be written costs a warning of JAX and nothing else.
    """
    if getattr(jax.config, "jax_compilation_cache_dir", None) or (folder := _folder()) is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING_S)


def _folder() -> Path | None:
    """One for each kind of processor, since a home may be shared by hosts that do not run each other's code."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return None
    about = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        about += platform.processor()
    return cache / "sami_jax" / "compiled" / hashlib.blake2b(about.encode(), digest_size=8).hexdigest()
