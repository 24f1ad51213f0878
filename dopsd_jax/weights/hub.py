"""Models by their names on the Hugging Face hub, `Tongyi-MAI/Z-Image-Turbo`: found in its cache or
downloaded, through `huggingface_hub`; and what is exported, sent there.

Only the files that are read here come, and a model's weights only when they are asked for. The
hub's own settings hold: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from dopsd_jax.core.log import log

# A name, and a branch, tag or commit behind @.
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
CONFIGS = ("*.json", "*.txt", "*.jinja")
WEIGHTS = ("*.safetensors",)
# What a pipeline's directory is read for; files beside these folders are not.
PARTS = ("scheduler", "transformer", "text_encoder", "tokenizer", "vae")


def is_name(text: str) -> bool:
    """Whether a text that is no path here may be a model's name."""
    return NAME.fullmatch(text) is not None


@functools.cache
def fetch(name: str, *, pipeline: bool, weights: bool | tuple[str, ...]) -> Path:
    """The directory of a model's files in the hub's cache; what is missing is downloaded.

    Args:
        name: See `is_name`.
        pipeline: Whether it has a folder for each part, as diffusers' pipelines; otherwise its
            files lie side by side.
        weights: Whether its weights are needed, or of a pipeline: those of which folders; of the
            rest come configs and tokenizer alone.

    Raises:
        ValueError: No such model or revision, no access to it, or none of its files here while
            offline; each with what to do.
    """
    # Here, because it takes half a second, which nobody with a directory should pay.
    import huggingface_hub
    from huggingface_hub import errors

    match = NAME.fullmatch(name)
    patterns = [*CONFIGS, *(WEIGHTS if weights else ())]
    if pipeline:
        whole = weights if isinstance(weights, tuple) else PARTS if weights else ()
        patterns = ["model_index.json"]
        patterns += [f"{part}/{kind}" for part in PARTS for kind in CONFIGS]
        patterns += [f"{part}/{kind}" for part in whole for kind in WEIGHTS]
    page = f"{huggingface_hub.constants.ENDPOINT}/{match['repo']}"
    try:
        found = huggingface_hub.snapshot_download(
            match["repo"], revision=match["revision"], allow_patterns=patterns,
            # The same weights under open_clip's names lie beside those of some CLIPs.
            ignore_patterns=None if pipeline else ["*/*", "open_clip_*"],
        )
    except errors.GatedRepoError as e:
        raise ValueError(
            f"{name}: its makers ask for your consent; accept the terms at {page}, then log in "
            "with: hf auth login"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise ValueError(
            f"{name}: expected a directory here, or a model on the hub, found neither; check the "
            f"name, or, if {page} is private, log in with: hf auth login"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise ValueError(f"{name}: the hub has this model, but no such revision") from e
    except errors.LocalEntryNotFoundError as e:
        raise ValueError(
            f"{name}: expected a directory here, or a whole model in the hub's cache, found "
            "neither, and the hub cannot be reached (or HF_HUB_OFFLINE is set); go online once, or "
            "give the directory"
        ) from e
    except (errors.HfHubHTTPError, errors.HFValidationError) as e:
        raise ValueError(f"{name}: the hub answered: {e!s:.300}") from e
    log.info("%s: %s", name, found)
    return Path(found)


def check_push(repo: str) -> None:
    """Raises ValueError unless `repo` may be a place on the hub and this machine is logged in."""
    import huggingface_hub
    from huggingface_hub import errors, utils

    try:
        utils.validate_repo_id(repo)
    except errors.HFValidationError as e:
        raise ValueError(f"--push: expected OWNER/NAME, got {repo!r} ({e})") from e
    if repo.count("/") != 1:
        raise ValueError(f"--push: expected OWNER/NAME, got {repo!r}")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError("--push: expected the hub, but HF_HUB_OFFLINE is set; unset it")
    if huggingface_hub.get_token() is None:
        raise ValueError("--push: expected a token of the hub, found none; log in with "
                         "`hf auth login`, or set HF_TOKEN")


def push(repo: str, folder: Path, files: Sequence[str], *, private: bool) -> str:
    """Sends files to a model repository, which is made if it is not there.

    Args:
        repo: OWNER/NAME.
        folder: Where the files lie.
        files: By their names in the folder, which they keep.
        private: Make a private repository; one that is there stays as it is.

    Returns:
        Its address.

    Raises:
        ValueError: No right to write there, or a hub that does not answer; each with what to do.
    """
    import httpx2
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=[glob.escape(f) for f in files],
            commit_message="Export of dopsd_jax",
        )
    except errors.HfHubHTTPError as e:
        status = e.response.status_code
        advice = {
            401: "the token is not valid; log in again with `hf auth login`",
            403: f"the token may not write to {repo}; use one with the right to write, or your "
                 "own name as OWNER",
        }.get(status, "try again later")
        raise ValueError(f"--push {repo}: the hub answered {status}: {advice} ({e!s:.300})") from e
    except (httpx2.HTTPError, OSError) as e:
        raise ValueError(f"--push {repo}: the hub at {api.endpoint} cannot be reached ({e}); what "
                         f"was exported is in {folder}") from e
    return str(made)
