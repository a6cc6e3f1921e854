"""Image files of a data set of the Hub, as a folder of this machine."""

from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, get_cached_repo_tree, hf_hub_download, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HTTPError

from recipes.images.files import has_configurations, is_metadata, is_picture

# Files of many rows or images, which `datasets` reads by the splits that the page of the data set shows.
_TABLES = (".csv", ".tsv", ".json", ".jsonl")
_ARCHIVES = (".parquet", ".arrow", ".tar", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def download_pictures(name: str, revision: str | None) -> Path | None:
    """Download a data set that consists of image files, of which folders are the splits and the classes.

    `datasets` would split it by words anywhere in a path, and a class called `train` with it.

    Args:
        name: Hub data set id.
        revision: commit, tag or branch.

    Returns:
        A folder, not to be written to; None if the data set is of another kind, or its README.md lists the files of
        each split, or it can be neither reached nor found in the cache.
    """
    where: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    try:
        files = HfApi().list_repo_files(name, **where)
    except (HTTPError, OSError):  # offline mode is an OSError
        try:
            files = [file.path for file in get_cached_repo_tree(name, **where)]
        except CachedRepoTreeNotFoundError:
            return None
    suffixes = [PurePosixPath(file).suffix.lower() for file in files if not is_metadata(file)]
    pictures, tables = sum(map(is_picture, files)), sum(suffix in _TABLES for suffix in suffixes)
    if pictures <= tables or not set(_ARCHIVES).isdisjoint(suffixes):
        return None
    if "README.md" in files and has_configurations(Path(hf_hub_download(name, "README.md", **where)).parent):
        return None
    return Path(snapshot_download(name, **where))
