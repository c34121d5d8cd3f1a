"""Tests which operations are fused with a batch norm, with a small model for each condition."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import bnres
from bnres.fusion.rewrite import fuse_graph
from bnres.operations.sync_batch_norm_act import sync_batch_norm
from tests.device import DEVICE
from tests.norms import Cases, check, images, stock_norms
from tests.recorded_sites import recorded_sites
from tests.steps import outcome

cases = Cases()


@cases.add("bn-add-act", "bn")
def one_of_two_norms_is_frozen(self, x):
    y = F.batch_norm(x, self.bn2.running_mean, self.bn2.running_var, eps=0.1)
    return F.relu(self.bn(x) + y)


@cases.add("bn+bn-add-act", "bn+bn-add-act")
def two_norms_without_weights(self, x, training=True):
    y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=training)
    return F.relu(
        y + F.batch_norm(x, self.bn2.running_mean, self.bn2.running_var, training=training)
    )


@cases.add("bn-add-act", "bn")
@cases.add("bn+bn-add-act", "bn+bn-add-act", grad=False)
def two_fixed_norms(self, x):
    """With gradients, one operation for both norms would save both inputs, so it is not used."""
    return two_norms_without_weights(self, x, training=False)


@cases.add("bn-add-act", "bn", reason="its output is used more than once")
def second_norm_is_read_twice(self, x):
    y, z = self.bn(x), self.bn2(x)
    return F.relu(y + z) + z


@cases.add("bn")
def sum_with_itself(self, x):
    y = self.bn(x)
    return F.relu(y + y)


@cases.add("bn", reason="the added tensor has another shape or dtype")
def broadcast_residual(self, x):
    return F.relu(self.bn(x) + x[:1])


@cases.add("bn")
def residual_of_another_dtype(self, x):
    return F.relu(self.bn(x) + x.float())


@cases.add("bn")
def scaled_residual(self, x):
    return F.relu(torch.add(self.bn(x), x, alpha=2))


@cases.add("bn")
def scaled_norm(self, x):
    return F.relu(torch.add(x, 2, self.bn(x)))


@cases.add("bn-act")
def conv_is_read_twice(self, x):
    y = self.conv(x)
    return F.relu(self.bn(y)) + y


@cases.add("bn-add-act")
def pooled_and_added(self, x):
    return F.max_pool2d(F.relu(self.bn(x) + x), 3, 2, 1)


@cases.add("bn-act")
def pooled_indices(self, x):
    y, indices = F.max_pool2d(F.relu(self.bn(x)), 3, 2, 1, return_indices=True)
    return y * indices


@cases.add("bn-act")
def computed_slope(self, x):
    return F.leaky_relu(self.bn(x), x.shape[0] / 10)


@cases.add("bn", "bn-act")
def other_bounds(self, x):
    return F.hardtanh(self.bn(x)) + F.hardtanh(self.bn2(x), 0.0, 6.0)


@cases.add("bn", "bn-add")
def clamped_at_its_bounds(self, x):
    """clamp is not relu6: at the bounds the derivative of clamp is 1, and that of relu6 is 0."""
    with torch.no_grad():
        self.bn.weight.zero_()
        self.bn.bias.fill_(6)
    return torch.clamp(self.bn(x), 0, 6) + self.bn2(x)


@cases.add("-", reason="does not support the class, dtype or number of dimensions")
def six_dimensions(self, x):
    y = F.batch_norm(x[..., None, None], None, None, self.bn.weight, self.bn.bias, True)
    return F.relu(y[..., 0, 0])


@cases.add("bn-act")
def read_three_times(self, x):
    y = F.relu(self.bn(x))
    return y.exp() + y.sin() + y


@cases.add("bn-act")
def returned_and_read(self, x):
    y = F.relu(self.bn(x))
    return y, y.exp()


@cases.add("bn-act")
def read_twice(self, x):
    y = F.relu(self.bn(x))
    return self.conv(y) + y


@cases.add("bn", "bn-add-act", "bn-add")
def shared_in_one_addition(self, x):
    return F.relu(self.bn(x) + self.bn(x * 2)) + self.bn2(x)


@cases.add("bn", "bn")
def broadcast_norm(self, x):
    return F.relu(x + self.bn(x[:2])[:1]) + F.relu(x + self.bn2(x[:, :, :1]))


@cases.add("bn", "bn")
def residual_of_more_dimensions(self, x):
    y = F.batch_norm(x[:, :3], None, None, training=True)
    return F.relu(y + x.new_ones(3, 3, 3, 3, 3)) + self.bn(x)[:, :3]


@cases.add("bn-act", "bn")
def conv_of_one_image(self, x):
    """F.batch_norm treats an unbatched image (C, H, W) as C inputs with H channels each."""
    return F.relu(F.batch_norm(self.conv(x[0]), None, None, None, None, True)) + self.bn(x)


@cases.add("bn-act", "bn-add")
def counter_of_another(self, x):
    """F.batch_norm, which has no counter, is called just after bn2's counter is incremented."""
    self.bn2.num_batches_tracked.add_(1)
    mean, var = self.bn.running_mean, self.bn.running_var
    y = F.batch_norm(x, mean, var, None, None, True)
    return F.relu(y) + self.bn2(x)


@cases.add("bn-act")
def counters_of_several_elements(self, x):
    self.counts.add_(1)
    return F.relu(F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, True))


@cases.add("bn-act")
def counter_before_frozen_statistics(self, x):
    self.bn.num_batches_tracked.add_(1)
    return F.relu(F.batch_norm(x, self.bn.running_mean, self.bn.running_var))


@cases.add("bn-act")
def counter_goes_down(self, x):
    self.bn.num_batches_tracked.sub_(1)
    return F.relu(F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, True))


@cases.add("bn-act")
def counted_batches_are_read(self, x):
    count = self.bn.num_batches_tracked.add_(1)
    return F.relu(F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, True)), count.double()


@cases.add("bn")
def counter_is_a_view(self, x):
    self.counts[0].add_(1)
    y = F.batch_norm(x, None, None, self.bn.weight, self.bn.bias, True)
    return F.relu(y + x * self.counts.sum())


@cases.add("bn-act")
def counter_goes_up_by_alpha(self, x):
    self.bn.num_batches_tracked.add_(1, alpha=2)
    mean, var = self.bn.running_mean, self.bn.running_var
    return F.relu(F.batch_norm(x, mean, var, None, None, True))


@cases.add("bn-act")
def counter_goes_up_by_two(self, x):
    self.bn.num_batches_tracked.add_(2)
    mean, var = self.bn.running_mean, self.bn.running_var
    return F.relu(F.batch_norm(x, mean, var, None, None, True))


@cases.add("bn-act", "bn")
def pooled_channels(self, x):
    """In an unbatched image, dimension 1 is channels to F.batch_norm, but rows to F.max_pool2d."""
    return F.max_pool2d(
        F.relu(F.batch_norm(x[0], None, None, None, None, True)), 3, 2, 1
    ).sum() + self.bn(x)


@cases.add("bn", "bn")
def convolved_without_gradients(self, x):
    """Under no_grad a convolution's bias gets no gradient. A fused call must not compute one."""
    with torch.no_grad():
        y = self.conv(x)
    return F.max_pool2d(F.relu(self.bn(y)), 3, 2, 1) + self.bn2(x).mean()


@cases.add("bn", "bn-add")
def normalised_without_gradients(self, x):
    with torch.no_grad():
        y = self.bn(x)
    return F.relu(y) + self.bn2(x)


@cases.add("bn-act", "bn", grad=False)
def clamped_without_gradients(self, x):
    return self.bn(x).clamp(0, 6) + self.bn2(x).clamp(0, 5)


@cases.add("bn")
def unsupported_activation(self, x):
    return F.elu(self.bn(x))


@cases.add("bn")
def added_number(self, x):
    return F.relu(self.bn(x) + 1)


@torch.library.custom_op("bnres_tests::relu", mutates_args=())
def users_relu(x: torch.Tensor) -> torch.Tensor:
    return x * 2


users_relu.register_fake(torch.empty_like)


@cases.add("bn", grad=False)
def activation_of_the_user(self, x):
    return torch.ops.bnres_tests.relu(self.bn(x))


@cases.add("-", "bn-act", reason="does not support the class, dtype or number of dimensions")
def tensors_of_another_class(self, x):
    weight = self.conv.weight
    twin, filters = TwoTensor(x, x), TwoTensor(weight, weight)
    y = self.bn(twin).a + F.relu(self.bn2(x))
    return y, F.conv2d(twin, weight).a, F.conv2d(x, filters).a


@pytest.mark.parametrize("case", cases)
def test_case(case):
    if DEVICE == "cuda" and case["forward"] is six_dimensions:
        pytest.skip("cuDNN's batch norm takes at most five dimensions")
    check(**case)


def test_checkpoints_in_a_checkpoint():
    """In backward the checkpointed batch norms run again, and increment their counters again."""

    def forward(self, x):
        def inner(x):
            y = checkpoint(lambda x: F.relu(self.bn(self.conv(x))), x, use_reentrant=False)
            return y + self.bn2(x)

        return checkpoint(inner, x, use_reentrant=False)

    check(forward, ["bn-add", "conv-bn-act"])


def test_drop_path():
    """timm's DropPath multiplies each image's output by a random number."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        kept = y.new_empty(3, 1, 1, 1).bernoulli_(0.5).div_(0.5)
        return F.relu(y * kept + x)

    stock = stock_norms(forward)
    with recorded_sites() as sites:
        found = []
        for model in (bnres.fuse(stock), stock):
            torch.manual_seed(0)
            found.append(outcome(model, images()))
    torch.testing.assert_close(*found)
    assert [site.pattern for site in sites] == ["conv-bn"]


def test_a_residual_of_unknown_batch_size():
    def forward(self, x):
        return F.relu(self.bn(x[:1]) + x[x[:, 0, 0, 0] > 0])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(forward, ["bn"], "the added tensor has another shape or dtype")


@pytest.mark.parametrize(
    ("groups", "patterns"),
    [("aa", ["bn+bn-add"] * 2), ("ab", ["bn-add", "bn"]), (("a", ""), ["bn-add", "bn"])],
)
def test_two_synchronised_norms(groups, patterns):
    """An empty name of a process group means that the batch norm is not synchronised."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    norms = [
        graph.call_function(sync_batch_norm, (x, *[None] * 4, True, 0.1, 1e-5, None, group))
        for group in groups
    ]
    graph.output(graph.call_function(operator.add, tuple(norms)))
    with FakeTensorMode():
        for node in graph.nodes:
            node.meta["example_value"] = torch.empty(3, 4, 3, 3)
    rows = fuse_graph(fx.GraphModule(nn.Module(), graph))
    assert [site.pattern for site, _ in rows] == patterns


def test_two_interleaved_batch_norms_of_one_tensor():
    def forward(self, x):
        y, z = self.bn(x), self.bn2(x)
        return F.silu(y), F.silu(z)

    check(forward, ["bn-act", "bn-act"])


def test_a_batch_norm_called_twice():
    def forward(self, x):
        return F.relu(self.bn(F.relu(self.bn(x))))

    check(forward, ["bn-act", "bn-act"])


def test_a_slope_that_depends_on_the_batch_size():
    def forward(self, x):
        n, bn = x.shape[0], self.bn
        y = F.batch_norm(x, bn.running_mean, bn.running_var, None, None, True, n / 10, n / 100)
        return F.leaky_relu(y, n / 20)

    stock = stock_norms(forward)
    fused = bnres.fuse(stock)
    with recorded_sites() as sites:
        for n in (2, 3, 5):
            x = images(n)
            torch.testing.assert_close(outcome(fused, x)[0], outcome(stock, x)[0])
            torch.testing.assert_close(fused.bn.running_mean, stock.bn.running_mean)
    assert sites[-1].pattern == "bn"  # the batch size is dynamic, so the slope is not a constant


def test_training_that_depends_on_the_batch_size():
    def forward(self, x):
        return F.relu(
            F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=x.shape[0] > 2)
        )

    stock = stock_norms(forward)
    fused = bnres.fuse(stock)
    for n in (5, 3, 2):
        x = images(n)
        torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_dtypes_that_torch_refuses(dtype):
    stock = stock_norms(lambda self, x: F.batch_norm(x.to(dtype), None, None, training=True))
    for model in (stock, bnres.fuse(stock)):
        with pytest.raises(RuntimeError):
            model(images())
