"""The command `python -m llava_jax.convert`: weights of others in, weights for others out.

import SRC DST [--vision TOWER_DIR]    a LLaVA, LLaVA-1.6 or OneVision of Hugging Face or the original code, or a BLIP-2
import ADAPTER_DIR DST --base CHECKPOINT               a LoRA of peft or of the original code
assemble DST --vision TOWER_DIR --llm LLM_DIR          a fresh LLaVA of its parts
assemble DST --vision eva_vit_g.pth --connector blip2_pretrained_flant5xxl.pth --llm LLAMA_DIR    a MiniGPT-4
assemble DST --vision eva_vit_g.pth --image-size 448 --projector minigptv2.pth --llm LLAMA_DIR    a MiniGPT-v2
export --format hf|llava|projector|peft|gguf SRC DST   adapters are merged, or with peft written alone
inspect DIR      verify DIR      merge DIR OUT
verify --served EXPORT --checkpoint DIR [--with transformers,vllm,llama.cpp]    whether others answer as it does
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from llava_jax import cli
from llava_jax.errors import UsageError

# jax, and what brings it, is imported by the functions that need it: a usage error is to be quick.
DTYPES = ("float32", "bfloat16", "float16", "f32", "f16", "q8_0")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 64 usage, 66 no usable checkpoint or weights."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # --help, or a usage error that is printed
        return int(stop.code or 0)
    return cli.run(f"convert {options.verb}", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from llava_jax.convert import exporting, importing, reports

    match options.verb:
        case "import":
            _import(options)
        case "assemble":
            importing.assemble(
                options.destination, options.vision, options.llm, options.projector, options.projector_type,
                options.select_layer, options.seed, _prompt(options), options.connector, options.image_size,
                options.newline, options.cut_tower,
            )  # fmt: skip
        case "export":
            exporting.export(options.format, options.source, options.destination, options.step, options.dtype,
                             options.split_projector)  # fmt: skip
        case "merge":
            reports.merge(options.source, options.destination, options.step)
        case "verify":
            _verify(options)
        case "inspect":
            for line in reports.inspect(options.source, options.step):
                print(line)
    if "destination" in options:
        print(f"{options.verb} has written {options.destination}")
    return 0


def _import(options: argparse.Namespace) -> None:
    from llava_jax.convert import importing, peft_import

    if peft_import.is_adapter(options.source):
        if options.vision is not None:
            raise UsageError(f"--vision {options.vision}: {options.source} is an adapter; its tower is that of --base")
        peft_import.import_adapter(options.source, options.destination, options.base, _prompt(options))
        return
    if options.base is not None:
        raise UsageError(f"--base {options.base}: {options.source} holds no adapter_config.json; leave --base out")
    importing.import_checkpoint(options.source, options.destination, options.vision, _prompt(options))


def _verify(options: argparse.Namespace) -> None:
    from llava_jax.convert import reports, served

    if (options.served is None) != (options.checkpoint is None) or (options.source is None) == (options.served is None):
        raise UsageError("verify: want DIR alone, or --served EXPORT with --checkpoint DIR")
    if options.served is None:
        if options.readers is not None:
            raise UsageError(f"--with {options.readers}: goes with --served EXPORT and --checkpoint DIR")
        print(reports.verify(options.source, options.step))
        return
    names = options.readers and options.readers.split(",")
    for line in served.verify(options.served, options.checkpoint, names, options.step):
        print(line, flush=True)


def _prompt(options: argparse.Namespace) -> Any:
    from llava_jax.convert.prompting import PromptOptions

    legacy = {None: None, "true": True, "false": False}[options.legacy]
    return PromptOptions(options.template, options.image_mode, legacy)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("python -m llava_jax.convert", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("import", help="a LLaVA directory into a checkpoint")
    verb.add_argument("source", metavar="SRC")
    verb.add_argument("destination", metavar="DST")
    verb.add_argument("--vision", metavar="TOWER_DIR", help="the tower of a LLaVA in the original format")
    verb.add_argument("--base", metavar="CHECKPOINT", help="of a LoRA adapter: the imported model it was trained on")
    _add_prompt(verb)
    verb = verbs.add_parser("assemble", help="a fresh LLaVA or MiniGPT-4 of tower, language model, connector")
    verb.add_argument("destination", metavar="DST")
    verb.add_argument("--vision", metavar="TOWER", required=True,
                      help="a CLIP or SigLIP directory, eva_vit_g.pth, or a BLIP-2")  # fmt: skip
    verb.add_argument("--llm", metavar="LLM_DIR", required=True, help="a LLaMA, Mistral, Qwen2 or Qwen3 directory")
    projector = verb.add_mutually_exclusive_group()
    projector.add_argument("--projector", metavar="FILE", help="mm_projector.bin, safetensors, or MiniGPT-4's .pth")
    projector.add_argument("--projector-type", help="a new one: linear, mlp2x_gelu, qformer, perceiver, ...")
    verb.add_argument("--connector", metavar="BLIP2", help="a Q-Former: blip2_pretrained_*.pth, or a BLIP-2 directory")
    verb.add_argument("--select-layer", type=int, help="hidden state of a CLIP or SigLIP, from the end; default -2")
    verb.add_argument("--image-size", type=int, help="pixels a side, to which the tower's positions are interpolated")
    text = "with an image_newline, which ends lines of tiles (prompt.image_mode=anyres)"
    verb.add_argument("--newline", action="store_true", help=text)
    text = "a SigLIP without its last block and its head, as OneVision keeps it"
    verb.add_argument("--cut-tower", action="store_true", help=text)
    verb.add_argument("--seed", type=int, default=0, help="of the new projector and newline")
    _add_prompt(verb)
    verb = verbs.add_parser("export", help="a checkpoint into the files of others")
    text = "projector: mm_projector.bin of a LLaVA, checkpoint.pth of a MiniGPT-4; gguf: for llama.cpp"
    verb.add_argument("--format", choices=("hf", "llava", "projector", "peft", "gguf"), required=True, help=text)
    text = "of peft, for vLLM: a model with the projector, and an adapter of the decoder alone"
    verb.add_argument("--split-projector", action="store_true", help=text)
    text = "of all tensors; default: each its own. f32, f16, q8_0: of gguf's matrices; default: f16"
    verb.add_argument("--dtype", choices=DTYPES, help=text)
    verb.add_argument("source", metavar="SRC")
    verb.add_argument("destination", metavar="DST")
    _add_step(verb)
    verb = verbs.add_parser("inspect", help="what a checkpoint is")
    verb.add_argument("source", metavar="DIR")
    _add_step(verb)
    _add_verify(verbs.add_parser("verify", help="whether every parameter is as it was written, or an export as it"))
    verb = verbs.add_parser("merge", help="a checkpoint with its bases and adapters into one that has none")
    verb.add_argument("source", metavar="DIR")
    verb.add_argument("destination", metavar="OUT")
    _add_step(verb)
    return parser


def _add_verify(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", metavar="DIR", nargs="?")
    verb.add_argument("--served", metavar="EXPORT", help="35 picture prompts are asked of it, and of --checkpoint here")
    verb.add_argument("--checkpoint", metavar="DIR", help="what EXPORT was exported from")
    text = "of transformers, vllm, llama.cpp; default: those that read EXPORT's format and are installed"
    verb.add_argument("--with", metavar="NAME,...", dest="readers", help=text)
    _add_step(verb)


def _add_step(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--step", type=cli.step, metavar="N", help="or best; default: the latest")


def _add_prompt(verb: argparse.ArgumentParser) -> None:
    text = "conversation template; default: what an export of ours kept, or a MiniGPT-4's chat has, else v1"
    verb.add_argument("--template", help=text)
    verb.add_argument("--image-mode", choices=("square", "pad", "squash"), help="default: what the files say")
    text = "of a LLaMA tokenizer; default: its files, of a MiniGPT-4 true"
    verb.add_argument("--legacy", choices=("true", "false"), help=text)


if __name__ == "__main__":
    # Names and shapes need no accelerator, and one that a training run holds must be left alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main())
