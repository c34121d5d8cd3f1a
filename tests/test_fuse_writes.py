"""Tests that a batch norm is not fused if an in-place write of the model makes fusing incorrect.

There is a small model for each condition.
"""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import bnres
from tests.norms import ROUTES, Cases, check, images, stock_norms
from tests.recorded_sites import recorded_sites

cases = Cases()


@cases.add("bn-add-act")
def residual_is_activated_in_place(self, x):
    y = self.bn(x)
    z = F.relu_(self.conv(x))
    return F.relu(y + z)


@cases.add("bn", reason="writes to a tensor that is used elsewhere")
def added_into_another_tensor(self, x):
    z = self.conv(x)
    y = z
    z += self.bn(x)
    return F.relu(z) * y


@cases.add("bn", reason="writes to a tensor that needs a gradient")
def added_without_gradients_into_a_tensor_that_has_one(self, x):
    z = self.conv(x)
    with torch.no_grad():
        y = self.bn(x)
        z += y
    return F.relu(z)


@cases.add("bn-add-act")
def added_into_the_norm(self, x):
    y = self.bn(x)
    y += x
    return F.relu(y)


@cases.add("bn-act")
def viewed_and_written(self, x):
    y = F.silu(self.bn(x))
    y[:, 0] = 0
    return y.exp()


@cases.add("bn+bn-add-act", "bn+bn-add-act")
def added_into_another_norm(self, x):
    z = self.bn2(x)
    z += self.bn(x)
    return F.relu(z)


@cases.add("bn+bn-add-act", "bn+bn-add-act")
def added_into_a_later_norm(self, x):
    y = self.bn(x)
    z = self.bn2(x)
    z += y
    return F.relu(z)


@cases.add("bn", reason="written in place afterwards")
def residual_is_written_afterwards(self, x):
    z = self.conv(x)
    y = F.silu(self.bn(x) + z)
    z.mul_(2)
    return y, z


@cases.add("bn")
def residuals_view_is_written_afterwards(self, x):
    z = self.conv(x)
    part = z.detach()[:, 0]
    y = F.silu(self.bn(x) + z)
    part.mul_(2)
    return y, z


@cases.add("bn", reason="its statistics are used")
def statistics_are_read_between(self, x):
    y = self.bn(x)
    z = self.bn.running_mean.sum() + x
    return F.relu(y + z)


@cases.add("bn-add-act")
def counter_is_read_between(self, x):
    y = self.bn(x)
    z = x * self.bn.num_batches_tracked
    return F.relu(y + z)


@cases.add("bn-act")
def counter_is_written_afterwards(self, x):
    y = self.bn(x)
    self.bn.num_batches_tracked.mul_(3)
    return F.relu(y)


@cases.add("bn", "bn-add")
def residual_is_another_norms_statistics(self, x):
    y = self.bn(x) + self.bn2.running_mean.view(1, 4, 1, 1).expand_as(x)
    z = self.bn2(x)
    return F.relu(y) + z


@cases.add("bn")
def residual_is_the_statistics_of_torchs_own_norm(self, x):
    bn = self.bn2
    y = self.bn(x) + bn.running_mean.view(1, 4, 1, 1).expand_as(x)
    z = torch.batch_norm(
        input=x, weight=None, bias=None, running_mean=bn.running_mean, running_var=bn.running_var,
        training=True, momentum=0.1, eps=1e-5, cudnn_enabled=True,
    )  # fmt: skip
    return F.relu(y) + z


@cases.add("bn")
def residual_is_the_statistics_of_an_operator(self, x):
    """The operator writes to the statistics, but its schema does not declare these writes."""
    bn = self.bn2
    y = self.bn(x) + bn.running_mean.view(1, 4, 1, 1).expand_as(x)
    z, *_ = torch.ops.aten.native_batch_norm.default(
        x, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5
    )
    return F.relu(y) + z


@cases.add("bn", grad=False)
def convs_input_is_written_between(self, x):
    z = x * 2
    y = self.conv(z)
    z.mul_(2)
    return F.relu(self.bn(y))


@cases.add("bn", grad=False)
def weight_is_written_between(self, x):
    y = self.bn(x)
    self.bn.weight.mul_(2)
    return F.relu(y)


@cases.add("bn", grad=False)
def convs_weight_is_written_between(self, x):
    y = self.conv(x)
    self.conv.weight.mul_(2)
    return F.relu(self.bn(y))


@cases.add("bn", grad=False)
def convs_bias_is_written_between(self, x):
    y = self.conv(x)
    self.conv.bias.mul_(2)
    return F.max_pool2d(F.relu(self.bn(y)), 3, 2, 1)


@cases.add("bn", grad=False)
def residual_is_written_between(self, x):
    z = self.conv(x)
    y = self.bn(x) + z
    z.mul_(2)
    return F.relu(y)


@cases.add("bn", grad=False)
def written_by_another_norm(self, x):
    y = self.bn(x)
    z = F.instance_norm(x, self.bn.running_mean, self.bn.running_var)
    return F.relu(y + z)


@cases.add("bn", grad=False)
def written_by_torchs_own_norm(self, x):
    y, bn = self.bn(x), self.bn
    z = torch.batch_norm(x, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5, True)
    return F.relu(y + z)


@cases.add("bn+bn-add-act", "bn+bn-add-act", "bn", grad=False)
def convolution_reads_a_residual_norms_statistics(self, x):
    y = self.conv(self.bn2.running_mean.view(1, 4, 1, 1).expand_as(x))
    z = F.relu(F.batch_norm(x, None, None, training=True) + self.bn2(x))
    return F.relu(self.bn(y)) + z


@cases.add("bn+bn-add-act", "bn+bn-add-act", grad=False)
def second_norms_input_is_written_afterwards(self, x):
    """With gradients, the stock and the fused model would raise, because both save the input z."""
    z = x * 1
    y = F.relu(self.bn(x) + self.bn2(z))
    z.mul_(2)
    return y


@cases.add("conv-bn", "bn-add-act", reason="one of the inputs is written in place", grad=False)
def convs_bias_is_written_after_the_norm(self, x):
    y, z = self.bn(self.conv(x)), self.bn2(x)
    self.conv.bias.mul_(2)
    return F.relu(y + z)


@cases.add("conv-bn", reason="may have any side effect")
def another_mode_between(self, x):
    y = self.bn(self.conv(x))
    with torch.no_grad():
        z = x * 2
    return F.relu(y) + z


@cases.add("bn-add-act", "bn-add-act")
def output_is_written_through_a_readers_view(self, x):
    y = F.leaky_relu(self.bn(x) + x)
    view = y[:, :2]
    view.mul_(0.5)
    return torch.cat([view, F.relu(self.bn2(x) + y)], 1)


@torch._dynamo.allow_in_graph
def double(x):
    return x.mul_(2)


@cases.add("bn-act")
def written_by_a_function_of_the_users(self, x):
    y = F.silu(self.bn(x))
    z = double(y)
    return z + y.exp()


@cases.add("bn", reason="writes to a tensor that is used elsewhere")
def added_into_a_tensor_inside_another(self, x):
    z = x * 1
    y = TwoTensor(z, z)
    z += self.bn(x)
    return z, (y * 1).a


@torch._dynamo.allow_in_graph
def doubled_twice(x):
    x = x * 2
    return x, TwoTensor(x, x)


@cases.add("bn", reason="writes to a tensor that is used elsewhere")
def added_into_one_of_two_results(self, x):
    z, y = doubled_twice(x)
    z += self.bn(x)
    return z, (y * 1).a


@pytest.mark.parametrize("case", cases)
def test_case(case):
    check(**case)


@torch.library.custom_op("bnres_tests::double", mutates_args=("x",))
def double_in_place(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2).clone()


@double_in_place.register_fake
def _(x):
    return torch.empty_like(x)


def write_item(z):
    z[0] = 0


# Each function writes to its argument.
WRITES = {
    "method": lambda z: z.mul_(2),
    "view": lambda z: z[0].mul_(2),
    "index": write_item,
    "index by its method": lambda z: z.__setitem__(0, 0),
    "out": lambda z: torch.neg(z, out=z),
    "named argument": lambda z: F.relu(z, inplace=True),
    "only named arguments": lambda z: F.relu(input=z, inplace=True),
    "argument without its name": lambda z: F.relu(z, True),
    "list": lambda z: torch._foreach_mul_([z], 2),
    "list of views": lambda z: torch._foreach_mul_(z.chunk(2), 2),
    "operator": lambda z: torch.ops.aten.mul_.Tensor(z, z),
    "operator of the user": lambda z: torch.ops.bnres_tests.double(z),
    "function of the user": lambda z: double(z),
    "checkpoint": lambda z: checkpoint(lambda t: t.mul_(2), z, use_reentrant=False),
    "torch's own norm": lambda z: torch.instance_norm(
        z * 2, None, None, z[0, :, 0, 0], z[1, :, 0, 0], True, 0.1, 1e-5, True
    ),
}
# The names of the functions of augmented assignments. For example, operator.iadd(z, 2) is z += 2.
AUGMENTED = [
    name
    for name in dir(operator)
    if f"__{name[1:]}__" in dir(operator) and name[0] == "i" and f"__{name}__" in dir(torch.Tensor)
]


@pytest.mark.parametrize("name", WRITES)
def test_the_input_is_written_between(name):
    def forward(self, x):
        z = x * 1
        y = self.bn(z)
        WRITES[name](z)
        return F.relu(y)

    unknown = name in ("function of the user", "checkpoint")
    reason = "may have any side effect" if unknown else "one of the inputs is written in place"
    check(forward, ["bn"], reason, grad=False)


@pytest.mark.parametrize("name", AUGMENTED)
def test_an_augmented_assignment_between(name):
    def forward(self, x):
        z = x * 1
        y = self.bn(z)
        # Some of the functions need integers.
        getattr(operator, name)(z if name == "itruediv" else z.view(torch.int64), 2)
        return F.relu(y)

    check(forward, ["bn"], "one of the inputs is written in place", grad=False)


@pytest.mark.parametrize("name", WRITES)
def test_the_residual_is_written_afterwards(name):
    def forward(self, x):
        z = x.detach() * 1
        y = F.silu(self.bn(x) + z)
        WRITES[name](z)
        return y

    check(forward, ["bn"], "the added tensor or the bias of the batch norm is written in place")


def test_an_argument_of_a_checkpoint_that_is_written_afterwards():
    def forward(self, x):
        x = self.conv(x)
        y = checkpoint(lambda x: F.relu(self.bn(self.conv(x))), x, use_reentrant=False)
        x.mul_(2)
        return y

    stock = stock_norms(forward)
    for model in (stock, bnres.fuse(stock)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(images()).sum().backward()


def test_a_bias_that_is_written_afterwards():
    """Our backward reads the bias of the batch norm, and torch's backward does not."""

    def forward(self, x):
        y = F.relu(F.relu(self.bn(x)) + self.bn2(x))
        with torch.no_grad():
            self.bn.bias += 1
        return y

    check(forward, ["-", "bn-add-act"], "the bias of the batch norm is written in place afterwards")


def test_a_second_norms_bias_that_is_written_afterwards():
    def forward(self, x):
        y = F.relu(self.bn(x) + self.bn2(x))
        with torch.no_grad():
            self.bn2.bias += 1
        return y

    check(forward, ["bn", "-"], "the bias of the batch norm is written in place afterwards")


@pytest.mark.parametrize(
    "wrap", [lambda x: x[:2], lambda x: TwoTensor(x, x)], ids=["view", "class"]
)
def test_inputs_that_share_memory(wrap):
    def forward(self, x):
        x, part = x
        y = self.bn(x)
        part.mul_(2)
        return F.relu(y)

    stock, x = stock_norms(forward), images()
    with torch.no_grad(), recorded_sites() as sites:
        found = bnres.fuse(stock)((y := x.clone(), wrap(y)))
        torch.testing.assert_close(found, stock((z := x.clone(), wrap(z))))
    assert [site.pattern for site in sites] == ["bn"]


def test_a_residual_that_shares_memory_with_a_tensor_of_another_class():
    """Autograd does not know that a write to a `TwoTensor` changes the two tensors in it."""

    def forward(self, x):
        x, part = x
        y = F.silu(self.bn(x * 2) + x)
        part.mul_(2)
        return y

    stock, x = stock_norms(forward), images()
    for route in ROUTES:
        grads = []
        with bnres.use_backend(route), recorded_sites() as sites:
            for model in (stock, bnres.fuse(stock)):
                model.zero_grad()
                y = x.detach().clone()
                model((y, TwoTensor(y, y))).square().sum().backward()
                grads.append(model.bn.weight.grad)
        torch.testing.assert_close(*grads)
        assert [site.pattern for site in sites] == ["bn"]


def test_a_convolution_in_autocast():
    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            y = F.conv2d(x.float(), self.conv.weight.float())
        return F.relu(F.batch_norm(y, None, None, None, None, True)).double()

    check(forward, ["bn"], "may have any side effect", tolerance=0.05, grad=False)


def returned_with_a_view(self, x):
    y = F.silu(self.bn(x))
    return y, y[0]


def two_views_are_returned(self, x):
    y = F.silu(self.bn(x))
    return y.view(-1), y[0]


@pytest.mark.parametrize("forward", [returned_with_a_view, two_views_are_returned])
def test_a_returned_output_that_the_user_writes(forward):
    """If the user writes to an output, the gradient of a view of the output includes the write."""
    stock, x = stock_norms(forward), images()
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
