"""How every message to the user is made: one line each."""
import re
from collections.abc import Mapping

_SECRETS = re.compile(r'hf_[A-Za-z0-9]{8,}|(?<=[Bb]earer )\S+|(?<=://)[^/\s]+@|(?<=\w)\?\S+')
_LONGEST = 270  # characters


class AikdError(ValueError):
    """A mistake the user can mend, in one line: what is wrong, the value, what is allowed, the remedy.

    Line breaks and secrets in quoted values are replaced; a text too long for one line loses its middle.
    """

    def __str__(self) -> str:
        text = _SECRETS.sub('***', _printable(super().__str__()))
        return text if len(text) <= _LONGEST else f'{text[:110]} ... {text[-155:]}'


def one_line(error: BaseException, length: int = 80) -> str:
    """The message of any exception in at most `length` characters, without secrets; its type where it has none."""
    text = _SECRETS.sub('***', _printable(str(error))) or type(error).__name__
    return text if len(text) <= length else f'{text[:length - 3]}...'


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    """The text with parameters, which the library names in backticks, replaced by the flags of a command line."""
    return re.sub(r'`(\w+)`', lambda match: flags.get(match[1], match[0]), text)


def _printable(text: str) -> str:
    return ' '.join(''.join(char if char.isprintable() else ' ' for char in text).split())
