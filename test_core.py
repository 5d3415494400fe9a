"""
The mathematics, one test per sentence. Each name is the sentence; each test compares with something that is not our code.

    python -m pytest -q test_core.py                        # a minute or two: no network, no GPU
    python -m pytest -q test_core.py -k first_gradient      # one sentence

  what is checked                          against what
  the loss      (neighbor_grpo.py)         closed forms, float64, torch.distributions, autograd, numbers worked out by hand
  the solvers   (solvers.py)               diffusers' schedulers, flows whose solution is known, Runge-Kutta in float64
  the method    (both, as in Algorithm 1)  the reward of fresh samples from a 2-D flow, before and after
  train.py      (on a stub, and in full)   counts at the velocity, broken rewards and gradients, a run that was interrupted
  model.py, eval.py                        diffusers' FluxPipeline

Where a shortcut looks harmless, the test also shows that it is wrong: those lines say "the naive form".

    G = 12  candidates    D  numbers in one latent    x (G, D)  candidates    old, anchor (D,)    A (G,)  advantages
"""
import ast, functools, json, math, signal
from pathlib import Path
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal
from torch.testing import assert_close
import cpu_torchvision                                                     # noqa: F401  (before diffusers)
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
import rewards
import train
from model import Flux
from neighbor_grpo import advantages, clip_fraction, clipped_objective, combine_rewards, log_policy, log_ratio, perturb_noise
from solvers import ddim_step, rollout, schedule

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]              # one process writes its checkpoint alone
torch.set_num_threads(1)                                                   # the tensors are small: threads only cost time
G, D_FLUX = 12, 129_600                                                    # 720 x 720: 2,025 tokens of 64 numbers
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


def gradient(f, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(f(at), at)[0]


# ============================================================================================== the loss: noise, Eq. 7

def test_perturbation_keeps_the_variance_because_its_coefficients_lie_on_a_circle():
    eps_star, delta = torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 1.0], [0.0, 3.0]])
    assert_close(perturb_noise(eps_star, delta, 0.6), torch.tensor([[1.1, -1.0], [0.8, 0.2]]))         # 0.8 eps* + 0.6 delta


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0])
def test_perturbed_noise_stays_standard_normal_and_neighbours_are_equidistant(sigma):
    D = 40_000
    x = perturb_noise(normal(D), normal(G, D), sigma)
    five_sd = 5 / D**0.5
    assert_close(x.mean(1), torch.zeros(G).double(), rtol=0, atol=five_sd)
    assert_close(x.var(1), torch.ones(G).double(), rtol=0, atol=five_sd * 2**0.5)
    pairs = torch.ones(G, G).triu(1).bool()
    correlation = torch.full((66,), 1 - sigma**2).double()                                            # 0 at sigma = 1: unrelated
    assert_close(torch.corrcoef(x)[pairs], correlation, rtol=0, atol=five_sd)
    assert_close(torch.pdist(x), torch.full((66,), sigma * (2 * D) ** 0.5).double(), rtol=0.02, atol=0)


# ====================================================================================== the loss: policy, Eq. 8 and 26-30

def test_policy_is_a_softmax_over_squared_distances_summed_over_all_dimensions():
    x = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]]])                            # (G=2, 2, 2): 0 and 3 away
    assert_close(log_policy(x, x[0]).exp(), torch.tensor([0.9525741268, 0.0474258732]))               # 1 / (1 + e^-3)
    assert_close(log_policy(x, x[0], tau=4).exp(), torch.tensor([0.6791786992, 0.3208213008]))        # 1 / (1 + e^-0.75)


def test_policy_sums_to_one_and_is_highest_at_the_anchors_own_candidate():
    x = normal(G, 5)
    pi = torch.stack([log_policy(x, anchor).exp() for anchor in x])                                   # (anchor, candidate)
    assert_close(pi.sum(1), torch.ones(G).double())
    assert pi.argmax(1).tolist() == list(range(G))


def test_policy_and_ratio_are_equivariant_to_candidate_order():
    x, old, anchor, order = normal(G, 5), normal(5), normal(5), torch.randperm(G)
    assert_close(log_policy(x[order], anchor), log_policy(x, anchor)[order])
    assert_close(log_ratio(x[order], anchor, old), log_ratio(x, anchor, old)[order])


@pytest.mark.parametrize("tau", [0.5, 1.0, 8.0])
def test_policy_is_bayes_posterior_of_a_gaussian_leap_of_variance_half_tau(tau):
    x, anchor = normal(G, 5), normal(5)
    leap = Independent(Normal(x, (tau / 2) ** 0.5), 1)                        # Eq. 26: from candidate i to anywhere
    likelihood = leap.log_prob(anchor).exp()                                  # (G,)
    assert_close(log_policy(x, anchor, tau).exp(), likelihood / likelihood.sum())        # Eq. 28-29, prior 1/G


def test_leaping_keeps_the_marginal_as_the_temperature_falls():
    def gaussian(var, n):                                                     # by its quantiles: no sampling noise
        return Normal(0, var**0.5).icdf((torch.arange(n).double() + 0.5) / n)

    def variance_after_a_leap(anchors, tau):
        pi = torch.stack([log_policy(x[:, None], a[None], tau).exp() for a in anchors]).mean(0)
        return (pi * x**2).sum().item()

    var = 2.25
    x = gaussian(var, 2000)                                                   # p(x_t)
    for tau in (2.0, 0.5, 0.05):
        leap = tau / 2                                                        # the variance of the leap
        blurred = gaussian(var + leap, 500)                                   # Eq. 26: one leap away from p; Eq. 30 leaps back
        assert variance_after_a_leap(blurred, tau) == pytest.approx(var, rel=0.01)
        kept = (var**2 + leap * (var + leap)) / (var + leap) ** 2             # by hand, for anchors from p itself
        assert variance_after_a_leap(gaussian(var, 500), tau) == pytest.approx(kept * var, rel=0.01)
    assert 0.98 < kept < 1                                                    # at the last tau


# ============================================================================================ the loss: ratio, Eq. 10

def test_log_ratio_of_two_candidates_worked_out_by_hand():
    x = torch.tensor([[0.0], [1.0]])                                          # the anchor walks from the first to the second,
    assert_close(log_ratio(x, x[1], x[0]), torch.tensor([-1.0, 1.0]))         # so the two probabilities change places
    assert_close(log_ratio(x, x[1], x[0], tau=4), torch.tensor([-0.25, 0.25]))


@pytest.mark.parametrize("tau", [0.5, 1.0, 8.0])
def test_log_ratio_and_its_gradient_are_those_of_two_softmaxes(tau):
    x, old, anchor, weight = normal(G, 5), normal(5), normal(5), normal(G)

    def eq_10(anchor):
        log_pi, log_pi_old = (-torch.cdist(x, a[None])[:, 0] ** 2 / tau for a in (anchor, old))
        return log_pi.log_softmax(0) - log_pi_old.log_softmax(0)

    assert_close(log_ratio(x, anchor, old, tau), eq_10(anchor))
    assert_close(gradient(lambda a: weight @ log_ratio(x, a, old, tau), anchor), gradient(lambda a: weight @ eq_10(a), anchor))


@pytest.mark.parametrize("tau", [1, D_FLUX])
def test_log_ratio_is_exactly_zero_while_the_weights_have_not_moved(tau):
    x = perturb_noise(torch.randn(D_FLUX), torch.randn(G, D_FLUX), 0.3)
    for old in (x[0], x[0] + 0.01 * torch.randn(D_FLUX)):                     # on a candidate, and beside it
        assert torch.equal(log_ratio(x, old.clone(), old, tau), torch.zeros(G))


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4, 1e-3])
def test_log_ratio_equals_two_float64_softmaxes_even_below_the_published_clip(size):
    x = perturb_noise(torch.randn(D_FLUX), torch.randn(G, D_FLUX), 0.3)
    old = x[0] + 0.01 * torch.randn(D_FLUX)
    for anchor in (old + size * torch.randn(D_FLUX), old + size * x[1]):      # anywhere, and along what the candidates share
        for tau in (1, D_FLUX):
            exact = log_policy(x.double(), anchor.double(), tau) - log_policy(x.double(), old.double(), tau)
            assert_close(log_ratio(x, anchor, old, tau).double(), exact, rtol=1e-7, atol=1e-6)
            naive = log_policy(x, anchor, tau) - log_policy(x, old, tau)      # the naive form, in float32
            assert tau > 1 or (naive - exact).abs().max() > 10 * PUBLISHED_CLIP


def test_log_ratio_stays_float32_under_autocast():
    x, old, anchor = torch.randn(G, 64), torch.randn(64), torch.randn(64)
    expected = log_ratio(x, anchor, old)
    with torch.autocast("cpu", torch.bfloat16):
        assert ((x - old) @ (anchor - old)).dtype == torch.bfloat16           # the naive form, a matrix product
        assert_close(log_ratio(x, anchor, old), expected, rtol=0, atol=0)     # bit for bit, and float32


def test_rounding_the_anchor_to_bf16_moves_the_ratio_a_thousand_times_past_the_published_clip():
    x = perturb_noise(torch.randn(D_FLUX), torch.randn(G, D_FLUX), 0.3)
    assert log_ratio(x, x[0].bfloat16().float(), x[0]).abs().max() > 1000 * PUBLISHED_CLIP             # hence float32


# ======================================================================================= the loss: objective, Eq. 9

def J(x, anchor, old, A, tau=1.0, clip_eps=0.2):
    return clipped_objective(log_ratio(x, anchor, old, tau), A, clip_eps)


def test_objective_is_zero_at_theta_old_but_its_gradient_is_not():
    (x, A), old = group(), normal(5)
    assert_close(J(x, old, old, A), torch.tensor(0.0).double())
    g = gradient(lambda a: J(x, a, old, A), old)
    step = 1e-4 * g / g.norm()
    slope = (J(x, old + step, old, A) - J(x, old - step, old, A)) / 2e-4      # by finite differences, uphill
    assert slope > 1
    assert_close(slope, g.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tau", [1.0, 0.5, 5.0])
def test_first_gradient_is_two_over_tau_times_the_advantage_weighted_candidates_for_every_anchor(tau):
    x, A = group()
    for old in [*x, *(x + normal(G, 5))]:                                     # on each candidate, and beside each
        assert_close(gradient(lambda a: J(x, a, old, A, tau), old), 2 / tau * (A[:, None] * x).sum(0))


def test_temperature_rescales_the_first_gradient_but_does_not_turn_it():
    (x, A), old = group(), normal(5)
    g1, g5 = (gradient(lambda a: J(x, a, old, A, tau), old) for tau in (1, 5))
    assert_close(g1, 5 * g5)
    g1, g5 = (gradient(lambda a: J(x, a, old, A, tau, clip_eps=9), old + 1) for tau in (1, 5))         # true of the first only
    assert torch.cosine_similarity(g1, g5, dim=0) < 0.99


def test_gradient_pulls_towards_a_rewarded_candidate_and_pushes_away_from_a_punished_one():
    x, old = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), torch.zeros(2)
    pull = gradient(lambda a: J(x, a, old, torch.tensor([0.5, -0.5, 0.0, 0.0])), old)
    assert_close(pull, torch.tensor([2.0, 0.0]))


def test_clipping_stops_the_gradient_of_candidates_that_moved_too_far_as_rewarded_and_only_those():
    #                    stopped  kept    kept  stopped  inside the clip
    A = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, -3.0])
    rho = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.0])
    assert_close(gradient(lambda log_rho: clipped_objective(log_rho, A, 0.2), rho.log()),
                 torch.tensor([0.0, -1.5, 0.5, 0.0, 2.2, -3.0]))              # A rho, or nothing
    assert_close(clipped_objective(rho.log(), A, 0.2), torch.tensor(1.2 - 1.5 + 0.5 - 0.8 + 2.2 - 3.0))


def test_a_ratio_beyond_float32_gives_finite_values_and_gradients():
    log_rho, A = torch.full((3,), 1e4), torch.tensor([1.0, 0.0, -1.0])
    naive = gradient(lambda l: torch.minimum(A * l.exp(), A * l.exp().clamp(0.8, 1.2)).sum(), log_rho)
    assert naive.isnan().any()                                                # the naive form: 0 * inf
    assert clipped_objective(log_rho, A, 0.2).isfinite()
    assert gradient(lambda l: clipped_objective(l, A, 0.2), log_rho).isfinite().all()
    assert clip_fraction(log_rho, 0.2) == 1
    large = torch.tensor([70.0])                                              # below e^80 nothing is cut
    assert_close(gradient(lambda l: clipped_objective(l, torch.tensor([-2.0]), 0.2), large), torch.tensor([-2 * math.exp(70)]))


def test_clip_fraction_is_the_share_of_ratios_outside_the_clip():
    assert_close(clip_fraction(torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5]).log(), 0.2), torch.tensor(0.4))
    assert_close(clip_fraction(torch.tensor([0.81, 0.9, 1.21, 1.22]).log(), 0.2), torch.tensor(0.5))   # ratios, not their logs
    assert_close(clip_fraction(torch.tensor([5e-5, 2e-4, -2e-4, 0.0]), PUBLISHED_CLIP), torch.tensor(0.5))


def test_only_the_anchor_carries_a_gradient_and_it_reaches_the_weights_as_by_hand():
    model, ts, k, j, tau = nn.Linear(3, 3).double(), schedule(4).double(), 1, 5, 0.5
    with torch.no_grad():
        traj, vels = rollout(lambda x, t: model(x.tanh()), normal(G, 3), ts)
    A, x = advantages(normal(G)), traj[k, j]
    anchor = ddim_step(x, model(x.tanh()), ts[k], ts[k + 1])
    anchor_old = ddim_step(x, vels[k, j], ts[k], ts[k + 1])
    J(traj[k + 1], anchor, anchor_old, A, tau).backward()
    pull = (ts[k + 1] - ts[k]) * 2 / tau * (A[:, None] * traj[k + 1]).sum(0)  # dJ/dv, from the first gradient above
    assert_close(model.weight.grad, torch.outer(pull, x.tanh()))
    assert_close(model.bias.grad, pull)
    anchor = ddim_step(x, model(x.tanh()), ts[k], ts[k + 1])
    naive = torch.autograd.grad(J(traj[k + 1], anchor, anchor, A, tau), model.bias)[0]
    assert not naive.any()                                                    # the naive form: an old anchor that is no constant


# =============================================================================== the loss: advantages, Eq. 3 and 11

def test_advantages_of_four_rewards_worked_out_by_hand():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])                              # less their mean: -2, -1, 0, 3
    assert_close(advantages(rewards, p=1), torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 6)
    assert_close(advantages(rewards, p=2), torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 3.7416573868)        # sqrt(14)
    assert_close(advantages(rewards), torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 7.7568959268)             # p = 0.8 (Table 2)
    assert_close(advantages(rewards, p=0.5), torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 17.1915099484)     # (1.4142 + 1 + 1.7321)^2


def test_p2_is_grpos_z_score_over_sqrt_G():
    rewards = normal(G)
    z = (rewards - rewards.mean()) / rewards.std(correction=0)                # Eq. 3, the std over all G
    assert_close(advantages(rewards, p=2), z / G**0.5)


@pytest.mark.parametrize("p", [0.3, 0.8, 1.0, 2.0])
def test_advantages_sum_to_zero_and_keep_sign_and_order(p):
    rewards = normal(G)
    A = advantages(rewards, p)
    assert_close(A.sum(), torch.tensor(0.0).double())
    assert_close(A.sign(), (rewards - rewards.mean()).sign())
    assert torch.equal(A.argsort(), rewards.argsort())


@pytest.mark.parametrize("p", [0.3, 0.8, 1.0, 2.0])
def test_advantages_have_unit_quasi_norm_whatever_the_rewards_scale_and_offset(p):
    rewards = torch.randn(G)
    A = advantages(rewards, p)
    assert_close(A.abs().pow(p).sum(), torch.tensor(1.0))
    assert_close(advantages(5 * rewards + 3, p), A, rtol=1e-4, atol=1e-6)
    for scale in (1e-30, 1e30):                                               # the naive form: |A|^2 leaves float32
        assert (scale * rewards).pow(2).sum() in (0, torch.inf)
        assert_close(advantages(scale * rewards, p), A)


def test_smaller_p_shrinks_flat_groups_more_than_sparse_ones():
    flat, sparse = torch.tensor([1.0, -1.0] * 6).double(), torch.tensor([1.0] + [0.0] * 11).double()
    shrinks = []
    for p in (2, 1, 0.8, 0.5):
        length_flat, length_sparse = advantages(flat, p).norm(), advantages(sparse, p).norm()
        assert_close(advantages(flat, p).abs(), torch.full((G,), G ** (-1 / p)).double())
        assert_close(length_flat, torch.tensor(G ** (1 / 2 - 1 / p)).double())
        by_hand = (11**2 + 11) ** 0.5 / (11**p + 11) ** (1 / p)               # one stands 11/12 above the mean, eleven 1/12 below
        assert_close(length_sparse, torch.tensor(by_hand).double())
        shrinks.append((length_flat / length_sparse).item())
    assert shrinks[0] == pytest.approx(1)                                     # p = 2 does not tell them apart
    assert shrinks == sorted(shrinks, reverse=True) and shrinks[2] < 0.6      # p = 0.8 does


def test_equal_rewards_give_zero_advantages_even_when_their_mean_rounds():
    rewards = torch.full((12,), 3.7)
    A = rewards - rewards.mean()
    assert (A / A.norm()).abs().max() > 0.2                                   # the naive form blows rounding up to full size
    for equal in (rewards, torch.zeros(12), -rewards, 1e-30 * rewards, rewards.double()):
        assert torch.equal(advantages(equal), torch.zeros_like(equal))
    nearly = torch.tensor([3.7] * 11 + [3.7001])                              # not equal: one stands out, as by hand above
    assert_close(advantages(nearly, 1), torch.tensor([-1 / 22] * 11 + [0.5]), rtol=0.05, atol=0)


# ======================================================================================= the loss: several rewards, Eq. 3

def test_combined_reward_is_the_weighted_mean_of_sample_z_scores():
    rewards, r3 = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0]]), 3**0.5    # sample std: 1 and sqrt(3)
    expected = torch.tensor([-1 - 3 / r3, -3 / r3, 1 + 6 / r3]) / 4           # weights 1/4 and 3/4
    assert_close(combine_rewards(rewards, torch.tensor([1.0, 3.0])), expected)
    assert_close(combine_rewards(rewards, torch.tensor([10.0, 30.0])), expected)                       # weights are normalised
    other_units = rewards * torch.tensor([[100.0], [0.01]]) - 7
    assert_close(combine_rewards(other_units, torch.tensor([1.0, 3.0])), expected, rtol=1e-4, atol=1e-4)


def test_a_reward_that_is_flat_in_a_group_adds_nothing_to_it():
    rewards = torch.stack([torch.arange(12.0), torch.full((12,), 3.7)])
    naive = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    assert naive[1].abs().max() > 0.5                                         # the naive form: rounding, or 0 / 0
    expected = (torch.arange(12.0) - 5.5) / 13**0.5 * 0.75                    # the variance of 0..11 is 13
    assert_close(combine_rewards(rewards, torch.tensor([3.0, 1.0])), expected)
    assert torch.equal(combine_rewards(rewards[1:], torch.tensor([1.0])), torch.zeros(12))


# ================================================================================= the loss: what it refuses and needs

@pytest.mark.parametrize("call, named", [
    (lambda x: perturb_noise(x[0], x, 0), "sigma is 0"),
    (lambda x: perturb_noise(x[0], x, 1.5), "sigma is 1.5"),
    (lambda x: perturb_noise(x[0], x[:, :2], 0.3), r"\(4, 2\)"),
    (lambda x: advantages(x[:, 0], p=0), "p is 0"),
    (lambda x: advantages(x[:, 0], p=2.5), "p is 2.5"),
    (lambda x: advantages(torch.tensor([1.0, math.nan])), "nan"),
    (lambda x: advantages(torch.tensor([1.0, math.inf])), "inf"),
    (lambda x: advantages(x), "one finite number for each"),
    (lambda x: combine_rewards(x, torch.ones(3)), r"\(4, 3\)"),
    (lambda x: combine_rewards(x, torch.tensor([1.0, 1.0, 1.0, -1.0])), r"-1\.0"),
    (lambda x: combine_rewards(x, torch.zeros(4)), "not all 0"),
    (lambda x: log_policy(x, x[0, :2]), r"\(2,\)"),
    (lambda x: log_policy(x, x[0], tau=0), "tau is 0"),
    (lambda x: log_ratio(x, x[0, :1], x[0]), r"\(1,\)"),
    (lambda x: log_ratio(x, x[0, :2], x[0, :2]), r"\(2,\)"),
    (lambda x: clipped_objective(x[:, 0], x[:3, 0], 0.2), r"\(3,\)"),
    (lambda x: schedule(0), "num_steps is 0"),
    (lambda x: schedule(4, shift=-1), "shift -1"),
    (lambda x: rollout(None, x, schedule(4), solver="heun"), "heun"),
    (lambda x: rollout(None, x, schedule(4).flip(0)), r"0\.25"),
])
def test_bad_input_is_refused_with_the_value_in_the_message(call, named):
    with pytest.raises(ValueError, match=named):
        call(torch.randn(4, 3))


@pytest.mark.parametrize("file", ["neighbor_grpo.py", "solvers.py"])
def test_the_loss_and_the_solvers_import_torch_alone(file):
    tree = ast.parse((Path(__file__).parent / file).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in imports] == ["import torch"]


# ======================================================================================================== the solvers

def mixture_velocity(x, t, means, sd):
    """E[eps - x_0 | x_t = x], the exact velocity when the data are Gaussians of width sd around `means`, equally likely."""
    variance = ((1 - t) * sd) ** 2 + t**2
    away = x[..., None, :] - (1 - t) * means                                  # (..., modes, 2)
    mode = torch.softmax(-away.pow(2).sum(-1) / (2 * variance), -1)           # (..., modes) which Gaussian x came from
    return (mode[..., None] * ((t - (1 - t) * sd**2) / variance * away - means)).sum(-2)


def curved(x, t):
    """Any nonlinear velocity that depends on time."""
    return torch.sin(3 * x) + t * x.roll(1, -1) - 0.5


def one_gaussian(x, t):
    return mixture_velocity(x, t, torch.tensor([[1.0, -0.5]]).double(), 0.5)


def one_gaussian_path(x, start, end):
    """Where x gets from start to end, in closed form: its distance to the mean, in standard deviations, stays."""
    def mean_and_sd(t):
        return (1 - t) * torch.tensor([1.0, -0.5]).double(), ((0.5 * (1 - t)) ** 2 + t**2) ** 0.5

    (mean, sd), (mean_end, sd_end) = mean_and_sd(start), mean_and_sd(end)
    return mean_end + sd_end / sd * (x - mean)


def two_gaussians(x, t):
    return mixture_velocity(x, t, torch.tensor([[1.5, 1.0], [-1.0, 0.0]]).double(), 0.4)


def two_gaussians_path(x, start, end, steps=1000):
    """The classical Runge-Kutta method, of order 4: error below 1e-9."""
    ts = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    for t, t_next in zip(ts[:-1], ts[1:]):
        h = t_next - t
        a = two_gaussians(x, t)
        b = two_gaussians(x + h / 2 * a, t + h / 2)
        c = two_gaussians(x + h / 2 * b, t + h / 2)
        d = two_gaussians(x + h * c, t_next)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


FLOWS = [(one_gaussian, one_gaussian_path), (two_gaussians, two_gaussians_path)]


def test_schedule_falls_from_one_to_zero_and_shift_moves_it_towards_the_noise():
    assert schedule(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert_close(schedule(4, shift=3), torch.tensor([1, 0.9, 0.75, 0.5, 0]))  # e.g. 3 * 0.75 / (1 + 2 * 0.75) = 0.9
    for steps in (1, 8, 1000):
        ts = schedule(steps, shift=3)
        assert ts[0] == 1 and ts[-1] == 0 and (ts.diff() < 0).all() and len(ts) == steps + 1


@pytest.mark.parametrize("steps", [8, 25])
def test_schedule_is_diffusers_shift_and_its_dynamic_shift_at_exp_mu(steps):
    even = torch.linspace(1, 1 / steps, steps).tolist()                       # as FluxPipeline asks for them
    static, dynamic = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    static.set_timesteps(sigmas=even)
    dynamic.set_timesteps(sigmas=even, mu=1.15)
    assert_close(schedule(steps, shift=3), static.sigmas)
    assert_close(schedule(steps, shift=math.exp(1.15)), dynamic.sigmas)


def diffusers_rollout(scheduler, velocity, x, ts):
    """The same times in diffusers' words: sigma is our t, and a timestep is 1000 t."""
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
    euler = FlowMatchEulerDiscreteScheduler()
    assert_close(rollout(curved, x1, ts)[0], diffusers_rollout(euler, curved, x1, ts), rtol=0, atol=1e-5)
    dpm = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)         # by default ++(2M), midpoint
    assert_close(rollout(curved, x1, ts, "dpmpp_2m")[0], diffusers_rollout(dpm, curved, x1, ts), rtol=0, atol=1e-5)


def errors(velocity, path, solver, grid, *counts):
    """Root mean square distance from the exact end point, for each number of steps."""
    x, ends = normal(64, 2), grid(1)
    exact = path(x, *ends)
    return [(rollout(velocity, x, grid(n), solver)[0][-1] - exact).pow(2).mean().sqrt().item() for n in counts]


def whole(steps):
    return schedule(steps).double()                                           # from 1 to 0


def inner(steps):
    return torch.linspace(3, -3, steps + 1).double().sigmoid()                # even in lambda, from 0.95 to 0.05


@pytest.mark.parametrize("velocity, path", FLOWS)
def test_dpmpp_2m_is_of_second_order_and_ddim_of_first(velocity, path):
    def order(solver, grid, few, many):                                       # the slope of log error over log steps
        most, least = errors(velocity, path, solver, grid, few, many)
        return math.log(most / least) / math.log(many / few)

    assert 0.9 < order("ddim", inner, 16, 128) < 1.1
    assert 0.9 < order("ddim", whole, 16, 128) < 1.1
    assert 1.7 < order("dpmpp_2m", inner, 16, 128) < 2.3
    assert 1.7 < order("dpmpp_2m", whole, 128, 1024) < 2.3                    # later, as DDIM steps at the ends cost a log factor


@pytest.mark.parametrize("velocity, path", FLOWS)
def test_sixteen_steps_of_dpmpp_2m_are_nearer_than_fifty_of_ddim(velocity, path):
    assert errors(velocity, path, "dpmpp_2m", whole, 16) < errors(velocity, path, "ddim", whole, 50)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_both_solvers_are_exact_on_a_straight_flow(solver, steps):
    x1, x0, ts = normal(G, 3), normal(3), schedule(steps, shift=3).double()
    traj, _ = rollout(lambda x, t: (x - x0) / t, x1, ts, solver)              # one data point: all paths lead straight there
    t = ts[:, None, None]
    assert_close(traj, (1 - t) * x0 + t * x1)


@pytest.mark.parametrize("solver, steps", [("ddim", 25), ("dpmpp_2m", 16), ("dpmpp_2m", 8)])
def test_a_rollout_costs_the_evaluations_of_table_3_and_returns_each_of_them(solver, steps):
    seen = []

    def velocity(x, t):
        seen.append((x, t, curved(x, t)))
        return seen[-1][2]

    ts = schedule(steps, shift=3)
    traj, vels = rollout(velocity, torch.randn(G, 6), ts, solver)
    assert len(seen) == steps                                                 # NFE_old
    assert torch.equal(torch.stack([x for x, _, _ in seen]), traj[:-1])       # each at its own point of the path
    assert torch.equal(torch.stack([t for _, t, _ in seen]), ts[:-1])
    assert torch.equal(torch.stack([v for _, _, v in seen]), vels)


def test_replaying_the_rollouts_velocity_gives_a_first_ratio_of_one_where_the_rollouts_own_latent_does_not():
    ts, x1, j, ks = schedule(8), torch.randn(G, 6), 3, range(8)

    def first_ratio(old):                                                     # (8, G) logs, while the weights have not moved
        anchors = [ddim_step(traj[k], curved(traj[k], ts[k]), ts[k], ts[k + 1])[j] for k in ks]
        return torch.stack([log_ratio(traj[k + 1], anchors[k], old[k]) for k in ks])

    for solver in ("ddim", "dpmpp_2m"):
        traj, vels = rollout(curved, x1, ts, solver)
        replayed = torch.stack([ddim_step(traj[k, j], vels[k, j], ts[k], ts[k + 1]) for k in ks])
        literal = traj[1:, j]                                                 # Algorithm 1's old anchor
        assert torch.equal(first_ratio(replayed), torch.zeros(8, G))
        if solver == "ddim":
            assert torch.equal(replayed, literal)                             # bit for bit: the two old anchors are one
        else:
            assert_close(replayed[[0, 1, 7]], literal[[0, 1, 7]])             # its first two steps and its last are DDIM's,
            assert clip_fraction(first_ratio(literal)[2:7], PUBLISHED_CLIP) > 0.9        # the others clipped before any update


def test_one_call_of_ddim_step_may_hold_many_times():
    x, v = torch.randn(3, 4), torch.randn(3, 4)
    t, t_next = torch.tensor([1.0, 0.75, 0.5]), torch.tensor([0.5, 0.5, 0.0])
    expected = torch.stack([x[0] - 0.5 * v[0], x[1] - 0.25 * v[1], x[2] - 0.5 * v[2]])
    assert_close(ddim_step(x, v, t[:, None], t_next[:, None]), expected)


# ========================================================================================== the method on a toy flow

MODES = torch.tensor([[1.5, 0.0], [-1.5, 0.0]])                               # the data: two Gaussians; the first is wanted


def closeness(x0):
    return -(x0 - MODES[0]).norm(dim=-1)


class Toy(nn.Module):
    """The exact velocity of the two Gaussians, plus a small network that is zero at first: the only thing to learn."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, x, t):
        return mixture_velocity(x, t, MODES, 0.4) + self.net(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))


def train_toy(model, reward, solver="dpmpp_2m", iterations=60, T=8, B=4, K=4, clip_eps=PUBLISHED_CLIP):
    """Algorithm 1, an update per anchor."""
    ts, opt = schedule(T), torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(iterations):
        x1 = perturb_noise(torch.randn(2), torch.randn(G, 2), sigma=0.3)
        with torch.no_grad():
            traj, vels = rollout(model, x1, ts, solver)
        A = advantages(reward(traj[-1]))
        steps = torch.randperm(T - 1)[:K]
        for j in torch.randperm(G)[:B]:
            for k in steps:
                anchor = ddim_step(traj[k, j], model(traj[k, j], ts[k]), ts[k], ts[k + 1])
                anchor_old = ddim_step(traj[k, j], vels[k, j], ts[k], ts[k + 1])
                loss = -clipped_objective(log_ratio(traj[k + 1], anchor, anchor_old), A, clip_eps)
                (loss / K).backward()
            opt.step()
            opt.zero_grad()


@torch.no_grad()
def reward_of_fresh_samples(model, noise):
    return closeness(rollout(model, noise, schedule(16), "dpmpp_2m")[0][-1])  # (512,)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_neighbor_grpo_raises_the_expected_reward_and_lowers_it_when_the_reward_is_turned_round(solver):
    noise = torch.randn(512, 2)
    before = reward_of_fresh_samples(Toy(), noise)
    for sign in (1, -1):
        model = Toy()
        train_toy(model, lambda x0: sign * closeness(x0), solver)
        gain = sign * (reward_of_fresh_samples(model, noise) - before)        # the same 512 noises before and after
        assert gain.mean() > 10 * gain.std() / 512**0.5                       # ten standard errors
        assert gain.mean() > 0.5                                              # of 1.7 that could be gained


def test_the_example_in_the_readme_raises_the_reward():
    readme = (Path(__file__).parent / "README.md").read_text()
    exec(readme.split("## Copy the loss")[1].split("```python\n")[1].split("```")[0], names := {})
    model, noise = Toy(), torch.randn(512, 2)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        names["neighbor_grpo_step"](model, closeness, opt, (2,))
    gain = reward_of_fresh_samples(model, noise) - reward_of_fresh_samples(Toy(), noise)
    assert gain.mean() > 10 * gain.std() / 512**0.5


def test_equal_rewards_leave_the_weights_where_they_were():
    model = Toy()
    nn.init.normal_(model.net[2].weight)
    before = [w.clone() for w in model.parameters()]
    train_toy(model, lambda x0: torch.full((G,), 3.7), iterations=3)
    assert all(torch.equal(w, b) for w, b in zip(model.parameters(), before))


# ============================================================================================ the training loop, on a stub

class Stub:
    """What train.py asks of a model, with a linear velocity: counts how many latents it is asked about, and for what."""

    device, latent_shape = torch.device("cpu"), (4, 3)

    def __init__(self):
        torch.manual_seed(0)
        self.transformer, self.forwards, self.backwards = nn.Linear(3, 3), 0, 0

    def trained(self):
        return list(self.transformer.parameters())

    def encode(self, prompts):
        return dict(vec=torch.zeros(len(prompts), 1))

    def velocity(self, x, t, cond):
        if torch.is_grad_enabled():
            self.backwards += len(x)
        else:
            self.forwards += len(x)
        return self.transformer(x.tanh()) + t * x

    def decode(self, x):
        return x

    def save(self, path):
        path.mkdir()

    def weights(self):
        return torch.cat([w.detach().flatten() for w in self.transformer.parameters()])


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def train_stub(folder, model, scorer=brightness, preset="dpm8", **settings):
    """Algorithm 1 as train.py has it -> the lines of its log."""
    (folder / "prompts.txt").write_text("a\nb\nc\n")
    cfg = train.Config(**{**train.PRESETS[preset], "model": "", "prompts": str(folder / "prompts.txt"), "rewards": "brightness",
                          "out_dir": str(folder / "run"), "overwrite": True, "iterations": 1, "updates_per_iteration": 1, "eval_every": 0, "save_every": 0, "lr": 1e-2, **settings})
    run = train.Run(cfg, model, {})
    train.train(cfg, model, {"brightness": scorer}, run)
    return run.lines()


@pytest.mark.parametrize("preset, nfe_old, nfe_theta", [("ddim25", 25, 4.0), ("dpm16", 16, 3.0), ("dpm8", 8, 4 / 3)])
def test_the_presets_cost_the_evaluations_of_table_3_counted_at_the_velocity(tmp_path, preset, nfe_old, nfe_theta):
    model = Stub()
    line, = train_stub(tmp_path, model, preset=preset, prompts_per_iteration=2)
    assert (model.forwards / (2 * G), model.backwards / (2 * G)) == (nfe_old, nfe_theta)
    assert (line["nfe_old"], line["nfe_theta"]) == (nfe_old, nfe_theta)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("tau", ["1", "dim"])
def test_the_first_ratio_is_one_in_every_iteration_but_for_the_literal_old_anchor_after_dpmpp(tmp_path, solver, tau):
    for line in train_stub(tmp_path, Stub(), solver=solver, tau=tau, iterations=5, updates_per_iteration=2):
        assert line["first_ratio"] < 1e-5                                     # float32 rounding, although the weights move on
        assert line["clip_fraction"] > 0                                      # the second update's ratios do differ
    for line in train_stub(tmp_path, Stub(), solver=solver, tau=tau, iterations=5, old_anchor="rollout"):
        assert (line["first_ratio"] < 1e-5) == (solver == "ddim")


class Listening(Stub):
    """Keeps what the rollout went through, {t: (P G, N, C)}, its pictures, and dloss/dv of the trained steps, [(t, (P b, N, C))]."""

    def __init__(self):
        super().__init__()
        self.states, self.gradients = {}, []

    def velocity(self, x, t, cond):
        v = super().velocity(x, t, cond)
        if v.requires_grad:
            v.register_hook(lambda gradient: self.gradients.append((float(t), gradient)))
        else:
            self.states[float(t)] = x
        return v

    def decode(self, x):
        self.pictures = x
        return x


def test_every_anchor_is_pulled_by_the_candidates_and_rewards_of_its_own_group_alone(tmp_path):
    model, P, b, K = Listening(), 2, 2, 4
    train_stub(tmp_path, model, prompts_per_iteration=P, updates_per_iteration=2, p=2.0)
    r = model.pictures.flatten(1).mean(1).unflatten(0, (P, G))                                        # brightness
    A = (r - r.mean(1, keepdim=True)) / (r - r.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
    ts, trained = sorted(model.states, reverse=True), model.gradients[:K]                             # of the first update: theta is theta_old
    assert len(model.gradients) == 2 * K and not torch.equal(A[0], A[1])
    for t, gradient in trained:
        t_next = ts[ts.index(t) + 1]
        pull = 2 / 12 * torch.einsum("pg,pgnc->pnc", A, model.states[t_next].unflatten(0, (P, G)))    # (2 / tau) sum_i A_i x_i, tau = D = 12
        expected = -(t_next - t) * pull / (P * b * K)                                                 # loss = -J, a mean over what an update trains
        torch.testing.assert_close(gradient.unflatten(0, (P, b)), expected[:, None].expand(P, b, 4, 3), atol=1e-6, rtol=1e-4)


def test_training_raises_the_reward_of_one_and_the_same_noise(tmp_path):
    def rewards_of_twenty_groups(model):
        return torch.tensor([line["reward"] for line in train_stub(tmp_path, model, iterations=20, lr=1e-12)])

    model, untouched = Stub(), Stub()
    train_stub(tmp_path, model, iterations=60, seed=1)
    gain = rewards_of_twenty_groups(model) - rewards_of_twenty_groups(untouched)
    assert gain.mean() > 10 * gain.std() / 20**0.5


def test_a_reward_that_is_not_finite_skips_the_whole_step_and_is_counted_and_the_next_one_counts_again(tmp_path):
    def broken(images, prompts):
        return torch.where(torch.tensor([prompt == "a" for prompt in prompts]), torch.nan, brightness(images, prompts))

    model, untouched = Stub(), Stub()
    line, = train_stub(tmp_path, model, broken, prompts_per_iteration=3)      # three prompts, one of them "a"
    assert line["skipped"] == 1 and line["flat_groups"] == 0 and math.isfinite(line["reward"]) and line["grad_norm"] is None
    assert torch.equal(model.weights(), untouched.weights())
    lines = train_stub(tmp_path, model, broken, iterations=3)                 # each of the three alone, once
    assert sorted(line["skipped"] for line in lines) == [0, 0, 1]
    assert model.weights().isfinite().all() and not torch.equal(model.weights(), untouched.weights())


class Exploding(Stub):
    def velocity(self, x, t, cond):
        return super().velocity(x, t, cond) * (math.inf if torch.is_grad_enabled() else 1)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    model, untouched = Exploding(), Stub()
    lines = train_stub(tmp_path, model, iterations=2)
    assert [line["skipped"] for line in lines] == [1, 1]
    assert torch.equal(model.weights(), untouched.weights())


def test_so_many_updates_in_a_row_without_a_finite_gradient_end_the_run(tmp_path):
    with pytest.raises(ArithmeticError, match="iteration 3: 5 updates in a row had no finite gradient; .*no checkpoint was written before"):
        train_stub(tmp_path, Exploding(), iterations=4, updates_per_iteration=2, max_skips=5)


def test_groups_of_equal_rewards_are_counted_and_move_nothing_even_by_momentum(tmp_path):
    seen = []

    def flat_after_the_first(images, prompts):
        seen.append(1)
        return brightness(images, prompts) if len(seen) == 1 else torch.full((len(images),), 3.7)

    once, thrice = Stub(), Stub()
    train_stub(tmp_path, once)
    lines = train_stub(tmp_path, thrice, flat_after_the_first, iterations=3)
    assert [line["flat_groups"] for line in lines] == [0, 1, 1]
    assert torch.equal(once.weights(), thrice.weights())


def test_every_prompt_comes_once_before_any_comes_twice_and_a_draw_depends_on_its_iteration_alone():
    cfg, prompts = train.Config(prompts_per_iteration=2), [str(i) for i in range(7)]
    drawn = [train.draw(cfg, it, prompts, (4, 3)) for it in range(7)]
    order = [prompt for prompt, *_ in drawn for prompt in prompt]
    assert sorted(order[:7]) == sorted(order[7:]) == prompts and order[:7] != order[7:]
    again = train.draw(cfg, 5, prompts, (4, 3))
    assert again[0] == drawn[5][0] and again[4] == drawn[5][4] and all(torch.equal(a, b) for a, b in zip(again[1:4], drawn[5][1:4]))
    _, eps_star, delta, anchors, steps = drawn[0]
    assert not torch.equal(eps_star[0], eps_star[1]) and not torch.equal(delta[0], delta[1])          # each group its own
    assert all(len(set(row.tolist())) == 4 and row.max() < G for row in anchors)                      # B different ones of the G
    assert {k for *_, steps in (train.draw(cfg, it, prompts, (4, 3)) for it in range(50)) for k in steps} == set(range(7))   # never the last of 8


# ================================================================================================ FLUX, as shipped in tiny/

TINY = Path(__file__).parent / "tiny"
PROMPTS = ["a red apple, 3d style", "an octopus, noto style"]


@pytest.fixture(scope="module")
def flux():
    return Flux(TINY / "flux", 64)


def test_packing_is_undone_by_unpacking(flux):
    latents = torch.randn(3, 16, 8, 8)
    assert torch.equal(flux.unpack(FluxPipeline._pack_latents(latents, 3, 16, 8, 8)), latents)


@torch.no_grad()
def test_a_ddim_rollout_gives_the_latents_and_pictures_of_diffusers_own_pipeline(flux):
    noise, cond = torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS)
    traj, _ = rollout(lambda x, t: flux.velocity(x, t, cond), noise, schedule(6))
    call = dict(height=64, width=64, num_inference_steps=6, guidance_scale=3.5, max_sequence_length=16, latents=noise)
    assert_close(traj[-1], flux.pipe(PROMPTS, output_type="latent", **call).images, rtol=0, atol=1e-5)
    assert_close(flux.decode(traj[-1]), flux.pipe(PROMPTS, output_type="pt", **call).images, rtol=0, atol=1e-5)


@torch.no_grad()
def test_each_prompt_owns_its_rows_of_a_batch_and_each_row_its_time(flux):
    x, t = torch.randn(6, *flux.latent_shape), torch.rand(6)
    together = flux.velocity(x, t, flux.encode(PROMPTS))
    for row in range(6):
        alone = flux.velocity(x[row : row + 1], t[row], flux.encode([PROMPTS[row // 3]]))
        assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    assert (together - flux.velocity(x, t, flux.encode(PROMPTS[::-1]))).abs().max() > 0.01


@pytest.mark.parametrize("blocks, recomputed", [(-1, 6), (2, 2), (100, 6)])
def test_checkpointing_changes_memory_and_not_gradients_and_recomputes_as_many_blocks_as_are_asked_for(flux, blocks, recomputed):
    x, cond = torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS)

    def gradients(model):
        model.transformer.zero_grad()
        model.velocity(x, 0.5, cond).pow(2).mean().backward()
        return [w.grad for w in model.transformer.parameters() if w.grad is not None]

    checkpointed, calls = Flux(TINY / "flux", 64, checkpoint_blocks=blocks), []
    for block in checkpointed.blocks():
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for a, b in zip(gradients(flux), gradients(checkpointed), strict=True):
        assert_close(a, b, rtol=0, atol=1e-7)
    assert len(calls) == len(checkpointed.blocks()) + recomputed


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_compiled_blocks_give_the_same_velocity_and_gradients_and_blocks_of_a_kind_share_their_graphs(flux, monkeypatch, lora_rank):
    graphs, found, x = [], [], torch.randn(2, *flux.latent_shape)
    def counted(graph, inputs):
        graphs.append(graph)
        return graph
    torch.compiler.reset()                                      # of what the last case compiled
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counted))
    for compiled in (False, True):
        torch.manual_seed(0)                                    # of the adapters
        model = Flux(TINY / "flux", 64, compiled=compiled, lora_rank=lora_rank)
        cond = model.encode(PROMPTS)
        with torch.no_grad():
            rolled = model.velocity(x, 0.5, cond)
        v = model.velocity(x, 0.5, cond)
        v.pow(2).mean().backward()
        found.append([rolled, v.detach(), *(w.grad for w in model.trained() if w.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)
    assert 4 <= len(graphs) <= 7                                # two kinds, with and without gradients; the first of a kind may get its input in another form. Six blocks on their own would be twelve


def test_what_is_saved_is_a_pipeline_with_the_same_velocity(flux, tmp_path):
    with torch.no_grad():
        for w in (changed := Flux(TINY / "flux", 64)).transformer.parameters():
            w.mul_(1.1)
        changed.save(tmp_path)
        loaded, x, cond = Flux(tmp_path, 64), torch.randn(2, *flux.latent_shape), flux.encode(PROMPTS)
        assert torch.equal(loaded.velocity(x, 0.5, cond), changed.velocity(x, 0.5, cond))
        assert not torch.equal(loaded.velocity(x, 0.5, cond), flux.velocity(x, 0.5, cond))


# ================================================================================================== the command line

@pytest.mark.parametrize("settings, sentence", [
    ("--preset dpm9", "dpm9"),
    ("--sigma 0", "sigma is 0, but must lie in (0, 1]"),
    ("--sigma 1.5", "sigma is 1.5, but must lie in (0, 1]"),
    ("--p 0", "p is 0, but must lie in (0, 2]"),
    ("--tau warm", "tau is warm, but must be a number above 0, or dim"),
    ("--num_anchors 13", "num_anchors (B) is 13, but must lie between 1 and group_size (G), 12"),
    ("--num_train_steps 8", "num_train_steps (K) is 8, but must lie between 1 and T-1, 7"),
    ("--updates_per_iteration 3", "updates_per_iteration is 3, but must divide num_anchors (B), 4"),
    ("--prompts nowhere.txt", "nowhere.txt is no prompt file"),
    ("--prompts {empty}", "holds no prompt"),
    ("--model {folder}", "is no FluxPipeline directory"),
    ("--model tiny/nothing", "is no FluxPipeline directory"),
    ("--rewards beauty", "there is no scorer 'beauty'; there are hpsv2, pickscore, imagereward"),
    ("--rewards clip={folder}", "needs a folder with model.safetensors"),
    ("--rewards clip,jpeg --reward_weights 1", "must be one number >= 0, not all 0, for each of clip,jpeg"),
    ("--out_dir {used}", "already holds a run; use --resume, --overwrite or another --out_dir"),
    ("--out_dir {used} --resume", "there is no checkpoint"),
    ("--preset dpm8", "prompts is empty; name a text file with one prompt a line, or hpdv2_train"),
    ("--prompts hpdv2_train", "get it by: hf download"),
    ("--device tpu", "device is tpu, but must be cpu, or cuda where there is one"),
    ("--sigma nan", "sigma is nan, but must lie in (0, 1]"),
    ("--lr inf", "lr is inf, but must lie in (0, 1]"),
    ("--guidance nan", "guidance is nan, but must lie in (-inf, inf)"),
    ("--group_size 1", "group_size is 1, but must lie in [2, inf)"),
    ("--solver heun", "solver is heun, but must be ddim or dpmpp_2m"),
    ("--text_encoder_device moon", "text_encoder_device is moon, but must be empty or cpu or offload"),
    ("--fsdp", "fsdp divides a model among processes, and there is one"),
    ("--wandb project", "wandb is not installed"),
    ("--seed -1", "seed is -1, but must lie in [0, 1e18]"),
    ("--rewards ,", "rewards is empty"),
    ("--rewards clip --eval_scorers clip=tiny/judge", "scorer 'clip' is named twice"),
    ("--rewards jpeg={folder}", "nothing may follow its name"),
    ("--prompts {latin}", "is no prompt file; it must be a UTF-8 text file"),
    ("--out_dir {full}", "cannot be made a directory"),
    ("--group_size many", "invalid int value: 'many'"),
    ("--sig 0.3", "unrecognized arguments"),
])
def test_bad_settings_get_one_sentence_and_exit_code_2_before_anything_is_loaded(settings, sentence, tmp_path, capsys, monkeypatch):
    (tmp_path / "used").mkdir()
    for name, text in (("empty", "\n"), ("full", "a\n"), ("used/log.jsonl", "")):
        (tmp_path / name).write_text(text)
    (tmp_path / "latin").write_bytes("é\n".encode("latin-1"))
    names = dict(latin=tmp_path / "latin", empty=tmp_path / "empty", full=tmp_path / "full", used=tmp_path / "used", folder=tmp_path)
    monkeypatch.setattr(train, "Flux", lambda *a: pytest.fail("a model was loaded"))
    monkeypatch.setattr(rewards, "load", lambda *a: pytest.fail("a scorer was loaded"))
    with pytest.raises(SystemExit) as exit:
        train.main(f"--out_dir {tmp_path / 'new'} {settings}".format(**names).split())
    assert exit.value.code == 2 and not (tmp_path / "new").exists()
    assert sentence in capsys.readouterr().err


SHORT = "--prompts_per_iteration 1 --group_size 4 --num_anchors 2 --num_rollout_steps 3 --num_train_steps 1 --eval_every 2 --save_every 2 --threads 1".split()


@pytest.fixture(scope="module")
def eight_prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "eight.txt"
    path.write_text("".join((TINY / "prompts/test_concept.txt").read_text().splitlines(True)[:8]))
    return ["--eval_prompts", str(path)]


def log_of(folder):
    """log.jsonl without the seconds, which are the only numbers that may differ."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def test_two_runs_of_one_seed_are_bit_equal_and_so_is_one_that_was_interrupted_and_resumed(tmp_path, eight_prompts, monkeypatch):
    once, twice, broken = ([*SHORT, *eight_prompts, "--iterations", "5", "--out_dir", str(tmp_path / name)] for name in ("once", "twice", "broken"))
    train.main(once)
    train.main(twice)
    assert log_of(tmp_path / "once") == log_of(tmp_path / "twice")

    score, groups = rewards.Clip.score, []

    def pressed(self, pixels, prompts):                                       # Ctrl-C while the third iteration is being scored
        if self.name == "clip" and len(pixels) == 4 and len(set(prompts)) == 1:         # not an evaluation
            groups.append(prompts)
            if len(groups) == 3:
                signal.raise_signal(signal.SIGINT)
        return score(self, pixels, prompts)

    monkeypatch.setattr(rewards.Clip, "score", pressed)
    train.main(broken)
    assert {path.name for path in (tmp_path / "broken").iterdir()} >= {"checkpoint-2", "checkpoint-3", "before_after.png", "curve.png", "log.jsonl"}
    monkeypatch.setattr(rewards.Clip, "score", score)
    train.main([*broken, "--resume"])
    whole, mended = ([line for line in log_of(tmp_path / name) if "reward" in line] for name in ("once", "broken"))
    assert [line["iter"] for line in whole] == [1, 2, 3, 4, 5] and mended == whole
    assert log_of(tmp_path / "broken")[-1] == log_of(tmp_path / "once")[-1]   # the last evaluation
    a, b = (FluxPipeline.from_pretrained(tmp_path / name / "checkpoint-5").transformer.state_dict() for name in ("once", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_is_resumed_with_its_own_settings_or_not_at_all(tmp_path, eight_prompts, capsys):
    train.main([*SHORT, *eight_prompts, "--iterations", "2", "--out_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        train.main([*SHORT, *eight_prompts, "--iterations", "3", "--out_dir", str(tmp_path), "--resume", "--lr", "1e-3"])
    assert exit.value.code == 2 and "lr is 0.001, but was 5e-05 in the run to resume" in capsys.readouterr().err
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"iter": 3, "rew')                                         # as a kill or a full disk leaves it
    assert train.main([*SHORT, *eight_prompts, "--iterations", "3", "--out_dir", str(tmp_path), "--resume"]) is None
    assert [line["iter"] for line in log_of(tmp_path) if "reward" in line] == [1, 2, 3]


def test_overwriting_a_run_leaves_what_others_put_beside_it(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-1" / "state").mkdir(parents=True)
    for name in ("thesis.txt", "log.jsonl", "checkpoint-1/state/state.pt"):
        (run / name).write_text("{}\n")
    assert len(train_stub(tmp_path, Stub())) == 1                             # the new run's one line
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "launch.json", "log.jsonl", "neighbor_grpo.py", "samples", "thesis.txt"]


def test_a_run_that_diverges_ends_with_a_sentence_and_saves_no_broken_weights(tmp_path, eight_prompts, capsys, monkeypatch):
    monkeypatch.setattr(train, "check", lambda cfg: None)                     # which refuses lr above 1
    assert train.main([*SHORT, *eight_prompts, "--iterations", "3", "--lr", "1e30", "--out_dir", str(tmp_path / "run")]) == 1
    assert "no longer finite" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
