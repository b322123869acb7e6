"""Answers that are lost, late, doubled or in another order: the results are those of the undisturbed generation."""

import pickle
import random
from collections import deque
from itertools import repeat

import numpy as np
import pytest
from chain import make_model
from stable_baselines3.common.logger import configure

from eggroll_rl.dispatch import RETRIES, Done, Lost, dispatch
from eggroll_rl.errors import WorkerDiedError
from eggroll_rl.rollout import load_generation
from eggroll_rl.segments import evaluate_slice


class FakeCrew:
    """Evaluates here, and answers as a network at its worst would.

    :param generator: decides what happens to each task
    :param faults: of ``"lost"``, ``"late"``, ``"twice"``, ``"stale"``; answers come in random order in any case
    """

    def __init__(self, model, generator, faults, n_workers=3):
        self.policy, self.envs = model.policy.replica(), model._factory.vector(model.slice_size)
        self.generator, self.faults, self.n_workers = generator, faults, n_workers
        self.running, self.on_their_way = [], deque()
        self.n_sent = self.n_lost = 0
        self.stale = []

    def begin(self, job):
        self.generation = pickle.loads(job)
        load_generation(self.policy, self.generation)

    def n_idle(self):
        return self.n_workers - len(self.running)

    def send(self, task):
        assert self.n_idle() > 0
        self.n_sent += 1
        self.running.append(task)

    def wait(self):
        if self.stale and "stale" in self.faults:
            return [self.stale.pop()]
        if not self.running:
            return [self.on_their_way.popleft()] if self.on_their_way else []
        task = self.running.pop(self.generator.randrange(len(self.running)))
        fault = self.generator.choice([*self.faults, "none"])
        if fault == "lost":
            self.n_lost += 1
            return [Lost(task, "died", "the node is gone")]
        done = Done(task, evaluate_slice(self.policy, self.generation, task.first, self.envs, task.left_out))
        if fault == "late":  # taken for lost, and then it comes
            self.n_lost += 1
            self.on_their_way.append(done)
            return [Lost(task, "died", "no answer for a while")]
        self.stale.append(done)
        return [done, done] if fault == "twice" else [done]


def same(results, expected):
    return len(results) == len(expected) and all(
        a.first == b.first
        and np.array_equal(a.returns, b.returns)
        and np.array_equal(a.lengths, b.lengths)
        and np.array_equal(a.moments.m2, b.moments.m2)
        for a, b in zip(results, expected, strict=True)
    )


@pytest.fixture
def model():
    return make_model(n_workers=0, population_size=20)


@pytest.fixture
def expected(model):
    with model._make_evaluator() as evaluator:
        return evaluator.evaluate(model.next_generation())


@pytest.mark.promise("R27")
def test_whatever_happens_on_the_way_the_results_are_the_same(cells, model, expected):
    generation = model.next_generation()
    for faults in (["lost"], ["late"], ["twice"], ["stale"], ["lost", "late", "twice", "stale"]):
        for seed in range(10):
            crew = FakeCrew(model, random.Random(seed), faults)
            with cells.cell(f"{'+'.join(faults)}, {seed}"):
                assert same(dispatch(generation, generation.slices(), crew, retries=50), expected)
                assert crew.n_sent <= 5 + crew.n_lost


@pytest.mark.promise("R27")
def test_answers_of_the_generation_before_are_not_taken_for_this_ones(cells, model, monkeypatch):
    model.set_logger(configure(format_strings=[]))
    with model._make_evaluator() as evaluator:
        crew = FakeCrew(model, random.Random(0), ["stale"])
        for _ in range(3):
            generation = model.next_generation()
            expected = evaluator.evaluate(generation)
            with cells.cell(generation.noise.generation):
                assert same(dispatch(generation, generation.slices(), crew), expected)
            model.update(expected)
        generation = model.next_generation()
        expected = evaluator.evaluate(generation)
        with cells.control("which job an answer is of is not looked at"):
            monkeypatch.setattr("eggroll_rl.dispatch._numbers", repeat(crew.stale[-1].task.job))
            assert same(dispatch(generation, generation.slices(), crew), expected)


@pytest.mark.promise("R27")
def test_a_slice_that_is_lost_for_ever_ends_the_generation(model):
    class Hopeless(FakeCrew):
        def wait(self):
            task = self.running.pop()
            return [Lost(task, "died", "the node is gone")]

    crew = Hopeless(model, random.Random(0), [])
    with pytest.raises(WorkerDiedError, match=f"one of members 8 to 11: the node is gone, {RETRIES + 1} times"):
        dispatch(generation := model.next_generation(), generation.slices(), crew)
