"""Exports on the Hugging Face hub, by huggingface_hub: a folder is a commit of a model repository.

What is pushed was verified first. A base that lies beside its adapter is a repository of its own (NAME-base), since peft looks for a base by the
name of a repository; the adapter says that name. Of GGUF both are files of one repository. Repositories are private unless the recipe says
otherwise. The token is huggingface_hub's own affair (hf auth login, HF_TOKEN): nothing here reads, holds or writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finebits.errors import Failed, Invalid

BASE = "base"
RECORD = "finebits.json"  # of this machine's folders


class NotPushed(Failed):
    """The hub did not take a folder.

    >>> NotPushed("…").hint
    'what was exported lies where it was written: finebits export pushes it again'
    """

    hint = "what was exported lies where it was written: finebits export pushes it again"


class CannotPush(Invalid):
    """A push that could not succeed was asked for."""

    code = 2


def repositories(to: Sequence[str], name: str) -> dict[str, str]:
    """{target: its repository}: the name itself where there is one target, else with the target behind it.

    >>> repositories(["merged"], "me/tuned"), repositories(["adapter", "gguf:q4_k_m"], "me/tuned")
    ({'merged': 'me/tuned'}, {'adapter': 'me/tuned-adapter', 'gguf:q4_k_m': 'me/tuned-gguf-q4_k_m'})
    """
    return {target: name if len(to) == 1 else f"{name}-{target.replace(':', '-')}" for target in to}


def base_name(target: str, repository: str) -> str:
    """The repository of the base that an adapter belongs to.

    >>> base_name("adapter", "me/tuned"), base_name("gguf", "me/tuned")
    ('me/tuned-base', 'me/tuned')
    """
    return repository if target.partition(":")[0] == "gguf" else f"{repository}-{BASE}"


def check(to: Sequence[str], name: str | None, verified: bool) -> dict[str, str]:
    """{target: its repository} of a push that can be tried. Raises CannotPush where none can: nothing or no name is given, it is not verified,
    the hub is not to be reached, or nobody is logged in.

    >>> check(["merged"], None, True)
    Traceback (most recent call last):
        ...
    finebits.interop.hub.CannotPush: export.push_to_hub needs the name of a repository: say export.hub_model_id=NAME/MODEL
    """
    if name is None:
        raise CannotPush("export.push_to_hub needs the name of a repository: say export.hub_model_id=NAME/MODEL")
    if not to:
        raise CannotPush("export.push_to_hub pushes what is exported, and export.to is empty: name a target")
    if not verified:
        raise CannotPush("export.push_to_hub pushes what was verified, and export.verify is false: verify, or leave the push out")
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1:
        raise CannotPush(f"export.hub_model_id is {name!r}; it names a repository of the hub as NAME/MODEL")
    named = repositories(to, name)
    for target, repository in named.items():
        try:
            validate_repo_id(base_name(target, repository))
        except HFValidationError as e:
            raise CannotPush(
                f"export.hub_model_id is {name!r}, which is no name of the hub ({str(e).splitlines()[0].rstrip('.')})"
            ) from None
    if constants.HF_HUB_OFFLINE:
        raise CannotPush("export.push_to_hub needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave the push out")
    if get_token() is None:
        raise CannotPush("export.push_to_hub needs an account of the hub: hf auth login, or set HF_TOKEN")
    return named


def push(folder: Path, target: str, repository: str, private: bool = True) -> dict[str, Any]:
    """Commit an exported folder; its repository, the address of it and the commit. Raises NotPushed in one sentence."""
    parts = {repository: (folder, [RECORD])}
    if base_name(target, repository) != repository and (folder / BASE / "config.json").is_file():
        if not (folder / "adapter_config.json").is_file():
            parts = {repository: (folder / BASE, [RECORD])}  # a model without an adapter is its base
        else:
            parts = {base_name(target, repository): (folder / BASE, [RECORD]), repository: (folder, [RECORD, f"{BASE}/*"])}
    made: Mapping[str, Any] = {}
    for name, (place, left) in parts.items():  # a base before what names it
        made = _commit(place, name, private, left)
    return dict(made)


def _commit(folder: Path, repository: str, private: bool, left: list[str]) -> dict[str, Any]:
    from huggingface_hub import HfApi

    hub = HfApi(library_name="finebits")
    try:
        url = hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=left, commit_message="Export of a tuned model, verified"
        )
    except Exception as e:  # the hub's errors are many, and the user's ways out are few
        raise NotPushed(f"{folder} was not pushed to {repository}: {_why(e)}") from e
    return {"repository": repository, "url": str(url), "commit": commit.oid}


def _why(error: Exception) -> str:
    """In the user's words, where they are known."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return f"the hub cannot be reached ({type(error).__name__})"
    status = getattr(error.response, "status_code", None)
    known = {
        401: "the hub does not know this account: hf auth login, or set HF_TOKEN",
        403: "this account may not write there: take a token that may write, or another name",
        404: "the hub knows no such place: look at the name in export.hub_model_id",
        413: "the hub takes no folder of this size",
    }
    return known.get(status or 0, f"the hub answered {status}")
