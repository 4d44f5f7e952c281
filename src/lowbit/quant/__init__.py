"""Number formats and their arithmetic, schemes, runtimes' own arithmetic, compressed-tensors layouts."""
