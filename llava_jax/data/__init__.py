"""Records on disk to batches on the host: sources, orders, packing, and the checks that keep bad records out."""
