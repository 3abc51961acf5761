"""Networks by name: their sizes, shapes and initial weights, and that they compute what their papers say."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torchvision
from properties import few
from torch import Tensor, nn
from torch.nn import functional as F

from fedq.errors import FieldError
from fedq.models import MODELS, build_model, check_model, num_parameters
from fedq.models.resnet import ZeroPadShortcut

NAMES_AND_NORMS = [(name, "batch") for name in MODELS]
NAMES_AND_NORMS += [(name, "group") for name in MODELS if name not in ("cnn62k", "cnn1m")]
WITHOUT_RESNET50 = [  # which is slow
    pytest.param(*pair, marks=pytest.mark.slow if pair[0] == "resnet50" else ()) for pair in NAMES_AND_NORMS
]
WITHOUT_LARGE_RESNETS = [
    pytest.param(*pair, marks=pytest.mark.slow if pair[0] in ("resnet18", "resnet50") else ())
    for pair in NAMES_AND_NORMS
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def conv(inputs: int, outputs: int, kernel: int, bias: int = 0) -> int:
    return inputs * outputs * kernel**2 + bias * outputs


def thin_resnet(blocks_per_stage: int) -> int:
    """Parameters of a (6n + 2)-layer network, from the table in section 4.2 of the paper."""
    total = conv(3, 16, 3) + 2 * 16 + (64 * 10 + 10)
    for inputs, width in ((16, 16), (16, 32), (32, 64)):
        total += conv(inputs, width, 3) + (2 * blocks_per_stage - 1) * conv(width, width, 3)
        total += 2 * blocks_per_stage * 2 * width
    return total


def convnet9() -> int:
    widths = (3, 32, 32, 64, 64, 64, 128, 128, 256, 256)
    return sum(conv(i, o, 3) + 2 * o for i, o in pairwise(widths)) + 256 * 10 + 10


def improved_cnn(in_channels: int, side: int) -> int:
    convs = conv(in_channels, 32, 3, bias=1) + 2 * 32 + conv(32, 64, 3, bias=1) + 2 * 64
    return convs + (64 * side * side * 512 + 512) + (512 * 10 + 10)


# The first number is the published or measured one; the second is counted here, layer by layer.
COUNTS = {
    "resnet20": (269_722, thin_resnet(3)),
    "resnet32": (464_154, thin_resnet(5)),
    "improved_cnn": (2_122_378, improved_cnn(3, 8)),
    "convnet9": (1_212_778, convnet9()),
    "cnn62k": (62_006, conv(3, 6, 5, 1) + conv(6, 16, 5, 1) + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10),
    "cnn1m": (1_203_666, conv(3, 32, 5, 1) + conv(32, 64, 5, 1) + 4096 * 280 + 280 + 280 * 10 + 10),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_exact(name):
    published, counted = COUNTS[name]
    assert num_parameters(build_model(name)) == published == counted


def test_improved_cnn_has_the_published_hidden_layer_for_28_pixels_and_one_channel():
    model = build_model("improved_cnn", in_channels=1, image_size=28)
    assert model.fc1.in_features == 3136
    assert num_parameters(model) == 1_630_282 == improved_cnn(1, 7)


def test_num_parameters_counts_neither_frozen_parameters_nor_buffers():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].bias.requires_grad_(False)
    assert num_parameters(model) == 3 * 4 + 2 * 4


@pytest.mark.parametrize(("name", "count"), few([("resnet18", 11_173_962), ("resnet50", 23_520_842)], 1))
def test_resnets_equal_torchvisions_with_the_small_stem(name, count):
    ours = build_model(name)
    theirs = getattr(torchvision.models, name)(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    assert num_parameters(ours) == count == num_parameters(theirs)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):  # away from 1 and 0, so that every layer matters
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # Same sums in the same order except for the final mean: float32 rounding of logits of the order of 1 to 10.
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("image_size", [28, 32])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(("name", "norm"), WITHOUT_RESNET50)
def test_logits_have_one_column_a_class(name, norm, in_channels, image_size):
    with torch.device("meta"):  # shapes only: the arithmetic is tested below
        model = build_model(name, num_classes=7, in_channels=in_channels, image_size=image_size, norm=norm)
        assert model(torch.empty(2, in_channels, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [7, 8])
def test_zero_pad_shortcut_keeps_every_second_pixel_and_appends_zeros(side, channels_last):
    x = torch.randn(2, 3, side, side)
    expected = torch.zeros(2, 8, (side + 1) // 2, (side + 1) // 2)
    for row in range(0, side, 2):
        for column in range(0, side, 2):
            expected[:, :3, row // 2, column // 2] = x[:, :, row, column]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = ZeroPadShortcut(3, 8, 2, nn.BatchNorm2d)(x.to(memory_format=layout))
    assert torch.equal(out, expected)
    if side == 8:  # as everywhere in ResNet-20/32 on images of 28 or 32 pixels
        assert out.is_contiguous(memory_format=layout)


def test_thin_resnet_computes_the_papers_blocks():
    model = build_model("resnet20").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = F.relu(model.norm1(model.conv1(images)))
        for block in (block for stage in model.stages for block in stage):
            inner = block.norm2(block.conv2(F.relu(block.norm1(block.conv1(out)))))
            stride, missing = out.shape[2] // inner.shape[2], inner.shape[1] - out.shape[1]
            shortcut = out[:, :, ::stride, ::stride]
            zeros = shortcut.new_zeros(len(out), missing, *shortcut.shape[2:])
            out = F.relu(inner + torch.cat((shortcut, zeros), dim=1))
        # The same layers on the same numbers; but torch may sum a product's terms in an order that depends on where
        # its operands lie.
        torch.testing.assert_close(model(images), model.fc(out.mean((2, 3))), rtol=1e-5, atol=1e-5)
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == 20


def reference_improved_cnn(model: nn.Module, x: Tensor) -> Tensor:
    for convolution, norm in ((model.conv1, model.norm1), (model.conv2, model.norm2)):
        x = F.max_pool2d(F.relu(norm(convolution(x))), 2)
    return model.fc2(F.relu(model.fc1(x.flatten(1))))


def reference_two_conv_net(model: nn.Module, x: Tensor) -> Tensor:
    for convolution in (model.conv1, model.conv2):
        x = F.max_pool2d(F.relu(convolution(x)), 2)
    x = x.flatten(1)
    for layer in model.fc[:-1]:
        x = F.relu(layer(x))
    return model.fc[-1](x)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("improved_cnn", reference_improved_cnn),
        ("cnn62k", reference_two_conv_net),
        ("cnn1m", reference_two_conv_net),
    ],
)
def test_pooling_before_relu_changes_neither_logits_nor_gradients(name, reference):
    model = build_model(name).eval()
    images = torch.randn(4, 3, 32, 32)
    labels = torch.tensor([0, 3, 3, 9])
    twin = copy.deepcopy(model)
    ours, expected = model(images), reference(twin, images)
    # The same layers on the same numbers; but torch may sum a product's terms in an order that depends on where its
    # operands lie. Outputs are of size 1, and a sum of 4096 terms rounds by less than this.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    F.cross_entropy(ours, labels).backward()
    F.cross_entropy(expected, labels).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


# On eight images without BatchNorm's help the deep networks want smaller steps, and the smallest network larger ones.
LEARNING_RATES = {("resnet18", "group"): 1e-4, ("resnet50", "group"): 1e-4, ("cnn62k", "batch"): 5e-3}


@pytest.mark.parametrize(("name", "norm"), WITHOUT_LARGE_RESNETS)
def test_a_few_steps_in_bf16_and_channels_last_reduce_the_loss(name, norm):
    model = build_model(name, image_size=16, norm=norm).to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
    labels = torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATES.get((name, norm), 1e-3))
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["resnet20", "improved_cnn", "convnet9"])
def test_group_norm_replaces_every_batch_norm_and_leaves_no_running_statistics(name):
    batch, group = build_model(name), build_model(name, norm="group")
    norms = [module for module in group.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == sum(isinstance(module, nn.BatchNorm2d) for module in batch.modules()) > 0
    assert all(module.num_groups == 2 for module in norms)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in group.modules())
    assert not list(group.buffers())
    assert num_parameters(group) == num_parameters(batch)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "resnet50" else ()) for name in MODELS]
)
def test_the_seed_decides_the_weights(name):
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build_model(name).parameters())

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_convolution_kernels_have_the_kaiming_deviation_and_biases_are_zero():
    for name in ("resnet18", "cnn1m"):
        for module in build_model(name).modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                # A sample deviation of n normal numbers has a relative error of 1 / sqrt(2 n); five of those.
                tolerance = 5 / (2 * module.weight.numel()) ** 0.5
                assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=tolerance)
                assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("name", ["resnet20", "convnet9", "improved_cnn"])
def test_training_updates_running_statistics_and_evaluation_does_not(name):
    model = build_model(name)
    assert model.training
    images = torch.randn(4, 3, 32, 32)
    fresh = copy.deepcopy(dict(model.named_buffers()))
    with torch.no_grad():
        model(images)
        trained = copy.deepcopy(dict(model.named_buffers()))
        assert not any(torch.equal(fresh[key], trained[key]) for key in fresh)
        model.eval()
        together = model(images)
        # Each image alone: other batch sizes may choose other convolution kernels, so equal up to float32 rounding.
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(trained[key], value) for key, value in model.named_buffers())


def test_dropout_acts_in_training_only():
    model = build_model("improved_cnn", norm="group")
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", MODELS)
def test_the_smallest_image_that_is_allowed_works(name):
    with pytest.raises(FieldError, match="image_size=0 is not allowed; allowed: an integer of at least") as caught:
        build_model(name, image_size=0)
    smallest = int(caught.value.allowed.split()[-1])
    model = build_model(name, image_size=smallest).eval()
    assert model(torch.randn(1, 3, smallest, smallest)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, r"model='resnet19' .*convnet9.*did you mean 'resnet18'"),
        ("ResNet18", {}, r"model='ResNet18' .*did you mean 'resnet18'"),
        ("cnn1m", {"norm": "group"}, r"norm='group' .*batch, since cnn1m has no normalisation"),
        ("cnn62k", {"norm": "group"}, r"norm='group' .*batch, since cnn62k"),
        ("resnet18", {"norm": "bach"}, r"norm='bach' .*batch, group \(did you mean 'batch'"),
        ("cnn62k", {"image_size": 15}, "image_size=15 .*at least 16"),
        ("cnn1m", {"image_size": 3}, "image_size=3 .*at least 4"),
        ("resnet20", {"in_channels": 0}, "in_channels=0 .*at least 1"),
        ("resnet20", {"num_classes": 0}, "num_classes=0 .*at least 1"),
        ("resnet20", {"num_classes": 10.0}, r"num_classes=10\.0 .*an integer"),
    ],
)
def test_bad_settings_are_named(name, options, message):
    with pytest.raises(FieldError, match=message):
        build_model(name, **options)


# ------------------------------------------------------------------------------------------------ models of one's own

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, in_channels: int, num_classes: int = 10):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.head = nn.Linear(in_channels, num_classes)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        return self.head(self.drop(self.norm(x).mean((2, 3))))

def fixed(): return Net(3, 10)
def sized(image_size): return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, 10))
def options(*, num_classes, hidden=5, **options):
    assert set(options) == {"in_channels", "image_size"}
    return Net(options["in_channels"], num_classes)
def positional(num_classes, /): return Net(3, num_classes)
def other(width, num_classes, depth): return Net(3, num_classes)
def lazy(num_classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
def nothing(): return nn.Flatten()
def text(): return "no module"
def fails(in_channels): raise KeyError("weights")
class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.net, self.what = Net(3, 10), what
    def forward(self, x):
        y = self.net(x)
        return {"dict": {"logits": y}, "tuple": (y, y), "rank": y[:, :, None], "one": y[:1], "int": y.argmax(1),
                "long": y.long()}[self.what]
def returns_dict(): return Returns("dict")
def returns_tuple(): return Returns("tuple")
def returns_rank(): return Returns("rank")
def returns_one(): return Returns("one")
def returns_int(): return Returns("int")
def returns_long(): return Returns("long")
no_function = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Put a module of a new name with `OWN` where Python finds it; return the name."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_broken.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def fits(name: str, model: nn.Module, *shape: int, num_classes: int = 10) -> None:
    check_model(name, model, torch.randn(2, *(shape or (3, 8, 8))), num_classes)


@pytest.mark.parametrize(
    ("function", "classes", "channels", "size"),
    [("fixed", 10, 3, 8), ("Net", 7, 1, 8), ("sized", 10, 3, 6), ("options", 4, 2, 8), ("lazy", 4, 1, 5)],
)
def test_a_model_of_ones_own_gets_the_sizes_that_it_takes(own, function, classes, channels, size):
    name = f"{own}:{function}"
    model = build_model(name, num_classes=classes, in_channels=channels, image_size=size)
    fits(name, model, channels, size, size, num_classes=classes)
    assert model(torch.randn(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", r"that can be imported \(AttributeError: module .* has no attribute 'missing'\)"),
        ("positional", "needs no more than num_classes, in_channels, image_size, by name; this one needs num_classes"),
        ("other", "by name; this one needs width, depth"),
        ("fails", r"can be called with in_channels=3 \(KeyError: 'weights'\)"),
        ("no_function", r"can be called with no arguments \(TypeError: 'int' object is not callable\)"),
        ("text", r"returns a torch.nn.Module, not str"),
        ("nothing", "a module with parameters to train"),
    ],
)
def test_a_function_that_cannot_be_used_is_named(own, function, message):
    with pytest.raises(FieldError, match=f"model='{own}:{function}' .*{message}"):
        build_model(f"{own}:{function}")


def test_a_module_that_cannot_be_imported_is_named(own):
    with pytest.raises(FieldError, match=f"model='{own}_broken:f' .*SyntaxError"):
        build_model(f"{own}_broken:f")


def test_group_norm_is_refused_for_a_model_of_ones_own(own):
    with pytest.raises(FieldError, match=r"norm='group' .*batch, since .*:fixed has layers of its own"):
        build_model(f"{own}:fixed", norm="group")


@pytest.mark.parametrize(
    ("function", "shape", "num_classes", "message"),
    [
        ("fixed", (3, 8, 8), 7, r"logits of shape \(2, 7\); this one returns torch.float32 of shape \(2, 10\)"),
        ("fixed", (1, 8, 8), 10, r"images of shape \(2, 1, 8, 8\) to .*; this one raises RuntimeError: running_mean"),
        ("sized", (3, 9, 9), 10, r"\(2, 3, 9, 9\) .*; this one raises RuntimeError: mat1 and mat2"),
        ("returns_dict", (3, 8, 8), 10, "this one returns a dict, not a tensor"),
        ("returns_tuple", (3, 8, 8), 10, "this one returns a tuple, not a tensor"),
        ("returns_rank", (3, 8, 8), 10, r"of shape \(2, 10, 1\)"),
        ("returns_one", (3, 8, 8), 10, r"of shape \(1, 10\)"),
        ("returns_int", (3, 8, 8), 10, r"returns torch.int64 of shape \(2,\)"),
        ("returns_long", (3, 8, 8), 10, r"returns torch.int64 of shape \(2, 10\)"),
    ],
)
def test_a_model_that_does_not_fit_is_told_with_both_shapes(own, function, shape, num_classes, message):
    name = f"{own}:{function}"
    model = build_model(name, image_size=8)
    with pytest.raises(FieldError, match=message):
        fits(name, model, *shape, num_classes=num_classes)


def test_trying_a_model_leaves_it_and_the_random_numbers_as_they_were(own):
    model = build_model(f"{own}:fixed")
    model.drop.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, state = torch.randn(2, 3, 8, 8), torch.get_rng_state()
    check_model("own", model, images, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
