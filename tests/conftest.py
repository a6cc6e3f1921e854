import os
import socket
import sys
import tempfile

import pytest
import torch

# The Hub of the tests is a port of the loopback, where nobody listens unless a test asks for `hub`: no test leaves the
# machine, and none finds the token or the cache of who runs it. huggingface_hub reads all this when it is imported.
assert "huggingface_hub" not in sys.modules
HUB_LISTENER = socket.socket()
HUB_LISTENER.bind(("127.0.0.1", 0))
HUB_HOME = tempfile.TemporaryDirectory(prefix="hub-")
os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{HUB_LISTENER.getsockname()[1]}",
    "HF_HOME": HUB_HOME.name,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",  # whose protocol the loopback Hub does not speak
}
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HF_DEBUG"):
    os.environ.pop(name, None)

# The tensors here are small: threads would wait for each other longer than they work.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_cpu_and_no_network():
    """For tests that run recipes: they see no accelerator, and `datasets` asks nobody."""
    import datasets  # takes a second to import, and other tests do not need it

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="session")
def hub_server():
    """A Hub on the loopback, to which the unmodified huggingface_hub of this process and of its children is pointed."""
    from hub_server import Hub

    hub = Hub(HUB_LISTENER)
    yield hub
    hub.close()


def fresh_hub(hub, patch, folder):
    """Empty the Hub, let in a user who is logged in here, and begin with an empty cache."""
    from hub_store import User
    from huggingface_hub import constants

    hub.reset()
    hub.users["hf_kept_secret"] = User("ada", {"lab": "write", "readers": "read"})
    patch.setenv("HF_TOKEN", "hf_kept_secret")
    patch.setenv("HF_HUB_CACHE", str(folder))
    patch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return hub


@pytest.fixture
def hub(hub_server, tmp_path, monkeypatch):
    """The Hub, empty, with a user who is logged in, and a cache that is empty."""
    from huggingface_hub import close_session

    yield fresh_hub(hub_server, monkeypatch, tmp_path / "hub_cache")
    close_session()


def pytest_collection_modifyitems(items):
    """Begin with the longest module, timm's own suite, for which a worker would else be waited for at the end."""
    items.sort(key=lambda item: item.path.name != "test_timm_suite.py")
