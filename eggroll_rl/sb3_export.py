"""SB3's MLP policies as ours: the same deterministic actions, from a file whose loading executes nothing."""

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from eggroll_rl.errors import ConfigError
from eggroll_rl.policies import ACTIVATIONS, MlpPolicy

_KINDS = {
    "stable_baselines3.common.policies.ActorCriticPolicy": "actor-critic",
    "stable_baselines3.sac.policies.SACPolicy": "soft actor",
    "sb3_contrib.tqc.policies.TQCPolicy": "soft actor",
    "stable_baselines3.td3.policies.TD3Policy": "actor",
    "sb3_contrib.ars.policies.ARSPolicy": "action net",
    "sb3_contrib.ars.policies.ARSLinearPolicy": "action net",
}


def export_policy(model: BaseAlgorithm) -> MlpPolicy:
    """Return what ``model.predict(obs, deterministic=True)`` computes, ``VecNormalize``'s part of it included.

    Covers the MLP policies of PPO, A2C, TRPO, SAC, TD3, DDPG, TQC and ARS, on the spaces of
    :class:`eggroll_rl.policies.MlpPolicy`; float32 rounds differently where the action bounds are not ±1, for
    they are multiplied into the last layer.

    :raises ConfigError: the policy is something else, and the text says what
    """
    policy: Any = model.policy
    if isinstance(policy, MlpPolicy):
        return policy
    layers, squash = _actor(policy)
    extractor = getattr(getattr(policy, "actor", None), "features_extractor", None) or policy.features_extractor
    if type(extractor) is not FlattenExtractor:
        raise ConfigError(f"{type(extractor).__name__} is not an MLP's: only flat observations can be exported")
    linears: list[Any] = layers[::2]
    activations = {type(layer) for layer in layers[1::2]}
    if not all(type(layer) is nn.Linear for layer in linears) or len(activations) > 1 or len(layers) % 2 == 0:
        raise ConfigError(f"{type(policy).__name__} is not linear layers with one activation between them: {layers}")
    activation = activations.pop() if activations else nn.Tanh
    if activation not in ACTIVATIONS.values():
        raise ConfigError(f"activation {activation.__name__} is none of {', '.join(ACTIVATIONS)}")
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None and not normalizer.norm_obs:
        normalizer = None
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        exported = MlpPolicy(
            policy.observation_space,
            policy.action_space,
            net_arch=[layer.out_features for layer in linears[:-1]],
            activation_fn=activation,
            normalize_obs=normalizer is not None,
            squash_output=squash,
            with_bias=linears[0].bias is not None,
        )
    with torch.no_grad():
        for ours, theirs in zip((m for m in exported.network if isinstance(m, nn.Linear)), linears, strict=True):
            ours.load_state_dict(theirs.state_dict())
        if not squash and isinstance(policy.action_space, spaces.Box):
            _scale_outputs(exported, linears[-1])
    if normalizer is not None:
        _copy_moments(exported, normalizer)
    exported.set_training_mode(False)
    return exported


def _actor(policy: Any) -> tuple[list[nn.Module], bool]:
    """Return the layers from the flat observation to the action, without a closing tanh, and whether there is one."""
    # By exact type: a subclass may compute anything.
    kind = _KINDS.get(f"{type(policy).__module__}.{type(policy).__name__}")
    if kind == "actor-critic":
        return [*policy.mlp_extractor.policy_net, policy.action_net], policy.squash_output
    if kind == "soft actor":
        return [*policy.actor.latent_pi, policy.actor.mu], True
    if kind == "actor":
        return [*policy.actor.mu][:-1], True
    if kind == "action net":
        layers = [*policy.action_net]
        return (layers[:-1], True) if policy.squash_output else (layers, False)
    raise ConfigError(f"{type(policy).__name__} is none of the policies that can be exported")


def _scale_outputs(exported: MlpPolicy, last: Any) -> None:
    """Let the last layer give actions in units of the bounds, as ours does: SB3 clips them in the env's units."""
    middle, half_range = exported._action_middle, exported._action_half_range
    ours: Any = exported.network[-1]
    ours.weight.copy_(last.weight / half_range[:, None])
    if last.bias is not None:
        ours.bias.copy_((last.bias - middle) / half_range)
    elif middle.any():
        raise ConfigError("a last layer without bias cannot be exported to action bounds that are not symmetric")


def _copy_moments(exported: MlpPolicy, normalizer: VecNormalize) -> None:
    ours, theirs = exported.normalizer, normalizer.obs_rms
    if ours is None or isinstance(theirs, dict):
        raise ConfigError("only one Box of observations can be exported with its VecNormalize")
    if (normalizer.clip_obs, normalizer.epsilon) != (ours.clip, ours.epsilon):
        raise ConfigError(
            f"VecNormalize must have clip_obs={ours.clip} and epsilon={ours.epsilon} to be exported, "
            f"got {normalizer.clip_obs} and {normalizer.epsilon}"
        )
    mean, variance = (torch.as_tensor(value, dtype=torch.float64).flatten() for value in (theirs.mean, theirs.var))
    count = torch.tensor(theirs.count, dtype=torch.float64)
    # Through load_state_dict, which computes what follows from the moments.
    ours.load_state_dict({"count": count, "mean": mean, "m2": variance * count})
