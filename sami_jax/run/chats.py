"""Whom a chat's settings name, as what a stage takes: a model folder, fetched where it is a name, or a file."""

from pathlib import Path

from sami_jax.chat.opening import make_chat
from sami_jax.config.chat import REPLAY, ChatConfig
from sami_jax.config.run import RunConfig
from sami_jax.huggingface.hub import fetch_model
from sami_jax.processes import from_writer
from sami_jax.stages.stage import Source, file_source, model_source


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


def check_chat(chat: ChatConfig, config: RunConfig) -> None:
    """Refuses somebody who cannot be asked, before anything else is made. Nothing is asked, no weights are read.

    Args:
      chat: who is to be asked.
      config: the run's; its mesh and dtype are those of a model on these devices.

    Raises:
      BadConfigError: the key of its server is missing.
      BadDataError: its model or record cannot be used.
      FetchFailedError: its model could not be downloaded.
    """
    make_chat(chat, given_to(chat), mesh=config.mesh, compute_dtype=config.compute_dtype, say=lambda sentence: None)
