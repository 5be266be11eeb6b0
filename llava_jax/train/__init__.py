"""Training: an abstract program, the loop that runs it, and the door `python -m llava_jax.train`."""
