import random
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy

from eggroll_rl.envs import env_factory
from eggroll_rl.errors import EpisodeError
from eggroll_rl.noise import LowRank, Noise
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.population import Population
from eggroll_rl.rollout import Generation, episode_seeds, rollout


def make(source=toy.make_target, n_eval_episodes=2, **changes):
    values = {"seed": 5, "generation": 3, "population_size": 6, "sigma": 0.3, "family": LowRank(), "slice_size": 4}
    noise = Noise(**(values | changes))
    factory = env_factory(source)
    env = factory()
    torch.manual_seed(0)
    policy = MlpPolicy(env.observation_space, env.action_space, net_arch=[8])
    state = {name: tensor.numpy() for name, tensor in policy.state_dict().items()}
    return policy, Generation(noise, state, n_eval_episodes), factory.vector(noise.slice_size), env


def test_a_rollout_is_each_members_own_episodes():
    policy, generation, envs, env = make()
    results = [rollout(policy, generation, first, envs) for first in (0, 4)]
    assert [len(r.returns) for r in results] == [4, 2]  # the last slice is padded with rows that never run
    returns = np.concatenate([r.returns for r in results])
    lengths = np.concatenate([r.lengths for r in results])
    seeds = episode_seeds(generation.noise, 2)
    population = Population(policy.network, generation.noise)
    seen_of_slice = {0: [], 1: []}
    for member in range(6):
        parameters = population.parameters_of(member)
        seen = seen_of_slice[member // 4]
        for episode in range(2):
            obs, _ = env.reset(seed=int(seeds[member, episode]))
            total, length, done = 0.0, 0, False
            while not done:
                seen.append(obs)
                x = policy.features(policy.encode(torch.as_tensor(obs)[None]))
                with torch.no_grad():
                    y = torch.func.functional_call(policy.network, parameters, (x,))
                obs, reward, terminated, truncated, _ = env.step(policy.actions(y)[0].numpy())
                total, length, done = total + reward, length + 1, terminated or truncated
            assert returns[member, episode] == pytest.approx(total, abs=1e-5)
            assert lengths[member, episode] == length
        assert results[member // 4].successes[member % 4].tolist() == [1, 1]
    for result, seen in zip(results, seen_of_slice.values(), strict=True):
        assert result.moments.count.tolist() == [len(seen)]
        assert np.allclose(result.moments.mean[0], np.mean(seen, axis=0), atol=1e-12)
        assert np.allclose(result.moments.m2[0], np.var(seen, axis=0) * len(seen), atol=1e-10)


def test_both_members_of_a_pair_see_the_same_episodes_and_other_pairs_others():
    noise = make()[1].noise
    seeds = episode_seeds(noise, 3)
    assert seeds.shape == (6, 3)
    assert np.array_equal(seeds[0::2], seeds[1::2])
    assert len(np.unique(seeds)) == 9
    assert not np.array_equal(seeds, episode_seeds(replace(noise, generation=4), 3))


def test_a_slice_is_a_pure_function_of_its_generation():
    policy, generation, envs, _ = make()
    first = rollout(policy, generation, 4, envs)
    rollout(policy, generation, 0, envs)
    again = rollout(policy, generation, 4, envs)
    assert np.array_equal(first.returns, again.returns)
    assert np.array_equal(first.moments.m2, again.moments.m2)


def test_an_env_that_draws_from_global_generators_is_reproducible_and_they_are_put_back(rng_state):
    policy, generation, envs, _ = make(toy.make_sloppy)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = rollout(policy, generation, 0, envs)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(2)
    np.random.seed(2)
    assert np.array_equal(first.returns, rollout(policy, generation, 0, envs).returns)


@pytest.mark.parametrize(("fault", "what"), [("nan_reward", "reward is not finite"), ("nan_obs", "observation is")])
def test_a_value_that_is_not_finite_names_generation_member_and_step(fault, what):
    seeds = episode_seeds(make()[1].noise, 2)
    policy, generation, envs, _ = make(toy.make_fault(fault, at=3, seed=int(seeds[2, 1])))
    with pytest.raises(EpisodeError, match=f"generation 3, member 2, episode 1, step 3, seed {seeds[2, 1]}: .*{what}"):
        rollout(policy, generation, 0, envs)


@pytest.mark.parametrize(
    ("fault", "step", "what"),
    [
        ("raise", 3, "ZeroDivisionError: broken step"),
        ("old_api", 3, "ValueError"),
        ("reset", 0, "ValueError: broken reset"),
    ],
)
def test_an_env_that_raises_is_named_with_its_traceback(fault, step, what):
    policy, generation, _envs, _ = make()
    broken = env_factory(toy.make_fault(fault, at=3)).vector(4)
    with pytest.raises(EpisodeError, match=f"generation 3, member 0, episode 0, step {step}, seed .*{what}") as caught:
        rollout(policy, generation, 0, broken)
    assert "Traceback (most recent call last)" in str(caught.value)


def test_discrete_actions_and_observations():
    policy, generation, envs, _ = make(lambda: gym.make("FrozenLake-v1", max_episode_steps=20))
    result = rollout(policy, generation, 0, envs)
    assert (result.lengths > 0).all() and (result.lengths <= 20).all()
