"""Make large language models small enough for phones, laptops and single GPUs, and keep them good."""
