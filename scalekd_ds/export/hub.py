"""Publishes a student on a Hugging Face hub, as a repository that `timm.create_model("hf-hub:OWNER/NAME")` loads."""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id

from scalekd_ds.errors import UserError, cause_of
from scalekd_ds.export.hub_folder import FILES, check_license, check_source, write_folder

T = TypeVar("T")
MAIN = "main"
_ERRNO = re.compile(r"\[Errno -?\d+\] ")
# seconds until a hub that cannot be reached is given up, and one that does not answer (connect, read, write, pool)
_TO_BEGIN, _TO_UPLOAD = (10.0, 30.0, 30.0, 30.0), (10.0, 600.0, 600.0, None)


@dataclass(frozen=True)
class Pushed:
    """What has gone up, or would.

    Attributes:
        files: Name -> bytes.
        license: The licence in the card's metadata, or None.
        url: The commit's address on the hub; empty where nothing was uploaded.
        ignored: Names of other files in an exported folder, which stay at home.
    """

    files: dict[str, int]
    license: str | None
    url: str
    ignored: tuple[str, ...] = ()


def check_name(name: str) -> None:
    """Raises UserError for what is no `OWNER/NAME` of a hub."""
    try:
        validate_repo_id(name)
        wrong = "" if name.count("/") == 1 else "it has no owner"
    except HFValidationError as error:
        wrong = cause_of(error)
    if wrong:
        raise UserError(
            f"the repository is {name!r}: it must be OWNER/NAME, your own name on the hub or an organisation's and the "
            f"model's ({wrong})."
        )


def token_of_user() -> str:
    """The token that the hub's own tools use: HF_TOKEN, or what `hf auth login` has kept.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    try:
        token = huggingface_hub.get_token()
    # files that cannot be read, and errors of the library's own ways to a token
    except Exception as error:
        raise UserError(
            f"the hub's token cannot be read ({cause_of(error)}): `hf auth login` writes it anew."
        ) from None
    if not token:
        raise UserError(
            "there is no token for the hub: make one that may write at huggingface.co/settings/tokens, then "
            "run `hf auth login`, or set HF_TOKEN to it."
        )
    return token


def describe(source: Path, name: str, license: str | None, out: Path, overwrite: bool = False) -> Pushed:
    """Writes into `out` what `push` would upload; it needs no token and no network.

    Raises:
        UserError: The name, the licence or the source is refused, or the folder cannot be written.
    """
    check_name(name)
    check_license(license)
    check_source(source)
    found = write_folder(source, out, name, license, overwrite)
    return Pushed(_sizes(out), found, "", _ignored(source))


def push(
    source: Path,
    name: str,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Uploads a student to a hub, in one commit: the repository has all of it or what it had before.

    A second call uploads what has changed. It makes the repository, and the branch, where they are missing.

    Args:
        source: Folder of a finished run, or one that `export` wrote in the format timm or hf.
        name: `OWNER/NAME` on the hub.
        license: The identifier of a licence, such as `apache-2.0`, for the card.
        private: Only its owner sees the repository; one that is public already is refused.
        revision: The branch; None is main.
        message: The commit's message.
        endpoint: The hub's address; None takes HF_ENDPOINT, or Hugging Face's own.

    Raises:
        UserError: Any of these is refused, there is no token, or the hub cannot be reached or refuses.
    """
    check_name(name)
    check_license(license)
    token = token_of_user()
    check_source(source)
    api = HfApi(endpoint=_address(endpoint), token=token, library_name="scalekd_ds")
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    with warnings.catch_warnings():
        # of the library's: they tell a programmer what to call instead
        warnings.simplefilter("ignore")
        _ask(api, name, _TO_BEGIN, api.whoami)
        with tempfile.TemporaryDirectory(prefix="scalekd-push-") as temporary:
            folder = Path(temporary, "folder")
            found = write_folder(source, folder, name, license)
            _ask(api, name, _TO_BEGIN, lambda: _prepare(api, name, private, revision))
            files = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(folder / file)) for file in FILES]
            said = message or f"{Path(source).resolve().name} by scalekd_ds"
            # one commit: upload_folder may make several
            done = _ask(
                api,
                name,
                _TO_UPLOAD,
                lambda: api.create_commit(name, files, commit_message=said, revision=revision),
            )
            return Pushed(_sizes(folder), found, str(done.commit_url), _ignored(source))


def _address(endpoint: str | None) -> str | None:
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UserError(f"--endpoint is {endpoint!r}: it must be the address of a hub, such as https://huggingface.co.")
    return endpoint


def _prepare(api: HfApi, name: str, private: bool, revision: str | None) -> None:
    """Makes the repository and the branch, unless they are there.

    Raises:
        UserError: A private repository is asked for, and there is a public one.
        Exception: The hub's errors.
    """
    api.create_repo(name, private=True if private else None, exist_ok=True)
    # an existing repository keeps who may see it
    if private and not api.model_info(name).private:
        raise UserError(
            f"{name} is there already and public, and --private does not change that: change it in its settings on the hub, "
            "or give another name. Nothing was uploaded."
        )
    if revision not in (None, MAIN):
        api.create_branch(name, branch=revision, exist_ok=True)


def _ask(api: HfApi, name: str, seconds: tuple[float | None, ...], request: Callable[[], T]) -> T:
    """What `request` returns, a call of the hub's library alone, whose errors become UserErrors.

    Raises:
        UserError: The hub cannot be reached, refuses, or fails.
    """
    # without it, an address where nobody answers is waited for until the system gives up, two minutes later
    get_session().timeout = seconds
    try:
        return request()
    except UserError:
        raise
    # its own, its HTTP library's (which changes between releases), the system's, and those of the storage's library
    except Exception as error:
        raise UserError(_told(error, api.endpoint, name)) from None


def _told(error: Exception, endpoint: str, name: str) -> str:
    """What is wrong at the hub, and what to do, in one line."""
    # the check of the metadata, before anything is uploaded
    if type(error) is ValueError and "metadata" in str(error):
        listed = "; ".join(line.strip(" -") for line in str(error).splitlines()[1:] if line.strip())
        return f"{endpoint} refuses the metadata of README.md ({listed or cause_of(error)}): correct it, or --license."
    answer = next((e for e in _chain(error) if isinstance(e, HfHubHTTPError)), None)
    if answer is None and isinstance(error, ValueError | LookupError | TypeError | AttributeError):
        return f"{endpoint} does not answer as a hub does ({cause_of(error)}): check --endpoint and HF_ENDPOINT."
    if answer is None:
        cause = _ERRNO.sub("", cause_of(error))
        return (
            f"the hub {endpoint} cannot be reached ({cause}): check the network, HF_ENDPOINT, --endpoint and "
            "HF_HUB_OFFLINE. Nothing was published."
        )
    status, said = answer.response.status_code, (answer.server_message or "").strip().splitlines()
    says = f" ({said[0].rstrip('.')[:200]})" if said else ""
    if status == 401:
        return (
            f"{endpoint} refuses the token with 401{says}: it is wrong, or has run out. `hf auth login` takes another; "
            "HF_TOKEN goes before it."
        )
    if status == 403:
        return (
            f"{endpoint} refuses to write {name} with 403{says}: give a name of your own or of an organisation of yours, and "
            "a token that may write to it."
        )
    if status == 404:
        return f"{endpoint} answers 404{says}: it is no hub, or {name} is not there for this token."
    if status == 429 or status >= 500:
        return f"{endpoint} fails with {status}{says}: start the same command again later. Nothing was published."
    return f"{endpoint} refuses {name} with {status}{says}. Nothing was published."


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and those that it came from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in FILES}


def _ignored(source: Path) -> tuple[str, ...]:
    """What lies in an exported folder and is not uploaded; a run's folder has many things that nobody expects on a hub."""
    if not check_source(source):
        return ()
    return tuple(sorted(path.name for path in source.iterdir() if path.name not in FILES))
