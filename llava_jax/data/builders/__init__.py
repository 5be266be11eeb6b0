"""TFDS builders of this project's own data sets."""
