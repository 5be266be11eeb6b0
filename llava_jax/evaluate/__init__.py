"""Benchmarks: questions in, an answer file between, numbers out (`python -m llava_jax.evaluate --help`)."""
