"""What run, listen and chat share: open a bundle, load and seal an assistant, print events."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tiny_align.runtime.checks import Range
from tiny_align.runtime.commands.options import AnsweringOptions

if TYPE_CHECKING:
    from tiny_align.runtime.assistant import Assistant
    from tiny_align.runtime.audio.samples import Recording
    from tiny_align.runtime.bundle.bundle import Bundle
    from tiny_align.runtime.events import Event
    from tiny_align.runtime.llm import Decoding
    from tiny_align.runtime.privacy.sealing import Seal


def open_bundle(options: AnsweringOptions) -> "Bundle":
    """The bundle, after checking the options whose range depends on it.

    Raises:
        TinyAlignError: no sound bundle, or an option out of range.
    """
    from tiny_align.runtime.bundle.bundle import Bundle

    bundle = Bundle.open(options.bundle)
    positions = bundle.manifest.llm.max_context
    if options.context is not None:
        Range(1, positions).check("--context", options.context)
        positions = options.context
    if options.max_tokens is not None:
        Range(1, positions).check("--max-tokens", options.max_tokens)
    return bundle


def load(options: AnsweringOptions, bundle: "Bundle", *, announce: bool = False) -> "Assistant":
    """Load the assistant, a context manager.

    Args:
        announce: say on stderr how much memory it takes, before it does.
    """
    from tiny_align.runtime.assistant import Assistant
    from tiny_align.runtime.backends.budget import budget
    from tiny_align.runtime.bundle.user_folders import find_users

    if announce:
        positions = options.context or bundle.manifest.llm.max_context
        print(f"tiny-align: about {budget(bundle, options.backend, positions)}", file=sys.stderr)
    return Assistant.load(
        bundle,
        options.user,
        users=find_users(bundle, options.user, options.users),
        backend=options.backend,
        threads=options.threads,
        context=options.context,
    )


def prepare_seal(options: AnsweringOptions, bundle: "Bundle") -> "Seal | None":
    """With `--sealed`, restrict writing to the user's directory, before anything is loaded.

    It is the one that `find_users` finds; if it does not exist, nothing can be written.

    Raises:
        TinyAlignError: this system cannot seal a process.
    """
    if not options.sealed:
        return None
    from tiny_align.runtime.bundle.user_folders import find_users
    from tiny_align.runtime.privacy.sealing import Seal

    users = find_users(bundle, options.user, options.users)
    return Seal([users] if users.is_dir() else [])


def close_seal(seal: "Seal | None", *, microphone: bool = False) -> dict[str, Any]:
    """Seal the process, when everything is loaded; what the command's document says about it."""
    return {} if seal is None else {"sealed": seal.close(microphone)}


def decoding(options: AnsweringOptions) -> "Decoding":
    """How the answers are decoded."""
    from tiny_align.runtime.llm import Decoding

    max_tokens = options.max_tokens or Decoding.max_tokens
    return Decoding(max_tokens, options.temperature, seed=options.seed)


def print_notes(recording: "Recording") -> None:
    """Print on stderr what the user should know about a recording."""
    for note in recording.notes:
        print(f"tiny-align: {note}", file=sys.stderr)


def print_events(events: "Iterable[Event]", *, quiet: bool = False) -> "Iterator[Event]":
    """Yield the events of an answer, and print their text as they pass.

    That no word was recognised is said on stderr, with `quiet` too.
    """
    from tiny_align.runtime.events import NothingHeard

    for event in events:
        if isinstance(event, NothingHeard):
            print("tiny-align: no word was recognised in the recording", file=sys.stderr)
        elif not quiet:
            print(event.text, end="", flush=True)
        yield event
    if not quiet:
        print()
