"""Instruction data: `generate` asks a language model for it, `filters` balances captions, `curate` mends captions."""
