"""Simulations whose contact forces are observed, stepped one after the other."""

from typing import Any

import mujoco
import numpy as np


class ContactBatch:
    """As ``mujoco.batch.Batch``, with ``mj_rnePostConstraint`` after each step, as Gymnasium calls it.

    ``Batch`` has no place for that call, ``cfrc_ext`` cannot be had without it, and a sensor that would make the
    engine call it sees only the first of RK4's four stages. So one MjData takes the simulations in turn, which
    is what a thread of ``Batch`` does.
    """

    _SPEC = (
        mujoco.mjtState.mjSTATE_FULLPHYSICS.value
        | mujoco.mjtState.mjSTATE_WARMSTART.value
        | mujoco.mjtState.mjSTATE_CTRL.value
    )

    def __init__(self, task: Any, num_envs: int):
        self.model, self.data = task.model, mujoco.MjData(task.model)
        self.state = np.zeros((num_envs, mujoco.mj_stateSize(self.model, self._SPEC)))
        self.warning = np.zeros((num_envs, mujoco.mjtWarning.mjNWARNING.value, 2), dtype=np.int32)
        self._rows = list(self.state)
        self._outputs: list[tuple[np.ndarray, np.ndarray]] = []

    def bind(self, name: str) -> np.ndarray:
        states = {
            "qpos": mujoco.mjtState.mjSTATE_QPOS,
            "qvel": mujoco.mjtState.mjSTATE_QVEL,
            "ctrl": mujoco.mjtState.mjSTATE_CTRL,
        }
        if name in states:
            part = states[name].value
            before = mujoco.mj_stateSize(self.model, self._SPEC & (part - 1))
            return self.state[:, before : before + mujoco.mj_stateSize(self.model, part)]
        source = getattr(self.data, name)
        output = np.zeros((len(self.state), *source.shape))
        self._outputs.append((output, source))
        return output

    def reset(self, mask: np.ndarray, keyframe: int, stage: int) -> None:
        mujoco.mj_resetData(self.model, self.data)
        for i in np.flatnonzero(mask).tolist():
            self._keep(i)

    def forward(self, mask: np.ndarray, contact_forces: bool = False) -> None:
        for i in np.flatnonzero(mask).tolist():
            mujoco.mj_resetData(self.model, self.data)
            mujoco.mj_setState(self.model, self.data, self._rows[i], self._SPEC)
            mujoco.mj_forward(self.model, self.data)
            if contact_forces:  # Gymnasium's are zero after a reset
                mujoco.mj_rnePostConstraint(self.model, self.data)
            self._keep(i)

    def step(self, mask: np.ndarray | None, nstep: int) -> None:
        model, data, spec = self.model, self.data, self._SPEC
        warnings = data.warning.number
        for i in range(len(self._rows)) if mask is None else np.flatnonzero(mask).tolist():
            mujoco.mj_setState(model, data, self._rows[i], spec)
            mujoco.mj_step(model, data, nstep=nstep)
            mujoco.mj_rnePostConstraint(model, data)
            self._keep(i)
            if warnings.any():
                self.warning[i, :, 1] = warnings
                warnings[:] = 0

    def _keep(self, i: int) -> None:
        mujoco.mj_getState(self.model, self.data, self._rows[i], self._SPEC)
        for output, source in self._outputs:
            output[i] = source
