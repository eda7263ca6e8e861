"""What a session yields while it answers: a `Token` for each token, or one `NothingHeard`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One event of an answer."""

    text: str  # what this event adds to the answer; may be empty
    elapsed_s: float  # since the speech (or the text) was complete


@dataclass(frozen=True)
class Token(Event):
    """One token of the answer."""

    token: int


@dataclass(frozen=True)
class NothingHeard(Event):
    """No word was recognised, so there is no answer: the only event, without text."""

    @property
    def token(self) -> None:
        """None, for programs that ask `event.token is None`; kept for one more version.

        Use `isinstance(event, NothingHeard)` instead.
        """
        return None
