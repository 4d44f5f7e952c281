"""Number formats and their arithmetic, schemes, runtimes' input quantization, compressed-tensors layouts."""
