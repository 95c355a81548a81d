from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from rcnn.ops import fused
from rcnn.ops.fused import FusedConv2d, FusedFlatLinear, FusedLinear, FusedPointwise
from rcnn.ops.preparation import PreparedModule, prepare_for_inference


def resnet(depth: int, frozen: bool) -> nn.Module:
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None, norm_layer=norm)
    return IntermediateLayerGetter(model, {f"layer{index}": str(index) for index in (1, 2, 3, 4)})


class Blocks(nn.Module):
    """Maps of a sequence of blocks, as our MobileNet backbone gives them."""

    def __init__(self, blocks: nn.Sequential, taken: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks, self.taken = blocks, taken

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taken:
                maps.append(x)
        return tuple(maps)


def mobilenet(version: str) -> nn.Module:
    blocks = getattr(torchvision.models, f"mobilenet_{version}")(weights=None).features
    return Blocks(blocks, (3, 6, len(blocks) - 1))


def lite0(frozen: bool) -> nn.Module:
    model = timm.create_model("tf_efficientnet_lite0", features_only=True)
    return freeze_batch_norm_2d(model) if frozen else model


class Pyramid(nn.Module):
    """torchvision's FPN on a backbone with a dictionary of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = resnet(18, frozen=True)
        self.fpn = torchvision.ops.FeaturePyramidNetwork(
            [64, 128, 256, 512], 32, torchvision.ops.feature_pyramid_network.LastLevelMaxPool()
        )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(self.body(x))


class Head(nn.Module):
    """Convolutions with activations as modules, functions and methods, and two outputs in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.act = nn.GroupNorm(2, 8), nn.SiLU()
        self.classes, self.deltas = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.act(self.norm(self.second(F.relu(self.first(x)))))
        return [self.classes(x), self.deltas(x).relu_()]


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU6(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(80, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 7),
    )  # fmt: skip


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18 frozen": lambda: resnet(18, frozen=True),
    "resnet50": lambda: resnet(50, frozen=False),
    "mobilenet_v2": lambda: mobilenet("v2"),
    "mobilenet_v3_large": lambda: mobilenet("v3_large"),
    "efficientnet lite0": lambda: lite0(frozen=False),
    "efficientnet lite0 frozen": lambda: lite0(frozen=True),
    "pyramid": Pyramid,
    "head": Head,
    "perceptron": perceptron,
}
PICTURE = torch.randn(2, 3, 75, 98, generator=torch.Generator().manual_seed(0))


def with_statistics(module: nn.Module) -> nn.Module:
    """Norms as after a training: statistics and affine numbers that are not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if hasattr(part, "running_var"):
            with torch.no_grad():
                for name in ("running_var", "weight", "running_mean", "bias"):
                    tensor = getattr(part, name)
                    uniform = torch.rand(tensor.shape, generator=generator)
                    tensor.copy_(uniform + 0.5 if name in ("running_var", "weight") else uniform * 0.2 - 0.1)
    return module


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(TRUNKS[name]()).eval()


def relative_errors(given: object, expected: object) -> list[float]:
    given_leaves, given_spec = pytree.tree_flatten(given)
    leaves, spec = pytree.tree_flatten(expected)
    assert str(given_spec) == str(spec).replace("OrderedDict", "dict")
    return [
        float((one.double() - other.double()).abs().max() / other.double().abs().max())
        for one, other in zip(given_leaves, leaves, strict=True)
    ]


@pytest.fixture(params=["onednn", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(fused, "onednn_works", lambda dtype: False)
    return request.param


@pytest.mark.parametrize("name", TRUNKS)
def test_float32_equals_the_module(name: str, path: str) -> None:
    module = build(name)
    with torch.no_grad():
        expected = module(PICTURE)
    prepared = prepare_for_inference(module)
    for _ in range(2):  # the first call packs
        assert max(relative_errors(prepared(PICTURE), expected)) < 2e-5
    other = PICTURE[:1, :, :64, :64]
    with torch.no_grad():
        assert max(relative_errors(prepared(other), module(other))) < 2e-5


@pytest.mark.parametrize("name", ["resnet18 frozen", "mobilenet_v3_large", "efficientnet lite0", "pyramid", "head"])
def test_float64_equals_the_module(name: str) -> None:
    module = build(name).double()
    with torch.no_grad():
        expected = module(PICTURE.double())
    prepared = prepare_for_inference(module, dtype=torch.float64)
    assert max(relative_errors(prepared(PICTURE.double()), expected)) < 1e-12


@pytest.mark.parametrize("name", ["resnet18 frozen", "mobilenet_v2", "pyramid", "head", "perceptron"])
def test_bfloat16_is_near(name: str) -> None:
    module = build(name)
    with torch.no_grad():
        expected = pytree.tree_leaves(module(PICTURE))
    for given, wanted in zip(
        pytree.tree_leaves(prepare_for_inference(module, dtype=torch.bfloat16)(PICTURE)), expected, strict=True
    ):
        assert given.dtype == torch.bfloat16
        # 8 significant bits in every layer, errors that add up over tens of layers
        assert (given.float() - wanted).norm() < 0.05 * wanted.norm()


def fused_layers(prepared: nn.Module) -> list[FusedConv2d | FusedPointwise]:
    return [module for module in prepared.modules() if isinstance(module, FusedConv2d | FusedPointwise)]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18 frozen", {nn.MaxPool2d}),
        ("resnet50", {nn.MaxPool2d, FusedPointwise}),
        ("mobilenet_v2", {FusedPointwise}),
    ],
)
def test_norms_and_activations_are_gone(name: str, left: set[type]) -> None:
    prepared = prepare_for_inference(build(name))
    assert isinstance(prepared, PreparedModule)
    leaves = {type(module) for module in prepared.modules() if not list(module.children())}
    assert leaves == left | {FusedConv2d}
    functions = {node.target for node in prepared.inner.graph.nodes if node.op == "call_function"}
    assert not functions & {F.relu, operator.add, operator.iadd}


def test_sums_of_the_pyramid_are_fused() -> None:
    graph = prepare_for_inference(build("pyramid")).inner.graph
    targets = [node.target for node in graph.nodes if node.op in ("call_function", "call_method")]
    assert not set(targets) & {operator.add, operator.iadd, torch.add}


def test_maps_that_are_returned_are_not_overwritten() -> None:
    # The second block adds to a map that is also a result.
    class TwoMaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one = F.relu(self.first(x))
            return one, F.relu(self.second(one) + one)

    module = TwoMaps()
    prepared = prepare_for_inference(module)
    with torch.no_grad():
        assert max(relative_errors(prepared(PICTURE), module(PICTURE))) < 1e-5
    assert [layer.overwrites_other for layer in fused_layers(prepared) if isinstance(layer, FusedConv2d)] == [False]


def test_input_is_not_overwritten() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x

    last = PICTURE.contiguous(memory_format=torch.channels_last)
    before = last.clone()
    prepare_for_inference(Residual())(last)
    assert_close(last, before, rtol=0, atol=0)


def test_view_of_a_residual_keeps_its_numbers() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one = self.first(x)
            rows = one.flatten(2)
            return self.second(one) + one, rows

    module = Viewed()
    with torch.no_grad():
        assert max(relative_errors(prepare_for_inference(module)(PICTURE), module(PICTURE))) < 1e-5


def test_convolution_with_two_readers_is_not_fused_with_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return F.relu(x), x.sigmoid()

    module = Shared()
    with torch.no_grad():
        assert max(relative_errors(prepare_for_inference(module)(PICTURE), module(PICTURE))) < 1e-5


def test_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(self.norm(self.conv(x))))

    module = with_statistics(Twice()).eval()
    with torch.no_grad():
        assert max(relative_errors(prepare_for_inference(module)(PICTURE), module(PICTURE))) < 1e-5


class ChoosesByValue(nn.Module):
    """Cannot be traced; its children can."""

    def __init__(self) -> None:
        super().__init__()
        self.dark = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.light = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.dark(x) if x.mean() < 0 else self.light(x))


@pytest.mark.parametrize("sign", [-1, 1])
def test_parts_of_what_cannot_be_traced_are_prepared(sign: int) -> None:
    module = with_statistics(ChoosesByValue()).eval()
    prepared = prepare_for_inference(module)
    x = PICTURE.abs() * sign
    with torch.no_grad():
        assert max(relative_errors(prepared(x), module(x))) < 1e-5
    assert len(fused_layers(prepared)) == 2


class ChoosesByNumber(nn.Module):
    """Shares a layer between levels and has another for each, as dense heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 4, 3)
        self.levels = nn.ModuleList(nn.Conv2d(4, 2, 1) for _ in range(2))

    def forward(self, x: Tensor, level: int) -> Tensor:
        return self.levels[level](self.shared(x))


@pytest.mark.parametrize("level", [0, 1])
def test_lists_of_modules_inside_what_cannot_be_traced(level: int) -> None:
    torch.manual_seed(0)
    module = ChoosesByNumber().eval()
    prepared = prepare_for_inference(module)
    with torch.no_grad():
        assert max(relative_errors(prepared(PICTURE, level), module(PICTURE, level))) < 1e-5
    assert len(fused_layers(prepared)) == 3


def test_single_layers() -> None:
    for layer in (
        nn.Linear(98, 4),
        nn.Linear(98, 4, bias=False),
        nn.Conv2d(3, 4, 3, padding_mode="reflect", padding=1),
    ):
        with torch.no_grad():
            assert max(relative_errors(prepare_for_inference(layer)(PICTURE), layer(PICTURE))) < 1e-5
    assert any(isinstance(part, FusedLinear) for part in prepare_for_inference(nn.Linear(98, 4)).modules())


def test_the_original_is_untouched() -> None:
    module = build("pyramid").train()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    keys, children = list(state), [name for name, _ in module.named_modules()]
    prepare_for_inference(module, dtype=torch.bfloat16)(PICTURE)
    assert list(module.state_dict()) == keys
    assert [name for name, _ in module.named_modules()] == children
    assert all(part.training for part in module.modules())
    for name, value in module.state_dict().items():
        assert_close(value, state[name], rtol=0, atol=0)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize("name", ["head", "perceptron"])
def test_training_the_original_never_changes_results(name: str) -> None:
    module = build(name)
    # Linear layers are packed at once, and where oneDNN does not serve they share their weights.
    dtype = torch.float64 if name == "perceptron" else torch.float32
    module = module.to(dtype)
    prepared = prepare_for_inference(module, dtype=dtype)
    before = prepared(PICTURE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    if dtype == torch.float32:
        assert_close(prepared(PICTURE), before)
    else:
        with pytest.raises(RuntimeError, match="prepare it again"):
            prepared(PICTURE)


def test_training_the_original_before_the_first_call_is_refused() -> None:
    module = build("head")
    prepared = prepare_for_inference(module)
    module.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="prepare it again"):
        prepared(PICTURE)


@pytest.mark.parametrize("channels", [3, None])
@pytest.mark.parametrize("convolutions", [0, 1])
def test_maps_that_are_flattened_are_not_transposed_where_channels_are_known(
    channels: int | None, convolutions: int
) -> None:
    convs = [nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()] * convolutions
    module = nn.Sequential(*convs, nn.Flatten(), nn.Linear(3 * 4 * 5, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    prepared = prepare_for_inference(module, channels=channels)
    x = PICTURE[:, :, :4, :5]
    with torch.no_grad():
        assert max(relative_errors(prepared(x), module(x))) < 1e-5
    is_known = channels is not None or convolutions > 0
    assert any(isinstance(part, FusedFlatLinear) for part in prepared.modules()) == is_known


def test_a_prepared_module_records_no_graph() -> None:
    out = prepare_for_inference(build("head"))(PICTURE.clone().requires_grad_())
    assert not any(x.requires_grad for x in out)


class Ends(nn.Module):
    """A map, and what three 1x1 convolutions make of it; one of them has an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Conv2d(3, 8, 3)
        self.classes, self.deltas, self.quality = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 5, 1, bias=False), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.tower(x))
        return self.deltas(x), self.classes(x), torch.sigmoid(self.quality(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutions_that_end_a_module_on_one_map_are_one(dtype: torch.dtype) -> None:
    module = Ends().to(dtype).eval()
    prepared = prepare_for_inference(module, dtype=dtype)
    for size in (1, 9):
        x = torch.rand(2, 3, size + 2, size + 4, dtype=dtype)
        with torch.no_grad():
            for found, wanted in zip(prepared(x), module(x), strict=True):
                assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    layers = [part.out_channels for part in prepared.modules() if isinstance(part, FusedPointwise)]
    assert sorted(layers) == [1, 7]


def test_convolutions_whose_results_are_read_stay_apart() -> None:
    """A slice of channels is no map that the next convolution could read as it lies."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.c(self.a(x)), self.b(x)

    module = Branches().eval()
    prepared = prepare_for_inference(module)
    with torch.no_grad():
        assert max(relative_errors(prepared(PICTURE), module(PICTURE))) < 1e-5
    assert sum(isinstance(part, FusedPointwise) for part in prepared.modules()) == 2
