"""Lists the commands: `python -m llava_jax`."""

COMMANDS = {
    "demo": "a tiny LLaVA learns to see, on a laptop",
    "train": "train a config, or resume its run",
    "chat": "talk with a checkpoint about pictures",
    "serve": "a checkpoint behind OpenAI's HTTP API, with a page",
    "evaluate": "benchmarks: answers, then scores",
    "data": "show, validate, measure and prepare training records",
    "datagen": "make instruction data with a language model's API",
    "convert": "weights of transformers, PEFT and LLaVA's own code, in and out",
    "plan": "memory and time of a run on TPUs or GPUs that are not here",
    "doctor": "check a machine before a run",
}


def main() -> int:
    """Prints each command and what it is for."""
    print("llava_jax: LLaVA in JAX. Commands, each with --help:\n")
    for name, text in COMMANDS.items():
        print(f"  python -m llava_jax.{name:10}{text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
