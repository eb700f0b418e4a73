"""The Python API in your own training loop: scikit-learn's digits, a small MLP, half a minute.

    pip install 'timm-aikd[examples]'
    python examples/custom_loop.py
"""
import torch
import torch.nn as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from timm_aikd import AikdConfig, AikdTask, RecordFormat, StoreMemory

EPOCHS = 60


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    model.num_classes = 10  # AikdTask asks the student for it
    return model


def fit(task: AikdTask, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Train the task's model and return it in eval mode. This is the loop."""
    torch.manual_seed(0)  # the same batches for every task
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=3e-3)
    for epoch in range(EPOCHS):
        task.begin_epoch(epoch)
        for batch in torch.randperm(len(x)).split(32):
            result = task(x[batch], y[batch], batch)  # the store needs the indices of the samples
            result['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
        metrics = task.end_epoch()
    print({name: round(value, 3) for name, value in metrics.items()})
    return task.get_trainable_module().eval()


def main() -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    train, rest = map(torch.tensor, train_test_split(range(len(y)), train_size=500, stratify=y, random_state=0))
    validation, test = rest[:300], rest[300:]

    plain = AikdConfig(teacher='none', alpha=0)  # all terms off
    teacher, baseline = (
        fit(AikdTask(mlp(seed), nn.CrossEntropyLoss(), config=plain, epochs=EPOCHS), x[train], y[train])
        for seed in (0, 1))

    task = AikdTask(mlp(1), nn.CrossEntropyLoss(), teacher=teacher, config=AikdConfig(), epochs=EPOCHS)
    task.aikd.use_memory(StoreMemory(RecordFormat(10), len(train)))  # no loader tells which samples a batch holds
    task.calibrate([(x[validation], y[validation])])  # fits T_c
    student = fit(task, x[train], y[train])

    for name, model in (('teacher', teacher), ('baseline', baseline), ('AI-KD', student)):  # the last two: seed 1
        logits = model(x[test])
        accuracy = (logits.argmax(-1) == y[test]).float().mean().item()
        print(f'{name}: top-1 {100 * accuracy:.1f} %, NLL {nn.functional.cross_entropy(logits, y[test]).item():.3f}')


if __name__ == '__main__':
    main()
