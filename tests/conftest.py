import os

import pytest
import torch

# Nothing in the tests may reach a hub; what they need is made here or comes from a package registry.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
THREADS = torch.get_num_threads()


@pytest.fixture(scope="session")
def short_model(tmp_path_factory):
    """The first four layers of SmolLM2, for what the others would not prove better."""
    from real import short_smollm2

    return short_smollm2(tmp_path_factory.mktemp("smollm2") / "short")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Tiny models run faster on one thread, and much faster where something else keeps the cores busy.

    A hook and no fixture: it comes before the fixtures of modules and of the session, which make most of the runs.
    """
    torch.set_num_threads(THREADS if item.get_closest_marker("slow") else 1)
