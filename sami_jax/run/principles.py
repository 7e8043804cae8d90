"""Where a run's principles come from where its config names none: a writer, asked as the first stage."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sami_jax.chat.opening import make_chat
from sami_jax.config.chat import REPLAY, ChatConfig
from sami_jax.config.run import RunConfig
from sami_jax.huggingface.hub import fetch_model
from sami_jax.processes import from_writer
from sami_jax.safe_point import SafePoint
from sami_jax.stages.stage import Source, complete, file_source, model_source
from sami_jax.stages.write_principles import PRINCIPLES, WritePrinciples

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
