"""Sources that are quantized already: how other tools store codes and scales, one file a layout (``layouts.py``)."""
