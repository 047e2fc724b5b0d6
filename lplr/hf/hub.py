"""The Hugging Face Hub: from what the user calls a model to a folder or a GGUF file on this machine.

Only configuration, tokenizer and safetensors files are downloaded; pickled weights never are.  Every failure is a
HubError of one line that says what to do; none of them shows a token.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lplr.errors import CheckpointError, HubError

Notify = Callable[[str], None]

SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
DOWNLOADS = (
    *SAFETENSORS,
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
)
SUBFOLDERS = ("*/*",)  # original/, onnx/, ..: never needed
_PICKLES = ("*.pth", "*.bin", "*.pt", "*.ckpt")
_REPO = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


class RepositoryAbsent(HubError):
    """No repository of that name can be seen with this token."""


class Unreachable(HubError):
    """No connection to the Hub, or none is allowed."""


def _log(message: str) -> None:
    logging.getLogger("lplr").warning(message)


def resolve(model: str, revision: str | None = None, notify: Notify = _log) -> Path:
    """The folder or GGUF file that `model` stands for, downloaded when it is on the Hub.

    model: a folder, a .gguf file, a Hub id (`owner/name`), or one GGUF file of a repository (`owner/name:file.gguf`).
    Raises CheckpointError for a path that is not there, HubError for a repository that cannot be used.
    """
    local = Path(model).expanduser()
    if (model and local.is_dir()) or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.is_file():
        raise CheckpointError(f"{model}: is a file: give the folder that holds it with its config.json, or a .gguf file")
    repo, _, file = model.partition(":")
    if not _REPO.fullmatch(repo) or (not file and local.suffix in (".gguf", ".safetensors")):
        shown = model or "an empty name"
        raise CheckpointError(f"{shown}: no such file or folder: check the path, or give a Hub id such as owner/name")
    try:
        if not file:
            address, notice = choose_repo(repo, lambda name: list_files(name, revision))
            if notice:
                notify(notice)
            repo, _, file = address.partition(":")
        return _download(repo, file, revision)
    except Unreachable:
        held = _cached(repo, file, revision)
        if held is None:
            raise
        notify(f"the Hub cannot be reached: using the copy of {model} in the local cache")
        return held


def choose_repo(model_id: str, listing: Callable[[str], list[str]]) -> tuple[str, str | None]:
    """Which repository to read for `model_id`, and a notice for the user when it is another one.

    listing(id) gives the files of a repository and raises RepositoryAbsent where there is none.  Weights in the
    transformers safetensors layout are taken as they are.  Meta's original weights (consolidated.*.pth) or pickled
    ones are passed over for the sibling `<id>-hf`; a single GGUF file comes back as `id:file.gguf`.  HubError when
    nothing can be read.
    """
    files = listing(model_id)
    if _readable(files):
        return model_id, None
    gguf = sorted(f for f in files if f.endswith(".gguf") and "-of-" not in f)
    if len(gguf) == 1:
        return f"{model_id}:{gguf[0]}", f"{model_id} holds no safetensors: reading its GGUF file {gguf[0]}"
    if gguf:
        shown = ", ".join(gguf[:8]) + (", .." if len(gguf) > 8 else "")
        raise HubError(f"{model_id} holds {len(gguf)} GGUF files, give one as {model_id}:{gguf[0]} (there are {shown})")
    pickles = sorted(f for f in files if "/" not in f and any(fnmatchcase(f, p) for p in _PICKLES))
    original = sorted(f for f in files if fnmatchcase(f.split("/")[-1], "consolidated*"))
    held = (pickles or original or ["no weights"])[0]
    sibling = f"{model_id}-hf"
    if (pickles or original) and not model_id.endswith("-hf"):
        try:
            found = _readable(listing(sibling))
        except RepositoryAbsent:
            found = False
        if found:
            return sibling, f"{model_id} holds {held}, not the transformers layout: reading its sibling {sibling}"
    if any(f == "adapter_config.json" for f in files):
        raise HubError(f"{model_id} is a PEFT adapter, not a model: merge it into its base model first")
    if not (pickles or original):
        raise HubError(f"{model_id} holds no weights that can be read: give a repository with model.safetensors")
    raise HubError(
        f"{model_id} holds {held} and no model.safetensors: give a repository in the transformers safetensors layout, "
        "or convert it (from_pretrained, then save_pretrained) and give that folder"
    )


def list_files(repo: str, revision: str | None = None) -> list[str]:
    """The files of a repository of the Hub; HubError when it cannot be listed."""
    import huggingface_hub

    with hub_errors(repo, revision):
        # list_repo_files would try five times, for half a minute, before it says that there is no connection
        found = huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=30)
        return [file.rfilename for file in found.siblings or ()]


def _readable(files: list[str]) -> bool:
    """Whether the transformers safetensors layout stands at the top of a repository."""
    return any(fnmatchcase(f, pattern) for f in files for pattern in SAFETENSORS if "/" not in f)


def _download(repo: str, file: str, revision: str | None, *, offline: bool = False) -> Path:
    import huggingface_hub

    with hub_errors(repo, revision):
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, local_files_only=offline))
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(DOWNLOADS),
            ignore_patterns=list(SUBFOLDERS),
            local_files_only=offline,
        )
        return Path(folder)


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    """What an earlier download left on this machine: of the repository, or of its sibling `<id>-hf`."""
    for name in (repo, f"{repo}-hf"):
        try:
            held = _download(name, file, revision, offline=True)
        except HubError:
            continue
        if held.is_file() or _readable([f.name for f in held.iterdir()]):
            return held
    return None


@contextmanager
def hub_errors(repo: str, revision: str | None = None, *, kind: str = "model", access: str = "read") -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into a HubError that says what to do.

    kind: model or dataset.  access: read or write, what the block does.  The causes are chained, their texts are left out:
    they have many lines.
    """
    from huggingface_hub import constants, errors, get_token

    what = repo if kind == "model" else f"the {kind} {repo}"
    page = f"{constants.ENDPOINT}/{repo if kind == 'model' else f'{kind}s/{repo}'}"
    # the HTTP library's own root differs between versions of huggingface_hub, and the last one came with 2.4
    offline: tuple[Any, ...] = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    offline += (errors.HfHubHTTPError.__bases__[0], getattr(errors, "RevisionResolutionError", TimeoutError))
    log_in = f"run `hf auth login` (or set HF_TOKEN to a {access} token)"
    other = "give a folder on this machine" if access == "read" else "run the same command again later: what has arrived is kept"
    try:
        yield
    except errors.GatedRepoError as error:
        step = "use a token of the account that has access" if get_token() else log_in
        raise HubError(f"{what} is gated: accept its licence at {page}, {step}, and run again") from error
    except errors.RepositoryNotFoundError as error:
        if get_token():
            hint = f"check the spelling; if it is private, use a token that may {access} it"
        else:
            hint = f"check the spelling; if it is private or gated, {log_in}"
        raise RepositoryAbsent(f"{what}: no such folder here and no such repository on the Hub: {hint}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{what} has no revision {revision!r}: choose a branch, tag or commit listed at {page}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(f"{what} does not hold the file that was asked for: see the files listed at {page}") from error
    except errors.HFValidationError as error:
        raise HubError(f"{what} is not a Hub id: give owner/name, or the path of a folder") from error
    except errors.HfHubHTTPError as error:
        raise _status_error(what, page, (log_in, other, access), error.response.status_code, bool(get_token())) from error
    except offline as error:
        raise Unreachable(
            f"cannot reach the Hub for {what}: check the connection (and that HF_HUB_OFFLINE is not set), "
            f"or {other}"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        step = "make room, or point HF_HOME at a larger disk" if full else "check the cache folder (HF_HOME)"
        raise HubError(f"cannot store {what}: {error.strerror or 'write failed'}: {step}") from error


def _status_error(what: str, page: str, words: tuple[str, str, str], status: int, token: bool) -> HubError:
    """The HubError for a refusal that has no exception class of its own.

    words: how to log in, what else to do, and the access that was wanted; token: whether one was sent.
    """
    log_in, other, access = words
    if status == 401 and not token:
        return HubError(f"the Hub wants to know who asks for {what}: {log_in} and run again")
    if status == 401:
        return HubError(f"the Hub refused the token sent for {what} (invalid or expired): {log_in} and run again")
    if status == 403 and access == "write":
        return HubError(f"the Hub forbids writing {what}: use a token with write access to that name, see {page}")
    if status == 403:
        return HubError(f"the Hub forbids reading {what}: use a token with read access to gated repositories, see {page}")
    if status == 429:
        return HubError(f"the Hub limits the rate of requests (429) for {what}: wait some minutes, or {log_in}")
    return HubError(f"the Hub answered {status} for {what}: try again later, or {other}")
