"""The crew of a cluster on a Ray that is made up here: nodes come, go and stand still as a test likes.

The real one is in test_ray.py.
"""

import pickle
import random
import sys
from itertools import count
from types import SimpleNamespace

import cloudpickle
import pytest
import torch
import toy
from test_workers import digest

from eggroll_rl import EGGROLL, ray_crew, ray_workers
from eggroll_rl.dispatch import RETRIES, Done
from eggroll_rl.errors import ConfigError, EpisodeError, WorkerDiedError
from eggroll_rl.lowrank import Contraction, estimate_gradient, perturbed_parameters
from eggroll_rl.ray_workers import RayEvaluator
from eggroll_rl.rollout import load_generation
from eggroll_rl.segments import evaluate_slice

SMALL = {"population_size": 24, "slice_size": 4, "policy_kwargs": {"net_arch": [8]}, "seed": 0, "n_workers": 0}


class RayError(Exception):
    pass


class RayTaskError(RayError):
    """What a call raised."""


class Crew:
    """Stands in for the worker processes of a node: tasks are done here, when they are asked for."""

    def __init__(self, n_workers, setup, slice_size, step_timeout):
        self.policy, factory, _, _ = cloudpickle.loads(setup)
        self.envs, self.n_workers, self.running = factory.vector(slice_size), n_workers, []

    def __len__(self):
        return self.n_workers

    def begin(self, job):
        self.job = pickle.loads(job)
        if not isinstance(self.job, Contraction):
            load_generation(self.policy, self.job)

    def n_idle(self):
        return self.n_workers - len(self.running)

    def send(self, task):
        self.running.append((task, self.job))

    def wait(self):
        if not self.running:
            return []
        task, job = self.running.pop(0)
        if isinstance(job, Contraction):
            return [Done(task, job.contract(perturbed_parameters(self.policy.network), task.first).numpy())]
        return [Done(task, evaluate_slice(self.policy, job, task.first, self.envs, task.left_out))]

    def close(self):
        self.envs.close()


class FakeRay:
    """As much of Ray as the crew uses. Calls are made when they are waited for, in random order.

    :ivar cpus: of the nodes that are alive, by id
    :ivar still: nodes that do not answer
    :ivar versions: what a node has other than the driver
    :ivar meanwhile: called in every wait
    :ivar at: what happens after so many calls
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
    util = SimpleNamespace(scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=SimpleNamespace))

    def __init__(self, **cpus):
        self.cpus, self.still, self.versions = cpus, set(), {}
        self.generator = random.Random(0)
        self.n_calls = 0
        self.meanwhile, self.at = lambda: None, {}

    def is_initialized(self):
        return True

    def shutdown(self):
        raise AssertionError("it was not connected here")

    def nodes(self):
        return [
            {"NodeID": name, "Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": float(n)}}
            for name, n in self.cpus.items()
        ]

    def put(self, value):
        return SimpleNamespace(value=value)

    def get(self, what):
        return what.value if hasattr(what, "value") else what()

    def wait(self, calls, num_returns, timeout, fetch_local=True):
        self.meanwhile()
        for n in [n for n in self.at if n <= self.n_calls]:
            self.at.pop(n)()
        done = [call for call in calls if call.node not in self.still]
        if num_returns == 1 and done:
            done = [self.generator.choice(done)]
        return done, []

    def kill(self, actor):
        pass

    def remote(self, kind):
        def options(scheduling_strategy, **_):
            return SimpleNamespace(remote=lambda: _Actor(self, kind(), scheduling_strategy.node_id))

        return SimpleNamespace(options=options)


class _Actor:
    def __init__(self, ray, instance, node):
        self.ray, self.instance, self.node = ray, instance, node

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *args: _Call(self, name, args))


class _Call:
    def __init__(self, actor, name, args):
        self.actor, self.name, self.args, self.node = actor, name, args, actor.node

    def __call__(self):
        ray = self.actor.ray
        ray.n_calls += 1
        if self.node not in ray.cpus:
            raise RayError(f"a long story\n\x1b[36mnode {self.node} is gone\x1b[39m\n")
        args = [arg.value if isinstance(arg, SimpleNamespace) else arg for arg in self.args]
        answer = getattr(self.actor.instance, self.name)(*args)
        return {**answer, **ray.versions.get(self.node, {})} if self.name == "about" else answer


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay(one=2, two=1, three=3)
    monkeypatch.setattr(ray_workers, "import_ray", lambda is_local=False: fake)
    monkeypatch.setattr(ray_crew, "ProcessCrew", Crew)
    monkeypatch.setattr(ray_crew, "_LOOK_SECONDS", 0.0)
    return fake


def normal(n):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model_on(evaluator, env=toy.make_target, **settings):
    return EGGROLL("MlpPolicy", env, evaluator=evaluator, **{**SMALL, **settings})


def learned(evaluator, env=toy.make_target, steps=1500, **settings):
    return model_on(evaluator, env, **settings).learn(steps, log_interval=None)


@pytest.fixture(scope="module")
def here():
    return digest(learned(None))


def test_the_results_are_those_of_one_machine(ray, here):
    evaluator = RayEvaluator("auto")
    assert digest(learned(evaluator)) == here
    assert list(evaluator.nodes.values()) == [2, 1, 3]
    assert digest(learned(evaluator)) == here  # once more with the same


def test_no_more_workers_than_slices_or_than_asked_for(ray, here, caplog):
    evaluator = RayEvaluator("auto", n_workers=4)
    assert digest(learned(evaluator)) == here
    assert list(evaluator.nodes.values()) == [2, 1, 1] and "4 of the cluster's 6 CPUs are used" in caplog.text
    ray.cpus = {"one": 2, "head": 0, "two": 100}
    learned(evaluator := RayEvaluator("auto"))
    assert list(evaluator.nodes.values()) == [2, 4]


def test_nodes_that_go_and_come_change_nothing(ray, here):
    evaluator = RayEvaluator("auto")

    ray.at = {
        20: lambda: ray.cpus.pop("one"),
        25: lambda: ray.cpus.update(four=2),
        40: lambda: ray.cpus.pop("three"),
    }
    assert digest(learned(evaluator)) == here
    assert list(evaluator.nodes) == ["10.0.0.1 (two)", "10.0.0.1 (four)"]


def test_a_node_that_stands_still_is_helped(ray, here, monkeypatch, caplog):
    monkeypatch.setattr(ray_crew, "_STRAGGLER", 0.0)
    caplog.set_level("INFO", "eggroll_rl")
    ray.at = {20: lambda: ray.still.add("two")}
    assert digest(learned(RayEvaluator("auto"))) == here
    assert "a task of node 10.0.0.1 (two) is done by" in caplog.text


def test_answers_that_come_a_generation_late_are_left_alone(ray, here, monkeypatch):
    monkeypatch.setattr(ray_crew, "_STRAGGLER", 0.0)

    waits = count()

    def meanwhile():
        ray.still = {"two"} if next(waits) % 30 < 20 else set()

    ray.meanwhile = meanwhile
    assert digest(learned(RayEvaluator("auto"))) == here


def test_a_node_whose_cpus_somebody_else_has_is_not_waited_for(ray, here, monkeypatch, caplog):
    monkeypatch.setattr(ray_crew, "_HIRE_SECONDS", 0.05)
    ray.still = {"one"}
    assert digest(learned(evaluator := RayEvaluator("auto", n_workers=4))) == here
    assert evaluator.nodes == {"10.0.0.1 (two)": 1, "10.0.0.1 (three)": 3}
    ray.at = {ray.n_calls + 20: lambda: ray.still.clear()}  # it is free, but nobody needs it
    assert digest(learned(evaluator)) == here
    assert evaluator.nodes == {"10.0.0.1 (two)": 1, "10.0.0.1 (three)": 3}


def test_what_a_lost_node_leaves_another_takes_over(ray, here):
    ray.cpus = {"one": 4, "two": 4}
    ray.at = {20: lambda: ray.cpus.pop("one")}
    assert digest(learned(evaluator := RayEvaluator("auto"))) == here
    assert evaluator.nodes == {"10.0.0.1 (two)": 4}


def test_a_node_that_stands_still_for_ever_is_lost(ray):
    ray.cpus = {"one": 2}
    ray.at = {20: lambda: ray.still.add("one")}
    with pytest.raises(
        WorkerDiedError, match="no node to work on for 0.1 s; the last one: it gave no answer for 0.1 s"
    ):
        learned(RayEvaluator("auto", node_timeout=0.1))


@pytest.mark.parametrize("joins", [False, True])
def test_a_node_with_other_versions(ray, joins, caplog):
    ray.versions = {"two": {"torch": "0.1"}}
    if joins:  # it is not used; the run goes on
        del ray.cpus["two"]
        ray.at = {20: lambda: ray.cpus.update(two=1)}
        learned(evaluator := RayEvaluator("auto"))
        assert "10.0.0.1 (two)" not in evaluator.nodes
        assert caplog.text.count("node 10.0.0.1 (two) is lost") == 1
    else:
        with pytest.raises(ConfigError, match=r"node 10.0.0.1 \(two\) must have the same .*got torch 0.1 \(here"):
            learned(RayEvaluator("auto"))


def test_another_processor_is_worth_a_word(ray, here, caplog):
    ray.versions = {"two": {"processor": "Z80"}}
    assert digest(learned(RayEvaluator("auto"))) == here
    assert "another processor (Z80)" in caplog.text


def test_a_slice_whose_nodes_are_lost_again_and_again_ends_the_run(ray):
    evaluator = RayEvaluator("auto")
    model = model_on(evaluator, population_size=4)  # one slice

    def meanwhile():
        for node in evaluator._crew.nodes if evaluator._crew else []:
            if node.running:
                ray.cpus = {f"{node.node_id}+": 1}

    ray.meanwhile = meanwhile
    with pytest.raises(
        WorkerDiedError, match=rf"members 0 to 3: node .* was lost: node .* is gone, {RETRIES + 1} times"
    ):
        model.learn(1500)


def test_no_node_left_ends_the_run(ray):
    evaluator = RayEvaluator("auto", node_timeout=0.1)
    ray.at = {20: lambda: ray.cpus.clear()}
    with pytest.raises(WorkerDiedError, match="no node to work on for 0.1 s; the last one: node .* is gone"):
        learned(evaluator)


def test_what_an_env_raises_ends_the_run(ray):
    with pytest.raises(EpisodeError, match="generation 0, member .*broken step") as caught:
        learned(RayEvaluator("auto"), toy.make_fault("raise"))
    assert caught.value.member is not None


def test_a_large_populations_noise_is_summed_up_by_the_nodes(ray):
    model = model_on(evaluator := RayEvaluator("auto"), population_size=4096, slice_size=512,
                     policy_kwargs={"net_arch": [128, 128]})  # fmt: skip
    es = model.evolution_strategy
    noise, parameters = es.ask().noise, perturbed_parameters(es.module)
    utilities = normal(4096)
    asked = []

    def elsewhere(contraction, parameters):
        asked.append(evaluator.contract(contraction, parameters))
        return asked[-1]

    with model._make_evaluator():
        there = estimate_gradient(parameters, noise, utilities, elsewhere=elsewhere)
        here = estimate_gradient(parameters, noise, utilities)
        assert all(here[name].equal(there[name]) for name in here)
        assert asked[0] is not None
        small = model_on(None).evolution_strategy
        assert evaluator.contract(
            Contraction(small.ask().noise, normal(12).numpy()), perturbed_parameters(small.module)
        ) is None  # fmt: skip


def test_a_model_is_saved_and_loaded_without_its_cluster(ray, here, tmp_path):
    learned(RayEvaluator("auto")).save(tmp_path / "model")
    loaded = EGGROLL.load(tmp_path / "model", env=toy.make_target)
    assert loaded.evaluator is None and digest(loaded) == here
    again = pickle.loads(pickle.dumps(RayEvaluator("10.0.0.1:6379", 5, 9.0)))
    assert (again.address, again.n_workers, again.node_timeout) == ("10.0.0.1:6379", 5, 9.0)


def test_an_env_that_is_made_already_cannot_be_rebuilt_there(ray):
    with pytest.raises(ConfigError, match="evaluator needs an env given by id or function"):
        learned(RayEvaluator("auto"), toy.make_target())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "cluster"}, "address must be 'auto', 'local' or 'HOST:PORT', got 'cluster'"),
        ({"address": None}, "address must be"),
        ({"n_workers": 0}, "n_workers must be .*1 or more, got 0|n_workers"),
        ({"node_timeout": 0}, "node_timeout must be .*got 0"),
    ],
)
def test_wrong_settings_are_named(ray, settings, message):
    with pytest.raises(ConfigError, match=message):
        RayEvaluator(**settings)


def test_without_ray_the_extra_is_named(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'eggroll-rl\[ray\]'"):
        RayEvaluator()
    status, _, err = run("train", "Pendulum-v1", "--cluster", "auto", "--output", tmp_path / "run")
    assert status == 2 and "pip install 'eggroll-rl[ray]'" in err
    assert not (tmp_path / "run").exists()
