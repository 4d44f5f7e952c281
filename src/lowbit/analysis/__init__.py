"""Where a run loses quality, and which bits would buy it back: layer sensitivity, bit allocation, proposals."""
