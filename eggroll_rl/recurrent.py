"""A policy with memory: a recurrent cell between two layers, whose state every member carries for itself."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from eggroll_rl.checks import check_whole, shown
from eggroll_rl.errors import ConfigError
from eggroll_rl.policies import CnnPolicy, LinearPolicy, MlpPolicy, MultiInputPolicy

CELLS: dict[str, Any] = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}


class Recurrent(nn.Module):
    """Layers, a cell, and a last layer."""

    def __init__(self, encoder: nn.Module, cell: nn.RNNCellBase, last: nn.Module):
        super().__init__()
        self.encoder, self.cell, self.last = encoder, cell, last

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Map inputs (N, I) and states (N, S) to outputs (N, O) and the next states."""
        x = self.encoder(x)
        if state.shape[1] == self.cell.hidden_size:
            h = self.cell(x, state)
            return self.last(h), h
        h, c = self.cell(x, state.chunk(2, dim=1))  # an LSTM's two, side by side in one state
        return self.last(h), torch.cat([h, c], dim=1)


class RecurrentPolicy(MlpPolicy):
    """A GRU or LSTM cell behind the layers of ``net_arch``, for tasks in which an observation does not tell everything.

    ``predict`` takes and returns the state as SB3-contrib's recurrent policies do: an array (N, S), None at first.

    :param net_arch: sizes of the layers before the cell; [64] by default
    :param hidden_size: of the cell
    :param cell: ``"gru"`` or ``"lstm"``
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        net_arch: list[int] | None = None,
        hidden_size: int = 64,
        cell: str = "gru",
        **kwargs: Any,
    ):
        self.check_values({"hidden_size": hidden_size, "cell": cell, **kwargs})
        self.hidden_size, self.cell = hidden_size, cell
        self.state_size = hidden_size * (2 if cell == "lstm" else 1)
        super().__init__(observation_space, action_space, net_arch=[64] if net_arch is None else net_arch, **kwargs)

    @classmethod
    def check_values(cls, given: dict[str, Any]) -> None:
        """As the base, with the cell's."""
        super().check_values(given)
        check_whole("hidden_size", given.get("hidden_size", 64), 1)
        cell = given.get("cell", "gru")
        if not isinstance(cell, str) or cell not in CELLS:
            raise ConfigError(f"cell must be one of {', '.join(CELLS)}, got {shown(cell)}")
        if given.get("features_extractor_class") is not None:
            raise ConfigError("RecurrentPolicy takes no features_extractor_class")

    def _make_network(self) -> nn.Module:
        sizes = [self.n_inputs, *self.net_arch]
        layers = [*self._make_layers(sizes, False), self.activation_fn()] if self.net_arch else []
        cell = CELLS[self.cell](sizes[-1], self.hidden_size)
        for name, parameter in cell.named_parameters():
            nn.init.orthogonal_(parameter) if "weight" in name else nn.init.zeros_(parameter)
        last = self._make_layers([self.hidden_size, self.n_outputs], self.zero_last_layer)
        return Recurrent(nn.Sequential(*layers), cell, last)

    def forward(self, obs: Any, deterministic: bool = True) -> Tensor:
        """Return the actions at the start of an episode."""
        features = self.features(self.encode(obs))
        return self.actions(self.network(features, features.new_zeros(len(features), self.state_size))[0])

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Return actions and the next states (N, S), from the states before; zeros where an episode starts."""
        self.set_training_mode(False)
        obs, vectorized = self.obs_to_tensor(observation)
        with torch.no_grad():
            features = self.features(self.encode(obs))
            states = np.zeros((len(features), self.state_size), np.float32) if state is None else np.array(state)
            if episode_start is not None:
                states[np.asarray(episode_start, dtype=bool)] = 0.0
            outputs, following = self.network(features, torch.from_numpy(states).to(features.device))
            actions = self.actions(outputs).cpu().numpy()
        cast = self.in_space()
        actions = actions if cast is None else cast(actions)
        return (actions if vectorized else actions[0]), following.cpu().numpy()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "hidden_size": self.hidden_size, "cell": self.cell}


POLICIES: dict[str, type[MlpPolicy]] = {
    policy.__name__: policy for policy in (MlpPolicy, LinearPolicy, CnnPolicy, MultiInputPolicy, RecurrentPolicy)
}
