"""The options that every command which answers has in common, and what they are turned into."""

import sys
from pathlib import Path

from tiny_align.runtime.backends import registry
from tiny_align.runtime.checks import Range


def add_arguments(parser) -> None:
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--user", help="whose projector; without it, the general one")
    parser.add_argument("--users", type=Path, help="where persons are kept (default: BUNDLE/users)")
    parser.add_argument("--instruction", help="what to do with the speech (default: the bundle's)")
    parser.add_argument(
        "--max-tokens", type=int, help="of an answer (default: 64, or until the context is full)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the best token")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, with a temperature")
    parser.add_argument(
        "--backend",
        default=registry.DEFAULT,
        help=f"{' or '.join(registry.names())} (default: {registry.DEFAULT})",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--context", type=int, help="positions of a conversation (default: the LLM's)"
    )
    parser.add_argument(
        "--sealed", action="store_true", help="once loaded, give up network and writing (Linux)"
    )


def check(args):
    """The bundle, open, after a look at the options that depend on it; the dispatcher has looked at the others.

    Raises:
        TinyAlignError: no sound bundle, or an option out of range.
    """
    from tiny_align.runtime.bundle.bundle import Bundle

    bundle = Bundle.open(args.bundle)
    if args.context is not None:
        Range(1, bundle.manifest.llm.max_context).check("--context", args.context)
    if args.max_tokens is not None:
        Range(1, args.context or bundle.manifest.llm.max_context).check(
            "--max-tokens", args.max_tokens
        )
    return bundle


def load(args, bundle=None):
    """The assistant that was asked for, a context manager; of a bundle that is open already, if there is one."""
    from tiny_align.runtime.assistant import Assistant

    chosen = {name: getattr(args, name) for name in ("users", "backend", "threads", "context")}
    return Assistant.load(bundle or args.bundle, args.user, **chosen)


def load_for_long(args, bundle):
    """`load`, what it will take of memory said before it does."""
    from tiny_align.runtime.backends.budget import budget

    if not args.json:
        need = budget(bundle, args.backend, args.context or bundle.manifest.llm.max_context)
        print(f"tiny-align: about {need}", file=sys.stderr)
    return load(args, bundle)


def prepare_seal(args):
    """With `--sealed`, restrict writing to the users, before anything is loaded.

    Returns:
        What seals the rest, to be called when everything is loaded; it takes whether a microphone
        is open, and returns what the document says about the seal.
    Raises:
        TinyAlignError: this system cannot seal a process.
    """
    from tiny_align.runtime.privacy.sealing import Seal

    if not args.sealed:
        return lambda microphone=False: {}
    users = args.users or args.bundle / "users"
    seal = Seal([users] if users.is_dir() else [])
    return lambda microphone=False: {"sealed": seal.close(microphone)}


def decoding(args):
    from tiny_align.runtime.llm import Decoding

    return Decoding(args.max_tokens or Decoding.max_tokens, args.temperature, seed=args.seed)


def show_notes(recording) -> None:
    """What its owner should know about a recording, on stderr."""
    for note in recording.notes:
        print(f"tiny-align: {note}", file=sys.stderr)
