"""Where a run's principles come from where its config names none: a writer, asked as the first stage."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sami_jax.config.run import RunConfig
from sami_jax.run.chats import given_source
from sami_jax.safe_point import SafePoint
from sami_jax.stages.stage import complete
from sami_jax.stages.write_principles import PRINCIPLES, WritePrinciples

WRITTEN = "principles"  # the folder of a run that keeps them


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
