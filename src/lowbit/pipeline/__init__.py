"""From a recipe to a run folder: resolve, check, walk the blocks, tune end to end, finalize."""
