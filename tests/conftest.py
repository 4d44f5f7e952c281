import os

# Nothing in the tests may reach a hub; what they need is made here or comes from a package registry.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
