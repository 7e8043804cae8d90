"""Settings of a run: ml_collections files and command-line overrides become frozen, validated dataclasses."""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import read_json
from sami_jax.types import Boundary, Dtype, Normalize, Remat

PRETRAINED = "{pretrained}"  # in a path: the folder that the pretraining section makes


def _setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
) -> Any:
    limits = {"at_least": at_least, "above": above, "below": below}
    metadata = {"help": help, **limits, "choices": choices, "path": path}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """The miniature's base model, made from scratch by `sami pretrain`."""

    enabled: bool = _setting(False, "make the base model, principles and queries of a miniature world")
    cache_dir: str = _setting(
        "runs/pretrained", "folder that keeps finished bases, each under the hash of what made it", path=True
    )
    seed: int = _setting(0, "decides the world's habits, held-out principles, corpus and initial weights")
    vocab_size: int = _setting(1024, "tokens of the byte-level BPE; the embedding has as many rows", at_least=512)
    embed_dim: int = _setting(128, "D, width of the model", at_least=8)
    n_layers: int = _setting(3, "L, layers", at_least=1)
    n_heads: int = _setting(4, "N, attention heads", at_least=1)
    n_kv_heads: int = _setting(2, "K, key/value heads", at_least=1)
    mlp_dim: int = _setting(384, "F, width of the SwiGLU", at_least=8)
    max_positions: int = _setting(8192, "longest sequence in tokens", at_least=64)
    steps: int = _setting(2000, "optimizer steps", at_least=1)
    batch_size: int = _setting(16, "documents per step", at_least=1)
    matrix_learning_rate: float = _setting(0.02, "peak learning rate of Muon, on the layers' matrices", above=0)
    other_learning_rate: float = _setting(3e-3, "peak learning rate of AdamW, on the rest", above=0)
    warmup_share: float = _setting(
        0.05, "share of the steps in which the learning rate rises; then linear to 0", at_least=0
    )
    prompt_weight: float = _setting(0.1, "weight of prompt tokens in the loss; response tokens have 1", at_least=0)
    train_queries: int = _setting(8192, "posts for SAMI's training", at_least=2)
    validation_queries: int = _setting(250, "posts to choose settings on", at_least=1)
    test_queries: int = _setting(250, "posts to report results on, about people training never mentions", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueriesConfig:
    """Where queries come from: JSON lines of example_id, text, and optionally facts for a judge."""

    train: str = _setting(
        "", "file of training queries; its alternating halves serve odd and even iterations", path=True
    )
    evaluation: str = _setting("", "file of evaluation queries", path=True)
    evaluation_count: int = _setting(250, "evaluate on the first so many queries", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstitutionsConfig:
    """How the contrasting constitutions of a query are drawn."""

    principles: str = _setting("", "JSON file of principles (name, definition, antithesis, held_out)", path=True)
    count: int = _setting(2, "C, contrasting constitutions per query", at_least=2)
    principles_per_query: int = _setting(2, "principles in each constitution", at_least=1)
    pairing: str = _setting(
        "symmetric",
        "symmetric: any sign patterns that differ; authors: the first has all definitions",
        choices=("symmetric", "authors"),
    )
    reshuffle: bool = _setting(True, "shuffle the principles' order again in the training prompt")

    def __post_init__(self) -> None:
        if self.principles_per_query > 16:  # each query's draw goes through all sign patterns, 65536 of them
            raise BadConfigError(
                f"config.constitutions.principles_per_query is {self.principles_per_query}; it must be at most 16."
            )
        if self.count > 2**self.principles_per_query:
            raise BadConfigError(
                f"config.constitutions.count is {self.count}, but {self.principles_per_query} principles per query "
                f"have {2**self.principles_per_query} sign patterns; lower it, or raise "
                "config.constitutions.principles_per_query."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Templates with the places {constitution} and {query}."""

    generation: str = _setting("{constitution}\n\n{query}\n\n", "prompt the model samples from")
    training: str = _setting("{constitution}\n\n{query}\n\n", "prompt it is trained and scored on")
    boundary: Boundary = _setting(
        "exact",
        "where a response begins; exact: as it was sampled, so both prompts must end in the same white space; authors: "
        "the training prompt and the response are tokenised as one text, without a space between them",
        choices=("exact", "authors"),
    )

    def __post_init__(self) -> None:
        templates = {"generation": self.generation, "training": self.training}
        for name, template in templates.items():
            for place in _PLACES:
                if template.count(place) != 1:
                    raise BadConfigError(f"config.prompts.{name} must contain {place} exactly once.")
        generation, training = map(_ending, templates.values())
        if self.boundary == "exact" and generation != training:
            raise BadConfigError(
                f"config.prompts.generation ends in {generation!r}, but config.prompts.training in {training!r}: the "
                "model would be trained on a boundary that it never sampled. End both alike, or set "
                "config.prompts.boundary=authors."
            )


_PLACES = ("{constitution}", "{query}")


def _ending(template: str) -> str:
    """The template's last white space, with the place before it if one stands there, since its text may end in more."""
    text = template.rstrip()
    place = next((place for place in _PLACES if text.endswith(place)), "")
    return place + template[len(text) :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Greedy sampling of responses."""

    max_new_tokens: int = _setting(350, "longest response in tokens", at_least=1)
    stop: tuple[str, ...] = _setting(("Human:", "###"), "texts that end a response; what follows is cut")
    chunk_queries: int = _setting(64, "queries sampled together, and lost together when killed", at_least=1)
    round_prompt_tokens_to: int = _setting(
        32, "pad prompts to a multiple of this (long ones coarser): few shapes compile", at_least=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiltersConfig:
    """Which sampled queries are kept; every drop is counted under its reason."""

    placeholders: tuple[str, ...] = _setting(("[", "]", "Response"), "texts that mark a malformed response")
    sentence_ends: str = _setting(".!?", "characters a finished response may end with")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """SAMI training from the base model."""

    steps: tuple[int, ...] = _setting((2, 4, 6), "optimizer steps of iteration 1, 2, ...; `sami train` uses the first")
    queries_per_step: int = _setting(128, "queries in one optimizer step", at_least=1)
    micro_batch_queries: int = _setting(
        1, "queries whose C x C sequences are in memory at once, for each device that shares the batch", at_least=1
    )
    passes: float = _setting(1.0, "how often a kept query is used at most, on average", at_least=1.0)
    optimizer: str = _setting("adamw", "with torch's defaults", choices=("adamw", "rmsprop"))
    learning_rate: float = _setting(5e-7, "constant, no warm-up", above=0)
    adam_b1: float = _setting(0.9, "adamw: decay of the first moment", at_least=0, below=1)
    adam_b2: float = _setting(0.999, "adamw: decay of the second moment", at_least=0, below=1)
    rmsprop_decay: float = _setting(0.99, "rmsprop: decay of the squared gradient (torch's alpha)", at_least=0, below=1)
    eps: float = _setting(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = _setting(0.01, "adamw: decoupled weight decay", at_least=0)
    normalize: Normalize = _setting(
        "mean", "a response's log-prob: mean over its tokens (authors' code) or sum (paper)", choices=("mean", "sum")
    )
    over_responses_weight: float = _setting(0.5, "weight of the softmax over responses", at_least=0)
    over_constitutions_weight: float = _setting(0.5, "weight of the softmax over constitutions", at_least=0)
    kl_beta: float = _setting(0.0, "weight of KL(policy || base), mean over response tokens and cells", at_least=0)
    train_eos: bool = _setting(False, "append the end-of-sequence token to the responses")
    checkpoint_every: int = _setting(10, "optimizer steps between checkpoints", at_least=1)
    keep_checkpoints: bool = _setting(False, "keep them when the exported model was written and read back")
    round_tokens_to: int = _setting(
        32, "pad sequences to a multiple of this (long ones coarser): few shapes compile", at_least=1
    )
    weights: str = _setting(
        "float32",
        "how weights and optimizer state are kept; bfloat16 takes half the memory, but rounded to the nearest (the "
        "authors' mode) most weights never move",
        choices=("float32", "bfloat16_stochastic", "bfloat16"),
    )
    remat: Remat = _setting(
        "full",
        "what the backward pass recomputes: none of a layer; all but the dots, its matmuls; or the full layer, in the "
        "least memory",
        choices=("none", "dots", "full"),
    )

    def __post_init__(self) -> None:
        if self.over_responses_weight + self.over_constitutions_weight <= 0:
            raise BadConfigError("config.train.over_responses_weight and over_constitutions_weight are both 0.")

    @property
    def weights_dtype(self) -> Dtype:
        """The format in which weights, gradients and optimizer state are kept."""
        return "float32" if self.weights == "float32" else "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured of the base and of every iteration."""

    judge: str = _setting("none", "none: mutual information and lengths only", choices=("none", "miniature"))
    held_out: bool = _setting(True, "also evaluate on the held-out principles, where there are enough")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices: data x fsdp x expert of them share the batch, fsdp x expert x tensor of them the weights."""

    data: int = _setting(1, "copies of the weights", at_least=1)
    fsdp: int = _setting(1, "devices that share the weights' embed axis and the batch", at_least=1)
    expert: int = _setting(1, "devices that share the experts, else the embed axis, and the batch", at_least=1)
    tensor: int = _setting(1, "devices that share heads, mlp and vocabulary", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A SAMI run."""

    seed: int = _setting(0, "decides constitutions, data order and sampling")
    model: str = _setting(
        "", "base model: a Hugging Face folder, or a name on its Hub, owner/name or owner/name@revision", path=True
    )
    iterations: int = _setting(3, "rounds of sampling and training", at_least=1)
    compute_dtype: Dtype = _setting(
        "float32",
        "of activations and matmuls; softmax, norms, router, logits and losses are float32 in any case",
        choices=("float32", "bfloat16"),
    )
    queries: QueriesConfig = _setting(QueriesConfig, "")
    constitutions: ConstitutionsConfig = _setting(ConstitutionsConfig, "")
    prompts: PromptsConfig = _setting(PromptsConfig, "")
    sampling: SamplingConfig = _setting(SamplingConfig, "")
    filters: FiltersConfig = _setting(FiltersConfig, "")
    train: TrainConfig = _setting(TrainConfig, "")
    evaluation: EvaluationConfig = _setting(EvaluationConfig, "")
    mesh: MeshConfig = _setting(MeshConfig, "")
    pretraining: PretrainingConfig = _setting(PretrainingConfig, "")


def check_training(config: RunConfig, *, iterations: int) -> None:
    """Refuses settings that do not fit together, for a command that trains.

    Args:
      config: the settings.
      iterations: how many trainings of it there are.

    Raises:
      BadConfigError: the settings and the remedy.
    """
    train, mesh = config.train, config.mesh
    if len(train.steps) < iterations or min(train.steps, default=0) < 1:
        raise BadConfigError(
            f"config.train.steps is {train.steps}: it needs a positive number of steps for each iteration "
            f"({iterations})."
        )
    at_once = train.micro_batch_queries * mesh.data * mesh.fsdp * mesh.expert
    if train.queries_per_step % at_once:
        raise BadConfigError(
            f"config.train.queries_per_step is {train.queries_per_step}, which is no multiple of "
            f"train.micro_batch_queries x mesh.data x mesh.fsdp x mesh.expert = {at_once}."
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
        level[leaf] = _Text(text)
    return from_dict(settings)


def from_dict(settings: Mapping[str, Any]) -> RunConfig:
    """A validated `RunConfig` from nested plain values. Raises BadConfigError naming field, value and remedy."""
    return _build(RunConfig, settings, "")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values that `from_dict` reads back."""
    return dataclasses.asdict(config, dict_factory=lambda items: {k: _plain(v) for k, v in items})


def describe_fields(kind: type = RunConfig, prefix: str = "config.") -> Iterator[tuple[str, str, str]]:
    """(name, default, meaning) of every setting, for help texts."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from describe_fields(typing.cast(type, field.type), f"{prefix}{field.name}.")
        else:
            choices = f" ({' | '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            yield f"{prefix}{field.name}", repr(_plain(field.default)), field.metadata["help"] + choices


class _Text(str):
    """A value typed on the command line, still to be read as its field's type."""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


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


def _build(kind: type, settings: Any, prefix: str) -> Any:
    if not isinstance(settings, Mapping):
        name = f"config.{prefix}".rstrip(".")
        raise BadConfigError(f"{name} is a section of settings, not a value: {settings!r}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for name, value in settings.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            raise BadConfigError(
                f"Unknown setting config.{prefix}{name}; "
                + (f"did you mean config.{prefix}{near[0]}?" if near else f"there are: {', '.join(fields)}.")
            )
        field = fields[name]
        if dataclasses.is_dataclass(field.type):
            values[name] = _build(typing.cast(type, field.type), value, f"{prefix}{name}.")
        else:
            values[name] = _check(f"config.{prefix}{name}", value, field)
    return kind(**values)


def no_local_path(text: str) -> str:
    """What is wrong with a path that names a store instead of a folder or file; "" where nothing is."""
    if "://" not in text:
        return ""
    return f"{text} is no local path; mount the store (a bucket with gcsfuse or its like), and name what is there"


def _check(name: str, value: Any, field: dataclasses.Field) -> Any:
    value = _typed(name, value, field.type)
    lowest, above, below, choices = (field.metadata[key] for key in ("at_least", "above", "below", "choices"))
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float) and not math.isfinite(item):
            raise BadConfigError(f"{name} is {value!r}; it must be finite.")
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise BadConfigError(f"{name} is a number of {len(str(abs(item)))} digits; it must fit 64 bits.")
        if isinstance(item, str) and any("\ud800" <= character <= "\udfff" for character in item):
            raise BadConfigError(f"{name} is {value!r}, which is no text: it holds half of a surrogate pair.")
    if lowest is not None and value < lowest:
        raise BadConfigError(f"{name} is {value!r}; it must be at least {lowest}.")
    if above is not None and value <= above:
        raise BadConfigError(f"{name} is {value!r}; it must be above {above}.")
    if below is not None and value >= below:
        raise BadConfigError(f"{name} is {value!r}; it must be below {below}.")
    if isinstance(value, tuple) and "" in value:  # it stands in every text
        raise BadConfigError(f"{name} holds an empty text; remove it.")
    if field.metadata["path"] and (problem := no_local_path(value)):
        raise BadConfigError(f"{name}: {problem}.")
    if choices and value not in choices:
        raise BadConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
    return value


_PARSERS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
    str: ("text", str),
    tuple[int, ...]: ("a list of whole numbers such as (2, 4, 6)", ast.literal_eval),
    tuple[str, ...]: ("a list of texts such as ('###',)", ast.literal_eval),
}


def _typed(name: str, value: Any, kind: Any) -> Any:
    kind = str if typing.get_origin(kind) is Literal else kind  # its values are the setting's choices
    what, parse = _PARSERS[kind]
    problem = BadConfigError(f"{name} is {value!r}; it must be {what}.")
    if isinstance(value, _Text):
        try:
            value = parse(str(value))
        except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise problem from None
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):  # `_check` says that it is too long
            return float(value)
    origin = typing.get_origin(kind)
    if origin is tuple:
        value = tuple(value) if isinstance(value, list) else value
        if not isinstance(value, tuple) or any(type(item) is not typing.get_args(kind)[0] for item in value):
            raise problem
        return value
    if type(value) is not kind:
        raise problem
    return value
