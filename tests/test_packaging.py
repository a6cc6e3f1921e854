"""The package as pip and PyPI see it: a complete sdist, a wheel that works from any folder, no dead links."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from importlib.metadata import version
from pathlib import Path

import pytest

import timm_deq

ROOT = Path(__file__).parent.parent
PACKAGES = ("timm_deq", "nc_probe", "recipes")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel), built as `python -m build` does, the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built[0]) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def test_pypi_takes_both_and_shows_no_dead_link(built):
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], check=True, capture_output=True)
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
        metadata = BytesParser().parsebytes(wheel.read(name))
    assert metadata["Version"] == timm_deq.__version__ == version("timm-deq")
    page = metadata.get_payload()
    assert "pip install -e" in page and "Three pictures" not in page
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links and all(link.startswith("https://") for link in links) and "<img" not in page


def test_the_wheel_has_every_file_of_the_packages(built):
    with zipfile.ZipFile(built[1]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == expected
    for package in PACKAGES:
        assert {f"{package}/py.typed", f"{package}/README.md"} <= found


def test_the_tests_of_the_sdist_collect(unpacked):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider"],
        cwd=unpacked,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "tests/nc_probe/" in run.stdout and "tests/recipes/" in run.stdout and "tests/timm_deq/" in run.stdout


def test_a_wheel_trains_from_an_empty_folder(built, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    site = tmp_path / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # What the wheel depends on comes from here. A path in a .pth is searched last, and the .pth files in it are not
    # read: our own source, installed there for development, is not found.
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    words = ["-m", "accelerate.commands.launch", "--cpu", "--quiet", "-m", "recipes.train"]
    words += ["--config", "digits_balanced", "--max_updates", "2", "--output", "run"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", *words],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "test accuracy" in run.stdout and [path.name for path in empty.iterdir()] == ["run"]
    assert (empty / "run" / "results.json").exists()
