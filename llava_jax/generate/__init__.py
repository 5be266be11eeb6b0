"""Answers: `assistant` talks in conversations, `engine` and `sampling` make ids, `stream` makes text of them."""
