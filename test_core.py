"""
The mathematics, one test per sentence. The name of a test is the sentence. Each test compares our
code with something else.

    python -m pytest -q test_core.py                        # half a minute: no weights, no GPU
    python -m pytest -q test_core.py -k first_gradient      # one sentence

  what is checked                     against what
  the loss     (neighbor_grpo.py)     closed forms, float64, autograd, numbers worked out by hand
  the solvers  (solvers.py)           diffusers' schedulers, flows with known solutions, Runge-Kutta
  the method   (train.py's loop)      counts at the velocity, the reward of fresh samples of a toy

If a shortcut looks harmless but is wrong, the test shows that, too: "the naive form".

    G = 12  candidates   D  numbers in one latent   x (G, D)  candidates   A (G,)  their advantages
"""
import ast, math
from pathlib import Path
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal
from torch.testing import assert_close
import machine                                                  # noqa: F401  (before diffusers)
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
import train
from neighbor_grpo import (clip_fraction, clipped_objective, combine_rewards, group_advantages,
                           log_policy, log_ratio, neighbor_grpo_loss, perturb_noise)
from run import Run
from solvers import ddim_step, rollout, schedule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
torch.set_num_threads(1)                        # the tensors are small: threads only cost time
HERE = Path(__file__).resolve().parent
G, D_FLUX = 12, 129_600                         # 720 x 720: 2,025 tokens of 64 numbers
PUBLISHED_CLIP = 1e-4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def group(D=5):
    """Candidates and advantages, float64. The advantages sum to zero, as in every group."""
    x, A = normal(G, D), normal(G)
    return x, A - A.mean()


def flux_sized_group():
    return perturb_noise(torch.randn(D_FLUX), torch.randn(G, D_FLUX), 0.3)


def gradient(f, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(f(at), at)[0]


# ================================================ the loss: noise and policy, Eq. 7, 8, 26-30

def test_perturbation_keeps_the_variance_because_its_squared_coefficients_add_up_to_one():
    eps_star, delta = torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 1.0], [0.0, 3.0]])
    expected = torch.tensor([[1.1, -1.0], [0.8, 0.2]])                  # 0.8 eps* + 0.6 delta
    assert_close(perturb_noise(eps_star, delta, 0.6), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0])
def test_perturbed_noise_stays_standard_normal_and_neighbours_are_equidistant(sigma):
    D, pairs = 40_000, torch.ones(G, G).triu(1).bool()                  # 66 pairs
    x = perturb_noise(normal(D), normal(G, D), sigma)
    five_sd = 5 / D**0.5
    assert_close(x.mean(1), torch.zeros(G).double(), rtol=0, atol=five_sd)
    assert_close(x.var(1), torch.ones(G).double(), rtol=0, atol=five_sd * 2**0.5)
    correlation = torch.full((66,), 1 - sigma**2).double()              # 0 at sigma = 1
    assert_close(torch.corrcoef(x)[pairs], correlation, rtol=0, atol=five_sd)
    distance = torch.full((66,), sigma * (2 * D) ** 0.5).double()
    assert_close(torch.pdist(x), distance, rtol=0.02, atol=0)


def test_policy_is_a_softmax_over_squared_distances_summed_over_all_dimensions():
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])              # sq_dist 0 and 3
    sigmoid_3, sigmoid_075 = 0.9525741268, 0.6791786992                 # 1 / (1 + e^-3), e^-0.75
    assert_close(log_policy(x, x[0], 1).exp(), torch.tensor([sigmoid_3, 1 - sigmoid_3]))
    assert_close(log_policy(x, x[0], tau=4).exp(), torch.tensor([sigmoid_075, 1 - sigmoid_075]))


@pytest.mark.parametrize("tau", [0.5, 1.0, 8.0])
def test_policy_is_the_bayes_posterior_of_a_gaussian_leap_with_variance_tau_over_2(tau):
    x, x_theta = normal(G, 5), normal(5)
    leap = Independent(Normal(x, (tau / 2) ** 0.5), 1)      # Eq. 26: from candidate i to anywhere
    likelihood = leap.log_prob(x_theta).exp()               # (G,)      Eq. 28-29, prior 1/G
    assert_close(log_policy(x, x_theta, tau).exp(), likelihood / likelihood.sum())


def test_leaping_keeps_the_marginal_as_the_temperature_falls():
    def gaussian(var, n):                                   # quantiles, without sampling noise
        return Normal(0, var**0.5).icdf((torch.arange(n).double() + 0.5) / n)

    def variance_after_a_leap(ends, tau):
        pi = log_policy(x[:, None], ends[:, None], tau).exp()           # (500, 2000)
        return (pi.mean(0) * x**2).sum().item()

    var = 2.25
    x = gaussian(var, 2000)                                 # p(x_t)
    for tau in (2.0, 0.5, 0.05):
        leap = tau / 2                                      # the variance of the leap
        blurred = gaussian(var + leap, 500)                 # Eq. 26: p after one leap
        assert variance_after_a_leap(blurred, tau) == pytest.approx(var, rel=0.01)      # and back
        kept = (var**2 + leap * (var + leap)) / (var + leap) ** 2       # by hand: ends from p
        assert variance_after_a_leap(gaussian(var, 500), tau) == pytest.approx(kept * var, rel=0.01)
    assert 0.98 < kept < 1                                  # at the last tau


@pytest.mark.parametrize("tau", [0.5, 1.0, 8.0])
def test_log_ratio_and_its_gradient_are_those_of_two_softmaxes(tau):
    x, old, x_theta, weight = normal(G, 5), normal(5), normal(5), normal(G)

    def eq_10(x_theta):
        log_pi, log_pi_old = (-torch.cdist(x, a[None])[:, 0] ** 2 / tau for a in (x_theta, old))
        return log_pi.log_softmax(0) - log_pi_old.log_softmax(0)

    assert_close(log_ratio(x, x_theta, old, tau), eq_10(x_theta))
    assert_close(gradient(lambda a: weight @ log_ratio(x, a, old, tau), x_theta),
                 gradient(lambda a: weight @ eq_10(a), x_theta))


@pytest.mark.parametrize("tau", [1, D_FLUX])
def test_log_ratio_is_exactly_zero_while_the_weights_have_not_moved(tau):
    x = flux_sized_group()
    for old in (x[0], x[0] + 0.01 * torch.randn(D_FLUX)):   # at a candidate, and near it
        assert torch.equal(log_ratio(x, old.clone(), old, tau), torch.zeros(G))


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-3])
def test_log_ratio_equals_two_float64_softmaxes_even_below_the_published_clip(size):
    x = flux_sized_group()
    old = x[0] + 0.01 * torch.randn(D_FLUX)
    random_direction, direction_of_a_candidate = torch.randn(D_FLUX), x[1]
    for direction in (random_direction, direction_of_a_candidate):
        x_theta = old + size * direction
        for tau in (1, D_FLUX):
            exact = (log_policy(x.double(), x_theta.double(), tau)
                     - log_policy(x.double(), old.double(), tau))
            error = (log_ratio(x, x_theta, old, tau) - exact).abs().max()
            assert error < 1e-5 * exact.abs().max() + 1e-6
            naive = log_policy(x, x_theta, tau) - log_policy(x, old, tau)   # the naive form
            assert tau > 1 or (naive - exact).abs().max() > 10 * PUBLISHED_CLIP


def test_log_ratio_stays_float32_under_autocast():
    x, old, x_theta = torch.randn(G, 64), torch.randn(64), torch.randn(64)
    expected = log_ratio(x, x_theta, old, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert ((x - old) @ (x_theta - old)).dtype == torch.bfloat16    # the naive form: matmul
        assert_close(log_ratio(x, x_theta, old, 1), expected, rtol=0, atol=0)


def test_rounding_x_theta_to_bf16_moves_the_ratio_a_thousand_times_past_the_published_clip():
    x = flux_sized_group()                                              # so we use float32
    assert log_ratio(x, x[0].bfloat16().float(), x[0], 1).abs().max() > 1000 * PUBLISHED_CLIP


# ================================================================= the loss: objective, Eq. 9

def J(x, x_theta, old, A, tau=1.0, clip_eps=0.2):
    return clipped_objective(log_ratio(x, x_theta, old, tau), A, clip_eps)


def test_objective_is_zero_at_theta_old_but_its_gradient_is_not():
    (x, A), old = group(), normal(5)
    assert_close(J(x, old, old, A), torch.tensor(0.0).double())
    g = gradient(lambda a: J(x, a, old, A), old)
    step = 1e-4 * g / g.norm()
    slope = (J(x, old + step, old, A) - J(x, old - step, old, A)) / 2e-4        # uphill
    assert slope > 1
    assert_close(slope, g.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tau", [1.0, 0.5, 5.0])
def test_only_the_first_gradient_is_two_over_tau_times_the_advantage_weighted_candidates(tau):
    x, A = group()
    pull = 2 / tau * (A[:, None] * x).sum(0)
    for old in [*x, *(x + normal(G, 5))]:               # anchors at a candidate, and near one
        assert_close(gradient(lambda a: J(x, a, old, A, tau), old), pull)
    later = gradient(lambda a: J(x, a, old, A, tau, clip_eps=9), old + 1)
    assert torch.cosine_similarity(later, pull, dim=0) < 0.99
    first = gradient(lambda a: neighbor_grpo_loss(x, a, old, A, tau, 1e-4)[0], old)
    assert_close(first, -2 * (A[:, None] * x).sum(0))   # of the loss, -tau J: without tau


def test_clipping_stops_only_ratios_that_moved_too_far_in_the_direction_of_their_advantage():
    #                stopped kept kept stopped; the others are inside the clip
    A = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, -3.0])
    rho = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.0])
    kept = torch.tensor([0.0, -1.5, 0.5, 0.0, 2.2, -3.0])               # A rho or 0
    assert_close(gradient(lambda log_rho: clipped_objective(log_rho, A, 0.2), rho.log()), kept)
    total = torch.tensor(1.2 - 1.5 + 0.5 - 0.8 + 2.2 - 3.0)
    assert_close(clipped_objective(rho.log(), A, 0.2), total)


def test_a_ratio_beyond_float32_gives_finite_values_and_gradients():
    log_rho, A = torch.full((3,), 1e4), torch.tensor([1.0, 0.0, -1.0])
    naive = lambda l: torch.minimum(A * l.exp(), A * l.exp().clamp(0.8, 1.2)).sum()
    assert gradient(naive, log_rho).isnan().any()                       # the naive form: 0 * inf
    assert clipped_objective(log_rho, A, 0.2).isfinite()
    assert gradient(lambda l: clipped_objective(l, A, 0.2), log_rho).isfinite().all()
    assert clip_fraction(log_rho, 0.2) == 1
    log_rho, A = torch.tensor([79.9, 80.1]), torch.tensor([-2.0, -2.0])        # the limit is e^80
    slopes = gradient(lambda l: clipped_objective(l, A, 0.2), log_rho)
    assert_close(slopes, torch.tensor([-2 * math.exp(79.9), 0]), rtol=1e-5, atol=0)


def test_clip_fraction_is_the_share_of_ratios_outside_the_clip():
    for ratios, share in (([0.5, 0.9, 1.0, 1.1, 1.5], 0.4), ([0.81, 0.9, 1.21, 1.22], 0.5)):
        log_rho = torch.tensor(ratios).log()                            # the clip is for ratios
        assert_close(clip_fraction(log_rho, 0.2), torch.tensor(share))
    tiny = torch.tensor([5e-5, 2e-4, -2e-4, 0.0])
    assert_close(clip_fraction(tiny, PUBLISHED_CLIP), torch.tensor(0.5))
    assert clip_fraction(torch.zeros(G), 0.0) == 0                      # the edge counts as inside
    assert clip_fraction(torch.tensor([0.0, math.nan]), 0.2) == 0.5     # a run that is ill looks so


def test_the_gradient_reaches_the_weights_through_x_theta_alone_as_worked_out_by_hand():
    model, ts, k, j, tau = nn.Linear(3, 3).double(), schedule(4).double(), 1, 5, 0.5
    with torch.no_grad():
        traj, vels = rollout(lambda x, t: model(x.tanh()), normal(G, 3), ts)
    A, x = group_advantages(normal(G)), traj[k, j]
    x_theta = ddim_step(x, model(x.tanh()), ts[k], ts[k + 1])
    x_old = ddim_step(x, vels[k, j], ts[k], ts[k + 1])
    J(traj[k + 1], x_theta, x_old, A, tau).backward()
    pull = 2 / tau * (A[:, None] * traj[k + 1]).sum(0)                  # the first gradient above
    dJ_dv = (ts[k + 1] - ts[k]) * pull
    assert_close(model.weight.grad, torch.outer(dJ_dv, x.tanh()))
    assert_close(model.bias.grad, dJ_dv)


@pytest.mark.parametrize("tau", [0.5, 5.0])
def test_the_loss_is_minus_tau_times_the_mean_of_j_over_groups_and_anchors(tau):
    P, b = 3, 2
    x, x_theta, x_old, A = normal(P, G, 5), normal(P, b, 5), normal(P, b, 5), normal(P, G)
    each = [[J(x[g], x_theta[g, j], x_old[g, j], A[g], tau) for j in range(b)] for g in range(P)]
    loss, log_rho = neighbor_grpo_loss(
        x[:, None], x_theta.requires_grad_(), x_old, A[:, None], tau, 0.2)
    assert_close(loss, -tau * torch.tensor(each).double().mean())
    assert_close(log_rho[2, 1], log_ratio(x[2], x_theta[2, 1], x_old[2, 1], tau).detach())
    assert loss.requires_grad and not log_rho.requires_grad             # safe to keep and to log


# ======================================================= the loss: whole batches, one dimension D

def test_every_formula_treats_the_groups_of_a_batch_one_by_one():
    P, b, M = 3, 2, 2
    eps_star, delta, r, w = normal(P, 5), normal(P, G, 5), normal(P, M, G), torch.tensor([2.0, 1.0])
    r[1], r[2, 0] = 3.7, 0.1                                # a flat group; one flat reward
    x, x_theta, x_old = perturb_noise(eps_star, delta, 0.3), normal(P, b, 5), normal(P, b, 5)
    total = combine_rewards(r, w)
    A, log_rho = group_advantages(total), log_ratio(x[:, None], x_theta, x_old, 2)
    assert_close(clipped_objective(log_rho, A[:, None], 0.2), sum(
        clipped_objective(log_rho[g, j], A[g], 0.2) for g in range(P) for j in range(b)))
    for g in range(P):
        assert_close(x[g], perturb_noise(eps_star[g], delta[g], 0.3))
        assert_close(total[g], combine_rewards(r[g], w))
        assert_close(A[g], group_advantages(total[g]))
        for j in range(b):
            expected = log_ratio(x[g], x_theta[g, j], x_old[g, j], 2)
            assert_close(log_rho[g, j], expected)
            assert_close(log_ratio(x[g], x_theta[g], x_old[g], 2)[j], expected)     # x is shared
    assert not A[1].any() and A[0].any() and A[2].any()


def test_rewards_may_be_integers_or_booleans():
    zeros_and_ones = torch.tensor([0, 1, 1, 0, 0, 0])
    expected = group_advantages(zeros_and_ones.float())
    for rewards in (zeros_and_ones, zeros_and_ones.bool(), 7 * zeros_and_ones):
        assert_close(group_advantages(rewards), expected)
        assert_close(combine_rewards(rewards[None], torch.ones(1)),
                     combine_rewards(zeros_and_ones[None].float(), torch.ones(1)))
    assert not group_advantages(torch.ones(G).bool()).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_wherever_it_enters(dtype):
    x, theta, A = torch.randn(4, 3), torch.randn(3), torch.randn(4)
    for f, tensors, more in (
            (perturb_noise, dict(eps_star=theta, delta=x), [0.3]),
            (group_advantages, dict(rewards=A), []),
            (combine_rewards, dict(rewards=x), [torch.ones(4)]),
            (log_policy, dict(x=x, x_theta=theta), [1]),
            (log_ratio, dict(x=x, x_theta=theta, x_old=theta), [1]),
            (clipped_objective, dict(log_rho=A, A=A), [0.2]),
            (neighbor_grpo_loss, dict(x=x, x_theta=theta, x_old=theta, A=A), [1, 0.2])):
        for name, tensor in tensors.items():
            with pytest.raises(ValueError, match=f"^{name} is {dtype}, but must be float32"):
                f(*(tensors | {name: tensor.to(dtype)}).values(), *more)


# ============================================ the loss: advantages, Eq. 3 and 11, many rewards

def test_advantages_of_four_rewards_worked_out_by_hand_and_p2_is_grpos_z_score_over_sqrt_G():
    rewards, A = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([-2.0, -1.0, 0.0, 3.0])
    for p, norm in ((1, 6), (2, 3.7416573868), (0.8, 7.7568959268), (0.5, 17.1915099484)):
        assert_close(group_advantages(rewards, p), A / norm)      # p = 0.5: (1.4142 + 1 + 1.7321)^2
    assert_close(group_advantages(rewards), group_advantages(rewards, 0.8))         # Table 2
    assert_close(group_advantages(torch.tensor([4.0, 7.0]), 1), torch.tensor([-0.5, 0.5]))
    rewards = normal(G)
    z = (rewards - rewards.mean()) / rewards.std(correction=0)          # Eq. 3, the std over all G
    assert_close(group_advantages(rewards, p=2), z / G**0.5)


@pytest.mark.parametrize("p", [0.3, 0.8, 1.0, 2.0])
def test_advantages_have_sum_zero_the_rewards_order_and_unit_quasi_norm_at_any_scale_and_offset(p):
    rewards = torch.randn(G)
    A = group_advantages(rewards, p)
    assert_close(A.sum(), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert_close(A.sign(), (rewards - rewards.mean()).sign())
    assert torch.equal(A.argsort(), rewards.argsort())
    assert_close(A.abs().pow(p).sum(), torch.tensor(1.0))
    assert_close(group_advantages(5 * rewards + 3, p), A, rtol=1e-4, atol=1e-6)
    for scale in (1e-30, 1e30):                             # the naive form: |A|^2 is 0 or inf
        assert (scale * rewards).pow(2).sum() in (0, torch.inf)
        assert_close(group_advantages(scale * rewards, p), A)


def test_smaller_p_shrinks_flat_groups_more_than_sparse_ones():
    flat, sparse = torch.tensor([[1.0, -1.0] * 6, [1.0] + [0.0] * 11]).double()
    shrinks = []
    for p in (2, 1, 0.8, 0.5):
        A = group_advantages(torch.stack([flat, sparse]), p)
        length_flat, length_sparse = A.norm(dim=1)
        assert_close(A[0].abs(), torch.full((G,), G ** (-1 / p)).double())
        assert_close(length_flat, torch.tensor(G ** (1 / 2 - 1 / p)).double())
        by_hand = (11**2 + 11) ** 0.5 / (11**p + 11) ** (1 / p)     # A: once 11/12, 11 times -1/12
        assert_close(length_sparse, torch.tensor(by_hand).double())
        shrinks.append((length_flat / length_sparse).item())
    assert shrinks[0] == pytest.approx(1)                   # p = 2 treats both alike
    assert shrinks == sorted(shrinks, reverse=True) and shrinks[2] < 0.6    # p = 0.8 does not


def test_equal_rewards_give_zero_advantages_even_when_their_mean_rounds():
    rewards = torch.full((12,), 3.7)
    A = rewards - rewards.mean()
    assert (A / A.norm()).abs().max() > 0.2     # the naive form magnifies rounding errors
    for equal in (rewards, torch.zeros(12), -rewards, 1e-30 * rewards, rewards.double()):
        assert torch.equal(group_advantages(equal), torch.zeros_like(equal))
    nearly, expected = torch.tensor([3.7] * 11 + [3.7001]), [-1 / 22] * 11 + [0.5]    # one differs
    assert_close(group_advantages(nearly, 1), torch.tensor(expected), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_count_as_equal_if_their_range_is_at_most_16_rounding_errors_of_the_largest(dtype):
    for roundings, flat in ((16, True), (17, False)):
        largest = 1 + roundings * torch.finfo(dtype).eps
        rewards = torch.tensor([1.0] * 11 + [largest], dtype=dtype)
        A = group_advantages(torch.stack([rewards, -rewards]))
        assert (A == 0).all(1).tolist() == [flat, flat]


def test_combined_reward_is_the_weighted_mean_of_sample_z_scores():
    rewards, r3 = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]), 3**0.5      # stds 1 and r3
    expected = torch.tensor([-1 - 3 / r3, -3 / r3, 1 + 6 / r3]) / 4     # weights 1/4 and 3/4
    weights, in_other_units = torch.tensor([1.0, 3.0]), rewards * torch.tensor([[100], [0.01]]) - 7
    assert_close(combine_rewards(rewards, weights), expected)
    assert_close(combine_rewards(rewards, 1e5 * weights), expected)
    assert_close(combine_rewards(rewards, torch.tensor([1.0, 0.0])), torch.tensor([-1.0, 0, 1]))
    assert_close(combine_rewards(in_other_units, weights), expected, rtol=1e-4, atol=1e-4)


def test_a_reward_that_is_flat_in_a_group_contributes_nothing():
    rewards = torch.stack([torch.arange(12.0), torch.full((12,), 3.7)])
    naive = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    assert naive[1].abs().max() > 0.5                       # the naive form: rounding, or 0 / 0
    expected = (torch.arange(12.0) - 5.5) / 13**0.5 * 0.75  # the variance of 0..11 is 13
    assert_close(combine_rewards(rewards, torch.tensor([3.0, 1.0])), expected)
    assert torch.equal(combine_rewards(rewards[1:], torch.tensor([1.0])), torch.zeros(12))


def test_rewards_that_cancel_leave_nothing_to_learn_and_not_their_rounding():
    for offset, spread in [(0.3, 0.005), (21, 0.1), (100, 0.01)] * 50:
        rewards = torch.tensor([[1.0], [-3]]) * (offset + spread * torch.randn(G))
        assert not group_advantages(combine_rewards(rewards, torch.ones(2))).any()
        assert group_advantages(combine_rewards(rewards, torch.tensor([1.0, 0.5]))).any()


def test_a_reward_with_small_numbers_is_not_flat_beside_one_with_large_numbers():
    rewards, units, equal = torch.randn(2, G), torch.tensor([[1e-8], [1e8]]), torch.ones(2)
    assert_close(combine_rewards(units * rewards, equal), combine_rewards(rewards, equal))


# ===================================================== the loss: what it refuses and needs

@pytest.mark.parametrize("call, named", [
    (lambda x: perturb_noise(x[0], x, 0), "sigma is 0"),
    (lambda x: perturb_noise(x[0], x, 1.5), "sigma is 1.5"),
    (lambda x: perturb_noise(x[0], x[:, :2], 0.3), r"\(4, 2\)"),
    (lambda x: perturb_noise(x, x, 0.3), r"\(4, 3\) and delta \(4, 3\)"),     # one eps* for each
    (lambda x: perturb_noise(x[:, 0], x[:, 0], 0.3), r"\(4,\)"),
    (lambda x: perturb_noise(x[:2], x.expand(4, 4, 3), 0.3), r"\(2, 3\)"),
    (lambda x: group_advantages(x[:, 0], p=0), "p is 0"),
    (lambda x: group_advantages(x[:, 0], p=2.5), "p is 2.5"),
    (lambda x: group_advantages(torch.tensor([1.0, math.nan])), "nan"),
    (lambda x: group_advantages(torch.tensor([1.0, math.inf])), "inf"),
    (lambda x: group_advantages(x[0, 0]), "one for each of the G"),
    (lambda x: group_advantages(x[:, :1]), "G > 1"),
    (lambda x: combine_rewards(x, torch.ones(3)), r"\(4, 3\)"),
    (lambda x: combine_rewards(x[0], torch.tensor(1.0)), r"\(3,\) must be"),
    (lambda x: combine_rewards(x, torch.tensor([1.0, 1.0, 1.0, -1.0])), r"-1\.0"),
    (lambda x: combine_rewards(x, torch.zeros(4)), "not all 0"),
    (lambda x: log_policy(x, x[0, :2], 1), r"\(2,\)"),
    (lambda x: log_policy(x[0], x[0], 1), r"x is \(3,\)"),
    (lambda x: log_policy(x, x[0], tau=0), "tau is 0"),
    (lambda x: log_policy(x, x[0], tau=math.inf), "tau is inf"),
    (lambda x: log_ratio(x, x[0, :1], x[0], 1), r"\(1,\)"),
    (lambda x: log_ratio(x, x[0, :2], x[0, :2], 1), r"\(2,\)"),
    # not detached: the ratio would be 1 for ever, and the gradient 0
    (lambda x: log_ratio(x, *[x[0].requires_grad_()] * 2, 1), "only x_theta may have a gradient"),
    (lambda x: log_ratio(x.requires_grad_(), x[0], x[0].detach(), 1), "only x_theta"),
    # b anchors of P = b groups, without the dimension that shares a group: x (P, G, D)
    (lambda x: log_ratio(*[x.expand(4, 4, 3)] * 3, 1), r"\(4, 4, 3\) and x_theta \(4, 4, 3\)"),
    (lambda x: log_ratio(x.expand(2, 4, 3), x, x, 1), r"\(2, 4, 3\)"),
    (lambda x: log_policy(x.expand(2, 3, 4, 3), x.expand(2, 4, 3), 1), r"x is \(2, 3, 4, 3\)"),
    (lambda x: clipped_objective(x[:, 0], x[:3, 0], 0.2), r"\(3,\)"),
    (lambda x: clipped_objective(x[:, 0], x[:, 0], 0), "clip_eps is 0"),
    (lambda x: clipped_objective(x[:, 0], x[:, 0], math.nan), "clip_eps is nan"),
    (lambda x: clipped_objective(x.expand(4, 4, 3), x, 0.2), r"A \(4, 3\)"),
    (lambda x: clipped_objective(x, x.expand(4, 4, 3), 0.2), r"A \(4, 4, 3\)"),
    (lambda x: clipped_objective(x, x[:3], 0.2), r"A \(3, 3\)"),
    (lambda x: schedule(0), "num_steps is 0"),
    (lambda x: schedule(4, shift=-1), "shift -1"), (lambda x: schedule(4, shift=0), "shift 0"),
    (lambda x: schedule(4, shift=math.inf), "shift inf"),
    (lambda x: rollout(None, x, schedule(4), solver="heun"), "heun"),
    (lambda x: rollout(None, x, schedule(4).flip(0)), r"0\.25"),
    (lambda x: rollout(None, x, torch.tensor([1.0, 0.5, 0.5, 0.0])), r"0\.5, 0\.5"),
    (lambda x: rollout(None, x, torch.tensor([1.0, 0.5, -0.5])), r"-0\.5"),
    (lambda x: rollout(None, x, torch.tensor([1.5, 0.0])), r"1\.5"),
    (lambda x: rollout(None, x, torch.tensor([1.0])), r"not \[1\.0\]"),
    (lambda x: rollout(None, x, torch.tensor([[1.0], [0.0]])), r"\[\[1\.0\], \[0\.0\]\]"),
])
def test_bad_input_is_refused_with_the_value_in_the_message(call, named):
    with pytest.raises(ValueError, match=named):
        call(torch.randn(4, 3))


@pytest.mark.parametrize("file", ["neighbor_grpo.py", "solvers.py"])
def test_the_loss_and_the_solvers_import_only_torch(file):
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in imports] == ["import torch"]


# ============================================================================== the solvers

def mixture_velocity(x, t, means, sd):
    """E[eps - x_0 | x_t = x], exact for data from Gaussians of width sd around `means`."""
    variance = ((1 - t) * sd) ** 2 + t**2
    away = x[..., None, :] - (1 - t) * means                            # (..., modes, 2)
    mode = torch.softmax(-away.pow(2).sum(-1) / (2 * variance), -1)     # (..., modes)  P(mode | x)
    return (mode[..., None] * ((t - (1 - t) * sd**2) / variance * away - means)).sum(-2)


def curved(x, t):
    """Some nonlinear velocity that depends on time."""
    return torch.sin(3 * x) + t * x.roll(1, -1) - 0.5


ONE, TWO = torch.tensor([[1.0, -0.5]]).double(), torch.tensor([[1.5, 1.0], [-1.0, 0.0]]).double()
one_gaussian = lambda x, t: mixture_velocity(x, t, ONE, 0.5)
two_gaussians = lambda x, t: mixture_velocity(x, t, TWO, 0.4)
whole = lambda steps: schedule(steps).double()                          # from 1 to 0
inner = lambda steps: torch.linspace(3, -3, steps + 1).double().sigmoid()       # even in lambda


def one_gaussian_path(x, start, end):
    """The closed form: the distance to the mean, in standard deviations, does not change."""
    sd, sd_end = (((0.5 * (1 - t)) ** 2 + t**2) ** 0.5 for t in (start, end))
    return (1 - end) * ONE[0] + sd_end / sd * (x - (1 - start) * ONE[0])


def two_gaussians_path(x, start, end, steps=500):
    """The classical Runge-Kutta method of order 4, with an error below 1e-8."""
    ts = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    for t, h in zip(ts, ts.diff()):
        a = two_gaussians(x, t)
        b = two_gaussians(x + h / 2 * a, t + h / 2)
        c = two_gaussians(x + h / 2 * b, t + h / 2)
        d = two_gaussians(x + h * c, t + h)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


FLOWS = [(one_gaussian, one_gaussian_path), (two_gaussians, two_gaussians_path)]


def test_schedule_falls_from_one_to_zero_and_shift_moves_it_towards_the_noise():
    assert schedule(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    shifted = torch.tensor([1, 0.9, 0.75, 0.5, 0])          # e.g. 3 * 0.75 / (1 + 2 * 0.75) = 0.9
    assert_close(schedule(4, shift=3), shifted)
    assert_close(schedule(3, shift=3, start=0.75), shifted[1:])
    for steps in (1, 8, 1000):
        ts, even = schedule(steps, shift=3), [1 - k / steps for k in range(steps + 1)]
        assert ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all()
        assert torch.equal(ts, torch.tensor([3 * u / (1 + 2 * u) for u in even]))


@pytest.mark.parametrize("steps", [8, 25])
def test_schedule_equals_diffusers_with_a_fixed_shift_and_with_the_dynamic_shift_exp_mu(steps):
    even = torch.linspace(1, 1 / steps, steps).tolist()     # as in FluxPipeline
    for settings, mu, shift in ((dict(shift=3.0), None, 3),
                                (dict(use_dynamic_shifting=True), 1.15, math.exp(1.15))):
        theirs = FlowMatchEulerDiscreteScheduler(**settings)
        theirs.set_timesteps(sigmas=even, mu=mu)
        assert_close(schedule(steps, shift), theirs.sigmas)


def diffusers_rollout(scheduler, velocity, x, ts):
    """A rollout by diffusers at the same times: its sigma is our t, and its timestep 1000 t."""
    scheduler.set_timesteps(len(ts) - 1)
    scheduler.set_begin_index(0)
    scheduler.sigmas, scheduler.timesteps = ts, 1000 * ts[:-1]
    traj = [x]
    for t in scheduler.timesteps:
        traj.append(scheduler.step(velocity(traj[-1], t / 1000), t, traj[-1]).prev_sample)
    return torch.stack(traj)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 8, 16])
def test_rollout_agrees_with_diffusers_at_every_step(steps, shift):
    ts, x1 = schedule(steps, shift), torch.randn(G, 6)
    dpmpp_2m = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    for name, theirs in (("ddim", FlowMatchEulerDiscreteScheduler()), ("dpmpp_2m", dpmpp_2m)):
        expected = diffusers_rollout(theirs, curved, x1, ts)
        error = (rollout(curved, x1, ts, name)[0] - expected).abs().max()
        assert error < 1e-5 * expected.abs().max()


def errors(velocity, path, grid, *runs):
    """Root-mean-square distance from the exact end point, for each (solver, number of steps)."""
    x = normal(64, 2)
    exact = path(x, *grid(1))
    ends = [rollout(velocity, x, grid(steps), solver)[0][-1] for solver, steps in runs]
    return [(end - exact).pow(2).mean().sqrt().item() for end in ends]


@pytest.mark.parametrize("velocity, path", FLOWS)
@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpmpp_2m", 2)])
def test_dpmpp_2m_is_of_second_order_and_ddim_of_first(velocity, path, solver, order):
    more = (128, 1024) if solver == "dpmpp_2m" else (16, 128)   # its DDIM steps at both ends bring
    for grid, (few, many) in ((inner, (16, 128)), (whole, more)):       # a log factor
        most, least = errors(velocity, path, grid, (solver, few), (solver, many))
        slope = math.log(most / least) / math.log(many / few)           # of log error, log steps
        assert slope == pytest.approx(order, abs=0.1 * order**1.5)      # 0.9 to 1.1, 1.7 to 2.3


@pytest.mark.parametrize("velocity, path", FLOWS)
def test_16_steps_of_dpmpp_2m_are_more_accurate_than_50_of_ddim(velocity, path):
    sixteen, fifty = errors(velocity, path, whole, ("dpmpp_2m", 16), ("ddim", 50))
    assert sixteen < fifty


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_both_solvers_are_exact_on_a_straight_flow(solver, steps):
    x1, x0, ts = normal(G, 3), normal(3), schedule(steps, shift=3).double()
    traj, _ = rollout(lambda x, t: (x - x0) / t, x1, ts, solver)        # all paths lead to x0
    t = ts[:, None, None]
    assert_close(traj, (1 - t) * x0 + t * x1)
    at_once = ddim_step(traj[:-1], (traj[:-1] - x0) / t[:-1], t[:-1], t[1:])    # t may broadcast
    assert_close(at_once, traj[1:])


@pytest.mark.parametrize("solver, steps", [("ddim", 25), ("dpmpp_2m", 16), ("dpmpp_2m", 8)])
def test_a_rollout_needs_the_evaluations_of_table_3_and_returns_all_of_them(solver, steps):
    seen = []

    def velocity(x, t):
        seen.append((x, t, curved(x, t)))
        return seen[-1][2]

    ts = schedule(steps, shift=3)
    traj, vels = rollout(velocity, torch.randn(G, 6), ts, solver)
    assert len(seen) == steps                               # NFE_old
    x, t, v = (torch.stack(each) for each in zip(*seen))
    assert torch.equal(x, traj[:-1]) and torch.equal(t, ts[:-1]) and torch.equal(v, vels)


# ============================================================= the method in train.py's loop

class Stub:
    """What train.py needs of a model, with a linear velocity. It counts the latents."""

    device, latent_shape, nfe = torch.device("cpu"), (4, 3), 1

    def __init__(self):
        torch.manual_seed(0)
        self.transformer, self.asked = nn.Linear(3, 3), [0, 0]          # without and with gradients

    def trained(self):
        return list(self.transformer.parameters())

    def encode(self, prompts):
        return dict(vec=torch.zeros(len(prompts), 1))

    def velocity(self, x, t, cond):
        self.asked[torch.is_grad_enabled()] += len(x)
        return self.transformer(x.tanh()) + t * x

    def decode(self, x):
        return x

    def weights(self):
        return torch.cat([w.detach().flatten() for w in self.transformer.parameters()])


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def stub_run(folder, model, preset="dpm8", **settings):
    (folder / "prompts.txt").write_text("a\nb\nc\n", encoding="utf-8")
    settings = dict(train.PRESETS[preset], model="", prompts=str(folder / "prompts.txt"), shift=3.0,
                    rewards="brightness", out_dir=str(folder / "run"), overwrite=True, lr=1e-2,
                    iterations=1, updates_per_iteration=1, eval_every=0, save_every=0) | settings
    return Run(train.Config(**settings), model, {})


def train_stub(folder, model, scorer=brightness, **settings):
    """Algorithm 1 by train.py, with one update per iteration -> the lines of its log."""
    run = stub_run(folder, model, **settings)
    train.train(run.cfg, model, {"brightness": scorer}, run)
    return run.lines()


@pytest.mark.parametrize("preset, nfe", [("ddim25", [25, 4]), ("dpm16", [16, 3]),
                                         ("dpm8", [8, 4 / 3])])
def test_the_presets_need_the_evaluations_of_table_3(tmp_path, preset, nfe):
    model = Stub()
    line, = train_stub(tmp_path, model, preset=preset, prompts_per_iteration=2)
    assert [n / (2 * G) for n in model.asked] == [line["nfe_old"], line["nfe_theta"]] == nfe


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("tau", ["1", "dim"])
def test_the_first_ratio_is_one_except_for_the_literal_anchor_after_dpmpp(tmp_path, solver, tau):
    five = dict(solver=solver, tau=tau, iterations=5)
    for line in train_stub(tmp_path, Stub(), updates_per_iteration=2, **five):
        assert line["first_ratio"] < 1e-5                   # up to rounding, as the weights move
        assert line["clip_fraction"] > 0                    # the second update has other ratios
    for line in train_stub(tmp_path, Stub(), old_anchor="rollout", **five):
        assert (line["first_ratio"] < 1e-5) == (solver == "ddim")


MODES = torch.tensor([[1.5, 0.0], [-1.5, 0.0]])             # two Gaussians; the first is the goal


class Toy(Stub):
    """A 2-D flow: the exact velocity of two Gaussians plus a small network, at first zero."""

    latent_shape = (1, 2)

    def __init__(self):
        self.transformer = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2))
        nn.init.zeros_(self.transformer[2].weight)
        nn.init.zeros_(self.transformer[2].bias)

    def velocity(self, x, t, cond=None):
        learnt = self.transformer(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))
        return mixture_velocity(x, t, MODES, 0.4) + learnt


def closeness(x0, prompts=None):
    return -(x0 - MODES[0]).flatten(1).norm(dim=1)


@torch.no_grad()
def gain_of_fresh_samples(model):
    """The mean gain in reward of 512 noises by training, and this mean in standard errors."""
    noise, ts = torch.randn(512, 2), schedule(16)
    ends = [rollout(each.velocity, noise, ts, "dpmpp_2m")[0][-1] for each in (Toy(), model)]
    gain = closeness(ends[1]) - closeness(ends[0])          # (512,)
    return gain.mean(), gain.mean() / (gain.std() / 512**0.5)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_training_raises_the_expected_reward_and_lowers_it_if_it_is_negated(tmp_path, solver):
    for sign in (1, -1):
        model = Toy()
        train_stub(tmp_path, model, lambda x0, prompts: sign * closeness(x0), solver=solver,
                   iterations=25, lr=3e-3, shift=1.0, tau="1",
                   updates_per_iteration=4)                 # Algorithm 1: an update per anchor
        gain, standard_errors = gain_of_fresh_samples(model)
        assert sign * gain > 0.3 and sign * standard_errors > 10        # at most 1.7


def the_example_in_the_readme():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    exec(readme.split("## Copy the loss")[1].split("```python\n")[1].split("```")[0], names := {})
    return names["neighbor_grpo_step"]


def test_the_example_in_the_readme_raises_the_reward_and_its_clip_acts():
    step, models = the_example_in_the_readme(), [Toy(), Toy(), Toy()]
    models[1].transformer.load_state_dict(models[0].transformer.state_dict())
    for model, clip_eps, iterations in zip(models, (1e-4, 1e9, 1e-4), (3, 3, 25)):
        opt = torch.optim.Adam(model.trained(), lr=3e-3)
        torch.manual_seed(2)
        for _ in range(iterations):
            step(model.velocity, closeness, opt, (2,), clip_eps=clip_eps)
    assert (models[0].weights() - models[1].weights()).norm() > 1e-3    # lr is 3e-3
    assert gain_of_fresh_samples(models[2])[1] > 10         # standard errors


def test_the_example_in_the_readme_stops_where_an_sde_is_left_on():
    sde = lambda x, t: -x + 0.5 * (not torch.is_grad_enabled()) * torch.randn_like(x)
    with pytest.raises(AssertionError, match="rho is not 1"):
        the_example_in_the_readme()(sde, closeness, None, (2,))

