"""R18: every kind of space of Gymnasium, as observation and as action: it trains, or is refused by name at once."""

import functools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from eggroll_rl import EGGROLL
from eggroll_rl.errors import ConfigError

pytestmark = [
    pytest.mark.promise("R18"),
    # Gymnasium's, about bounds that a dtype rounds and the like: what is tried here is odd on purpose.
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]

GRAPH = spaces.Graph(node_space=spaces.Box(-1, 1, (2,)), edge_space=spaces.Discrete(3))
BOX = spaces.Box(-1, 1, (2,))
BOXES = {
    "Box float16": spaces.Box(-1, 1, (3,), np.float16), "Box float32": spaces.Box(-2, 1, (3,), np.float32),
    "Box float64": spaces.Box(-2, 1, (3,), np.float64), "Box int8": spaces.Box(-3, 4, (3,), np.int8),
    "Box int32": spaces.Box(-100, 100, (2,), np.int32), "Box int64": spaces.Box(0, 2**40, (2,), np.int64),
    "Box uint8": spaces.Box(0, 7, (3,), np.uint8), "Box bytes": spaces.Box(0, 255, (3,), np.uint8),
    "Box 0-d": spaces.Box(-1, 1, ()), "Box (1,)": spaces.Box(-1, 1, (1,)), "Box (2, 3)": spaces.Box(-1, 1, (2, 3)),
    "Box (2, 1, 2, 2)": spaces.Box(-1, 1, (2, 1, 2, 2)), "Box (0,)": spaces.Box(-1, 1, (0,)),
    "Box unbounded": spaces.Box(-np.inf, np.inf, (2,)), "Box below": spaces.Box(0, np.inf, (2,)),
    "Box degenerate": spaces.Box(np.array([0.5, -1], np.float32), np.array([0.5, 1], np.float32)),
    "Box tiny": spaces.Box(-1e-30, 1e-30, (2,), np.float64), "Box huge": spaces.Box(-1e30, 1e30, (2,), np.float64),
    "Box whole float32": spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,)),
    "Box beyond float32": spaces.Box(-1e300, 1e300, (2,), np.float64),
    "Box odd bounds": spaces.Box(0.1, 0.3, (3,), np.float64),
    "Box odd bounds float16": spaces.Box(0.1, 0.3, (3,), np.float16),
    "Box bool": spaces.Box(0, 1, (2,), np.bool_),
    "Box image": spaces.Box(0, 255, (6, 5, 3), np.uint8),
    "Box image, channels first": spaces.Box(0, 255, (3, 6, 5), np.uint8),
    "Box large image": spaces.Box(0, 255, (40, 40, 1), np.uint8),
}  # fmt: skip
OTHERS = {
    "Discrete": spaces.Discrete(3), "Discrete start 5": spaces.Discrete(3, start=5),
    "Discrete start -2": spaces.Discrete(4, start=-2),
    "Discrete 1": spaces.Discrete(1), "Discrete int32": spaces.Discrete(3, dtype=np.int32),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]), "MultiDiscrete start": spaces.MultiDiscrete([3, 2], start=[1, -4]),
    "MultiDiscrete 2-d": spaces.MultiDiscrete([[3, 2], [2, 4]]),
    "MultiDiscrete int32": spaces.MultiDiscrete([3, 2], dtype=np.int32),
    "MultiBinary": spaces.MultiBinary(3), "MultiBinary 2-d": spaces.MultiBinary([2, 3]),
    "MultiBinary 3-d": spaces.MultiBinary([2, 1, 2]),
    "Dict": spaces.Dict(a=BOX, b=spaces.Discrete(2, start=1)), "Dict empty": spaces.Dict(),
    "Dict of an image": spaces.Dict(a=BOX, b=spaces.Box(0, 255, (6, 5, 3), np.uint8)),
    "Dict of a MultiBinary": spaces.Dict(a=spaces.MultiBinary([2, 2]), b=BOX),
    "Dict nested": spaces.Dict(a=spaces.Dict(b=BOX)),
    "Dict nested thrice": spaces.Dict(a=spaces.Dict(b=spaces.Dict(c=BOX))),
    "Dict of a Text": spaces.Dict(a=BOX, said=spaces.Text(4)), "Dict of a Tuple": spaces.Dict(a=spaces.Tuple([BOX])),
    "Tuple": spaces.Tuple([BOX, spaces.Discrete(2)]), "Tuple of a Dict": spaces.Tuple([spaces.Dict(a=BOX)]),
    "Text": spaces.Text(5), "Sequence": spaces.Sequence(BOX), "Graph": GRAPH,
    "OneOf": spaces.OneOf([BOX, spaces.Discrete(2)]),
}  # fmt: skip
SPACES = {**BOXES, **OTHERS}


class SpaceEnv(gym.Env):
    """Observations are samples; the reward says whether the action is one."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self._obs(), {}

    def _obs(self):
        obs, space = self.observation_space.sample(), self.observation_space
        # Spaces of all floats are how many envs say that they know no bounds.
        return (
            obs.clip(-1e6, 1e6)
            if isinstance(space, spaces.Box) and np.float64(space.high).max(initial=0) > 1e30
            else obs
        )

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} of {getattr(action, 'dtype', type(action))} is not in {self.action_space}")
        self.t += 1
        return self._obs(), float(np.sum(np.float64(action))) % 7.0, self.t >= 3, False, {}


def make(observation_space, action_space):
    return TimeLimit(SpaceEnv(observation_space, action_space), 5)


def try_space(observation_space, action_space, policy=None, **settings):
    """Train two generations; return "supported" or "refused"."""
    if policy is None:
        policy = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    settings = {"population_size": 4, "slice_size": 4, "n_workers": 0, "seed": 0, **settings}
    settings.setdefault("policy_kwargs", {"net_arch": [3]})
    odd = observation_space if action_space is BOX else action_space
    try:
        model = EGGROLL(policy, functools.partial(make, observation_space, action_space), **settings)
    except ConfigError as error:
        part = str(odd) in str(error) or any(str(p) in str(error) for p in getattr(odd, "spaces", {}).values())
        assert part and "space" in str(error), f"refused without a name: {error}"
        return "refused"
    model.learn(20)
    assert model._n_updates >= 1 and all(p.isfinite().all() for p in model.policy.parameters())
    observation_space.seed(1)
    for deterministic in (True, False):
        for _ in range(5):
            action, _ = model.predict(observation_space.sample(), deterministic=deterministic)
            wanted = action_space.dtype
            assert getattr(action, "dtype", None) == wanted, f"{action.dtype} is not {wanted}"
            assert action_space.contains(action), f"{action!r} is not in {action_space}"
    return "supported"


def verdicts(cells, kinds, **settings):
    found = {}
    for kind, space in kinds.items():
        for role in ("observation", "action"):
            with cells.cell(f"{kind} as {role}"):
                pair = (space, BOX) if role == "observation" else (BOX, space)
                found[kind, role] = try_space(*pair, **settings)
    return found


def test_every_space_trains_or_is_refused_by_name(cells):
    found = verdicts(cells, SPACES)
    refused = {key for key, verdict in found.items() if verdict == "refused"}
    print(f"\n{len(found) - len(refused)} supported, {len(refused)} refused: {sorted(refused)}")
    with cells.cell("what is documented as supported is"):
        for kind in ("Box float32", "Box (2, 3)", "Discrete start 5", "MultiDiscrete", "MultiBinary 2-d"):
            assert found[kind, "observation"] == found[kind, "action"] == "supported", kind
        assert found["Dict", "observation"] == "supported"


@pytest.mark.reliability
def test_every_space_with_sampled_actions_and_in_segments(cells):
    for settings in ({"deterministic": False}, {"fitness": "segment", "n_segments": 4, "segment_steps": 5}):
        verdicts(cells, SPACES, **settings)


@pytest.mark.reliability
def test_random_nested_spaces(cells):
    rng = np.random.default_rng(0)
    names = sorted(SPACES)

    def nested(depth):
        if depth == 0 or rng.random() < 0.6:
            return SPACES[str(rng.choice(names))]
        parts = [nested(depth - 1) for _ in range(int(rng.integers(1, 4)))]
        return spaces.Dict({f"k{i}": p for i, p in enumerate(parts)}) if rng.random() < 0.7 else spaces.Tuple(parts)

    for i in range(150):
        space = nested(2)
        with cells.cell(f"{i} {space}"):
            try_space(space, BOX)


def test_an_action_outside_its_space_is_noticed(cells, monkeypatch):
    monkeypatch.setattr("eggroll_rl.policies.make_cast", lambda *args: None)
    with cells.control("actions keep the network's dtype"):
        try:
            try_space(BOX, spaces.Box(-3, 4, (3,), np.int8))
        except Exception as error:
            raise AssertionError(str(error)) from error
