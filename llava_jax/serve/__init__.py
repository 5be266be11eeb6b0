"""A model behind OpenAI's HTTP API, and a page to chat with it: one thread for connections, one for the model."""
