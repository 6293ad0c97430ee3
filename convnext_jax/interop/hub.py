"""The Hugging Face hub: downloads of weights, and uploads of saved folders.

Cache, token and offline mode are set by `huggingface_hub` (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE).
"""

import re
from pathlib import Path

from convnext_jax.errors import UserError, first_line

HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*')
WEIGHTS = ('model*.safetensors*', 'pytorch_model*.bin', 'open_clip_model.safetensors', 'open_clip_pytorch_model.bin')
"""Patterns of names of weights files; those of the first pattern that a repository has are downloaded."""
LOG_IN = 'log in with `hf auth login`, or set HF_TOKEN'


def download(hub_id: str, revision: str | None = None) -> Path:
    """The local copy of the weights, configs and model card of a repository.

    Args:
        hub_id: 'owner/name'; the hub redirects the old name of a renamed repository.
        revision: branch, tag or commit.

    Raises:
        UserError: the repository or revision does not exist, is gated, or has no weights; or the hub cannot be reached
            and the cache has no copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        for weights in WEIGHTS:
            wanted = ['*config.json', 'README.md', weights]  # the model card states the licence
            folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
            if any(folder.glob(weights)):
                return folder
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError
        raise UserError(
            f'{hub_id} is gated: accept its terms at https://huggingface.co/{hub_id}, then {LOG_IN}'
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f'{hub_id} is neither a local path nor a repository on the hub; if it is private, {LOG_IN}'
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f'{hub_id} on the hub has no revision {revision}') from error
    except LocalEntryNotFoundError as error:
        raise UserError(f'{hub_id} is not a local path, and the hub cannot be reached: {first_line(error)}') from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f'{hub_id} is not a local path, and the hub does not provide it: {first_line(error)}'
        ) from error
    raise UserError(f'{hub_id} on the hub has neither safetensors files nor a pytorch_model.bin')


def check_hub_id(hub_id: str) -> None:
    """Checks that the name of a repository has the form ACCOUNT/NAME.

    Raises:
        UserError: it has another form.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise UserError(f'a repository on the hub is called ACCOUNT/NAME, not {hub_id}')


def upload(folder: Path, hub_id: str) -> str:
    """Uploads the files of a folder to a repository, which is created if it does not exist, and returns its address.

    Raises:
        UserError: the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = str(api.create_repo(hub_id, exist_ok=True))
        api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message='Upload ConvNeXt weights')
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f'{hub_id} could not be uploaded: {first_line(error)}; check the name, and {LOG_IN}') from error
    return address
