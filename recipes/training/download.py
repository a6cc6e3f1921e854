"""Models and manifests out of the Hub, into its cache on this machine."""

from pathlib import Path

from huggingface_hub import snapshot_download

from recipes.errors import check
from recipes.settings.hub_name import is_hub_name, parse_hub_name
from recipes.training.hub_client import patiently

MODEL = ("config.json", "model.safetensors")
RUN = ("config.yaml", "manifest.json")


def fetch(
    word: str, needed: tuple[str, ...] = MODEL, optional: tuple[str, ...] = RUN, *, setting: str = "model"
) -> Path:
    """Download files of one commit.

    Args:
        word: `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION`.
        needed: paths in the repository that must be there.
        optional: paths that may be.
        setting: named by errors.

    Returns:
        A folder with these files, not to be written to.

    Raises:
        HubError: the Hub cannot be reached and the files are not in the cache, or there is no such repository.
        UserError: not such a name, or a repository without what is needed.
    """
    repo, revision = parse_hub_name(word, setting=setting)

    def download() -> str:
        return snapshot_download(repo, revision=revision, allow_patterns=[*needed, *optional])

    folder = Path(patiently(download, f"{word} cannot be downloaded"))
    missing = [name for name in needed if not (folder / name).is_file()]
    check(not missing, setting, word, f"a repository that has {' and '.join(needed)}")
    return folder


def run_folder(model: str) -> Path | None:
    """The folder of a run, which may have to come from the Hub; None for a model that is no run.

    Raises:
        HubError, UserError: as `fetch`.
    """
    folder = fetch(model) if is_hub_name(model) else Path(model)
    is_run = folder.is_dir() and (not is_hub_name(model) or all((folder / name).is_file() for name in RUN))
    return folder if is_run else None
