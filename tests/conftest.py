import pytest
import torch

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
