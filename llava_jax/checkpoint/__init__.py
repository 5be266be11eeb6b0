"""Checkpoints: a directory that describes itself (`model_json`), its parameters (`reader`), saves (`manager`)."""
