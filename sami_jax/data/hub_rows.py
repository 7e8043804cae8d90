"""Rows of the paper's data sets on the Hugging Face Hub, at one commit, through the `datasets` library."""

import threading
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import NamedTuple, TypeVar

from sami_jax.data.rows import Row
from sami_jax.errors import BadDataError, FetchFailedError, SamiError

T = TypeVar("T")
_PATIENCE_S = 12  # for the Hub to say what the revision is


class HubFiles(NamedTuple):
    """Where on the Hub a data set's training rows are.

    Attributes:
      repository: of data sets, owner/name.
      revision: a branch.
      files: those that are read, with a wildcard.
    """

    repository: str
    revision: str
    files: str


DATASETS = {
    # The repository's main branch is a script, which `datasets` no longer runs: the Hub's own conversion instead.
    "tldr": HubFiles("openai/summarize_from_feedback", "refs/convert/parquet", "comparisons/train/*.parquet"),
    "hh_helpful": HubFiles("Anthropic/hh-rlhf", "main", "helpful-base/train.jsonl.gz"),
    "hh_harmless": HubFiles("Anthropic/hh-rlhf", "main", "harmless-base/train.jsonl.gz"),
}


def hub_rows(name: str, columns: Set[str]) -> tuple[Iterator[Row], str]:
    """The rows of one of DATASETS, and the commit that they are of. They stay in the cache of `datasets`.

    Args:
      name: tldr, hh_helpful or hh_harmless.
      columns: the only ones that are wanted, as far as they are there.

    Raises:
      BadDataError: the Hub does not give the data set out, or holds something else under its name.
      FetchFailedError: the Hub cannot be reached, or the download broke off.
    """
    there = DATASETS[name]
    try:
        commit = _within(_PATIENCE_S, lambda: _commit(there))
        import datasets

        found = datasets.load_dataset(there.repository, data_files={"train": there.files}, revision=commit)["train"]
    except SamiError:
        raise
    except Exception as error:  # each of the libraries below has its own kinds
        raise _explained(error, name) from error
    wanted = found.select_columns([column for column in found.column_names if column in columns])
    rows = enumerate(wanted.to_iterable_dataset(), start=1)
    return ((f"{there.repository}, row {number}", row) for number, row in rows), commit


def _commit(there: HubFiles) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(there.repository, revision=there.revision, timeout=_PATIENCE_S / 2).sha)


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` gives, which may wait for a network that swallows everything. Raises TimeoutError after `seconds`."""
    answer: list[T] = []
    failure: list[Exception] = []

    def asking() -> None:
        try:
            answer.append(ask())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer[0]


def _explained(error: Exception, name: str) -> SamiError:
    """Returns the error that says what a person can do about a failed download."""
    from huggingface_hub import constants, errors

    there = DATASETS[name]
    local = f"give a copy of your own as {name}:PATH (docs/data.md), a folder or file with the rows of {there.files}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        folder = Path(constants.HF_HUB_CACHE, f"datasets--{there.repository.replace('/', '--')}", "snapshots")
        if copies := sorted(folder.glob(f"*/{there.files}")):
            local = f"give the copy in the cache as {name}:{copies[-1].parent}"
        return BadDataError(f"HF_HUB_OFFLINE forbids to ask the Hugging Face Hub for {name}; unset it, or {local}.")
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        return BadDataError(f"The Hugging Face Hub does not give out {there.repository} ({reason}); {local}.")
    return FetchFailedError(
        f"{there.repository} could not be fetched from the Hugging Face Hub ({reason}); try again, or {local}."
    )
