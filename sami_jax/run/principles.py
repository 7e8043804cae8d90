"""Where a run's principles come from where its config names none: a writer, asked as the first stage."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sami_jax.chat.opening import make_chat
from sami_jax.chat.principle_writer import Written
from sami_jax.config.chat import REPLAY, ChatConfig
from sami_jax.config.run import RunConfig
from sami_jax.errors import BadConfigError, BadDataError
from sami_jax.files import read_text, write_text
from sami_jax.huggingface.hub import fetch_model
from sami_jax.outputs import check_file, is_stream
from sami_jax.processes import from_writer
from sami_jax.safe_point import SafePoint, stop_on_signal
from sami_jax.sharding import use_platform
from sami_jax.stage_folder import DONE, PLAN, locked
from sami_jax.stages.stage import Source, complete, file_source, model_source
from sami_jax.stages.write_principles import PRINCIPLES, PROVENANCE, WritePrinciples, read_written

WRITTEN = "principles"  # the folder of a run that keeps them


def given_to(chat: ChatConfig) -> Path | None:
    """The folder of a chat's model, fetched where it is a name, or its file of recorded answers; None for a server.

    Raises:
      BadDataError: there is none.
      FetchFailedError: it could not be downloaded.
    """
    if not chat.model:
        return None
    if chat.model.startswith(REPLAY):
        return Path(chat.model.removeprefix(REPLAY))
    return Path(from_writer(lambda: str(fetch_model(chat.model))))


def given_source(chat: ChatConfig) -> Source | None:
    """`given_to`, by its contents."""
    given = given_to(chat)
    if given is None:
        return None
    return file_source(given) if chat.model.startswith(REPLAY) else model_source(given)


def check_writer(config: RunConfig) -> None:
    """Refuses a writer that cannot be asked, before anything else is made. Nothing is asked, no weights are read.

    Raises:
      BadConfigError: the key of its server is missing.
      BadDataError: its model or record cannot be used.
      FetchFailedError: its model could not be downloaded.
    """
    writer = config.constitutions.writer
    make_chat(writer, given_to(writer), mesh=config.mesh, compute_dtype=config.compute_dtype, say=lambda sentence: None)


def with_principles(
    config: RunConfig, folder: Path, *, begun: bool, safe_point: SafePoint, say: Callable[[str], None]
) -> RunConfig:
    """The config, its principles a file in a folder, which is written first if it is missing.

    Args:
      config: the settings.
      folder: that keeps the principles; see `stages.write_principles`.
      begun: other stages of the run have read them: they stand, and their writer is not looked at.
      safe_point: asked now and then.
      say: takes sentences for the person who watches.

    Raises:
      BadConfigError: the folder was written by another writer, or about something else.
      SamiError: what the stage raises.
    """
    constitutions = config.constitutions
    if not constitutions.to_be_written:
        if constitutions.writer.enabled:
            say(f"principles are those of {constitutions.place}: config.constitutions.writer has nothing to write")
        return config
    if not begun:
        complete(WritePrinciples.of(config, given=given_source(constitutions.writer)), folder, safe_point=safe_point)
        say(f"principles: {folder / PRINCIPLES}")
    written = dataclasses.replace(constitutions, principles=str(folder / PRINCIPLES))
    return dataclasses.replace(config, constitutions=written)


def write_principles_file(config: RunConfig, *, out: Path) -> Written:
    """Has principles written into a file.

    `out` with ".writer" behind its name keeps the answers, from which an interrupted command goes on; a finished one is
    not done again. Its provenance is written beside it.

    Args:
      config: the settings; `constitutions.writer` says who writes, and about what.
      out: JSON, as `data.principles.read_principles` reads it.

    Raises:
      BadConfigError: `out` was begun with another writer or about something else, or nobody can be asked.
      BadDataError: `out` is another file, or the writer writes nothing that can be used.
      SaveFailedError: the disk is full or not writable.
      UnavailableError: the server does not answer now.
    """
    if not config.constitutions.writer.enabled:
        raise BadConfigError(
            "Nobody is named who writes the principles: give --model=DIR, or --base_url=... and --chat_model=..., and "
            "say by --about what they are for."
        )
    if is_stream(out):
        raise BadDataError(f"{out} is no file; name one, beside which the writer's answers are kept.")
    folder, provenance = out.with_name(f"{out.name}.writer"), out.with_suffix(".provenance.json")
    check_file(out)
    check_file(provenance)
    begun = any((folder / name).exists() for name in (PLAN, DONE))
    for path in (out, provenance):
        if path.exists() and not begun:
            raise BadDataError(f"{path} already exists, and no such command made it; choose another, or delete it.")
    use_platform(config.platform)
    given = given_source(config.constitutions.writer)
    with locked(folder), stop_on_signal() as safe_point:
        complete(WritePrinciples.of(config, given=given), folder, safe_point=safe_point)
    for path, name in ((provenance, PROVENANCE), (out, PRINCIPLES)):
        text = read_text(folder / name)
        if path.exists() and read_text(path) != text:
            raise BadDataError(f"{path} was changed after it was made; choose another --out, or delete it.")
        write_text(path, text)
    return read_written(folder)
