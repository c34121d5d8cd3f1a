"""The module contract of torch.nn.BatchNorm*, and bugs that bit its replacements."""

import pytest
import torch

from bnres.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_empty_batch_keeps_statistics_and_counts():
    bn = BatchNormAct2d(3).to(DEVICE)
    x = torch.randn(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    y = bn(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert torch.equal(bn.weight.grad, torch.zeros(3, device=DEVICE))
    assert torch.equal(bn.running_mean, torch.zeros(3, device=DEVICE))
    assert torch.equal(bn.running_var, torch.ones(3, device=DEVICE))
    assert bn.num_batches_tracked == 1


def test_eval_gradient_outlives_a_later_training_step():
    torch.manual_seed(0)
    bn = BatchNorm2d(3).to(DEVICE)
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    bn.eval()
    rstd = (bn.running_var + bn.eps).rsqrt()
    evaluated = x.clone().requires_grad_()
    y = bn(evaluated)
    bn.train()
    bn(x * 5)
    y.sum().backward()
    expected = rstd.view(1, 3, 1, 1).expand_as(x)
    torch.testing.assert_close(evaluated.grad, expected, rtol=1e-6, atol=0)


def test_training_without_running_statistics_leaves_the_input_alone():
    bn = BatchNorm2d(3, track_running_stats=False).to(DEVICE)
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    before = x.clone()
    y = bn(x)
    assert torch.equal(x, before)
    assert torch.equal(bn.eval()(x), y)
    assert list(bn.state_dict()) == ["weight", "bias"]


def test_one_nan_channel_stays_alone():
    x = torch.randn(2, 5, 3, 3, device=DEVICE)
    x[1, 2, 0, 0] = float("nan")
    y = BatchNormAct2d(5).to(DEVICE)(x)
    assert y[:, 2].isnan().all()
    assert torch.isfinite(y[:, [0, 1, 3, 4]]).all()


@pytest.mark.parametrize(
    ("module", "shape", "words"),
    [
        (BatchNorm1d, (2, 3, 4, 5), r"expected 2D or 3D input \(got 4D input\)"),
        (BatchNorm2d, (2, 3, 4), r"expected 4D input \(got 3D input\)"),
        (BatchNorm3d, (2, 3, 4, 5), r"expected 5D input \(got 4D input\)"),
        (BatchNorm2d, (1, 3, 1, 1), "Expected more than 1 value per channel when training"),
    ],
)
def test_errors_are_torchs(module, shape, words):
    with pytest.raises(ValueError, match=words):
        module(3).to(DEVICE)(torch.zeros(shape, device=DEVICE))
