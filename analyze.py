"""From a run folder to numbers: what the weights and activations of a trained model hold. It trains nothing.

    python analyze.py out/miiii [out/nanda ...]   # a table; analysis.json and .npz in the run's folder
    python analyze.py out/miiii --cut 17,23       # what is right without the neurons of some q
    python analyze.py out/miiii --collect         # add the run to assets/results.json
    python analyze.py --report                    # the table of all the runs there
    python analyze.py --embedding numbers.npy     # any matrix with a row per number: periods that stand out

In a notebook: run = load_run('assets/nanda'); logits, acts = run.forward(); numbers, arrays = run.analysis.

A part of a network is a function that returns a dict; PARTS lists them. Beside each number stands its null,
the same number before training. At the end: what train.py says of a run, and the table of all runs.
"""
import argparse
import contextlib
import functools
import io
import json
import re
import shlex
import sys
import time
import warnings
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
from data import load, need, refuse, say, write
from model import Transformer, fast_cpu, task_losses


# ---------------------------------------------------------------- matrices with a row per number

def load_matrix(path):
    """One matrix of finite numbers from a .npy or .pt file, as float32; nothing in it is executed."""
    need(path.exists(), f'{path} is not there')
    need(path.suffix in ('.npy', '.pt'), f'{path} is no .npy or .pt file')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error')  # a complex matrix would lose its imaginary part
            if path.suffix == '.npy':
                m = np.load(path, allow_pickle=False).astype(np.float32)
            else:
                m = torch.load(path, map_location='cpu', weights_only=True).detach().float().numpy()
    except Exception as e:  # numpy and torch raise a dozen types here
        refuse(f'{path} holds no matrix that can be loaded safely ({type(e).__name__})')
    need(m.ndim == 2 and m.size, f'{path} must hold one matrix, a row per number, not {list(m.shape)}')
    need(np.isfinite(m).all(), f'{path} has numbers that are not finite in float32')
    return torch.from_numpy(m)


def rows_for(path, p, width):
    """The matrix in a file as the embedding of p digits, (p, width)."""
    rows = load_matrix(path)
    need(len(rows) == p, f'{path} has {len(rows)} rows, one for each of {p} digits are needed')
    need(rows.shape[1] == width, f'{path} has {rows.shape[1]} columns: --d_model {rows.shape[1]} would fit')
    return rows


def cos_sin(W):
    """Coefficients of the columns of W (n, D) over its rows in the orthonormal real Fourier basis without the
    constant: (2, n//2, D), cosines and sines of k = 1 .. n//2. The frequency n/2 of an even n has no sine."""
    z = torch.fft.rfft(W, dim=0, norm='ortho')[1:] * 2 ** 0.5
    if len(W) % 2 == 0:
        z[-1] /= 2 ** 0.5
    return torch.stack([z.real, -z.imag])


def spectrum(W):
    """How much of each frequency 1 .. n//2 the columns of W (n, D) have over the rows: (n//2,)."""
    return cos_sin(W).norm(dim=(0, 2))


def density_and_ratio(W):
    """FFD and FCR of W (p, D): Fourier frequency density and coefficient ratio (Furuta et al. 2024).

    With c_k and s_k the vectors of cosine and sine coefficients, FFD is the share of the c_k longer than half
    the longest, and of the s_k likewise; FCR is the mean over k of the shorter of c_k and s_k by the longer.
    Where all sines, or all cosines, are below 1e-6 of the longest vector, they are rounding: zero.
    """
    norms = cos_sin(W).norm(dim=2)                                                       # 2 p//2
    longest = norms.amax(1, keepdim=True)
    norms = norms * (longest > 1e-6 * longest.max())
    dense = (norms > 0.5 * longest).float().mean()
    return dense.item(), (norms.amin(0) / norms.amax(0).clamp(min=1e-30)).mean().item()


def by_discrete_log(p):
    """1 .. p-1 in the order of their discrete logarithms, the powers of the smallest generator modulo a prime
    p: (p-1,). In that order a product is a sum mod p-1."""
    for g in range(1, p):
        powers = [pow(g, i, p) for i in range(p - 1)]
        if len(set(powers)) == p - 1:
            return torch.tensor(powers)


def threshold(norms):
    """mean + 2 sd of each column, (n, F) -> (F,): the paper's bar for an active frequency."""
    return norms.mean(0) + 2 * norms.std(0)


def gini(x):
    """Gini coefficient of n values >= 0: 0 if all are equal, near 1 if one has everything."""
    rank = 2 * torch.arange(1, len(x) + 1) - len(x) - 1
    return ((rank * x.sort().values).sum() / (len(x) * x.sum()).clamp(min=1e-30)).item()


def effective(power):
    """How many of the entries carry it: (sum s)^2 / sum s^2."""
    return (power.sum() ** 2 / power.square().sum().clamp(min=1e-30)).item()


def heights(x):
    """The ratio of each local maximum of a spectrum x (n,) to the median of the eleven values around it, else
    0. The first is left out: any trend has it."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(x, 5, mode='symmetric'), 11)
    beside = np.maximum(np.pad(x, 1)[:-2], np.pad(x, 1)[2:])
    ratio = x / np.maximum(np.median(around, 1), 1e-30)
    return np.where((x > beside) & (np.arange(len(x)) > 0), ratio, 0)


def outliers(W, draws=100):
    """The frequencies that stand out of the spectrum over the rows of W (n, D), straight lines taken out.

    The highest of `heights` stands out if noise with the covariance of the columns has nothing as high in
    some draws; their power is a gamma variable. Its wave, at the frequency between whole ones that explains
    most, is taken out with those found before, and the search goes on, so that weak waves are found beside
    strong ones.

    -> frequencies (P,), heights (P,), the highest by chance, spectrum (n//2,), those of noise (draws, n//2)
    """
    n = len(W)
    row = torch.arange(n, dtype=torch.float64)[:, None]

    def without_waves(frequencies):
        phase = 2 * torch.pi / n * row * torch.tensor(frequencies, dtype=torch.float64)
        taken = torch.cat([torch.ones(n, 1), row - n / 2, phase.cos(), phase.sin()], 1)
        basis = torch.linalg.qr(taken).Q.float()
        return W - basis @ (basis.T @ W)

    left = without_waves([])
    plain = spectrum(left).numpy()
    covariance = left.T @ left / n
    mean = 2 * covariance.trace().item()
    scale = 4 * covariance.square().sum().item() / max(mean, 1e-30)
    power = np.random.default_rng(0).gamma(mean / max(scale, 1e-30), scale, (draws, n // 2))
    by_chance = max(heights(noise).max() for noise in np.sqrt(power))
    found, high = [], []
    while left.norm() > 1e-4 * W.norm():  # the rest is rounding
        k = np.arange(1, n // 2 + 1)
        for f in found:
            k = k[abs(k - f) > 1.5]  # its own hole
        height = heights(spectrum(left).numpy()[k - 1])
        if height.max() <= by_chance:
            break
        f = k[height.argmax()]
        for step in 0.1 / 5.0 ** np.arange(4):
            tried = f + step * np.arange(-7, 8)
            f = min(tried, key=lambda g: without_waves([*found, g]).norm())
        found.append(f)
        high.append(height.max())
        left = without_waves(found)
    order = np.argsort(found)
    return np.array(found)[order], np.array(high)[order], by_chance, plain, np.sqrt(power)


# ---------------------------------------------------------------- waves of the targets, over all p^2 inputs

def wave_freqs(classes):
    """The pairs (q, k), (B, 2): every q of `classes` with k = 1 .. q//2. The 29 tasks have B = 726."""
    return torch.tensor([(q, k) for q in dict.fromkeys(classes) for k in range(1, q // 2 + 1)])


def waves(p, classes, stride):
    """The waves that the targets are made of: cos and sin of 2 pi k (x0 +- stride x1) / q.

    -> (4, B, p^2): cos and sin of the sum wave, cos and sin of the difference wave of each of wave_freqs. For
    q = 2 the sine vanishes and the difference wave is the sum wave again; both stand as zeros.
    """
    freqs = wave_freqs(classes)
    n = torch.arange(p * p)
    q, k = freqs.T[:, :, None]
    # the whole-number phase is reduced mod q first, so that no precision is lost to a large angle
    phases = [2 * torch.pi * (k * (n % p + sign * stride * (n // p)) % q) / q for sign in (1, -1)]
    basis = torch.stack([wave(phase) for phase in phases for wave in (torch.cos, torch.sin)])
    basis[1:, freqs[:, 0] == 2] = 0
    return basis


def interactions(values, p):
    """What neither x0 nor x1 has alone of values (p^2, F) over all inputs: (p^2, F)."""
    grid = values.view(p, p, -1)
    return (grid - grid.mean(0) - grid.mean(1, keepdim=True) + grid.mean((0, 1))).flatten(0, 1)


def wave_solver(p, basis):
    """Least-squares fit of all waves of a basis (4, B, p^2) together, through their interactions.

    -> inter (4B, p^2), the interactions of the waves, gram (4B, 4B) and its inverse inv: b = inter @ a and
    c = inv @ b are the coefficients of an activation a (p^2,); c * b / p^2 is the variance of each wave.
    """
    inter = interactions(basis.flatten(0, 1).T.contiguous(), p).T.contiguous()
    gram = inter @ inter.T  # normalised, its eigenvalues run from .048 to 2.02 at p = 113: float32 does
    gram += torch.diag((gram.diagonal() < 1e-3).to(gram.dtype))  # a wave that vanishes has b = c = 0
    return inter, gram, torch.linalg.inv(gram)


def solver_for(p, d):
    """`wave_solver` for the data d. Raises Refusal where it would need more than 6 GB."""
    size = 48 * len(wave_freqs(d.classes)) * p ** 2  # bytes, three times the waves
    need(size < 6e9, f'the spectra at p = {p} need {size / 1e9:.0f} GB; --spectra_every 0 does without')
    return wave_solver(p, waves(p, d.classes, d.stride))


def varies(neurons):
    """Which activations (p^2, F) vary over the inputs by more than rounding: (F,) bool."""
    return neurons.var(0, correction=0) > 1e-10 * neurons.square().mean(0)


def decompose(neurons, p, solver):
    """Where the variance of each activation (p^2, F) lies.

    alive        (F,)       whether it `varies`
    variance     (F,)       in all; 0 if not alive
    interaction  (F,)       in what neither x0 nor x1 has alone; 0 below 1e-6 of the variance
    waves        (2, B, F)  in the sum wave and in the difference wave of each (q, k), by the joint fit. White
                            noise has 1/(p-1)^2 of its interaction in each cosine and sine on average; single
                            entries can be negative, or more than there is
    products     (4B, F)    with the interactions of the waves, for `single_waves`
    """
    of_waves, _, inv = solver
    variance = neurons.var(0, correction=0)
    alive = varies(neurons)
    inter = interactions(neurons, p)
    interaction = inter.square().mean(0) * alive
    interaction = interaction * (interaction > 1e-6 * variance)
    b = of_waves @ (inter * (interaction > 0))                                           # 4B F
    power = (b * (inv @ b)).view(2, 2, -1, b.shape[1]).sum(1) / p ** 2
    return dict(alive=alive, variance=variance * alive, interaction=interaction, waves=power, products=b)


def single_waves(products, p, solver, kinds=4):
    """Variance of each activation that the waves of one (q, k) explain without the others, (B, F): its sum
    and its difference wave, or with kinds = 2 the sum wave. Never negative, nor more than the interaction."""
    gram = solver[1]
    B = len(products) // 4
    b = products.view(4, B, -1)[:kinds]
    blocks = gram.view(4, B, 4, B)[:kinds, :, :kinds].diagonal(dim1=1, dim2=3).permute(2, 0, 1)  # B 4 4
    return torch.einsum('ibf,bij,jbf->bf', b, torch.linalg.inv(blocks), b) / p ** 2


def dft2(neurons, p):
    """|2-D DFT| / p^2 of activations (p^2, F) without their means: (p//2+1, p, F), frequencies of x1 and of
    x0. The negative frequencies of x1 mirror these. p may be any number here."""
    return torch.fft.rfft2((neurons - neurons.mean(0)).view(p, p, -1), dim=(1, 0), norm='forward').abs()


def best_frequency(dft, variance):
    """The frequency k with most of the variance (F,) of each activation, from `dft2` (n//2+1, n, F): its
    share, in the bins (+-k, 0), (0, +-k), (+-k, +-k) together (Nanda et al. 2023), and k. (F,), (F,)."""
    n = dft.shape[1]
    k = torch.arange(1, n // 2 + 1)
    power = dft.square()
    both = power[k, 0] + power[k, k] + power[k, -k]
    folded = power[0, k] + power[0, -k] + 2 * both                                       # n//2 F
    if n % 2 == 0:  # n/2 is its own negative
        folded[-1] = power[0, n // 2] + power[n // 2, 0] + power[n // 2, n // 2]
    share, best = (folded / variance.clamp(min=1e-30)).max(0)
    return share, best + 1


def active_counts(dft, alive):
    """How many frequencies are active in `dft2` (p//2+1, p, F), the mean over neurons that vary, in two ways:
    bins of a neuron's 2-D DFT (the paper's rule); its frequencies of x1 after the mean over those of x0 (the
    averaging of the paper's code, which looks at one neuron, with another bar). (2,)"""
    bins = torch.cat([dft, dft[1:]]).flatten(0, 1)                                       # p^2 F
    counts = [((x > threshold(x)).sum(0) * alive).sum() for x in (bins, dft[1:].mean(1))]
    return torch.stack(counts) / alive.sum().clamp(min=1)


@torch.no_grad()
def spectra_of(model, d, solver, precision):
    """Spectra of the activations of all neurons over all inputs of the data d, means over the neurons.

    spectrum          (p//2+1,) |2-D DFT| / p^2, mean over the frequencies of x0, so that those of x1 remain
    sum_power         (B,) variance in the sum wave of each (q, k)
    difference_power  (B,) variance in the difference wave
    variance          (2,) variance in all, and in functions of x0 alone and of x1 alone
    active            (2,) see `active_counts`

    precision: the autocast of the model's products; the fit of the waves has none.
    """
    acts = {}
    p = round(len(d.y) ** 0.5)
    with precision:
        model(d.x, acts=acts)
    neurons = acts['neurons'].float().view(p * p, -1)
    parts = decompose(neurons, p, solver)
    dft = dft2(neurons, p)
    sums, differences = parts['waves'].mean(2)
    total = parts['variance'].mean()
    interaction = parts['interaction'].mean()
    return dict(spectrum=dft.mean((1, 2)), sum_power=sums, difference_power=differences,
                variance=torch.stack([total, total - interaction]), active=active_counts(dft, parts['alive']))


def carried(share, p):
    """Which (q, k) a layer carries, (..., B) bool, from the share of its interaction in each sum wave: more
    than the average (q, k), and more than ten times what white noise has (twenty for q = 2, which has no
    sine). In 28 random networks (14 seeds of miiii and of nanda, p = 113) none had more than 7.7 times."""
    return share > share.mean(-1, keepdim=True).clamp(min=20 / (p - 1) ** 2)


# ---------------------------------------------------------------- the parts of a network
# m is a network at one moment: net, d (data), p, rows (train, valid, test), logits (p^2, columns), acts, and
# solver, key, tau (see `measure`), found (by the parts before). A number, or a short list of numbers, goes
# into the printed table under its name; a tensor goes into analysis.npz. The neurons of each operation stand
# side by side: F in all.

def embedding(m):
    """W_E of the digits (p, D): singular values, p-DFT over the digits (figures 8 to 13 of the paper)."""
    W = m.net.W_E[:m.p]
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    norms, out = spectrum(W), {}
    constant = W.mean(0, keepdim=True) * m.p ** 0.5
    waves = cos_sin(W).transpose(0, 1).flatten(0, 1)  # cos 1, sin 1, cos 2, sin 2, ..
    for of, values in (('', S), (' of variance', S.square())):
        for share in (50, 90):
            below = values.cumsum(0) < share / 100 * values.sum()
            out[f'W_E singular values to {share} %{of}'] = below.sum().item() + 1
    out['W_E frequencies above mean + 2 sd'] = (norms > threshold(norms)).sum().item()
    out['W_E effective frequencies'] = effective(norms.square())
    out['W_E Gini'] = gini(norms)
    out['W_E periods that stand out'] = (m.p / outliers(W)[0]).tolist()
    out['W_E_fourier'] = torch.cat([constant, waves])[:m.p]
    return out | dict(singular_values=S, left_vectors=U, W_E_norms=norms)


def positions(m):
    """Pearson correlation of the embeddings of the two digit positions (figure 7); 0 where it has none."""
    a, b = m.net.W_pos[:2] - m.net.W_pos[:2].mean(1, keepdim=True)
    correlation = a @ b / (a.norm() * b.norm()).clamp(min=1e-30)
    return {'W_pos correlation': correlation.item(), 'W_pos': m.net.W_pos}


def attention(m):
    """Attention of the last token to x0, (H O, x0, x1): each head under each of O operations. The score of a
    head is its mean attention to x0 less that to x1: +1 if it attends x0 alone, -1 x1 alone."""
    att = m.acts['att'].view(m.p, m.p, m.d.n_ops, 3, -1).permute(3, 4, 2, 1, 0).flatten(1, 2)  # T HO x0 x1
    return {'heads: attention to x0 less x1': (att[0] - att[1]).mean((1, 2)).tolist(), 'attention': att[0]}


def neurons(m):
    """The MLP layer over all inputs, neuron by neuron, in the p-DFT and in the waves of the targets.

    The share of a neuron's best k is of its variance. The share of its best wave is of its interaction,
    explained by the sum and the difference wave of one (q, k); a pure neuron has more than half there. A
    neuron that does not vary has 0 of everything.
    """
    a = m.acts['neurons'].view(m.p ** 2, -1)
    freqs = wave_freqs(m.d.classes)
    parts = decompose(a, m.p, m.solver)
    dft = dft2(a, m.p)
    alive = parts['alive']
    total = parts['variance']
    inter = parts['interaction']
    in_waves = parts['waves'].sum(1)                                                     # 2 F
    split = torch.stack([total - inter, *in_waves, inter - in_waves.sum(0)])             # 4 F
    kinds = ('x0 or x1 alone', 'sum waves', 'difference waves', 'the rest')
    shares = split.mean(1) / total.mean().clamp(min=1e-30)
    out = {f'variance of neurons in {kind}': share for kind, share in zip(kinds, shares.tolist())}

    layer = parts['waves'].mean(2) / inter.mean().clamp(min=1e-30)                       # 2 B
    has = carried(layer[0], m.p)
    bins, averaged = active_counts(dft, alive).tolist()
    out['active bins of a neuron'] = bins
    out['active frequencies of a neuron, averaged'] = averaged
    out['waves (q, k) carried'] = has.sum().item()
    out['waves carried, effective number'] = effective(layer[0].clamp(min=0))
    out['moduli q carried'] = len(freqs[has, 0].unique())

    k_share, k_best = best_frequency(dft, total)
    k_share = k_share * alive
    own = inter.clamp(min=1e-30)
    wave_share, wave_best = (single_waves(parts['products'], m.p, m.solver) / own).max(0)
    sum_share = (single_waves(parts['products'], m.p, m.solver, kinds=2) / own).amax(0)
    pure = wave_share > 0.5
    purest = (wave_share * (freqs[wave_best, 0] > 3)).argmax()  # modulo 2 and 3 a wave is no picture
    shown = torch.stack([*torch.arange(3), purest])
    out['neurons that vary'] = alive.sum().item()
    out['share of best k, median neuron'] = k_share.quantile(0.5).item()
    out['share of best wave, median neuron'] = wave_share.quantile(0.5).item()
    out['pure neurons'] = pure.sum().item()
    out['pure neurons by the sum wave alone'] = (sum_share > 0.5).sum().item()
    out['waves of the pure neurons'] = len(wave_best[pure].unique())
    out['neuron_ids'] = shown
    out['neurons'] = a[:, shown].T.view(-1, m.p, m.p).mT                                 # 4 x0 x1
    out['neurons_dft'] = dft[..., shown].permute(2, 1, 0)
    out['spectrum'] = dft.mean((1, 2))
    out['neuron_k'] = k_best
    out['neuron_k_share'] = k_share
    out['neuron_wave'] = freqs[wave_best]
    out['neuron_wave_share'] = wave_share
    out['neuron_split'] = split / total.clamp(min=1e-30)
    out['wave_shares'] = layer
    return out


def polynomials(m):
    """Targets mod p: W_E of the digits and the map from neurons to logits W_L = W_out W_U in the Fourier
    basis over the residues and over their discrete logarithms, whose length is p-1 (Furuta et al. 2024).

    Beside FFD and FCR are those of Gaussian matrices of the same shapes. A product of a - z and b - z is one
    of logarithms of n - z, so we look for the residue z about which W_E is sparsest: the order of its rows n
    by the logarithm of n - z that has the highest Gini. That is z = 0 for ab, p-1 for (a+1)(b+1).
    """
    out, by_log = {}, by_discrete_log(m.p)
    for name, W in dict(W_E=m.net.W_E[:m.p], W_L=(m.net.W_out @ m.net.W_U).T).items():   # p D, p F
        g = torch.Generator().manual_seed(0)
        null = torch.randn(m.p, m.net.W_E.shape[1], generator=g)
        if name == 'W_L':  # a product, too
            null = null @ torch.randn(len(m.net.W_U), W.shape[1], generator=g)
        out[f'{name} FFD'], out[f'{name} FCR'] = density_and_ratio(W)
        out[f'{name} FFD, Gaussian'], out[f'{name} FCR, Gaussian'] = density_and_ratio(null)
        for rows, key, by in ((W, name, ''), (W[by_log], f'{name}_mult', ' by logarithm')):
            parts = cos_sin(rows).norm(dim=2)                                            # 2 n//2
            norms = parts.square().sum(0).sqrt()
            key_frequencies = (norms > threshold(norms)).nonzero().flatten() + 1
            out[f'{name} key frequencies{by}'] = key_frequencies.tolist()
            out[f'{name} effective frequencies{by}'] = effective(norms.square())
            out[f'{name} Gini{by}'] = gini(norms)
            out[f'{key}_cos_sin'] = parts
    about = [gini(spectrum(m.net.W_E[(z + by_log) % m.p])) for z in range(m.p)]
    return out | {'W_E sparsest about': int(np.argmax(about)), 'W_E Gini about it': max(about)}


def sharp(m):
    """Targets mod p: how many neurons of each operation have more than 85 % of their variance at one
    frequency, over residues and over discrete logarithms of both digits. pattern (O, a, b): the logits of
    class 1."""
    by_log = by_discrete_log(m.p)
    logits = m.logits.view(m.p, m.p, m.d.n_ops, m.p)                                     # b a O c
    out = dict(by_log=by_log, pattern=logits[..., 1].permute(2, 1, 0))
    grid = m.acts['neurons'].view(m.p, m.p, -1)
    for by, a in (('', grid.flatten(0, 1)), (' by logarithm', grid[by_log][:, by_log].flatten(0, 1))):
        share, _ = best_frequency(dft2(a, round(len(a) ** 0.5)), a.var(0, correction=0))
        is_sharp = (share > 0.85) & varies(a)
        out[f'sharp neurons{by}'] = is_sharp.view(m.d.n_ops, -1).sum(1).tolist()
    return out


def mechanism(m):
    """How a network adds modulo p, from its logits (Nanda et al. 2023, sections 4 and 5).

    profile (p,): the centred logits as a function of x0 + x1 - c, mean over the inputs. fit (p//2,): share of
    their variance in cos(w_k (x0 + x1 - c)). Key frequencies: those with more than 1 % and three times the
    lower quartile. Beside their sum stands what as many of the others have on average; a mere table of the
    training rows has as much there. Restricted loss: of the projection on the key waves in x0 + x1 and on the
    mean, over all inputs. Excluded loss: without the key waves, over the training rows.
    """
    p, logits = m.p, m.logits
    s = (m.d.x[:, 0] + m.d.x[:, 1]) % p
    c = torch.arange(p)
    k = torch.arange(1, p // 2 + 1)
    centred = logits - logits.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    profile = centred.gather(1, (s[:, None] - c) % p).mean(0)
    amplitude = torch.fft.rfft(profile).real[1:] * 2 / p
    fit = amplitude.square() / 2 / centred.square().mean().clamp(min=1e-30)
    bar = max(0.01, 3 * fit.quantile(0.25).item())  # a mere table has as much in all
    key = k[fit > bar] if m.key is None else torch.tensor(m.key, dtype=torch.long)
    in_key = fit[key - 1].sum()
    phase = 2 * torch.pi / p * (s[:, None] * key % p)
    basis = torch.cat([phase.cos(), phase.sin()], 1) * (2 / p ** 2) ** 0.5               # p^2 2n, orthonormal
    kept = basis @ (basis.T @ logits)

    def loss(z, rows=slice(None)):
        return task_losses(z[rows], m.d.y[rows], m.d.classes)[0].item()
    out = {'key frequencies': key.tolist()}
    out['logits in key cosines'] = in_key.item()
    out['logits in as many others'] = (len(key) * (fit.sum() - in_key) / max(1, len(k) - len(key))).item()
    out['loss on all inputs'] = loss(logits)
    out['restricted loss'] = loss(logits.mean(0) + kept)
    out['excluded loss'] = loss(logits - kept, m.rows[0])
    return out | dict(profile=profile, fit=fit, amplitude=amplitude)


def outcomes(m):
    """Loss and accuracy of each task on training and validation rows, without dropout."""
    out = {}
    for part, rows in zip(('train', 'valid'), m.rows):
        loss, acc = task_losses(m.logits[rows], m.d.y[rows], m.d.classes)
        out[f'{part}_losses'] = loss
        out[f'{part}_accuracies'] = acc
    return out


def components(net, x):
    """What each part writes into the residual stream of the last position, (2 + H, n, D): the token "="
    (embedding and position), each head, the MLP. Their sum times W_U is the logits of tokens x (n, 3)."""
    acts = {}
    z = net.W_E[x] + net.W_pos                                                           # n T D
    net(x, acts=acts)
    values = torch.einsum('ntd,hdk->nthk', z, net.W_V)
    heads = torch.einsum('nth,nthk,hkd->hnd', acts['att'], values, net.W_O)
    return torch.cat([z[None, :, -1], heads, (acts['neurons'] @ net.W_out)[None]])


def unseen(m):
    """`components` and targets of validation and test rows, of so many that logits take 800 MB at most."""
    x, y = m.d.part(torch.cat(m.rows[1:])[:int(2e8 / sum(m.d.classes))])
    return components(m.net, x), y.flatten()


def outputs(m):
    """The logits of each part alone on `unseen` rows: class_spectra (2 + H, C//2), their mean amplitude by
    frequency over the C classes; the share of power at k <= tau; the periods that stand out in 1,000 rows."""
    spectra, low, periods = [], [], []
    for part in unseen(m)[0]:
        logits = part @ m.net.W_U                                                        # n C
        amplitude = torch.fft.rfft(logits, dim=1)[:, 1:].abs()
        power = amplitude.square().sum(0)
        spectra.append(amplitude.mean(0))
        low.append((power[:m.tau].sum() / power.sum().clamp(min=1e-30)).item())
        periods.append((m.net.W_U.shape[1] / outliers(logits[:1000].T)[0]).tolist())
    return {'logits of "=", heads, MLP: low share': low, 'logits of "=", heads, MLP: periods': periods,
            'class_spectra': torch.stack(spectra)}


def without(W_U, k):
    """The projection (D, D) that takes the frequencies k over the classes out of what W_U (D, C) reads, by
    the nearest vector whose logits have none of them (Zhou et al. 2024). Its rank is what is left of D. Other
    frequencies change too, unless W_U has orthogonal directions for each."""
    A = cos_sin(W_U.T)[:, k - 1].flatten(0, 1)                                           # 2n D
    _, S, V = torch.linalg.svd(A, full_matrices=False)
    V = V[S > 1e-5 * S[0]]
    return torch.eye(len(W_U), dtype=W_U.dtype) - V.T @ V


SCORES = ('accuracy', 'within 2', 'within 10', 'errors off by tens', 'errors off by 1')  # last two: of errors


def errors(logits, y, modulus=None):
    """The five SCORES of logits (n, C) against answers y (n,); a tie is wrong. Modulo something the distance
    of an error is the shorter way round."""
    right = logits.gather(1, y[:, None])[:, 0]
    best_wrong, guess = logits.scatter(1, y[:, None], -torch.inf).max(1)
    off = torch.where(right > best_wrong, 0, (guess - y).abs())
    off = torch.minimum(off, modulus - off) if modulus else off
    wrong = (off > 0).sum().clamp(min=1)
    within = [(off <= most).sum() / len(off) for most in (0, 2, 10)]
    by_tens = ((off > 0) & (off % 10 == 0)).sum() / wrong
    return torch.stack([*within, by_tens, (off == 1).sum() / wrong]).tolist()


def filters(m, draws=3):
    """The five SCORES on `unseen` rows without the low (k <= tau) or the high frequencies over the classes in
    what attention, the MLP or both write into the residual stream (Zhou et al. 2024). Attention is filtered
    before the MLP reads it. Beside them SCORES without as many random directions, the mean of some draws."""
    parts, y = unseen(m)
    net = m.net
    modulus = m.d.classes[0] if m.d.modular else None
    D, C = net.W_U.shape
    k = torch.arange(1, C // 2 + 1)
    g = torch.Generator().manual_seed(0)
    everything = torch.eye(D)
    start = parts[0]
    heads = parts[1:-1].sum(0)

    def scores(of_attention, of_mlp):
        mid = start + heads @ of_attention
        written = net.activation(mid @ net.W_in) @ net.W_out
        return errors((mid + written @ of_mlp) @ net.W_U, y, modulus)

    out = {'tau, the highest low frequency': m.tau, 'filtered: nothing': scores(everything, everything)}
    for band, some in (('low', k[:m.tau]), ('high', k[m.tau:])):
        P = without(net.W_U, some)
        left = out[f'dimensions left without {band}'] = round(P.trace().item())
        random = [torch.linalg.qr(torch.randn(D, D - left, generator=g)).Q for _ in range(draws)]
        nulls = [everything - Q @ Q.T for Q in random]
        for where in ('MLP', 'attention', 'both'):
            rows = []
            for kept in (P, *nulls):
                of_attention = everything if where == 'MLP' else kept
                of_mlp = everything if where == 'attention' else kept
                rows.append(scores(of_attention, of_mlp))
            out[f'filtered: {band} from {where}'] = rows[0]
            out[f'filtered: {band} from {where}, random'] = np.mean(rows[1:], 0).tolist()
    return out


# ---------------------------------------------------------------- what fails when a part is taken out

LEARNED = 0.9  # accuracy from which a task counts as learned


def owners(wave, share, one_modulus, bar=0.5):
    """The group of each neuron, (F,): the q of its best wave (F, 2), or the k if there is one modulus. 0
    where that wave has no more than `bar` of what needs both digits."""
    return wave[:, int(one_modulus)] * (share > bar)


def replaced(net, logits, neurons, group, values):
    """The logits (n, C) when of the neurons (n, F) a group, (F,) bool, has other values (n, F)."""
    return logits + (values - neurons)[:, group] @ (net.W_out[group] @ net.W_U)


def lost(accuracy, whole, classes):
    """What each learned task loses at some accuracy (G, Q) against that of the whole network (Q,), as a share
    of the way down to chance: (G, learned)."""
    return ((whole - accuracy) / (whole - 1 / torch.tensor(classes)))[:, whole >= LEARNED]


def separations(accuracy, whole, classes):
    """How far each group serves its own task alone, for the groups of the learned tasks, two at least: 1 if
    without it that task falls to chance and no other one loses anything, 0 if another one loses as much.

    accuracy (Q, Q): without the group of a task (row), of a task (column). What the own task has `lost`, less
    the largest loss of another.
    """
    losses = lost(accuracy, whole, classes)[whole >= LEARNED]
    of_others = losses.clone().fill_diagonal_(-torch.inf)
    return losses.diagonal() - of_others.amax(1)


def random_groups(groups, strength, generator):
    """As many random neurons as in each group (G, F), and random neurons of at least the same total strength,
    with one less below it: two times (G, F) bool. strength (F,)."""
    order = torch.randperm(len(strength), generator=generator)
    total = (groups * strength).sum(1, keepdim=True)
    before = strength[order].cumsum(0) - strength[order]
    as_strong = torch.zeros_like(groups)
    as_strong[:, order] = before < total
    return groups[:, order], as_strong


def says_prime(logits, classes):
    """Where no task says 0, that is, no modulus divides the number: (n,) bool."""
    blocks = logits.split(classes, 1)
    return ~torch.stack([block[:, 0] > block[:, 1:].amax(1) for block in blocks]).any(0)


def prime_accuracy(logits, y, classes):
    """On which share of the rows `says_prime` is right, against the targets y (n, Q)."""
    prime = (y != 0).all(1)
    return (says_prime(logits, classes) == prime).float().mean().item()


def outcome(all_logits, y, classes):
    """Losses and accuracies (G, Q), (G, Q) of several logits (n, C)."""
    pairs = [task_losses(logits, y[:len(logits)], classes) for logits in all_logits]
    return [torch.stack(values) for values in zip(*pairs)]


def some_unseen(m, most=10000):
    """Rows of validation and test, 10,000 at most, and the accuracy of the network there, (Q,)."""
    rows = torch.cat(m.rows[1:])[:most]
    return rows, outcome([m.logits[rows]], m.d.y[rows], m.d.classes)[1][0]


def circuits(m, draws=20):
    """Which task needs which neurons, on rows that were not trained on. The neurons are in G groups, see
    `owners`; if there are none, that is all. Accuracies of each task:

    necessary    (G, Q)         with the neurons of a group at their means over all inputs
    resampled    (G, Q)         with these neurons at their values on other, random inputs
    sufficient   (G, Q)         with all other neurons at their means
    random       (draws, G, Q)  with as many random neurons at their means, on 500 rows
    as_strong    (draws, G, Q)  with random neurons that write as much at their means, on 500 rows

    necessary_losses (G, Q) are the losses. written (G, Q): variance over the inputs of what a group writes
    into the logits of a task, divided by that of these logits. primes (1 + G,): the share of the rows about
    which `says_prime` is right, with all neurons and without each group.
    """
    net, d, p = m.net, m.d, m.p
    one_modulus = len(set(d.classes)) == 1
    best_waves = m.found['neuron_wave'], m.found['neuron_wave_share'], one_modulus
    owner = owners(*best_waves)
    names = owner[owner > 0].unique() if one_modulus else torch.tensor(d.classes)
    groups = owner == names[:, None]                                                     # G F
    if not groups.any():
        return {}
    rows, whole = some_unseen(m)
    y = d.y[rows]
    logits = m.logits[rows]
    neurons = m.acts['neurons'][rows]
    mean = m.acts['neurons'].mean(0).expand_as(neurons)
    g = torch.Generator().manual_seed(0)
    elsewhere = m.acts['neurons'][torch.randperm(p * p, generator=g)[:len(rows)]]

    def cut(groups, n=len(rows), values=mean):
        return (replaced(net, logits[:n], neurons[:n], group, values[:n]) for group in groups)

    def accuracies(all_logits):
        return outcome(all_logits, y, d.classes)[1]

    found = dict(groups=names, group_sizes=groups.sum(1))
    found['necessary_losses'], found['necessary'] = outcome(cut(groups), y, d.classes)
    found['resampled'] = accuracies(cut(groups, values=elsewhere))
    nothing = replaced(net, logits, neurons, slice(None), mean)
    found['sufficient'] = accuracies(nothing + logits - z for z in cut(groups))

    few = 500
    strength = neurons.std(0) * (net.W_out @ net.W_U).norm(dim=1)
    drawn = [random_groups(groups, strength, g) for _ in range(draws)]
    found['random'] = torch.stack([accuracies(cut(some, few)) for some, _ in drawn])
    found['as_strong'] = torch.stack([accuracies(cut(some, few)) for _, some in drawn])

    def variances(logits):
        blocks = logits.split(d.classes, 1)
        return torch.stack([(block - block.mean(1, keepdim=True)).var(0).sum() for block in blocks])
    written = [variances(logits[:few] - z) for z in cut(groups, few)]
    found['written'] = torch.stack(written) / variances(logits[:few])
    if one_modulus:
        return found

    right = [prime_accuracy(z, y, d.classes) for z in (logits, *cut(groups))]
    found['primes'] = torch.tensor(right)
    found['primes told from other numbers'] = right[0]
    found['the same by always saying "no prime"'] = (y == 0).any(1).float().mean().item()
    learned = whole >= LEARNED
    found['tasks learned'] = learned.sum().item()
    if learned.sum() < 2:
        return found
    necessary = found['necessary'][learned][:, learned]
    own = necessary.diagonal()
    others = (necessary.sum() - own.sum()) / (len(own) * (len(own) - 1))
    found['own task without its group'] = own.mean().item()
    found['other tasks without it'] = others.item()
    found['own task with its group alone'] = found['sufficient'].diagonal()[learned].mean().item()

    def separation(accuracy, whole=whole):
        return separations(accuracy, whole, d.classes)
    found['separation'] = separation(found['necessary']).mean().item()
    found['separation, the least of a group'] = separation(found['necessary']).min().item()
    found['separation, resampled'] = separation(found['resampled']).mean().item()
    for bar in (0.3, 0.7):
        others = owners(*best_waves, bar) == names[:, None]
        found[f'separation, waves above {bar}'] = separation(accuracies(cut(others))).mean().item()
    of_few = accuracies([logits[:few]])[0]
    if (of_few >= LEARNED).sum() < 2:
        return found
    for name in ('random', 'as_strong'):
        nulls = [separation(accuracy, of_few).mean().item() for accuracy in found[name]]
        found[f'separation, {name}: least, mean, most'] = [min(nulls), sum(nulls) / draws, max(nulls)]
    return found


def shared(m):
    """What all tasks lose without a part before the neurons: accuracies on rows that were not trained on.

    heads        (.., Q)    with what each head, then what each pair writes at its mean over these rows
    frequencies  (p//2, Q)  without one frequency of the digits in W_E
    """
    net, p, classes = m.net, m.p, m.d.classes
    rows, whole = some_unseen(m)
    x, y = m.d.x[rows], m.d.y[rows]
    mid = m.acts['resid_mid'][rows]
    heads = components(net, x)[1:-1]                                                     # H n D
    heads -= heads.mean(1, keepdim=True)
    H = len(heads)
    sets = [some for n in (1, 2) for some in combinations(range(H), n)]

    def without_heads(some):
        left = mid - heads[list(some)].sum(0)
        return (left + net.activation(left @ net.W_in) @ net.W_out) @ net.W_U

    W_E = net.W_E[:p].clone()

    def without_frequency(k):
        kept = torch.fft.rfft(W_E, dim=0)
        kept[k] = 0
        net.W_E[:p] = torch.fft.irfft(kept, p, dim=0)
        return net(x)

    found = dict(heads=outcome(map(without_heads, sets), y, classes)[1])
    found['frequencies'] = outcome(map(without_frequency, range(1, p // 2 + 1)), y, classes)[1]
    net.W_E[:p] = W_E
    parts = {'head': found['heads'][:H], 'pair of heads': found['heads'][H:],
             'frequency of W_E': found['frequencies']}
    for part, accuracy in parts.items():
        if len(accuracy) and (whole >= LEARNED).any():
            halved = (lost(accuracy, whole, classes) > 0.5).sum(1).float()
            found[f'tasks that lose more than half without a {part}'] = halved.mean().item()
    return found


PARTS = {  # a function of m: the tasks that it is for (see `measure`), the moments at which it is measured
    embedding: ('any', 'final initial snapshots'),
    positions: ('any', 'final initial snapshots'),
    attention: ('any', 'final initial snapshots'),
    neurons: ('waves', 'final initial snapshots'),
    polynomials: ('mod p', 'final initial snapshots'),
    sharp: ('mod p', 'final initial snapshots'),
    mechanism: ('one sum', 'final initial snapshots'),
    outcomes: ('any', 'final initial snapshots'),
    outputs: ('one set of classes', 'final initial'),
    filters: ('one set of classes', 'final'),
    circuits: ('waves, one operation', 'final'),
    shared: ('waves, one operation', 'final')}
# the arrays that are kept of every moment
SMALL = ('W_E_norms', 'spectrum', 'train_losses', 'train_accuracies', 'valid_losses', 'valid_accuracies')


# ---------------------------------------------------------------- a run

class Run(SimpleNamespace):
    """An open run folder: path, config, epoch, p, data, rows (train, valid, test), net, weights, initial
    (weights), snapshots {epoch: weights}, records (metrics.npz up to the checkpoint), shipped (snapshots.npz,
    their numbers where the weights did not travel), notes on what is missing, to (where its analysis is),
    tau."""

    def forward(self, weights=None):
        """Logits (p^2, columns of all tasks) over all inputs, and the activations of the last position: att,
        resid_mid, neurons, resid_post. Of the final weights, unless others are given."""
        acts = {}
        self.net.load_state_dict(weights or self.weights)
        return self.net(self.data.x, acts=acts).view(len(self.data.y), -1), acts

    @functools.cached_property
    def analysis(self):
        """numbers, arrays: those in the folder if newer than the run and this file, else by `analyse`."""
        folder = self.to or self.path
        made = folder / 'analysis.json'
        newest = max(file.stat().st_mtime for file in (self.path / 'ckpt.pt', Path(__file__)))
        with contextlib.suppress(OSError, ValueError, KeyError, data.Refusal):  # none yet, or a damaged one
            numbers = json.loads(made.read_text())
            of_this = all(numbers[key] == getattr(self, key) for key in ('config', 'epoch', 'tau'))
            if of_this and made.stat().st_mtime >= newest:
                return numbers, arrays_in(folder / 'analysis.npz')
        say(f'{self.path}: no up-to-date analysis yet, making one')
        return analyse(self)

    @property
    def final(self):
        """The numbers of the final weights, by their labels."""
        return self.analysis[0]['final']

    @property
    def arrays(self):
        return self.analysis[1]


def arrays_in(path):
    """The arrays of a .npz file, {} if there is none."""
    try:
        return dict(np.load(io.BytesIO(path.read_bytes()))) if path.exists() else {}
    except Exception as e:  # numpy raises many types on a damaged file
        refuse(f'{path} is damaged ({type(e).__name__})')


def network(o, d):
    """A new model for the data d by the options o, a dict. Formulas share their columns of logits."""
    n_classes = sum(d.classes) // d.n_ops
    n_tasks = len(d.classes) // d.n_ops
    return Transformer(o['p'], o['d_model'], o['n_heads'], n_classes, d.n_ops, n_tasks, o.get('init', 'he'))


def load_run(path, to=None, tau=0):
    """Open a run folder, as run = load_run('assets/nanda'). Raises Refusal if anything in it is damaged."""
    path, notes = Path(path), []
    ckpt = load(path / 'ckpt.pt')
    o = ckpt['config']
    epoch = ckpt['step']
    records = arrays_in(path / 'metrics.npz')
    shipped = arrays_in(path / 'snapshots.npz')
    snapshots = [load(file, ('model', 'step')) for file in sorted(path.glob('snapshots/*.pt'))]
    try:
        d = data.make(o['task'], o['p'], o['data_seed'])
        rows = data.split(len(d.y), o['train_frac'], o['data_seed'])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(o['seed'])  # train.py starts there
            net = network(o, d).requires_grad_(False)
        start = {name: w.clone() for name, w in net.state_dict().items()}
        snapshots = {snap['step']: snap['model'] for snap in snapshots}
        snapshots = {e: w for e, w in snapshots.items() if e <= epoch}  # a killed run can have later ones
        for weights in (*snapshots.values(), ckpt['model']):
            net.load_state_dict(weights)
            need(all(w.isfinite().all() for w in weights.values()), 'weights that are not finite')
        n_spectra = (records.get('spectra_epoch', np.zeros(0)) < epoch).sum()
        for name in records.keys() - {'epoch', 'tasks', 'grad_norm_names', 'freqs'}:
            per_epoch = name == 'grad_norm' or name.endswith(('_loss', '_acc'))
            records[name] = records[name][:epoch if per_epoch else n_spectra]
        if records:
            records['epoch'] = np.arange(epoch)  # assets/paper is without it
        fits = not records or records['valid_acc'].shape == (epoch, len(d.classes))
        need(fits, 'a metrics.npz of another run')
    except Exception as e:  # foreign files can fail in any of these lines, in any way
        refuse(f'{path} holds what does not belong together: {" ".join(str(e).split())[:150]}')
    if epoch and not records:
        notes.append(f'{path} has no metrics.npz: no curves')
    if not snapshots and not shipped:
        notes.append(f'{path} has no weight snapshots: nothing over snapshots')
    if o.get('init_from') and 0 not in snapshots:
        notes.append(f'{path} lacks the weights it began with: its null is from before they were copied')
    weights = {name: w.float() for name, w in ckpt['model'].items()}  # shipped runs have them in float16
    return Run(path=path, config=o, epoch=epoch, p=o['p'], data=d, rows=rows, net=net, weights=weights,
               initial=snapshots.get(0, start), snapshots=snapshots, records=records, shipped=shipped,
               notes=notes, to=to and Path(to), tau=tau)


@torch.no_grad()
def measure(run, weights, moment, solver, key=None):
    """All PARTS for the weights of one moment: numbers and short lists; arrays. key: the final weights' key
    frequencies, None to find them."""
    logits, acts = run.forward(weights)
    d, p = run.data, run.p
    tau = run.tau or max(1, round(50 / 260 * (d.classes[0] // 2)))  # that of Zhou et al. 2024
    m = SimpleNamespace(net=run.net, d=d, p=p, rows=run.rows, logits=logits, acts=acts, solver=solver,
                        key=key, tau=tau)
    sums = (d.x[:, 0] + d.x[:, 1]) % p
    one_set = len(set(d.classes)) == 1 and len(d.names) == d.n_ops  # in the same logits
    mod_p = one_set and d.classes[0] == p
    one_sum = mod_p and d.n_ops == 1 and torch.equal(d.y[:, 0], sums)
    kinds = {'any': True, 'waves': solver is not None, 'one set of classes': one_set, 'mod p': mod_p,
             'one sum': one_sum, 'waves, one operation': solver is not None and d.n_ops == 1}
    m.found = found = {}
    for part, (kind, moments) in PARTS.items():
        if kinds[kind] and moment in moments.split():
            found |= part(m)
    # the next weights go into the same memory, so arrays are copied
    arrays = {name: value.clone() for name, value in found.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in found.items() if name not in arrays}
    return numbers, arrays


def over_snapshots(run, solver, key):
    """The numbers and small arrays of every snapshot and of the final weights: snapshot_NAME, in the order of
    snapshot_epoch."""
    out = {}
    began = time.perf_counter()
    moments = run.snapshots | {run.epoch: run.weights}
    for i, (epoch, weights) in enumerate(moments.items()):
        numbers, arrays = measure(run, weights, 'snapshots', solver, key)
        some = {name: arrays[name].numpy() for name in SMALL if name in arrays}
        for name, value in (numbers | some | dict(epoch=epoch)).items():
            if 'key frequencies' not in name and 'periods' not in name:  # lists of any length
                out.setdefault(f'snapshot_{name}', []).append(value)
        if sys.stdout.isatty():
            left = (time.perf_counter() - began) / (i + 1) * (len(moments) - i - 1)
            say(f'\r\033[Ksnapshot {i + 1}/{len(moments)}  ETA {left:.0f} s', end='' if left else '\r\033[K')
    return {name: np.array(values) for name, values in out.items()}


def analyse(run):
    """All there is to say of a run: numbers, arrays; written into the folder run.to if there is one."""
    fast_cpu()
    d, solver = run.data, None
    highest = d.classes[0] // 2 if len(set(d.classes)) == 1 else 0
    need(not run.tau or highest, f'--tau is for tasks of one set of classes, and {run.path} has several')
    need(run.tau < (highest or 1), f'--tau must be below {highest}, the highest frequency over the classes')
    try:
        solver = solver_for(run.p, d) if d.modular else None
    except data.Refusal as e:
        run.notes.append(f'nothing about neurons: {e}')
    final, arrays = measure(run, run.weights, 'final', solver)
    key = final.get('key frequencies')
    initial, start = measure(run, run.initial, 'initial', solver, key)
    of_start = start.keys() & {'singular_values', 'wave_shares', *SMALL}
    arrays |= {f'{name}_initial': start[name] for name in sorted(of_start)}
    arrays |= dict(freqs=wave_freqs(d.classes), classes=d.classes, names=d.names)
    arrays |= over_snapshots(run, solver, key) if run.snapshots else run.shipped
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    numbers = dict(config=run.config, epoch=run.epoch, tau=run.tau, final=final, initial=initial)
    run.net.load_state_dict(run.weights)
    if run.to:
        write(run.to / 'analysis.npz', lambda f: np.savez(f, **arrays))
        write(run.to / 'analysis.json', lambda f: f.write(json.dumps(numbers, indent=1).encode()))
    return numbers, arrays


def show(v):
    """A number, a list of them or None as text."""
    if isinstance(v, list):
        return ' '.join(f'({show(x)})' if isinstance(x, list) else show(x) for x in v) or '-'
    if isinstance(v, float):
        return f'{v:.4g}' if abs(v) < 1000 else f'{v:,.0f}'
    return '-' if v is None else f'{v:,}' if isinstance(v, int) else v


def aligned(rows):
    """Rows of values as lines of text; the columns after the first to the right."""
    rows = [[show(v) for v in row] for row in rows]
    first, *widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *values in rows:
        lines.append(f'{name:{first}}' + ''.join(f'  {v:>{width}}' for v, width in zip(values, widths)))
    return '\n'.join(lines)


def table(numbers):
    """The numbers of a run as text, beside their values at initialisation; lists below."""
    o = numbers['config']
    final = numbers['final']
    initial = numbers['initial']
    lists = {name: value for name, value in final.items() if isinstance(value, list)}
    rows = [[name, value, initial.get(name)] for name, value in final.items() if name not in lists]
    title = f'{o["task"]}, p = {o["p"]}, D = {o["d_model"]}, epoch {numbers["epoch"]:,}'
    filtered = [[name, *value] for name, value in lists.items() if name.startswith('filtered')]
    lines = [aligned([[title, 'now', 'at initialisation'], *rows]), '']
    for name, value in lists.items():
        if not name.startswith('filtered'):
            null = initial.keys() - {'key frequencies'}  # those are the final ones
            then = f' (at initialisation {show(initial[name])})' if name in null else ''
            lines.append(f'{name}: {show(value)}{then}')
    if filtered:
        lines.append(aligned([['', *SCORES], *filtered]))
    return '\n'.join(lines)


def formation(run):
    """How the waves of each group come, and how its task is learned: group names (G,), epochs (S,) of the
    recorded spectra, and progress there, from 0 at the first to 1 at the last epoch: that of the share of the
    layer in the waves of the group (S, G), and that of validation accuracy (S, G). At last the progress of
    the waves, (G,), when accuracy is half way for the first time; nan where the task is not learned."""
    r, classes = run.records, run.data.classes
    one_modulus = len(set(classes)) == 1
    names = run.arrays['groups']
    total, alone = r['variance'].T
    share = r['sum_power'] / np.maximum(total - alone, 1e-30)[:, None]
    of_group = r['freqs'][:, int(one_modulus)] == names[:, None]                         # G B
    acc = r['valid_acc'][:, [0] * len(names) if one_modulus else slice(None)]
    waves, learning = ((x - x[0]) / (x[-1] - x[0] + 1e-30) for x in (share @ of_group.T, acc))
    epochs = r['spectra_epoch']
    half = (learning >= 0.5).argmax(0)
    at_half = np.array([np.interp(e, epochs, w) for e, w in zip(half, waves.T)])
    return names, epochs, waves, learning[epochs], np.where(acc[-1] >= LEARNED, at_half, np.nan)


@torch.no_grad()
def surgery(run, names, keep=False):
    """Accuracy of every task on rows that were not trained on, with all neurons, and with the groups of some
    q or k at their means; keep: with all others there. As text. Raises Refusal where a group is empty."""
    d, p = run.data, run.p
    need(d.modular and d.n_ops == 1, f'{run.path} is no network of one operation modulo something')
    one_modulus = len(set(d.classes)) == 1
    logits, acts = run.forward()
    found = neurons(SimpleNamespace(d=d, p=p, acts=acts, solver=solver_for(p, d)))
    owner = owners(found['neuron_wave'], found['neuron_wave_share'], one_modulus)
    there = owner[owner > 0].unique().tolist()
    missing = [name for name in names if name not in there]
    need(not missing, f'{run.path} has no neurons for {show(missing)}; groups there: {show(there)}')
    group = torch.isin(owner, torch.tensor(names)) != keep
    rows = torch.cat(run.rows[1:])
    mean = acts['neurons'].mean(0).expand(len(rows), -1)
    changed = replaced(run.net, logits[rows], acts['neurons'][rows], group, mean)
    _, both = outcome([logits[rows], changed], d.y[rows], d.classes)
    table = [['task', 'all neurons', 'now'], *zip(d.names, *both.tolist())]
    if not one_modulus:
        told = [prime_accuracy(z, d.y[rows], d.classes) for z in (logits[rows], changed)]
        table.append(['prime or not', *told])
    what = 'no others than those' if keep else 'all neurons but those'
    title = f'{run.path} with {what} of {show(names)}: {group.sum()} of {len(group)} are at their means'
    return f'{title}\naccuracy on {len(rows):,} numbers never seen\n{aligned(table)}'


# ---------------------------------------------------------------- what runs came to

def grok_epochs(acc, final):
    """First epoch with accuracy >= 0.99, and the first from which it stays there; None if there is none.
    acc (E,) by epoch, then `final`."""
    up = np.append(acc, final) >= 0.99
    down = np.flatnonzero(~up)
    held = down[-1] + 1 if len(down) else 0
    return int(up.argmax()) if up.any() else None, int(held) if held < len(up) else None


def scores(d, logits, parts, task_weight, valid_acc):
    """What every task came to at the end of a run, a list of dicts, and the objective of each part.

    logits: {part: (n, columns)}, parts: {part: (tokens, targets (n, Q))}. valid_acc (E, Q): validation
    accuracy by epoch, for the epochs of 99 %. Without a modulus the SCORES, too. Where a and b may be
    swapped, also the accuracy on test rows whose swapped pair was trained on, and on the others.
    """
    tasks = [dict(name=name, classes=q) for name, q in zip(d.names, d.classes)]
    p = round(len(d.y) ** 0.5)
    objective = {}
    n = {part: x[::d.n_ops, 0] + p * x[::d.n_ops, 1] for part, (x, _) in parts.items()}
    swapped = torch.isin(n['test'] % p * p + n['test'] // p, n['train'])
    for part, z in logits.items():
        y = parts[part][1]
        loss, acc = task_losses(z, y, d.classes)
        objective[part] = (task_weight @ loss).item()
        for i, task in enumerate(tasks):
            task |= {f'{part}_loss': loss[i].item(), f'{part}_acc': acc[i].item()}
        if not d.modular:
            tasks[0][f'{part}_errors'] = errors(z, y[:, 0])

    def accuracies(rows):
        z, y = logits['test'][rows], parts['test'][1][rows]
        return task_losses(z, y, d.classes)[1].tolist() if rows.any() else [None] * len(tasks)
    of_swapped = accuracies(swapped)
    of_others = accuracies(~swapped)
    for i, task in enumerate(tasks):
        task['grok_epoch'], task['grok_epoch_sustained'] = grok_epochs(valid_acc[:, i], task['valid_acc'])
        grid = d.y[:, i].view(p, p)
        if torch.equal(grid, grid.T):
            task |= dict(test_acc_swapped_seen=of_swapped[i], test_acc_swapped_unseen=of_others[i])
    return tasks, objective


def score_table(tasks):
    """The same as text."""
    columns = dict(train_acc='train acc', valid_acc='valid acc', test_acc='test acc',
                   grok_epoch='valid .99 from epoch', grok_epoch_sustained='for good',
                   test_acc_swapped_seen='test if b,a is trained', test_acc_swapped_unseen='if it is not')
    columns = {name: title for name, title in columns.items() if any(name in task for task in tasks)}
    rows = [['task', *columns.values()]]
    rows += [[task['name'], *(task.get(name) for name in columns)] for task in tasks]
    accs = [np.mean([task[f'{part}_acc'] for task in tasks]).item() for part in ('train', 'valid', 'test')]
    solved = f'{sum(task["valid_acc"] == 1 for task in tasks)} of {len(tasks)} at 1.0'
    rows.append(['mean', *accs, solved, *[''] * (len(columns) - 4)])
    if 'test_errors' in tasks[0]:
        how_far = [['', *SCORES], *([part, *tasks[0][f'{part}_errors']] for part in ('valid', 'test'))]
        return f'\n{aligned(rows)}\n\n{aligned(how_far)}'
    return f'\n{aligned(rows)}'


def rank(root, settings, folders):
    """Rank runs by validation loss in root/sweep.csv, those without a summary last. -> the best, as text."""
    rows = []
    for setting, folder in zip(settings, map(Path, folders)):
        summary = folder / 'summary.json'
        row = setting | dict(valid_loss=np.inf, valid_acc='', grokked='', folder=folder)
        if summary.exists():
            s = json.loads(summary.read_text())
            accs = np.array([task['valid_acc'] for task in s['tasks']])
            row |= dict(valid_loss=s['objective']['valid'], valid_acc=accs.mean())
            row['grokked'] = (accs >= 0.99).sum()
        rows.append(row)
    rows.sort(key=lambda row: row['valid_loss'])
    lines = [','.join(rows[0]), *(','.join(f'"{value}"' for value in row.values()) for row in rows)]
    write(root / 'sweep.csv', lambda f: f.write('\n'.join(lines).encode()))
    done = [f'{row["valid_loss"]:8.4f}  {row["folder"].name}' for row in rows if row['valid_loss'] < np.inf]
    title = f'validation loss / ln q of {len(done)} of {len(rows)} settings, all in {root / "sweep.csv"}'
    return '\n'.join(['', title, *done[:10]])


RESULTS = Path(__file__).parent / 'assets' / 'results.json'  # the runs that the README tells of, a line each


def flags(options):
    """Options as words of a command line."""
    words = [f'--{name}' if value is True else f'--{name}={value}' for name, value in options.items()]
    return shlex.join(words)


def command(r):
    """The options, seeds aside, that make a run with this result, and the note on what else was changed."""
    untold = ('preset', 'seed', 'data_seed', 'snapshots', 'spectra_every')
    told = {name: value for name, value in r['changed'].items() if name not in untold}
    return flags(dict(preset=r['config']['preset']) | told) + f' ({r["note"]})' * bool(r['note'])


def results():
    """What is in the results file: a list of dicts, one per run."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def perfect_from(acc, for_epochs=500):
    """First epoch from which acc (E, Q) is 1 for every task and so many epochs on end, or None."""
    good = np.convolve((acc >= 1).all(1), np.ones(for_epochs), 'valid') > for_epochs - 0.5
    return int(good.argmax()) if good.any() else None


def collect(run):
    """Put what a finished run came to into the results, in the place of one with the same options and seeds:
    its summary, the numbers of its analysis, the epochs by which gradients have had half of their sum."""
    r = run.records
    summary = run.path / 'summary.json'
    need(r and summary.exists(), f'{run.path} holds no finished run')
    s = json.loads(summary.read_text())
    need(s['epochs'] == run.epoch and 'changed' in s, f'{run.path} has gone on since its summary.json')
    half = (r['grad_norm'].cumsum(0) < r['grad_norm'].sum(0) / 2).sum(0).tolist()
    new = s | dict(final=run.final, perfect=perfect_from(r['valid_acc']))
    new['half_of_gradients'] = dict(zip(r['grad_norm_names'].tolist(), half))
    new = json.loads(json.dumps(new), parse_float=lambda text: float(f'{float(text):.4g}'))
    new |= dict(note='', config=s['config'] | dict(out=''), changed=s['changed'])
    with data.claim(RESULTS.parent, wait=True):
        runs = {(command(r), r['config']['seed'], r['config']['data_seed']): r for r in [*results(), new]}
        lines = ',\n'.join(json.dumps(runs[key], separators=(',', ':')) for key in sorted(runs))
        write(RESULTS, lambda f: f.write(f'[\n{lines}\n]\n'.encode()))


def report():
    """The table of all runs in Markdown: a row per setting, a value per seed."""
    def mean_of(part):
        return lambda r: f'{np.mean([task[f"{part}_acc"] for task in r["tasks"]]):.4f}'

    def latest(key):
        return lambda r: show(max((t[key] for t in r['tasks']), key=lambda e: np.inf if e is None else e))

    def solved(r):
        return f'{sum(task["valid_acc"] == 1 for task in r["tasks"])}/{len(r["tasks"])}'

    ways = {'validation': mean_of('valid'), 'tasks at 1.0': solved, 'test': mean_of('test'),
            'all at .99 from epoch': latest('grok_epoch'), 'for good': latest('grok_epoch_sustained')}
    ways['all at 1.0 for 500 epochs, from'] = lambda r: show(r['perfect'])
    ways['minutes'] = lambda r: f'{r["wall_s"] / 60:.3g}'
    groups = {}
    for r in results():
        groups.setdefault(command(r), []).append(r)
    rows = [['`python train.py` with', 'epochs', *ways, 'device'], ['---'] * (len(ways) + 3)]
    for options, runs in groups.items():
        values = [' '.join(way(r) for r in runs) for way in ways.values()]
        devices = ' / '.join(sorted({r['device'] for r in runs}))
        rows.append([f'`{options}`', f'{runs[0]["epochs"]:,}', *values, devices])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def listed(text):
    """'17,23' -> [17, 23]. Raises Refusal."""
    need(re.fullmatch(r'\d{1,9}(,\d{1,9})*', text), f'{text!r} is no list of numbers like 17,23')
    return list(dict.fromkeys(int(number) for number in text.split(',')))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    option = parser.add_argument
    option('runs', nargs='*', metavar='RUN', help='a run folder written by train.py')
    option('--to', metavar='FOLDER', help='write into FOLDER/NAME-OF-RUN, not into the run folder')
    option('--tau', type=int, default=0, help='highest low frequency over the classes (default: 50 of 260)')
    option('--collect', action='store_true', help='also put what the runs came to into assets/results.json')
    option('--report', action='store_true', help='print the table of all runs in there')
    option('--cut', metavar='Q,Q', type=listed, help='instead: accuracies without neurons of these q or k')
    option('--keep', metavar='Q,Q', type=listed, help='instead: accuracies with no other neurons than these')
    option('--embedding', metavar='FILE', help='periods of a matrix with a row per number, .npy or .pt')
    args = parser.parse_args(argv)
    need(args.runs or args.report or args.embedding, 'name a run folder, or --report, or --embedding FILE')
    need(args.tau >= 0 and not (args.tau and args.collect), '--tau is above 0, and not for --collect')
    names = args.cut if args.keep is None else args.keep
    need(args.cut is None or args.keep is None, '--cut or --keep, not both')
    need(names is None or args.runs and not args.collect, '--cut and --keep are for a run, without --collect')
    for path in map(Path, args.runs):
        run = load_run(path, Path(args.to, path.name) if args.to else path, args.tau)
        if names is not None:
            say(surgery(run, names, keep=args.cut is None))
            continue
        run.analysis = analyse(run)
        say(f'{path}\n{table(run.analysis[0])}\nall of it is in {run.to}/analysis.json and analysis.npz\n')
        for note in run.notes:
            say(f'note: {note}')
        if args.collect:
            collect(run)
            say(f'{path} is in {RESULTS} now')
    if args.embedding:
        W = load_matrix(Path(args.embedding))
        need(len(W) >= 8 and (W - W[0]).any(), f'{args.embedding} needs 8 rows that are not all alike')
        found, high, by_chance, *_ = outliers(W)
        found = ', '.join(f'{len(W) / f:.4g} ({height:.3g})' for f, height in zip(found, high)) or 'none'
        say(f'{args.embedding}: {len(W)} rows, {W.shape[1]} columns\nperiods that stand out, and by how many '
            f'times of the spectrum around them (by chance up to {by_chance:.3g}): {found}')
    if args.report:
        say(report())


if __name__ == '__main__':
    data.run_script(main)
