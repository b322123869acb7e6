"""Any module for all members at once, by ``torch.func.vmap``: its forward sees what it would see for one member.

Layers stand in the forms of :mod:`eggroll_rl.forms`, in a copy of the module; others get explicit parameters.

Shapes: N members, B batch, O outputs, I inputs, R rank.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from eggroll_rl.errors import UnsupportedModuleError
from eggroll_rl.forms import AttentionForm, Form, form_of

_MEMORY_BUDGET = 2**28  # bytes of one chunk of members, where torch.func evaluates them
_CHUNKS: WeakKeyDictionary[nn.Module, dict[Any, int]] = WeakKeyDictionary()  # by module and shapes
_OF_VMAP = ("vmap", "functorch", "Batching rule", "data pointer")
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a forward: by position, by name
_ONE_BY_ONE = "one at a time they can be: EvolutionStrategy.step(fitness_fn)"


class MemberWise(nn.Module):
    """Any module, for all members at once by ``torch.func.vmap``.

    :param mean: the module, which is left as it is
    :param per_member: by the parameter's id, factors of the members' steps, or their values (N, *shape)
    """

    def __init__(self, mean: nn.Module, per_member: "dict[int, tuple[Tensor, Tensor] | Tensor]"):
        super().__init__()
        self.size = len(tree_leaves(list(per_member.values()))[0])
        factored = {key for key, value in per_member.items() if isinstance(value, tuple)}
        # In a list: these must not be found as children, whose parameters somebody could take for the members'.
        self._template = [_member_form(mean, factored, {})]
        self._tensors: dict[str, Tensor] = {}
        self._mean, self._per_member = [mean], per_member
        for path, layer in self._template[0].named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in layer._parameters.items():
                value = per_member.get(id(parameter))
                if isinstance(value, Tensor):
                    self._tensors[prefix + name] = value
                elif isinstance(value, tuple):  # a layer without a form needs the product
                    a, b = value
                    dense = (a @ b.transpose(1, 2)).view(self.size, *parameter.shape)
                    self._tensors[prefix + name] = parameter.detach() + dense
            for name in layer._buffers:
                if name.endswith("_a") and isinstance(layer, Form):
                    value = per_member[id(getattr(layer.__dict__["_base"], name[:-2]))]
                    self._tensors[f"{prefix}{name}"], self._tensors[f"{prefix}{name[:-2]}_b"] = value

    def forward(self, *inputs: Any) -> Any:
        """Evaluate rows (N·B, ...), member by member."""
        each = tree_map(lambda x: x.unflatten(0, (self.size, -1)) if isinstance(x, Tensor) else x, inputs)
        arguments: _Arguments = (each, {})
        result = self._evaluate(arguments, tree_map(lambda x: 0 if isinstance(x, Tensor) else None, arguments))
        return tree_map(lambda x: x.flatten(0, 1) if isinstance(x, Tensor) else x, result)

    def evaluate(self, inputs: tuple[Any, ...], keywords: dict[str, Any], per_member: bool) -> Any:
        """Evaluate the members; see :meth:`Population.forward`."""
        arguments = (inputs, keywords)
        dims = tree_map(
            lambda x: 0 if per_member and isinstance(x, Tensor) and not _is_expanded(x) else None, arguments
        )
        if per_member:  # what is the same for all stays constant, so that a forward may branch on it
            arguments = tree_map(lambda x: x[0] if isinstance(x, Tensor) and _is_expanded(x) else x, arguments)
        return self._evaluate(arguments, dims)

    def _evaluate(self, arguments: _Arguments, dims: _Arguments) -> Any:
        """Evaluate the members; ``dims`` has a 0 for each tensor (N, ...) of theirs, and None for what they share."""
        told: dict[str, Any] = {}

        def one(tensors: dict[str, Tensor], arguments: _Arguments) -> list[Tensor]:
            leaves, told["structure"] = tree_flatten(self._call(tensors, arguments))
            told["others"] = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        fast_attention = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights itself
        try:
            chunk = self._chunk(arguments, dims)
            before = self._state()
            mapped = torch.func.vmap(one, in_dims=(0, dims), randomness="error", chunk_size=chunk)
            tensors = iter(mapped(self._tensors, arguments))
            self._refuse_changes(before)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _OF_VMAP):
                raise
            raise UnsupportedModuleError(
                f"torch.func cannot evaluate all members of this module in one call ({' '.join(str(error).split())}); "
                f"{_ONE_BY_ONE}"
            ) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)
        leaves = [next(tensors) if other is None else other[0] for other in told["others"]]
        return tree_unflatten(leaves, told["structure"])

    def _call(self, tensors: dict[str, Tensor], arguments: _Arguments) -> Any:
        return torch.func.functional_call(self._template[0], tensors, *_copies(arguments), tie_weights=False)

    def _state(self) -> dict[str, Any]:
        """Return what forward must leave alone: which tensors the modules hold, and how often each was written."""
        return {
            f"{path}.{name}" if path else name: (id(value), None if value.is_inference() else value._version)
            for path, layer in self._template[0].named_modules()
            # A hook that sets an attribute before each forward, as weight norm's does, carries nothing over.
            for name, value in [*layer._buffers.items(), *({} if layer._forward_pre_hooks else layer.__dict__).items()]
            if isinstance(value, Tensor)
        }

    def _refuse_changes(self, before: dict[str, Any]) -> None:
        after = self._state()
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                raise UnsupportedModuleError(
                    f"forward updates {name!r}, so that members would see each other's: call eval(), or {_ONE_BY_ONE}"
                )

    def _chunk(self, arguments: _Arguments, dims: _Arguments) -> int | None:
        """Return how many members fit into the memory budget, by what the first of them computes.

        :raises UnsupportedModuleError: the first member does not compute what the module would at its parameters
        """
        leaves, structure = tree_flatten(arguments)
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves]
        key = (structure, *tree_leaves(dims), *shapes)
        chunks = _CHUNKS.setdefault(self._mean[0], {})
        if key not in chunks:
            sample = tree_map(lambda x, dim: x if dim is None else x[0], arguments, dims)
            before = self._state()
            with _Counting() as counting:
                result = self._call({name: tensor[0] for name, tensor in self._tensors.items()}, sample)
            self._refuse_changes(before)
            if not chunks:
                self._check(sample, result)
            chunks[key] = max(1, _MEMORY_BUDGET // max(counting.bytes, 1))
        return chunks[key] if chunks[key] < self.size else None

    def _check(self, sample: _Arguments, result: Any) -> None:
        """Compare the first member with the module itself, once: forms cannot reach what is no child of a module."""
        mean = self._mean[0]
        values: dict[str, Tensor] = {name: buffer.clone() for name, buffer in mean.named_buffers()}
        plain = dict(values)
        for name, parameter in mean.named_parameters():
            value = self._per_member.get(id(parameter))
            if isinstance(value, tuple):
                values[name] = parameter.detach() + (value[0][0] @ value[1][0].t()).view(parameter.shape)
            elif value is not None:
                values[name] = value[0]

        def at(values: dict[str, Tensor]) -> Tensor:
            return _joined(torch.func.functional_call(mean, values, *_copies(sample)))

        found, expected = _joined(result), at(values)
        # Rounding may turn a neuron that is on or off; what is not perturbed is wrong by all of the perturbation.
        allowed = 0.1 * (expected - at(plain)).norm() + 1e-2 * expected.norm() * torch.finfo(found.dtype).eps ** 0.25
        if not (found - expected).norm() <= allowed and expected.isfinite().all():
            raise UnsupportedModuleError(
                "this module's forward reaches layers other than as its children, where members cannot be told apart; "
                f"{_ONE_BY_ONE}"
            )


def _is_expanded(x: Tensor) -> bool:
    """Say whether all of x's first entries are one and the same memory, as ``expand`` gives them."""
    return x.layout is torch.strided and x.stride(0) == 0


def _copies(arguments: _Arguments) -> _Arguments:
    """Copy the tensors: a forward may work in place, and other members see the same inputs."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments)


def _joined(tree: Any) -> Tensor:
    parts = [x.flatten() for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]
    return torch.cat([part.to(parts[0]) for part in parts]) if parts else torch.zeros(1)


class _Counting(TorchDispatchMode):
    """Adds up the bytes of all results of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes += sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


def _member_form(module: nn.Module, factored: set[int], seen: dict[int, nn.Module]) -> nn.Module:
    """Copy the module tree with forms in place of layers; everything else keeps its own forward."""
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper computes the module that it wraps
    if id(module) in seen:
        return seen[id(module)]
    form = form_of(module)
    if form is not None:
        names = {name for name, parameter in module.named_parameters(recurse=False) if id(parameter) in factored}
        if form is AttentionForm:
            out_proj = _member_form(module.get_submodule("out_proj"), factored, seen)
            converted: nn.Module = AttentionForm(module, frozenset(names), out_proj)
        else:
            converted = form(module, frozenset(names))
    else:
        # Not copy.copy(), which parametrized modules refuse.
        kind: Any = type(module)
        converted = kind.__new__(kind)
        converted.__dict__.update(module.__dict__)
        converted.__dict__.pop("_compiled_call_impl", None)  # of the original
        converted._parameters = dict(module._parameters)
        converted._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        converted._modules = {
            name: child if child is None else _member_form(child, factored, seen)
            for name, child in module._modules.items()
        }
    seen[id(module)] = converted
    return converted
