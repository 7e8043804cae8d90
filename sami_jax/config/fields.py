"""A setting as a field of a dataclass: its default, meaning and bounds, and how it is read from text."""

import ast
import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import read_text


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    path: bool = False,
    text_file: bool = False,
) -> Any:
    """A field that is a setting.

    Args:
      default: its value where none is given, or the class of a section.
      help: its meaning, for people.
      at_least: least value.
      at_most: largest value.
      above: a value that it must exceed.
      below: a value that it must stay under.
      choices: all values, where they are few.
      path: whether it names a file or folder.
      text_file: whether it may be given as `file:PATH`, and is the text of that file then.
    """
    limits = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    metadata = {"help": help, **limits, "choices": choices, "path": path, "text_file": text_file}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def describe_fields(kind: type, prefix: str = "config.") -> Iterator[tuple[str, str, str]]:
    """(name, default, meaning) of every setting, for help texts."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from describe_fields(typing.cast(type, field.type), f"{prefix}{field.name}.")
        else:
            choices = f" ({' | '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            yield f"{prefix}{field.name}", repr(plain(field.default)), field.metadata["help"] + choices


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values that `from_dict` reads back."""
    return dataclasses.asdict(config, dict_factory=lambda items: {k: plain(v) for k, v in items})


def plain(value: Any) -> Any:
    """A setting's value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


class Typed(str):
    """A value typed on the command line, still to be read as its field's type."""


def build_section(kind: type, settings: Any, prefix: str) -> Any:
    """A section of settings of this kind. Raises BadConfigError with the setting's name, its value and the remedy."""
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
            values[name] = build_section(typing.cast(type, field.type), value, f"{prefix}{name}.")
        else:
            values[name] = _check(f"config.{prefix}{name}", value, field)
    return kind(**values)


def no_local_path(text: str) -> str:
    """Returns what is wrong with a path that names a store instead of a folder or file; "" where nothing is."""
    if "://" not in text:
        return ""
    return f"{text} is no local path; mount the store (a bucket with gcsfuse or its like), and name what is there"


def _check(name: str, value: Any, field: dataclasses.Field) -> Any:
    value = _typed(name, value, field.type)
    if field.metadata["text_file"] and value.startswith(_FILE):
        value = _text_of(name, value.removeprefix(_FILE))
    limits = ("at_least", "at_most", "above", "below", "choices")
    lowest, highest, above, below, choices = (field.metadata[key] for key in limits)
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float) and not math.isfinite(item):
            raise BadConfigError(f"{name} is {value!r}; it must be finite.")
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise BadConfigError(f"{name} is a number of {len(str(abs(item)))} digits; it must fit 64 bits.")
        if isinstance(item, str) and any("\ud800" <= character <= "\udfff" for character in item):
            raise BadConfigError(f"{name} is {value!r}, which is no text: it holds half of a surrogate pair.")
    if lowest is not None and value < lowest:
        raise BadConfigError(f"{name} is {value!r}; it must be at least {lowest}.")
    if highest is not None and value > highest:
        raise BadConfigError(f"{name} is {value!r}; it must be at most {highest}.")
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


_FILE = "file:"


def _text_of(name: str, path: str) -> str:
    """A file's text. Editors end the last line of one, too: this newline is none of the text."""
    try:
        return read_text(Path(path)).removesuffix("\n")
    except BadDataError as error:
        raise BadConfigError(f"{name}: {error}") from error


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
    if isinstance(value, Typed):
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
