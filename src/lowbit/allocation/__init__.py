"""``lowbit fit``: the best file of a given size for a target, with a format for every tensor."""
