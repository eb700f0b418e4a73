"""The discriminator: an MLP on output vectors, with a sidecar optimizer that steps inside the training step."""
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.optim import create_optimizer_v2

from .loss import discriminator_loss, generator_loss, gradient_penalty, output_vector, pairwise_accuracy

# Optimizers whose fused step can be skipped; that of SGD would keep what happened to be in its new momentum.
_SKIPS = (torch.optim.Adam, torch.optim.AdamW)
_PENALTY_WEIGHT = 10.  # https://arxiv.org/abs/1704.00028, section 4
_WGAN_CLIP = 0.01  # https://arxiv.org/abs/1701.07875, algorithm 1


class Discriminator(nn.Module):
    """Tells the teacher's predictive distribution from the student's.

    Always float32 and outside autocast. Under torch.distributed every rank steps with the gradients averaged over
    the ranks, so that D stays identical on all of them; call `broadcast` once before the first step.

    Args:
        num_classes: Length C of the output vectors.
        hidden: Widths of the hidden layers; empty for a linear discriminator.
        input: What D sees of an output, one of `loss.DISC_INPUTS`.
        loss: Adversarial loss, one of `loss.ADV_LOSSES`.
        opt: Name of any first-order timm optimizer.
        lr: Learning rate of that optimizer, constant over the run.
        seed: Seeds the initial weights and the gradient penalty; the global random streams are not touched.
        binary: Outputs are C independent probabilities (BCE) rather than one distribution.
        device: Where D lives.

    Raises:
        ValueError: The optimizer is unknown, needs second-order gradients or moves the global random stream.
    """

    def __init__(
            self,
            num_classes: int,
            hidden: Sequence[int] = (256, 256),
            input: str = 'log-probs',
            loss: str = 'bce',
            opt: str = 'adamw',
            lr: float = 1e-3,
            seed: int = 0,
            binary: bool = False,
            device: torch.device | None = None,
    ):
        super().__init__()
        if opt.startswith('kron'):
            raise ValueError(f'Discriminator optimizer {opt!r} draws from the global random stream, use another one.')
        self.input, self.loss, self.binary, self.lr = input, loss, binary, lr
        widths = [num_classes, *hidden]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the CUDA streams too
            layers: list[nn.Module] = []
            for fan_in, fan_out in zip(widths, widths[1:], strict=False):
                layers += [nn.Linear(fan_in, fan_out), nn.LeakyReLU(0.2)]
            self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.to(device)
        self.optimizer = _create_optimizer(self.mlp, opt, lr)
        if getattr(self.optimizer, 'is_second_order', False):
            raise ValueError(f'Discriminator optimizer {opt!r} needs second-order gradients, use a first-order one.')
        self._generator = torch.Generator().manual_seed(seed)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> 'Discriminator':
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mlp.float()  # adversarial losses do not survive half precision
        return self

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        """Scores [B] of output vectors [B, C]; the teacher's are pushed up, the student's down."""
        scores: torch.Tensor = self.mlp(vector)
        return scores.squeeze(-1)

    def update(
            self,
            teacher_logits: torch.Tensor,
            logits: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One step of D on a batch; the student's graph is left alone.

        Returns:
            The discriminator loss, how often D told the pair of outputs of a sample apart, and whether D stepped:
            a batch that is not finite on any rank is skipped on all of them.
        """
        parameters = list(self.mlp.parameters())
        with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
            real = output_vector(teacher_logits.detach(), self.input, self.binary)
            fake = output_vector(logits.detach(), self.input, self.binary)
            real_score, fake_score = self(torch.cat([real, fake])).chunk(2)
            loss = discriminator_loss(real_score, fake_score, self.loss)
            total = loss
            if self.loss == 'wgan-gp':
                mix = torch.rand(len(real), 1, generator=self._generator).to(real.device, non_blocking=True)
                total = loss + _PENALTY_WEIGHT * gradient_penalty(self, real, fake, mix)
            gradients = torch.autograd.grad(total, parameters)
        stepped = self._step(parameters, gradients)
        return loss.detach(), pairwise_accuracy(real_score.detach(), fake_score.detach()), stepped

    @torch.no_grad()
    def _step(self, parameters: list[nn.Parameter], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        finite = flat.isfinite().all()
        pieces = flat.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        # A branch on `finite` would make the host wait for the device.
        if isinstance(self.optimizer, _SKIPS) and self.optimizer.param_groups[0]['fused']:
            # GradScaler's way to let a fused step do nothing
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        else:
            self._step_and_take_back(flat, finite)
        if self.loss == 'wgan':
            for parameter in parameters:
                parameter.clamp_(-_WGAN_CLIP, _WGAN_CLIP)
        self.optimizer.zero_grad()
        return finite

    def _step_and_take_back(self, flat: torch.Tensor, finite: torch.Tensor) -> None:
        """A step on zeros where the gradients are not finite, and back to where it was."""
        flat.copy_(torch.where(finite, flat, 0.))
        tensors = self._step_tensors(flat.device)
        before = [tensor.clone() for tensor in tensors]
        self.optimizer.step()
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(finite, tensor, old))

    def _step_tensors(self, device: torch.device) -> list[torch.Tensor]:
        """What a step may change: the weights and the optimizer's state (its counters stay on the host)."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [*self.mlp.parameters(), *(x for x in state if isinstance(x, torch.Tensor) and x.device == device)]

    def generator_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """The student's adversarial loss against D as it is now, D held fixed."""
        fixed = {name: parameter.detach() for name, parameter in self.named_parameters()}
        with torch.autocast(logits.device.type, enabled=False):
            vector = output_vector(logits, self.input, self.binary)
            return generator_loss(torch.func.functional_call(self, fixed, (vector,)), self.loss)

    def broadcast(self) -> None:
        """Give every rank the weights of rank 0."""
        for parameter in self.mlp.parameters():
            dist.broadcast(parameter.data, 0)

    def get_state(self) -> dict[str, Any]:
        """Weights, optimizer and random stream, as tensors and plain containers."""
        return {
            'weights': self.mlp.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'generator': self._generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `get_state` was taken, but at this object's learning rate.

        Raises:
            Exception: Of many kinds, where no step could be taken from there; D is then as it was before.
        """
        before = copy.deepcopy(self.get_state())
        most = max(size for x in self.mlp.parameters() for size in (x.numel(), max(x.shape) ** 2))
        try:
            for entry in state['optimizer']['state'].values():
                if any(isinstance(value, torch.Tensor) and value.numel() > most for value in entry.values()):
                    raise ValueError('Optimizer state larger than any of these weights has.')  # loading might copy it
            self._load(state)
            self._check_step()
        except Exception:
            self._load(before)
            raise
        finally:
            self.optimizer.zero_grad()
        self._load(state)

    def _check_step(self) -> None:
        """Take an optimizer's step on gradients of zero, as torch does not look at what it loads until then."""
        for parameter in self.mlp.parameters():
            parameter.grad = torch.zeros_like(parameter)
            if isinstance(self.optimizer, _SKIPS):  # a fused step would not look, and write beyond the end
                for name, value in self.optimizer.state.get(parameter, {}).items():
                    if value.shape != (() if name == 'step' else parameter.shape) or not value.is_contiguous():
                        raise ValueError(f'Optimizer state {name} of shape {list(value.shape)}.')
        self.optimizer.step()
        tensors = self._step_tensors(next(self.mlp.parameters()).device)
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError('Weights or optimizer state that are not finite.')

    def _load(self, state: dict[str, Any]) -> None:
        self.mlp.load_state_dict(state['weights'])
        groups = [  # with the options that this object was made with
            {**group, **{name: own[name] for name in self.optimizer.defaults if name in own}, 'lr': self.lr}
            for group, own in zip(state['optimizer']['param_groups'], self.optimizer.param_groups, strict=True)]
        # a copy, for torch takes over these very tensors, and a step overwrites them
        self.optimizer.load_state_dict(copy.deepcopy({**state['optimizer'], 'param_groups': groups}))
        self._generator.set_state(state['generator'].cpu())  # wherever torch.load has put it


def _create_optimizer(mlp: nn.Module, opt: str, lr: float) -> torch.optim.Optimizer:
    """The optimizer, fused where it can be: one kernel instead of one a tensor and operation."""
    optimizer = create_optimizer_v2(mlp, opt=opt, lr=lr)
    if isinstance(optimizer, _SKIPS):
        try:
            return create_optimizer_v2(mlp, opt=opt, lr=lr, fused=True)
        except RuntimeError:  # not on this device
            pass
    return optimizer
