"""The loopback Hub against the expectations of huggingface_hub itself, which no code of this project comes between."""

import hashlib
import time

import httpx2
import pytest
from hub_server import cut, half, lost, slow, status
from hub_store import User
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_session,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# lfs.py of huggingface_hub 2.4 passes a file to httpx2 as `data`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

CARD = b"---\nlicense: mit\ntags:\n- deq\n---\n\nA model.\n"


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client would have slept."""
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def repo(api):
    return api.create_repo("lab/net").repo_id


def add(api, files, **kwargs):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit("lab/net", operations, commit_message="some files", **kwargs)


def code(call, *args, **kwargs):
    with pytest.raises(HfHubHTTPError) as caught:
        call(*args, **kwargs)
    return caught.value.response.status_code


def test_who_asks(hub, api):
    about = api.whoami()
    assert about["name"] == "ada" and [org["name"] for org in about["orgs"]] == ["lab", "readers"]
    hub.users.clear()
    assert code(api.whoami) == 401


def test_repositories_are_created_once(hub, api, repo):
    assert repo == "lab/net" and api.repo_exists("lab/net") and not api.repo_exists("lab/other")
    assert code(api.create_repo, "lab/net") == 409
    assert api.create_repo("lab/net", exist_ok=True).repo_id == "lab/net"
    assert api.create_repo("net").repo_id == "ada/net"
    assert code(api.create_repo, "readers/net") == code(api.create_repo, "others/net") == 403
    assert [commit.title for commit in api.list_repo_commits("lab/net")] == ["initial commit"]
    api.auth_check("lab/net", write=True)


def test_private_repositories_are_not_there_for_others(hub, api):
    api.create_repo("lab/net", private=True)
    assert api.model_info("lab/net").private
    hub.users["hf_other"] = User("bob")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token="hf_other").model_info("lab/net")
    assert code(HfApi(token=False).model_info, "lab/net") == 401
    assert code(HfApi(token="hf_wrong").model_info, "lab/net") == 401


@pytest.mark.parametrize("size", [20_000, 3_000_000], ids=["basic", "multipart"])
def test_files_come_back(hub, api, repo, size, waits):
    weights = bytes(range(256)) * (size // 256)
    info = add(api, {"README.md": CARD, "model.safetensors": weights, "figures/a.png": b"png"})
    assert info.oid == api.model_info("lab/net").sha
    found = {entry.path: entry for entry in api.list_repo_tree("lab/net", recursive=True)}
    assert set(found) == {".gitattributes", "README.md", "figures", "figures/a.png", "model.safetensors"}
    assert found["model.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
    assert found["README.md"].lfs is None and found["README.md"].size == len(CARD)
    assert [entry.path for entry in api.list_repo_tree("lab/net", "figures")] == ["figures/a.png"]
    assert [entry.path for entry in api.get_paths_info("lab/net", ["README.md", "absent"])] == ["README.md"]
    with open(hf_hub_download("lab/net", "model.safetensors"), "rb") as file:
        assert file.read() == weights
    with open(hf_hub_download("lab/net", "README.md"), "rb") as file:
        assert file.read() == CARD
    assert api.model_info("lab/net").card_data.license == "mit"
    parts = -(-size // hub.part_size) if size > hub.part_size else 1
    assert sum(request.startswith("PUT") for request in hub.requests) == parts + 1  # the picture is one
    assert not [request for request in hub.authorized if "/storage/" in request or "localhost" in request]


def test_a_long_tree_comes_in_pages(hub, api, repo, monkeypatch):
    monkeypatch.setattr(hub, "page_size", 3)
    add(api, {f"f/{i}.txt": b"%d" % i for i in range(7)})
    found = [entry.path for entry in api.list_repo_tree("lab/net", recursive=True)]
    assert found == [".gitattributes", "f", *(f"f/{i}.txt" for i in range(7))]


def test_revisions(hub, api, repo):
    first = add(api, {"a.txt": b"1"}).oid
    api.create_tag("lab/net", tag="v1")
    api.create_branch("lab/net", branch="try/it")
    add(api, {"a.txt": b"2"}, revision="try/it")
    add(api, {"a.txt": b"3"})
    names = {"main": "3", "v1": "1", "try/it": "2", first: "1"}
    for revision, content in names.items():
        with open(hf_hub_download("lab/net", "a.txt", revision=revision)) as file:
            assert file.read() == content
    refs = api.list_repo_refs("lab/net")
    assert {ref.name for ref in refs.branches} == {"main", "try/it"} and refs.tags[0].target_commit == first
    with pytest.raises(RevisionNotFoundError):
        api.model_info("lab/net", revision="v2")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("lab/net", "a.txt", revision="v2")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("lab/net", "b.txt")
    assert code(api.create_branch, "lab/net", branch="v1") == 409
    assert code(api.create_branch, "lab/net", branch="refs/pr/1") == 400


def test_a_snapshot_is_of_one_commit(hub, api, repo):
    add(api, {"a.txt": b"1", "b/c.safetensors": b"weights"})
    folder = snapshot_download("lab/net")
    add(api, {"a.txt": b"2"})
    assert sorted(hub.repos["lab/net"].find("main").files) == [".gitattributes", "a.txt", "b/c.safetensors"]
    with open(f"{folder}/a.txt") as text, open(f"{folder}/b/c.safetensors", "rb") as weights:
        assert text.read() == "1" and weights.read() == b"weights"


def test_what_has_not_changed_is_not_sent(hub, api, repo):
    files = {"a.txt": b"1", "model.safetensors": b"weights"}
    first = add(api, files).oid
    assert add(api, files).oid == first and len(hub.uploaded) == 1
    second = add(api, {**files, "a.txt": b"2"}).oid
    assert hub.repos["lab/net"].commits[second].changed == ("a.txt",) and len(hub.uploaded) == 1
    api.create_commit("lab/net", [CommitOperationDelete("a.txt")], commit_message="less")
    assert not api.file_exists("lab/net", "a.txt") and len(hub.repos["lab/net"].history()) == 3


def test_a_commit_upon_another_than_the_latest_is_refused(hub, api, repo):
    first = add(api, {"a.txt": b"1"}).oid
    add(api, {"a.txt": b"2"}, parent_commit=first)
    assert code(add, api, {"a.txt": b"3"}, parent_commit=first) == 412
    assert len(hub.repos["lab/net"].history()) == 2


def test_nobody_writes_without_the_right(hub, api, repo):
    hub.users["hf_reader"] = User("ada", {"lab": "write"}, role="read")
    assert code(add, HfApi(token="hf_reader"), {"a.txt": b"1"}) == 403
    assert code(HfApi(token="hf_reader").auth_check, "lab/net", write=True) == 403
    assert not hub.repos["lab/net"].history()


def test_cards_are_validated(hub):
    ModelCard(CARD.decode()).validate()
    for wrong in (b"license: MIT License", b"datasets: [a/b/c]", b"tags: [1]"):
        with pytest.raises(ValueError, match="must be"):
            ModelCard(CARD.replace(b"license: mit", wrong).replace(b"tags:\n- deq\n", b"").decode()).validate()


def test_faults_of_uploads_are_what_the_client_knows(hub, api, repo, waits):
    hub.fail("POST .*/preupload/", status(503), status(429, 7), cut)
    hub.fail("PUT /storage", status(500), cut)
    add(api, {"model.safetensors": b"weights" * 1000})
    assert waits == [1, 8, 4, 1, 2]  # Retry-After, and a second for the rounding
    assert len(hub.repos["lab/net"].history()) == 1


@pytest.mark.parametrize("fault", [cut, lost], ids=["before", "after"])
def test_a_connection_ends_at_the_commit(hub, api, repo, fault, waits):
    hub.fail("POST .*/commit/", fault)
    with pytest.raises(httpx2.TransportError):
        add(api, {"a.txt": b"1"})
    assert len(hub.repos["lab/net"].history()) == (fault is lost) and waits == []


def test_downloads_that_are_cut_go_on(hub, api, repo, waits):
    content = bytes(range(256)) * 90_000  # of more than two of the client's chunks
    add(api, {"model.safetensors": content})
    hub.fail("GET /storage", half)
    with open(hf_hub_download("lab/net", "model.safetensors"), "rb") as file:
        assert file.read() == content
    assert [line for line in hub.requests if line.startswith("GET /storage")][-1].endswith("206") and waits == [1]


def test_ranges(hub, api, repo):
    add(api, {"model.safetensors": b"0123456789"})
    url = f"{hub.url}/lab/net/resolve/main/model.safetensors"
    answer = get_session().get(url, headers={"Range": "bytes=4-"})
    assert answer.status_code == 206 and answer.content == b"456789"
    assert answer.headers["Content-Range"] == "bytes 4-9/10"
    assert get_session().get(url, headers={"Range": "bytes=10-"}).status_code == 416


def test_slow_answers(hub, api, repo):
    hub.fail("GET .*/lab/net", slow(0.5))
    with pytest.raises(httpx2.ReadTimeout):
        api.model_info("lab/net", timeout=0.1)
    api.model_info("lab/net", timeout=0.1)
