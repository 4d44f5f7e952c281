"""Where a run loses quality, and where more bits recover it: layer sensitivity, bit allocation, proposals."""
