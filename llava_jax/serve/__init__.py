"""A model behind OpenAI's HTTP API, and a page to talk with it: one thread for connections, one for the model."""
