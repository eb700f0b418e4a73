"""The AI-KD options on a training script's command line, and what a parse of them does."""
import argparse
import difflib
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

from ..config import AikdConfig
from ..errors import AikdError, with_flags
from ..ranks import logger
from . import bindings

FLAGS = {option.name: '--aikd-' + option.name.replace('_', '-') for option in fields(AikdConfig)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--aikd` and the options to a parser, as the group "AI-KD"."""
    group = parser.add_argument_group('AI-KD', 'Self-knowledge distillation by the package timm-aikd.')
    group.add_argument('--aikd', action='store_true', default=False, help='switch AI-KD on')
    for option, value in zip(fields(AikdConfig), AikdConfig().to_dict().values(), strict=True):
        rule = option.metadata
        shown = ' '.join(map(str, value)) if isinstance(value, list) else value
        default = '' if value is None else f' (default: {shown})'
        group.add_argument(
            FLAGS[option.name],
            type=_number_or(rule['word'], rule['type']) if 'word' in rule else rule['type'],
            nargs='+' if rule.get('several') else None,
            default=value,
            metavar=rule.get('metavar') or '{' + ','.join(rule['choices']) + '}',
            help=f'{rule["help"]}{default}'.replace('%', '%%'),
        )


def config_of(args: argparse.Namespace) -> AikdConfig:
    """The options among a script's arguments.

    Raises:
        AikdError: One is out of its range or of the wrong type.
    """
    return AikdConfig(**{name: getattr(args, f'aikd_{name}') for name in FLAGS})


def adopt(parser: argparse.ArgumentParser, script: dict[str, Any]) -> None:
    """Add the options to a script's parser and let its parses decide whether the script trains with AI-KD.

    Only this parser is changed, not its class: the script may parse again, with or without `--aikd`.
    """
    def parse_known_args(
            self: argparse.ArgumentParser,
            args: Any = None,
            namespace: Any = None,
            *more: Any,
            **kwargs: Any,
    ) -> tuple[argparse.Namespace, list[str]]:
        words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, rest = type(self).parse_known_args(self, args, namespace, *more, **kwargs)
        if isinstance(parsed.aikd_teacher, list) and len(parsed.aikd_teacher) == 1:
            parsed.aikd_teacher = parsed.aikd_teacher[0]
        bindings.restore(script)
        try:
            _refuse_unknown(parsed, rest)
            _follow(parsed, words, script)
        except AikdError as error:
            self.error(with_flags(str(error), FLAGS))
        return parsed, rest

    add_arguments(parser)
    parser.parse_known_args = types.MethodType(parse_known_args, parser)  # type: ignore[method-assign]


def _follow(parsed: argparse.Namespace, words: list[str], script: dict[str, Any]) -> None:
    """Do what a parse asks for.

    Raises:
        AikdError: It cannot be done.
    """
    if parsed.aikd not in (True, False):
        raise AikdError(f'--aikd {parsed.aikd!r}: allowed is true or false, without quotes')
    if parsed.aikd:
        bindings.apply(script, parsed)
        return
    for word in words:
        if word.startswith('--aikd-'):
            raise AikdError(f'{word.partition("=")[0]} does nothing without --aikd: add --aikd or leave it out')
    for name, default in AikdConfig().to_dict().items():
        if getattr(parsed, f'aikd_{name}') != default:  # a saved args.yaml of a plain run has the defaults
            logger.warning(f'AI-KD: aikd_{name} is set, but aikd is not: this is plain training')
            break
    if getattr(parsed, 'resume', None):
        _warn_of_resume(parsed)


def _warn_of_resume(parsed: argparse.Namespace) -> None:
    from .arguments import resumed_state  # needs timm

    if resumed_state(parsed) is not None:
        logger.warning(f'AI-KD: --resume {parsed.resume} is of a run with --aikd; this run goes on without it')


def _refuse_unknown(parsed: argparse.Namespace, rest: list[str]) -> None:
    for word in rest:
        if str(word).startswith('--aikd'):
            flag = word.partition('=')[0].replace('_', '-')
            raise AikdError(f'unrecognized arguments: {" ".join(rest)}{_closest(flag, FLAGS.values())}')
    known = ['aikd', *(f'aikd_{name}' for name in FLAGS)]
    for key in vars(parsed):  # a YAML file's
        if key.startswith('aikd') and key not in known:
            raise AikdError(f'{key}: unknown option{_closest(key.replace("-", "_"), known)}')


def _closest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, known, 1)
    return f'; did you mean {found[0]}' if found else ''


def _number_or(word: str, kind: Callable[[str], float]) -> Callable[[str], float | str]:
    def number(text: str) -> float | str:
        return text if text == word else kind(text)
    number.__name__ = f'number or {word}'
    return number
