"""R16: whatever a setting is given, it is accepted and kept, or refused by its name before an env is made."""

import inspect
import math
import random
import re
import tomllib
from fractions import Fraction

import numpy as np
import pytest
import torch
import toy
from torch import nn

from eggroll_rl import EGGROLL, EvolutionStrategy, settings
from eggroll_rl.config import RunConfig
from eggroll_rl.errors import ConfigError, UnsupportedModuleError
from eggroll_rl.noise import Gaussian
from eggroll_rl.settings import check_arguments

pytestmark = pytest.mark.promise("R16")

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(EGGROLL.__init__).parameters.items()
    if name not in ("self", "env", "policy") and not name.startswith("_")
}
TABLES = ("policy_kwargs", "optimizer_kwargs", "critic_kwargs", "env_kwargs")
OF_A_RUN = ("total_timesteps", "seed", "n_workers", "eval_freq", "eval_episodes", "checkpoint_every")
OF_A_RUN += ("max_episode_steps", "env_id", "env_kwargs", "wrappers")


class Odd:
    """Compares as arrays do, and cannot be shown."""

    def __eq__(self, other):
        raise ValueError("ambiguous")

    __hash__ = None

    def __repr__(self):
        raise RuntimeError("no text")


def any_value(rng):
    """Return something that few settings take, or several do."""
    return rng.choice(
        [
            None, True, False, 0, 1, 2, 3, 7, 64, -1, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**400), 10**5000,
            0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 2.0, math.nan, math.inf, -math.inf, 1e-320, 1e308, 1 + 2j,
            np.int64(4), np.int8(-3), np.uint64(2**63), np.float32(0.5), np.float64("nan"), np.bool_(True),
            np.array(4), np.array([0.5, 1.0]), np.zeros(0), np.complex64(1), Fraction(1, 2), torch.tensor(0.5),
            "", " ", "0.1", "lin_0.1", "lin_", "lin_-1", "lin_nan", "1e400", "nan", "é✓", "\ud800", "a\x00b",
            "x" * 1000, "adam", "SGD", "LBFGS", "SparseAdam", "Muon", "standardize", "best_fraction", "segment",
            "episode", "cuda:x",
            "MlpPolicy", "RecurrentPolicy", "LinearPolicy", "CnnPolicy", "cpu", "auto", "meta", "tanh", "lstm",
            b"bytes", [], [4], [4, 2], [0], [True], [4.0], ["a"], (), (3,), {}, {"a": 1}, {1: 2}, {"": None},
            set(), object(), Odd(), int, nn.ReLU, nn.Linear, torch.optim.SGD, torch.optim.Optimizer,
            torch.device("cpu"), len, lambda x: x, lambda: 1.0,
        ]
    )  # fmt: skip


def near_value(rng):
    """Return a number close to where settings are right."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randint(-2, 300)
    if kind == 1:
        return rng.choice([-1, 1, 1, 1]) * 10 ** rng.uniform(-9, 3)
    return rng.choice([np.int32, np.int64])(rng.randint(-1, 99)) if kind == 2 else np.float32(rng.uniform(-0.2, 1.2))


def finite(x):
    number = isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)
    return number and abs(x) < 1.8e308


def whole(least, most=2**63 - 1):
    return lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool) and least <= x <= most


def even(x):
    return whole(2)(x) and x % 2 == 0


def positive(x):
    return finite(x) and x > 0


def share(x):
    return finite(x) and 0 <= x <= 1


def scheduled(x):
    text = isinstance(x, str) and positive(float(x.removeprefix("lin_")))
    return text or callable(x) or positive(x)


def none_or(right):
    return lambda x: x is None or right(x)


def flag(x):
    return x is True or x is False


def keywords(x):
    return x is None or (isinstance(x, dict) and all(isinstance(key, str) for key in x))


# Written down apart from the library's own checks: values that are right, and what any accepted value must be.
RIGHT = {
    "population_size": ([None, 2, 64, np.int64(8)], none_or(even)), "slice_size": ([None, 2, 32], none_or(even)),
    "sigma": ([0.05, "lin_0.1", "0.2", 1, lambda x: x], scheduled), "rank": ([1, 4, 10**9], whole(1)),
    "learning_rate": ([0.015, "lin_0.1", np.float32(0.5)], scheduled),
    "fitness": (["episode", "segment"], lambda x: x in ("episode", "segment")),
    "n_eval_episodes": ([1, 5], whole(1)), "n_segments": ([1, 32], whole(1)), "segment_steps": ([1, 64], whole(1)),
    "exploration_std": ([0.4, 2], positive), "gamma": ([0, 0.99, 1.0], share), "gae_lambda": ([0.0, 0.95, 1], share),
    "target_kl": ([0.1, "lin_0.4"], scheduled), "n_epochs": ([1, 3], whole(1)), "batch_size": ([1, 512], whole(1)),
    "sample_reuse": ([0, 2], whole(0)), "clip_range": ([0.2, "lin_0.2"], scheduled), "damping": ([0.1, 1e-9], positive),
    "fitness_shaping": (["standardize", "centered_rank", len], lambda x: callable(x) or isinstance(x, str)),
    "best_fraction": ([None, 0.5], none_or(lambda x: share(x) and x > 0)),
    "alive_bonus_offset": ([0.0, -1, np.float64(2)], finite), "max_episode_steps": ([None, 1, 100], none_or(whole(1))),
    "deterministic": ([True, False], flag), "weight_decay": ([0.0, 0.1], lambda x: finite(x) and x >= 0),
    "optimizer": (["adam", "SGD", torch.optim.AdamW, "Muon"], lambda x: isinstance(x, str | type)),
    "max_grad_norm": ([None, 1.0], none_or(positive)), "n_workers": ([None, 0, 10**6], none_or(whole(0))),
    "optimizer_kwargs": ([None, {}], keywords), "critic_kwargs": ([None, {}], keywords),
    "policy_kwargs": ([None, {"net_arch": []}, {"activation_fn": "relu"}, {"net_arch": [4, 4]}], keywords),
    "env_kwargs": ([None, {}], keywords), "stats_window_size": ([1, 100], whole(1)), "verbose": ([0, 1], whole(0)),
    "tensorboard_log": ([None, "runs/é ✓"], none_or(lambda x: isinstance(x, str) and x)),
    "seed": ([None, 0, 2**32 - 1], none_or(whole(0, 2**32 - 1))),
    "device": (["cpu", "auto", torch.device("cpu"), "cuda:1"], lambda x: isinstance(x, str | torch.device)),
    "policy": (["MlpPolicy", "RecurrentPolicy", "LinearPolicy"], lambda x: isinstance(x, str | type)),
    "on_bad_member": (["raise", "worst"], lambda x: x in ("raise", "worst")), "max_bad_fraction": ([0.5, 0, 1], share),
    "step_timeout": ([300.0, 1, math.inf], lambda x: positive(x) or x == math.inf),
    "evaluator": ([None], lambda x: x is None),
}  # fmt: skip
OF_A_RUN_RIGHT = {
    "total_timesteps": ([1, 10**12], whole(1)), "seed": ([0, 5], whole(0, 2**32 - 1)),
    "n_workers": ([None, 0], none_or(whole(0))), "eval_freq": ([None, 0, 9], none_or(whole(0))),
    "eval_episodes": ([1, 20], whole(1)), "checkpoint_every": ([1], whole(1)), "keep_checkpoints": ([1, 5], whole(1)),
    "step_timeout": RIGHT["step_timeout"],
    "max_episode_steps": ([None, 5], none_or(whole(1))), "env_id": (["Toy-v0", "a:b/c-v1"], lambda x: len(x) > 0),
    "env_kwargs": ([{}, {"a": [1, (2.5, "é")]}], keywords), "wrappers": ([[]], lambda x: isinstance(x, list | tuple)),
}  # fmt: skip
OF_THE_STRATEGY_RIGHT = {
    **{name: RIGHT[name] for name in ("rank", "optimizer_kwargs", "weight_decay", "max_grad_norm", "fitness_shaping")},
    "population_size": ([2, 64, np.int32(8)], even), "slice_size": ([2, 64], even),
    "best_fraction": RIGHT["best_fraction"], "sigma": ([0.1, 1, lambda g: 0.1], lambda x: callable(x) or positive(x)),
    "learning_rate": ([None, 0.1, lambda g: 0.1], lambda x: x is None or callable(x) or positive(x)),
    "seed": ([None, 0, 2**70], none_or(whole(0, 10**6000))), "noise_reuse": ([0, 1, 5], whole(0)),
    "optimizer": ([torch.optim.SGD, torch.optim.Adam], lambda x: isinstance(x, type)),
    "group_size": ([None, None, 2], none_or(even)), "noise": (["lowrank", "gaussian"], lambda x: x is not None),
    "param_filter": ([None], none_or(callable)), "lr_scheduler": ([None], none_or(callable)),
    **{name: ([True, False], flag) for name in ("baseline", "antithetic", "freeze_nonmatrix", "track_best")},
}  # fmt: skip


def value(rng, name=None, right=RIGHT):
    """Return any value, or half of the time one that is right for ``name``."""
    if name in right and rng.random() < 0.55:
        return rng.choice(right[name][0])
    return any_value(rng) if rng.random() < 0.6 else near_value(rng)


def accepted_rightly(given, right):
    for name, x in given.items():
        if name in right:
            assert right[name][1](x), f"{name}={x!r} was accepted"


def misspelt(rng, name):
    at = rng.randrange(len(name))
    return name[:at] + rng.choice(["", "x", name[at] * 2]) + name[at + 1 :]


KNOWN = {
    "policy_kwargs": ["net_arch", "activation_fn", "normalize_obs", "squash_output", "with_bias", "zero_last_layer",
                      "features_extractor_class", "features_extractor_kwargs", "hidden_size", "cell"],
    "optimizer_kwargs": ["betas", "eps", "momentum", "weight_decay", "lr", "maximize", "foreach", "fused", "capturable",
                         "amsgrad", "differentiable", "params", "nesterov"],
    "critic_kwargs": ["net_arch", "learning_rate", "n_epochs", "batch_size"],
    "env_kwargs": ["offset", "render_mode"],
}  # fmt: skip


def table(rng, name):
    """Return keyword arguments, most of them known."""
    if rng.random() < 0.4:
        return value(rng, name)
    return {
        misspelt(rng, key) if rng.random() < 0.1 else key: value(rng)
        for key in rng.sample(KNOWN[name], rng.randint(0, min(3, len(KNOWN[name]))))
    }


PAIRS = [
    {"fitness": "segment", "sigma": 0.3}, {"fitness": "segment", "rank": 2},
    {"fitness": "segment", "best_fraction": 0.5}, {"fitness": "segment", "n_eval_episodes": 2},
    {"fitness": "segment", "deterministic": False},
    {"fitness": "segment", "policy": "RecurrentPolicy"}, {"fitness": "episode", "critic_kwargs": {"n_epochs": 2}},
    {"best_fraction": 0.5, "fitness_shaping": "standardize"},
    {"optimizer": "SGD", "optimizer_kwargs": {"betas": (0, 0)}},
    {"weight_decay": 0.1, "optimizer_kwargs": {"weight_decay": 0.2}}, {"weight_decay": 0.1, "optimizer": "Rprop"},
    {"policy": "LinearPolicy", "policy_kwargs": {"net_arch": [4]}}, {"fitness": "segment", "policy": "CnnPolicy"},
]  # fmt: skip


def arguments(rng):
    """Return up to four of EGGROLL's arguments, the others being right, and whether a name is wrong."""
    given = dict(rng.choice(PAIRS)) if rng.random() < 0.2 else {}
    for name in rng.sample([*DEFAULTS, "policy"], rng.randint(0 if given else 1, 3)):
        given[name] = table(rng, name) if name in TABLES else value(rng, name)
    if rng.random() < 0.3:
        given.setdefault("fitness", "segment")
    return given


def names_in(given):
    """Return the words of which a refusal has to say one: the names of what was given, those in tables too."""
    tables = [given[name] for name in ("policy_kwargs", "optimizer_kwargs", "critic_kwargs") if name in given]
    inside = [key for keys in tables if isinstance(keys, dict) for key in keys if isinstance(key, str) and key]
    return [*map(str, given), *inside]


def refused_by_name(error, given):
    assert isinstance(error, ConfigError), f"{type(error).__name__}: {error} for {list(given)}"
    text = str(error)
    named = any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in names_in(given))
    assert named, f"{text!r} names none of {names_in(given)}"
    assert len(text) < 2000 and "\n" not in text


def outcome(call, given):
    """Return what a call returns; None if it refused by name."""
    try:
        return call()
    except Exception as error:
        refused_by_name(error, given)
        return None


def try_run_config(rng):
    """Try a parsed TOML file, and whatever Python may put there; return whether it was accepted."""
    eggroll = arguments(rng)
    for name in ("seed", "n_workers", "env_kwargs", "tensorboard_log", "verbose", "stats_window_size"):
        eggroll.pop(name, None)
    run = {name: value(rng, name, OF_A_RUN_RIGHT) for name in rng.sample(OF_A_RUN, rng.choice([0, 0, 1, 2]))}
    if rng.random() < 0.2:
        run["wrappers"] = [rng.choice([{"name": "gymnasium.wrappers.ClipAction"}, {"name": 3}, {}, value(rng)])]
    if rng.random() < 0.2:
        run["env_kwargs"] = {rng.choice(["a", "é", "", 'q"'] + [3] * (rng.random() < 0.2)): value(rng)}
    typo = None
    if rng.random() < 0.1:
        typo = misspelt(rng, rng.choice(["population_size", "learning_rate", "n_eval_episodes"]))
        if typo not in DEFAULTS:
            eggroll[typo] = 1
    wanted = {"env_id": "Toy-v0", **run, "eggroll": value(rng) if rng.random() < 0.02 else eggroll}
    inside = wanted["eggroll"] if isinstance(wanted["eggroll"], dict) else {}
    config = outcome(lambda: RunConfig.from_dict(wanted, "file.toml"), {**run, **inside, "eggroll": 0})
    if config is None:
        return False
    assert typo is None or typo in DEFAULTS, f"{typo} was accepted"
    accepted_rightly({name: x for name, x in inside.items() if x is not None}, RIGHT)
    accepted_rightly(run, OF_A_RUN_RIGHT)
    text = config.to_toml()
    text.encode()
    again = RunConfig.from_dict(tomllib.loads(text), "again.toml")
    assert again.to_toml() == text, "a second round gives another file"
    return True


def try_constructor_checks(rng):
    given = arguments(rng)
    accepted = outcome(lambda: check_arguments({**DEFAULTS, "policy": "MlpPolicy", **given}) or True, given)
    if accepted:
        accepted_rightly(given, RIGHT)
    return bool(accepted)


def try_strategy(rng):
    given = {
        name: table(rng, name) if name in TABLES else value(rng, name, OF_THE_STRATEGY_RIGHT)
        for name in rng.sample(list(OF_THE_STRATEGY_RIGHT), rng.randint(1, 4))
    }
    pairs = [{"antithetic": False, "fitness_shaping": "pair_rank"}, {"group_size": 3}, {"noise": "gaussian", "rank": 2},
             {"noise": Gaussian()}, {"baseline": True, "fitness_shaping": "standardize"}]  # fmt: skip
    if rng.random() < 0.2:
        given |= rng.choice(pairs)
    module = nn.Linear(2, 2) if rng.random() < 0.95 else value(rng)

    try:
        es = outcome(lambda: EvolutionStrategy(module, **given), {**given, "module": 0})
    except AssertionError as error:
        # A function of anybody's is called in the constructor, and may raise what it likes.
        if any(callable(given.get(name)) for name in ("lr_scheduler", "param_filter", "learning_rate", "sigma")):
            return False
        if isinstance(error.__context__, UnsupportedModuleError):
            return False
        raise
    if es is None:
        return False
    accepted_rightly(given, OF_THE_STRATEGY_RIGHT)
    return True


FUZZERS = {"RunConfig": try_run_config, "EGGROLL": try_constructor_checks, "EvolutionStrategy": try_strategy}


def fuzz(cells, first, n):
    """Try ``n`` examples, a third of each kind, each from a seed of its own; return how many were accepted."""
    accepted = dict.fromkeys(FUZZERS, 0)
    for seed in range(first, first + n):
        kind = list(FUZZERS)[seed % len(FUZZERS)]
        with cells.cell(f"{kind} {seed}"):
            accepted[kind] += FUZZERS[kind](random.Random(seed))
    return accepted


def test_fuzzed_settings_are_kept_or_refused_by_name(cells):
    accepted = fuzz(cells, 0, 1500)
    # Else the generator tries nothing but nonsense.
    assert all(50 < n < 450 for n in accepted.values()), accepted


@pytest.mark.reliability
def test_many_fuzzed_settings_are_kept_or_refused_by_name(cells):
    accepted = fuzz(cells, 1500, 20_000)
    print(accepted)
    assert all(n > 700 for n in accepted.values()), accepted


@pytest.mark.parametrize("right", [RIGHT, OF_THE_STRATEGY_RIGHT], ids=["EGGROLL", "EvolutionStrategy"])
def test_every_argument_is_tried_and_what_is_right_is_accepted(right):
    kind = EGGROLL if right is RIGHT else EvolutionStrategy
    names = {name for name in inspect.signature(kind.__init__).parameters if not name.startswith("_")}
    assert names - {"self", "env", "module"} == right.keys()
    together = {"best_fraction": {"fitness_shaping": "best_fraction"}, "group_size": {"fitness_shaping": "standardize"}}
    together |= {"baseline": {"fitness_shaping": "standardize"}}
    for name, (values, predicate) in right.items():
        for x in values:
            given = {**(together.get(name, {}) if x else {}), name: x}
            assert predicate(x), (name, x)
            if right is RIGHT:
                check_arguments({**DEFAULTS, "policy": "MlpPolicy", **given})
            else:
                EvolutionStrategy(nn.Linear(2, 2), **given)


@pytest.mark.parametrize(
    "check",
    ["check_number", "check_flag", "check_whole", "check_population", "check_fraction", "check_arguments_table"],
)
def test_a_check_that_is_switched_off_is_noticed(cells, monkeypatch, check):
    monkeypatch.setattr(settings, check, lambda *args, **kwargs: None)
    with cells.control(f"without {check}"):
        for seed in range(3000):
            try_constructor_checks(random.Random(seed))


def constructed(given, policy):
    """Make a model; return it, the refusal, and how many envs were made."""
    made = []

    def make():
        made.append(toy.make_target())
        return made[-1]

    try:
        return EGGROLL(policy, make, **given), None, made
    except Exception as error:
        return None, error, made


OF_SPACES = (
    "CnnPolicy is for images",
    "MultiInputPolicy is for",
    "segment_steps",
    "plain nn.Sequential",
    "cannot use a",
)
OF_SPACES += ("features_extractor_class", "Muon only supports")


def try_construction(rng, tmp_path):
    given = arguments(rng)
    policy = given.pop("policy", "MlpPolicy")
    big = {name for name in ("population_size", "n_segments") if finite(given.get(name)) and given[name] > 1e4}
    given = {name: x for name, x in given.items() if name not in big}
    if isinstance(given.get("tensorboard_log"), str):
        given["tensorboard_log"] = str(tmp_path) if given["tensorboard_log"] else ""
    if isinstance(given.get("policy_kwargs"), dict) and finite(given["policy_kwargs"].get("hidden_size")):
        given["policy_kwargs"]["hidden_size"] = min(given["policy_kwargs"]["hidden_size"], 99)
    if str(given.get("device")).startswith("cuda"):
        given["device"] = "cpu"
    try:
        check_arguments({**DEFAULTS, **given, "policy": policy})
        refused = None
    except ConfigError as error:
        refused = error
    model, error, made = constructed(given, policy)
    if refused is not None:
        assert str(error) == str(refused) and not made, f"{len(made)} envs were made before {error}"
    elif "env_kwargs" in str(error):
        assert isinstance(error, ConfigError) and not made
    elif error is not None:
        # What an env or its spaces tell.
        assert isinstance(error, ConfigError), f"{type(error).__name__}: {error}"
        assert any(words in str(error) for words in OF_SPACES), str(error)
    else:
        assert model.policy is not None and made
    return model is not None


@pytest.mark.parametrize("n", [60, pytest.param(1000, marks=pytest.mark.reliability)])
def test_no_env_is_made_for_what_is_refused(cells, tmp_path, n):
    accepted = 0
    for seed in range(n):
        with cells.cell(f"construction {seed}"):
            accepted += try_construction(random.Random(seed), tmp_path)
    assert n / 8 < accepted < n * 0.8, accepted


def test_checks_that_come_after_the_env_are_noticed(cells, monkeypatch, tmp_path):
    monkeypatch.setattr("eggroll_rl.eggroll.check_arguments", lambda given: None)
    with cells.control("checks after the env"):
        for seed in range(200):
            try_construction(random.Random(seed), tmp_path)
