"""The settings of a run, from an ml_collections file, a run directory's JSON and the command line."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sami_jax.config.data import ConstitutionsConfig, FiltersConfig, QueriesConfig
from sami_jax.config.evaluation import EvaluationConfig
from sami_jax.config.fields import Typed, build_section, setting
from sami_jax.config.mesh import MeshConfig
from sami_jax.config.pretraining import PretrainingConfig
from sami_jax.config.prompts import PromptsConfig
from sami_jax.config.sampling import SamplingConfig
from sami_jax.config.training import TrainConfig
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import read_json
from sami_jax.types import Dtype, Platform

PRETRAINED = "{pretrained}"  # in a path: the folder that the pretraining section makes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A SAMI run."""

    seed: int = setting(0, "decides constitutions, data order and sampling")
    model: str = setting(
        "", "base model: a Hugging Face folder, or a name on its Hub, owner/name or owner/name@revision", path=True
    )
    iterations: int = setting(3, "rounds of sampling and training", at_least=1)
    compute_dtype: Dtype = setting(
        "float32",
        "of activations and matmuls; softmax, norms, router, logits and losses are float32 in any case",
        choices=("float32", "bfloat16"),
    )
    platform: Platform = setting(
        "any",
        "what must compute: where JAX finds another platform, the command ends instead of falling back to it",
        choices=("any", "cpu", "gpu", "tpu"),
    )
    queries: QueriesConfig = setting(QueriesConfig, "")
    constitutions: ConstitutionsConfig = setting(ConstitutionsConfig, "")
    prompts: PromptsConfig = setting(PromptsConfig, "")
    sampling: SamplingConfig = setting(SamplingConfig, "")
    filters: FiltersConfig = setting(FiltersConfig, "")
    train: TrainConfig = setting(TrainConfig, "")
    evaluation: EvaluationConfig = setting(EvaluationConfig, "")
    mesh: MeshConfig = setting(MeshConfig, "")
    pretraining: PretrainingConfig = setting(PretrainingConfig, "")


def check_training(config: RunConfig, *, iterations: int) -> None:
    """Refuses settings that do not fit together, for a command that trains.

    Args:
      config: the settings.
      iterations: how many trainings of it there are.

    Raises:
      BadConfigError: the settings and the remedy.
    """
    train = config.train
    if len(train.steps) < iterations or min(train.steps, default=0) < 1:
        raise BadConfigError(
            f"config.train.steps is {train.steps}: it needs a positive number of steps for each iteration "
            f"({iterations})."
        )


def load_config(file: str | None, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """The settings of a config file, with overrides on top.

    Args:
      file: `path.py` or `path.py:argument` with a `get_config(argument)` that returns an `ml_collections.ConfigDict`,
        `path.json` as a run directory keeps it, or None for the defaults. A Python file is executed.
      overrides: dotted field name -> text, for instance {"train.learning_rate": "1e-6"}.

    Raises:
      BadConfigError: the file, field, value and remedy.
    """
    settings = _read_file(file) if file else {}
    for name, text in (overrides or {}).items():
        *sections, leaf = name.split(".")
        level = settings
        for section in sections:
            level = level.setdefault(section, {})
            if not isinstance(level, dict):
                raise BadConfigError(f"config.{name}: {section} is a value, not a section.")
        level[leaf] = Typed(text)
    return from_dict(settings)


def from_dict(settings: Mapping[str, Any]) -> RunConfig:
    """A validated `RunConfig` from nested plain values. Raises BadConfigError naming field, value and remedy."""
    return build_section(RunConfig, settings, "")


def _read_file(spec: str) -> dict[str, Any]:
    name, _, argument = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        raise BadConfigError(f"The config file {path} does not exist.")
    if path.suffix == ".json":
        try:
            return _section(read_json(path), "holds", path)
        except BadDataError as error:
            raise BadConfigError(str(error)) from error
    module_spec = importlib.util.spec_from_file_location(f"sami_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise BadConfigError(f"The config file {path} is neither a .py nor a .json file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        settings = module.get_config(argument) if argument else module.get_config()
    except Exception as error:  # a config file is the user's code and may raise anything
        raise BadConfigError(f"{path}: get_config failed ({type(error).__name__}: {error}).") from error
    return _section(settings.to_dict() if hasattr(settings, "to_dict") else settings, "get_config returned", path)


def _section(settings: Any, how: str, path: Path) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise BadConfigError(f"{path}: {how} {settings!r}; it must be a section of settings.")
    return settings
