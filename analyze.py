"""From arrays to numbers: the spectra of what a model computes. Nothing here trains or draws."""
import torch


def wave_freqs(classes):
    """The pairs (q, k), (B, 2): every q of `classes` with k = 1 .. q//2. The 29 tasks at p = 113 have B = 726."""
    return torch.tensor([(q, k) for q in classes for k in range(1, q // 2 + 1)])


def waves(p, classes, stride):
    """The waves that the targets are made of: cos and sin of 2 pi k (x0 +- stride x1) / q over all p^2 inputs.

    -> (4, B, p^2): cos and sin of the sum wave, cos and sin of the difference wave of each of wave_freqs. For q = 2 the sine
    vanishes and the difference wave is the sum wave again; both stand as zeros. At p = 113: 1,451 sum, 1,450 difference waves.
    """
    freqs, n = wave_freqs(classes), torch.arange(p * p)
    q, k = freqs.T[:, :, None]
    # the whole-number phase is reduced mod q first, so that no precision is lost to a large angle
    phases = [2 * torch.pi * (k * (n % p + sign * stride * (n // p)) % q) / q for sign in (1, -1)]
    basis = torch.stack([wave(phase) for phase in phases for wave in (torch.cos, torch.sin)])
    basis[1:, freqs[:, 0] == 2] = 0
    return basis


def wave_solver(p, basis):
    """Least-squares solver for all waves of a basis (4, B, p^2) together, through the part of each that neither x0 nor x1
    has alone. -> solve (4B, p^2): solve @ a holds the coefficients of an activation a (p^2,), whose own marginals do not
    matter; and power (4B,), the variance of that part of a wave of coefficient 1."""
    grid = basis.view(-1, p, p)
    inter = (grid - grid.mean(1, keepdim=True) - grid.mean(2, keepdim=True) + grid.mean((1, 2), keepdim=True)).flatten(1)
    gram = inter @ inter.T  # normalised, its eigenvalues run from .048 to 2.02 at p = 113: float32 does
    gram += torch.diag((gram.diagonal() < 1e-3).to(gram.dtype))  # a wave that vanishes gets the coefficient 0
    return torch.linalg.solve(gram, inter), inter.square().mean(1)


def neuron_spectra(neurons, p, solve, power):
    """Spectra of activations (p^2, F) over all inputs, reduced to a dict of small tensors; every mean is over the F neurons.

    spectrum          (p//2+1,) |rfft2| / p^2, mean over the frequencies of x0, so that those of x1 remain
    sum_power         (B,) variance in the sum wave of each (q, k)
    difference_power  (B,) variance in the difference wave
    variance          (2,) variance in all, and in the two marginals (functions of x0 alone and of x1 alone)
    active            (2,) how many frequencies lie above mean + 2 sd: in `spectrum`, and in a neuron's own,
                      on average; the mean of the activations (frequency 0) is left out
    """
    grid = neurons.view(p, p, -1)                                                    # x1 x0 F
    own = torch.fft.rfft2(grid, dim=(1, 0), norm='forward').abs().mean(1)            # p//2+1 F
    mean = own.mean(1)                                                               # p//2+1
    waves = ((solve @ neurons).square().mean(1) * power).view(2, 2, -1).sum(1)       # 2 B, cos and sin together
    marginals = sum(grid.mean(axis).var(0, correction=0).mean() for axis in (0, 1))
    active = [(s > s.mean(0) + 2 * s.std(0)).sum(0).float().mean() for s in (mean[1:], own[1:])]
    return dict(spectrum=mean, sum_power=waves[0], difference_power=waves[1],
                variance=torch.stack([neurons.var(0, correction=0).mean(), marginals]), active=torch.stack(active))
