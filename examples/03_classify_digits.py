"""Classify scikit-learn's digits without backpropagation: python examples/03_classify_digits.py --model cnn."""

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from eggroll_rl import EvolutionStrategy
from eggroll_rl.schedules import cosine


class Step(nn.Module):
    """Neurons that fire or do not: their derivative is zero everywhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).to(x.dtype)


class Last(nn.Module):
    """The last output of a recurrent layer, which reads a picture row by row."""

    def forward(self, result: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return result[0][:, -1]


MODELS = {
    "mlp": lambda: [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)],
    "step": lambda: [nn.Linear(64, 128), Step(), nn.Linear(128, 10)],
    "cnn": lambda: [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)],
    "gru": lambda: [nn.Unflatten(1, (8, 8)), nn.GRU(8, 32, batch_first=True), Last(), nn.Linear(32, 10)],
}
parser = argparse.ArgumentParser()
parser.add_argument("--model", choices=MODELS, default="mlp")
parser.add_argument("--noise", choices=["lowrank", "gaussian", "sparse", "sign"], default="lowrank")
parser.add_argument("--fitness", choices=["likelihood", "accuracy"], default="likelihood")
parser.add_argument("--generations", type=int, default=400)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x, generator = ((x - 5) / 6).float(), torch.Generator().manual_seed(args.seed)
train, test = torch.randperm(len(x), generator=generator).split([1437, 360])
torch.manual_seed(args.seed)
module, rates = nn.Sequential(*MODELS[args.model]()), cosine(0.03, 0.001, args.generations)
es = EvolutionStrategy(module, 256, sigma=0.05, learning_rate=rates, noise=args.noise, seed=args.seed)
started = time.perf_counter()
for generation in range(1, args.generations + 1):
    batch = train[torch.randint(len(train), (128,), generator=generator)]
    scores = es.ask().forward(x[batch])  # (members, pictures, classes), all members in one call
    right = (
        scores.log_softmax(2) if args.fitness == "likelihood" else scores.argmax(2, keepdim=True) == torch.arange(10)
    )
    es.tell(right[:, torch.arange(128), y[batch]].double().mean(1))
    if generation % 100 == 0 or generation == args.generations:
        accuracy = (module(x[test]).argmax(1) == y[test]).double().mean().item()
        print(f"generation {generation:4}  {time.perf_counter() - started:6.1f} s  test accuracy {accuracy:.3f}")
