"""llama4-lab: open the lab, train, measure, convert, plan and list from the command line."""

import argparse
import dataclasses
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import llama4_lab as l4
from llama4_lab.packed import KINDS
from llama4_lab.plan import PRECISIONS
from llama4_lab.points import described

_DTYPES = ("float32", "bfloat16", "float16")
_CONFIGS = "scout, maverick, behemoth, a shipped model's name, or a folder"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a failure that a user can mend, or a stop, is a sentence, no traceback."""
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no µ
    try:
        options.run(options)
        if sys.stdout:  # else it was closed before us
            sys.stdout.flush()  # a closed pipe shows here, not when Python ends
    except KeyboardInterrupt as stop:
        said = ": ".join(["interrupted", *map(str, stop.args)])
        print(f"\nllama4-lab: {said}", file=sys.stderr)  # below a progress bar
        return 130  # as shells say it: 128 and the signal's number
    except BrokenPipeError:
        # `head` has read enough; what Python still flushes at its end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, ArithmeticError, OSError, RuntimeError) as error:
        print(f"llama4-lab: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="llama4-lab", description=__doc__)
    top.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    sub = command("open", open_lab, "open a notebook in JupyterLab, or with --app as a page")
    sub.add_argument("notebook", nargs="?", type=Path, help="(default with --app: the lab)")
    sub.add_argument("--app", action="store_true", help="show what the cells show, by Voila")
    sub.add_argument("--port", type=_port, help="of this machine (default: one that is free)")

    sub = command("corpus", build_corpus, "fetch, clean and encode the training texts")
    sub.add_argument("folder", type=_folder, help="where to write; some 600 MB are downloaded")
    about = "strict: no copyleft, which leaves some languages without text (default all)"
    sub.add_argument("--licence", choices=("all", "strict"), default="all", help=about)
    sub.add_argument("--allow-missing", action="store_true", help="go on without failed sources")
    sub.add_argument(
        "--held-out", type=_folder, help="also write the cards' free texts to this folder"
    )
    sub.add_argument("--new-tokenizer", action="store_true", help="train one; default: mini's")

    sub = command("train", train_model, "train a model by its recipe, or go on with it")
    sub.add_argument("recipe", choices=("mini", "nano"), help="the shipped model to make again")
    about = "as llama4-lab corpus wrote it (default %(default)s)"
    sub.add_argument("--corpus", type=Path, default=Path("corpus"), help=about)
    sub.add_argument("--out", type=_folder, help="folder of the run (default runs/RECIPE)")
    end = sub.add_mutually_exclusive_group()
    about = "instead of the recipe's; what the vision encoder learns first comes on top"
    end.add_argument("--steps", type=_count, help=about)
    end.add_argument(
        "--budget-minutes", type=_minutes, help="stop after this time, not after steps"
    )
    sub.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")
    sub.add_argument("--teacher", help="a shipped model's name or a folder with the same tokenizer")
    sub.add_argument("--compile", action="store_true", help="torch.compile the layers")
    about = "also write the curves of log.csv for TensorBoard (extra tensorboard)"
    sub.add_argument("--tensorboard", action="store_true", help=about)

    sub = command("card", print_card, "measure a model as its card does, on held-out texts")
    sub.add_argument("model", help="a shipped model's name, or a folder")
    sub.add_argument("--corpus", type=Path, help="held-out texts of a corpus, not the shipped ones")
    sub.add_argument("--json", type=_new_file, help="also write the figures to this file")
    sub.add_argument(
        "--promises",
        choices=("mini", "nano"),
        help="fail if the figures are worse than this shipped model's should be (default: MODEL's)",
    )

    about = "write any checkpoint in our own format, which loads without a copy; can be resumed"
    sub = command("convert", convert, about)
    sub.add_argument("source", help="a shipped model's name, or a folder of either format")
    sub.add_argument("target", type=Path, help="the folder to write")
    sub.add_argument(
        "--quantize",
        choices=KINDS,
        help="the text decoder's linears (default: all weights as they are)",
    )
    sub.add_argument(
        "--hugging-face",
        action="store_true",
        help="in the format that transformers opens, by way of memory; not quantised",
    )
    about = "of the weights that are not packed (default: the files' one)"
    sub.add_argument("--dtype", choices=_DTYPES, help=about)

    sub = command("plan", plan, "count parameters; with --gpu, what fits and how fast it can be")
    about = f"{_CONFIGS}; all is the same as --table"
    sub.add_argument("name", nargs="?", metavar="MODEL", help=about)
    sub.add_argument("--model", help="the same")
    sub.add_argument("--gpu", help="h100, h200, a100, ...; an unknown name lists all")
    sub.add_argument("--num-gpus", type=_count, help="equal GPUs of one machine (default 1)")
    about = "of the text decoder's linears (default: as a folder of ours has them)"
    sub.add_argument("--quantize", choices=KINDS, help=about)
    sub.add_argument("--head", choices=PRECISIONS, help="of the read-out (default: the same)")
    sub.add_argument("--cache-dtype", choices=("bf16", "fp8"), help="(default bf16)")
    sub.add_argument(
        "--context",
        type=_count,
        help="tokens of each row (default 8192, or what the model is made for)",
    )
    sub.add_argument("--batch", type=_count, help="rows that decode together (default 1)")
    sub.add_argument("--table", action="store_true", help="every preset on every GPU, in Markdown")

    sub = command("bench", bench, "measure a seeded full-size model on the GPU at hand")
    sub.add_argument("--model", default="scout", help=f"{_CONFIGS} (default %(default)s)")
    sub.add_argument("--layers", type=_count, help="fewer than the model has")
    sub.add_argument("--quantize", choices=PRECISIONS, default="int4", help="(default int4)")
    sub.add_argument("--minutes", type=_minutes, default=10.0, help="for all (default 10)")
    sub.add_argument("--only", default="", help="stages, with commas; an unknown one lists all")
    sub.add_argument("--json", type=_new_file, help="also write the figures to this file")
    sub.add_argument("--device", default="cuda", help="cpu with --scale tiny (default cuda)")
    sub.add_argument(
        "--scale",
        choices=("full", "tiny"),
        default="full",
        help="tiny tries all stages in a minute",
    )

    about = "run a prompt and print each token's experts; write what the model computes"
    sub = command("trace", trace_prompt, about)
    sub.add_argument("model", help="a shipped model's name, or a folder")
    sub.add_argument("text", help="what the model reads; - takes it from the standard input")
    about = "a picture that the text is a question about; may be given several times"
    sub.add_argument("--image", type=Path, action="append", default=[], help=about)
    sub.add_argument("--chat", action="store_true", help="the text is a user's message")
    about = "what --out keeps; may be given several times (default: layers.*.router.*)"
    sub.add_argument("--points", action="append", metavar="PATTERN", help=about)
    about = "a file of edits in JSON, as Ablate shows them: stars mark what they change"
    sub.add_argument("--edits", type=Path, help=about)
    about = "a new folder for the values, which l4.load_trace opens, and what they are of"
    sub.add_argument("--out", type=_folder, help=about)
    sub.add_argument("--quantize", choices=KINDS, help="(default: the weights as they are)")
    about = "leave the routed experts in their files"
    sub.add_argument("--experts", choices=("mmap",), help=about)
    sub.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")

    sub = command("points", list_points, "list every value that can be watched and changed")
    sub.add_argument("--model", default="maverick", help=f"{_CONFIGS} (default %(default)s)")
    sub.add_argument("--markdown", action="store_true", help="write the page of the documentation")
    return top


def open_lab(options: argparse.Namespace) -> None:
    from llama4_lab.opening import open_notebook, open_page

    (open_page if options.app else open_notebook)(options.notebook, options.port)


def build_corpus(options: argparse.Namespace) -> None:
    from tokenizers import Tokenizer

    from llama4_lab.checkpoint.shipped import MODELS
    from llama4_lab.train import corpus, dataset, held_out, needles, scenes, tokenizer

    folder = options.folder
    report = corpus.build(folder, licence=options.licence, allow_missing=options.allow_missing)
    corpus.write_arithmetic(folder)
    print(corpus.summary(report))
    if options.held_out:
        held_out.write_held_out(folder, options.held_out)
    if options.new_tokenizer:
        words = scenes.WORDS + needles.KEYS + tokenizer.ROLES
        engine = tokenizer.train_tokenizer(tokenizer.balanced_sample(folder), words=words)
    else:
        engine = Tokenizer.from_file(str(MODELS / "mini" / "tokenizer.json"))
    engine.save(str(folder / "tokenizer.json"))
    for name, counts in dataset.encode(folder, engine)["files"].items():
        print(f"{name:18} {counts['tokens']:>10,} tokens {counts['bytes']:>11,} bytes")


def train_model(options: argparse.Namespace) -> None:
    import shutil

    from llama4_lab.precision import product_dtype
    from llama4_lab.train.lessons import Material
    from llama4_lab.train.loop import CHECKPOINT, train
    from llama4_lab.train.recipes import RECIPES
    from llama4_lab.train.step import Teacher

    recipe = RECIPES[options.recipe]
    if options.steps is not None:
        recipe = dataclasses.replace(recipe, steps=options.steps, minutes=None)
    minutes = recipe.minutes if options.budget_minutes is None else options.budget_minutes
    out = options.out or Path("runs") / recipe.name
    device, teacher = _device(options, "train on one, or with --device cpu"), None
    if options.teacher:
        read = l4.load(options.teacher, dtype=product_dtype(device))
        teacher = Teacher(read.to(device).eval())
    files = {name: options.corpus / f"{name}.train.bin" for name in recipe.domains}
    # Under strict licences some languages have no text.
    if empty := [
        name for name, file in files.items() if file.is_file() and not file.stat().st_size
    ]:
        if len(empty) == len(files):
            raise ValueError(f"{options.corpus} has no text at all: build the corpus again")
        print(f"left out, because {options.corpus} has no text of them: {', '.join(empty)}")
        recipe = recipe.without(empty)
    with _going_on(out, CHECKPOINT):
        model = train(
            recipe,
            Material(options.corpus, recipe.config.vision_config),
            out,
            budget_minutes=minutes,
            device=options.device,
            compile=options.compile,
            teacher=teacher,
            tensorboard=options.tensorboard,
        )
        l4.save(model.bfloat16().cpu(), out / "model")
        shutil.copy(options.corpus / "tokenizer.json", out / "model" / "tokenizer.json")
    card = f"llama4-lab card {shlex.quote(str(out / 'model'))} --promises {recipe.name}"
    print(f"saved to {out / 'model'}; measure it with: {card}")


def print_card(options: argparse.Namespace) -> None:
    from llama4_lab.train import card
    from llama4_lab.train.promises import PROMISES, broken

    model = l4.load(options.model, dtype=torch.float32)
    if model.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, and a card is measured on texts")
    texts = card.held_out_texts(options.corpus or card.HELD_OUT)
    trained_on = card.training_tokens(options.corpus) if options.corpus else None
    measured = card.measure(model, texts, trained_on=trained_on)
    print(card.markdown(measured))
    if options.json:
        content = json.dumps(dataclasses.asdict(measured), ensure_ascii=False, indent=1)
        options.json.write_text(content + "\n", encoding="utf-8")
    if options.corpus:
        print(_translated(model, options.corpus))
    promises = PROMISES.get(options.promises or options.model, ())
    if lines := broken(promises, measured):
        raise ValueError("the card breaks its promises: " + "; ".join(lines))
    print(f"{len(promises)} promises kept")


def _translated(model: l4.Llama4, corpus: Path) -> str:
    """Return what a model's routing follows in one text in hundreds of languages."""
    from llama4_lab.train import translations

    texts = translations.read(corpus / "downloads")
    untrained = l4.random(model.config, seed=0)
    untrained.tokenizer = model.tokenizer
    found, control = (translations.measure(each, texts) for each in (model, untrained))
    return translations.markdown(found, control)


def convert(options: argparse.Namespace) -> None:
    from llama4_lab.checkpoint import open_plain
    from llama4_lab.checkpoint.huggingface import HuggingFaceFolder
    from llama4_lab.checkpoint.saving import UNFINISHED
    from llama4_lab.checkpoint.shipped import MODELS, find

    target = options.target.expanduser()
    if not options.hugging_face:
        with _going_on(target / f"{UNFINISHED}conversion", "*.safetensors"):
            dtype = getattr(torch, options.dtype) if options.dtype else None
            l4.convert(options.source, target, quantize=options.quantize, dtype=dtype)
    elif options.quantize:
        raise ValueError(
            f"--quantize {options.quantize} is a format of our own, which --hugging-face is not: "
            "give one of them"
        )
    else:
        folder = find(options.source)
        if target.resolve() == folder.resolve():
            raise ValueError(f"{target} is what is converted: give another folder to write to")
        open_plain(folder)
        # By itself, `load` widens a shipped model.
        dtype = HuggingFaceFolder.open(folder).dtype if folder.parent == MODELS else None
        dtype = getattr(torch, options.dtype) if options.dtype else dtype
        l4.save(l4.load(folder, dtype=dtype), target)
    print(f"saved to {target}")


@contextmanager
def _going_on(folder: Path, kept: str) -> Iterator[None]:
    """Add to an interruption that the same command goes on, if the folder holds what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if any(folder.glob(kept)):
            raise KeyboardInterrupt(
                f"the same command goes on from what is kept in {folder}"
            ) from None
        raise KeyboardInterrupt from None


def plan(options: argparse.Namespace) -> None:
    from llama4_lab import plan_page
    from llama4_lab.hardware import GPUS, find_gpu
    from llama4_lab.plan import Plan

    name = options.name if options.model is None else options.model
    if options.name not in (None, name):
        raise ValueError(f"plan takes one model, not {options.name} and {name}")
    of_gpus = ("num_gpus", "cache_dtype", "context", "batch")
    if options.table or name == "all":
        if name not in (None, "all"):
            raise ValueError(f"--table is about every preset: leave out --table, or {name}")
        why = "about every preset on every GPU: leave it out, or name one model"
        _require_unset(options, ("gpu", "quantize", "head", *of_gpus), why)
        print(plan_page.table_page(), end="")
        return
    if name is None:
        raise ValueError("plan needs a model, or --table")
    config, packed = _described(name)
    weights = options.quantize or packed or "bf16"
    if options.gpu is None:
        _require_unset(options, of_gpus, f"without --gpu; choose {', '.join(GPUS)}")
        print(plan_page.counts(config, weights, options.head))
        return
    planned = Plan(
        config,
        find_gpu(options.gpu),
        options.num_gpus or 1,
        weights=weights,
        cache=options.cache_dtype or "bf16",
        head=options.head,
    )
    print(plan_page.report(planned, options.batch or 1, options.context))


def _require_unset(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} says nothing {why}")


def bench(options: argparse.Namespace) -> None:
    from llama4_lab.bench.base import HEAD, shrunk
    from llama4_lab.bench.run import STAGES, Job, Results, run

    device = _device(
        options,
        "run this on a machine with one, or try the stages here with --device cpu --scale tiny",
    )
    is_tiny = options.scale == "tiny"
    if device.type != "cuda" and not is_tiny:
        raise ValueError(f"the full scale needs a GPU: add --scale tiny to --device {device}")
    only = [name for name in options.only.split(",") if name]
    if unknown := set(only) - set(STAGES):
        raise ValueError(f"unknown stage {min(unknown)!r}; choose {', '.join(STAGES)}")
    config = _config(options.model)
    config = shrunk(config) if is_tiny else config
    if options.layers is not None:
        config = config.replace(num_hidden_layers=options.layers)

    def report(results: Results, line: str) -> None:
        print(line, flush=True)
        if options.json:
            text = json.dumps(results.to_dict(), ensure_ascii=False, indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")

    print(HEAD)
    job = Job(config, options.quantize, options.scale, str(device), options.minutes)
    results = run(job, only, report)
    report(results, results.summary())
    print(", ".join(f"{what} {value}" for what, value in results.machine.items()))
    if results.failures:
        raise RuntimeError(f"stages without all their figures: {', '.join(results.failures)}")


def trace_prompt(options: argparse.Namespace) -> None:
    from llama4_lab.aliases import resolve
    from llama4_lab.checkpoint.shipped import find
    from llama4_lab.prompt.chat import question
    from llama4_lab.spill import claim
    from llama4_lab.trace_report import report

    # What can be refused is, before weights are read.
    device, config = _device(options, "try --device cpu"), _config(str(find(options.model)))
    if options.points and not options.out:
        raise ValueError("--points says what --out keeps: give it a folder, --out FOLDER")
    edits = l4.edits.loads(options.edits.read_text(encoding="utf-8")) if options.edits else []
    l4.edits.check(edits, config)
    try:
        names = resolve(config, options.points or ["layers.*.router.*"]) if options.out else {}
        if options.out:
            claim(options.out)
        model = l4.load(
            options.model, device=device, quantize=options.quantize, experts=options.experts
        )
        text = sys.stdin.read() if options.text == "-" else options.text
        is_question = options.chat or options.image
        asked = question(text, len(options.image)) if is_question else text
        prompt = model.prompt(asked, options.image)
        print(report(model, prompt, edits, names, options.out))
    except KeyError as error:  # an unknown point, or a run that edits take values from
        raise ValueError(error.args[0]) from error
    if options.out:
        facts = {
            "model": options.model,
            "llama4_lab": _version(),
            "tokens": prompt.tokens,
            "input_ids": prompt.input_ids[0].tolist(),
            "edits": json.loads(l4.edits.dumps(edits)),
        }
        content = json.dumps(facts, ensure_ascii=False, indent=1)
        (options.out / "prompt.json").write_text(content + "\n", encoding="utf-8")
        print(f"{len(names)} values written to {options.out}: l4.load_trace({str(options.out)!r})")


def list_points(options: argparse.Namespace) -> None:
    from llama4_lab.points_page import as_markdown

    config = _config(options.model)
    if options.markdown:
        print(as_markdown(config), end="")
        return
    for name, point in described(config).items():
        print(f"{name:40} {point.axes:12} {point.meaning}")


def _count(text: str) -> int:
    """Read a whole number of at least 1; commas and underscores may group its digits."""
    if not (digits := text.replace(",", "").replace("_", "")).isdecimal() or not digits.strip("0"):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    if len(digits) > 18:
        raise argparse.ArgumentTypeError(f"a number of {len(digits)} digits is too large")
    return int(digits)


def _port(text: str) -> int:
    """Read the number of a TCP port."""
    if (port := _count(text)) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give 1 to 65535")
    return port


def _device(options: argparse.Namespace, otherwise: str) -> torch.device:
    """Return the device that is asked for, if it is there; else say what to do."""
    try:
        device = torch.device(options.device)
        if device.type != "cuda" or torch.cuda.is_available():
            torch.ones(1, device=device).tolist()
            return device
    except (RuntimeError, AssertionError, NotImplementedError):
        pass  # so says torch of one that it does not know or have
    name = "CUDA GPU" if options.device == "cuda" else f"device {options.device!r}"
    raise ValueError(f"no {name} was found: {otherwise}")


def _minutes(text: str) -> float:
    """Read a time above zero."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return minutes


def _version() -> str:
    try:
        return version("llama4-lab")
    except PackageNotFoundError:
        return "(not installed: run from its folder)"


def _folder(text: str) -> Path:
    """Read the name of a folder that exists or can be made."""
    if (path := Path(text)).is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file: give the name of a folder")
    return path


def _new_file(text: str) -> Path:
    """Read the name of a file that can be written."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: make {path.parent} first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} may not be written: give another file")
    return path


def _config(name: str) -> l4.Llama4Config:
    return _described(name)[0]


def _described(name: str) -> tuple[l4.Llama4Config, str | None]:
    """Return the config of a preset, a shipped model or a folder, and how it is packed."""
    from llama4_lab.checkpoint.files import describing, read_json
    from llama4_lab.checkpoint.huggingface import CONFIG
    from llama4_lab.checkpoint.meta import PARAMS
    from llama4_lab.checkpoint.params import config_from_params
    from llama4_lab.checkpoint.shipped import find

    presets = {"scout": l4.SCOUT, "maverick": l4.MAVERICK, "behemoth": l4.BEHEMOTH_ESTIMATE}
    if name.lower() in presets:
        return presets[name.lower()], None
    try:
        folder = find(name)
    except ValueError as error:
        raise ValueError(f"{error}; or {', '.join(presets)}") from None
    file, read = folder / CONFIG, l4.Llama4Config.from_dict
    if not file.is_file():
        file, read = folder / PARAMS, config_from_params
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: it needs {CONFIG} (Hugging Face) or {PARAMS} (Meta)"
        )
    raw = read_json(file)
    with describing(file):
        kind = (raw.get("quantization_config") or {}).get("kind")
        return read(raw), kind if kind in KINDS else None


if __name__ == "__main__":
    sys.exit(main())
