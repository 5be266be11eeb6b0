"""One module for each benchmark, with its rule."""
