"""The run folder: its layout, what is read back from it, and models made of it."""
