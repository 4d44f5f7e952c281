"""Reading and writing model files: safetensors folders, ``.gguf`` files, hub ids, published packages."""
