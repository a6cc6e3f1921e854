"""timm's own tests of its models, unchanged, run on ours."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import timm

import timm_deq

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"

# For each model: forward, backward, default_cfgs, torchscript, forward_features, forward_intermediates (2), pruning,
# fx forward, fx backward, fx to torchscript.
TESTS_PER_MODEL = 11


def test_timm_s_own_suite_passes(tmp_path):
    source = CACHE / f"timm-{timm.__version__}.tar.gz"
    assert source.exists(), (
        f"{source.name}, which holds timm's tests, is not in {CACHE}; fetch it with: "
        f"pip download --no-deps --no-binary timm -d .cache timm=={timm.__version__}"
    )
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    suite = tmp_path / f"timm-{timm.__version__}"
    env = {key: value for key, value in os.environ.items() if key != "GITHUB_ACTIONS"}  # it makes timm drop tests
    env["OMP_NUM_THREADS"] = "1"  # threads of several test processes would wait for each other
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "timm_deq"), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "timm_plugin", "-p", "no:cacheprovider", "-q", "-W", "ignore"]
        + ["-k", "deq_", "tests/test_models.py"],
        cwd=suite,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    models = timm.list_models("deq_*")
    assert models and timm_deq
    (passed,) = re.findall(r"(\d+) passed", run.stdout)
    assert int(passed) == TESTS_PER_MODEL * len(models), run.stdout[-500:]
    assert not re.search(r"skipped|xfailed|failed", run.stdout)
