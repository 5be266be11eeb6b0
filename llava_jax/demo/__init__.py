"""The whole story in miniature: a drawn world, base models that talk about it, and the two stages that let them see."""
