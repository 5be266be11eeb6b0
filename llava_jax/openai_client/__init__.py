"""A client of OpenAI-compatible servers: `client` is the public part, `cache` its file, `wire` a single exchange."""

from llava_jax.openai_client.client import Budget, Client, Usage
from llava_jax.openai_client.wire import KEY_VARIABLE, Answer, AskError, Endpoint, Failure, Request

__all__ = ["KEY_VARIABLE", "Answer", "AskError", "Budget", "Client", "Endpoint", "Failure", "Request", "Usage"]
