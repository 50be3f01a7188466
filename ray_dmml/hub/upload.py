"""Uploads a pushed cohort to the Hugging Face hub, in one commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token

from ray_dmml.errors import UserError
from ray_dmml.pushed import CODE_FOLDER, FACTS_FILE, WEIGHTS_FILE, reason

_OF_EVERY_REPOSITORY = {".gitattributes", "README.md", "LICENSE"}


def require_token() -> None:
    """Raises UserError if this user is not logged in to the hub."""
    if get_token() is None:
        raise UserError(
            "there is no token for the Hugging Face hub: run `hf auth login`, set HF_TOKEN, or write a folder (--out)"
        )


def upload(folder: Path, repo: str, private: bool) -> str:
    """Creates the repository if there is none, and makes the files of the folder a commit. Files of an earlier push
    that are not in the folder are deleted; everything else in the repository stays.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub does not answer or refuses, or the repository is public against ``private``, or holds
            something else than a cohort.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo)
        names = {file.rfilename for file in info.siblings or ()}
        if private and not info.private:
            raise UserError(f"{repo} already exists and is public: make it private on its page, or give another name")
        if FACTS_FILE not in names and (others := sorted(names - _OF_EVERY_REPOSITORY)):
            raise UserError(
                f"{repo} already exists and is not a cohort that ray-dmml push wrote (it has {others[0]}): give "
                "another name"
            )
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Push a cohort with ray-dmml",
            delete_patterns=[f"*/{WEIGHTS_FILE}", f"{CODE_FOLDER}/*"],
        )
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many types
        raise UserError(f"{repo} could not be pushed to the Hugging Face hub ({reason(error)})") from None
    return str(commit.commit_url)
