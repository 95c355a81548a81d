"""A copy of a trunk for inference: norms folded, activations and sums fused into convolutions, channels-last.

The module is traced (torch.fx) and its graph rewritten; a part that cannot be traced is left as it is and its children
are prepared each for itself. The original is not touched.
"""

from __future__ import annotations

import copy
import operator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rcnn.ops.folding import FoldedWeights, is_fixed_norm
from rcnn.ops.fused import Activation, ConvGeometry, FusedConv2d, FusedFlatLinear, FusedLinear, FusedPointwise
from rcnn.ops.strips import StripwiseDepthwise

_ACTIVATION_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation.RELU,
    nn.ReLU6: Activation.RELU6,
    nn.Hardswish: Activation.HARDSWISH,
    nn.Hardsigmoid: Activation.HARDSIGMOID,
    nn.SiLU: Activation.SILU,
    nn.Sigmoid: Activation.SIGMOID,
}
_ACTIVATION_FUNCTIONS: dict[Any, Activation] = {
    F.relu: Activation.RELU,
    torch.relu: Activation.RELU,
    torch.relu_: Activation.RELU,
    F.relu6: Activation.RELU6,
    F.hardswish: Activation.HARDSWISH,
    F.hardsigmoid: Activation.HARDSIGMOID,
    F.silu: Activation.SILU,
    torch.sigmoid: Activation.SIGMOID,
    "relu": Activation.RELU,
    "relu_": Activation.RELU,
    "sigmoid": Activation.SIGMOID,
    "sigmoid_": Activation.SIGMOID,
}
_SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_DROPOUTS: tuple[Any, ...] = (F.dropout, F.dropout2d, torchvision.ops.stochastic_depth)


def prepare_for_inference(
    module: nn.Module, *, dtype: torch.dtype = torch.float32, channels: int | None = None
) -> nn.Module:
    """A copy of `module` in evaluation mode for inference in `dtype`, with the same arguments and results.

    In float32 and float64 the results equal the module's up to rounding; with bfloat16 activations are bfloat16 and so
    are the results. Tensors given to the copy are converted (dtype, channels-last). It computes no gradients, and its
    weights are packed: it cannot be moved, trained or saved. It reads the original's weights when it first runs, and
    may go on sharing those of linear layers; if the original is trained in between, it refuses to run.

    `channels` of the maps that are given, where the module flattens them: they are then read as they lie in memory.
    Meant for trunks of convolutions and linear layers.
    """
    return PreparedModule(_prepared(_shared_copy(module).eval(), dtype, channels), dtype)


class PreparedModule(nn.Module):
    """Brings what it is given into the form the rewritten module wants, and runs it without gradients."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.dtype = dtype

    def forward(self, *arguments: Any) -> Any:
        with torch.no_grad():
            return self.inner(*pytree.tree_map_only(Tensor, self._entering, arguments))

    def _entering(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if x.dim() == 4:
            # Before the conversion: both at once are walked element by element, at a third of the speed.
            x = x.contiguous(memory_format=torch.channels_last)
        return x.to(self.dtype)


def _shared_copy(module: nn.Module) -> nn.Module:
    """The module tree copied, its tensors not."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})


def _prepared(module: nn.Module, dtype: torch.dtype, channels: int | None = None) -> nn.Module:
    graph_module = _traced(module)
    if graph_module is not None:
        _Rewriter(graph_module, dtype, channels).run()
        return graph_module
    for name, child in module.named_children():
        setattr(module, name, _prepared(child, dtype))
    _convert_own_tensors(module, dtype)
    return module


def _traced(module: nn.Module) -> fx.GraphModule | None:
    """The module as a graph; None where its forward depends on values, or takes something else than tensors.

    A list of modules has no forward: it stays one, its members are called by its owner.
    """
    if type(module).forward is nn.Module.forward:
        return None
    root = nn.Sequential(module) if _Tracer().is_leaf_module(module, "") else module
    try:
        with torch.no_grad():  # what depends on whether a graph is recorded must see that none is
            return fx.GraphModule(root, _Tracer().trace(root))
    except Exception:  # whatever a forward may raise when it meets a proxy
        return None


class _MapMean(nn.Module):
    """The mean of each map, [N, C, 1, 1]: in bfloat16 and channels-last twice as fast as `nn.AdaptiveAvgPool2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, x.shape[-2:])


class _Tracer(fx.Tracer):
    """Keeps the layers that the rewriting knows as one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, nn.Conv2d | nn.Linear) or is_fixed_norm(m) or super().is_leaf_module(m, module_qualified_name)
        )


def _convert_own_tensors(module: nn.Module, dtype: torch.dtype) -> None:
    """Floating-point tensors that the module itself holds, in the dtype of the activations; new ones, not in place."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.is_floating_point():
            converted = tensor.detach().to(dtype, copy=True)
            if name in module._parameters:
                converted = nn.Parameter(converted, requires_grad=False)
            setattr(module, name, converted)


class _Rewriter:
    """Replaces convolutions, linear layers and what follows each by fused layers, in one graph."""

    def __init__(self, graph_module: fx.GraphModule, dtype: torch.dtype, channels: int | None) -> None:
        self.root = graph_module
        self.graph = graph_module.graph
        self.dtype = dtype
        self.channels = channels
        self.count = 0

    def run(self) -> None:
        self._drop_identities()
        self._ask_inputs_for_sizes()
        for node in list(self.graph.nodes):
            match self._module(node):
                case nn.Conv2d() as conv if geometry_of(conv) is not None:
                    self._fuse_convolution(node, conv)
                case nn.Linear() as linear:
                    self._fuse_linear(node, linear)
                case nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)) if self.dtype == torch.bfloat16:
                    self._replace(node, _MapMean(), (node.args[0],))
        self._pair_strips()
        self._join_siblings()
        self.graph.eliminate_dead_code()
        self.root.delete_all_unused_submodules()
        for module in list(self.root.modules()):
            _convert_own_tensors(module, self.dtype)
        self.graph.lint()
        self.root.recompile()

    # -------------------------------------------------------------------------------------------------- recognising

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        """The node that alone uses this one, as its first argument or a term of a sum."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _activation(self, node: fx.Node) -> Activation | None:
        if node.op == "call_module":
            module = self._module(node)
            if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0.0, 6.0):
                return Activation.RELU6
            return _ACTIVATION_MODULES.get(type(module)) if module is not None else None
        if node.op in ("call_function", "call_method"):
            return _ACTIVATION_FUNCTIONS.get(node.target)
        return None

    def _is_sum(self, node: fx.Node) -> bool:
        """Of two nodes, without a factor."""
        if node.op not in ("call_function", "call_method") or node.target not in _SUMS or node.kwargs:
            return False
        return len(node.args) == 2 and all(isinstance(term, fx.Node) for term in node.args)

    def _is_flatten(self, node: fx.Node) -> bool:
        match self._module(node):
            case nn.Flatten() as module:
                return (module.start_dim, module.end_dim) == (1, -1)
        return node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs

    # -------------------------------------------------------------------------------------------------- rewriting

    def _drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            is_module = isinstance(self._module(node), nn.Identity | nn.Dropout | nn.Dropout2d)
            if is_module or (node.target in _DROPOUTS and _training_argument(node) is False):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _ask_inputs_for_sizes(self) -> None:
        """Height and width behind a 1x1 convolution are those before it: asking there leaves its result one user less.

        So the sum of a pyramid (lateral map plus the coarser one, enlarged to the lateral's size) can be fused.
        """
        for node in self.graph.nodes:
            if node.target is getattr and node.args[1] == "shape" and all(map(_asks_size, node.users)):
                source = node.args[0]
                while self._keeps_size(source):
                    source = source.args[0]
                node.args = (source, "shape")

    def _keeps_size(self, node: fx.Node) -> bool:
        module = self._module(node)
        if isinstance(module, nn.Conv2d):
            geometry = geometry_of(module)
            plain = ConvGeometry(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=module.groups)
            return geometry == plain and module.kernel_size == (1, 1)
        return module is not None and is_fixed_norm(module)

    def _fuse_convolution(self, node: fx.Node, conv: nn.Conv2d) -> None:
        geometry = geometry_of(conv)
        assert geometry is not None
        last, norm, activation, other = node, None, Activation.NONE, None
        user = self._only_user(last)
        if user is not None and is_fixed_norm(module := self._module(user) or nn.Identity()):
            last, norm = user, module
            self._expose_activation(last, norm)
            user = self._only_user(last)
        if user is not None and (found := self._activation(user)):
            last, activation = user, found
        elif user is not None and self._is_sum(user) and user.args[0] is not user.args[1]:
            other = user.args[1] if user.args[0] is last else user.args[0]
            last = user
            user = self._only_user(last)
            if user is not None and (found := self._activation(user)):
                last, activation = user, found
        weights = FoldedWeights(conv, norm, self.dtype)
        if other is None and FusedPointwise.serves(conv.kernel_size, geometry):
            self._replace(last, FusedPointwise(weights=weights, activation=activation), (node.args[0],))
            return
        fused = FusedConv2d(
            weights=weights,
            geometry=geometry,
            activation=activation,
            overwrites_other=isinstance(other, fx.Node) and self._is_free_after(other, last),
        )
        self._replace(last, fused, (node.args[0],) if other is None else (node.args[0], other))

    def _pair_strips(self) -> None:
        for node in list(self.graph.nodes):
            source = node.args[0] if len(node.args) == 1 else None
            depthwise = self._module(node)
            if not isinstance(depthwise, FusedConv2d) or not isinstance(source, fx.Node) or len(source.users) > 1:
                continue
            expand = self._module(source)
            if isinstance(expand, FusedPointwise) and StripwiseDepthwise.serves(expand, depthwise):
                self._replace(node, StripwiseDepthwise(expand=expand, depthwise=depthwise), (source.args[0],))

    def _join_siblings(self) -> None:
        """1x1 convolutions that end the module and read one map (classes and deltas of an RPN) become one: large maps
        are read from main memory, and once is enough."""
        readers: dict[tuple[fx.Node, Activation], list[fx.Node]] = {}
        for node in self.graph.nodes:
            layer = self._module(node)
            if isinstance(layer, FusedPointwise) and all(user.op == "output" for user in node.users):
                readers.setdefault((node.args[0], layer.activation), []).append(node)
        for (source, _), nodes in readers.items():
            layers = [layer for node in nodes if isinstance(layer := self._module(node), FusedPointwise)]
            if len(layers) < 2:
                continue
            name = self._add_module(FusedPointwise.joined(layers))
            with self.graph.inserting_before(nodes[0]):
                sizes = [layer.out_channels for layer in layers]
                parts = self.graph.call_method("split", (self.graph.call_module(name, (source,)), sizes, 1))
                for number, node in enumerate(nodes):
                    node.replace_all_uses_with(self.graph.call_function(operator.getitem, (parts, number)))

    def _expose_activation(self, node: fx.Node, norm: nn.Module) -> None:
        """timm's norms carry the activation that follows them: make it a step of its own."""
        act = getattr(norm, "act", None)
        if not isinstance(act, nn.Module) or isinstance(act, nn.Identity):
            return
        name = self._add_module(act)
        with self.graph.inserting_after(node):
            step = self.graph.call_module(name)
        node.replace_all_uses_with(step)
        step.args = (node,)

    def _fuse_linear(self, node: fx.Node, linear: nn.Linear) -> None:
        last, activation, source = node, Activation.NONE, node.args[0]
        user = self._only_user(last)
        if user is not None and (found := self._activation(user)):
            last, activation = user, found
        weight = linear.weight.detach()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().clone()
        weight, bias = weight.to(self.dtype), bias.to(self.dtype)
        assert isinstance(source, fx.Node)
        channels = self._channels_before_flatten(source)
        if channels is None:
            fused: nn.Module = FusedLinear(weight=weight, bias=bias, activation=activation)
        else:
            source = source.args[0]
            fused = FusedFlatLinear(weight=weight, bias=bias, activation=activation, channels=channels)
        self._replace(last, fused, (source,))

    def _channels_before_flatten(self, node: fx.Node) -> int | None:
        """The channels of the maps that this node flattens, if it does and they are known."""
        if not self._is_flatten(node):
            return None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        module = self._module(source)
        if isinstance(module, FusedConv2d | FusedPointwise):
            return module.out_channels
        return self.channels if source.op == "placeholder" else None

    def _replace(self, last: fx.Node, fused: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Puts the fused layer where the chain ends: everything it needs is there by then."""
        name = self._add_module(fused)
        with self.graph.inserting_before(last):
            step = self.graph.call_module(name, arguments)
        last.replace_all_uses_with(step)
        self.graph.eliminate_dead_code()

    def _add_module(self, module: nn.Module) -> str:
        self.count += 1
        name = f"fused_{self.count}"
        self.root.add_module(name, module)
        return name

    def _is_free_after(self, node: fx.Node, last: fx.Node) -> bool:
        """Whether the tensor of `node` belongs to this graph alone and nobody reads it once `last` has run."""
        if not self._is_own_tensor(node):
            return False
        return all(user <= last and not _may_be_view(user, self._module(user)) for user in node.users)

    def _is_own_tensor(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), FusedConv2d | FusedPointwise) or node.target is F.interpolate


def _asks_size(node: fx.Node) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[1], slice):
        return False
    return (node.args[1].start, node.args[1].stop, node.args[1].step) == (-2, None, None)


def _may_be_view(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the result of the node could share memory with its argument. Sums and known layers make new tensors."""
    if module is not None:
        return not isinstance(
            module, FusedConv2d | FusedPointwise | nn.Conv2d | nn.MaxPool2d | nn.AdaptiveAvgPool2d | _MapMean
        ) and not is_fixed_norm(module)
    return node.target not in (operator.add, torch.add, "add", F.interpolate, F.max_pool2d)


def _training_argument(node: fx.Node) -> Any:
    if "training" in node.kwargs:
        return node.kwargs["training"]
    position = 3 if node.target is torchvision.ops.stochastic_depth else 2
    return node.args[position] if len(node.args) > position else True


def geometry_of(conv: nn.Conv2d) -> ConvGeometry | None:
    """How the convolution walks, or None where it is of a kind that is not known here."""
    same = _is_timm_same(conv)
    if (type(conv) is not nn.Conv2d and not same) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    return ConvGeometry(
        stride=_pair(conv.stride),
        padding=(0, 0) if same else _pair(conv.padding),
        dilation=_pair(conv.dilation),
        groups=conv.groups,
        same=same,
    )


def _is_timm_same(conv: nn.Conv2d) -> bool:
    """timm's Conv2dSame pads at run time; told by its name so that timm need not be imported."""
    return type(conv).__name__ == "Conv2dSame" and type(conv).__module__.startswith("timm.")


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)
