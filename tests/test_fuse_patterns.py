"""fuse: one small module for each condition of the pass over captured graphs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import bnres
from benchmarks.torchvision_import import torchvision
from tests.device import DEVICE
from tests.recorded_sites import recorded_sites

ROUTES = ["triton"] if DEVICE == "cuda" else ["aten", "triton-interpreter"]


@pytest.fixture(autouse=True)
def captured_anew():
    """Drops all graphs: after another test's sizes, torch would make these sizes dynamic."""
    torch._dynamo.reset()


class Norms(nn.Module):
    """Two convolutions and two batch norms for a forward that a test defines."""

    def __init__(self, forward, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.bn, self.bn2 = norm(4), norm(4)
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64))
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def outcome(model, x):
    """A call's outputs, gradients and buffers."""
    x = x.clone().requires_grad_()
    out = model(x)
    out = out if isinstance(out, tuple) else (out,)
    if torch.is_grad_enabled():
        torch.cat([t.square().flatten() for t in out]).sum().backward()
    return [*out, x.grad, *[p.grad for p in model.parameters()], *model.buffers()]


def check(forward, patterns, reason="", norm=nn.BatchNorm2d, tolerance=1e-7):
    """The fused module equals the stock one on every route and has the expected patterns."""
    torch.manual_seed(0)
    stock = Norms(forward, norm).to(DEVICE).double()
    x = torch.randn(3, 4, 3, 3, dtype=torch.float64, device=DEVICE)
    before = copy.deepcopy(stock.state_dict())
    for route in ROUTES:
        stock.load_state_dict(before)
        stock.zero_grad()
        fused = bnres.fuse(stock)
        with bnres.use_backend(route), recorded_sites() as sites:
            for actual, expected in zip(outcome(fused, x), outcome(stock, x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        assert [site.pattern for site in sites] == patterns
        assert not reason or any(reason in site.reason for site in sites)


def test_frozen_batch_norms_are_computed_before_their_input_is_written():
    def forward(self, x):
        x = self.conv(x)
        y = self.bn(x)
        x.mul_(2)
        return F.relu(y) + self.bn2(x)

    check(forward, ["bn", "bn-add"], norm=torchvision.ops.FrozenBatchNorm2d)


def nested(self, x):
    def inner(x):
        return F.relu(self.bn(self.conv(x)))

    return checkpoint(inner, x, use_reentrant=False)


def test_checkpoints_in_a_checkpoint():
    """In backward their batch norms run again, and increment their counters again."""

    def forward(self, x):
        return checkpoint(lambda x: nested(self, x) + self.bn2(x), x, use_reentrant=False)

    check(forward, ["bn-add", "conv-bn-act"])


def test_an_argument_of_a_checkpoint_that_is_written_afterwards():
    def forward(self, x):
        x = self.conv(x)
        y = nested(self, x)
        x.mul_(2)
        return y

    stock = Norms(forward).to(DEVICE)
    x = torch.randn(3, 4, 3, 3, device=DEVICE)
    for model in (stock, bnres.fuse(stock)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(x).sum().backward()


def test_a_bias_that_is_written_afterwards():
    """Our backward reads the bias; torch's does not."""

    def forward(self, x):
        y = F.relu(F.relu(self.bn(x)) + self.bn2(x))
        with torch.no_grad():
            self.bn.bias += 1
        return y

    check(forward, ["-", "bn-add-act"], "the bias of the batch norm is written in place afterwards")


def test_two_interleaved_batch_norms_of_one_tensor():
    def forward(self, x):
        y, z = self.bn(x), self.bn2(x)
        return F.silu(y), F.silu(z)

    check(forward, ["bn-act", "bn-act"])


def test_a_batch_norm_called_twice():
    def forward(self, x):
        return F.relu(self.bn(F.relu(self.bn(x))))

    check(forward, ["bn-act", "bn-act"])


def two_norms(self, x):
    return F.relu(self.bn(x) + self.bn2(x))


def one_of_two_norms_is_frozen(self, x):
    y = F.batch_norm(x, self.bn2.running_mean, self.bn2.running_var, eps=0.1)
    return F.relu(self.bn(x) + y)


def two_norms_without_weights(self, x, training=True):
    y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=training)
    return F.relu(
        y + F.batch_norm(x, self.bn2.running_mean, self.bn2.running_var, training=training)
    )


def two_fixed_norms(self, x):
    """With gradients, one operation of both would keep their inputs for backward."""
    return two_norms_without_weights(self, x, training=False)


def residual_is_activated_in_place(self, x):
    y = self.bn(x)
    z = F.relu_(self.conv(x))
    return F.relu(y + z)


def second_norm_is_read_twice(self, x):
    y, z = self.bn(x), self.bn2(x)
    return F.relu(y + z) + z


def sum_with_itself(self, x):
    y = self.bn(x)
    return F.relu(y + y)


def broadcast_residual(self, x):
    return F.relu(self.bn(x) + x[:1])


def residual_of_another_dtype(self, x):
    return F.relu(self.bn(x) + x.float())


def scaled_residual(self, x):
    return F.relu(torch.add(self.bn(x), x, alpha=2))


def scaled_norm(self, x):
    return F.relu(torch.add(x, 2, self.bn(x)))


def added_into_another_tensor(self, x):
    z = self.conv(x)
    y = z
    z += self.bn(x)
    return F.relu(z) * y


def added_into_the_norm(self, x):
    y = self.bn(x)
    y += x
    return F.relu(y)


def added_into_another_norm(self, x):
    z = self.bn2(x)
    z += self.bn(x)
    return F.relu(z)


def added_into_a_later_norm(self, x):
    y = self.bn(x)
    z = self.bn2(x)
    z += y
    return F.relu(z)


def residual_is_written_afterwards(self, x):
    z = self.conv(x)
    y = F.silu(self.bn(x) + z)
    z.mul_(2)
    return y, z


def residuals_view_is_written_afterwards(self, x):
    z = self.conv(x)
    part = z.detach()[:, 0]
    y = F.silu(self.bn(x) + z)
    part.mul_(2)
    return y, z


def conv_is_read_twice(self, x):
    y = self.conv(x)
    return F.relu(self.bn(y)) + y


def statistics_are_read_between(self, x):
    y = self.bn(x)
    z = self.bn.running_mean.sum() + x
    return F.relu(y + z)


def counter_is_read_between(self, x):
    y = self.bn(x)
    z = x * self.bn.num_batches_tracked
    return F.relu(y + z)


def counter_is_written_afterwards(self, x):
    y = self.bn(x)
    self.bn.num_batches_tracked.mul_(3)
    return F.relu(y)


def pooled_and_added(self, x):
    return F.max_pool2d(F.relu(self.bn(x) + x), 3, 2, 1)


def pooled_indices(self, x):
    y, indices = F.max_pool2d(F.relu(self.bn(x)), 3, 2, 1, return_indices=True)
    return y * indices


def computed_slope(self, x):
    return F.leaky_relu(self.bn(x), x.shape[0] / 10)


def other_bounds(self, x):
    return F.hardtanh(self.bn(x)) + F.hardtanh(self.bn2(x), 0.0, 6.0)


def clamped_at_its_bounds(self, x):
    """At its bounds the gradient of a clamp is 1, that of relu6 is 0."""
    with torch.no_grad():
        self.bn.weight.zero_()
        self.bn.bias.fill_(6)
    return torch.clamp(self.bn(x), 0, 6) + self.bn2(x)


def six_dimensions(self, x):
    y = F.batch_norm(x[..., None, None], None, None, self.bn.weight, self.bn.bias, True)
    return F.relu(y[..., 0, 0])


def read_three_times(self, x):
    y = F.relu(self.bn(x))
    return y.exp() + y.sin() + y


def returned_and_read(self, x):
    y = F.relu(self.bn(x))
    return y, y.exp()


def read_twice(self, x):
    y = F.relu(self.bn(x))
    return self.conv(y) + y


def viewed_and_written(self, x):
    y = F.silu(self.bn(x))
    y[:, 0] = 0
    return y.exp()


def shared_in_one_addition(self, x):
    return F.relu(self.bn(x) + self.bn(x * 2)) + self.bn2(x)


def broadcast_norm(self, x):
    return F.relu(x + self.bn(x[:2])[:1]) + F.relu(x + self.bn2(x[:, :, :1]))


def residual_of_more_dimensions(self, x):
    y = F.batch_norm(x[:, :3], None, None, training=True)
    return F.relu(y + x.new_ones(3, 3, 3, 3, 3)) + self.bn(x)[:, :3]


def conv_of_one_image(self, x):
    """Batch norm reads an unbatched image's channels as images, and its rows as channels."""
    return F.relu(F.batch_norm(self.conv(x[0]), None, None, None, None, True)) + self.bn(x)


def counter_of_another(self, x):
    """bn2's counter is incremented right before a call of a batch norm without a counter."""
    self.bn2.num_batches_tracked.add_(1)
    mean, var = self.bn.running_mean, self.bn.running_var
    y = F.batch_norm(x, mean, var, None, None, True)
    return F.relu(y) + self.bn2(x)


def counters_of_several_elements(self, x):
    self.counts.add_(1)
    return F.relu(F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, True))


def counter_before_frozen_statistics(self, x):
    self.bn.num_batches_tracked.add_(1)
    return F.relu(F.batch_norm(x, self.bn.running_mean, self.bn.running_var))


def counter_goes_down(self, x):
    self.bn.num_batches_tracked.sub_(1)
    return F.relu(F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, True))


def counted_batches_are_read(self, x):
    count = self.bn.num_batches_tracked.add_(1)
    return F.relu(F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, True)), count.double()


def counter_is_a_view(self, x):
    self.counts[0].add_(1)
    y = F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, True)
    return F.relu(y + x * self.counts.sum())


def counter_goes_up_by_alpha(self, x):
    self.bn.num_batches_tracked.add_(1, alpha=2)
    mean, var = self.bn.running_mean, self.bn.running_var
    return F.relu(F.batch_norm(x, mean, var, None, None, True))


def counter_goes_up_by_two(self, x):
    self.bn.num_batches_tracked.add_(2)
    mean, var = self.bn.running_mean, self.bn.running_var
    return F.relu(F.batch_norm(x, mean, var, None, None, True))


def pooled_channels(self, x):
    """Batch norm reads dimension 1 of an unbatched image as channels, max-pool as rows."""
    return F.max_pool2d(
        F.relu(F.batch_norm(x[0], None, None, None, None, True)), 3, 2, 1
    ).sum() + self.bn(x)


def convolved_without_gradients(self, x):
    """The bias of a convolution under no_grad gets no gradient from the batch norm either."""
    with torch.no_grad():
        y = self.conv(x)
    return F.max_pool2d(F.relu(self.bn(y)), 3, 2, 1) + self.bn2(x).mean()


def normalised_without_gradients(self, x):
    with torch.no_grad():
        y = self.bn(x)
    return F.relu(y) + self.bn2(x)


def residual_is_another_norms_statistics(self, x):
    y = self.bn(x) + self.bn2.running_mean.view(1, 4, 1, 1).expand_as(x)
    z = self.bn2(x)
    return F.relu(y) + z


def residual_is_the_statistics_of_torchs_own_norm(self, x):
    bn = self.bn2
    y = self.bn(x) + bn.running_mean.view(1, 4, 1, 1).expand_as(x)
    z = torch.batch_norm(
        input=x, weight=None, bias=None, running_mean=bn.running_mean, running_var=bn.running_var,
        training=True, momentum=0.1, eps=1e-5, cudnn_enabled=True,
    )  # fmt: skip
    return F.relu(y) + z


def residual_is_the_statistics_of_an_operator(self, x):
    """The operator writes to the statistics, but its schema does not declare it."""
    bn = self.bn2
    y = self.bn(x) + bn.running_mean.view(1, 4, 1, 1).expand_as(x)
    z, *_ = torch.ops.aten.native_batch_norm.default(
        x, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5
    )
    return F.relu(y) + z


@torch._dynamo.allow_in_graph
def double(x):
    return x.mul_(2)


def written_by_a_function_of_the_users(self, x):
    y = F.silu(self.bn(x))
    z = double(y)
    return z + y.exp()


WITH = {
    two_norms: ["bn+bn-add-act", "bn+bn-add-act"],
    two_norms_without_weights: ["bn+bn-add-act", "bn+bn-add-act"],
    two_fixed_norms: ["bn-add-act", "bn"],
    residual_is_activated_in_place: ["bn-add-act"],
    second_norm_is_read_twice: ["bn-add-act", "bn"],
    one_of_two_norms_is_frozen: ["bn-add-act", "bn"],
    sum_with_itself: ["bn"],
    broadcast_residual: ["bn"],
    residual_of_another_dtype: ["bn"],
    scaled_residual: ["bn"],
    scaled_norm: ["bn"],
    added_into_another_tensor: ["bn"],
    added_into_the_norm: ["bn-add-act"],
    added_into_another_norm: ["bn+bn-add-act", "bn+bn-add-act"],
    added_into_a_later_norm: ["bn+bn-add-act", "bn+bn-add-act"],
    residual_is_written_afterwards: ["bn"],
    residuals_view_is_written_afterwards: ["bn"],
    conv_is_read_twice: ["bn-act"],
    statistics_are_read_between: ["bn"],
    counter_is_read_between: ["bn-add-act"],
    counter_is_written_afterwards: ["bn-act"],
    pooled_and_added: ["bn-add-act"],
    pooled_indices: ["bn-act"],
    computed_slope: ["bn-act"],
    other_bounds: ["bn", "bn-act"],
    clamped_at_its_bounds: ["bn", "bn-add"],
    six_dimensions: ["-"],
    read_three_times: ["bn-act"],
    returned_and_read: ["bn-act"],
    read_twice: ["bn-act"],
    viewed_and_written: ["bn-act"],
    shared_in_one_addition: ["bn", "bn-add-act", "bn-add"],
    broadcast_norm: ["bn", "bn"],
    residual_of_more_dimensions: ["bn", "bn"],
    conv_of_one_image: ["bn-act", "bn"],
    counter_of_another: ["bn-act", "bn-add"],
    counters_of_several_elements: ["bn-act"],
    counter_before_frozen_statistics: ["bn-act"],
    counter_goes_down: ["bn-act"],
    counted_batches_are_read: ["bn-act"],
    counter_is_a_view: ["bn"],
    pooled_channels: ["bn-act", "bn"],
    convolved_without_gradients: ["bn", "bn"],
    normalised_without_gradients: ["bn", "bn-add"],
    residual_is_another_norms_statistics: ["bn", "bn-add"],
    residual_is_the_statistics_of_torchs_own_norm: ["bn"],
    residual_is_the_statistics_of_an_operator: ["bn"],
    written_by_a_function_of_the_users: ["bn-act"],
    counter_goes_up_by_alpha: ["bn-act"],
    counter_goes_up_by_two: ["bn-act"],
}


def input_is_written_between(self, x):
    x = x * 1
    y = self.bn(x)
    x.mul_(2)
    return F.relu(y)


def convs_input_is_written_between(self, x):
    z = x * 2
    y = self.conv(z)
    z.mul_(2)
    return F.relu(self.bn(y))


def weight_is_written_between(self, x):
    y = self.bn(x)
    self.bn.weight.mul_(2)
    return F.relu(y)


def convs_weight_is_written_between(self, x):
    y = self.conv(x)
    self.conv.weight.mul_(2)
    return F.relu(self.bn(y))


def convs_bias_is_written_between(self, x):
    y = self.conv(x)
    self.conv.bias.mul_(2)
    return F.max_pool2d(F.relu(self.bn(y)), 3, 2, 1)


def residual_is_written_between(self, x):
    z = self.conv(x)
    y = self.bn(x) + z
    z.mul_(2)
    return F.relu(y)


def written_through_a_view(self, x):
    z = x * 1
    part = z[0]
    y = self.bn(z)
    part.mul_(2)
    return F.relu(y)


def written_in_a_list(self, x):
    z = x * 1
    y = self.bn(z)
    torch._foreach_mul_([z], 2)
    return F.relu(y)


def written_as_out(self, x):
    z = x * 1
    y = self.bn(z)
    torch.neg(x, out=z)
    return F.relu(y)


def written_by_an_index(self, x):
    z = x * 1
    y = self.bn(z)
    z[0] = 0
    return F.relu(y)


def written_in_a_function(self, x):
    z = x * 1
    y = self.bn(z)
    F.relu(z, inplace=True)
    return F.relu(y)


def written_by_an_argument_without_its_name(self, x):
    z = x * 1
    y = self.bn(z)
    F.relu(z, True)
    return F.relu(y)


def written_by_an_operator(self, x):
    z = x * 1
    y = self.bn(z)
    torch.ops.aten.mul_.Tensor(z, z)
    return F.relu(y)


def written_by_another_norm(self, x):
    y = self.bn(x)
    z = F.instance_norm(x, self.bn.running_mean, self.bn.running_var)
    return F.relu(y + z)


def written_by_torchs_own_norm(self, x):
    y, bn = self.bn(x), self.bn
    z = torch.batch_norm(x, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5, True)
    return F.relu(y + z)


@torch.library.custom_op("bnres_tests::double", mutates_args=("x",))
def double_in_place(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2).clone()


@double_in_place.register_fake
def _(x):
    return torch.empty_like(x)


def written_by_an_operator_of_the_users(self, x):
    z = x * 1
    y = self.bn(z)
    w = torch.ops.bnres_tests.double(z)
    return F.relu(y) + w


def written_in_a_checkpoint(self, x):
    z = x * 1
    y = self.bn(z)
    w = checkpoint(lambda t: t.mul_(2), z, use_reentrant=False)
    return F.relu(y) + w


def written_in_a_list_of_views(self, x):
    z = x * 1
    y = self.bn(z)
    torch._foreach_mul_(z.chunk(2), 2)
    return F.relu(y)


def input_is_written_by_a_function_of_the_users(self, x):
    z = x * 1
    y = self.bn(z)
    double(z)
    return F.relu(y)


def convolution_reads_a_residual_norms_statistics(self, x):
    y = self.conv(self.bn2.running_mean.view(1, 4, 1, 1).expand_as(x))
    z = F.relu(F.batch_norm(x, None, None, training=True) + self.bn2(x))
    return F.relu(self.bn(y)) + z


def second_norms_input_is_written_afterwards(self, x):
    """Torch's own batch norm keeps its input for backward too."""
    z = x * 1
    y = F.relu(self.bn(x) + self.bn2(z))
    z.mul_(2)
    return y


def clamped_without_gradients(self, x):
    return self.bn(x).clamp(0, 6) + self.bn2(x).clamp(0, 5)


WITHOUT = {
    input_is_written_between: ["bn"],
    convs_input_is_written_between: ["bn"],
    weight_is_written_between: ["bn"],
    convs_weight_is_written_between: ["bn"],
    convs_bias_is_written_between: ["bn"],
    residual_is_written_between: ["bn"],
    written_through_a_view: ["bn"],
    written_in_a_list: ["bn"],
    written_as_out: ["bn"],
    written_by_an_index: ["bn"],
    written_in_a_function: ["bn"],
    written_by_an_argument_without_its_name: ["bn"],
    written_by_an_operator: ["bn"],
    written_by_another_norm: ["bn"],
    written_by_torchs_own_norm: ["bn"],
    written_by_an_operator_of_the_users: ["bn"],
    written_in_a_checkpoint: ["bn"],
    written_in_a_list_of_views: ["bn"],
    input_is_written_by_a_function_of_the_users: ["bn"],
    two_fixed_norms: ["bn+bn-add-act", "bn+bn-add-act"],
    convolution_reads_a_residual_norms_statistics: ["bn+bn-add-act", "bn+bn-add-act", "bn"],
    second_norms_input_is_written_afterwards: ["bn+bn-add-act", "bn+bn-add-act"],
    clamped_without_gradients: ["bn-act", "bn"],
}


@pytest.mark.parametrize("forward", WITH, ids=lambda forward: forward.__name__)
def test_with_gradients(forward):
    if DEVICE == "cuda" and forward is six_dimensions:
        pytest.skip("cuDNN's batch norm takes at most five dimensions")
    check(forward, WITH[forward])


@pytest.mark.parametrize("forward", WITHOUT, ids=lambda forward: forward.__name__)
def test_without_gradients(forward):
    with torch.no_grad():
        check(forward, WITHOUT[forward])


def arithmetic(x, bn, eps=1e-5, shape=(1, -1, 1, 1), weight=None):
    """The forward of torchvision's FrozenBatchNorm2d."""
    w = (bn.weight if weight is None else weight).reshape(*shape)
    b = bn.bias.reshape(*shape)
    rv, rm = bn.running_var.reshape(*shape), bn.running_mean.reshape(*shape)
    scale = w * (rv + eps).rsqrt()
    bias = b - rm * scale
    return x * scale + bias


def five_dimensions(self, x):
    return arithmetic(x[:, :, None].expand(3, 4, 4, 3, 3), self.bn)


def input_of_another_dtype(self, x):
    return arithmetic(x.float(), self.bn)


def eps_is_a_tensor(self, x):
    return arithmetic(x, self.bn, self.bn2.running_var.mean())


def weight_is_one_number(self, x):
    return arithmetic(x, self.bn, weight=self.bn2.weight[:1])


def rows_are_normalised(self, x):
    return arithmetic(F.pad(x, (0, 1, 0, 1)), self.bn, shape=(1, 1, -1, 1))


def variance_is_written_within(self, x):
    mean, var, weight, bias = (
        t.reshape(1, -1, 1, 1)
        for t in (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
    )
    scale = weight * (var + 1e-5).rsqrt()
    self.bn.running_var.mul_(2)
    return x * scale + (bias - mean * scale)


ARITHMETIC = [
    five_dimensions,
    input_of_another_dtype,
    eps_is_a_tensor,
    weight_is_one_number,
    rows_are_normalised,
    variance_is_written_within,
]


@pytest.mark.parametrize("forward", ARITHMETIC, ids=lambda forward: forward.__name__)
def test_arithmetic_that_is_not_a_batch_norm(forward):
    check(forward, [])


def test_a_frozen_norm_of_a_frozen_norm():
    check(lambda self, x: arithmetic(arithmetic(x, self.bn), self.bn2), ["bn", "bn"])


def test_frozen_statistics_that_need_gradients():
    class Norm(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            mean = self._buffers.pop("running_mean")
            self.running_mean = nn.Parameter(mean)

    check(lambda self, x: arithmetic(x, self.bn), [], norm=Norm)
    check(lambda self, x: arithmetic(x, self.bn), ["bn"])


def test_a_slope_that_depends_on_the_batch_size():
    def forward(self, x):
        n, bn = x.shape[0], self.bn
        y = F.batch_norm(x, bn.running_mean, bn.running_var, None, None, True, n / 10, n / 100)
        return F.leaky_relu(y, n / 20)

    torch.manual_seed(0)
    stock = Norms(forward).to(DEVICE).double()
    fused = bnres.fuse(stock)
    with recorded_sites() as sites:
        for n in (2, 3, 5):
            x = torch.randn(n, 4, 3, 3, dtype=torch.float64, device=DEVICE)
            torch.testing.assert_close(outcome(fused, x)[0], outcome(stock, x)[0])
            torch.testing.assert_close(fused.bn.running_mean, stock.bn.running_mean)
    assert sites[-1].pattern == "bn"  # the batch size is dynamic, so the slope is not a constant


def test_training_that_depends_on_the_batch_size():
    def forward(self, x):
        return F.relu(
            F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=x.shape[0] > 2)
        )

    stock = Norms(forward).to(DEVICE).double()
    fused = bnres.fuse(stock)
    for n in (5, 3, 2):
        x = torch.randn(n, 4, 3, 3, dtype=torch.float64, device=DEVICE)
        torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_dtypes_that_torch_refuses(dtype):
    stock = Norms(lambda self, x: F.batch_norm(x.to(dtype), None, None, training=True)).to(DEVICE)
    for model in (stock, bnres.fuse(stock)):
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 4, 3, 3, device=DEVICE))


@pytest.mark.parametrize(
    "wrap", [lambda x: x[:2], lambda x: TwoTensor(x, x)], ids=["view", "class"]
)
def test_inputs_that_share_memory(wrap):
    def forward(self, x):
        x, part = x
        y = self.bn(x)
        part.mul_(2)
        return F.relu(y)

    stock = Norms(forward).to(DEVICE)
    x = torch.randn(3, 4, 3, 3, device=DEVICE)
    with torch.no_grad(), recorded_sites() as sites:
        found = bnres.fuse(stock)((y := x.clone(), wrap(y)))
        torch.testing.assert_close(found, stock((z := x.clone(), wrap(z))))
    assert [site.pattern for site in sites] == ["bn"]


def test_a_convolution_in_autocast():
    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            y = F.conv2d(x.float(), self.conv.weight.float())
        return F.relu(F.batch_norm(y, None, None, None, None, True)).double()

    with torch.no_grad():
        check(forward, ["bn"], "may have any side effect", tolerance=0.05)


def returned_with_a_view(self, x):
    y = F.silu(self.bn(x))
    return y, y[0]


def two_views_are_returned(self, x):
    y = F.silu(self.bn(x))
    return y.view(-1), y[0]


@pytest.mark.parametrize("forward", [returned_with_a_view, two_views_are_returned])
def test_a_returned_output_that_the_user_writes(forward):
    """The gradient of its view includes the user's in-place write."""
    torch.manual_seed(0)
    stock = Norms(forward).to(DEVICE).double()
    x = torch.randn(3, 4, 3, 3, dtype=torch.float64, device=DEVICE)
    for route in ROUTES:
        grads = []
        with bnres.use_backend(route):
            for model in (stock, bnres.fuse(stock)):
                model.zero_grad()
                y, view = model(x)
                y.mul_(2)
                view.square().sum().backward()
                grads.append(model.bn.weight.grad)
        torch.testing.assert_close(*grads)
