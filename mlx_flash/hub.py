"""A model's folder: a local one as it is, or a Hub repository through its cache."""

import errno
import os
import re
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from .errors import FlashError, ModelNotFoundError, brief

REPO = re.compile(r"[\w.-]+/[\w.-]+")


class DownloadError(FlashError, OSError):
    """A download stopped on the way. Run it again: files that are whole are kept."""


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded if it is a Hub repository.

    Args:
        path_or_repo: A folder, or ``owner/name``.
        revision: Branch, tag or commit. Only for a repository.

    Raises:
        ModelNotFoundError: If it is neither a folder nor a repository that answers.
        DownloadError: If there is no room or no connection. Whole files are kept.
    """
    repo = str(path_or_repo)
    local = _local(path_or_repo)
    if local is not None and local.is_dir():
        return local
    if local is not None:
        raise ModelNotFoundError(f"{repo} is a file. Pass the model's folder.")
    if not REPO.fullmatch(repo):
        raise ModelNotFoundError(
            f"{repo}: no such folder. Check the path, or name a Hub repository as owner/name."
        )
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=DEFAULT_ALLOW_PATTERNS)
        )
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} is gated: accept its licence on the Hub, then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo} has no revision {revision!r}. Leave --revision out for its main branch."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo} is neither a folder here nor a repository on the Hub (a private one needs "
            "`hf auth login`)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo} is not a folder here, and the Hub cannot be reached. Check the path or the "
            "connection."
        ) from error
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"{repo} is neither a folder here nor a name that the Hub allows. Check the path, or "
            "name a Hub repository as owner/name."
        ) from error
    except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError: the Hub's Rust downloader
        if _is_full(error):
            raise DownloadError(
                f"{repo}: no space left for the download. Free some, or point HF_HOME at a "
                "larger disk, and run the same command again: whole files are kept."
            ) from error
        raise DownloadError(
            f"{repo}: the download stopped ({brief(error, most_lines=1)}). Run the same "
            "command again: whole files are kept."
        ) from error


def _local(path: str | Path) -> Path | None:
    try:
        found = Path(path).expanduser()
        return found if found.exists() else None
    except (OSError, RuntimeError):  # no path at all: too long, or ~nobody
        return None


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or os.strerror(errno.ENOSPC) in str(error)
