"""
Neighbor GRPO on plain tensors (https://arxiv.org/abs/2511.16955).
Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps, v ~ eps - x_0.

The method in one paragraph. Perturb one noise into G neighbours (Eq. 7) and follow each down the
deterministic ODE. Score the images, and turn the scores into advantages (Eq. 3, 11). Then let the
model being trained take one ODE step from one of the rollouts. The point that it reaches is the
anchor. A softmax over minus the squared distances from the anchor to the G rollouts, all at the
time after the step, is a policy (Eq. 8). Its ratio to the same softmax before the update is a
likelihood ratio (Eq. 10), and PPO's clipped objective (Eq. 9) pulls the anchor towards the
candidates that scored well. There is no SDE, and no noise after the first.

Every function is pure: tensors in, tensors out, and torch is the only import. So each can be pasted
elsewhere.
Letters as in the paper:

    G    candidates in a group                      sigma  strength of the perturbation, in (0, 1]
    B    candidates to start a trained step from    p      exponent of the quasi-norm, in (0, 2]
    D    number of elements of one latent           tau    temperature of the softmax
    "..." the shape of one latent, e.g. (N, C)      rho    policy ratio pi_theta / pi_old

Give float32 or float64, never bf16. Under autocast too, the arithmetic here stays in the precision
of its inputs.

Where this departs from the text of the paper, and why:
  1. The ratio is formed from the anchor's displacement, not as a quotient of two softmaxes. With
     tau = 1, at FLUX's size, each log pi is about -2e4. So in float32 a difference of two of them
     carries 4e-3 of noise, forty times the clip of 1e-4 that DanceGRPO and MixGRPO publish
     (`log_ratio`).
  2. `tau` divides the squared distance. The paper has tau = 1, a sum over the D dimensions. But the
     clip of 1e-4 that it cites is from code that takes the mean, which is tau = D. At the first
     update tau only rescales the gradient of J. From the second update on the clip acts, and tau
     decides what it means.
  3. The old anchor is an argument (`log_ratio`). Algorithm 1 takes the rollout's own latent. Then
     the ratio differs from 1 before any update, unless the rollout's solver is that of the trained
     step.
  4. Rewards that are equal up to rounding give zero advantages. Eq. 3 would divide by zero, and
     Eq. 11 would enlarge the rounding to 1.
  5. Eq. 3's standard deviation is left out of `advantages`: Eq. 11 divides by a norm, so it
     cancels.
  6. rho is cut at e^80. float32 overflows at e^88, and an infinite ratio would turn a zero gradient
     into NaN. Beyond e^80 the gradient is zero; such a run has already diverged.
  7. There is no KL term. Eq. 4 has one, but the paper leaves it out, like other recent methods.
"""
import torch


def perturb_noise(eps_star, delta, sigma):
    """Eq. 7: eps_i = sqrt(1 - sigma^2) eps* + sigma delta_i, G neighbours of one noise.

    If eps* (...) and delta (G, ...) are independent standard normals, so is each neighbour. Any two
    of them have correlation 1 - sigma^2, hence nearly the same distance sigma sqrt(2 D). sigma = 1
    gives unrelated noises. Returns (G, ...). The noise is an argument: this function draws none.
    """
    if not 0 < sigma <= 1:
        raise ValueError(f"sigma is {sigma}, but must lie in (0, 1]")
    if delta.shape[1:] != eps_star.shape:
        raise ValueError(f"delta is {tuple(delta.shape)}, but must be (G, ...) over eps_star's "
                         f"{tuple(eps_star.shape)}")
    return (1 - sigma**2) ** 0.5 * eps_star + sigma * delta             # (G, ...)      Eq. 7


def is_flat(rewards, size=None):
    """True where rewards (..., G) are equal up to the rounding of their own precision: nothing can
    be learnt from such a group. size (...): how large the numbers were that they were computed
    from; by default, their own size."""
    size = rewards.abs().amax(-1) if size is None else size
    spread = rewards.amax(-1) - rewards.amin(-1)
    return spread <= 16 * torch.finfo(rewards.dtype).eps * size


def combine_rewards(rewards, weights):
    """Several rewards into one: Eq. 3 on each, A_m = (r - mean) / std over the group, then the mean
    weighted by `weights`.

    rewards (M, G), weights (M,) with a positive sum -> (G,). The standard deviation is the sample's
    (G - 1), as in the multi-reward training that the paper follows (MixGRPO, arXiv 2507.21802).
    Scales and offsets of the rewards do not matter. A reward that is flat in this group adds
    nothing; rewards that cancel give zeros. Give the result to `advantages`.
    """
    if (rewards.ndim != 2 or weights.shape != rewards.shape[:1]
            or not (weights >= 0).all() or not weights.sum() > 0):
        raise ValueError(f"rewards {tuple(rewards.shape)} must be (M, G), and weights "
                         f"{weights.tolist()} M numbers >= 0, not all 0")
    std = torch.where(is_flat(rewards), torch.inf, rewards.std(1))      # (M,)
    A = (rewards - rewards.mean(1, keepdim=True)) / std[:, None]        # (M, G)        Eq. 3
    total = (weights[:, None] * A).sum(0) / weights.sum()               # (G,)
    size = (weights * rewards.abs().amax(1) / std).sum() / weights.sum()        # of what is rounded
    return torch.where(is_flat(total, size), 0, total)                  # if they cancel


def advantages(rewards, p=0.8):
    """Eq. 11 on Eq. 3: A'_i = A_i / (sum_k |A_k|^p)^(1/p), A = r - mean(r). rewards (G,) -> (G,),
    with sum zero.

    p = 2 is GRPO's z-score over sqrt(G). With p < 2 a group in which a few candidates stand out
    gets more weight than one in which all advantages have the same size, whatever the rewards' own
    scale. Rewards that are equal up to rounding give zeros. A small p makes all of A' small, by
    G^(-1/p): at p = 0.1 and G = 12 no optimizer sees it.
    """
    if not 0 < p <= 2:
        raise ValueError(f"p is {p}, but must lie in (0, 2]")
    if rewards.ndim != 1 or not rewards.is_floating_point() or not rewards.isfinite().all():
        raise ValueError("rewards must be floats, one finite number for each of the G candidates, "
                         f"not {rewards.tolist()}")
    if is_flat(rewards):
        return torch.zeros_like(rewards)
    A = rewards - rewards.mean()                                        # (G,)          Eq. 3
    A = A / A.abs().max()           # the scale cancels below; this keeps |A|^p from underflowing
    return A / A.abs().pow(p).sum().pow(1 / p)                          # (G,)          Eq. 11


def log_policy(x, anchor, tau=1.0):
    """Eq. 8, the surrogate leaping policy: log pi_i = log softmax_i(-||x_i - anchor||^2 / tau).

    x (G, ...), anchor (...) -> (G,). The squared distance is a SUM over the D dimensions, as in the
    paper; tau = D turns it into a mean. It is also the posterior of Eq. 30 for a leaping kernel of
    variance tau / 2.
    """
    if not 0 < tau < float("inf"):
        raise ValueError(f"tau is {tau}, but must be a number above 0")
    if x.shape[1:] != anchor.shape:
        raise ValueError(f"x is {tuple(x.shape)}, but must be (G, ...) over the anchor's "
                         f"{tuple(anchor.shape)}")
    sq_dist = (x - anchor).flatten(1).pow(2).sum(1)                     # (G,)
    return torch.log_softmax(-sq_dist / tau, dim=0)                     # (G,)          Eq. 8


def log_ratio(x, anchor, anchor_old, tau=1.0):
    """Eq. 10: log rho_i = log pi_theta(x_i) - log pi_old(x_i), for one anchor.
    x (G, ...), anchors (...) -> (G,).

    x: the group's rollouts at t_next, constants. anchor: where the model being trained lands at
    t_next from one candidate's x_t; the only argument that carries a gradient. anchor_old: where
    the rollout's model lands by the SAME step, a constant. If the weights have not moved since the
    rollout, give anchor.detach().

    Let u = anchor - anchor_old and gain_i = 2 (x_i - anchor_old) . u / tau. Then log rho_i is
    gain_i - log sum_k pi_old(k) exp(gain_k): the squared distances also contain |u|^2, but that is
    the same for all i and cancels. The result is exactly 0 at u = 0, and accurate to 1e-6 in
    float32 for |log rho| < 20. (Multiplied and summed, not `@`: autocast would turn a matrix
    product into bf16.)
    """
    if anchor.shape != anchor_old.shape:
        raise ValueError(f"anchor is {tuple(anchor.shape)} and anchor_old "
                         f"{tuple(anchor_old.shape)}, but they must match")
    log_pi_old = log_policy(x, anchor_old, tau)                         # (G,)
    u = anchor - anchor_old                                             # (...)     has the gradient
    gain = (2 * (x - anchor_old) * u).flatten(1).sum(1) / tau           # (G,)
    log_mean = (torch.logsumexp(log_pi_old + gain, 0)                   # ()
                - torch.logsumexp(log_pi_old, 0))                       # ()    0 but for rounding
    return gain - log_mean                                              # (G,)          Eq. 10


def clipped_objective(log_rho, A, clip_eps):
    """Eq. 9: J = sum_i min(A_i rho_i, A_i clip(rho_i, 1 - clip_eps, 1 + clip_eps)), to be
    MAXIMISED: loss = -tau J.

    The factor tau takes back the division in `log_ratio`: at theta_old the gradient is that of
    tau = 1, the paper's. With tau = D and loss = -J it would be D times shorter, and at FLUX's size
    nearly all of its elements would be below AdamW's eps of 1e-8.

    log_rho (G,) from `log_ratio`, A (G,) from `advantages`, one anchor at one time -> scalar. It is
    a sum over the group, not a mean. For inputs (..., G) it sums over all their anchors. At
    theta_old every rho is 1, so J = sum(A) = 0 there, while its gradient with respect to the anchor
    is (2 / tau) sum_i A_i x_i for every anchor alike: the value of J says nothing about progress.
    """
    if log_rho.shape != A.shape:
        raise ValueError(f"log_rho is {tuple(log_rho.shape)} and A {tuple(A.shape)}, but each must "
                         "hold one number per candidate")
    rho = log_rho.clamp(max=80).exp()                                   # (..., G)
    return torch.minimum(A * rho, A * rho.clamp(1 - clip_eps, 1 + clip_eps)).sum()      # ()  Eq. 9


def clip_fraction(log_rho, clip_eps):
    """The share of ratios outside [1 - clip_eps, 1 + clip_eps], in [0, 1]. Worth logging, unlike
    J."""
    return (log_rho.expm1().abs() > clip_eps).float().mean()
