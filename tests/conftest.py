import os

import pytest
import torch

# Nothing in the tests may reach a hub; what they need is made here or comes from a package registry.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _threads(request):
    """Tiny models run faster on one thread, and much faster where something else keeps the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(before)
