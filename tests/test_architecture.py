"""The architecture as a test: which package imports which, which hosts which library, and how large files grow.

A change to PACKAGES, DEPENDENCIES or NO_JAX is a change of the architecture: made on purpose, its reason in the commit.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {p.relative_to(ROOT / "llava_jax").as_posix(): p for p in sorted((ROOT / "llava_jax").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# A package or one of its files -> the packages it may import; the longest match decides.
PACKAGES = {
    "__init__.py": (), "errors": (), "files": (), "streams": (), "known_names": (), "cli": ("known_names",),
    "compilations": (), "heap": (), "lifecycle": (), "distributed": (), "batch": (), "limits": ("batch",),
    "typed": ("known_names",), "config_file": (),
    "config": ("config_file", "typed", "limits"), "params": (), "sharding": ("params",), "chips": (),
    "openai_client": (),
    "prompt": ("batch",),
    "data": ("prompt", "batch", "limits"),
    "__main__.py": (),  # it names the commands and imports none
    "data/__main__.py": ("prompt", "batch", "limits", "config", "train/inputs"),  # validate --config
    "models": ("batch", "sharding", "chips"),
    "checkpoint": ("params",),
    "train": ("chips", "config", "typed", "limits", "batch", "params", "sharding", "models", "data", "checkpoint"),
    # The trainer joins the prompt's format to the data, and sample answers to the loop.
    "train/inputs.py": ("config", "typed", "params", "sharding", "models", "data", "checkpoint", "prompt"),
    "train/__main__.py": ("config",),
    "train/hooks.py": ("params", "data", "generate", "prompt"),
    "train/trainer.py": ("config", "typed", "batch", "params", "sharding", "models", "data", "checkpoint", "generate",
                          "prompt"),
    "generate": ("batch", "params", "sharding", "models", "prompt", "checkpoint"),
    "evaluate": ("generate", "prompt", "data", "openai_client"),
    "evaluate/ablate.py": ("generate", "prompt", "data", "openai_client", "config", "train"),
    "serve": ("generate", "prompt"),
    "chat": ("generate", "prompt"),
    "datagen": ("prompt", "openai_client"),
    "datagen/describer.py": ("prompt", "openai_client", "generate"),
    "datagen/steps.py": ("prompt", "openai_client", "generate"),  # opens the describer's checkpoint
    "convert": ("params", "models", "checkpoint", "prompt"),
    "convert/served.py": ("batch", "params", "models", "checkpoint", "prompt", "generate"),  # asks the checkpoint too
    # The sizes of a model without a preset are those that its base's model.json says.
    "plan": ("config", "chips", "params", "sharding", "models", "train/program", "train/loss", "train/flops",
             "train/memory", "train/fitting", "data/sources", "data/planner", "data/trees", "checkpoint/model_json",
             "prompt/anyres"),
    # It refuses what training refuses: a template that the tokenizer cannot write.
    "plan/__main__.py": ("config", "chips", "plan", "data/sources", "prompt", "checkpoint/model_json"),
    "doctor": ("batch", "chips", "config", "params", "sharding", "prompt", "data", "models", "checkpoint", "train"),
    "demo": ("batch", "config", "params", "sharding", "prompt", "data", "models", "checkpoint", "train", "generate",
             "evaluate", "convert", "chat"),
}  # fmt: skip

# Modules that all others may import.
EVERYBODY = ("errors", "files", "streams", "lifecycle", "distributed", "compilations", "heap")
COMMANDS = ("cli",)  # what files that are commands may import beside their package's own list

# A third-party library -> the packages or files that may import it.
EVERYWHERE = ("",)
DEPENDENCIES = {
    # ml_dtypes is bfloat16 for numpy: files of weights are read and written where jax may not be.
    "ml_dtypes": ("convert", "checkpoint"),
    "numpy": EVERYWHERE, "jax": EVERYWHERE, "jaxtyping": EVERYWHERE, "etils": EVERYWHERE,
    "ml_collections": ("config",),
    "transformers": ("prompt/tokenizer", "convert/readers"), "tokenizers": ("prompt/hub",),
    "sentencepiece": ("prompt/llama",),
    "PIL": ("prompt/images",), "av": ("prompt/video",),
    "grain": ("data",), "pyarrow": ("data/parquet",), "tensorflow_datasets": ("data/tfds", "data/builders"),
    "flax": ("models",), "optax": ("train",), "wandb": ("train/metrics",),
    "gcsfs": ("files",), "fsspec": ("files",),  # what it raises, and reads of a part of an object
    "orbax": ("checkpoint",), "tensorstore": ("checkpoint",),
    "torch": ("convert",), "safetensors": ("convert",), "gguf": ("convert",),
    "vllm": ("convert/readers",), "xllamacpp": ("convert/readers",),  # asked by `verify --served` where installed
    "matplotlib": ("evaluate/report",),
    "starlette": ("serve",), "uvicorn": ("serve",), "h11": ("serve",),
    "httpx2": ("openai_client", "serve/fetcher"),  # huggingface_hub's own client, so it is there already
    "spacy": ("datagen/phrases",),  # imported when asked for; no model of it is on PyPI
}  # fmt: skip
NO_JAX = ("batch", "limits", "known_names", "typed", "config_file", "config", "chips", "prompt", "data",
          "openai_client", "convert/files")  # fmt: skip
PALLAS = ("models/flash", "models/flash_gpu")
# Where a path may be one of pathlib, which turns gs://BUCKET/x into the local path gs:/BUCKET/x, and why.
DISK = {
    "cli": "`on_disk` refuses a bucket", "config": "a config is Python code; a bucket is refused",
    "openai_client": "a cache is locked and grows; a bucket is refused", "demo": "a bucket is refused",
    "evaluate/ablate": "its --workdir; a bucket is refused", "datagen": "its --out; a bucket is refused",
    "prompt": "links on a disk, and temporary folders for transformers", "data/validate": "links on a disk",
    "checkpoint/lock": "the kernel's own files", "doctor": "its own temporary folder, and this package's files",
    "train/trainer": "this package's own files", "compilations": "the user's cache directory",
}


def _within(name: str, place: str) -> bool:
    """'prompt/images.py' lies within 'prompt' and 'prompt/images'; every file lies within ''."""
    return place in ("", name) or name.removesuffix(".py") == place or name.startswith(place + "/")


def _imports(name: str) -> list[str]:
    """Every module that a file imports, at its top or inside a function, as dotted absolute names."""
    modules = []
    package = ["llava_jax", *name.split("/")[:-1]]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules += [f"{base}.{alias.name}" for alias in node.names]
    return modules


def _nodes(kind: type) -> list[tuple[str, ast.AST]]:
    return [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kind)]


def test_a_package_imports_only_those_below_it():
    wrong = []
    for name in FILES:
        package = max((package for package in PACKAGES if _within(name, package)), key=len, default=None)
        assert package is not None, f"llava_jax/{name} belongs to no package of the architecture"
        for module in (m for m in _imports(name) if m.startswith("llava_jax.")):
            target = module.removeprefix("llava_jax.").replace(".", "/")
            own = name.removesuffix(".py").split("/")[0]
            commands = COMMANDS if name.endswith("__main__.py") or name == "chat.py" else ()
            if not any(_within(target, place) for place in (*PACKAGES[package], *EVERYBODY, *commands, own)):
                wrong.append(f"llava_jax/{name} imports {module}; {package} may import {PACKAGES[package]}")
    assert not wrong, "\n".join(wrong)


def test_a_dependency_is_imported_only_where_it_may_be():
    wrong = []
    for name in FILES:
        for module in _imports(name):
            dependency = module.split(".")[0]
            if dependency in sys.stdlib_module_names or dependency == "llava_jax":
                continue
            if not any(_within(name, host) for host in DEPENDENCIES.get(dependency, ())):
                allowed = DEPENDENCIES.get(dependency, "no package")
                wrong.append(f"llava_jax/{name} imports {dependency}; {allowed} may import it")
    assert not wrong, "\n".join(wrong)


def test_jax_and_kernels_keep_to_their_packages():
    wrong = []
    for name in FILES:
        for module in _imports(name):
            if module.split(".")[0] in ("jax", "jaxtyping") and any(_within(name, package) for package in NO_JAX):
                wrong.append(f"llava_jax/{name} imports {module}: it runs before arrays")
            if "pallas" in module and not any(_within(name, place) for place in PALLAS):
                wrong.append(f"llava_jax/{name} imports {module}: kernels live in {' and '.join(PALLAS)}")
            if module.startswith("etils") and not module.startswith("etils.epath"):
                wrong.append(f"llava_jax/{name} imports {module}: only etils.epath is a resident")
    assert not wrong, "\n".join(wrong)


def test_a_path_that_may_be_in_a_bucket_is_none_of_pathlibs():
    wrong = []
    for name, node in _nodes(ast.Call):
        calls = isinstance(node.func, ast.Name) and node.func.id == "Path" and ast.unparse(node) != "Path(__file__)"
        takes = any(word.arg == "type" and ast.unparse(word.value) == "Path" for word in node.keywords)
        if (calls or takes) and not any(_within(name, place) for place in DISK):
            wrong.append(f"llava_jax/{name}:{node.lineno} {ast.unparse(node)[:60]}: want epath.Path")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_small():
    python = [path for folder in ("llava_jax", "tests", "configs") for path in (ROOT / folder).rglob("*.py")]
    limits = [(path, 80 if path.parent.name == "configs" else 400) for path in python]
    long = [f"{path.relative_to(ROOT)} has over {limit} lines" for path, limit in limits
            if len(path.read_text(encoding="utf-8").splitlines()) > limit]  # fmt: skip
    long += [f"llava_jax/{name}: {node.name} has over 50 lines" for name, node in _nodes(ast.FunctionDef)
             if node.end_lineno - node.lineno >= 50 + len((ast.get_docstring(node) or "").splitlines())]  # fmt: skip
    assert not long, "\n".join(long)


def test_there_is_no_utils_and_every_package_is_one():
    assert not [name for name in FILES if Path(name).stem in ("utils", "util", "helpers", "common", "misc")]
    folders = {path.parent for path in FILES.values()}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_nothing_is_guessed_swallowed_or_passed_through():
    calls = [(name, node) for name, node in _nodes(ast.Call) if isinstance(node.func, ast.Name)]
    guesses = [f"{name}:{node.lineno}" for name, node in calls
               if node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)]  # fmt: skip
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values())
    assert len(guesses) <= lines // 1000, f"getattr with a default, or hasattr: {guesses}"
    caught = [(name, node, ast.unparse(node.type) if node.type else "everything")
              for name, node in _nodes(ast.ExceptHandler)]  # fmt: skip
    broad = [f"{name}:{node.lineno} catches {what}" for name, node, what in caught
             if what in ("everything", "Exception", "BaseException")]  # fmt: skip
    assert not broad, "\n".join(broad)
    bags = [f"{name}:{node.lineno} {node.name}(**{node.args.kwarg.arg})" for name, node in _nodes(ast.FunctionDef)
            if node.args.kwarg and node.args.kwarg.arg in ("kwargs", "kw", "options")]  # fmt: skip
    assert not bags, "\n".join(bags)
