"""The command `tiny-align`: a table of sub-commands, each in its own stage and loaded only when called.

Every command's last line on stdout is one JSON document, with --json the only one. What was given wrongly
is one sentence on stderr and exit status 2. A command that finds something wrong gives its own `exit_status`.
"""

import argparse
import json
import sys
from importlib import import_module

from tiny_align.runtime.errors import TinyAlignError

COMMANDS = {  # name -> (module, what it does, the extra that installs what it needs)
    "demo": ("tiny_align.align.demo", "personalise the shipped bundle to a new voice and talk to it", "demo"),
    "align": (
        "tiny_align.align.personalise",
        "train a person's projector or the general one",
        "align",
    ),
    "enroll": ("tiny_align.align.enroll", "get to know a person: sentences to read, checks, training", "enroll"),
    "eval": ("tiny_align.align.evaluate", "measure a bundle or a person on a data set", "align"),
    "export": ("tiny_align.export.command", "export encoder, projector and LLM into a bundle", "export"),
    "build-engines": ("tiny_align.engines.commands", "build TensorRT engines for a bundle's graphs", "trt"),
    "run": ("tiny_align.runtime.run", "answer a recording", None),
    "listen": ("tiny_align.runtime.listen", "talk with it: a microphone, or recordings played to it", "listen"),
    "chat": ("tiny_align.runtime.chat", "talk with it in typed turns", None),
    "bench": ("tiny_align.benchmarks.command", "measure this machine, beside what would be used instead", "bench"),
    "doctor": ("tiny_align.runtime.doctor", "say what this machine can do and what it lacks", None),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tiny-align", description="Talk to a language model in your own voice.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about, _) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        import_module(module).add_arguments(command)
        command.add_argument("--json", action="store_true", help="print nothing but the JSON document on stdout")
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    module, _, extra = COMMANDS[args.command]
    try:
        result = import_module(module).run(args)
    except TinyAlignError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("tiny_align"):
            raise
        return _fail(f"{args.command} needs the package {error.name}: pip install 'tiny-align[{extra}]'")
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    status = result.pop("exit_status", 0)
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return status


def _fail(message: str, status: int = 2) -> int:
    print(f"tiny-align: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
