"""`python -m llava_jax.datagen conversation | detail | reasoning | brief | filter | curate`: make instruction data.

Run again after a kill or an interrupt, each verb resumes where it was: OUT/*_cache.jsonl holds all answers.
"""

import argparse
import sys
from typing import Any

from etils import epath

from llava_jax import cli
from llava_jax.datagen import files, filters, generate, phrases, shots
from llava_jax.datagen.options import DESCRIBE_TOKENS, SHORT_TOKENS, add_endpoint, add_subjects, read_subjects
from llava_jax.datagen.progress import Progress, unanswered
from llava_jax.errors import DataError, UsageError
from llava_jax.files import exists
from llava_jax.openai_client.options import open_client


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; the exit code: 0 done, 64 usage, 65 bad data, 66 no checkpoint, 75 not all answered: run again."""
    options = _parser().parse_args(arguments)
    return cli.run("datagen", lambda: options.run(options),
                   "interrupted; the answers are saved: run the same command again")  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m llava_jax.datagen", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for kind, text in {
        "conversation": "questions and answers about each picture, from its captions alone",
        "detail": "a long description of each picture, from captions and boxes",
        "reasoning": "one question that takes thought, and its answer, from captions and boxes",
    }.items():
        sub = verbs.add_parser(kind, help=text, description=text)
        sub.set_defaults(run=_generate, kind=kind)
        add_subjects(sub)
        add_endpoint(sub)
        sub.add_argument("--attempts", type=int, default=1, help="the most requests until an answer is not refused")
        _add_out(sub)
        _add_prompts(sub)
    sub = verbs.add_parser("brief", help="stage 1's records: a brief question and a caption; needs no server")
    sub.set_defaults(run=_brief)
    add_subjects(sub)
    _add_out(sub)
    _add_prompts(sub)
    _add_filter(verbs)
    _add_curate(verbs)
    return parser


def _add_out(sub: argparse.ArgumentParser, with_seed: bool = True) -> None:
    sub.add_argument("--out", metavar="DIR", required=True, type=cli.on_disk, help="a folder on a disk")
    if with_seed:
        sub.add_argument("--seed", type=int, default=0, help="of all random choices (by each picture's id)")


def _add_prompts(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--prompts", metavar="DIR", default=shots.PROMPTS,
                     help="in place of ours, laid out as LLaVA's playground/data/prompts")  # fmt: skip
    sub.add_argument("--questions", metavar="FILE", help="questions, one a line, in place of ours")


def _add_filter(verbs: Any) -> None:
    text = "select captions so that every noun phrase occurs and none occurs too often (CC3M to 595K)"
    sub = verbs.add_parser("filter", help=text, description=text)
    sub.set_defaults(run=_filter)
    sub.add_argument("--records", metavar="FILE", required=True, help=".json list or .jsonl of {id, image, caption}")
    sub.add_argument("--phrases", default="runs", metavar="HOW",
                     help="runs (a rule of thumb; the default), spacy:MODEL, or a .jsonl of {id, phrases}")  # fmt: skip
    sub.add_argument("--least", type=int, default=filters.LEAST, help="skip rarer phrases; default 3")
    sub.add_argument("--most", type=int, default=filters.MOST, help="captions of a frequent phrase; default 100")
    sub.add_argument("--literal", action="store_true", help="even if the pool holds as many with the phrase already")
    _add_out(sub)


def _add_curate(verbs: Any) -> None:
    text = "MiniGPT-4's second stage data from pictures, step by step, all in one --out"
    steps = verbs.add_parser("curate", help=text, description=text).add_subparsers(required=True, metavar="STEP")

    def step(name: str, text: str) -> argparse.ArgumentParser:
        sub = steps.add_parser(name, help=text, description=text)
        sub.set_defaults(run=_curate, step=name)
        _add_out(sub, with_seed=name in ("describe", "export"))
        return sub

    sub = step("describe", "a checkpoint or an endpoint describes each picture, and continues short descriptions")
    sub.add_argument("--images", metavar="DIR", required=True)
    sub.add_argument("--checkpoint", metavar="DIR", help="the describer; or give --base-url and --model")
    sub.add_argument("--template", help="of the checkpoint's prompt, if not its own; of a stage 1's: v0, or minigpt4")
    sub.add_argument("--slots", type=int, default=8, help="pictures at once on this machine; default 8")
    sub.add_argument("--sample", type=int, help="a random sample of the pictures, by --seed (MiniGPT-4: 5000)")
    sub.add_argument("--short-tokens", type=int, default=SHORT_TOKENS, help="the longest short description; default 80")
    sub.add_argument("--prompts", metavar="DIR", default=shots.PROMPTS, help="holds curation/*.txt in place of ours")
    add_endpoint(sub, required=False, max_new_tokens=DESCRIBE_TOKENS)
    sub = step("correct", "a language model corrects the language of each description")
    sub.add_argument("--prompts", metavar="DIR", default=shots.PROMPTS, help="holds curation/*.txt in place of ours")
    add_endpoint(sub)
    step("filter", "rules drop bad descriptions, with the reason")
    sub = step("review", "pages on which a person accepts, edits or rejects each one")
    sub.add_argument("--images", metavar="DIR", required=True)
    sub.add_argument("--per-page", type=int, default=200, help="pictures; default 200")
    sub = step("export", "filter_cap.json with image/ for MiniGPT-4, llava.json for LLaVA")
    sub.add_argument("--images", metavar="DIR", required=True)
    sub.add_argument("--decisions", metavar="FILE", nargs="+", help="what the review pages saved")
    sub.add_argument("--no-review", action="store_true", help="export all that no rule dropped, without a review")
    sub.add_argument("--prompts", metavar="DIR", default=shots.PROMPTS, help="holds curation/instructions.txt")


def _generate(options: argparse.Namespace) -> int:
    if options.attempts < 1:
        raise UsageError(f"--attempts {options.attempts}: want at least 1")
    pictures = read_subjects(options)
    questions = _questions(options, shots.DETAIL)
    job = generate.Job(options.kind, shots.read(options.kind, options.prompts), questions, options.seed,
                       options.attempts, options.temperature, options.max_new_tokens)  # fmt: skip
    with open_client(options, options.out / f"{options.kind}_cache.jsonl") as client:
        progress = Progress(options.kind, len(pictures), lambda: client.usage)
        result = generate.make(client, pictures, job, progress)
        usage = client.usage
    report = generate.write(options.out, job, pictures, result, usage._asdict())
    print(f"{options.out / options.kind}.json: {report['records']:,} records of {len(pictures):,} pictures, "
          f"{report['refused']:,} answers refused {report['refused_reasons'] or ''}")  # fmt: skip
    print(usage)
    code = unanswered([row["reason"] for row in result.unanswered])
    if not code and not result.records:
        raise DataError(f"{options.out / options.kind}.json holds no record: all {report['refused']:,} answers were "
                        f"refused, {report['refused_reasons']}: see {options.kind}_rejects.jsonl")  # fmt: skip
    return code


def _brief(options: argparse.Namespace) -> int:
    pictures = read_subjects(options)
    records = generate.brief(pictures, _questions(options, shots.BRIEF), options.seed)
    files.write_json(options.out / "brief.json", records)
    print(f"{options.out / 'brief.json'}: {len(records):,} records")
    return 0


def _questions(options: argparse.Namespace, name: str) -> Any:
    """The user's file, or the prompts folder's, or ours: LLaVA's own folder holds no questions."""
    if options.questions:
        return shots.lines(options.questions, "")
    path = epath.Path(options.prompts) / name
    return shots.lines(name, options.prompts if exists(path) else shots.PROMPTS)


def _filter(options: argparse.Namespace) -> int:
    rows = list(files.read_rows(options.records))
    captions = [files.field(row, where, "caption", str, "a text") for where, row in rows]
    match options.phrases.split(":", 1):
        case ["runs"]:
            phrase_lists = map(phrases.runs, captions)
        case ["spacy", model]:
            phrase_lists = map(phrases.spacy_chunks(model), captions)
        case _:
            phrases_by_id = phrases.from_file(options.phrases)
            identities = [str(files.field(row, where, "id", str | int, "a text or a number")) for where, row in rows]
            missing = [identity for identity in identities if identity not in phrases_by_id]
            if missing:
                raise DataError(f"{options.phrases}: no phrases of {len(missing)} records, {missing[0]!r} the first")
            phrase_lists = (phrases_by_id[identity] for identity in identities)
    captions_phrases = list(map(tuple, phrase_lists))
    selection = filters.balance(captions_phrases, options.least, options.most, not options.literal, options.seed)
    settings = {name: vars(options)[name] for name in ("least", "most", "literal", "phrases", "seed")}
    report = {"options": settings, "records": len(rows), **selection._asdict(), "kept": len(selection.kept)}
    files.write_json(options.out / "filtered.json", [rows[index][1] for index in selection.kept])
    files.write_json(options.out / "filter_report.json", report)
    print(f"{options.out / 'filtered.json'}: {len(selection.kept):,} of {len(rows):,} captions; {selection.phrases:,} "
          f"phrases, {selection.rare:,} of them rarer than {options.least}, {selection.thinned:,} more frequent than "
          f"{options.most}; {selection.without:,} captions have only rare ones")  # fmt: skip
    if not selection.kept:
        raise DataError(f"{options.records}: no caption is left of {len(rows):,}: lower --least {options.least}")
    return 0


def _curate(options: argparse.Namespace) -> int:
    from llava_jax.datagen import steps  # here only: it opens pictures, which the other verbs do not

    return steps.STEPS[options.step](options)


if __name__ == "__main__":
    sys.exit(main())
