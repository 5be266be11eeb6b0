"""Instruction data: `generate` by a language model, `filters` to balance captions, `curate` for MiniGPT-4's stage 2."""
