"""Several processes that do one job: who they are, what they tell each other, and the order in which sums are taken."""
