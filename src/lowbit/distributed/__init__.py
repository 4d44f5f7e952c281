"""Several processes that do one job: who they are, what they tell each other, and in which order sums are taken."""
