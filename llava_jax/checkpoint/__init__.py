"""Checkpoints: a directory that describes itself (`card`), its leaves (`store`), and training's saves (`manager`)."""
