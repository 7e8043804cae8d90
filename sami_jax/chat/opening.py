"""Opens the chat that a config names, with the log of its answers."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from sami_jax.chat.answer_log import open_log
from sami_jax.chat.answers import Answers
from sami_jax.chat.client import Server
from sami_jax.chat.costs import Prices
from sami_jax.chat.local import LocalModel
from sami_jax.chat.questions import Chat
from sami_jax.chat.replay import Replay
from sami_jax.config.chat import REPLAY, ChatConfig
from sami_jax.config.mesh import MeshConfig
from sami_jax.errors import BadConfigError
from sami_jax.processes import agreed, is_writer
from sami_jax.safe_point import SafePoint
from sami_jax.types import Dtype


@agreed()
def make_chat(
    config: ChatConfig, given: Path | None, *, mesh: MeshConfig, compute_dtype: Dtype, say: Callable[[str], None]
) -> Chat:
    """Whoever a config names. Nothing is asked, and no weights are read.

    Args:
      config: the settings.
      given: the folder of a model on these devices, or the file of recorded answers; None for a server.
      mesh: the devices of such a model.
      compute_dtype: of its activations and matmuls.
      say: takes sentences for the person who watches.

    Raises:
      BadConfigError: nobody is named, or a server's key is missing.
      BadDataError: folder or file cannot be used.
    """
    if config.chat_model:
        return Server(config, say=say)
    if given is None:
        raise BadConfigError("Nobody is named who answers: give model, or base_url and chat_model.")
    if config.model.startswith(REPLAY):
        return Replay(given)
    return LocalModel(given, config, mesh=mesh, compute_dtype=compute_dtype)


@contextlib.contextmanager
def open_answers(
    config: ChatConfig, chat: Chat, log: Path, *, safe_point: SafePoint, say: Callable[[str], None]
) -> Iterator[Answers]:
    """A chat with the log of its answers, which process 0 has open.

    Args:
      config: prices and budget.
      chat: of `make_chat`.
      log: made if missing.
      safe_point: asked now and then while questions are on their way.
      say: takes sentences for the person who watches.

    Raises:
      SamiError: as `answer_log.open_log`.
    """
    with contextlib.ExitStack() as stack:
        with agreed():
            answers_log = stack.enter_context(open_log(log)) if is_writer() else None
        prices = Prices.of(config)
        yield Answers(
            chat, answers_log, prices=prices, max_cost_usd=config.max_cost_usd, safe_point=safe_point, say=say
        )
