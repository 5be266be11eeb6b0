"""One module for each benchmark, and for each an own rule."""
