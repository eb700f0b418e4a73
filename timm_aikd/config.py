"""Every option once: its flag, YAML key, checkpoint entry and row in the README's table come from here."""
import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from . import AikdError
from .loss import ADV_LOSSES, DISC_INPUTS


def _option(default: Any, help: str, **rule: Any) -> Any:
    """A field with its help text and what `_check` needs: type, low, high, open_low, choices, word, metavar."""
    rule.setdefault('type', type(default))
    return field(default=default, metadata={'help': help, **rule})


@dataclass(frozen=True)
class AikdConfig:
    """All options of AI-KD; the flag of a field is `--aikd-` and its name with dashes.

    Numbers must be finite and within the range that their help text gives.

    Raises:
        AikdError: An option is out of its range or of the wrong type.
    """

    teacher: str | None = _option(
        None, 'the frozen pre-trained model: hf-hub:ORG/NAME[@REVISION], local-dir:PATH, a weights file, the output '
        'folder of a run (its model_best), a timm model name, or none (kd and adversarial terms off)',
        type=str, metavar='SPEC')
    teacher_model: str | None = _option(
        None, 'architecture of a bare weights file (default: the one stored in it, else --model)',
        type=str, metavar='NAME')
    teacher_dtype: str = _option(
        'auto', 'precision the teacher runs in; auto: as the student, but bfloat16 where that is float32, the hardware '
        'is faster in bfloat16 and at least 99.5 % of the top-1 on the first samples stay the same',
        choices=('auto', 'float32', 'bfloat16', 'float16'))
    teacher_size: int | None = _option(
        None, 'height and width in pixels that the teacher\'s input is resized to (default: as the student\'s, or what '
        'a teacher of a fixed size insists on)', type=int, low=1, high=8192, metavar='PIXELS')
    # NLL at 1 / 1.5 / 2 / 3 / auto, ResNet and ViT, validation images of examples/results/accuracy.csv, n = 2:
    # small 0.693 / 0.574 / 0.584 / 0.722 / 0.568, 1.094 / 0.902 / 0.883 / 1.014 / 0.876;
    # noisy 1.198 / 1.008 / 0.999 / 1.095 / 0.998, 0.963 / 1.014 / 1.143 / 1.380 / 0.961
    teacher_temperature: float | str = _option(
        'auto', 'T_c, divides the teacher\'s logits: below 1 makes it surer, above 1 less sure; auto: fitted on at '
        'most 2,048 validation images before training, 1 without a validation split',
        type=float, low=0, open_low=True, word='auto', metavar='T')
    kd_weight: float = _option(
        1., 'weight of the kd term; 0: no kd', low=0, metavar='W')
    temperature: float = _option(
        2., 'tau of the kd term: 1 compares the probabilities as they are, large values the logits',
        low=0, open_low=True, metavar='T')
    # Error % at alpha 0.3 / 0.5 / 0.8, ResNet and ViT, n = 2 (full: seed 0), validation images of
    # examples/results/accuracy.csv: small 19.0 / 19.0 / 19.1, 26.4 / 26.2 / 26.3; noisy 30.6 / 30.1 / 29.9,
    # 28.5 / 28.3 / 28.6; underfit 16.4 / 16.6 / 16.8, 26.1 / 26.3 / 26.4; full 9.7 / 9.8 / 10.1, 17.0 / 17.2 / 17.7
    alpha: float = _option(
        0.3, 'weight of the progressive term in the last epoch, where it has grown to from 0; 0: no memory, '
        '1: the targets are ignored at the end', low=0, high=1, metavar='A')
    # NLL at 2 / 4 with alpha 0.8, n = 2, validation images: small 0.566 / 0.564, 0.874 / 0.871
    progressive_temperature: float = _option(
        4., 'tau_p of the progressive term; 1 is PS-KD, larger values compare the less likely classes too',
        low=0, open_low=True, metavar='T')
    # Error % at 0 / 0.03 (with alpha 0.2) / 0.1, likewise (full: seed 0): small 19.4 / 19.5 / 19.0, 26.3 / 25.9 / 26.4;
    # noisy 30.9 / 30.9 / 30.6, 32.1 / 30.7 / 28.5; full 9.6 / 9.5 / 9.7, 16.5 / 16.5 / 17.0
    adv_weight: float = _option(
        0.1, 'weight of the adversarial term; 0: no discriminator', low=0, metavar='W')
    # Error % at bce / hinge / lsgan / wgan / wgan-gp, n = 5: small 19.5 / 19.5 / 19.6 / 19.7 / 19.7,
    # 26.2 / 26.1 / 26.2 / 26.1 / 25.8; noisy 31.1 / 31.2 / 31.2 / 31.3 / 31.0, 28.2 / 29.2 / 31.1 / 30.8 / 29.7
    adv_loss: str = _option('bce', 'adversarial loss', choices=ADV_LOSSES)
    # NLL in noisy at 0 / 5 / 20, n = 2: 0.998 / 1.001 / 1.010, 0.961 / 0.995 / 1.054
    adv_warmup: float = _option(
        0., 'epochs over which the adversarial weight grows from 0 while the discriminator already learns; 0: none',
        low=0, metavar='EPOCHS')
    # Error % in noisy at probs / log-probs / logits, n = 2: 31.0 / 30.6 / 31.1, 30.6 / 28.5 / 28.2
    disc_input: str = _option('log-probs', 'what the discriminator sees of an output', choices=DISC_INPUTS)
    disc_hidden: tuple[int, ...] = _option(
        (256, 256), 'widths of the discriminator\'s hidden layers', type=int, low=1, high=65536, metavar='W')
    disc_opt: str = _option('adamw', 'optimizer of the discriminator, any first-order one of timm', metavar='NAME')
    # NLL at 1e-4 / 1e-3 / 1e-2, n = 2: noisy 1.001 / 0.998 / 0.997, 1.076 / 0.961 / 0.908; at 1e-3 / 1e-2 small
    # 0.568 / 0.571, 0.876 / 0.867; underfit 0.433 / 0.438, 0.680 / 0.696: 1e-2 is a stronger D
    disc_lr: float = _option(1e-3, 'learning rate of the discriminator', low=0, open_low=True, metavar='LR')
    memory: str = _option(
        'auto', 'where the previous epoch\'s predictions come from; store: a table of each sample\'s prediction at its '
        'last visit; snapshot: a copy of the student as it was, run on the same input, which costs a forward a step; '
        'auto: store where it can', choices=('auto', 'store', 'snapshot'))
    memory_topk: int | str = _option(
        'auto', 'probabilities that the store keeps a sample, the largest ones, at most one a class; auto: all up to '
        '1,024 classes, else 128', type=int, low=1, high=2 ** 20, word='auto', metavar='K')
    memory_dir: str | None = _option(
        None, 'folder that the store\'s table is mapped from, one a host, 2 bytes a probability and sample, 4 to 6 '
        'where only the largest are kept (default: the host\'s folder for temporary files)', type=str, metavar='DIR')
    seed: int = _option(0, 'seeds the discriminator alone', low=0, high=2 ** 63 - 1, metavar='N')

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name == 'disc_hidden':
                values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
                object.__setattr__(self, option.name, values)
            else:
                values = (value,)
            for item in values:
                if item is not None or option.default is not None:
                    _check(_flag(option.name), item, option.metadata)

    @property
    def has_teacher(self) -> bool:
        """Whether any term needs the teacher."""
        return self.teacher != 'none' and (self.kd_weight > 0 or self.adv_weight > 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as YAML and `torch.load(weights_only=True)` take them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> 'AikdConfig':
        """The options among a script's arguments."""
        return cls(**{option.name: getattr(args, f'aikd_{option.name}') for option in fields(cls)})

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add `--aikd` and the options to a parser, as the group "AI-KD"."""
        group = parser.add_argument_group('AI-KD', 'Self-knowledge distillation by the package timm-aikd.')
        group.add_argument('--aikd', action='store_true', default=False, help='switch AI-KD on')
        for option, value in zip(fields(cls), cls().to_dict().values(), strict=True):
            rule = option.metadata
            shown = ' '.join(map(str, value)) if isinstance(value, list) else value
            default = '' if value is None else f' (default: {shown})'
            group.add_argument(
                _flag(option.name),
                type=_number_or(rule['word'], rule['type']) if 'word' in rule else rule['type'],
                nargs='+' if isinstance(value, list) else None,
                default=value,
                metavar=rule.get('metavar') or '{' + ','.join(rule['choices']) + '}',
                help=f'{rule["help"]}{default}'.replace('%', '%%'),
            )

    @classmethod
    def options_table(cls) -> str:
        """The options as a Markdown table."""
        rows = ['| flag | default | allowed | meaning |', '|---|---|---|---|']
        for option, value in zip(fields(cls), cls().to_dict().values(), strict=True):
            rule = option.metadata
            shown = ' '.join(map(str, value)) if isinstance(value, list) else '' if value is None else value
            rows.append(f'| `{_flag(option.name)}` | {shown} | {_allowed(rule)} | {rule["help"]} |')
        return '\n'.join(rows)


def _flag(name: str) -> str:
    return '--aikd-' + name.replace('_', '-')


def _number_or(word: str, kind: Callable[[str], float]) -> Callable[[str], float | str]:
    def number(text: str) -> float | str:
        return text if text == word else kind(text)
    number.__name__ = f'number or {word}'
    return number


def _allowed(rule: Any) -> str:
    if 'choices' in rule:
        return ', '.join(rule['choices'])
    if 'low' not in rule:
        return 'text'
    kind = 'whole number' if rule['type'] is int else 'number'
    low = f'{kind} {">" if rule.get("open_low") else ">="} {rule["low"]}'
    high = f' and <= {rule["high"]}' if 'high' in rule else ''
    word = f', or {rule["word"]}' if 'word' in rule else ''
    return low + high + word


def _check(flag: str, value: Any, rule: Any) -> None:
    if rule['type'] is str:
        fine = isinstance(value, str) and value != '' and value in rule.get('choices', (value,))
    elif 'word' in rule and value == rule['word']:
        fine = True
    else:
        fine = isinstance(value, (int, float) if rule['type'] is float else int) and not isinstance(value, bool)
        fine = fine and rule['low'] <= value <= rule.get('high', sys.float_info.max)
        fine = fine and not (rule.get('open_low') and value == rule['low'])
    if not fine:
        finite = '; numbers must be finite' if value in (math.inf, -math.inf) or value != value else ''
        raise AikdError(f'{flag} {value!r}: allowed is {_allowed(rule)}{finite}')
