"""LLaVA and MiniGPT-4 in miniature: a synthetic world, base models that know its texts, and the two training stages."""
