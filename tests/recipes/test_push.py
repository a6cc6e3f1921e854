"""recipes/push.py as a user runs it, against a Hub on the loopback: one commit or none, whatever fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from few_digits import save_few_digits
from hub_server import cut, lost, meanwhile, slow, status
from hub_store import File, User
from huggingface_hub import HfApi, ModelCard, constants

import recipes.train
from recipes.push import main
from recipes.training import hub_client
from recipes.training.bundle import collect

pytestmark = [
    pytest.mark.usefixtures("one_cpu_and_no_network"),
    # lfs.py of huggingface_hub 2.4 passes a file to httpx2 as `data`.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
WHOLE = ["README.md", "config.json", "config.yaml", "figures/gram.png", "figures/residual.png", "figures/steps.png"]
WHOLE += ["figures/training.png", "manifest.json", "metrics.jsonl", "model.safetensors", "results.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_cpu_and_no_network):
    """A run that has finished."""
    folder = tmp_path_factory.mktemp("finished")
    data = save_few_digits(folder / "data", train=24, test=12)
    words = "--majority 2 --ratio 4 --epochs 1 --max_updates 1 --model_args.max_steps 4 --model_args.tol 0.01".split()
    assert recipes.train.main(["--output", str(folder / "run"), "--dataset", str(data), *words]) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """The same, to be changed."""
    subprocess.run(["cp", "-r", finished, tmp_path / "run"], check=True)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def collected(finished):
    return collect(finished, "lab/net")


@pytest.fixture
def ready(finished, collected, monkeypatch):
    """The run, and nothing to be done before it is sent: most of the time of a push."""
    monkeypatch.setattr("recipes.training.hub.collect", lambda *_, **__: dict(collected))
    return finished


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been slept, by the client or by the recipe."""
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def pushed(hub, repo="lab/net", branch="main"):
    """Commits of a repository, but for the one that creates it."""
    return hub.repos[repo].history(branch) if repo in hub.repos else []


def one_line(capsys):
    """What a command that failed has said."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0].removeprefix("error: ")


def test_a_run_is_one_commit(hub, finished, capsys):
    assert main([str(finished), "lab/net", "--message", "the first"]) == 0
    (commit,) = pushed(hub)
    assert commit.title == "the first" and list(commit.changed) == WHOLE
    assert f"hf-hub:lab/net (pushed: {hub.url}/lab/net/commit/{commit.oid})" in capsys.readouterr().out
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "results.json", "figures/gram.png"):
        assert commit.files[name].content == (finished / name).read_bytes()
    weights = (finished / "checkpoint" / "model.safetensors").read_bytes()
    assert commit.files["model.safetensors"].content == weights
    assert not [path for path in commit.files if path.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not hub.repos["lab/net"].private


def test_the_same_run_again_changes_nothing(hub, finished, capsys):
    assert main([str(finished), "lab/net"]) == main([str(finished), "lab/net"]) == 0
    assert len(pushed(hub)) == 1
    assert "had been pushed, nothing has changed" in capsys.readouterr().out.splitlines()[-1]


def test_after_a_change_only_what_has_changed_is_sent(hub, run):
    assert main([str(run), "lab/net"]) == 0
    uploads = len(hub.uploaded)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    (run / "figures" / "steps.png").unlink()
    (run / "figures" / "gram.png").write_bytes(b"another")
    assert main([str(run), "lab/net"]) == 0
    changed = ("README.md", "figures/gram.png", "figures/steps.png", "metrics.jsonl")
    assert pushed(hub)[0].changed == changed and len(hub.uploaded) == uploads + 1
    assert "figures/steps.png" not in pushed(hub)[0].files


def test_a_branch_and_a_private_repository(hub, finished):
    assert main([str(finished), "lab/net", "--private", "--revision", "try/it"]) == 0
    assert hub.repos["lab/net"].private and len(pushed(hub, branch="try/it")) == 1 and not pushed(hub)
    assert main([str(finished), "lab/net", "--private", "--revision", "try/it"]) == 0
    assert len(pushed(hub, branch="try/it")) == 1


def test_checkpoints_for_resume_go_along_if_asked_for(hub, run):
    (run / "states" / "00000001" / "notes.txt").write_text("mine")
    (run / "figures" / "link.png").symlink_to("/etc/hostname")
    assert main([str(run), "lab/net", "--push-states"]) == 0
    names = {f"states/{updates:08d}/{kind}" for updates in (0, 1) for kind in ("state.json", "rank-0.safetensors")}
    found = set(pushed(hub)[0].changed)
    assert names < found and not any(path.endswith((".txt", "link.png")) for path in found)
    assert main([str(run), "lab/net"]) == 0  # they stay where they are
    assert len(pushed(hub)) == 1


# Each of these ends well, in one commit.
PASSING = {
    "info": ("GET .*/lab/net$", [status(503), status(502)], [1, 4]),
    "info cut": ("GET .*/lab/net$", [cut], [1]),
    "create": ("POST /api/repos/create", [status(500), status(429, 7)], [1, 7]),
    "create lost": ("POST /api/repos/create", [lost], [1]),
    "card": ("POST /api/validate-yaml", [status(504, message="<html>")], [1]),
    "preupload": ("POST .*/preupload/", [status(503), status(429, 3), cut], [1, 4, 4]),
    "batch": ("POST .*/objects/batch", [status(429, 2), status(500), cut], [3, 2, 4]),
    "upload": ("PUT ", [status(500), cut, lost], None),
    "verify": ("POST /verify/", [status(503), cut], None),
    "commit busy": ("POST .*/commit/", [status(503), status(429, 20), status(409)], [1, 20, 16]),
    "commit rate": ("POST .*/commit/", [status(429, ratelimit='"api";r=0;t=33')], [33]),
    "commit cut": ("POST .*/commit/", [cut, cut], [1, 4]),
    "commit lost": ("POST .*/commit/", [lost], [1]),
    "commit overtaken": ("POST .*/commit/", [status(412)], [1]),
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_ends_in_one_commit(hub, ready, waits, case):
    pattern, faults, expected = PASSING[case]
    hub.fail(pattern, *faults)
    assert main([str(ready), "lab/net"]) == 0
    (commit,) = pushed(hub)
    assert list(commit.changed) == WHOLE and not any(rest for _, rest in hub.faults)
    assert waits if expected is None else waits == expected


HOPING = [1, 4, 16, 60]

# Each of these ends in one line, and leaves no commit.
LASTING = {
    "unauthorized": ("GET .*/lab/net$", [status(401, message="Invalid credentials")], "answered 401", []),
    "forbidden": ("POST .*/repos/create", [status(403, message="no rights")], "answered 403: no rights", []),
    "vanished": ("POST .*/commit/", [status(404, message="gone")], "answered 404: gone", []),
    "refused": ("POST .*/commit/", [status(400, message="no such\nthing")], "answered 400: no such thing", []),
    "too large": ("POST .*/preupload/", [status(413, message="too large")], "answered 413: too large", []),
    "down": (
        "POST .*/commit/",
        [status(503)] * 9,
        "answered 503: not now; allowed: to try again later",
        HOPING,
    ),
    "overtaken": ("POST .*/commit/", [status(412)] * 9, "answered 412", HOPING),
    "cut": ("POST .*/commit/", [cut] * 9, "cannot be reached: RemoteProtocolError", HOPING),
    "patience": ("POST .*/commit/", [status(429, 3600)], "asks to wait 3600 s; allowed: to try again then", []),
    "patience in an upload": ("PUT ", [status(503, 3600)] * 9, "asks to wait 3600 s", None),
    "no upload": ("PUT ", [status(403, message="expired")] * 9, "answered 403: expired", None),
    "not a Hub": ("GET .*/lab/net$", [status(200, message="<html>")] * 9, "not of the Hub", HOPING),
}


@pytest.mark.parametrize("case", LASTING)
def test_what_lasts_ends_in_one_line_and_no_commit(hub, ready, waits, capsys, case):
    pattern, faults, message, expected = LASTING[case]
    hub.fail(pattern, *faults)
    assert main([str(ready), "lab/net"]) == 2
    error = one_line(capsys)
    assert error.startswith("hf-hub:lab/net cannot be pushed to: ") and message in error
    assert not pushed(hub) and (expected is None or waits == expected)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "20"}, 20),
        ({"Retry-After": "Thu, 01 Jan 2026 00:01:40 GMT"}, 40),
        ({"Retry-After": "Thu, 01 Jan 2026 00:00:00 GMT"}, 0),
        ({"ratelimit": '"api";r=0;t=33', "Retry-After": "20"}, 33),
        ({"ratelimit": '"api";r=5;t=33'}, None),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_how_long_the_hub_asks_to_wait(monkeypatch, headers, seconds):
    monkeypatch.setattr(time, "time", lambda: 1767225660.0)  # a minute into 2026
    assert hub_client.retry_after(headers) == seconds


def test_a_large_file_in_parts(hub, ready, waits, monkeypatch):
    monkeypatch.setattr(hub, "part_size", 200_000)
    hub.fail("PUT ", status(500), cut)
    hub.fail("POST /complete/", status(503, 3), lost)
    assert main([str(ready), "lab/net"]) == 0
    (commit,) = pushed(hub)
    assert list(commit.changed) == WHOLE and len(hub.parts) == 4 and len(waits) == 4 and 4 in waits


def test_an_answer_that_does_not_come_is_not_waited_for(hub, ready, waits, monkeypatch):
    monkeypatch.setattr(hub_client, "TIMEOUT", 0.3)
    hub.fail("POST .*/commit/", slow(1.0))
    assert main([str(ready), "lab/net"]) == 0
    assert waits == [1] and len(pushed(hub)) == 1


def test_a_commit_of_somebody_else_in_between_is_kept(hub, ready, waits):
    def theirs():
        repo = hub.repos["lab/net"]
        repo.commit("main", "theirs", repo.find("main").files | {"notes.txt": File(b"theirs")})

    hub.fail("POST .*/commit/", meanwhile(theirs))
    assert main([str(ready), "lab/net"]) == 0
    ours, before = pushed(hub)
    assert waits == [1] and before.title == "theirs" and list(ours.changed) == WHOLE and "notes.txt" in ours.files


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lab/../net"], "push_to_hub is 'lab/../net'; allowed: ORG/NAME"),
        (["lab/a..b"], "push_to_hub is 'lab/a..b'"),
        (["lab/my net"], "push_to_hub is 'lab/my net'"),
        (["net"], "push_to_hub is 'net'; allowed: ORG/NAME"),
        (["lab/a/b"], "push_to_hub is 'lab/a/b'"),
        (["lab/" + "n" * 93], "at most 96 characters"),
        (["lab/net", "--revision", "../main"], "revision is '../main'; allowed: the name of a branch"),
        (["lab/net", "--revision", "refs/pr/1"], "revision is 'refs/pr/1'"),
        (["lab/net", "--privat"], "unrecognized arguments: --privat"),
        (["lab/net", "--twin", "no twin"], "twin is 'no twin'"),
        (["lab/net", "--license", "My License"], "license is 'My License'"),
        (["readers/net"], "answered 403: You don't have the rights to create a model under the namespace 'readers'"),
    ],
)
def test_names_that_cannot_be(hub, finished, capsys, words, message):
    assert main([str(finished), *words]) == 2
    assert message in one_line(capsys) and not hub.repos


def test_no_token(hub, finished, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert main([str(finished), "lab/net"]) == 2
    assert "needs a token; allowed: after `hf auth login`, or with HF_TOKEN set" in one_line(capsys)
    assert not hub.requests


def test_offline_mode(hub, finished, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main([str(finished), "lab/net"]) == 2
    assert "HF_HUB_OFFLINE is set" in one_line(capsys) and not hub.requests


def test_no_network(hub, waits):
    nowhere = HfApi(endpoint="http://127.0.0.1:1")
    with pytest.raises(hub_client.HubError, match="^what: .* cannot be reached: ConnectError: "):
        hub_client.patiently(nowhere.whoami, "what", waits=(1, 4))
    assert waits == [1, 4]


@pytest.mark.parametrize("user", [User("ada", {"lab": "read"}), User("bob"), User("ada", {"lab": "write"}, "read")])
def test_no_right_to_the_repository(hub, ready, capsys, user):
    HfApi().create_repo("lab/net")
    hub.users["hf_kept_secret"] = user
    assert main([str(ready), "lab/net"]) == 2
    assert "answered 403: You don't have the rights to write to lab/net" in one_line(capsys) and not pushed(hub)


def test_a_private_repository_of_others(hub, finished, capsys):
    HfApi().create_repo("lab/net", private=True)
    hub.users["hf_kept_secret"] = User("bob")
    assert main([str(finished), "lab/net"]) == 2
    assert "answered 403" in one_line(capsys) and not pushed(hub)


def test_what_is_to_be_private_is_not_made_public(hub, finished, capsys):
    HfApi().create_repo("lab/net")
    assert main([str(finished), "lab/net", "--private"]) == 2
    assert "private is True; allowed: not given for 'lab/net', which is public" in one_line(capsys)
    assert not pushed(hub)


@pytest.mark.parametrize("missing", ["results.json", "metrics.jsonl", "checkpoint", "config.yaml"])
def test_a_run_that_has_not_finished(hub, run, capsys, missing):
    (run / missing).rename(run / "elsewhere")
    assert main([str(run), "lab/net"]) == 2
    assert f"has no {missing}" in one_line(capsys) and not hub.requests


@pytest.mark.parametrize("held", ['{"architecture": "resnet18"}', '{"model_type": "bert"}', "[]", "no JSON"])
def test_another_architecture_is_not_overwritten_unawares(hub, ready, capsys, held):
    api = HfApi()
    api.create_repo("lab/net")
    api.upload_file(path_or_fileobj=held.encode(), path_in_repo="config.json", repo_id="lab/net")
    assert main([str(ready), "lab/net"]) == 2
    error = one_line(capsys)
    assert "allowed: 'deq_resnet8_cifar', or --overwrite" in error and len(pushed(hub)) == 1
    assert "'resnet18'" in error or "a model that is not timm's" in error
    assert main([str(ready), "lab/net", "--overwrite"]) == 0
    assert len(pushed(hub)) == 2


@pytest.mark.parametrize("token", ["hf_kept secret", "hf_kept\x01secret", "hf_képt_secret"])
def test_a_token_that_cannot_be_sent_is_not_shown(hub, finished, capsys, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main([str(finished), "lab/net"]) == 2
    error = one_line(capsys)
    assert "needs a token of letters, digits and signs" in error and "kept" not in error and "hf_" not in error


def test_the_token_is_nowhere(hub, run, capsys):
    token = "hf_kept_secret"
    hub.fail("POST .*/commit/", status(400, message=f"Bearer {token} is odd"))
    assert main([str(run), "lab/net"]) == 2
    assert "answered 400: Bearer [token] is odd" in one_line(capsys)
    words, env = [sys.executable, "recipes/push.py", str(run), "lab/net", "--push-states"], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and token not in done.stdout + done.stderr
    for path in run.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes()
    for file in pushed(hub)[0].files.values():
        assert token.encode() not in file.content
    assert [request for request in hub.authorized if "/storage/" in request] == []


def test_the_card_is_valid_and_complete(hub, finished):
    assert main([str(finished), "lab/net", "--twin", "lab/twin", "--license", "mit"]) == 0
    card = ModelCard.load("lab/net")
    card.validate()
    results = json.loads((finished / "results.json").read_text())
    assert card.data.library_name == "timm" and card.data.license == "mit"
    assert {"deep-equilibrium", "neural-collapse", "timm"} <= set(card.data.tags)
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["accuracy"] == results["test"]["overall"]
    assert values["accuracy, minority classes"] == results["test"]["minority"]
    assert json.loads((finished / "manifest.json").read_text())["sha256"] in card.text
    assert "lab/twin" in card.text and "explicit twin" in card.text


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_push_once(hub, finished, tmp_path):
    """A run of two processes, of which one talks to the Hub, and the other waits for it at the start."""
    folder = tmp_path / "run"
    launcher = "accelerate.commands.launch --multi_gpu --quiet --num_processes 2 --num_machines 1 --main_process_port 0"
    words = ["--output", str(folder), "--dataset", str(finished.parent / "data"), "--push_to_hub", "lab/net"]
    words += "--majority 2 --ratio 4 --epochs 1 --max_updates 1 --model_args.max_steps 4 --model_args.tol 0.01".split()
    command = [sys.executable, "-m", *launcher.split(), "recipes/train.py", *words]
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (commit,) = pushed(hub)
    weights = (folder / "checkpoint" / "model.safetensors").read_bytes()
    assert commit.files["model.safetensors"].content == weights
    assert done.stdout.count("hf-hub:lab/net") == 1 and "hf_kept_secret" not in done.stdout + done.stderr
