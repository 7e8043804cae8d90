"""Where a model comes from: a folder, or a repository of the Hugging Face Hub, brought to a folder of its cache."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from sami_jax.errors import BadDataError, FetchFailedError, SamiError
from sami_jax.huggingface.folder import SETTINGS_FILES, WEIGHT_FILES, find_weights, read_config, read_weight_map


def fetch_model(model: str) -> Path:
    """The folder of a model.

    Of a repository only what is read is downloaded, its config.json first: a model that cannot be run is refused before
    its weights come. With HF_HUB_OFFLINE=1, or for a commit that the cache has complete, the Hub is not asked.

    Args:
      model: a folder, or a name on the Hub: `owner/name`, or `owner/name@revision` for a branch, tag or commit.

    Raises:
      BadDataError: it is neither, it may not be read, or it holds no model this version can run.
      FetchFailedError: the Hub cannot be reached, or the download broke off.
    """
    folder = fetch_settings(model)
    if folder == Path(model):
        return folder
    read_config(folder)
    name = model.partition("@")[0]
    _download(model, name, folder.name, WEIGHT_FILES)
    _download(model, name, folder.name, tuple(read_weight_map(folder)))
    find_weights(folder)
    return folder


def fetch_settings(model: str) -> Path:
    """The folder of a model, of which a repository's config and tokenizer are there; see `fetch_model`."""
    name, _, revision = model.partition("@")
    if os.path.exists(model) or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        return Path(model)
    return _download(model, name, revision or None, SETTINGS_FILES)


def _download(model: str, name: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # the transport has its own kinds, which differ by version
        raise _explained(error, model) from error


def model_name(folder: Path) -> str:
    """What to call a model: its folder's name, or `owner/name@commit` where the folder is one of the Hub's cache."""
    folder = folder.absolute()
    cached = re.search(r"/models--([^/]+)/snapshots/([^/]+)$", folder.as_posix())
    return f"{cached[1].replace('--', '/')}@{cached[2]}" if cached else folder.name


def _explained(error: Exception, model: str) -> SamiError:
    """Returns the error that says what a person can do about a failed download."""
    from huggingface_hub import errors

    name, _, revision = model.partition("@")
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the Hub was not asked, or did not answer
    if isinstance(error, errors.HFValidationError):
        return BadDataError(
            f"The model {model!r} is neither a folder nor a name on the Hugging Face Hub; give a folder, owner/name or "
            "owner/name@revision."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return BadDataError(
            f"There is no folder {model}, and the Hugging Face cache does not hold {model} complete; give a folder, or "
            "unset HF_HUB_OFFLINE to download it."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BadDataError(f"{name} on the Hugging Face Hub has no revision {revision}; name a branch, tag or commit.")
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return BadDataError(
            f"There is no folder {model}, and the Hugging Face Hub has no repository {name} that you may read; correct "
            "the name, or run `hf auth login` if it is private."
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return BadDataError(
            f"The Hugging Face Hub does not let you read {name}; accept its terms on its page there, and run "
            "`hf auth login` with a token that may read it."
        )
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return FetchFailedError(
        f"There is no folder {model}, and {name} could not be fetched from the Hugging Face Hub ({reason}); try again, "
        "or give a folder."
    )
