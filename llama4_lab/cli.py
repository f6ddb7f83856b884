"""llama4-lab: open the lab, train, measure, convert, plan and list from the command line."""

import argparse
import io
import os
import sys
from pathlib import Path

from llama4_lab import commands
from llama4_lab.packed import KINDS
from llama4_lab.plan import PRECISIONS

_DTYPES = ("float32", "bfloat16", "float16")
_CONFIGS = "scout, maverick, behemoth, a shipped model's name, a folder, or a file of GGUF"


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
    except (ValueError, ArithmeticError, OSError, RuntimeError, ImportError) as error:
        print(f"llama4-lab: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="llama4-lab", description=__doc__)
    top.add_argument("--version", action="version", version=f"%(prog)s {commands.own_version()}")
    subs = top.add_subparsers(required=True, metavar="COMMAND")
    for arguments, run, about in (
        (_open, commands.open_lab, "open a notebook in JupyterLab, or with --app as a page"),
        (_corpus, commands.build_corpus, "fetch, clean and encode the training texts"),
        (_train, commands.train_model, "train a model by its recipe, or go on with it"),
        (_card, commands.print_card, "measure a model as its card does, on held-out texts"),
        (
            _convert,
            commands.convert,
            "write any checkpoint in our own format, which loads without a copy; can be resumed",
        ),
        (_plan, commands.plan, "count parameters; with --gpu, what fits and how fast it can be"),
        (_bench, commands.bench, "measure a seeded full-size model on the GPU at hand"),
        (
            _trace,
            commands.trace_prompt,
            "run a prompt and print each token's experts; write what the model computes",
        ),
        (_points, commands.list_points, "list every value that can be watched and changed"),
    ):
        sub = subs.add_parser(arguments.__name__[1:], help=about, description=about)
        sub.set_defaults(run=run)
        arguments(sub)
    return top


def _open(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("notebook", nargs="?", type=Path, help="(default with --app: the lab)")
    sub.add_argument("--app", action="store_true", help="show what the cells show, by Voila")
    sub.add_argument("--port", type=_port, help="of this machine (default: one that is free)")
    about = "of the lab's page: a shipped model's name, a folder, or a file of GGUF (default mini)"
    sub.add_argument("--model", help=about)
    _add_loading(sub)


def _add_loading(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--quantize", choices=KINDS, help="(default: the weights as they are)")
    about = "leave the routed experts in their files"
    sub.add_argument("--experts", choices=("mmap",), help=about)


def _corpus(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=_folder, help="where to write; some 600 MB are downloaded")
    about = "strict: no copyleft, which leaves some languages without text (default all)"
    sub.add_argument("--licence", choices=("all", "strict"), default="all", help=about)
    sub.add_argument("--allow-missing", action="store_true", help="go on without failed sources")
    sub.add_argument(
        "--held-out", type=_folder, help="also write the cards' free texts to this folder"
    )
    sub.add_argument("--new-tokenizer", action="store_true", help="train one; default: mini's")


def _train(sub: argparse.ArgumentParser) -> None:
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


def _card(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="a shipped model's name, a folder, or a file of GGUF")
    sub.add_argument("--corpus", type=Path, help="held-out texts of a corpus, not the shipped ones")
    sub.add_argument("--json", type=_new_file, help="also write the figures to this file")
    sub.add_argument(
        "--promises",
        choices=("mini", "nano"),
        help="fail if the figures are worse than this shipped model's should be (default: MODEL's)",
    )


def _convert(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "source", help="a shipped model's name, a folder of either format, or a file of GGUF"
    )
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


def _plan(sub: argparse.ArgumentParser) -> None:
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


def _bench(sub: argparse.ArgumentParser) -> None:
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


def _trace(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", help="a shipped model's name, a folder, or a file of GGUF")
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
    _add_loading(sub)
    sub.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")


def _points(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", default="maverick", help=f"{_CONFIGS} (default %(default)s)")
    sub.add_argument("--markdown", action="store_true", help="write the page of the documentation")


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


def _minutes(text: str) -> float:
    """Read a time above zero."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return minutes


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


if __name__ == "__main__":
    sys.exit(main())
