"""
Neighbor GRPO on plain tensors: tensors in, tensors out, torch is the only import.
Method: He et al., Neighbor GRPO, CVPR 2026, https://arxiv.org/abs/2511.16955 (its equations).
Source: neighbor_grpo.py of the Neighbor GRPO reference implementation. MIT licence.

Perturb one noise into G neighbours (Eq. 7) and follow each down the deterministic ODE. Score the
images, and turn the scores into advantages (Eq. 3, 11). Some of the candidates are anchors: from an
anchor's state the model being trained takes one ODE step, and lands at x_theta. A softmax over
minus the squared distances from x_theta to the G candidates, all at the time after the step, is a
policy (Eq. 8). Its ratio to the same softmax before the update is a likelihood ratio (Eq. 10), and
PPO's clipped objective (Eq. 9) pulls x_theta towards the candidates that scored well.

    G    candidates in a group                      sigma  strength of the perturbation, in (0, 1]
    B    anchors, drawn from the G                  p      exponent of the quasi-norm, in (0, 2]
    D    elements of one latent: ONE dimension,     tau    temperature of the softmax
         so flatten latents before                  rho    policy ratio pi_theta / pi_old
    ...  leading dimensions: groups, anchors        A      advantages, A' in the paper

For one group: x (G, D), A (G,), x_theta (b, D). For P groups: x (P, 1, G, D), A (P, 1, G), x_theta
(P, b, D), so that b anchors share a group. (If P = b, their wrong order raises no error.) A group
is what shares one eps*, not what shares a prompt. No function takes t: the direction and the range
of time do not matter. A training loop calls `neighbor_grpo_loss`. Any function can be pasted
elsewhere, with those that it calls.
"""
import torch

def check_precision(**tensors):
    """Refuse float16 and bf16, where 1 + 1e-4 is 1. At FLUX's size the rounding of x_theta to bf16
    moves a ratio a thousand times as far as the usual clip."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}, but must be float32 or float64: only the "
                             "network may run in bf16, not latents, solver and loss")

def perturb_noise(eps_star, delta, sigma):
    """Eq. 7: eps_i = sqrt(1 - sigma^2) eps* + sigma delta_i, G neighbours of one noise.

    eps_star (..., D), delta (..., G, D) -> (..., G, D). If these are standard normal, so is each
    neighbour. Any two neighbours have correlation 1 - sigma^2, hence nearly the same distance,
    sigma sqrt(2 D). sigma = 1 gives unrelated noises.
    """
    check_precision(eps_star=eps_star, delta=delta)
    if not 0 < sigma <= 1:
        raise ValueError(f"sigma is {sigma}, but must lie in (0, 1]")
    if delta.ndim < 2 or delta.shape[:-2] + delta.shape[-1:] != eps_star.shape:
        raise ValueError(f"eps_star is {tuple(eps_star.shape)} and delta {tuple(delta.shape)}, but "
                         "they must be (..., D) and (..., G, D)")
    return (1 - sigma**2) ** 0.5 * eps_star.unsqueeze(-2) + sigma * delta   # (..., G, D)   Eq. 7

def is_flat(rewards, size=None):
    """True where rewards (..., G) are equal up to the rounding of their own precision: nothing can
    be learnt from such a group. If they are differences of larger numbers, size (...) says how
    large those were."""
    size = rewards.abs().amax(-1) if size is None else size
    spread = rewards.amax(-1) - rewards.amin(-1)
    return spread <= 16 * torch.finfo(rewards.dtype).eps * size

def combine_rewards(rewards, weights):
    """Several rewards into one: Eq. 3 on each, A_m = (r - mean) / std over the group, then the mean
    weighted by `weights`. Give the result to `group_advantages`.

    rewards (..., M, G), weights (M,) with a positive sum -> (..., G). The standard deviation is the
    sample's (G - 1), as in MixGRPO (arXiv 2507.21802); the paper does not say where rewards are
    merged. Scales and offsets of the rewards do not matter. A reward that is flat in a group adds
    nothing there; rewards that cancel give zeros.
    """
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    check_precision(rewards=rewards)
    if (weights.ndim != 1 or weights.shape != rewards.shape[-2:-1]
            or not (weights >= 0).all() or not weights.sum() > 0):
        raise ValueError(f"rewards {tuple(rewards.shape)} must be (..., M, G), and weights "
                         f"{weights.tolist()} M numbers >= 0, not all 0")
    std = torch.where(is_flat(rewards), torch.inf, rewards.std(-1))     # (..., M)
    A = (rewards - rewards.mean(-1, keepdim=True)) / std[..., None]     # (..., M, G)   Eq. 3
    total = (weights[:, None] * A).sum(-2) / weights.sum()              # (..., G)
    size = (weights * rewards.abs().amax(-1) / std).sum(-1) / weights.sum()     # of its terms
    return torch.where(is_flat(total, size)[..., None], 0, total)       # if they cancel

def group_advantages(rewards, p=0.8):
    """Eq. 11 on Eq. 3: A'_i = A_i / (sum_k |A_k|^p)^(1/p), with A = r - mean(r) in each group.

    rewards (..., G), of any dtype but float16 and bf16 -> (..., G), with sum zero. p = 2 is GRPO's
    z-score over sqrt(G). With p < 2 a group in which a few candidates stand out gets more weight
    than one in which all advantages have the same size, whatever the rewards' scale. A small p
    makes all of A' small, by G^(-1/p): about 1e-11 at p = 0.1 and G = 12.

    Departures: Eq. 3's standard deviation is left out, since it cancels in Eq. 11. Rewards that are
    equal up to rounding give zeros: Eq. 3 would divide by zero, Eq. 11 would enlarge the rounding.
    """
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    check_precision(rewards=rewards)
    if not 0 < p <= 2:
        raise ValueError(f"p is {p}, but must lie in (0, 2]")
    if rewards.ndim < 1 or rewards.shape[-1] < 2 or not rewards.isfinite().all():
        raise ValueError("rewards must be finite numbers, one for each of the G > 1 candidates, "
                         f"not {rewards.tolist()}")
    A = rewards - rewards.mean(-1, keepdim=True)                        # (..., G)      Eq. 3
    A = A / A.abs().amax(-1, keepdim=True)      # the scale cancels; |A|^p must not underflow
    A = A / A.abs().pow(p).sum(-1, keepdim=True).pow(1 / p)             # (..., G)      Eq. 11
    return torch.where(is_flat(rewards)[..., None], 0, A)

def log_policy(x, x_theta, tau):
    """Eq. 8, the surrogate leaping policy: log pi_i = log softmax_i(-||x_i - x_theta||^2 / tau).

    x (..., G, D), x_theta (..., D) -> (..., G). The squared distance is a SUM over D. tau = 1 is
    the paper's, and at FLUX's D = 129,600 nearly one-hot; tau = D makes it a mean. It is the chance
    that x_theta came from x_i by a Gaussian leap of variance tau / 2 (Eq. 30).

    Departure: the paper has no tau. But the clip of 1e-4 that it cites is from code that takes the
    mean. The gradient of the first update does not depend on tau. From the second on tau decides
    what the clip stops: with a larger one, ratios stay nearer to 1.
    """
    check_precision(x=x, x_theta=x_theta)
    if not 0 < tau < float("inf"):
        raise ValueError(f"tau is {tau}, but must be a number above 0")
    leading = zip(x.shape[:-2], x_theta.shape[:-1])
    if (x.ndim not in (2, x_theta.ndim + 1) or x.shape[-1:] != x_theta.shape[-1:]
            or any(a != b and 1 not in (a, b) for a, b in leading)):
        raise ValueError(f"x is {tuple(x.shape)} and x_theta {tuple(x_theta.shape)}, but they must "
                         "be (G, D) and (b, D), or for P groups (P, 1, G, D) and (P, b, D)")
    sq_dist = (x - x_theta.unsqueeze(-2)).pow(2).sum(-1)                # (..., G)
    return torch.log_softmax(-sq_dist / tau, -1)                        # (..., G)      Eq. 8

def log_ratio(x, x_theta, x_old, tau):
    """Eq. 10: log rho_i = log pi_theta(x_i) - log pi_old(x_i). x (..., G, D), x_theta and x_old
    (..., D) -> (..., G).

    x        the group's candidates at t_next, constants
    x_theta  where the model being trained lands at t_next by one Euler (DDIM) step from an anchor's
             x_t; the only argument that carries a gradient
    x_old    where the rollout's model lands by the SAME step, a constant. If the rollout's solver
             is Euler, it is the rollout's own next state of the anchor, a row of x. With another
             solver repeat the step with the velocity that the rollout has evaluated at x_t. If the
             weights have not moved since the rollout, it is x_theta.detach().

    Velocity means the guided one, here as in the rollout. x_t must be, bit for bit, what the
    rollout's network saw: if your sampler rounds latents to bf16, store them rounded. Then the
    first ratio is 1. Assert that: it is not, if an SDE or dropout is on, or the step is another.
    Wrong candidates x cannot be seen there.

    Let u = x_theta - x_old and gain_i = 2 (x_i - x_old) . u / tau. Then log rho_i is gain_i -
    log sum_k pi_old(k) exp(gain_k): the squared distances also contain |u|^2, which cancels. The
    result is exactly 0 at u = 0, and accurate to 1e-6 in float32 for |log rho| < 20. (Multiplied
    and summed, not `@`, which autocast would turn into bf16.)

    Departures: Algorithm 1 takes the rollout's next state as x_old with every solver; then the
    ratio is not 1 before any update, unless the solver is Euler. And the quotient of two softmaxes
    is avoided: with tau = 1 at FLUX's size each log pi is about -2e4, so in float32 a difference
    carries 4e-3 of noise, forty times a clip of 1e-4.
    """
    check_precision(x_theta=x_theta, x_old=x_old)
    if x_theta.shape != x_old.shape or x_old.requires_grad or x.requires_grad:
        raise ValueError(f"x_theta is {tuple(x_theta.shape)} and x_old {tuple(x_old.shape)}; they "
                         "must have the same shape, and only x_theta may have a gradient")
    log_pi_old = log_policy(x, x_old, tau)                              # (..., G)
    u = x_theta - x_old                                                 # (..., D)  has the gradient
    gain = 2 * ((x - x_old.unsqueeze(-2)) * u.unsqueeze(-2)).sum(-1) / tau      # (..., G)
    log_mean = (torch.logsumexp(log_pi_old + gain, -1)                  # (...)
                - torch.logsumexp(log_pi_old, -1))                      # (...) 0 but for rounding
    return gain - log_mean[..., None]                                   # (..., G)      Eq. 10

def clipped_objective(log_rho, A, clip_eps):
    """Eq. 9: J = sum_i min(A_i rho_i, A_i clip(rho_i, 1 - clip_eps, 1 + clip_eps)), to be
    MAXIMISED: loss = -tau J.

    log_rho (..., G) from `log_ratio`, A (..., G) from `group_advantages`, clip_eps a float ->
    scalar, a sum over all of them. At theta_old every rho is 1 and J = sum(A) = 0, whatever the
    model does. But dJ / dx_theta is (2 / tau) sum_i A_i x_i there, for every anchor alike: an
    anchor's own advantage does not matter, even if it is 0.

    Departures: rho is cut at e^80. float32 overflows at e^88, and an infinite ratio would turn a
    zero gradient into NaN. There is no KL term. Eq. 4 has one, but the paper leaves it out.
    """
    check_precision(log_rho=log_rho, A=A)
    if not clip_eps > 0:
        raise ValueError(f"clip_eps is {clip_eps}, but must be above 0")
    if (A.ndim not in (1, log_rho.ndim) or A.shape[-1] != log_rho.shape[-1]
            or any(a not in (1, b) for a, b in zip(A.shape[:-1], log_rho.shape))):
        raise ValueError(f"log_rho is {tuple(log_rho.shape)} and A {tuple(A.shape)}, but they must "
                         "be (b, G) and (G,), or for P groups (P, b, G) and (P, 1, G)")
    rho = log_rho.clamp(max=80).exp()                                   # (..., G)
    return torch.minimum(A * rho, A * rho.clamp(1 - clip_eps, 1 + clip_eps)).sum()      # ()  Eq. 9

def neighbor_grpo_loss(x, x_theta, x_old, A, tau, clip_eps):
    """What a training loop minimises: -tau J (Eq. 9), averaged over the leading dimensions, so over
    groups and anchors. Arguments as in `log_ratio` and `clipped_objective`.

    Returns (loss, log_rho (..., G) without gradient). The loss is no measure of progress; log the
    reward, the largest |rho - 1| before the first update (0, up to rounding), and `clip_fraction`.
    With K calls before an update, divide each loss by K. The factor tau takes back the division in
    `log_ratio`: the first gradient is that of tau = 1, the paper's. Were the loss -J with tau = D,
    it would be D times shorter, and at FLUX's size mostly below AdamW's eps of 1e-8.
    """
    log_rho = log_ratio(x, x_theta, x_old, tau)                         # (..., G)      Eq. 10
    J = clipped_objective(log_rho, A, clip_eps)                         # ()            Eq. 9
    return -tau * J / log_rho[..., 0].numel(), log_rho.detach()

def clip_fraction(log_rho, clip_eps):
    """The share of ratios outside [1 - clip_eps, 1 + clip_eps], in [0, 1]; nan is outside."""
    return (~(log_rho.expm1().abs() <= clip_eps)).float().mean()
