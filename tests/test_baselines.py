"""
paper/baselines.py against closed forms, torch.distributions and flows whose distribution is known.
One test per sentence.

    python -m pytest -q tests/test_baselines.py
"""
import dataclasses, json, os, subprocess, sys
import pytest
import torch
from torch.distributions import (
    Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal)
from torch.testing import assert_close
import train
from neighbor_grpo import clipped_objective, log_ratio, perturb_noise
from paper import baselines
from paper.baselines import (
    METHODS, Config, awm_log_prob, awm_steps, churn, dance_level, end_point_direction,
    fdfo_log_ratio, flow_level, half_difference, log_prob, nft_loss, pair_advantages, sde_mean,
    sde_rollout, sde_std, spo_objective, tree_advantages, tree_widths)
from run import HERE, Run
from solvers import ddim_step, rollout, schedule

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
LEVELS = dict(dance=dance_level, flow=flow_level)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ============================================================================ the SDE

MEANS = torch.tensor([[2.0, 0], [-1, 1.5], [0, -2]])
VARIANCES = torch.tensor([[0.1, 0.3], [0.2, 0.05], [0.4, 0.1]])
SHARES = torch.tensor([0.5, 0.3, 0.2])


def mixture_velocity(x, t):
    """The exact velocity of the flow from N(0, I) at t = 1 to a mixture of three Gaussians:
    E[eps - x_0 | x_t], averaged over the components."""
    mean, var = (1 - t) * MEANS, (1 - t) ** 2 * VARIANCES + t**2
    log_weight = SHARES.log() + Independent(Normal(mean, var.sqrt()), 1).log_prob(x[:, None])
    deviation = (x[:, None] - mean) / var                               # (M, 3, 2)
    eps, x0 = t * deviation, MEANS + (1 - t) * VARIANCES * deviation    # expectations
    return (log_weight.softmax(1)[:, :, None] * (eps - x0)).sum(1)


def samples_of_the_mixture(t, M):
    components = MultivariateNormal((1 - t) * MEANS,
                                    torch.diag_embed((1 - t) ** 2 * VARIANCES + t**2))
    return MixtureSameFamily(Categorical(SHARES), components).sample((M,))


@pytest.mark.parametrize("level", [dance_level, pytest.param(flow_level, marks=pytest.mark.slow)])
def test_the_sde_keeps_the_marginals_of_a_mixture_as_the_ode_does_but_not_without_its_drift(level):
    M, T = 20_000, 250
    ts, x1, noise = schedule(T), torch.randn(M, 2), torch.randn(T, M, 2)
    levels = level(ts, 0.7)
    levels[-1] = 0
    sde, _ = sde_rollout(mixture_velocity, x1, ts, levels, noise)
    ode, _ = rollout(mixture_velocity, x1, ts)
    for k in (T // 2, T):                                       # half way, and at the image
        exact = samples_of_the_mixture(ts[k], 400_000)
        for traj in (sde, ode):
            assert_close(traj[k].mean(0), exact.mean(0), atol=0.04, rtol=0)
            assert_close(traj[k].T.cov(), exact.T.cov(), atol=0.08, rtol=0)
    assert (sde[-1] - ode[-1]).norm(dim=1).mean() > 0.2         # other images of the same noise
    x = x1                          # the naive form: noise without the drift that makes room for it
    for k, eps in enumerate(noise):
        x = ddim_step(x, mixture_velocity(x, ts[k]), ts[k], ts[k + 1])
        x = x + sde_std(ts[k], ts[k + 1], levels[k]) * eps
    assert (x.T.cov() - exact.T.cov()).abs().max() > 0.16


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_a_step_of_the_sde_has_the_mean_in_flow_grpos_paper(level):
    x, v, ts = normal(6, 5), normal(6, 5), schedule(7, 3.0).double()
    for t, t_next, a in zip(ts[:-1], ts[1:], level(ts, 0.6)):
        dt = t - t_next     # arXiv 2505.05470, Eq. 9: drift v + sigma_t^2 / (2 t) (x + (1 - t) v)
        theirs = x * (1 - a**2 * dt / (2 * t)) - v * dt * (1 + a**2 * (1 - t) / (2 * t))
        assert_close(sde_mean(x, v, t, t_next, a), theirs)


def test_the_noise_level_of_dancegrpo_is_constant_and_flow_grpos_is_eta_root_t_over_one_minus_t():
    ts = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    assert_close(dance_level(ts, 0.3), torch.tensor([0.3, 0.3, 0.3, 0.3]))
    by_hand = torch.tensor([5.0, 4.0, 1.0, 0.25])               # at t = 1: 1 / (1 - 0.8)
    assert_close(flow_level(ts, 0.7), 0.7 * by_hand.sqrt())


def test_log_prob_is_the_mean_over_dimensions_of_the_normal_log_density():
    x, mean, std = normal(4, 6, 3), normal(4, 6, 3), normal(4, 1, 1).abs()
    assert_close(log_prob(x, mean, std), Normal(mean, std).log_prob(x).flatten(1).mean(1))


def test_section_3_2_the_sde_policy_gradient_is_advantage_weighted_contrastive_regression():
    x, v_old, eps = normal(12, 5), normal(12, 5), normal(12, 5)
    t, t_next = torch.tensor(0.7).double(), torch.tensor(0.6).double()
    std = sde_std(t, t_next, 0.8)
    x_next = sde_mean(x, v_old, t, t_next, 0.8) + std * eps
    A, v = normal(12), v_old.clone().requires_grad_()
    log_rho = (log_prob(x_next, sde_mean(x, v, t, t_next, 0.8), std)
               - log_prob(x_next, sde_mean(x, v_old, t, t_next, 0.8), std))
    policy, = torch.autograd.grad(clipped_objective(log_rho, A, 1e-4), v)       # Eq. 4, theta_old
    # The perturbed step of the ODE is the target: pulled closer if A > 0, pushed away if A < 0.
    target = ddim_step(x, v_old, t, t_next) + std * eps
    distance = (target - ddim_step(x, v, t, t_next)).pow(2) / (2 * std**2)
    regression, = torch.autograd.grad((-A[:, None] * distance).mean(1).sum(), v)
    drift = 1 + 0.8**2 * (1 - t) / (2 * t)      # due to the residual: longer, same direction
    assert_close(policy, drift * regression, atol=1e-14, rtol=1e-12)


def exact(x, t):
    return x.tanh() + t


def test_sde_steps_end_at_their_mean_plus_noise_and_steps_before_and_between_them_are_eulers():
    x, ts, noise = torch.randn(3, 4), schedule(6, 3.0), torch.randn(2, 3, 4)
    levels = torch.tensor([0, 0, 0.5, 0, 0.7, 0])
    traj, vels = sde_rollout(exact, x, ts, levels, noise, "dpmpp_2m")
    for k in range(5):
        landed = ddim_step(traj[k], vels[k], ts[k], ts[k + 1])
        if k in (2, 4):
            landed = sde_mean(traj[k], vels[k], ts[k], ts[k + 1], levels[k])
            landed = landed + sde_std(ts[k], ts[k + 1], levels[k]) * noise[k // 4]
        assert_close(traj[k + 1], landed)


def test_flow_grpos_advantages_use_the_mean_of_the_group_and_the_spread_of_all_rewards():
    r = torch.tensor([[1.0, 2, 6], [5, 5, 5], [0, 40, 80]])
    centred = torch.tensor([[-2.0, -1, 3], [0, 0, 0], [-40, 0, 40]])
    everywhere = torch.cat([r, r * 2])                          # with those of another process
    for known, std in ((None, r.numpy().std()), (everywhere, everywhere.numpy().std())):
        assert_close(baselines.global_advantages(r, known), centred / (std + 1e-4))
    assert baselines.global_advantages(torch.tensor([[0.0] * 59 + [1]])).max() == 5


@pytest.mark.parametrize("global_std", [False, True])
def test_rewards_are_standardised_one_by_one_or_with_global_std_after_a_weighted_sum(
        global_std):
    a, b = torch.tensor([[1.0, 2, 6], [0, 3, 9]]), torch.tensor([[3.0, 1, 2], [7, 7, 1]])
    cfg = Config(method="flow" if global_std else "dance", global_std=global_std)
    A = baselines.standardised(cfg, dict(a=a, b=b), ["x", "y"], torch.tensor([1.0, 3.0]))
    deviation = lambda r: r - r.mean(1, keepdim=True)
    if global_std:
        total = a + 3 * b
        assert_close(A, deviation(total) / (total.std(correction=0) + 1e-4))
    else:
        z = lambda r: deviation(r) / r.std(1, keepdim=True)
        assert_close(A, (z(a) + 3 * z(b)) / 4)


# ============================================================================ MixGRPO

@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_with_an_empty_window_the_sde_is_the_ode(solver):
    x, ts = torch.randn(3, 4), schedule(8, 3.0)
    sde = sde_rollout(exact, x, ts, torch.zeros(8), [], solver)
    for a, b in zip(sde, rollout(exact, x, ts, solver)):
        assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_mixgrpo_has_noise_only_in_its_window():
    cfg = Config(method="mix", shift=3.0, **METHODS["mix"])
    # at iteration 60 the window has moved twice, at 25 and 50
    _, start, end, levels = baselines.sde_times(cfg, schedule(25, 3.0), it=60)
    assert (start, end) == (2, 6) and levels.nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_mixgrpos_window_never_has_the_last_two_steps_shrinks_to_nothing_and_begins_again():
    """The loop of their grpo_states.py, written out, with max_timesteps = T - 2: 24 places."""
    theirs, start, count = [], 0, 0
    for _ in range(25 * 26):
        theirs.append(list(range(start, min(start + 4, 23))))
        count += 1
        if count == 25:
            start, count = start + 1, 0
        if start > 23:
            start = 0
    ours = [list(range(*baselines.window_at(it, 25, 4, 25))) for it in range(25 * 26)]
    assert ours == theirs
    assert ours[24] == [0, 1, 2, 3] and ours[25] == [1, 2, 3, 4] and ours[25 * 24] == ours[0]
    assert [len(steps) for steps in ours[25 * 19 : 25 * 24 : 25]] == [4, 3, 2, 1, 0]
    assert baselines.window_at(10_000, 25, 4, 0) == (0, 4)      # that of Flash* does not move


def test_flashs_steps_after_the_window_are_even_in_unshifted_time():
    ts = baselines.flash_schedule(25, 3.0, 4, 0.2)
    assert_close(ts[:5], schedule(25, 3.0)[:5])
    u = ts / (3 - 2 * ts)                                       # the shift undone
    assert_close(u[4:], torch.linspace(21 / 25, 0, 5))
    steps = [len(baselines.flash_schedule(25, 3.0, 4 + it // 20, 0.4)) - 1 for it in range(300)]
    assert steps[0] == 12 and round(sum(steps) / 300) == 16     # the published average of Flash


def test_flashs_first_step_after_the_window_uses_the_x_0_of_the_windows_last_step():
    c, ts = torch.randn(3, 4), schedule(8)                      # the data is one point: x_0 = c
    to_c = lambda x, t: (x - c) / t
    levels = torch.tensor([0.5, 0.5, 0.5, 0, 0, 0, 0, 0])
    traj, _ = sde_rollout(to_c, torch.randn(3, 4), ts, levels, torch.randn(3, 3, 4), "dpmpp_2m")
    for k in range(3, 8):
        assert_close(traj[k + 1], c + ts[k + 1] / ts[k] * (traj[k] - c))
    assert_close(traj[-1], c)


# ============================================================================ BranchGRPO

def test_branchgrpos_tree_shares_its_first_steps_and_costs_what_is_published():
    widths = tree_widths(20, [0, 3, 6, 9])
    assert widths == [1, 2, 2, 2, 4, 4, 4, 8, 8, 8] + 11 * [16]
    assert round(sum(widths) / 16, 2) == 13.69  # 13.68 published, root and leaves counted too
    pruned = Config(**{**METHODS["branch"], "method": "branch", "prune": 5})
    assert {baselines.nfe(pruned, it)[1] for it in (0, 30, 150)} == {8.625}
    assert baselines.nfe(pruned, 299)[1] == 9.125       # the last split's depth has half the nodes


def test_pruning_skips_the_last_five_depths_at_first_and_then_earlier_ones_up_to_the_last_split():
    pruned = Config(**{**METHODS["branch"], "method": "branch", "prune": 5})
    for it, first in ((0, 15), (28, 15), (29, 14), (148, 11), (149, 10), (179, 9), (300, 9)):
        _, edges = baselines.tree(pruned, it)
        trained = set(range(1, 21)) - set(range(first, first + 5))
        assert {step + 1 for step, _, _ in edges} == trained


def test_a_nodes_advantage_is_the_mean_of_its_leaves_standardised_over_its_depth():
    r = torch.tensor([[1.0, 3, 0, 4, 10, 10, 2, 6]])
    fused = torch.tensor([[2.0, 2, 10, 4]])
    assert_close(tree_advantages(r, 4), (fused - 4.5) / fused.std())
    assert_close(tree_advantages(r, 8), (r - 4.5) / r.std())
    assert not tree_advantages(r, 1).any()
    assert not tree_advantages(torch.full((1, 8), 0.3), 4).any()


# ============================================================================ DiffusionNFT

def an_nft_point(M=6):
    x0, eps, t, v_old = normal(M, 5), normal(M, 5), torch.rand(M, 1).double(), normal(M, 5)
    return (1 - t) * x0 + t * eps, t, x0, eps - x0, v_old


def test_nft_moves_nothing_at_advantage_zero_and_opposite_ways_at_opposite_advantages():
    x_t, t, x0, _, v_old = an_nft_point()
    v = v_old.clone().requires_grad_()

    def slope(advantage):
        A = torch.full((6,), advantage).double()
        return torch.autograd.grad(nft_loss(x_t, t, x0, v, v_old, A, beta=0.7).sum(), v)[0]

    assert slope(0.0).abs().max() < 1e-12
    assert_close(slope(2.0), -slope(-2.0))
    assert slope(2.0).abs().min() > 0


def test_nft_at_full_advantage_is_flow_matching_on_the_rollouts_images():
    x_t, t, x0, target, v_old = an_nft_point()
    A, v = torch.full((6,), 5.0).double(), normal(6, 5)
    at_its_minimum = nft_loss(x_t, t, x0, target, v_old, A)     # with beta 1: v = eps - x_0
    assert at_its_minimum.abs().max() < 1e-12
    error = t * (v - target)
    by_hand = 5 * error.pow(2).mean(1) / error.abs().mean(1)
    assert_close(nft_loss(x_t, t, x0, v, v_old, A), by_hand)


def test_nfts_old_policy_follows_the_trained_one_more_and_more_slowly_until_half_of_it_stays():
    assert [baselines.nft_decay(step) for step in (1, 100, 500, 9000)] == [0.001, 0.1, 0.5, 0.5]


# ============================================================================ AWM

@pytest.mark.parametrize("power", [1.0, 0.25])
def test_awms_log_probability_falls_with_a_power_of_the_flow_matching_error(power):
    x_t, t, x0, target, _ = an_nft_point()
    v, noise, t = normal(6, 5), target + x0, t.flatten()
    error = (v - target).pow(2).mean(1)
    offset = 1e-10**power                       # so that the largest value is 0
    assert_close(awm_log_prob(v, x0, noise, t, power), -t * (error**power - offset) / power,
                 rtol=1e-6, atol=1e-9)
    at_its_maximum = awm_log_prob(target, x0, noise, t, power)          # v = eps - x_0
    assert at_its_maximum.abs().max() < 1e-9


def test_awms_gradient_on_policy_is_flow_matching_weighted_by_the_advantage():
    """The gradient of -A rho at rho = 1 is A times that of the flow-matching error, times
    t e^(power - 1)."""
    _, t, x0, target, v_old = an_nft_point()
    t, A, v = t.flatten(), normal(6), v_old.clone().requires_grad_()
    log_pi = awm_log_prob(v, x0, target + x0, t)
    J = clipped_objective(log_pi - log_pi.detach(), A, 1.0)
    found, = torch.autograd.grad(-J, v)
    error = (v - target).pow(2).mean(1)
    matching, = torch.autograd.grad(error.sum(), v)
    by_hand = (A * t * error**-0.75)[:, None] * matching
    assert_close(found, by_hand.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("T, K, parts", [(14, 6, [{2 * k, 2 * k + 1} for k in range(6)]),
                                         (8, 4, [{0}, {1, 2}, {3, 4}, {5, 6}])])
def test_awm_trains_one_time_of_each_equal_part_of_the_first_nine_tenths_of_the_steps(T, K, parts):
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([awm_steps(T, K, rng) for _ in range(200)])
    assert [set(column.tolist()) for column in drawn.T] == parts


# ============================================================================ FDFO

def test_fdfos_perturbation_is_equation_7_so_churned_noise_stays_standard_normal():
    x, noise, c = torch.randn(20_000, 3), torch.randn(20_000, 3), 0.4
    churned, t = churn(x, torch.ones(()), noise, c)
    sigma = (1 - 1 / (1 + c) ** 2) ** 0.5
    assert_close(churned, perturb_noise(x, noise[:, None], sigma)[:, 0])
    assert t == 1
    assert_close(churned.T.cov(), torch.eye(3), atol=0.04, rtol=0)
    assert_close((churned * x).mean(0), torch.full((3,), 1 / (1 + c)), atol=0.04, rtol=0)


def test_a_churned_state_is_a_state_of_the_flow_at_the_time_that_churn_returns():
    zero, one = torch.zeros(()).double(), torch.ones(()).double()
    for t in torch.linspace(0.05, 0.95, 7).double():
        image, later = churn(1 - t, t, zero, 0.3)               # the factor of x_0
        kept, fresh = churn(t, t, zero, 0.3)[0], churn(zero, t, one, 0.3)[0]
        assert_close(image, 1 - later)
        assert_close(kept**2 + fresh**2, later**2)              # the variance of the noise
        assert_close(later / (1 - later), 1.3 * t / (1 - t))


def test_with_churn_eulers_steps_still_keep_a_gaussians_distribution():
    M, T, var = 40_000, 100, 0.3
    velocity = lambda x, t: (t - (1 - t) * var) / ((1 - t) ** 2 * var + t**2) * x       # exact
    noise = torch.randn(T, M, 1)
    x0, states, ts, vels = baselines.churned_rollout(velocity, torch.randn(M, 1), schedule(T), 0.02,
                                                     noise)
    assert x0.var().item() == pytest.approx(var, abs=0.012)
    for k in (T // 4, T // 2):
        expected = (1 - ts[k]) ** 2 * var + ts[k] ** 2
        assert states[k].var().item() == pytest.approx(expected.item(), abs=0.02)
        assert_close(vels[k], velocity(states[k], ts[k]))
    plain = rollout(velocity, states[0], schedule(T))[0][-1]
    assert (x0 - plain).abs().mean() > 0.1                      # other images of the same noise


def a_pair(D=6):
    """The rewards, end points and velocities of a pair."""
    return normal(2), normal(2, D), normal(2, D)


def slope(objective, v_old, x0, r, eps=0.03):
    """The gradient of FDFO's objective at v = v_old, (2, D)."""
    v = v_old.clone().requires_grad_()
    log_rho = fdfo_log_ratio(v, v_old, end_point_direction(x0))
    assert not log_rho.any()
    return torch.autograd.grad(objective(log_rho, half_difference(r), eps), v)[0]


def test_a_pair_whose_rewards_are_equal_up_to_rounding_teaches_fdfo_nothing():
    rewards = torch.tensor([[1e6, 1e6 + 0.06, 0.25, 0.75, 3.0, 3.0]] * 2)       # two groups
    assert rewards[0, 0] != rewards[0, 1]
    assert_close(pair_advantages(rewards), torch.tensor([[0, 0, -0.25, 0.25, 0, 0]] * 2))


def test_fdfos_log_ratio_is_the_old_mean_squared_distance_to_the_target_less_the_new_one():
    _, x0, v_old = a_pair()
    v, d = v_old + 0.1 * normal(2, 6), end_point_direction(x0)
    target = v_old - d
    distance = lambda velocity: (velocity - target).pow(2).mean(1)
    assert_close(fdfo_log_ratio(v, v_old, d), distance(v_old) - distance(v))


def test_fdfos_gradient_is_a_central_difference_of_the_reward_between_the_end_points():
    """For a quadratic reward, a central difference is exact. So at theta_old, each of the pair is
    pulled by twice the reward's gradient at the middle, projected onto the difference. The length
    of the difference does not matter."""
    B, b = normal(6, 6), normal(6)
    reward = lambda x: x @ b + ((x @ B) * x).sum(-1)
    middle, h, v_old = normal(6).requires_grad_(), normal(6), normal(2, 6)
    gradient, = torch.autograd.grad(reward(middle), middle)
    along = h / h.norm()
    for length in (1.0, 0.01):
        x0 = (middle + torch.stack([h, -h]) * length).detach()
        pulled = -slope(spo_objective, v_old, x0, reward(x0))   # x_0 rises where v falls
        for of_one in pulled:
            assert_close(of_one, length * 2 * (gradient @ along) * along / length)


@pytest.mark.parametrize("objective", [spo_objective, clipped_objective])
def test_at_theta_old_fdfo_is_neighbor_grpo_with_g_2_whose_candidates_are_the_end_points(objective):
    """This holds with the penalty and with PPO's clip: neither acts there. Neighbor GRPO gets the
    advantages r - mean(r), as in Eq. 3, and tau = 2 (t - t_next) |h|^2, where h is the half
    difference of the end points. With its own candidates, at t_next, the direction is different."""
    r, x0, v_old = a_pair()
    t, t_next = 0.7, 0.45
    tau = 2 * (t - t_next) * half_difference(x0)[0].pow(2).sum().item()

    def neighbor(candidates):
        x_t, slopes = normal(2, 6), []
        for i in range(2):                                      # the anchor is one, then the other
            v = v_old[i].clone().requires_grad_()
            x_theta = ddim_step(x_t[i], v, t, t_next)
            log_rho = log_ratio(candidates, x_theta, x_theta.detach(), tau)
            J = clipped_objective(log_rho, r - r.mean(), 1e-4)
            slopes += torch.autograd.grad(J, v)
        return torch.stack(slopes)

    fdfo = slope(objective, v_old, x0, r)
    assert_close(fdfo, neighbor(x0))
    assert torch.cosine_similarity(fdfo, neighbor(normal(2, 6))).abs().max() < 0.99


@pytest.mark.parametrize("advantage", [0.7, -0.002])
def test_spos_objective_is_largest_at_a_ratio_of_one_plus_or_minus_eps(advantage):
    log_rho = torch.linspace(-0.2, 0.2, 4001).double()
    A = torch.tensor([advantage]).double()
    J = torch.stack([spo_objective(each[None], A, 0.03) for each in log_rho])
    best = log_rho[J.argmax()].exp().item()
    assert best == pytest.approx(1 + 0.03 * A.sign().item(), abs=1e-4)
    at_best = (1 + 0.03 * A.sign()).log().requires_grad_()
    spo_objective(at_best, A, 0.03).backward()
    assert at_best.grad.abs() < 1e-12


# ============================================================================ the loops

class Stub:
    """What the loops need of a model, with a linear velocity. It keeps what `velocity` gets,
    without and with gradients, and what is decoded."""
    device, latent_shape, nfe = torch.device("cpu"), (4, 3), 1

    def __init__(self):
        torch.manual_seed(0)
        self.transformer, self.asked, self.images = torch.nn.Linear(3, 3), ([], []), []

    def trained(self):
        return list(self.transformer.parameters())

    def encode(self, prompts):
        return dict(vec=torch.arange(len(prompts))[:, None])

    def velocity(self, x, t, cond):
        """t: a number, or (M,), as for FLUX."""
        self.asked[torch.is_grad_enabled()].append((x, t, cond))
        return self.transformer(x.tanh()) + torch.as_tensor(t).expand(len(x))[:, None, None] * x

    def decode(self, x):
        self.images.append(x)
        return x

    def save(self, path, weights=None):
        path.mkdir(exist_ok=True)

    def weights(self):
        return torch.cat([w.detach().flatten() for w in self.transformer.parameters()])

    def latents(self):
        """The number of latents that `velocity` got, without and with gradients."""
        return [sum(len(x) for x, *_ in calls) for calls in self.asked]


@pytest.fixture
def calls_of(monkeypatch):
    """calls_of(name): a list of the arguments of each call of that function of baselines.py."""
    def watch(name):
        calls, plain = [], getattr(baselines, name)
        monkeypatch.setattr(baselines, name, lambda *args: (calls.append(args), plain(*args))[1])
        return calls
    return watch


def brightness(images, prompts):
    return images.flatten(1).mean(1)


def train_stub(folder, model, method, scorer=brightness, **settings):
    """Run a method's loop on a stub -> the lines of its log."""
    (folder / "prompts.txt").write_text("a\nb\nc\n")
    settings = {**METHODS[method], "method": method, "model": "", "rewards": "brightness",
                "prompts": str(folder / "prompts.txt"), "out_dir": str(folder / "run"),
                "overwrite": True, "iterations": 1, "eval_every": 0, "save_every": 0, "lr": 1e-2,
                "shift": 3.0, **settings}
    run = Run(Config(**settings), model, {})
    baselines.loop(run.cfg, model, {"brightness": scorer}, run)
    return run.lines()


@pytest.mark.parametrize("method, nfe_old, nfe_theta", [
    ("dance", 25, 14), ("flow", 6, 5), ("mix", 25, 4), ("flash", 8, 4),
    ("branch", 203 / 16, 218 / 16), ("nft", 19, 9), ("awm", 14, 6), ("fdfo", 40, 40)])
def test_every_method_costs_the_published_evaluations_counted_at_the_velocity(
        method, nfe_old, nfe_theta, tmp_path):
    """MixGRPO trains 4 steps in its code and paper (14 in this paper's Table 3). BranchGRPO: the
    network sees 203 nodes, and 218 edges are trained (published: 13.68 for both). DiffusionNFT has
    10 steps and 9 trained points, which the old policy sees too. AWM's one update does not need
    that. FDFO trains every step."""
    model = Stub()
    line, = train_stub(tmp_path, model, method, prompts_per_iteration=2)
    images = 2 * METHODS[method].get("group_size", 12)
    assert [count / images for count in model.latents()] == [nfe_old, nfe_theta]
    assert (line["nfe_old"], line["nfe_theta"]) == (nfe_old, nfe_theta)


@pytest.mark.parametrize("method", ["dance", "flow", "mix", "flash", "branch", "awm", "fdfo"])
def test_the_first_ratio_is_one_in_every_iteration(method, tmp_path):
    for line in train_stub(tmp_path, Stub(), method, iterations=4):
        assert line["first_ratio"] < 1e-5
        assert line["clip_fraction"] > 0 or method in ("awm", "fdfo")


@pytest.mark.parametrize("method, updates, narrow_eps", [
    ("dance", 3, 1e-6), ("branch", 18, 1e-6), ("awm", 3, 1e-6), ("fdfo", 3, 1e-7)])
def test_the_clip_or_the_penalty_holds_back_ratios_outside_it(
        method, updates, narrow_eps, tmp_path):
    narrow, wide, start = Stub(), Stub(), Stub().weights()
    for model, eps in ((narrow, narrow_eps), (wide, 1e9)):
        train_stub(tmp_path, model, method, clip_eps=eps, updates_per_iteration=updates)
    assert 0 < (narrow.weights() - start).norm() < 0.9 * (wide.weights() - start).norm()


@pytest.mark.parametrize("method", METHODS)
def test_equal_rewards_move_nothing(method, tmp_path):
    model = Stub()
    equal = lambda images, prompts: torch.full((len(images),), 3.7)
    train_stub(tmp_path, model, method, equal, iterations=2, lr=1e-3)
    moved = (model.weights() - Stub().weights()).abs().max()
    assert moved < (1e-6 if method == "nft" else 1e-9)


@pytest.mark.parametrize("method, asked", [("mix", "sde_times"), ("branch", "tree")])
def test_the_window_and_the_pruned_depths_move_as_training_goes_on(
        method, asked, tmp_path, calls_of):
    seen = calls_of(asked)
    train_stub(tmp_path, Stub(), method, iterations=3)
    assert [given[-1] for given in seen] == [0, 1, 2]


def test_each_candidate_trains_its_own_k_steps(tmp_path, calls_of):
    seen = calls_of("sde_log_ratio")
    train_stub(tmp_path, Stub(), "dance", prompts_per_iteration=1)
    updates = torch.stack([given[4].flatten() for given in seen]).view(3, 14, 4)
    # 3 updates, 14 steps, 4 candidates
    drawn = [set(times.tolist()) for times in updates.permute(0, 2, 1).flatten(0, 1)]
    assert all(len(times) == 14 for times in drawn) and len(set(map(frozenset, drawn))) == 12
    assert len(set.union(*drawn)) == 24         # together all steps but the last


@pytest.mark.parametrize("method", ["dance", "flow", "mix"])
def test_only_flow_grpo_has_independent_first_noises_and_a_noisy_last_step_which_is_not_trained(
        method, tmp_path, calls_of):
    begun, trained = calls_of("sde_rollout"), calls_of("sde_log_ratio")
    train_stub(tmp_path, Stub(), method, prompts_per_iteration=2)
    (_, x1, _, levels, *_), = begun
    flow, noises = method == "flow", {tuple(x.flatten().tolist()) for x in x1}
    assert len(noises) == (24 if flow else 2) and (levels[-1] > 0) == flow
    if flow:                                    # every candidate trains the first five of six
        correlation = x1.flatten(1).corrcoef().fill_diagonal_(0)
        assert correlation.mean().abs() < 0.1
        drawn = torch.cat([given[4].flatten() for given in trained]).tolist()
        assert sorted(drawn) == sorted(24 * schedule(6, 3.0)[:5].tolist())


def test_mixgrpo_trains_the_steps_in_its_window_and_nothing_while_it_is_empty(tmp_path):
    model, before = Stub(), []
    scorer = lambda images, prompts: (before.append(model.weights()), brightness(images, None))[1]
    settings = dict(num_rollout_steps=5, window=3, window_every=1, num_train_steps=3, iterations=5)
    lines = train_stub(tmp_path, model, "mix", scorer, **settings)
    assert [line["nfe_theta"] for line in lines] == [3, 2, 1, 0, 3]
    assert lines[3]["reward_std"] < 1e-6 and lines[3]["grad_norm"] == 0     # equal candidates
    assert lines[3]["first_ratio"] is None
    moved = [bool((b - a).any()) for a, b in zip(before, before[1:])]
    assert moved == [True, True, True, False]
    cfg = Config(**{**METHODS["mix"], "method": "mix", "shift": 3.0, **settings})
    assert [baselines.nfe(cfg, it)[1] for it in range(5)] == [3, 2, 1, 0, 3]


@pytest.mark.parametrize("method", [
    pytest.param(method, marks=[pytest.mark.slow] * (method != "nft")) for method in METHODS])
def test_every_method_raises_the_reward_on_the_same_noises(method, tmp_path):
    def rewards_of_twenty_groups(model):
        lines = train_stub(tmp_path, model, method, iterations=20, lr=1e-12)
        return torch.tensor([line["reward"] for line in lines])

    model = Stub()
    train_stub(tmp_path, model, method, iterations=60, seed=1)
    gain = rewards_of_twenty_groups(model) - rewards_of_twenty_groups(Stub())
    assert gain.mean() > 5 * gain.std() / 20**0.5


def test_nft_trains_every_image_at_k_different_times_of_the_rollout(tmp_path, calls_of):
    seen = calls_of("nft_loss")
    train_stub(tmp_path, Stub(), "nft", prompts_per_iteration=2, num_train_steps=3)
    drawn = [set(times.tolist()) for times in torch.stack([t.flatten() for _, t, *_ in seen], 1)]
    assert len(drawn) == 2 * 12 and all(len(times) == 3 for times in drawn)     # of each image
    assert set.union(*drawn) == set(schedule(10, 3.0)[:-1].tolist())


def test_nft_rolls_out_with_the_old_policy_and_not_with_the_trained_one(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "nft_decay", lambda step: 1.0)       # it never changes
    model, untouched = Stub(), Stub()
    settings = dict(iterations=6, ema=1 - 1e-7)
    lines = train_stub(tmp_path, model, "nft", **settings)
    still = train_stub(tmp_path, untouched, "nft", lr=1e-12, **settings)
    assert_close([line["reward"] for line in lines], [line["reward"] for line in still],
                 atol=1e-5, rtol=0)
    assert (model.weights() - untouched.weights()).abs().max() > 0.02


def test_awms_updates_share_the_images_and_all_have_the_rollouts_policy_as_the_old_one(
        tmp_path, calls_of):
    """Each of four updates has three images of each group, at its K times. The old log
    probabilities are those of the weights at the beginning. Advantages are divided by 5."""
    seen, given, model = calls_of("awm_log_prob"), calls_of("clipped_objective"), Stub()
    line, = train_stub(tmp_path, model, "awm", prompts_per_iteration=2, updates_per_iteration=4,
                       num_rollout_steps=8, num_train_steps=3)
    trained, (images,) = [one for one in seen if one[0].requires_grad], model.images
    assert [len(one[0]) for one in trained] == [2 * 3] * 3 * 4 and len(seen) == 3 * (4 + 3)
    assert (line["nfe_old"], line["nfe_theta"]) == (8 + 3 * 3 / 4, 3)
    assert model.latents()[0] / 24 == line["nfe_old"]
    r = brightness(images, None).view(2, 12)
    A = ((r - r.mean(1, keepdim=True)) / (r.std(correction=0) + 1e-4)).clamp(-5, 5) / 5
    for (v, x0, noise, t), (log_rho, each_A, _) in zip(trained, given, strict=True):
        places = [(images - one).flatten(1).norm(dim=1).argmin() for one in x0]
        assert_close(each_A, A.flatten()[torch.stack(places)])
        x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
        old = awm_log_prob(Stub().velocity(x_t, t, None), x0, noise, t)
        expected = awm_log_prob(v, x0, noise, t) - old
        assert_close(log_rho, expected.float(), atol=1e-6, rtol=1e-4)
    assert given[-1][0].abs().max() > 1e-4 and not given[0][0].any()


@pytest.mark.parametrize("ema, stays", [(0.5, 0.001), (0.0004, 0.0004)])
def test_nfts_loss_uses_the_old_policy_whose_decay_is_the_smaller_of_the_published_one_and_ema(
        ema, stays, tmp_path, calls_of, monkeypatch):
    asked, averages, model = calls_of("nft_loss"), [], Stub()
    monkeypatch.setattr(Run, "log", lambda run, *_, **__: averages.append(
        [w.clone() for w in run.ema]))
    train_stub(tmp_path, model, "nft", ema=ema, lr=0.1)
    for x_t, t, _, _, v_old, *_ in asked:
        assert_close(v_old, Stub().velocity(x_t, t.flatten(), None).detach())
    for average, now, before in zip(averages[0], model.trained(), Stub().trained(), strict=True):
        assert_close(average, stays * before + (1 - stays) * now, atol=1e-7, rtol=1e-6)
        assert (now - before).abs().max() > 0.01


def test_fdfos_pairs_begin_at_one_noise_and_both_are_trained_at_every_churned_state(
        tmp_path, calls_of):
    """The direction is the difference of the pair's own end points, and the advantage that of its
    own rewards. The old velocity is the one at exactly that state and time."""
    begun, ratios, weighed, model = (*map(calls_of, (
        "churned_rollout", "fdfo_log_ratio", "spo_objective")), Stub())
    train_stub(tmp_path, model, "fdfo", prompts_per_iteration=2, num_rollout_steps=5)
    (_, x1, *_), = begun
    x1, x0 = x1.unflatten(0, (-1, 2)), model.images[0].unflatten(0, (-1, 2))    # 12 pairs
    assert torch.equal(x1[:, 0], x1[:, 1])
    assert x1[:, 0].flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.95
    r = brightness(model.images[0], None).view(-1, 2)
    half_x, half_r = (x0[:, 0] - x0[:, 1]) / 2, (r[:, 0] - r[:, 1]) / 2
    found = []
    for (x, t, _), (_, v_old, d), (_, A, _) in zip(model.asked[1], ratios, weighed, strict=True):
        assert_close(v_old, Stub().velocity(x, t, None).detach())
        for i in range(0, len(x), 2):           # the two of a pair, in one update
            pair = (half_r - A[i]).abs().argmin().item()
            assert_close(A[i : i + 2], torch.stack([half_r[pair], -half_r[pair]]))
            expected = half_x[pair] / half_x[pair].pow(2).mean()
            assert_close(d[i : i + 2], torch.stack([expected, -expected]))
            assert (x[i] - x[i + 1]).abs().max() > 0            # due to churn
            found.append((pair, round(float(t), 4)))
    ts = [round(float(churn(0.0, t, 0.0, 0.0025)[1]), 4) for t in schedule(5, 3.0)[:-1]]
    assert sorted(found) == sorted((pair, t) for pair in range(12) for t in ts)


def test_fdfos_updates_share_the_prompts_if_each_has_too_few_pairs(tmp_path, calls_of):
    """One pair of each of six prompts in three updates: two prompts in each, with their own text,
    advantages and directions."""
    weighed, told, model = calls_of("spo_objective"), [], Stub()
    scorer = lambda images, prompts: told.append(brightness(images, None)) or told[0]
    line, = train_stub(tmp_path, model, "fdfo", scorer, prompts_per_iteration=6, group_size=2,
                       num_rollout_steps=5, updates_per_iteration=3)
    texts = [cond["vec"].flatten().tolist() for _, _, cond in model.asked[1]]
    assert texts == [prompts for prompts in ([0, 1], [2, 3], [4, 5]) for _ in range(5)]
    half = pair_advantages(told[0]).view(3, 4)
    for k, (_, A, _) in enumerate(weighed):
        assert_close(A, half[k // 5])
    assert line["nfe_theta"] == 5


SMALL_TREE = dict(num_rollout_steps=4, splits="0,2", group_size=4)


def test_branchgrpos_edges_have_the_advantage_of_the_node_they_lead_to(tmp_path, calls_of):
    ends, carried, model = calls_of("sde_log_ratio"), calls_of("clipped_objective"), Stub()
    train_stub(tmp_path, model, "branch", shift=1.0, updates_per_iteration=4, **SMALL_TREE)
    seen = {round(float(t), 3): x for x, t, _ in model.asked[0]}        # in the rollout
    last = seen[0.25]                           # the image is the last step's x_0, without noise
    predicted = ddim_step(last, Stub().velocity(last, 0.25, None), 0.25, 0.0)
    assert_close(model.images[0], predicted.detach())
    r = brightness(model.images[0], None)       # of the four leaves
    pairs = r.view(2, 2).mean(1)
    expected = {0.75: pairs, 0.5: pairs, 0.25: r}       # two nodes before the second split, then 4
    edges = [*zip(torch.cat([x_next for x_next, *_ in ends]),
                  torch.cat([A for _, A, _ in carried]), strict=True)]
    assert len(edges) == 2 + 2 + 4 + 4
    for t, fused in expected.items():
        for node, A in zip(seen[t], (fused - fused.mean()) / fused.std(), strict=True):
            carries, = [own for x_next, own in edges if torch.equal(x_next, node)]
            assert_close(carries, A)


def test_branchgrpos_edges_begin_at_the_parent_of_the_node_they_lead_to(tmp_path, calls_of):
    seen = calls_of("log_prob")
    settings = dict(split_noise=0.0, updates_per_iteration=1, lr=1e-12, **SMALL_TREE)
    train_stub(tmp_path, Stub(), "branch", **settings)
    deviations = torch.cat([((x_next - mean.detach()) / std).pow(2).flatten(1).mean(1)
                            for x_next, mean, std in seen])
    # Without noise at the splits, the 2 + 4 children there lie exactly at the mean of the parent's
    # step. The other 2 + 4 deviate by a standard normal. log_prob gets each of them twice.
    zero = deviations < 1e-9
    assert zero.sum() == 2 * (2 + 4)
    assert 0.5 < deviations[~zero].mean() < 1.5 and deviations[~zero].max() < 4


# ============================================================================ on the small FLUX

SHORT = ("--prompts_per_iteration 1 --resolution 32 --iterations 4 --eval_every 0 --save_every 2 "
         "--threads 1 --eval_scorers").split() + [""]
SMALL = dict(
    flash="--num_rollout_steps 12 --window 2 --num_train_steps 2 --group_size 4 --window_every 1",
    branch="--num_rollout_steps 4 --splits 0,2 --group_size 4 --updates_per_iteration 4",
    nft="--num_rollout_steps 4 --num_train_steps 3 --group_size 4",
    awm="--num_rollout_steps 4 --num_train_steps 3 --group_size 4 --updates_per_iteration 2",
    fdfo="--num_rollout_steps 4 --group_size 4 --updates_per_iteration 2")


def main(argv):
    return train.main(argv, baselines.parse_config, baselines.loop)


def log_without_times(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


@pytest.mark.parametrize("method", [
    pytest.param(method, marks=pytest.mark.slow) for method in SMALL])
def test_each_loop_runs_on_the_small_flux_and_an_interrupted_run_ends_like_an_uninterrupted_one(
        method, tmp_path):
    (tmp_path / "five.txt").write_text("a red apple\nan octopus\na dog\na red car\nthe moon\n")
    command = ["--method", method, *SHORT, "--prompts", str(tmp_path / "five.txt"),
               *SMALL[method].split()]
    assert main([*command, "--out_dir", str(tmp_path / "a")]) is None
    assert main([*command, "--out_dir", str(tmp_path / "b"), "--iterations", "2"]) is None
    assert main([*command, "--out_dir", str(tmp_path / "b"), "--resume"]) is None
    whole = log_without_times(tmp_path / "a")
    assert len(whole) == 4 and whole == log_without_times(tmp_path / "b")
    assert (tmp_path / "a/baselines.py").read_text() == open(baselines.__file__).read()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mix", "flow"])             # flow: one std for all groups
def test_two_processes_make_the_run_of_one_process(method, tmp_path):
    (tmp_path / "two.txt").write_text("a red apple\nan octopus\n")
    command = ["-m", "paper.baselines", "--method", method, *SHORT, "--prompts",
               str(tmp_path / "two.txt"), "--prompts_per_iteration", "2", "--iterations", "2",
               "--group_size", "4", "--num_rollout_steps", "6", "--num_train_steps", "4"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, start in (("one", []), ("two", torchrun)):
        subprocess.run([sys.executable, *start, *command, "--out_dir", str(tmp_path / name)],
                       cwd=HERE, check=True, timeout=300,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = log_without_times(tmp_path / "one"), log_without_times(tmp_path / "two")
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("before, now", [
    ("", "--method mix"), ("--method mix", ""), ("--method dance", "--method mix")])
def test_a_run_is_not_resumed_with_another_method(before, now, tmp_path, capsys):
    def parse(words):
        script = baselines if "--method" in words else train
        return script.parse_config([*words.split(), "--out_dir", str(tmp_path)])

    settings = json.dumps(dataclasses.asdict(parse(before)))
    state = tmp_path / "checkpoint-1/state"
    state.mkdir(parents=True)
    (state / "state.pt").touch()
    (state / "config.json").write_text(settings, encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(f"{now} --resume")
    old, new = (words.removeprefix("--method ") or "neighbor" for words in (before, now))
    assert f"the run to resume is one of method {old}, not {new}" in capsys.readouterr().err


@pytest.mark.parametrize("settings, sentence", [
    ("", "method is empty, but must be dance or flow"),
    ("--method dance --window_every 3", "window_every is not a setting of dance"),
    ("--method mix --window 24", "window is 24, but must be at most T-2, 23"),
    ("--method flow --num_train_steps 6", "num_train_steps (K) is 6, but must lie between 1 and 5"),
    ("--method mix --num_train_steps 5", "num_train_steps (K) is 5, but must lie between 1 and 4"),
    ("--method nft --num_train_steps 11",
     "num_train_steps (K) is 11, but must lie between 1 and 10"),
    ("--method branch --group_size 12",
     "different steps below 19, and so many that doubling at each gives G, 12, leaves"),
    ("--method branch --splits ,", "splits is ,, but must be different steps"),
    ("--method branch --splits 0,0,1,2", "must be different steps below 19, and so many"),
    ("--method branch --splits 0,3,6,19", "must be different steps below 19, and so many"),
    ("--method branch --splits 0,3,6,²", "must be different steps below 19, and so many"),
    ("--method branch --updates_per_iteration 40", "must be at most 2 G - 2, 30"),
    ("--method branch --solver dpmpp_2m", "solver is not a setting of branch"),
    ("--method branch --num_train_steps 9", "num_train_steps is not a setting of branch"),
    ("--method branch --prune 11", "prune is 11, but must lie between 0 and 10"),
    ("--method fdfo --global_std", "global_std is not a setting of fdfo"),
    ("--method nft --updates_per_iteration 2", "but must be 1 for nft"),
    ("--method nft --ema 0", "must lie in (0, 0.5]"),
    ("--method nft --ema 0.9", "must lie in (0, 0.5]"),
    ("--method nft --clip_eps 0.1", "clip_eps is not a setting of nft"),
    ("--method fdfo --churn 0", "churn is 0, but must be at least 1e-6"),
    ("--method fdfo --group_size 9", "group_size (G) is 9, but must be even"),
    ("--method fdfo --updates_per_iteration 5",
     "must divide the number of pairs of a prompt, 6, or of a process's prompts, 8"),
    ("--method awm --num_train_steps 13",
     "num_train_steps (K) is 13, but must lie between 1 and 12"),
    ("--method fdfo --num_train_steps 9", "num_train_steps is not a setting of fdfo"),
    ("--method flow --updates_per_iteration 5",
     "updates_per_iteration is 5, but must divide group_size (G), 12"),
    ("--method dance --eta 0", "eta is 0, but must be above 0"),
    ("--method dance --noise", "expected one argument"),
    ("--method dance --sigma 0.3", "unrecognized arguments: --sigma"),
    ("--method dance --group_size 1", "group_size is 1, but must lie in [2, inf)")])
def test_a_setting_that_cannot_work_is_refused_in_one_sentence_before_anything_is_loaded(
        settings, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(SystemExit) as stop:
        main(f"{settings} --out_dir {tmp_path / 'new'}".split())
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
