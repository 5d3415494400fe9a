"""
Deterministic solvers of the flow ODE dx/dt = v(x, t). Time t runs from 1 (noise) to 0 (image):
x_t = (1-t) x_0 + t eps, v ~ eps - x_0.

A solver moves x from t to t_next given v, and knows nothing of models: `velocity(x, t) -> v` is any
callable. Use float32 or better. In bf16 the rounding of one step is larger than what an update
changes.
"""
import torch


def schedule(num_steps, shift=1.0, start=1.0):
    """T+1 falling times, from noise to 0: t = shift u / (1 + (shift - 1) u), u evenly from `start`
    (1: pure noise) to 0.

    shift > 1 spends more steps near the noise. FLUX's dynamic shift at a given resolution is this
    one with shift = exp(mu). Returns (T+1,) float32.
    """
    if num_steps < 1 or not 0 < shift < float("inf"):
        raise ValueError(f"num_steps is {num_steps} and shift {shift}, but there must be at least "
                         "one step and a shift above 0")
    u = torch.linspace(start, 0, num_steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()                  # (T+1,)


def ddim_step(x, v, t, t_next):
    """Eq. 2: x_{t_next} = x_t - (t - t_next) v. On a flow DDIM is Euler's method, of order 1. t may
    broadcast over x."""
    return x + (t_next - t) * v


def dpmpp_2m_step(x, v, t, t_next, x0_prev=None, t_prev=None):
    """One step of DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Algorithm 2) for a flow, where
    alpha = 1 - t and sigma = t.

    The data prediction x_0 = x - t v is extrapolated linearly in lambda = log((1 - t) / t) from its
    last two values (x0_prev at t_prev is the one before). That paper's exponentials become
    t_next / t. lambda is infinite at t = 1 and t = 0. So the first step, the last, and (if
    t_prev = 1) the second have no extrapolation and are DDIM's. Returns (x_{t_next}, x_0).
    """
    x0 = guess = x - t * v
    if x0_prev is not None and t_prev < 1 and t_next > 0:
        h = torch.logit(t) - torch.logit(t_next)                        # lambda = -logit(t)
        h_prev = torch.logit(t_prev) - torch.logit(t)
        guess = x0 + h / (2 * h_prev) * (x0 - x0_prev)
    return t_next / t * x + (1 - t_next / t) * guess, x0


def rollout(velocity, x, ts, solver="ddim"):
    """Follow the ODE from x at ts[0] to ts[-1]; T evaluations of velocity(x, t), none repeated.

    x: any shape; ts (T+1,), falling. Returns traj (T+1, ...) with traj[0] = x, and vels (T, ...),
    where vels[k] is the velocity that was evaluated at exactly traj[k], ts[k]. With it the DDIM
    step that training takes can be replayed at no cost.
    """
    if solver not in ("ddim", "dpmpp_2m"):
        raise ValueError(f"solver is {solver!r}, but must be 'ddim' or 'dpmpp_2m'")
    if ts.ndim != 1 or len(ts) < 2 or not (ts[1:] < ts[:-1]).all() or ts[0] > 1 or ts[-1] < 0:
        raise ValueError(f"ts must fall from at most 1 to at least 0, not {ts.tolist()}")
    ts = ts.cpu()                   # coefficients are made on the host: no GPU synchronisation
    traj, vels, x0_prev = [x], [], None
    for k, (t, t_next) in enumerate(zip(ts[:-1], ts[1:])):
        v = velocity(x, t)
        if solver == "ddim":
            x = ddim_step(x, v, t, t_next)
        else:
            x, x0_prev = dpmpp_2m_step(x, v, t, t_next, x0_prev, ts[k - 1])
        traj.append(x)
        vels.append(v)
    return torch.stack(traj), torch.stack(vels)                         # (T+1, ...), (T, ...)
