"""From a run folder to numbers: what the weights and activations of a trained model hold. Nothing here trains or draws.

    python analyze.py out/miiii [out/nanda ...]
    python analyze.py out/miiii --ship small/miiii  # a copy to pass on, a twentieth of the size
    python analyze.py out/miiii --collect           # add the run to assets/results.json
    python analyze.py --report                      # the README's tables, printed from there
    python analyze.py --embedding numbers.npy       # any matrix with a row per number: periods that stand out, singular values

Prints a table per run and writes analysis.json (single numbers) and analysis.npz (arrays) into its folder. Every number stands
beside the same number of the same weights at initialisation, its null (copied weights count as they were copied); filters beside
random directions.
"""
import argparse
import io
import itertools
import json
import shlex
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import data
from data import Refusal, load, need, refuse, say, write
from model import Transformer, fast_cpu, task_losses


# ---------------------------------------------------------------------------------------------------- spectra

def fourier_features(rows, periods, width, seed=0, scrambled=False):
    """A stand-in for the number tokens of a pre-trained model (rows, width), rms 0.1: cosine and sine of each
    period in the row number, in random directions. Scrambled, every row has each wave at a random phase."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * len(periods), width, generator=g, dtype=torch.float64)
    turn = torch.arange(rows)[:, None] / torch.tensor(periods, dtype=torch.float64)  # rows, periods
    if scrambled:
        turn = torch.rand(turn.shape, generator=g, dtype=torch.float64)
    W = torch.cat([torch.cos(2 * torch.pi * turn), torch.sin(2 * torch.pi * turn)], 1) @ directions
    return (0.1 * W / W.square().mean().sqrt()).float()


def cos_sin(W):
    """Coefficients of the columns of W (n, D) in the orthonormal real Fourier basis over the rows, without the constant: (2, n//2, D),
    cosines and sines of the frequencies 1 .. n//2. The frequency n/2 of an even n has no sine."""
    z = torch.fft.rfft(W, dim=0, norm='ortho')[1:] * 2 ** 0.5
    if len(W) % 2 == 0:
        z[-1] /= 2 ** 0.5
    return torch.stack([z.real, -z.imag])


def fourier(W):
    """The same with the constant, in the order const, cos 1, sin 1, cos 2, sin 2, ...: (n, D)."""
    return torch.cat([W.mean(0, keepdim=True) * len(W) ** 0.5, cos_sin(W).transpose(0, 1).flatten(0, 1)])[:len(W)]


def density_and_ratio(W):
    """FFD and FCR of the columns of W (p, D): Fourier frequency density and Fourier coefficient ratio (Furuta et al. 2024).

    With c_k and s_k the vectors of cosine and sine coefficients, FFD is the share of the c_k longer than half the longest and of the s_k
    likewise; FCR is the mean over k of the shorter of c_k and s_k by the longer. Where all sines, or all cosines, are below 1e-6 of the
    longest vector, they are rounding and count as zero.
    """
    norms = cos_sin(W).norm(dim=2)                                                   # 2 p//2
    longest = norms.amax(1, keepdim=True)
    norms = norms * (longest > 1e-6 * longest.max())
    dense = norms > 0.5 * longest
    return dense.float().mean(), (norms.amin(0) / norms.amax(0).clamp(min=1e-30)).mean()


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
    """The matrix in a file as the embedding of p digits, (p, width): other widths are brought there by fixed random
    directions, which keep lengths and angles, roughly. Raises Refusal."""
    rows = load_matrix(path)
    need(len(rows) == p, f'{path} has {len(rows)} rows, one for each of {p} digits are needed')
    if rows.shape[1] == width:
        return rows
    say(f'note: {rows.shape[1]} columns of {path}, brought to {width} by a random projection (seed 0)')
    directions = torch.randn(rows.shape[1], width, generator=torch.Generator().manual_seed(0))
    return rows @ directions / width ** 0.5


def by_discrete_log(p):
    """1 .. p-1 in the order of their discrete logarithms: the powers g^0, g^1, ... of the smallest generator g of the residues mod p, (p-1,).
    In that order a product of residues is a sum mod p-1. Raises ValueError if p is not a prime."""
    if p not in data.primes_below(p + 1):
        raise ValueError(f'a discrete logarithm is defined for a prime p, and {p} is not')
    for g in range(1, p):
        powers = [pow(g, i, p) for i in range(p - 1)]
        if len(set(powers)) == p - 1:
            return torch.tensor(powers)


def threshold(spectrum):
    """mean + 2 sd of each column, (n, F) -> (F,): the paper's bar for an active frequency."""
    return spectrum.mean(0) + 2 * spectrum.std(0)


def active(spectrum):
    """How many entries of each column are active: (n, F) -> (F,)."""
    return (spectrum > threshold(spectrum)).sum(0)


def gini(x):
    """Gini coefficient of n values >= 0: 0 if all are equal, near 1 if one has everything."""
    n = len(x)
    return ((2 * torch.arange(1, n + 1) - n - 1) * x.sort().values).sum() / (n * x.sum()).clamp(min=1e-30)


def effective(power):
    """How many of the entries carry it: (sum s)^2 / sum s^2."""
    return power.sum() ** 2 / power.square().sum().clamp(min=1e-30)


def prominences(x):
    """How far each local maximum of x (n,) stands above the higher of the two lowest points between it and what is higher on either side;
    0 for all that is no maximum, and for a flat top."""
    x, out = x.tolist(), [0.0] * len(x)
    for i, top in enumerate(x):
        sides = [x[:i][::-1], x[i + 1:]]
        if all(side[0] < top for side in sides if side):
            valleys = [min(itertools.takewhile(lambda v: v <= top, side)) for side in sides if side]
            out[i] = top - max(valleys)
    return torch.tensor(out)


def spectrum_over_rows(W):
    """How much of each frequency 1 .. n//2 the columns of W (n, D) have over the rows, cosine and sine together: (n//2,)."""
    return cos_sin(W).norm(dim=(0, 2))


SHUFFLES = 50


def without_line(W):
    """W (n, D) less the straight line over the rows that fits each column best: (n, D)."""
    line = torch.linalg.qr(torch.stack([torch.ones(len(W)), torch.arange(len(W)) - (len(W) - 1) / 2], 1)).Q
    return W - line @ (line.T @ W)


def outliers(W, spectrum=spectrum_over_rows):
    """The frequencies k = 2 .. n//2 that stand out in the spectrum over the rows of W (n, D), after `without_line`, against SHUFFLES shuffles of the rows:
    the prominence is larger than any of theirs, which by chance happens to two or three spectra in a hundred. k = 1 is left out: any trend has it. As a
    shuffle spreads all power evenly, a few strong frequencies can hide weak ones.

    -> k (N,), all prominences (n//2,), the largest by chance, spectrum (n//2,), those of the shuffles (SHUFFLES, n//2).
    """
    W, g = without_line(W), torch.Generator().manual_seed(0)
    own, null = spectrum(W), torch.stack([spectrum(without_line(W[torch.randperm(len(W), generator=g)])) for _ in range(SHUFFLES)])
    heights, *chance = (prominences(s).index_fill(0, torch.tensor(0), 0) for s in (own, *null))
    bar = torch.stack(chance).max()
    return (heights > bar).nonzero().flatten() + 1, heights, bar, own, null


def count_to(S, share):
    """How many of some values, the largest first, make a share of their sum."""
    return int((S.cumsum(0) < share * S.sum()).sum()) + 1


def wave_freqs(classes):
    """The pairs (q, k), (B, 2): every q of `classes` with k = 1 .. q//2. The 29 tasks at p = 113 have B = 726."""
    return torch.tensor([(q, k) for q in dict.fromkeys(classes) for k in range(1, q // 2 + 1)])


MAX_MEMORY = 6e9  # bytes: above that no waves are fitted


def wave_memory(p, classes):
    """Bytes that `waves` and `wave_solver` need, about: three times the waves themselves."""
    return 48 * len(wave_freqs(classes)) * p ** 2


def waves(p, classes, stride):
    """The waves that the targets are made of, for numbers and modular sums: cos and sin of 2 pi k (x0 +- stride x1) / q over all p^2 inputs.

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
    """Least-squares fit of all waves of a basis (4, B, p^2) together, through the part of each that neither x0 nor x1 has
    alone (its interaction).

    -> inter (4B, p^2), the interactions of the waves, and gram (4B, 4B) with its inverse inv: b = inter @ a and c = inv @ b are
    the coefficients of an activation a (p^2,), whose own marginals do not matter, and c * b / p^2 is the variance that each
    wave contributes.
    """
    grid = basis.view(-1, p, p)
    inter = (grid - grid.mean(1, keepdim=True) - grid.mean(2, keepdim=True) + grid.mean((1, 2), keepdim=True)).flatten(1)
    gram = inter @ inter.T  # normalised, its eigenvalues run from .048 to 2.02 at p = 113: float32 does
    gram += torch.diag((gram.diagonal() < 1e-3).to(gram.dtype))  # a wave that vanishes has b = c = 0
    return inter, gram, torch.linalg.inv(gram)


def solver_for(p, d):
    """`wave_solver` for the data d. Raises Refusal where it would need too much memory."""
    size = wave_memory(p, d.classes)
    if size > MAX_MEMORY:
        raise Refusal(f'the spectra at p = {p} need {size / 1e9:.0f} GB; --spectra_every 0 does without')
    return wave_solver(p, waves(p, d.classes, d.stride))


def varies(neurons):
    """Which activations (p^2, F) vary over the inputs by more than rounding: at initialisation some are constant. (F,) bool."""
    return neurons.var(0, correction=0) > 1e-6 * neurons.square().mean()


def decompose(neurons, p, solver):
    """Where the variance of each activation (p^2, F) lies; all 0 if it does not vary.

    alive      (F,)       whether it varies
    variance   (F,)       in all
    marginals  (F,)       in functions of x0 alone and of x1 alone; the rest is the interaction
    waves      (2, B, F)  in the sum wave and in the difference wave of each (q, k), cos and sin together. Their sum is what
                          the joint fit explains. White noise has 1/(p-1)^2 of its interaction in each cosine and each sine on
                          average, however alike two waves may be; a single entry can be negative, or more than there is.
    products   (4B, F)    with the interactions of the waves, for `single_waves`
    """
    inter, _, inv = solver
    alive = varies(neurons)
    neurons = neurons * alive
    grid, b = neurons.view(p, p, -1), inter @ neurons                                # x1 x0 F, 4B F
    return dict(alive=alive, variance=neurons.var(0, correction=0), marginals=sum(grid.mean(axis).var(0, correction=0) for axis in (0, 1)),
                products=b, waves=(b * (inv @ b)).view(2, 2, -1, b.shape[1]).sum(1) / p ** 2)


def single_waves(products, p, solver):
    """Variance of each activation that the sum and the difference wave of one (q, k) explain without the others, (B, F), from its
    products with all waves (4B, F): never negative, and never more than its interaction."""
    gram, B = solver[1], len(products) // 4
    b = products.view(4, B, -1)
    blocks = gram.view(4, B, 4, B).diagonal(dim1=1, dim2=3).permute(2, 0, 1)         # B 4 4
    return torch.einsum('ibf,bij,jbf->bf', b, torch.linalg.inv(blocks), b) / p ** 2


def dft2(neurons, p):
    """|2-D DFT| / p^2 of activations (p^2, F) without their means: (p//2+1, p, F), frequencies of x1 and x0. The other half, of
    negative frequencies of x1, mirrors this one. p may be any number here."""
    return torch.fft.rfft2((neurons - neurons.mean(0)).view(p, p, -1), dim=(1, 0), norm='forward').abs()


def best_frequency(dft, variance):
    """The frequency k that has most of the variance (F,) of each activation, from `dft2` (n//2+1, n, F): the share that it has in the bins
    (+-k, 0), (0, +-k), (+-k, +-k) together (Nanda et al. 2023), and k. (F,), (F,)."""
    n = dft.shape[1]
    k, power = torch.arange(1, n // 2 + 1), dft.square()
    folded = power[0, k] + power[0, -k] + 2 * (power[k, 0] + power[k, k] + power[k, -k])    # n//2 F
    if n % 2 == 0:  # n/2 is its own negative
        folded[-1] = power[0, n // 2] + power[n // 2, 0] + power[n // 2, n // 2]
    share, best = (folded / variance.clamp(min=1e-30)).max(0)
    return share, best + 1


def active_counts(dft, alive):
    """How many frequencies are active in `dft2` (p//2+1, p, F), the mean over the neurons that vary, counted in two ways: (2,).

    Bins of a neuron's 2-D DFT (the paper's rule); its frequencies of x1 after the mean over those of x0 (the averaging of the
    paper's code, which looks at one neuron, with another bar).
    """
    bins, averaged = torch.cat([dft, dft[1:]]).flatten(0, 1), dft[1:].mean(1)        # p^2 F, p//2 F
    return torch.stack([(active(x) * alive).sum() for x in (bins, averaged)]) / alive.sum().clamp(min=1)


def neuron_spectra(neurons, p, solver):
    """Spectra of activations (p^2, F) over all inputs, reduced to a dict of small tensors; every mean is over the F neurons.

    spectrum          (p//2+1,) |2-D DFT| / p^2, mean over the frequencies of x0, so that those of x1 remain
    sum_power         (B,) variance in the sum wave of each (q, k)
    difference_power  (B,) variance in the difference wave
    variance          (2,) variance in all, and in the two marginals (functions of x0 alone and of x1 alone)
    active            (2,) see `active_counts`
    """
    parts, dft = decompose(neurons, p, solver), dft2(neurons, p)
    return dict(spectrum=dft.mean((1, 2)), sum_power=parts['waves'][0].mean(1), difference_power=parts['waves'][1].mean(1),
                variance=torch.stack([parts['variance'].mean(), parts['marginals'].mean()]), active=active_counts(dft, parts['alive']))


@torch.no_grad()
def spectra_of(model, d, solver, precision):
    """`neuron_spectra` of a model over all inputs of the data d. precision: the autocast of its products; the fit of the waves has none."""
    acts, n_pairs = {}, len(d.y)
    with precision:
        model(d.x, acts=acts)
    return neuron_spectra(acts['neurons'].float().view(n_pairs, -1), round(n_pairs ** 0.5), solver)


def carried(share, p):
    """Which (q, k) a layer carries, (..., B) bool, from the share of its interaction in each sum wave (..., B): those with more than
    the average (q, k), and more than ten times what white noise has (twenty for q = 2, which has no sine). In 28 random networks (14 seeds of miiii and of nanda,
    p = 113) none had more than 7.7 times."""
    return share > share.mean(-1, keepdim=True).clamp(min=20 / (p - 1) ** 2)


# ---------------------------------------------------------------------------------------------------- parts of a model
# each returns two dicts, of numbers (and short lists) and of arrays, for the weights of one moment

def embedding(W):
    """W_E of the digits (p, D): singular values and p-DFT over the tokens (figures 8 to 13 of the paper)."""
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    norms = spectrum_over_rows(W)
    numbers = dict(W_E_n50=count_to(S, 0.5), W_E_n90=count_to(S, 0.9), W_E_active=active(norms[:, None])[0], W_E_gini=gini(norms), W_E_effective=effective(norms.square()),
                   W_E_periods=len(W) / outliers(W)[0])
    return numbers, dict(singular_values=S, left_vectors=U, W_E_fourier=fourier(W), W_E_norms=norms)


def positions(W_pos):
    """Pearson correlation of the embeddings of positions 0 and 1 (figure 7); 0 where it is not defined."""
    a, b = W_pos[:2] - W_pos[:2].mean(1, keepdim=True)
    return dict(W_pos_pearson=a @ b / (a.norm() * b.norm()).clamp(min=1e-30)), dict(W_pos=W_pos.clone())


def attention(att, p):
    """Attention of the last token, (p^2, 3, H O), each head under each of O operations. The score of a head, its mean attention to x0 less that to x1, is +1 if it attends x0
    alone, -1 if x1 alone, 0 if both alike."""
    x0, x1, _ = att.mean(0)
    return dict(attention_score=x0 - x1), dict(attention=att[:, 0].T.view(-1, p, p).mT)       # H, H x0 x1


def mlp(neurons, p, freqs, solver):
    """The MLP layer over all inputs (p^2, F), or those of each operation side by side: neuron by neuron, in the p-DFT and in the waves of the targets.

    A neuron's DFT share is the part of its variance at its best frequency k of the p-DFT: bins (+-k, 0), (0, +-k), (+-k, +-k)
    (Nanda et al. 2023). Its wave share is the part of its interaction that the sum and the difference wave of its best (q, k)
    explain. A neuron that does not vary has 0 of everything.
    """
    parts, dft = decompose(neurons, p, solver), dft2(neurons, p)
    alive, total, inter = parts['alive'], parts['variance'], (parts['variance'] - parts['marginals']).clamp(min=1e-30)
    split = torch.stack([parts['marginals'], *parts['waves'].sum(1), inter - parts['waves'].sum((0, 1))])   # 4 F

    k_share, k_best = best_frequency(dft, total)
    k_share = k_share * alive
    wave_share, wave_best = (single_waves(parts['products'], p, solver) / inter * alive).max(0)
    share = parts['waves'].mean(2) / inter.mean()                                    # 2 B, of the layer's interaction
    has, pure = carried(share[0], p), wave_share > 0.5
    purest = (wave_share * (freqs[wave_best, 0] > 3)).argmax()                       # mod 2 and 3 a wave is no picture
    shown = torch.stack([*torch.arange(3), purest])

    numbers = dict(zip(('marginals', 'sum_waves', 'difference_waves', 'rest'), split.mean(1) / total.mean().clamp(min=1e-30)))
    numbers |= dict(zip(('active_bins', 'active_averaged'), active_counts(dft, alive)))
    numbers |= dict(waves=has.sum(), waves_effective=effective(share[0].clamp(min=0)), primes=len(freqs[has, 0].unique()))
    numbers |= dict(neurons_alive=alive.sum(), dft_share=k_share.median(), wave_share=wave_share.median())
    numbers |= dict(pure=pure.sum(), clusters=len(wave_best[pure].unique()))
    return numbers, dict(
        spectrum=dft.mean((1, 2)), neuron_ids=shown, neurons=neurons[:, shown].T.view(-1, p, p).mT, neurons_dft=dft[..., shown].permute(2, 1, 0),
        wave_shares=share, neuron_split=split / total.clamp(min=1e-30) * alive, neuron_wave=freqs[wave_best], neuron_wave_share=wave_share,
        neuron_k=k_best, neuron_k_share=k_share)


def polynomials(net, p):
    """Targets mod p: W_E of the digits and the map from neurons to logits W_L = W_out W_U, in the Fourier basis of the residues and in the
    multiplicative one (mult): residues 1 .. p-1 in the order of their discrete logarithms, DFT of length p-1 (Furuta et al. 2024).

    The centre is the residue z about which W_E is sparsest, its rows z+1, z+2, ... in the order of the logarithms of 1, 2, ...: 0 for a
    product, p-1 for (a+1)(b+1), any residue if W_E is sparse about none.
    """
    numbers, arrays, by_log = {}, {}, by_discrete_log(p)
    for name, W in (('W_E', net.W_E[:p]), ('W_L', (net.W_out @ net.W_U).T)):         # p D, p F
        null = torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
        for key, matrix in ((name, W), (f'{name}_null', null)):
            numbers[f'{key}_FFD'], numbers[f'{key}_FCR'] = density_and_ratio(matrix)
        for basis, rows in ((name, W), (f'{name}_mult', W[by_log])):
            arrays[f'{basis}_cos_sin'] = parts = cos_sin(rows).norm(dim=2)           # 2 n//2
            norms = parts.square().sum(0).sqrt()
            numbers[f'{basis}_gini'], numbers[f'{basis}_effective'] = gini(norms), effective(norms.square())
            numbers[f'{basis}_key'] = (norms > threshold(norms[:, None])).nonzero().flatten() + 1
    about = torch.stack([gini(spectrum_over_rows(net.W_E[(z + by_log) % p])) for z in range(p)])
    return numbers | dict(centre=about.argmax(), centre_gini=about.max()), arrays | dict(by_log=by_log)


def sharp(neurons, k_share, p, n_ops):
    """How many neurons (p^2, O F) have more than 85 % of their variance at one frequency, operation by operation: over the residues, by
    the share of `best_frequency` given (O F,), and over the discrete logarithms of both digits, which then are 1 .. p-1."""
    by_log = by_discrete_log(p)
    units = neurons.view(p, p, -1)[by_log][:, by_log].flatten(0, 1)
    mult_share = best_frequency(dft2(units, p - 1), units.var(0, correction=0))[0] * varies(units)
    return {name: (share > 0.85).view(n_ops, -1).sum(1) for name, share in (('sharp', k_share), ('sharp_mult', mult_share))}, {}


def components(net, x):
    """What each part of the network writes into the residual stream of the last position, (2 + H, n, D): the token "=" itself (embedding and
    position), each head, the MLP. Their sum times W_U is the logits of tokens x (n, 3)."""
    acts, z = {}, net.W_E[x] + net.W_pos                                             # n T D
    net(x, acts=acts)
    values = torch.einsum('ntd,hdk->nthk', z, net.W_V)                               # n T H K
    heads = torch.einsum('nth,nthk,hkd->hnd', acts['att'], values, net.W_O)
    return torch.cat([z[None, :, -1], heads, (acts['neurons'] @ net.W_out)[None]])


def without(W_U, k):
    """The projection (D, D) that takes the frequencies k over the classes out of whatever W_U (D, C) reads: the nearest vector whose logits
    have none of them (Zhou et al. 2024). Its rank is what is left of D: nothing, if D is no more than the number of cosines and sines.
    Other frequencies change too, unless W_U has orthogonal directions for each."""
    A = cos_sin(W_U.T)[:, k - 1].flatten(0, 1)                                       # 2n D
    _, S, V = torch.linalg.svd(A, full_matrices=False)
    V = V[S > 1e-5 * S[0]]
    return torch.eye(len(W_U), dtype=W_U.dtype) - V.T @ V


SCORES = ('accuracy', 'within 2', 'within 10', 'errors off by tens', 'errors off by 1')  # the last two as shares of what is wrong


def errors(logits, y, modulus=None):
    """The five numbers SCORES of logits (n, C) against true answers y (n,), where a tie is wrong; modulo something the distance of an error
    is the shorter way round."""
    right = logits.gather(1, y[:, None])[:, 0]
    best_wrong, guess = logits.scatter(1, y[:, None], -torch.inf).max(1)
    off = torch.where(right > best_wrong, 0, (guess - y).abs())
    off = torch.minimum(off, modulus - off) if modulus else off
    wrong = (off > 0).sum().clamp(min=1)
    return [*((off <= d).sum() / len(off) for d in (0, 2, 10)), ((off > 0) & (off % 10 == 0)).sum() / wrong, (off == 1).sum() / wrong]


def output(W_U, parts, tau):
    """The logits of each part of the network alone, from its `components` (2 + H, n, D): their spectrum over the C classes, the mean amplitude
    over the pairs; the share of power at k <= tau; the periods C / k that stand out for the first 1,000 pairs."""
    def amplitudes(part, W_U):
        return torch.fft.rfft(part @ W_U, dim=1)[:, 1:].abs()                        # n C//2
    numbers, spectra = dict(low_share=[], periods=[]), []
    for part in parts:
        a = amplitudes(part, W_U)
        spectra.append(a.mean(0))
        numbers['low_share'].append(a[:, :tau].square().sum() / a.square().sum().clamp(min=1e-30))
        numbers['periods'].append(W_U.shape[1] / outliers(W_U.T, lambda W: amplitudes(part[:1000], W.T).mean(0))[0])
    return numbers, dict(class_spectra=torch.stack(spectra))


def filters(net, parts, y, modulus, tau, draws=3):
    """What a network can do without the low (k <= tau) or the high frequencies over the classes in what its attention, its MLP or both write
    into the residual stream (Zhou et al. 2024). filters: for each SCORES, and as a null SCORES without as many random directions, the mean of some draws, None if no dimension is left.
    What attention writes is filtered before the MLP reads it. left_without_*: how many dimensions the filter leaves."""
    D, k, g = len(net.W_U), torch.arange(1, net.W_U.shape[1] // 2 + 1), torch.Generator().manual_seed(0)
    everything = torch.eye(D)

    def scores(attention, *mlps):
        mid = parts[0] + parts[1:-1].sum(0) @ attention
        wrote = (mid @ net.W_in).relu() @ net.W_out
        return [errors((mid + wrote @ mlp) @ net.W_U, y, modulus) for mlp in mlps]

    numbers, rows = {}, dict(nothing=[scores(everything, everything)[0], None])
    for band, some in (('low', k[:tau]), ('high', k[tau:])):
        tried = [without(net.W_U, some)]                                             # and then the random ones
        left = numbers[f'left_without_{band}'] = round(tried[0].trace().item())
        for _ in range(draws if left else 0):
            Q = torch.linalg.qr(torch.randn(D, D - left, generator=g)).Q
            tried.append(everything - Q @ Q.T)
        mlp, (attention, both) = scores(everything, *tried), zip(*(scores(P, everything, P) for P in tried))
        for where, (row, *null) in (('MLP', mlp), ('attention', attention), ('both', both)):
            rows[f'{band} from {where}'] = [row, torch.tensor(null).mean(0) if null else None]
    return numbers | dict(filters=rows)


def mechanism(logits, d, train_rows, key=None):
    """How a network that adds modulo p does it, from its logits (p^2, p) over all inputs (Nanda et al. 2023, sections 4 and 5).

    profile (p,): the centred logits as a function of x0 + x1 - c, averaged over the inputs. fit (p//2,): share of their variance
    in cos(w_k (x0 + x1 - c)). Key frequencies: those with more than 1 %. Restricted loss: of the logits' projection on the key
    frequencies' waves in x0 + x1 and on the mean, over all inputs. Excluded loss: without these waves, over the training rows.
    """
    p = logits.shape[1]
    s, c, k = (d.x[:, 0] + d.x[:, 1]) % p, torch.arange(p), torch.arange(1, p // 2 + 1)
    centred = logits - logits.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    profile = centred.gather(1, (s[:, None] - c) % p).mean(0)
    amplitude = torch.fft.rfft(profile).real[1:] * 2 / p
    fit = amplitude.square() / 2 / centred.square().mean().clamp(min=1e-30)
    key = k[fit > 0.01] if key is None else key
    phase = 2 * torch.pi / p * (s[:, None] * key % p)
    basis = torch.cat([phase.cos(), phase.sin()], 1) * (2 / p ** 2) ** 0.5           # p^2 2n, orthonormal
    kept = basis @ (basis.T @ logits)

    def loss(z, rows):
        return task_losses(z[rows], d.y[rows], d.classes)[0][0]
    numbers = dict(key_frequencies=key, cos_fit=fit.sum(), restricted_loss=loss(logits.mean(0) + kept, slice(None)),
                   excluded_loss=loss(logits - kept, train_rows), full_loss=loss(logits, slice(None)))
    return numbers, dict(profile=profile, fit=fit, amplitude=amplitude)


def recorded_share(records):
    """Share of the layer's interaction in each sum wave, from the spectra in metrics.npz: (E, B)."""
    return records['sum_power'] / np.maximum(records['variance'][:, :1] - records['variance'][:, 1:], 1e-30)


def grok_epochs(acc, final):
    """First epoch with accuracy >= 0.99, and the first from which it stays there to the end, or None. acc (E,), then `final`."""
    up = np.append(acc, final) >= 0.99
    down = np.flatnonzero(~up)
    held = down[-1] + 1 if len(down) else 0
    return int(up.argmax()) if up.any() else None, int(held) if held < len(up) else None


def scores(d, logits, parts, task_weight, valid_acc):
    """What every task came to at the end of a run, a list of dicts, and the objective of each part of the split.

    logits: {part: (n, columns)}, parts: {part: (tokens, targets (n, Q))} for train, valid, test. valid_acc (E, Q): validation accuracy by epoch, for the epochs of 99 %, see `grok_epochs`. Without a modulus with the five numbers of `errors`.
    """
    tasks = [dict(name=name, classes=q) for name, q in zip(d.names, d.classes)]
    objective = {}
    for part, z in logits.items():
        loss, acc = task_losses(z, parts[part][1], d.classes)
        objective[part] = (task_weight @ loss).item()
        for i, task in enumerate(tasks):
            task |= {f'{part}_loss': loss[i].item(), f'{part}_acc': acc[i].item()}
        if not d.modular:
            tasks[0][f'{part}_errors'] = plain(errors(z, parts[part][1][:, 0]))
    for i, task in enumerate(tasks):
        task['grok_epoch'], task['grok_epoch_sustained'] = grok_epochs(valid_acc[:, i], task['valid_acc'])
    return tasks, objective


def score_table(tasks):
    """The same as lines of text."""
    lines = ['', f'{"task":18s} {"train acc":>9s} {"valid acc":>9s} {"test acc":>9s} {"valid >= .99 from epoch":>24s} {"for good":>9s}']
    accs = np.array([[task[f'{part}_acc'] for part in ('train', 'valid', 'test')] for task in tasks])
    for task, row in zip(tasks, accs):
        epochs = [task['grok_epoch'], task['grok_epoch_sustained']]
        first, held = ('-' if epoch is None else f'{epoch:,}' for epoch in epochs)
        lines.append(f'{task["name"]:18s}' + ''.join(f' {acc:9.4f}' for acc in row) + f' {first:>24s} {held:>9s}')
    solved = f'{(accs[:, 1] == 1).sum()} of {len(tasks)} at 1.0'
    lines.append(f'{"mean":18s}' + ''.join(f' {acc:9.4f}' for acc in accs.mean(0)) + f' {solved:>24s}')
    for part in ('valid', 'test') if 'test_errors' in tasks[0] else ():
        named = zip(SCORES, tasks[0][f'{part}_errors'])
        lines.append(f'{part}: ' + ', '.join(f'{name} {value:.4f}' for name, value in named))
    return '\n'.join(lines)


def rank(root, settings, folders):
    """Rank runs by validation loss in root/sweep.csv, those without a summary last. settings: list of dicts. -> text."""
    rows = []
    for setting, folder in zip(settings, folders):
        summary = Path(folder, 'summary.json')
        row = setting | dict(valid_loss=np.inf, valid_acc='', grokked='', epochs='', wall_s='', folder=folder)
        if summary.exists():
            s = json.loads(summary.read_text())
            accs = np.array([task['valid_acc'] for task in s['tasks']])
            row |= dict(valid_loss=s['objective']['valid'], valid_acc=accs.mean(), grokked=(accs >= 0.99).sum(),
                        epochs=s['epochs'], wall_s=s['wall_s'])
        rows.append(row)
    rows.sort(key=lambda row: row['valid_loss'])
    lines = [','.join(rows[0])] + [','.join(f'"{value}"' for value in row.values()) for row in rows]
    write(root / 'sweep.csv', lambda f: f.write('\n'.join(lines).encode()))
    best = [f'{row["valid_loss"]:8.4f}  {Path(row["folder"]).name}' for row in rows[:10] if row['epochs'] != '']
    done = sum(row['epochs'] != '' for row in rows)
    return '\n'.join(['', f'validation loss / ln q of {done} of {len(rows)} settings, all in {root / "sweep.csv"}', *best])


# ---------------------------------------------------------------------------------------------------- a run

def network(o, d):
    """A new model for the data d by the options o, a dict. Formulas share their columns: the operation token tells them apart."""
    n_classes, n_tasks = sum(d.classes) // d.n_ops, len(d.classes) // d.n_ops
    return Transformer(o['p'], o['d_model'], o['n_heads'], n_classes, d.n_ops, n_tasks, o.get('init', 'he'))


def load_records(folder, classes, epoch):
    """metrics.npz of a run, checked and cut to the epochs before the checkpoint; {} if there is none or it is of another run."""
    try:
        r = dict(np.load(io.BytesIO(Path(folder, 'metrics.npz').read_bytes())))
        Q, B = len(classes), len(wave_freqs(classes))
        widths = dict(train_loss=Q, train_acc=Q, valid_loss=Q, valid_acc=Q, grad_norm=len(r['grad_norm_names']))
        spectra = dict(sum_power=B, variance=2, active=2) if 'spectra_epoch' in r else {}
        for name, width in (widths | spectra).items():
            r[name] = r[name][:epoch if name in widths else int((r['spectra_epoch'] < epoch).sum())]
            if r[name].shape[1:] != (width,) or name in widths and len(r[name]) != epoch:
                return {}
        for name in ('epoch', 'spectra_epoch'):
            if name in r:
                r[name] = r[name][r[name] < epoch]
    except Exception:  # numpy raises many types on a damaged file
        return {}
    return r


class Folder:
    """A run folder, checked: options, data, network, weights now, at initialisation and at the snapshots, records (metrics.npz, {}
    without). `missing` says what is not there. Raises Refusal."""

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / 'ckpt.pt').exists():
            raise Refusal(f'{path} is no run folder: there is no {self.path / "ckpt.pt"}')
        ckpt = load(self.path / 'ckpt.pt')
        try:
            o = self.config = ckpt['config']
            self.p, self.epoch = o['p'], int(ckpt['step'])
            self.data = data.make(o['task'], self.p, o['data_seed'])
            self.rows = data.split(self.p ** 2, o['train_frac'], o['data_seed'])
            torch.manual_seed(o['seed'])  # train.py starts there
            self.net = network(o, self.data).requires_grad_(False)
        except Exception as e:
            raise Refusal(f'{path}/ckpt.pt is not of this program: {" ".join(repr(e).split())[:150]}')
        self.initial = {n: w.clone() for n, w in self.net.state_dict().items()}
        self.final = ckpt['model']
        self.use(self.final, 'ckpt.pt')

        self.snapshots, self.missing = {self.epoch: self.final}, []
        for file in sorted((self.path / 'snapshots').glob('*.pt')):
            try:
                snap = load(file, ('model', 'step'))
                self.use(snap['model'], file)
                if int(file.stem) <= self.epoch:  # a run that was killed can have later ones than its checkpoint
                    self.snapshots[int(file.stem)] = snap['model']
            except (Refusal, ValueError) as e:
                self.missing.append(f'{e}; going on without it')
        self.initial = self.snapshots.get(0, self.initial)
        if o.get('init_from') and 0 not in self.snapshots:
            self.missing.append(f'{path} began with copied weights, and has no snapshot of them: "at initialisation" is before they were copied')
        self.shipped = {}  # numbers of snapshots that are not here
        if (self.path / 'snapshots.npz').exists():
            try:
                self.shipped = dict(np.load(io.BytesIO((self.path / 'snapshots.npz').read_bytes())))
            except Exception as e:  # numpy raises many types on a damaged file
                self.missing.append(f'{path}/snapshots.npz cannot be read ({type(e).__name__}); going on without it')
        if len(self.snapshots) == 1 and not self.shipped:
            self.missing.append(f'{path} has no weight snapshots: nothing over snapshots')
        self.records = load_records(self.path, self.data.classes, self.epoch)
        if self.epoch and not self.records:
            self.missing.append(f'{path} has no metrics.npz of this run and version: no grokking epochs, no curves over epochs')
        elif self.epoch and self.data.modular and 'spectra_epoch' not in self.records:
            self.missing.append(f'{path} recorded no spectra: between the snapshots no frequencies')

    def use(self, weights, name):
        """Put weights into the network. Raises Refusal if they are of another p or size, or not finite."""
        o = self.config
        try:
            self.net.load_state_dict(weights)
        except Exception:
            raise Refusal(f'{name} is not of a run with task {o["task"]}, p = {o["p"]}, d_model = {o["d_model"]}, n_heads = {o["n_heads"]}')
        if not all(w.isfinite().all() for w in self.net.parameters()):
            raise Refusal(f'{name} has weights that are not finite')


@torch.no_grad()
def measure(run, weights, solver, key=None):
    """Everything about the weights of one moment: numbers (floats and lists) and arrays. key: key frequencies, if not its own."""
    run.use(weights, 'weights')
    net, d, acts = run.net, run.data, {}
    p, logits = run.p, net(d.x, acts=acts).view(len(d.y), -1)
    neurons = acts['neurons'].view(p * p, -1)                                        # p^2 F, of each operation side by side
    heads = acts['att'].view(p * p, d.n_ops, 3, -1).permute(0, 2, 3, 1).flatten(2)   # p^2 T H, each by operation
    parts = [embedding(net.W_E[:p]), positions(net.W_pos), attention(heads, p)]
    if solver:
        layer = mlp(neurons, p, wave_freqs(d.classes), solver)
        parts.append(layer)
    if set(d.classes) == {p}:
        parts.append(polynomials(net, p))
        parts.append(({}, dict(pattern=logits.view(p, p, d.n_ops, p)[..., 1].permute(2, 1, 0))))  # O x0 x1, the logits of class 1
        if solver:
            parts.append(sharp(neurons, layer[1]['neuron_k_share'], p, d.n_ops))
    if len(d.classes) == 1 and torch.equal(d.y[:, 0], (d.x[:, 0] + d.x[:, 1]) % p):
        parts.append(mechanism(logits, d, run.rows[0], key))
    for part, rows in zip(('train', 'valid'), run.rows):
        loss, acc = task_losses(logits[rows], d.y[rows], d.classes)
        parts.append(({f'{part}_losses': loss, f'{part}_accuracies': acc}, {}))
    numbers, arrays = {}, {}
    for some_numbers, some_arrays in parts:
        numbers |= plain(some_numbers)
        arrays |= some_arrays
    return numbers, arrays


def plain(v):
    """Numbers out of tensors, in dicts and lists too."""
    if isinstance(v, dict):
        return {k: plain(x) for k, x in v.items()}
    return v.tolist() if isinstance(v, torch.Tensor) else [plain(x) for x in v] if isinstance(v, list) else v


def over_snapshots(run, solver, key):
    """The numbers of every snapshot and of the final weights as arrays, with their spectra: snapshot_NAME, in the order of snapshot_epoch."""
    out, began, epochs = {}, time.perf_counter(), sorted(run.snapshots)
    for i, epoch in enumerate(epochs):
        numbers, arrays = measure(run, run.snapshots[epoch], solver, key)
        numbers = {k: v for k, v in numbers.items() if 'key' not in k and 'periods' not in k}  # lists of any length
        numbers |= dict(epoch=epoch) | {k: arrays[k] for k in ('W_E_norms', 'spectrum') if k in arrays}
        for name, value in numbers.items():
            out.setdefault(f'snapshot_{name}', []).append(value)
        if sys.stdout.isatty():
            left = (time.perf_counter() - began) / (i + 1) * (len(epochs) - i - 1)
            print(f'\r\033[Ksnapshot {i + 1}/{len(epochs)}  ETA {left:.0f} s', end='' if left else '\r\033[K', flush=True)
    return {k: np.array(v) for k, v in out.items()}


def grokking(run, final, snaps):
    """Per task the epoch of 99 % validation accuracy, first and for good, that of 99 % training accuracy, and the lag between.

    Training accuracy is recorded with dropout; without it, it is known at the snapshots. The earlier epoch of the two counts: it
    had happened by then.
    """
    out, r = [], run.records
    for i, name in enumerate(run.data.names if r else []):
        first, held = grok_epochs(r['valid_acc'][:, i], final['valid_accuracies'][i])
        fitted = np.flatnonzero(r['train_acc'][:, i] >= 0.99).tolist()
        if snaps:
            fitted += snaps['snapshot_epoch'][snaps['snapshot_train_accuracies'][:, i] >= 0.99].tolist()
        train = min(fitted, default=None)
        out.append(dict(name=name, first=first, sustained=held, train=train, lag=None if None in (first, train) else first - train))
    return out


def omega(run, snaps):
    """Active frequencies through training, from the recorded spectra (in the precision of the run) and the snapshots (float32):
    omega_epoch (E,), omega_counts (E, 3), the two of `active_counts` and the (q, k) carried, omega_spectrum (E, p//2+1)."""
    at, r = {}, run.records
    if 'spectra_epoch' in r:
        counts = np.column_stack([r['active'], carried(torch.from_numpy(recorded_share(r)), run.p).sum(1)])
        at |= {e: row for e, *row in zip(r['spectra_epoch'].tolist(), counts, r['spectrum'])}
    if snaps:
        counts = np.column_stack([snaps[f'snapshot_{k}'] for k in ('active_bins', 'active_averaged', 'waves')])
        at |= {e: row for e, *row in zip(snaps['snapshot_epoch'].tolist(), counts, snaps['snapshot_spectrum'])}
    epochs = sorted(at)
    return dict(omega_epoch=epochs, omega_counts=[at[e][0] for e in epochs], omega_spectrum=[at[e][1] for e in epochs]) if at else {}


def analyse(path, tau=0):
    """One run folder -> its numbers, written to analysis.json, and notes on what is missing; its arrays go to analysis.npz."""
    fast_cpu()
    run = Folder(path)
    d, p, solver = run.data, run.p, None
    if len(set(d.classes)) == 1:
        tau = tau or max(1, round(50 / 260 * (d.classes[0] // 2)))                   # that of Zhou et al. 2024
        if tau >= d.classes[0] // 2:
            raise Refusal(f'--tau {tau}: the frequencies over {d.classes[0]} classes run to {d.classes[0] // 2}, and some must be higher')
    elif tau:
        raise Refusal(f'--tau is for tasks of one set of classes, and {path} has {len(set(d.classes))}')
    if d.modular and wave_memory(p, d.classes) < MAX_MEMORY:
        solver = wave_solver(p, waves(p, d.classes, d.stride))
    elif d.modular:
        run.missing.append(f'the waves at p = {p} need {wave_memory(p, d.classes) / 1e9:.0f} GB: nothing about neurons')
    final, arrays = measure(run, run.final, solver)
    key = torch.tensor(final['key_frequencies'], dtype=torch.long) if 'key_frequencies' in final else None
    initial, start = measure(run, run.initial, solver, key)
    if tau:
        rows = run.rows[2][:int(2e8 / sum(d.classes))]
        if len(rows) < len(run.rows[2]):
            run.missing.append(f'the logits of the parts are of {len(rows):,} test rows, to spare memory')
        x, y = d.part(rows)
        for weights, numbers, some in ((run.initial, initial, start), (run.final, final, arrays)):
            run.use(weights, 'weights')
            parts = components(run.net, x)
            shares, spectra = output(run.net.W_U, parts, tau)
            numbers |= plain(shares)
            some |= spectra
        # the loop has left the final weights in the network, and their parts
        final |= plain(filters(run.net, parts, y.flatten(), d.classes[0] if d.modular else None, tau)) | dict(tau=tau)
    snaps = over_snapshots(run, solver, key) if len(run.snapshots) > 1 else run.shipped
    arrays |= {f'{k}_initial': start[k] for k in ('singular_values', 'W_E_norms', 'wave_shares') if k in start} | snaps
    if solver:
        arrays |= omega(run, snaps)
    numbers = dict(config=run.config, epoch=run.epoch, final=final, initial=initial, grokking=grokking(run, final, snaps))
    arrays |= dict(freqs=wave_freqs(d.classes), classes=d.classes, names=d.names)
    write(run.path / 'analysis.npz', lambda f: np.savez(f, **{k: np.asarray(v) for k, v in arrays.items()}))
    write(run.path / 'analysis.json', lambda f: f.write(json.dumps(numbers, indent=1).encode()))
    return numbers, run.missing


def analyse_matrix(path):
    """Any matrix with a row per number (.npy or .pt): its spectrum over the rows, the periods that stand out beside shuffles of the rows,
    singular values. -> numbers, arrays. Raises Refusal."""
    W = load_matrix(Path(path))
    if len(W) < 8:
        raise Refusal(f'{path} has {len(W)} rows, a spectrum over them needs 8')
    if not (W - W[0]).any():
        raise Refusal(f'{path} has the same numbers in all rows')
    S, (peaks, heights, bar, spectrum, null) = torch.linalg.svdvals(W), outliers(W)
    numbers = dict(rows=len(W), columns=W.shape[1], periods=len(W) / peaks, prominences=heights[peaks - 1], by_chance=bar, n50=count_to(S, 0.5), n90=count_to(S, 0.9))
    return plain(numbers), dict(spectrum=spectrum, null=null, peaks=peaks, singular_values=S)


def matrix_table(path, n):
    """The numbers of `analyse_matrix` as lines of text."""
    peaks = ', '.join(f'{period:.3g} ({height:.3g})' for period, height in zip(n['periods'], n['prominences'])) or 'none'
    return '\n'.join([f'{path}: {n["rows"]} rows, {n["columns"]} columns', f'periods that stand out of the spectrum over the rows (prominence): {peaks}',
                      f'  the largest prominence in {SHUFFLES} shuffles of the rows: {n["by_chance"]:.3g}',
                      f'singular values that make 50 % of their sum: {n["n50"]}; 90 %: {n["n90"]}'])


# ---------------------------------------------------------------------------------------------------- the table

LABELS = dict(
    W_E_n50='W_E (digits): singular values to 50 % of their sum',
    W_E_n90='                              to 90 %',
    W_E_active='  frequencies of its p-DFT above mean + 2 sd',
    W_E_effective='  effective number of them, of p//2',
    W_E_gini='  Gini of their norms',
    W_E_periods='  periods that stand out',
    W_pos_pearson='W_pos: Pearson correlation of positions 0 and 1',
    attention_score='heads: +1 attends x0 alone, -1 x1 alone',
    marginals='neurons, share of variance: in x0 or x1 alone',
    sum_waves='  in the sum waves of the (q, k)',
    difference_waves='  in their difference waves',
    rest='  in the rest',
    active_bins="active frequencies: bins of a neuron's 2-D DFT",
    active_averaged='  of x1, averaged over those of x0',
    waves='(q, k) carried by the layer, without leakage',
    waves_effective='  effective number of them',
    primes='  primes q among them',
    neurons_alive='neurons that vary over the inputs',
    dft_share='  median variance at best k of the p-DFT',
    wave_share='  median interaction at best (q, k)',
    pure='  with more than half of it there',
    clusters='  (q, k) that these have in all',
    key_frequencies='key frequencies: > 1 % of the logits now',
    cos_fit='logits: share in cos(w_k (x0 + x1 - c)), all k',
    full_loss='loss on all inputs',
    restricted_loss='  restricted to the key frequencies',
    excluded_loss='  on training inputs, without them',
    W_E_FFD='W_E (digits): Fourier frequency density FFD',
    W_E_null_FFD='    that of a Gaussian matrix',
    W_E_FCR='  Fourier coefficient ratio FCR',
    W_E_null_FCR='    that of a Gaussian matrix',
    W_E_key='  frequencies above mean + 2 sd',
    W_E_mult_effective='  by discrete logarithms: effective number',
    W_E_mult_gini='    Gini of their norms',
    W_E_mult_key='    above mean + 2 sd',
    centre='    residue about which that Gini is highest',
    centre_gini='    that Gini',
    W_L_FFD='W_L = W_out W_U: FFD',
    W_L_null_FFD='    that of a Gaussian matrix',
    W_L_FCR='  FCR',
    W_L_null_FCR='    that of a Gaussian matrix',
    W_L_effective='  effective number of frequencies',
    W_L_gini='  Gini of their norms',
    W_L_key='  frequencies above mean + 2 sd',
    W_L_mult_effective='  by discrete logarithms: effective number',
    W_L_mult_gini='    Gini of their norms',
    W_L_mult_key='    above mean + 2 sd',
    sharp='neurons with more than 85 % at one frequency',
    sharp_mult='  by discrete logarithms',
    low_share='logits, share in low frequencies: "=", heads, MLP',
    periods='  periods that stand out, in classes')


def table(numbers):
    """The numbers of a run as lines of text, beside their values at initialisation."""
    def show(v):
        if isinstance(v, list):
            return ' '.join(','.join(map(show, x)) or '-' if isinstance(x, list) else show(x) for x in v) or '-'
        return f'{v:,}' if isinstance(v, int) else f'{v:.3g}' if abs(v) < 1000 else f'{v:,.0f}'
    o = numbers['config']
    lines = [f'{o["task"]}, p = {o["p"]}, D = {o["d_model"]}, epoch {numbers["epoch"]:,}', f'{"":52s} {"now":>24s} {"at initialisation":>24s}']
    for k, label in LABELS.items():
        if k in numbers['final']:
            now, then = show(numbers['final'][k]), show(numbers['initial'][k])
            lines += [f'{label:52s} {now:>24s} {then:>24s}'] if max(len(now), len(then)) <= 24 else [f'{label:52s} {now}', f'{"    at initialisation":52s} {then}']
    if 'filters' in numbers['final']:
        n = numbers['final']
        lines += ['', f'test set, without the low (k <= {n["tau"]}) or high frequencies of the logits in what a part writes (that leaves {n["left_without_low"]} and {n["left_without_high"]} of {o["d_model"]} dimensions, with 0 nothing of the part;',
                  'in brackets without as many random ones, mean of three)', f'{"taken out":20s}' + ''.join(f'{name:>21s}' for name in SCORES)]
        for name, (row, null) in n['filters'].items():
            lines.append(f'{name:20s}' + ''.join(f'{v:12.4f}' + (f' ({null[i]:.4f})' if null else 9 * ' ') for i, v in enumerate(row)))
    order = sorted((g for g in numbers['grokking'] if g['first'] is not None), key=lambda g: g['first'])
    if len(order) > 1:
        lines += ['', 'order of 99 % validation accuracy: ' + ', '.join(g['name'] for g in order)]
    if numbers['grokking']:
        lines += ['', f'{"task":18s} {"valid >= .99 from epoch":>24s} {"for good":>9s} {"train by":>13s} {"lag":>7s}']
        for g in numbers['grokking']:
            first, held, train, lag = ('-' if g[k] is None else f'{g[k]:,}' for k in ('first', 'sustained', 'train', 'lag'))
            lines.append(f'{g["name"]:18s} {first:>24s} {held:>9s} {train:>13s} {lag:>7s}')
    return '\n'.join(lines)


# ---------------------------------------------------------------------------------------------------- results that travel

def finished(path):
    """summary.json, metrics.npz and analysis.npz of a finished run that has been analysed. Raises Refusal."""
    try:
        summary = json.loads((path / 'summary.json').read_text())
        records, arrays = (dict(np.load(path / name)) for name in ('metrics.npz', 'analysis.npz'))
    except OSError as e:
        raise Refusal(f'{path} holds no finished run: {e}')
    need(len(records['epoch']) == summary['epochs'], f'{path} holds no finished run: it has gone on since its summary.json')
    return summary, records, arrays


def ship(path, to):
    """Write a folder that analyze.py and plots.py take like the run's own, at a fraction of its size: the weights without what a resumed
    run needs, the records packed (most to 12 bits), and instead of the weights of the snapshots their numbers. After `analyse`."""
    ckpt = load(path / 'ckpt.pt') | dict(optimizer=[], filter={}, rng={})
    ckpt['config']['out'] = ''  # where it was is no matter any more
    summary, records, arrays = finished(path)
    for name, v in records.items():
        if v.dtype == np.float32 and name not in ('train_acc', 'valid_acc', 'variance'):  # counts, and numbers of which differences are taken
            mantissa, exponent = np.frexp(v)
            records[name] = np.ldexp(np.round(mantissa * 4096) / 4096, exponent).astype(np.float32)
    for name, content in (('metrics', records), ('snapshots', {k: v for k, v in arrays.items() if k.startswith('snapshot_')})):
        write(to / f'{name}.npz', lambda f: np.savez_compressed(f, **content))
    write(to / 'summary.json', lambda f: f.write(json.dumps(summary | dict(config=ckpt['config']), indent=1).encode()))
    write(to / 'ckpt.pt', lambda f: torch.save(ckpt, f))


def rounded(v):
    """Numbers of a dict or list to four digits."""
    if isinstance(v, dict):
        return {k: rounded(x) for k, x in v.items()}
    return [rounded(x) for x in v] if isinstance(v, list) else float(f'{v:.4g}') if isinstance(v, float) else v


def perfect_from(acc, least=1.0, for_epochs=500):
    """First epoch from which every task has validation accuracy `least` for so many epochs on end, or None. acc (E, Q)."""
    good = np.flatnonzero(np.convolve((acc >= least).all(1), np.ones(for_epochs), 'valid') > for_epochs - 0.5)
    return int(good[0]) if len(good) else None


def result(path, numbers, note=''):
    """What a finished run came to, small enough to collect: its options, scores per task, the numbers of its analysis."""
    s, r, a = finished(path)
    lists = {k: [t[k] for t in s['tasks']] for k in ('name', 'train_acc', 'valid_acc', 'test_acc', 'grok_epoch', 'grok_epoch_sustained')}
    half = {str(n): int(e) for n, e in zip(r['grad_norm_names'], (r['grad_norm'].cumsum(0) < r['grad_norm'].sum(0) / 2).sum(0))}
    omega = {str(e): row.tolist() for e, row in zip(a.get('omega_epoch', []), a.get('omega_counts', [])) if e in (256, 1024, 4096, 16384, s['epochs'])}
    final, initial = ({k: v for k, v in numbers[k].items() if k.split('_')[-1] not in ('losses', 'accuracies')} for k in ('final', 'initial'))
    if s['config']['task'] not in data.TASKS or s['config']['task'] == 'add':
        initial, omega = {}, {}  # of formulas and of sums without a modulus only the end is told
    if 'changed' not in s:
        raise Refusal(f'{path}/summary.json is of an earlier version, which does not tell the options that were changed')
    return dict(note=note, config=s['config'] | dict(out=''), changed=s['changed']) | rounded(dict(epochs=s['epochs'], wall_s=s['wall_s'], device=s['device'], versions=s['versions'], tasks=lists,
                        perfect=perfect_from(r['valid_acc']), half_of_gradients=half, omega=omega, final=final, initial=initial))


RESULTS = Path(__file__).parent / 'assets' / 'results.json'  # the runs that the README tells of, a line each


def flags(options):
    """Options as words of a command line."""
    words = []
    for name, value in options.items():
        text = f'{value:g}' if isinstance(value, float) and float(f'{value:g}') == value else str(value)
        joint = '=' if text.startswith('-') else ' '
        words.append(f'--{name}' if value is True else f'--{name}{joint}{shlex.quote(text)}')
    return ' '.join(words)


def command(r):
    """The options, seeds aside, that make a run with this result by train.py, and the note on what else was changed."""
    told = {k: v for k, v in r['changed'].items() if k not in ('preset', 'seed', 'data_seed', 'snapshots', 'spectra_every')}
    return ' '.join([flags(dict(preset=r['config']['preset']) | told)] + [f'({r["note"]})'] * bool(r['note']))


def results():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def collect(path, numbers, note):
    """Add a run to the results, in the place of one with the same options, seeds and note."""
    runs = {(command(r), r['config']['seed'], r['config']['data_seed']): r for r in [*results(), result(path, numbers, note)]}
    lines = ',\n'.join(json.dumps(runs[key]) for key in sorted(runs))
    write(RESULTS, lambda f: f.write(f'[\n{lines}\n]\n'.encode()))


# ways to look at a result; each gives one value

def mean_score(part):
    return lambda r: f'{np.mean(r["tasks"][f"{part}_acc"]):.4f}'


def final(name, when='final'):
    return lambda r: r[when][name]


def solved(r):
    return f'{sum(a == 1 for a in r["tasks"]["valid_acc"])}/{len(r["tasks"]["name"])}'


def arrivals(r, skip=()):
    """Moduli q and the epochs at which their tasks first had 99 % validation accuracy, the earliest first; those that had are in."""
    epochs = {name.split()[-1]: e for name, e in zip(r['tasks']['name'], r['tasks']['grok_epoch']) if e is not None}
    return sorted(((e, q) for q, e in epochs.items() if q not in skip), key=lambda x: x[0])


def order(n):
    """The first n tasks as in 2-3-5-7; = instead of - joins those of one epoch."""
    def show(r):
        tasks = arrivals(r)[:n]
        return ''.join(q + ('' if after is None else '=' if after[0] == e else '-') for (e, q), after in zip(tasks, [*tasks[1:], None])) or 'none'
    return show


def span(r):
    """First and last epoch at which the tasks above q = 7 came to 99 % validation accuracy, and how many of them never did."""
    rest, never = arrivals(r, skip=('2', '3', '5', '7')), sum(e is None for e in r['tasks']['grok_epoch'][4:])
    return f'{rest[0][0]:,}-{rest[-1][0]:,}' + f' ({never} never)' * bool(never) if rest else 'none'


def all_held(r):
    """Epoch from which all tasks stay at 99 % validation accuracy, None if one does not."""
    epochs = r['tasks']['grok_epoch_sustained']
    return None if None in epochs else max(epochs)


def came(r):
    """Epoch of 99 % validation accuracy of a single task."""
    return f'{r["tasks"]["grok_epoch"][0]:,}' if r['tasks']['grok_epoch'][0] is not None else 'never'


def half(*names):
    return lambda r: '/'.join(f'{r["half_of_gradients"][n]:,}' for n in names)


def omega_counts(which):
    """Active frequencies at epochs 256, 1,024, 4,096, 16,384 and at the end: column of `omega`, which says how they are counted."""
    return lambda r: '-'.join(f'{row[which]:.3g}' for row in r['omega'].values()) or 'none'


def came_or_got(r):
    """Epochs of 99 % validation accuracy, operation by operation, or in brackets the accuracy at the end of one that never came there."""
    return '+'.join(f'({acc:.2f})' if e is None else f'{e:,}' for e, acc in zip(r['tasks']['grok_epoch'], r['tasks']['valid_acc']))


def joined(*names, fmt='.2f'):
    """Numbers of the analysis, joined by a slash; lists over operations by a plus."""
    def show(v):
        return '+'.join(map(show, v)) if isinstance(v, list) else f'{v:{fmt}}'
    return lambda r: '/'.join(show(r['final'][n]) for n in names)


def errors_of(*names, without='nothing'):
    """Some of SCORES on the test set of a sum without a modulus, after one of the filters, joined by a slash."""
    return lambda r: '/'.join(f'{r["final"]["filters"][without][0][SCORES.index(name)]:.3f}' for name in names)


def low_share(part):
    """Share of low frequencies in the logits of the heads, their mean, or of the MLP."""
    return lambda r: f'{np.mean(r["final"]["low_share"][1:-1] if part == "heads" else r["final"]["low_share"][-1]):.2f}'


def standing_out(what):
    """Periods that stand out in W_E over the numbers, or in the logits of the MLP over the classes."""
    return lambda r: ','.join(f'{period:.3g}' for period in (r['final']['W_E_periods'] if what == 'W_E' else r['final']['periods'][-1])) or 'none'


def score(extreme):
    return lambda r: f'{extreme(abs(x) for x in r["final"]["attention_score"]):.2f}'


FAST, FULL, NANDA = '--preset fast', '--preset fast --train_frac 0.8 --epochs 2000', '--preset fast --task nanda'
PAPER, SMALL = '--preset paper --precision bfloat16', '--preset paper --task nanda --p 31 --train_frac 0.8{} --epochs 6000'
MASKED, BASIS, NO_DROPOUT = (f'{FAST} {o} (an earlier version)' for o in ('--task masked', '--task basis', '--dropout 0'))
EARLIER, EXAMPLE, BATCH = FAST + ' (an earlier version)', FAST + ' --epochs 1500', FAST + ' --dropout_mask batch --epochs 1500'

def fast_run(task, *options):
    return ' '.join(['--preset fast --task', shlex.quote(task), *options])


HALF, LONG, ADAMW = '--train_frac 0.5', '--epochs 3000', '--preset paper{} --precision bfloat16'
MEASURES = (('W_E', joined('W_E_FFD', 'W_E_FCR')), ('W_L', joined('W_L_FFD', 'W_L_FCR')))
FORMULAS = ('a+b', 'a-b', '2*a+b', '2*a-b', 'a*b', 'a*b+b', 'a*b-b', 'a*b+a+b', 'a^2+b', 'a^2-b', 'a^2+b^2', 'a^3+b^3', '(a+b)^2', '(a+b)^3', '(a-b)^3',
            'a^2+a*b+b^2', 'a^3+a*b', 'a^3+a*b^2+b')


def measured(*tasks):
    """Where to look for FFD/FCR of both matrices of some formulas."""
    return [(fast_run(task), f'{task} {matrix}:', value) for task in tasks for matrix, value in MEASURES]


def came_to(*tasks):
    """Where to look for the epochs of some formulas at 30 %."""
    return [(fast_run(task), f'{task}:', came_or_got) for task in tasks]


def borrowed(task, source, part, *options):
    """Where to look for a run that starts with the frozen weights of another, and for the same run without."""
    start = ['--init_from', shlex.quote(f'out/formulas 0/task={source.replace("*", "x")},train_frac=0.3'), f'--copy {part} --freeze']
    return [(fast_run(task, *start, *options), f'{task} with the {part} of {source} frozen:', came_or_got), (fast_run(task, *options), f'{task} from scratch:', came_or_got)]


CLAIMS = [  # claim, the paper's number, verdict, where to look: options, words before the values, value
    ('(a) all 29 tasks reach 1.0 on validation', '29 of 29', 'qualified: with 80 % of the numbers and the fast recipe; at 30 % not confirmed', [
        (FULL, 'tasks at 1.0, 80 % of the numbers:', solved), (FAST, '50 %:', solved), (PAPER, "30 %, the paper's settings:", solved)]),
    ('(b) 2, 3, 5, 7 come first, in that order', '2-3-5-7', 'qualified: 2, 3, 5 always, then 7 or 11; at 30 % 2 and 3 alone come', [
        (FULL, '80 %:', order(4)), (FAST, '50 %:', order(4)), (EXAMPLE, '50 %, 1,500 epochs:', order(4)), (PAPER, "30 %, the paper's settings:", order(4))]),
    ('(b) the other 25 come together', 'near epoch 40,000', 'qualified: at 80 % within a factor of 5 in epochs; at 50 % the larger q later; at 30 % not at all', [
        (FULL, 'first to last at .99, epochs', span), (FAST, '50 %:', span), (PAPER, "30 %, the paper's settings:", span)]),
    ('(c) without the filter (lamb 0) it does not converge', 'no', 'not run', [
        (PAPER + ' --lamb 0', 'lamb 0:', solved), (PAPER + ' --lr 0.00045 --lamb 0', 'and lr times 1 + lamb:', solved)]),
    ('(c) the same for modular addition, p = 31', 'not reported', 'not confirmed: sooner without the filter', [
        (SMALL.format(' --lamb 0.5'), 'at .99 from epoch, lamb .5:', came), (SMALL.format(''), 'lamb 0:', came), (SMALL.format(' --lr 0.0015'), 'lamb 0 and lr times 1.5:', came)]),
    ('(d) without dropout only 2 and 3 generalise', '2, 3', 'qualified: at .99 yes; 5 to 13 come part of the way', [(NO_DROPOUT, 'ever at .99:', order(29))]),
    ('(d) one dropout mask per example, or one for the batch', 'batch', 'no difference beyond that of the seeds', [
        (EXAMPLE, 'mean validation accuracy, example:', mean_score('valid')), (BATCH, 'batch:', mean_score('valid'))]),
    ('(e) without 2, 3, 5, 7 in the loss, 11, 13, 17, 19 come first', '11-13-17-19', 'qualified: 11 first, then mixed', [(MASKED, '', order(4))]),
    ('(e) and the rest is not delayed', 'not delayed', 'qualified: no delay in those that come', [(MASKED, 'first to last of the 25 at .99, epochs', span), (EARLIER, 'with all 29 trained:', span)]),
    ('(f) Pearson correlation of the two positions: 29 tasks', '-0.64', 'qualified: the sign, but shuffled answers have it too', [
        (FULL, '', final('W_pos_pearson')), (FAST, '50 %:', final('W_pos_pearson')), (BASIS, 'shuffled answers:', final('W_pos_pearson')),
        (PAPER, "30 %, the paper's settings:", final('W_pos_pearson'))]),
    ('(f) modular addition', '0.95', 'qualified: either sign, by seed', [(NANDA, '', final('W_pos_pearson'))]),
    ('(g) singular values of W_E are more diffuse for the 29 tasks', 'far more', 'confirmed', [
        (FULL, 'how many make 50 % of their sum:', final('W_E_n50')), (FULL, 'at initialisation', final('W_E_n50', 'initial')),
        (NANDA, 'modular addition:', final('W_E_n50')), (NANDA, 'at initialisation', final('W_E_n50', 'initial'))]),
    ('(h) frequencies of W_E above mean + 2 sd', '5 (addition), many (29 tasks), none (shuffled)', 'qualified: addition and shuffled yes, 29 tasks broad without peaks', [
        (NANDA, 'addition:', final('W_E_active')), (FULL, '29 tasks:', final('W_E_active')), (BASIS, 'shuffled:', final('W_E_active'))]),
    ('(i) active frequencies of neurons at epochs 256, 1,024, 4,096, 16,384, 65,536', '0-0-10-18-10', 'not confirmed by any count', [
        (PAPER, "the paper's rule, bins of a neuron's 2-D DFT:", omega_counts(0)), (PAPER, 'averaged as in its code:', omega_counts(1)),
        (PAPER, 'carried, without leakage:', omega_counts(2)), (FULL, 'carried at 256, 1,024, 2,000, 80 %:', omega_counts(2))]),
    ('(j) heads attend one digit each for the 29 tasks, both for addition', 'yes', 'qualified: addition does either, by seed', [
        (FULL, 'least difference of a head between the digits:', score(min)), (NANDA, 'largest, addition:', score(max)), (BASIS, 'least, shuffled:', score(min)),
        (PAPER, "least, 29 tasks at 30 %, the paper's settings:", score(min))]),
    ('(k) the gradients of attention settle early', 'yes', 'confirmed', [
        (FULL, 'half of the summed norm by epoch, W_Q/W_K/W_V/W_in/W_U:', half('W_Q', 'W_K', 'W_V', 'W_in', 'W_U')), (PAPER, "30 %, the paper's settings:", half('W_Q', 'W_K', 'W_V', 'W_in', 'W_U'))]),
]
POLYNOMIALS = [  # the same for Furuta et al. 2024
    ('(l) a+b, a-b: FFD falls, FCR stays', 'falls, stays', 'confirmed', measured('a+b', 'a-b')),
    ('(m) a*b: FFD stays 1, FCR falls', 'stays, falls', 'confirmed; how far it falls depends on the frequencies', measured('a*b')),
    ('(n) a*b+b: both fall', 'both fall', 'not confirmed: FFD stays 1, FCR falls by seed', measured('a*b+b')),
    ('(o) a^n+b^n like multiplication', 'FFD stays, FCR falls', 'qualified: W_E so, W_L as for addition', measured('a^2+b^2', 'a^3+b^3')),
    ('(p) (a+b)^n like addition', 'FFD falls, FCR stays', 'qualified: W_E so, W_L not', measured('(a+b)^2', '(a+b)^3')),
    ('(q) these grok at 30 %', 'yes', 'confirmed but for (a+b)^3: .96 after 3,000 epochs', came_to('a+b', 'a-b', 'a*b', 'a*b+a+b', 'a^2+b', 'a^2+b^2', 'a^3+b^3', '(a+b)^2', '(a+b)^3')),
    ('(q) these need more', '40 %: 2a-b, a^2-b; 50 %: 2a+b, ab+b, ab-b, (a-b)^3', 'not confirmed but for (a-b)^3', came_to('2*a-b', 'a^2-b', '2*a+b', 'a*b+b', 'a*b-b', '(a-b)^3')),
    ('(q) these need 80 %, 90 %, or never grok', 'a^2+ab+b^2, a^3+ab; a^3+ab^2+b, a^2+ab+b^2+a', 'a^2+ab+b^2 and a^2+ab+b^2+a come near at 90 %, the others not at all', [
        (fast_run(f, f'--train_frac {share}'), f'{f} at {share:.0%}:', came_or_got) for f in data.FAMILIES['unfactored'].split(',') for share in (0.7, 0.9)]),
    ("(r) by the paper's settings a+b and a*b grok at 30 %", 'yes', 'qualified: a+b does, late; a*b not within 100,000 epochs', [
        (ADAMW.format(f' --task {shlex.quote(task)}{share}'), f'{task} {words}', came_or_got)
        for share, words in ((' --epochs 100000', '30 %:'), (' --train_frac 0.5 --epochs 10000', '50 %:')) for task in ('a+b', 'a*b')]),
    ('(s) a frozen embedding of a+b makes 2a+b grok at 30 %', 'yes; not without', 'not confirmed: it groks with and without, sooner with in one of three seeds', borrowed('2*a+b', 'a+b', 'embed')),
    ('(s) a frozen block of a*b makes a*b+b grok at 30 %', 'yes; not without', 'not confirmed: the reverse', borrowed('a*b+b', 'a*b', 'block')),
    ('(s) frozen embeddings between a*b and a+b hurt', 'hurt', 'confirmed', borrowed('a*b', 'a+b', 'embed') + borrowed('a+b', 'a*b', 'embed')),
    ('(t) a+b, a-b, a*b in one network do not grok at 30 %, and do with more', 'no; yes', 'qualified: at 30 % by seed, and with 3,000 epochs (v)', [
        (fast_run('elementary'), '30 %:', came_or_got), (fast_run('elementary', HALF), '50 %:', came_or_got)]),
    ('(t) a+b beside it helps a*b+b', 'groks at 30 %', 'not confirmed: a*b+b groks alone, and beside a+b later (v)', [(fast_run('a+b,a*b+b'), 'both:', came_or_got), (fast_run('a*b+b'), 'a*b+b alone:', came_or_got)]),
    ('(u) a*b is dense over residues and sparse over their logarithms', '-', 'so it is', [
        (options, words, value) for options, where in ((fast_run('a*b', '--p 113'), 'p = 113, '), (ADAMW.format(" --task 'a*b' --train_frac 0.5 --epochs 10000"), "the paper's settings, 50 %, "))
        for words, value in ((f'{where}Gini of W_E:', joined('W_E_gini', 'W_E_mult_gini')), ('effective frequencies:', joined('W_E_effective', 'W_E_mult_effective', fmt='.1f')), ('neurons of 512 with 85 % at one:', joined('sharp', 'sharp_mult', fmt='')))]),
    ('(v) some of these with 3,000 epochs', '-', 'the mixtures grok, (a+b)^3 and a^2+ab+b^2 come near, borrowed parts still hurt', [
        (fast_run('(a+b)^3', LONG), '(a+b)^3, 30 %:', came_or_got), (fast_run('a^2+a*b+b^2', '--train_frac 0.8', LONG), 'a^2+a*b+b^2, 80 %:', came_or_got),
        (fast_run('elementary', LONG), 'a+b, a-b, a*b, 30 %:', came_or_got), (fast_run('a+b,a*b+b', LONG), 'a+b and a*b+b, 30 %:', came_or_got),
        *(borrowed(task, source, part, LONG)[0] for task, source, part in (('a*b+b', 'a*b', 'block'), ('a*b', 'a+b', 'embed'), ('a+b', 'a*b', 'embed')))]),
]
ADD = '--preset fast --task add'
EMBEDDED = ADD + ' --init_from {}.npy --freeze'
ADD_30, ADD_50 = (f'{ADD} --train_frac {share}' for share in (0.3, 0.5))
FILTERED = ADD + ' --d_model 544 --init_from features544.npy --freeze'
ADAMW_ADD = '--preset paper --task add --train_frac 0.1{} --epochs 10000 --precision bfloat16'
FILTERS = {'nothing': '.9974', 'low from MLP': '.3589', 'low from attention': '.9912', 'low from both': '.0594',
           'high from MLP': '.9810', 'high from attention': '.7836', 'high from both': '.2708'}  # accuracy in the paper, fine-tuned GPT-2-XL
ADDITION = [  # the same for Zhou et al. 2024
    ('(w) from scratch the accuracy is poor, with a frozen pre-trained embedding it is not', '.54; 1.00', 'confirmed with 10 % of the pairs; with 30 % it needs none', [
        (ADD, '10 % of the pairs, from scratch:', mean_score('test')), (EMBEDDED.format('features'), 'Fourier features, frozen:', mean_score('test')),
        (ADAMW_ADD.format(''), 'AdamW, from scratch:', mean_score('test')), (ADAMW_ADD.format(' --init_from features.npy --freeze'), 'AdamW, Fourier features:', mean_score('test')),
        (ADD_30, '30 % of the pairs, from scratch:', mean_score('test')), (ADD_50, '50 %:', mean_score('test'))]),
    ('(w) what helps are the periods of that embedding', '2, 2.5, 5, 10', 'qualified: other periods do as well, long ones alone do not', [
        (EMBEDDED.format('scrambled'), 'random phases instead:', mean_score('test')), (EMBEDDED.format('periods'), 'other periods, 2.3 to 400:', mean_score('test')), (EMBEDDED.format('low'), 'long periods alone, 50 to 521:', mean_score('test'))]),
    ('(x) low frequencies give the magnitude', 'yes', 'confirmed', [
        (EMBEDDED.format('low'), 'within 2/within 10/share of the errors off by 1, long periods alone:', errors_of('within 2', 'within 10', 'errors off by 1')), *(
            (options, words, errors_of('within 2', 'within 10', 'errors off by 1')) for options, words in ((ADAMW_ADD.format(''), 'AdamW, from scratch:'), (ADD, 'Muon:'), (EMBEDDED.format('scrambled'), 'random phases:')))]),
    ('(x) from scratch only low frequencies are used', 'yes', 'qualified: mostly by AdamW, not by Muon, nor with more pairs', [
        (ADAMW_ADD.format(''), "low share of the MLP's logits, AdamW:", low_share('MLP')), (ADD, 'Muon:', low_share('MLP')), (ADD_30, '30 %:', low_share('MLP')), (ADD_50, '50 %:', low_share('MLP')), (EMBEDDED.format('features'), 'Fourier features:', low_share('MLP'))]),
    ('(x) no frequency stands out in an embedding learned from scratch', 'none', 'qualified: at most a weak one by AdamW; with 30 % and more clear ones', [
        (ADAMW_ADD.format(''), 'periods, AdamW:', standing_out('W_E')), (ADD, 'Muon:', standing_out('W_E')), (ADD_30, '30 %:', standing_out('W_E')), (ADD_50, '50 %:', standing_out('W_E'))]),
    ('(x) and in the logits of its MLP', '-', 'with more pairs several, most of them of its W_E, too', [
        (ADAMW_ADD.format(''), 'periods, AdamW:', standing_out('MLP')), (ADD, 'Muon:', standing_out('MLP')), (ADD_30, '30 %:', standing_out('MLP')), (ADD_50, '50 %:', standing_out('MLP')), (EMBEDDED.format('features'), 'Fourier features:', standing_out('MLP'))]),
    ('(y) the MLP has the low frequencies, attention the high ones', 'yes', 'not confirmed: both have both, the MLP somewhat more of the low', [
        (EMBEDDED.format('features'), 'low share, heads:', low_share('heads')), (EMBEDDED.format('features'), 'MLP:', low_share('MLP')), (FILTERED, 'd_model 544, heads:', low_share('heads')), (FILTERED, 'MLP:', low_share('MLP'))]),
    ('(y) without the low frequencies of the MLP the size is lost', 'yes', 'confirmed; the last digit stays with decimal periods', [
        (options, words, errors_of('accuracy', 'within 10', 'errors off by tens', without='low from MLP')) for options, words in (
            (EMBEDDED.format('features'), 'accuracy/within 10/share of the errors off by tens, Fourier features:'), (EMBEDDED.format('periods'), 'other periods:'), (ADD_30, 'from scratch, 30 %:'))]),
]
NETWORKS = [  # name, options, weights at the end or at the start
    ('29 tasks, 80 % of the numbers', FULL, 'final'), ('29 tasks, 50 %', FAST, 'final'), ("29 tasks, 30 %, the paper's settings", PAPER, 'final'), ('masked', MASKED, 'final'),
    ('dropout 0', NO_DROPOUT, 'final'), ('shuffled answers (basis)', BASIS, 'final'), ('random weights', FAST, 'initial'), ('modular addition', NANDA, 'final')]


def report():
    """The README's tables in Markdown, from the results alone; one value per seed throughout."""
    groups = {}
    for r in results():
        groups.setdefault(command(r), []).append(r)

    def there(options):
        """The options themselves, or with the reduced precision that spares a CPU time, if there are such runs."""
        words, bracket, note = options.replace(' --precision bfloat16', '').partition(' (')
        return next((o for o in (words + bracket + note, words + ' --precision bfloat16' + bracket + note) if o in groups), options)

    def each(runs, value, fmt='{:.3g}'):
        return ' '.join(v if isinstance(v, str) else '-' if v is None else fmt.format(v) for v in map(value, runs))

    def table(columns, rows):
        return '\n'.join(f'| {" | ".join(cells)} |' for cells in (columns, ['---'] * len(columns), *rows)) + '\n'

    for claims in (CLAIMS, POLYNOMIALS, ADDITION):
        claims = [(claim, paper, verdict, [(words, there(options), value) for options, words, value in look]) for claim, paper, verdict, look in claims]
        print(table(['claim', 'paper', 'here', 'by', 'verdict'], [
            (claim, paper, '; '.join(f'{words} {each(groups[options], value) if options in groups else "not run"}'.strip() for words, options, value in look),
             ', '.join(f'`{options}`' for options in dict.fromkeys(options for _, options, _ in look)), verdict) for claim, paper, verdict, look in claims]))
    print(table(['`python train.py` with', 'seeds', 'epochs', 'validation', 'at 1.0', 'test', 'all at .99 for good, from epoch', 'all at 1.0 for 500 epochs, from', 'device'], [
        (f'`{options}`', str(len(runs)), f'{runs[0]["epochs"]:,}', each(runs, mean_score('valid')), each(runs, solved), each(runs, mean_score('test')),
         each(runs, all_held, '{:,}'), each(runs, lambda r: r['perfect'], '{:,}'), f'{" / ".join(dict.fromkeys(r["device"] for r in runs))}: {each(runs, lambda r: r["wall_s"] / 60)} min') for options, runs in groups.items() if runs[0]['config']['task'] in data.TASKS]))
    if there(FILTERED) in groups:
        looks = [(score, i, null) for i, score in enumerate(SCORES) for null in ((0, 1) if i in (0, 2) else (0,))]
        print(table(['taken out', 'paper', *(score + ', random directions' * null for score, _, null in looks)], [
            (name, paper, *(each(groups[there(FILTERED)], lambda r: (r['final']['filters'][name][null] or [None] * 5)[i], '{:.3f}') for _, i, null in looks)) for name, paper in FILTERS.items()]))
    neurons = [('active_bins', '{:.0f}'), ('active_averaged', '{:.1f}'), ('waves', '{}'), ('primes', '{}'), ('wave_share', '{:.2g}'), ('pure', '{}')]
    print(table(['network', "bins per neuron: the paper's count", "its code's averaging", '(q, k) carried', 'moduli q among them',
                 'share of interaction in the best (q, k), median neuron', 'neurons with more than half there'], [
        (name, *(each(groups[options], lambda r: r[when][k], fmt) for k, fmt in neurons)) for name, options, when in ((name, there(options), when) for name, options, when in NETWORKS) if options in groups]))
    columns = [('W_E: FFD/FCR', joined('W_E_FFD', 'W_E_FCR')), ('W_L: FFD/FCR', joined('W_L_FFD', 'W_L_FCR')), ('effective frequencies of W_E, by residues/logarithms', joined('W_E_effective', 'W_E_mult_effective', fmt='.0f')),
               ('of W_L', joined('W_L_effective', 'W_L_mult_effective', fmt='.0f')), ('W_E sparsest about the residue (Gini)', lambda r: f'{r["final"]["centre"]} ({r["final"]["centre_gini"]:.2f})'),
               ('neurons of 512 with 85 % at one frequency', joined('sharp', 'sharp_mult', fmt=''))]
    print(table(['formula', '.99 from epoch, 30 %', '50 %', *(name + ' (30 %)' for name, _ in columns)], [
        (f'`{task}`', *(each(groups.get(there(options), []), came_or_got) or 'not run' for options in (fast_run(task), fast_run(task, HALF))),
         *(each(groups.get(there(fast_run(task)), []), value) for _, value in columns)) for task in FORMULAS]))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument('runs', nargs='*', metavar='RUN', help='a run folder written by train.py')
    parser.add_argument('--embedding', metavar='FILE', help='look at any matrix with a row per number instead, .npy or .pt: periods, singular values')
    parser.add_argument('--tau', type=int, default=0, help='highest of the low frequencies of the filters (default: 50 of 260, or as much of the classes)')
    parser.add_argument('--ship', metavar='FOLDER', help='also write a small copy of the one run there, for analyze.py and plots.py')
    parser.add_argument('--collect', action='store_true', help=f'also put what the runs came to into assets/{RESULTS.name}')
    parser.add_argument('--note', default='', help='with --collect: what else was changed, if the code was')
    parser.add_argument('--report', action='store_true', help="print the README's tables from there")
    args = parser.parse_args(argv)
    if args.embedding:
        if args.runs or args.collect or args.report or args.ship or args.note or args.tau:
            raise Refusal('--embedding goes alone')
        print(matrix_table(args.embedding, analyse_matrix(args.embedding)[0]))
        return
    if not args.runs and (args.collect or not args.report):
        raise Refusal('name a run folder' + ', or --report' * (not args.collect))
    if args.ship and (len(args.runs) != 1 or Path(args.ship).exists()):
        raise Refusal(f'--ship takes one run folder, and {args.ship} must not exist yet')
    if args.tau < 0:
        raise Refusal('--tau must not be negative')
    if args.tau and args.collect:
        raise Refusal('--tau does not go with --collect: results are compared')
    if args.note and not args.collect:
        raise Refusal('--note goes with --collect')
    for path in map(Path, args.runs):
        numbers, missing = analyse(path, args.tau)
        print(f'{path}: {table(numbers)}\n')
        for line in missing:
            print(f'note: {line}')
        if args.collect:
            collect(path, numbers, args.note)
            print(f'{path} is in {RESULTS} now')
        if args.ship:
            ship(path, Path(args.ship))
    if args.report:
        report()


if __name__ == '__main__':
    data.run_script(main)
