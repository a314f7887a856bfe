"""Pushing an export to the Hugging Face hub, or to another server with its API (HF_ENDPOINT).

The user logs in by the hub's own means (`hf auth login`, or the variable HF_TOKEN); nothing here reads a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import mlra_scale
from mlra_scale.console import InputError
from mlra_scale.data.hub import unreachable_hub

_EXPORTED = ("*.safetensors", "*.safetensors.index.json", "*.py", "tokenizer*.json", "vocab.json", "merges.txt")
"""Files that exports may have: those of an earlier export, which the new one lacks, are removed from the repository."""
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class HubError(InputError):
    """The hub cannot be used; the message says why, and what to do."""


def check_access(repository: str) -> None:
    """Makes sure that the hub answers and knows the user, before anything is exported.

    Raises:
        HubError: The name is none of a repository, the hub does not answer, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    what = f"{repository} cannot be pushed to"
    if silent := unreachable_hub():
        raise HubError(f"{what}: {silent} does not answer")
    with _errors(what, _LOGIN):
        validate_repo_id(repository)
        HfApi().whoami()


def push(folder: Path, repository: str, is_private: bool, say: Callable[[str], None]) -> str:
    """Pushes an export in one commit, and compares the files of the commit with the folder's.

    The repository is made if there is none (`is_private` matters then only). Other files in it stay as they are.

    Returns:
        The address of the repository.

    Raises:
        HubError: Something cannot be pushed, or the hub holds other files than the folder.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, files = HfApi(), sorted(file.name for file in folder.iterdir() if file.is_file())
    with _errors(f"{folder} was not pushed to {repository}", f"push it again with `hf upload {repository} {folder}`"):
        url = str(api.create_repo(repository, private=is_private or None, exist_ok=True))
        stale = [
            name
            for name in api.list_repo_files(repository)
            if name not in files and any(fnmatch(name, pattern) for pattern in _EXPORTED)
        ]
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
        removed = [CommitOperationDelete(path_in_repo=name) for name in stale]
        message = f"Exported with mlra-scale {mlra_scale.__version__}"
        commit = api.create_commit(repository, [*removed, *added], commit_message=message)
        found = api.model_info(repository, revision=commit.oid, files_metadata=True).siblings or []
    there = {entry.rfilename: entry.blob_id if entry.lfs is None else entry.lfs.sha256 for entry in found}
    if other := [name for name in files if there.get(name) not in _checksums(folder / name)]:
        raise HubError(f"{url} holds other content than {folder}: {', '.join(other)}; push again")
    say(f"pushed {len(files)} files to {url}" + f", and removed {', '.join(stale)} there" * bool(stale))
    return url


def _checksums(file: Path) -> tuple[str, str]:
    """Returns what the hub has of a file: SHA-256 of a large one, of others git's checksum of a blob."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as opened:
        while part := opened.read(1 << 24):
            sha256.update(part)
            blob.update(part)
    return sha256.hexdigest(), blob.hexdigest()


@contextmanager
def _errors(what: str, remedy: str) -> Iterator[None]:
    """Raises HubError for the errors of the hub's library and of its network stack, which are of many kinds."""
    try:
        yield
    except Exception as error:
        from huggingface_hub import constants

        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"{what} ({constants.ENDPOINT}): {reason}; {remedy}") from error
