"""Every option once: its flag, YAML key, checkpoint entry and row in the table of options come from here."""
import math
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import AikdError
from .loss import ADV_LOSSES, DISC_INPUTS


def _option(default: Any, help: str, **rule: Any) -> Any:
    """A field with its help text and its rule: type, low, high, open_low, choices, word, metavar, several."""
    rule.setdefault('type', type(default))
    return field(default=default, metadata={'help': help, **rule})


@dataclass(frozen=True)
class AikdConfig:
    """All options of AI-KD; the flag of a field is `--aikd-` and its name with dashes.

    Numbers must be finite and within the range that their help text gives.

    Raises:
        AikdError: An option is out of its range or of the wrong type.
    """

    teacher: str | tuple[str, ...] | None = _option(
        None, 'the frozen pre-trained model: hf-hub:ORG/NAME[@REVISION], local-dir:PATH, a weights file, the output '
        'folder of a run (its model_best), a timm model name, or none (kd, feature and adversarial terms off); of '
        'several, the mean of their probabilities', type=str, metavar='SPEC', several=True)
    teacher_model: str | None = _option(
        None, 'architecture of a bare weights file (default: the one stored in it, else --model)',
        type=str, metavar='NAME')
    teacher_dtype: str = _option(
        'auto', 'precision the teacher runs in; auto: as the student',
        choices=('auto', 'float32', 'bfloat16', 'float16'))
    teacher_size: int | None = _option(
        None, 'height and width in pixels that the teacher\'s input is resized to (default: as the student\'s, or what '
        'a teacher of a fixed size insists on)', type=int, low=1, high=8192, metavar='PIXELS')
    teacher_temperature: float | str = _option(
        'auto', 'T_c, divides the teacher\'s logits: below 1 makes it surer, above 1 less sure; auto: fitted on at '
        'most 2,048 validation images before training, 1 without a validation split',
        type=float, low=0, open_low=True, word='auto', metavar='T')
    kd_weight: float = _option(
        1., 'weight of the kd term; 0: no kd. With 0, and D off (--aikd-adv-weight 0) or on features '
        '(--aikd-disc-input features), the teacher\'s classes play no part: any model with as many features serves, '
        'such as the one that the fine-tuning starts from', low=0, metavar='W')
    temperature: float = _option(
        2., 'tau of the kd term: 1 compares the probabilities as they are, large values the logits',
        low=0, open_low=True, metavar='T')
    alpha: float = _option(
        0.8, 'weight of the progressive term in the last epoch, to which it grows from 0; 0: no memory, '
        '1: the targets are ignored at the end', low=0, high=1, metavar='A')
    progressive_temperature: float = _option(
        4., 'tau_p of the progressive term; 1 is PS-KD, larger values compare the less likely classes too',
        low=0, open_low=True, metavar='T')
    feature_weight: float = _option(
        0., 'weight of the feature term, the mean squared difference between the layer-normalised features before the '
        'classifier of the student and of the (first) teacher; 0: no feature term, large values keep the features as '
        'the teacher has them', low=0, metavar='W')
    adv_weight: float = _option(
        0.1, 'weight of the adversarial term; 0: no discriminator', low=0, metavar='W')
    adv_loss: str = _option('bce', 'adversarial loss', choices=ADV_LOSSES)
    adv_warmup: float = _option(
        0., 'epochs over which the adversarial weight grows from 0 while the discriminator already learns; 0: none',
        low=0, metavar='EPOCHS')
    disc_input: str = _option(
        'log-probs', 'what the discriminator sees of a model: its output, or the features before its classifier (of '
        'several teachers, the first one\'s)',
        choices=DISC_INPUTS)
    disc_hidden: tuple[int, ...] = _option(
        (256, 256), 'widths of the discriminator\'s hidden layers', type=int, low=1, high=65536, metavar='W',
        several=True)
    disc_opt: str = _option('adamw', 'optimizer of the discriminator, any first-order one of timm', metavar='NAME')
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
            several = option.metadata.get('several', False) and isinstance(value, (list, tuple))
            for item in value if several else (value,):
                if item is not None or option.default is not None:
                    _check(option.name, item, option.metadata)
        hidden = self.disc_hidden
        object.__setattr__(self, 'disc_hidden', tuple(hidden) if isinstance(hidden, (list, tuple)) else (hidden,))
        object.__setattr__(self, 'teacher', _teachers(self.teacher, self.feature_weight))

    @property
    def teachers(self) -> tuple[str, ...]:
        """The specs of the teachers."""
        return self.teacher if isinstance(self.teacher, tuple) else () if self.teacher is None else (self.teacher,)

    @property
    def has_teacher(self) -> bool:
        """Whether any term needs the teacher."""
        return self.teacher != 'none' and max(self.kd_weight, self.feature_weight, self.adv_weight) > 0

    @property
    def has_kd(self) -> bool:
        """Whether the kd term is on."""
        return self.has_teacher and self.kd_weight > 0

    @property
    def has_feature_term(self) -> bool:
        """Whether the feature term is on."""
        return self.has_teacher and self.feature_weight > 0

    @property
    def has_adversary(self) -> bool:
        """Whether the adversarial term is on."""
        return self.has_teacher and self.adv_weight > 0

    @property
    def uses_features(self) -> bool:
        """Whether any term needs features."""
        return self.has_feature_term or self.has_adversary and self.disc_input == 'features'

    @property
    def uses_classes(self) -> bool:
        """Whether any term needs the teacher's classes."""
        return self.has_kd or self.has_adversary and self.disc_input != 'features'

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as YAML and `torch.load(weights_only=True)` take them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

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


def _teachers(given: Any, feature_weight: float) -> str | tuple[str, ...] | None:
    specs = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not specs:
        raise AikdError('`teacher` []: an empty list; give one spec or several, or none')
    if 'none' in specs and len(specs) > 1:
        raise AikdError(f'`teacher` {" ".join(specs)}: none cannot stand among others; leave it out')
    if specs == ('none',) and feature_weight > 0:
        raise AikdError(f'`feature_weight` {feature_weight:g}: needs a `teacher`, not none: name one, or leave it out')
    return specs if len(specs) > 1 else specs[0]


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


def _is_allowed(value: Any, rule: Any) -> bool:
    if rule['type'] is str:
        return isinstance(value, str) and value != '' and value in rule.get('choices', (value,))
    if value == rule.get('word', math.nan):
        return True
    kinds = (int, float) if rule['type'] is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    in_range = rule['low'] <= value <= rule.get('high', sys.float_info.max)
    return in_range and not (rule.get('open_low') and value == rule['low'])


def _check(name: str, value: Any, rule: Any) -> None:
    if not _is_allowed(value, rule):
        finite = '; numbers must be finite' if value in (math.inf, -math.inf) or value != value else ''
        raise AikdError(f'`{name}` {value!r}: allowed is {_allowed(rule)}{finite}')
