"""Writing to the Hugging Face Hub: a repository, a branch, a folder.

The transfer is that of huggingface_hub: it sends only what the repository lacks, so that the same call after an interruption goes
on where it stopped.  No message and no record holds a token.
"""

from __future__ import annotations

import re
from pathlib import Path

from lplr.errors import HubError
from lplr.hf.hub import hub_errors

_TARGET = re.compile(r"[\w-][\w.-]*/[\w][\w.-]*")
_SECRET = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")  # how the Hub's tokens look
_TEXTS = (".json", ".jsonl", ".yaml", ".md", ".html", ".py", ".jinja")
_VOCABULARY = ("tokenizer.json", "vocab.json")  # large, and not ours


def create(repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Make the repository owner/name, and the branch `revision`, unless they are there; return the repository's address.

    private: of a repository that is made now; one that is there keeps what it is.  Called before hours of work it tells at once
    what would stop their result.  Raises HubError.
    """
    import huggingface_hub

    if not _TARGET.fullmatch(repo):
        raise HubError(f"{repo!r} is no name of a repository: give owner/name")
    api = huggingface_hub.HfApi()
    with hub_errors(repo, revision, access="write"):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
    return str(url)


def upload(folder: Path, repo: str, *, revision: str | None = None, message: str) -> str:
    """Send every file of a folder to a repository that is there, and return the address of the commit.

    Nothing is deleted there.  Raises HubError for what the Hub refuses, and for a file that holds what looks like a token.
    """
    import huggingface_hub

    check_secrets(folder)
    with hub_errors(repo, revision, access="write"):
        try:
            done = huggingface_hub.HfApi().upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=message
            )
        except RuntimeError as error:  # what stops one file comes wrapped in it, or, from its storage library, as it
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise HubError(f"sending to {repo} stopped: run the same command again, what has arrived is kept") from error
    return str(done.commit_url)


def check_secrets(folder: Path) -> None:
    """HubError when a text file of a folder holds the user's token or what looks like one; the message does not repeat it."""
    from huggingface_hub import get_token

    own = (get_token() or "").encode()
    for path in sorted(folder.iterdir()):
        if path.suffix in _TEXTS and path.name not in _VOCABULARY:
            content = path.read_bytes()
            if _SECRET.search(content) or (own and own in content):
                raise HubError(
                    f"{path.name} holds what looks like an access token: take it out (and revoke it) before publishing"
                )
