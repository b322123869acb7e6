"""Layers as one member sees them: the layer's own computation at perturbed parameters, without forming A Bᵀ.

Each form stands where its layer stood in a copy of the module, and takes and returns what the layer does.
:class:`eggroll_rl.population.Population` runs the copy under ``torch.func.vmap``, for all members in one call. A layer
that has no form keeps its own forward and gets explicit parameters.

Shapes: O outputs, I inputs, R rank; of recurrent layers T steps, B batch, H hidden.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.rnn import PackedSequence

from eggroll_rl.errors import UnsupportedModuleError

PACKED_ADVICE = (
    "cannot be evaluated for all members in one call: give it padded (torch.nn.utils.rnn.pad_packed_sequence) and "
    "leave the padding out of the fitness, or evaluate one member at a time: EvolutionStrategy.step(fitness_fn)"
)


def is_packed(x: Any) -> bool:
    """Say whether x is a PackedSequence."""
    return isinstance(x, PackedSequence)


class Form(nn.Module):
    """One member of a layer.

    Parameters of the layer are registered under their names, to be replaced by the member's, except the matrices in
    ``factored``: of those there are buffers ``NAME_a`` (O, R) and ``NAME_b`` (I, R), the perturbation being a bᵀ.

    :param base: the layer
    :param factored: names of its parameters that have factors
    """

    def __init__(self, base: nn.Module, factored: frozenset[str]):
        super().__init__()
        self.__dict__["_base"] = base  # no child of this one: its parameters are the mean's, and constant
        self.training = base.training
        for name, parameter in base.named_parameters(recurse=False):
            if name in factored:
                for side in "ab":
                    self.register_buffer(f"{name}_{side}", torch.empty(0))
            else:
                self.register_parameter(name, parameter)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The layer's class, for a forward that asks what it has before it."""
        base = self.__dict__.get("_base")
        return type(self) if base is None else type(base)

    def __getattr__(self, name: str) -> Any:
        """Return settings of the layer, and a matrix that somebody reaches for, as it is for this member."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_base")
            if base is None:
                raise
            if f"{name}_a" in self._buffers:
                mean, factors = self.mean(name), self.factors(name)
                assert factors is not None
                return mean + (factors[0] @ factors[1].t()).view(mean.shape)
            value = getattr(base, name)
            if isinstance(value, nn.Module | nn.Parameter) or callable(value):
                raise
            return value

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return a (O, R) and b (I, R) of a parameter, or None."""
        if f"{name}_a" not in self._buffers:
            return None
        return self._buffers[f"{name}_a"], self._buffers[f"{name}_b"]  # type: ignore[return-value]

    def mean(self, name: str) -> Tensor:
        """Return the mean of a matrix that has factors."""
        return getattr(self.__dict__["_base"], name).detach()

    def linear(self, x: Tensor, name: str, bias: str | None = None, rows: slice = slice(None)) -> Tensor:
        """Return x (..., I) times the transposed matrix ``name``, or some of its rows, plus the vector ``bias``."""
        factors = self.factors(name)
        if factors is None:
            y = x @ getattr(self, name)[rows].t()
        else:
            a, b = factors
            y = x @ self.mean(name)[rows].t() + (x @ b) @ a[rows].t()
        vector = None if bias is None else getattr(self, bias)
        return y if vector is None else y + vector[rows]


class LinearForm(Form):
    """x Wᵀ + (x b) aᵀ."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return self.linear(x, "weight", "bias")


class ConvForm(Form):
    """The factors are two convolutions one after the other: with b to R channels, then with a as 1 x 1 filters."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) or (C, ...) as the layer does."""
        base: Any = self.__dict__["_base"]
        factors = self.factors("weight")
        if factors is None:
            y = base._conv_forward(x, self.weight, None)
        else:
            a, b = factors
            weight, groups = self.mean("weight"), base.groups
            filters = b.t().reshape(-1, *weight.shape[1:]).repeat(groups, *[1] * (weight.dim() - 1))
            inner = base._conv_forward(x, filters, None)
            convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
            pointwise = a.reshape(*a.shape, *[1] * (weight.dim() - 2))
            y = base._conv_forward(x, weight, None) + convolve(inner, pointwise, groups=groups)
        bias = getattr(self, "bias", None)
        return y if bias is None else y + bias.view(-1, *[1] * (y.dim() - 1 - (x.dim() == base.weight.dim())))


class EmbeddingForm(Form):
    """A row is looked up in W and in a; the row of ``padding_idx`` is never perturbed."""

    def forward(self, index: Tensor) -> Tensor:
        """Look up whole numbers of any shape."""
        factors = self.factors("weight")
        if factors is None:
            return F.embedding(index, self.weight)
        a, b = factors
        return F.embedding(index, self.mean("weight")) + F.embedding(index, a) @ b.t()


class CellForm(Form):
    """RNNCell, GRUCell and LSTMCell, written out: ``torch.func`` cannot run torch's own for all members."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        """Return the next state, from zeros if there is none."""
        base: Any = self.__dict__["_base"]
        is_plain = isinstance(base, nn.RNNCell)
        kind = f"RNN_{base.nonlinearity.upper()}" if is_plain else type(base).__name__.removesuffix("Cell")
        if state is None:
            zeros = x.new_zeros(*x.shape[:-1], base.hidden_size)
            state = (zeros, zeros) if kind == "LSTM" else zeros
        gates_x = self.linear(x, "weight_ih", "bias_ih" if base.bias else None)
        return _cell(kind, gates_x, state, lambda h: self.linear(h, "weight_hh", "bias_hh" if base.bias else None))


class RecurrentForm(Form):
    """RNN, GRU and LSTM with layers, both directions and projections; of padded sequences, not packed ones."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        """Return outputs and the last states, in the layer's own shapes."""
        base: Any = self.__dict__["_base"]
        if is_packed(x):
            raise UnsupportedModuleError(f"{type(base).__name__} is given a PackedSequence, which {PACKED_ADVICE}")
        is_lstm, batched = base.mode == "LSTM", x.dim() == 3
        if not batched:
            x = x.unsqueeze(1)
            if state is not None:
                state = tuple(s.unsqueeze(1) for s in state) if is_lstm else state.unsqueeze(1)
        elif base.batch_first:
            x = x.transpose(0, 1)
        directions = ("", "_reverse") if base.bidirectional else ("",)
        if state is None:
            n, batch = base.num_layers * len(directions), x.shape[1]
            state = x.new_zeros(n, batch, base.proj_size or base.hidden_size)
            state = (state, x.new_zeros(n, batch, base.hidden_size)) if is_lstm else state
        last: list[Any] = []
        for layer in range(base.num_layers):
            outputs = []
            for direction in directions:
                i = len(last)
                start = (state[0][i], state[1][i]) if is_lstm else state[i]
                y, end = self._run(x, start, f"l{layer}{direction}", bool(direction))
                outputs.append(y)
                last.append(end)
            x = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        final = tuple(torch.stack(part) for part in zip(*last, strict=True)) if is_lstm else torch.stack(last)
        if not batched:
            final = tuple(part.squeeze(1) for part in final) if is_lstm else final.squeeze(1)  # type: ignore[union-attr]
            return x.squeeze(1), final
        return (x.transpose(0, 1) if base.batch_first else x), final

    def flatten_parameters(self) -> None:
        """Do nothing: a forward may ask for it, and there is nothing to flatten."""

    def _run(self, x_TBI: Tensor, state: Any, suffix: str, backwards: bool) -> tuple[Tensor, Any]:
        base: Any = self.__dict__["_base"]
        bias_ih, bias_hh = (f"bias_ih_{suffix}", f"bias_hh_{suffix}") if base.bias else (None, None)
        gates_x = self.linear(x_TBI, f"weight_ih_{suffix}", bias_ih)
        outputs = []
        for gates_x_t in gates_x.flip(0) if backwards else gates_x:
            state = _cell(base.mode, gates_x_t, state, lambda h: self.linear(h, f"weight_hh_{suffix}", bias_hh))
            if base.proj_size:
                state = (self.linear(state[0], f"weight_hr_{suffix}"), state[1])
            outputs.append(state[0] if base.mode == "LSTM" else state)
        y = torch.stack(outputs)
        return (y.flip(0) if backwards else y), state


def _cell(kind: str, gates_x: Tensor, state: Any, recurrent: Any) -> Any:
    """Return the next state, by the equations of torch's documentation.

    :param gates_x: the inputs' part of the gates, biases included
    :param recurrent: function from h to its part of the gates
    """
    if kind == "LSTM":
        h, c = state
        i, f, g, o = (gates_x + recurrent(h)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "GRU":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = gates_x.chunk(3, dim=-1), recurrent(state).chunk(3, dim=-1)
        z = (x_z + h_z).sigmoid()
        return (1 - z) * (x_n + (x_r + h_r).sigmoid() * h_n).tanh() + z * state
    return (gates_x + recurrent(state)).tanh() if kind == "RNN_TANH" else (gates_x + recurrent(state)).relu()


class AttentionForm(Form):
    """MultiheadAttention with perturbed projections."""

    def __init__(self, base: Any, factored: frozenset[str], out_proj: nn.Module):
        super().__init__(base, factored)
        self.out_proj = out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, and return the weights too where they are asked for."""
        base: Any = self.__dict__["_base"]
        if is_causal and attn_mask is None:  # as torch's own, which takes it as a hint about the mask
            raise RuntimeError("MultiheadAttention needs attn_mask where is_causal is given")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not base.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            self._project(x, i).unflatten(-1, (base.num_heads, base.head_dim)).transpose(1, 2)  # (B, heads, T, head)
            for i, x in enumerate((query, key, value))
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(base.head_dim)
        if attn_mask is not None:
            # Three dimensions are (B · heads, T, S), or without batch (heads, T, S).
            scores = _masked(
                scores, attn_mask.unflatten(0, (-1, base.num_heads)) if attn_mask.dim() == 3 else attn_mask
            )
        if key_padding_mask is not None:
            scores = _masked(scores, key_padding_mask[:, None, None])
        weights = scores.softmax(-1)
        y = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if not batched:
            y = y.squeeze(0)
        elif not base.batch_first:
            y = y.transpose(0, 1)
        if not need_weights:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights if batched else weights.squeeze(0)

    def _project(self, x: Tensor, i: int) -> Tensor:
        size = self.__dict__["_base"].embed_dim
        if self.__dict__["_base"]._qkv_same_embed_dim:
            bias = "in_proj_bias" if self.in_proj_bias is not None else None
            return self.linear(x, "in_proj_weight", bias, slice(i * size, (i + 1) * size))
        y = self.linear(x, f"{'qkv'[i]}_proj_weight")
        return y if self.in_proj_bias is None else y + self.in_proj_bias[i * size : (i + 1) * size]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask


_FORMS: dict[type[nn.Module], type[Form]] = {
    nn.Linear: LinearForm,
    NonDynamicallyQuantizableLinear: LinearForm,
    nn.Conv1d: ConvForm, nn.Conv2d: ConvForm, nn.Conv3d: ConvForm,
    nn.Embedding: EmbeddingForm,
    nn.RNNCell: CellForm, nn.GRUCell: CellForm, nn.LSTMCell: CellForm,
    nn.RNN: RecurrentForm, nn.GRU: RecurrentForm, nn.LSTM: RecurrentForm,
    nn.MultiheadAttention: AttentionForm,
}  # fmt: skip


_WITH_MATRICES = (
    nn.Linear, _ConvNd, nn.Embedding, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
)  # fmt: skip


def form_of(layer: nn.Module) -> type[Form] | None:
    """Return the form that computes what the layer does, or None: for others, altered ones, and rare settings."""
    form = _FORMS.get(type(layer))
    if form is None or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return None
    if isinstance(layer, nn.MultiheadAttention) and (layer.bias_k is not None or layer.add_zero_attn):
        return None
    return form


def matrices_of(layer: nn.Module) -> list[str]:
    """Name the layer's own weights that are matrices, by what kind of layer it is, whoever altered it."""
    if not isinstance(layer, _WITH_MATRICES):
        return []
    return [name for name, parameter in layer.named_parameters(recurse=False) if parameter.dim() > 1]


def check_layer(layer: nn.Module, name: str) -> None:
    """Refuse a layer whose members could not be evaluated exactly.

    :raises UnsupportedModuleError: active dropout, statistics that a forward updates, or an altered recurrent layer
    """
    what, advice = None, "call eval() on it"
    if isinstance(layer, _NormBase) and layer.training and layer.running_mean is not None:
        what = "updates its statistics in forward"
    elif layer.training and (
        (isinstance(layer, _DropoutNd) and layer.p > 0)
        or (isinstance(layer, nn.RNNBase | nn.MultiheadAttention) and layer.dropout > 0)
    ):
        what = "draws dropout from the global generator"
    elif isinstance(layer, nn.RNNBase | nn.RNNCellBase) and form_of(layer) is None:
        what, advice = "is recurrent and altered, by a hook or as a subclass", "use torch's own without hooks"
    if what is not None:
        raise UnsupportedModuleError(f"cannot perturb {name!r} ({type(layer).__name__}), which {what}: {advice}")
