"""KL estimators and controllers against closed forms (enumeration, quadrature), in float64."""

import numpy as np
import pytest
import torch

from ppo_vs_dpo.ppo.algorithm import kl_estimate
from ppo_vs_dpo.ppo.updates.kl_controllers import AdaptiveKL, FixedKL


@pytest.fixture
def two_policies(draw):
    logits = draw(6).requires_grad_()
    return logits, torch.log_softmax(logits, 0), torch.log_softmax(draw(6), 0)


def test_estimators_in_expectation(two_policies):
    _, ours, reference = two_policies
    pi = ours.exp().detach()
    kl = (pi * (ours - reference)).sum()
    expect = {k: (pi * kl_estimate(ours, reference, k)).sum() for k in ("k1", "k2", "k3")}
    assert abs(expect["k1"] - kl) < 1e-12
    assert abs(expect["k3"] - kl) < 1e-12
    assert abs(expect["k2"] - (pi * (ours - reference) ** 2).sum() / 2) < 1e-12
    assert abs(expect["k2"] - kl) > 1e-3  # k2 is biased
    assert (kl_estimate(ours, reference, "k3") >= 0).all()


def test_gradients_of_estimators_as_losses(two_policies):
    logits, ours, reference = two_policies
    pi = ours.exp()
    fixed = pi.detach()

    def gradient(x):
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    reverse = gradient((pi * (ours - reference)).sum())
    forward = gradient((reference.exp() * (reference - ours)).sum())
    as_loss = {k: gradient((fixed * kl_estimate(ours, reference, k)).sum()) for k in ("k1", "k2", "k3")}
    assert as_loss["k1"].abs().max() < 1e-12
    torch.testing.assert_close(as_loss["k2"], reverse, atol=1e-12, rtol=0)
    torch.testing.assert_close(as_loss["k3"], forward, atol=1e-12, rtol=0)
    in_reward = gradient((fixed * kl_estimate(ours, reference, "k1").detach() * ours).sum())
    torch.testing.assert_close(in_reward, reverse, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("mu", "tolerance"), [(0.1, 5e-6), (1.0, 5e-4)])
def test_estimators_of_gaussians(mu, tolerance):
    """q = N(0,1), p = N(mu,1): KL mu^2/2, k2 high by the factor 1 + mu^2/4, std of k1 2/mu times KL. By quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    ours, theirs = torch.tensor(-(nodes**2) / 2), torch.tensor(-((nodes - mu) ** 2) / 2)
    k1, k2, k3 = (kl_estimate(ours, theirs, k).numpy() for k in ("k1", "k2", "k3"))
    kl = mu**2 / 2
    assert abs((weights * k1).sum() - kl) < tolerance
    assert abs((weights * k3).sum() - kl) < tolerance
    assert abs((weights * k2).sum() / kl - 1 - mu**2 / 4) < tolerance
    assert abs(((weights * (k1 - kl) ** 2).sum()) ** 0.5 / kl - 2 / mu) < tolerance


def test_unknown_estimator():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_adaptive_controller():
    """Twice the target, 512 episodes, horizon 10,000: x 1.01024 (Ziegler et al. 2019)."""
    controller = AdaptiveKL(0.2, 6.0, 10_000)
    controller.update(12.0, 512)
    assert controller.coef == pytest.approx(0.2 * 1.01024, rel=1e-12)
    controller.update(6.0, 512)
    assert controller.coef == pytest.approx(0.2 * 1.01024, rel=1e-12)
    controller.update(-100.0, 512)  # clipped at -20 %
    assert controller.coef == pytest.approx(0.2 * 1.01024 * (1 - 0.2 * 512 / 10_000), rel=1e-12)
    other = AdaptiveKL(1.0, 6.0, 10_000)
    other.load_state_dict(controller.state_dict())
    assert other.coef == controller.coef
    with pytest.raises(ValueError, match="positive"):
        AdaptiveKL(0.2, 0.0, 10_000)


def test_fixed_controller():
    controller = FixedKL(0.2)
    controller.update(100.0, 512)
    assert controller.coef == 0.2
