"""R12: five generations of four small configurations give what they gave: to the bit where the arithmetic is known."""

import json

import golden
import pytest
import torch

pytestmark = pytest.mark.promise("R12")

STORED = json.loads(golden.PATH.read_text())


def check(name, found):
    """Compare with the stored hashes of this machine, or else with the stored scores."""
    scores = STORED["scores"][name]
    for generation, (ours, right) in enumerate(zip(found["scores"], scores, strict=True)):
        assert ours == pytest.approx(right, rel=1e-3), f"generation {generation}"
    hashes = STORED["hashes"].get(golden.key())
    if hashes is not None:
        wrong = [g for g in range(golden.GENERATIONS) if found["hashes"][g] != hashes[name][g]]
        assert not wrong, f"differs from generation {wrong[0]} on; if it is meant to: python tests/golden.py"


def test_results_are_what_they_were(cells):
    print(f"\n{golden.key()}: {'hashes' if golden.key() in STORED['hashes'] else 'scores alone'}")
    for name in golden.CONFIGURATIONS:
        with cells.cell(name):
            check(name, golden.trace(name))


def test_a_last_bit_is_noticed(cells, monkeypatch):
    name = "episodes, MlpPolicy"
    before = golden.trace(name)
    monkeypatch.setitem(STORED["hashes"], golden.key(), {name: before["hashes"]})
    from eggroll_rl.es import EvolutionStrategy

    original = EvolutionStrategy.tell

    def tell(es, fitness, **how):
        metrics = original(es, fitness, **how)
        first = next(iter(es.parameters.values()))
        with torch.no_grad():
            first.view(-1)[0] = torch.nextafter(first.view(-1)[0], torch.tensor(9.0))
        return metrics

    monkeypatch.setattr(EvolutionStrategy, "tell", tell)
    with cells.control("one bit of one weight"):
        check(name, golden.trace(name))


def test_another_learning_rate_is_noticed_without_hashes(cells, monkeypatch):
    name = "episodes, MlpPolicy"
    policy, make, settings = golden.CONFIGURATIONS[name]
    monkeypatch.setitem(STORED, "hashes", {})
    monkeypatch.setitem(golden.CONFIGURATIONS, name, (policy, make, settings | {"learning_rate": 0.016}))
    with cells.control("learning rate 0.016"):
        check(name, golden.trace(name))
