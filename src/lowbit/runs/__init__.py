"""The run folder: its layout, its readers, and the models loaded from it."""
