"""Pushing an export to the Hugging Face hub, or to another server with its API (HF_ENDPOINT).

The user logs in by the hub's own means (`hf auth login`, or the variable HF_TOKEN); nothing here reads a token.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlra_scale
from mlra_scale.console import InputError
from mlra_scale.data.hub import unreachable_hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_CARD = "README.md"
_EXPORTED = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|modeling_mlra\.py|low_rank_linear\.py"
    r"|README\.md|config\.json|generation_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|vocab\.json|merges\.txt"
)
"""Whole names of the files that exports have; all others, and all in folders, belong to the repository's owner."""
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


class HubError(InputError):
    """The hub cannot be used; the message says why, and what to do."""


def check_access(repository: str, is_private: bool = False) -> None:
    """Makes sure that the hub answers, the user may write, and `push` would accept the repository; writes nothing.

    Raises:
        HubError: The name is none of a repository, the hub does not answer, nobody is logged in, the token or the
            user's role may not write, or an existing repository is not suited (see `push`).
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    what = f"{repository} cannot be pushed to"
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"{what}: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, which the files of slurm/ do unless it is set "
            "already; set HF_HUB_OFFLINE=0 where this machine reaches the hub, or leave the repository out and push "
            "from one that does, with `mlra-scale export ... --push-to-hub`"
        )
    if silent := unreachable_hub():
        raise HubError(f"{what}: {silent} does not answer")
    api = HfApi()
    with _errors(what, "name it OWNER/NAME, of letters, digits, -, _ and ."):
        validate_repo_id(repository)
    with _errors(what, _LOGIN):
        user = api.whoami()
        if fault := _may_not_write(user, repository.partition("/")[0]):
            raise HubError(f"{what}: {fault}")
        try:
            info = api.model_info(repository)
        except RepositoryNotFoundError:
            return
        _check_repository(api, repository, info, is_private)


def push(folder: Path, repository: str, is_private: bool, say: Callable[[str], None]) -> str:
    """Pushes an export in one commit, and compares the files of the commit with the folder's.

    The repository is made if there is none. An existing one must hold an export, known by its card, or no file of a
    name that exports use; and it must be private where `is_private`. Files of an earlier export that the new one lacks
    are removed; other files stay as they are.

    Returns:
        The address of the repository.

    Raises:
        HubError: Something cannot be pushed, or the hub holds other files than the folder.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, files = HfApi(), sorted(file.name for file in folder.iterdir() if file.is_file())
    with _errors(f"{folder} was not pushed to {repository}", f"push it again with `hf upload {repository} {folder}`"):
        url = api.create_repo(repository, private=is_private or None, exist_ok=True)
        head = api.model_info(repository)
        _check_repository(api, repository, head, is_private)
        stale = [name for name in _exported_names(head) if name not in files]
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
        removed = [CommitOperationDelete(path_in_repo=name) for name in stale]
        message = f"Exported with mlra-scale {mlra_scale.__version__}"
        # On the commit that was looked at, and on no later one.
        commit = api.create_commit(repository, [*removed, *added], commit_message=message, parent_commit=head.sha)
        found = api.model_info(repository, revision=commit.oid, files_metadata=True).siblings or []
    there = {entry.rfilename: entry.blob_id if entry.lfs is None else entry.lfs.sha256 for entry in found}
    if other := [name for name in files if there.get(name) not in _checksums(folder / name)]:
        raise HubError(f"{url} holds other content than {folder}: {', '.join(other)}; push again")
    say(f"pushed {len(files)} files to {url}" + f", and removed {', '.join(stale)} there" * bool(stale))
    return str(url)


def _may_not_write(user: dict[str, Any], owner: str) -> str | None:
    """Returns why a user may not write to an owner's repositories, as far as whoami says; other servers say less."""
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        return f"the token may only read; {_LOGIN}"
    organizations = user.get("orgs")
    if not isinstance(organizations, list) or owner.casefold() == str(user.get("name")).casefold():
        return None
    roles = {str(each.get("name")).casefold(): each.get("roleInOrg") for each in organizations}
    # A fine-grained token may be of an organization that it does not list.
    if owner.casefold() not in roles and role == "write":
        return f"{user.get('name')} is no member of {owner}; name a repository of your own, or of your organization"
    if roles.get(owner.casefold()) == "read":
        return f"{user.get('name')} may only read in {owner}; ask for a role that may write"
    return None


def _exported_names(info: ModelInfo) -> list[str]:
    return [file.rfilename for file in info.siblings or [] if _EXPORTED.fullmatch(file.rfilename)]


def _check_repository(api: HfApi, repository: str, info: ModelInfo, is_private: bool) -> None:
    """Raises HubError if an existing repository is public where it must be private, or holds what is no export."""
    from mlra_scale.checkpoint.huggingface.card import CARD_MARK

    if is_private and info.private is False:
        raise HubError(
            f"{repository} is public, and was to be private; make it private in its settings on the hub, name another "
            "repository, or leave --private (export.private) out"
        )
    if not (names := _exported_names(info)):
        return
    if _CARD in names:
        with tempfile.TemporaryDirectory() as folder:
            card = api.hf_hub_download(repository, _CARD, revision=info.sha, local_dir=folder)
            if CARD_MARK in Path(card).read_bytes():
                return
    raise HubError(
        f"{repository} holds {', '.join(names)}, which are no export of this tool (its README.md does not say so); "
        "name another repository, or remove them there"
    )


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
    except HubError:
        raise
    except Exception as error:
        from huggingface_hub import constants

        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise HubError(f"{what} ({constants.ENDPOINT}): {reason}; {remedy}") from error
