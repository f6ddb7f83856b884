"""What each command of llama4-lab does; `llama4_lab.cli` reads its arguments."""

import argparse
import dataclasses
import io
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import llama4_lab as l4
from llama4_lab.packed import KINDS
from llama4_lab.points import described
from llama4_lab.precision import device_of


def open_lab(options: argparse.Namespace) -> None:
    from llama4_lab.checkpoint.shipped import find
    from llama4_lab.opening import open_notebook, open_page

    loading = {"quantize": options.quantize, "experts": options.experts}
    if options.model is None and any(loading.values()):
        raise ValueError("--quantize and --experts say how --model is loaded: give it, too")
    if options.model is not None and (options.notebook or not options.app):
        raise ValueError("--model is that of the lab's page: give --app and no notebook")
    if not options.app:
        open_notebook(options.notebook, options.port)
    elif options.model is None:
        open_page(options.notebook, options.port)
    else:
        _config(options.model)  # what can be refused is, before the page is there
        open_page(None, options.port, {"name_or_folder": str(find(options.model)), **loading})


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
    edits = l4.edits.loads(options.edits.read_text(encoding="utf-8-sig")) if options.edits else []
    l4.edits.check(edits, config)
    try:
        names = resolve(config, options.points or ["layers.*.router.*"]) if options.out else {}
        if options.out:
            claim(options.out)
        model = l4.load(
            options.model, device=device, quantize=options.quantize, experts=options.experts
        )
        if options.text == "-" and isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig")  # what a file on Windows may begin with
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
            "llama4_lab": own_version(),
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


def _device(options: argparse.Namespace, otherwise: str) -> torch.device:
    """Return the device that is asked for, if it is there; else say what to do."""
    with suppress(ValueError):
        device = device_of(options.device)
        if device.type != "meta":  # which holds no numbers
            return device
    name = "CUDA GPU" if options.device == "cuda" else f"device {options.device!r}"
    raise ValueError(f"no {name} was found: {otherwise}")


def _config(name: str) -> l4.Llama4Config:
    return _described(name)[0]


def _described(name: str) -> tuple[l4.Llama4Config, str | None]:
    """Return the config of a preset, a shipped model or a folder, and how it is packed."""
    from llama4_lab.checkpoint.files import describing, read_json
    from llama4_lab.checkpoint.gguf import GgufFile
    from llama4_lab.checkpoint.huggingface import CONFIG
    from llama4_lab.checkpoint.meta import PARAMS
    from llama4_lab.checkpoint.params import config_from_params
    from llama4_lab.checkpoint.shipped import GGUF, find

    presets = {"scout": l4.SCOUT, "maverick": l4.MAVERICK, "behemoth": l4.BEHEMOTH_ESTIMATE}
    if name.lower() in presets:
        return presets[name.lower()], None
    try:
        folder = find(name)
    except ValueError as error:
        raise ValueError(f"{error}; or {', '.join(presets)}") from None
    if folder.suffix == GGUF and folder.is_file():
        return GgufFile.open(folder).config, None
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


def own_version() -> str:
    try:
        return version("llama4-lab")
    except PackageNotFoundError:
        return "(not installed: run from its folder)"
