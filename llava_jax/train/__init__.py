"""Training: an abstract program, the loop that runs it, the trainer, and the command `python -m llava_jax.train`."""
