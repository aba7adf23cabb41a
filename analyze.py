"""From a run folder to numbers: what the weights and activations of a trained model hold. It trains nothing.

    python analyze.py out/miiii [out/nanda ...]   # sentences, a table; analysis.json and .npz in its folder
    python analyze.py out/miiii --cut 17,23       # what is right without the neurons of some q
    python analyze.py out/miiii --record          # append what the run came to to assets/runs.csv
    python analyze.py --embedding numbers.npy     # any matrix with a row per number: periods that stand out

A measurement is a function of a network that returns a dict; MEASUREMENTS, near the end, lists them. Beside
each number stands its null, the same number before training. assets/report.md defines every label.
"""
import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import shlex
import sys
import textwrap
import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional

import data
from data import aligned, load, load_matrix, need, refuse, say, show, write
from model import example_logits, network, plain_torch, task_losses


# ---------------------------------------------------------------- Fourier over the rows of a matrix

def cos_sin(W):
    """Coefficients of the columns of W (n, D) over its rows in the orthonormal real Fourier basis without the
    constant: (2, n//2, D), cosines and sines of k = 1 .. n//2. The frequency n/2 of an even n has no sine."""
    z = torch.fft.rfft(W, dim=0, norm='ortho')[1:] * 2 ** 0.5
    if len(W) % 2 == 0:
        z[-1] /= 2 ** 0.5
    return torch.stack([z.real, -z.imag])


def frequency_norms(W):
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
    """The ratio of each local maximum of a spectrum x (n,) to the median of the eleven values around it, and
    0 elsewhere."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(x, 5, mode='symmetric'), 11)
    beside = np.maximum(np.pad(x, 1)[:-2], np.pad(x, 1)[2:])
    ratio = x / np.maximum(np.median(around, 1), 1e-30)
    return np.where(x > beside, ratio, 0)


def outliers(W, draws=100):
    """The frequencies that stand out of the spectrum over the rows of W (n, D), straight lines taken out.
    -> frequencies (P,), spectrum (n//2,), spectra of noise (draws, n//2)

    The highest of `heights`, but for the first frequency, which any trend has, stands out if noise with the
    covariance of the columns has nothing as high; the power of noise is a gamma variable. Its wave, at the
    frequency between whole ones that explains most, is taken out with those found before, which are fitted
    anew beside it, and the search goes on: so weak waves are found beside strong ones.
    """
    n = len(W)
    row = torch.arange(n, dtype=torch.float64)[:, None]

    def without_waves(frequencies):
        phase = 2 * torch.pi / n * row * torch.tensor(frequencies, dtype=torch.float64)
        taken = torch.cat([torch.ones(n, 1), row - n / 2, phase.cos(), phase.sin()], 1)
        basis = torch.linalg.qr(taken).Q.float()
        return W - basis @ (basis.T @ W)

    left = without_waves([])
    plain = frequency_norms(left).numpy()
    covariance = left.T @ left / n
    mean = 2 * covariance.trace().item()
    scale = 4 * covariance.square().sum().item() / max(mean, 1e-30)
    power = np.random.default_rng(0).gamma(mean / max(scale, 1e-30), scale, (draws, n // 2))
    by_chance = max(heights(noise)[1:].max() for noise in np.sqrt(power))
    found, near = [], []  # frequencies, and the whole ones near which they were found
    while left.norm() > 1e-4 * W.norm():  # the rest is rounding
        k = np.arange(1, n // 2 + 1)
        for f in found:
            k = k[abs(k - f) > 1.5]  # its own hole
        if not len(k):
            break
        height = heights(frequency_norms(left).numpy()[k - 1]) * (k > 1)
        if height.max() <= by_chance:
            break
        found.append(k[height.argmax()])
        near.append(found[-1])
        # the new one, then the others, which were fitted without it
        fits = [(len(found) - 1, step) for step in 0.1 / 5.0 ** np.arange(4)]
        fits += [(i, step) for step in (0.02, 0.004) for i in range(len(found) - 1)]
        for i, step in fits:
            others = found[:i] + found[i + 1:]
            tried = np.clip(found[i] + step * np.arange(-7, 8), near[i] - 0.7, near[i] + 0.7)
            found[i] = min(tried, key=lambda g: without_waves([*others, g]).norm())
        left = without_waves(found)
    return np.sort(found), plain, np.sqrt(power)


# ---------------------------------------------------------------- waves of the targets, over all p^2 inputs

def wave_freqs(classes):
    """The pairs (q, k), (B, 2), that the targets are made of, sorted: each fraction k/q up to 1/2, in lowest
    terms, whose q divides one of `classes`. Primes q have k = 1 .. q//2; the 29 tasks have B = 726."""
    divisors = [q for q in range(2, max(classes) + 1) if any(modulus % q == 0 for modulus in classes)]
    return torch.tensor([(q, k) for q in divisors for k in range(1, q // 2 + 1) if math.gcd(q, k) == 1])


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


def wave_solver(p, classes, stride):
    """Least-squares fit of all `waves` together, through their interactions. Refused above 6 GB.

    -> inter (4B, p^2), the interactions of the waves, gram (4B, 4B) and its inverse inv: b = inter @ a and
    c = inv @ b are the coefficients of an activation a (p^2,); c * b / p^2 is the variance of each wave.
    """
    B = len(wave_freqs(classes))
    size = 48 * B * p ** 2 + 128 * B ** 2  # bytes: three times the waves, two grams
    need(size < 6e9, f'the spectra at p = {p} need {size / 1e9:.0f} GB')
    basis = waves(p, classes, stride).flatten(0, 1)
    inter = interactions(basis.T.contiguous(), p).T.contiguous()
    gram = inter @ inter.T  # normalised, its eigenvalues run from .048 to 2.02 at p = 113: float32 does
    gram += torch.diag((gram.diagonal() < 1e-3).to(gram.dtype))  # a wave that vanishes has b = c = 0
    inv = torch.linalg.inv_ex(gram).inverse
    ones = torch.ones(len(gram))
    exact = (gram @ (inv @ ones) - ones).abs().max() < 0.01
    need(exact, 'waves of these moduli cannot be told apart')
    return inter, gram, inv


def decompose(neurons, p, solver):
    """Where the variance of each activation (p^2, F) lies.

    alive        (F,)       whether it varies over the inputs by more than rounding
    variance     (F,)       in all; 0 if not alive
    interaction  (F,)       in what neither x0 nor x1 has alone; 0 below 1e-6 of the variance
    waves        (2, B, F)  in the sum wave and the difference wave of each (q, k), by the joint fit; can be
                            negative. White noise has 1/(p-1)^2 of its interaction in each cosine and sine
    products     (4B, F)    with the interactions of the waves, for `single_waves`
    """
    of_waves, _, inv = solver
    variance = neurons.var(0, correction=0)
    alive = variance > 1e-10 * neurons.square().mean(0)
    inter = interactions(neurons, p)
    interaction = inter.square().mean(0) * alive
    interaction = interaction * (interaction > 1e-6 * variance)
    b = of_waves @ (inter * (interaction > 0))                                           # 4B F
    power = (b * (inv @ b)).view(2, 2, -1, b.shape[1]).sum(1) / p ** 2
    return dict(alive=alive, variance=variance * alive, interaction=interaction, waves=power, products=b)


def single_inverses(solver):
    """The inverse gram matrix of the sum and the difference wave of each (q, k) by itself: (B, 4, 4)."""
    B = len(solver[1]) // 4
    blocks = solver[1].view(4, B, 4, B).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    return torch.linalg.inv(blocks)


def single_waves(products, p, solver):
    """Variance of each activation that the sum and the difference wave of one (q, k) explain without the
    others, (B, F). Never negative, nor more than the interaction."""
    inverses = single_inverses(solver)
    b = products.view(4, len(inverses), -1)
    return torch.einsum('ibf,bij,jbf->bf', b, inverses, b) / p ** 2


def dft2(neurons, p):
    """|2-D DFT| / p^2 of activations (p^2, F) without their means: (p//2+1, p, F), frequencies of x1 and of
    x0. The negative frequencies of x1 mirror these."""
    return torch.fft.rfft2((neurons - neurons.mean(0)).view(p, p, -1), dim=(1, 0), norm='forward').abs()


def active_counts(dft, alive):
    """How many frequencies are active in `dft2` (p//2+1, p, F), the mean over neurons that vary, in two ways:
    bins of a neuron's 2-D DFT (the paper's rule); its frequencies of x1 after the mean over those of x0 (the
    averaging of the paper's code, which looks at one neuron, with another bar). (2,)"""
    bins = torch.cat([dft, dft[1:]]).flatten(0, 1)                                       # p^2 F
    counts = [((x > threshold(x)).sum(0) * alive).sum() for x in (bins, dft[1:].mean(1))]
    return torch.stack(counts) / alive.sum().clamp(min=1)


@torch.no_grad()
def spectra_of(model, d, solver, precision):
    """Of the neurons over all inputs of the data d, as means: sum_power (B,), the variance in the sum wave of
    each (q, k); variance (2,) in all, and in functions of x0 alone and of x1 alone. precision: the autocast
    of the model's products; the fit of the waves has none."""
    acts = {}
    p = round(len(d.y) ** 0.5)
    with precision:
        model(d.x, acts=acts)
    neurons = acts['neurons'].float().view(p * p, -1)
    power = decompose(neurons, p, solver)
    total, interaction = power['variance'].mean(), power['interaction'].mean()
    return dict(sum_power=power['waves'][0].mean(1), variance=torch.stack([total, total - interaction]))


def carried(share, p):
    """Which (q, k) a layer carries, (..., B) bool, from the share of its interaction in each sum wave: more
    than the average (q, k), or than 5 % if that is less, and more than ten times what white noise has (twenty
    for q = 2, which has no sine). In 28 random networks (14 seeds of miiii and of nanda, p = 113) none had
    more than 7.7 times."""
    return share > share.mean(-1, keepdim=True).clamp(max=0.05).clamp(min=20 / (p - 1) ** 2)


# ---------------------------------------------------------------- a run folder

class Run(SimpleNamespace):
    """An open run folder: path, name, config, epoch, p, data, rows (train, valid, test), net, weights,
    initial (weights), snapshots {epoch: weights}, records (metrics.npz up to the checkpoint), shipped
    (snapshots.npz, their numbers where the weights did not travel), notes on what is missing, to (where its
    analysis is)."""

    def __repr__(self):
        return f'Run({str(self.path)!r}: {self.config["task"]}, p = {self.p}, epoch {self.epoch:,})'

    @plain_torch()
    def forward(self, weights=None):
        """Logits (p^2, columns of all tasks) over all inputs, and the activations of the last block (see
        Transformer.forward). Of the final weights, unless others are given."""
        acts = {}
        self.net.load_state_dict(weights or self.weights)
        return self.net(self.data.x, acts=acts).reshape(len(self.data.y), -1), acts

    def analysis(self):
        """numbers, arrays: those in the folder if newer than the run and this file, else made now, which may
        take minutes, and written there."""
        self.known = self.known or stored_analysis(self) or take_apart(self)
        return self.known

    def final(self):
        """The numbers of the final weights, by their labels; see `analysis`."""
        return self.analysis()[0]['final']

    def arrays(self):
        return self.analysis()[1]


def stored_analysis(run):
    """The analysis in the folder, None if it is older than the run or this file, of another run, damaged."""
    made = run.to / 'analysis.json'
    newest = max(file.stat().st_mtime for file in (run.path / 'ckpt.pt', Path(__file__)))
    with contextlib.suppress(OSError, ValueError, KeyError, data.Refusal):
        numbers = json.loads(made.read_text())
        of_this = numbers['config'] == run.config and numbers['epoch'] == run.epoch
        if of_this and made.stat().st_mtime >= newest:
            return numbers, arrays_in(run.to / 'analysis.npz')
    say(f'{run.path}: no up-to-date analysis yet, making one')


def arrays_in(path):
    """The arrays of a .npz file, {} if there is none."""
    try:
        return dict(np.load(io.BytesIO(path.read_bytes()))) if path.exists() else {}
    except Exception as e:  # numpy raises many types on a damaged file
        refuse(f'{path} is damaged ({type(e).__name__})')


@plain_torch()
def load_run(path, to=None):
    """Open a run folder, as run = load_run('assets/nanda'). Its analysis and figures go into it, or into the
    folder to/NAME-OF-RUN. Raises Refusal if anything in it is damaged, or was made by another model."""
    path, notes = Path(path), []
    ckpt = load(path / 'ckpt.pt')
    o = ckpt['config']
    epoch = ckpt['step']
    records = arrays_in(path / 'metrics.npz') if epoch else {}  # a run killed in its first save has some
    shipped = arrays_in(path / 'snapshots.npz')
    kept = [load(file, ('model', 'step')) for file in sorted(path.glob('snapshots/*.pt'))]
    try:
        d = data.make(o['task'], o['p'], o['data_seed'])
        rows = data.split(len(d.y), o['train_frac'], o['data_seed'])
        torch.manual_seed(o['seed'])  # train.py starts there
        net = network(o, d).requires_grad_(False)
        start = {name: w.clone() for name, w in net.state_dict().items()}
        snapshots = {k['step']: k['model'] for k in kept if k['step'] <= epoch}  # a killed run has more
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
    need(len(d.y) == o['p'] ** 2, f'{path}: what follows is for all pairs of two digits')
    if 'example' in ckpt:
        was = ckpt['example'].float()
        off = ((example_logits(net, d) - was).norm() / was.norm()).item()
        need(off < 0.005, f'{path} was made by another model: here its logits differ by {off:.1%}')
    if epoch and not records:
        notes.append(f'{path} has no metrics.npz: no curves')
    if not snapshots and not shipped:
        notes.append(f'{path} has no weight snapshots: nothing over snapshots')
    if (o.get('init_from') or o.get('letters')) and 0 not in snapshots:
        notes.append(f'{path} lacks the weights it began with: its null is from before they were copied')
    weights = {name: w.float() for name, w in ckpt['model'].items()}  # shipped runs have them in float16
    name = Path(os.path.abspath(path)).name  # of '.', too
    return Run(path=path, name=name, config=o, epoch=epoch, p=o['p'], data=d, rows=rows, net=net,
               weights=weights, initial=snapshots.get(0, start), snapshots=snapshots, records=records,
               shipped=shipped, notes=notes, to=Path(to, name) if to else path, known=None)


# ---------------------------------------------------------------- one network: weights and neurons

# m is a network at one moment: net, d (data), p, rows (train, valid, test), logits (p^2, columns), acts,
# records of the run, solver and key (see `measure`). A number, or a short list of numbers, goes into the
# printed table under its name; a tensor goes into analysis.npz. The neurons of each operation stand side by
# side: F in all.

def embedding(m):
    """W_E of the digits (p, D): singular values, p-DFT over the digits (figures 8 to 13 of the paper)."""
    W = m.net.W_E[:m.p]
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    norms, out = frequency_norms(W), {}
    constant = W.mean(0, keepdim=True) * m.p ** 0.5
    waves = cos_sin(W).transpose(0, 1).flatten(0, 1)  # cos 1, sin 1, cos 2, sin 2, ..
    for of, values in (('', S), (' of variance', S.square())):
        for share in (50, 90):
            below = values.cumsum(0) < share / 100 * values.sum()
            out[f'W_E singular values to {share} %{of}'] = below.sum().item() + 1
    out['W_E frequencies above mean + 2 sd'] = (norms > threshold(norms)).sum().item()
    out['W_E effective frequencies'] = effective(norms.square())
    out['W_E Gini'] = gini(norms)
    out['W_E_fourier'] = torch.cat([constant, waves])[:m.p]
    return out | dict(singular_values=S, left_vectors=U, W_E_norms=norms)


def periods_of_embedding(m):
    """Periods, in digits, of the waves in W_E that noise has not."""
    return {'W_E periods that stand out': (m.p / outliers(m.net.W_E[:m.p])[0]).tolist()}


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
    """The MLP layer over all inputs, neuron by neuron, in the p-DFT and in the waves of the targets. The
    share of a neuron's best wave is of its interaction, in the sum and the difference wave of one (q, k); a
    pure neuron has more than half there."""
    a = m.acts['neurons'].view(m.p ** 2, -1)
    freqs = wave_freqs(m.d.classes)
    power = decompose(a, m.p, m.solver)
    dft = dft2(a, m.p)
    alive = power['alive']
    total = power['variance']
    inter = power['interaction']
    in_waves = power['waves'].sum(1)                                                     # 2 F
    split = torch.stack([total - inter, *in_waves, inter - in_waves.sum(0)])             # 4 F
    kinds = ('x0 or x1 alone', 'sum waves', 'difference waves', 'the rest')
    shares = split.mean(1) / total.mean().clamp(min=1e-30)
    out = {f'variance of neurons in {kind}': share for kind, share in zip(kinds, shares.tolist())}

    layer = power['waves'].mean(2) / inter.mean().clamp(min=1e-30)                       # 2 B
    has = carried(layer[0], m.p)
    bins, averaged = active_counts(dft, alive).tolist()
    out['active bins of a neuron'] = bins
    out['active frequencies of a neuron, averaged'] = averaged
    out['waves (q, k) carried'] = has.sum().item()
    out['moduli q carried'] = len(freqs[has, 0].unique())

    own = inter.clamp(min=1e-30)
    wave_share, wave_best = (single_waves(power['products'], m.p, m.solver) / own).max(0)
    pure = wave_share > 0.5
    purest = (wave_share * (freqs[wave_best, 0] > 3)).argmax()  # modulo 2 and 3 a wave is no picture
    shown = torch.stack([*torch.arange(3), purest])
    out['neurons that vary'] = alive.sum().item()
    out['share of best wave, median neuron'] = wave_share.quantile(0.5).item()
    out['pure neurons'] = pure.sum().item()
    out['waves of the pure neurons'] = len(wave_best[pure].unique())
    out |= dict(neuron_ids=shown, neuron_wave=freqs[wave_best], neuron_wave_share=wave_share,
                neuron_split=split / total.clamp(min=1e-30))
    out |= dict(wave_shares=layer, neurons_dft=dft[..., shown].permute(2, 1, 0))
    return out | dict(neurons=a[:, shown].T.view(-1, m.p, m.p).mT)                       # 4 x0 x1


def answers(m):
    """Loss and accuracy of each task, without dropout, on training, validation and all unseen rows; where no
    answer changes if the digits are swapped, also on unseen rows that were not trained on swapped either."""
    y, (train, valid, _), unseen = m.d.y, m.rows, unseen_rows(m)
    rows = dict(train=train, valid=valid, unseen=unseen)
    swapped = torch.arange(m.p ** 2).view(m.p, m.p).T.flatten()
    neither = unseen[~torch.isin(swapped[unseen], train)]
    if torch.equal(y, y[swapped]) and len(neither):
        rows['unseen, nor swapped'] = neither
    found = {'tasks': len(m.d.names), 'tasks trained': m.d.in_loss.sum().item()}
    for name, some in rows.items():
        losses, right = task_losses(m.logits[some], y[some], m.d.classes)
        found |= {f'{name}_losses': losses, f'{name}_accuracies': right}
        found |= {f'rows, {name}': len(some), f'accuracy, {name}': right.mean().item()}
    found['tasks at .99, unseen'] = (found['unseen_accuracies'] >= 0.99).sum().item()
    commonest = y[unseen] == y[train].mode(0).values
    found['accuracy, unseen, of the commonest answer'] = commonest.double().mean().item()
    return found


def by_difference(logits, y):
    """Logits (n, q) centred over inputs and classes c, and their mean as a function of y - c mod q, where y
    (n,) are the right answers: (n, q), (q,)."""
    q = logits.shape[1]
    centred = logits - logits.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    return centred, centred.gather(1, (y[:, None] - torch.arange(q)) % q).mean(0)


def turning(m):
    """Which share of the variance of a task's centred logits depends on the right answer less the class
    alone: all of it in a sum of cosines of the angle between both."""
    shares = []
    for y, logits in zip(m.d.y.T, m.logits.split(m.d.classes, 1)):
        centred, profile = by_difference(logits, y)
        shares.append((profile.square().mean() / centred.square().mean().clamp(min=1e-30)).item())
    return {'logits: share of answer less class alone: mean, least': [np.mean(shares).item(), min(shares)]}


# ---------------------------------------------------------------- addition modulo p

def mechanism(m):
    """How a network adds modulo p, from its logits (Nanda et al. 2023, sections 4 and 5).

    profile (p,): the centred logits as a function of x0 + x1 - c, mean over the inputs. fit (p//2,): share of
    their variance in cos(w_k (x0 + x1 - c)). Key frequencies: those with more than 1 % and three times the
    lower quartile. Beside their sum stands what as many others have; a mere table of the training rows has as
    much there. Restricted loss: of the projection on the key waves in x0 + x1 and on the mean, over all
    inputs. Excluded loss: without the key waves, over the training rows.
    """
    p, logits = m.p, m.logits
    s = (m.d.x[:, 0] + m.d.x[:, 1]) % p
    k = torch.arange(1, p // 2 + 1)
    centred, profile = by_difference(logits, s)
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
    out = {'key frequencies': key.tolist()} if m.key is None else {}
    out['logits in key cosines'] = in_key.item()
    out['logits in as many others'] = (len(key) * (fit.sum() - in_key) / max(1, len(k) - len(key))).item()
    out['loss on all inputs'] = loss(logits)
    out['restricted loss'] = loss(logits.mean(0) + kept)
    out['excluded loss'] = loss(logits - kept, m.rows[0])
    return out | dict(profile=profile, fit=fit, amplitude=amplitude)


# ---------------------------------------------------------------- formulas

def polynomials(m):
    """Targets mod p: W_E of the digits and the map from neurons to logits W_L = W_out W_U in the Fourier
    basis over the residues and over their discrete logarithms, whose length is p-1 (Furuta et al. 2024).
    Beside FFD and FCR are those of Gaussian matrices of the same shapes. pattern (O, a, b): the logits of
    class 1 of each operation."""
    out, by_log = {}, by_discrete_log(m.p)
    for name, W in dict(W_E=m.net.W_E[:m.p], W_L=(m.net.W_out @ m.net.W_U).T).items():   # p D, p F
        g = torch.Generator().manual_seed(0)
        null = torch.randn(m.p, m.net.W_E.shape[1], generator=g)
        if name == 'W_L':  # a product, too
            null = null @ torch.randn(len(m.net.W_U), W.shape[1], generator=g)
        out[f'{name} FFD'], out[f'{name} FCR'] = density_and_ratio(W)
        out[f'{name} FFD, Gaussian'], out[f'{name} FCR, Gaussian'] = density_and_ratio(null)
        for rows, key, by in ((W, name, ''), (W[by_log], f'{name}_mult', ' by logarithm')):
            cos_and_sin = cos_sin(rows).norm(dim=2)                                      # 2 n//2
            norms = cos_and_sin.square().sum(0).sqrt()
            out[f'{name} effective frequencies{by}'] = effective(norms.square())
            out[f'{name} Gini{by}'] = gini(norms)
            out[f'{key}_cos_sin'] = cos_and_sin
    logits = m.logits.view(m.p, m.p, m.d.n_ops, m.p)                                     # b a O c
    return out | dict(by_log=by_log, pattern=logits[..., 1].permute(2, 1, 0))


# ---------------------------------------------------------------- sums without a modulus

def components(net, x):
    """What each component writes into the residual stream of the last position, (2 + H, n, D): the token "="
    (embedding and position, and what blocks before the last have added), each head, the MLP. Their sum times
    W_U is the logits of tokens x (n, 3)."""
    acts = {}
    net(x, acts=acts)
    heads = torch.einsum('nth,nthk,hkd->hnd', acts['att'], acts['values'], net.W_O)
    return torch.cat([acts['resid_pre'][None], heads, (acts['neurons'] @ net.W_out)[None]])


def unseen_rows(m, most=None):
    """Validation and test rows, all or so many."""
    return torch.cat(m.rows[1:])[:most]


def low(m):
    """How many of the frequencies over the classes count as low: 50 of 260 (Zhou et al. 2024)."""
    return max(1, round(50 / 260 * (m.d.classes[0] // 2)))


def outputs(m):
    """The logits of each component alone on unseen rows: class_spectra (2 + H, C//2), their mean amplitude by
    frequency over the C classes; the share of low frequencies; periods that stand out in 1,000 rows."""
    spectra, shares, periods = [], [], []
    x, _ = m.d.batch(unseen_rows(m, int(2e8 / sum(m.d.classes))))  # logits of 800 MB at most
    for component in components(m.net, x):
        logits = component @ m.net.W_U                                                   # n C
        amplitude = torch.fft.rfft(logits, dim=1)[:, 1:].abs()
        power = amplitude.square().sum(0)
        spectra.append(amplitude.mean(0))
        shares.append((power[:low(m)].sum() / power.sum().clamp(min=1e-30)).item())
        periods.append((m.net.W_U.shape[1] / outliers(logits[:1000].T)[0]).tolist())
    return {'logits of "=", heads, MLP: low share': shares, 'logits of "=", heads, MLP: periods': periods,
            'class_spectra': torch.stack(spectra)}


def without(W_U, k):
    """The projection (D, D) that takes the frequencies k over the classes out of what W_U (D, C) reads, by
    the nearest vector whose logits have none of them (Zhou et al. 2024). Its rank is what is left of D. Other
    frequencies change too, unless W_U has orthogonal directions for each."""
    A = cos_sin(W_U.T)[:, k - 1].flatten(0, 1)                                           # 2n D
    _, S, V = torch.linalg.svd(A, full_matrices=False)
    V = V[S > 1e-5 * S[0]]
    return torch.eye(len(W_U), dtype=W_U.dtype) - V.T @ V


RATES = ('accuracy', 'within 2', 'within 10', 'errors off by tens', 'errors off by 1')  # last two: of errors


def errors(logits, y):
    """The five RATES of logits (n, C) against answers y (n,); a tie is wrong."""
    right = logits.gather(1, y[:, None])[:, 0]
    best_wrong, guess = logits.scatter(1, y[:, None], -torch.inf).max(1)
    off = torch.where(right > best_wrong, 0, (guess - y).abs())
    wrong = (off > 0).sum().clamp(min=1)
    within = [(off <= most).sum() / len(off) for most in (0, 2, 10)]
    by_tens = ((off > 0) & (off % 10 == 0)).sum() / wrong
    return torch.stack([*within, by_tens, (off == 1).sum() / wrong]).tolist()


def filters(m, draws=3):
    """The five RATES on unseen rows without the low or the high frequencies over the classes in what
    attention, the MLP or both write into the residual stream (Zhou et al. 2024). Attention is filtered before
    the MLP reads it. Beside them RATES without as many random directions, the mean of some draws."""
    x, y = m.d.batch(unseen_rows(m, int(2e8 / sum(m.d.classes))))
    net, tau = m.net, low(m)
    written = components(net, x)
    D, C = net.W_U.shape
    k = torch.arange(1, C // 2 + 1)
    g = torch.Generator().manual_seed(0)
    everything = torch.eye(D)
    start = written[0]
    heads = written[1:-1].sum(0)

    def rates(of_attention, of_mlp):
        mid = start + heads @ of_attention
        by_mlp = net.activation(mid @ net.W_in) @ net.W_out
        return errors((mid + by_mlp @ of_mlp) @ net.W_U, y[:, 0])

    out = {'tau, the highest low frequency': tau, 'filtered: nothing': rates(everything, everything)}
    for band, some in (('low', k[:tau]), ('high', k[tau:])):
        P = without(net.W_U, some)
        left = out[f'dimensions left without {band}'] = round(P.trace().item())
        random = [torch.linalg.qr(torch.randn(D, D - left, generator=g)).Q for _ in range(draws)]
        nulls = [everything - Q @ Q.T for Q in random]
        for where in ('MLP', 'attention', 'both'):
            rows = []
            for kept in (P, *nulls):
                of_attention = everything if where == 'MLP' else kept
                of_mlp = everything if where == 'attention' else kept
                rows.append(rates(of_attention, of_mlp))
            out[f'filtered: {band} from {where}'] = rows[0]
            out[f'filtered: {band} from {where}, random'] = np.mean(rows[1:], 0).tolist()
    return out


# ---------------------------------------------------------------- what fails when something is taken out

LEARNED = 0.9  # accuracy from which a task counts as learned


def groups_of(of_neurons, classes):
    """The group of each neuron, (F,): the q of its best wave, or the k if all waves are of one q. 0 where
    that wave has no more than half of what needs both digits. And the names of the groups, a list, first the
    moduli themselves."""
    q, k = of_neurons['neuron_wave'].T
    pure = of_neurons['neuron_wave_share'] > 0.5
    moduli = list(dict.fromkeys([*classes, *wave_freqs(classes)[:, 0].tolist()]))
    owner = (q if len(moduli) > 1 else k) * pure
    return owner, moduli if len(moduli) > 1 else owner[pure].unique().tolist()


def replaced(net, logits, neurons, group, values):
    """The logits (n, C) when of the neurons (n, F) a group, (F,) bool, has other values, (n, F) or (F,)."""
    return logits + (values - neurons)[:, group] @ (net.W_out[group] @ net.W_U)


def lost(accuracy, whole, classes):
    """What each learned task loses at some accuracy (G, Q) against that of the whole network (Q,), as a share
    of the way down to chance: (G, learned)."""
    return ((whole - accuracy) / (whole - 1 / torch.tensor(classes)))[:, whole >= LEARNED]


def separations(accuracy, whole, classes):
    """How far each group serves its own task alone, for the groups of the learned tasks, two at least: 1 if
    without it that task falls to chance and no other one loses anything, 0 if another one loses as much.
    accuracy (Q, Q): without the group of a task (row), of a task (column)."""
    losses = lost(accuracy, whole, classes)[whole >= LEARNED]
    of_others = losses.clone().fill_diagonal_(-torch.inf)
    return losses.diagonal() - of_others.amax(1)


def as_strong(groups, strength, generator):
    """For each group (G, F) as many random neurons as it takes to reach its total strength (F,): (G, F)."""
    order = torch.randperm(len(strength), generator=generator)
    total = (groups * strength).sum(1, keepdim=True)
    before = strength[order].cumsum(0) - strength[order]
    chosen = torch.zeros_like(groups)
    chosen[:, order] = before < total
    return chosen


def prime_accuracy(logits, y, classes):
    """On which share of the rows the tasks together tell primes: no modulus divides the number if no task
    says 0. Against the targets y (n, Q); a tie says not 0."""
    says_0 = torch.stack([block[:, 0] > block[:, 1:].amax(1) for block in logits.split(classes, 1)], 1)
    return (says_0.any(1) == (y == 0).any(1)).float().mean().item()


def accuracies(several_logits, y, classes):
    """Accuracy of each task for each of several logits (n, C): (G, Q)."""
    return torch.stack([task_losses(logits, y[:len(logits)], classes)[1] for logits in several_logits])


def circuits(m, of_neurons, draws=20):
    """Which task needs which neurons, on rows that were not trained on. The neurons are in G groups, see
    `groups_of`, by what `neurons` found; if there are none, that is all. Accuracies of each task:

    necessary   (G, Q)         with the neurons of a group at their means over all inputs
    sufficient  (G, Q)         with all other neurons at their means
    as_strong   (draws, G, Q)  with random neurons that write as much at their means, on 500 rows: the null
    primes      (1 + G,)       see `prime_accuracy`, with all neurons and without each group
    """
    net, d = m.net, m.d
    owner, names = groups_of(of_neurons, d.classes)
    groups = owner == torch.tensor(names, dtype=torch.long)[:, None]                     # G F
    if not groups.any():
        return {}
    rows = unseen_rows(m, most=10000)
    y = d.y[rows]
    logits = m.logits[rows]
    neurons = m.acts['neurons'][rows]
    mean = m.acts['neurons'].mean(0)

    def cut(groups, few=len(rows)):
        return [replaced(net, logits[:few], neurons[:few], group, mean) for group in groups]

    without_each = cut(groups)
    nothing = replaced(net, logits, neurons, slice(None), mean)
    whole = task_losses(logits, y, d.classes)[1]
    found = dict(groups=torch.tensor(names), group_sizes=groups.sum(1))
    found['necessary'] = accuracies(without_each, y, d.classes)
    found['sufficient'] = accuracies([nothing + logits - z for z in without_each], y, d.classes)
    strength = neurons.std(0) * (net.W_out @ net.W_U).norm(dim=1)
    g = torch.Generator().manual_seed(0)
    drawn = [cut(as_strong(groups, strength, g), few=500) for _ in range(draws)]
    found['as_strong'] = torch.stack([accuracies(several, y, d.classes) for several in drawn])
    if len(set(d.classes)) == 1:
        return found

    if d.classes == data.primes_below(m.p):
        right = [prime_accuracy(z, y, d.classes) for z in (logits, *without_each)]
        found['primes'] = torch.tensor(right)
        found['primes told from other numbers'] = right[0]
        found['the same by always saying "no prime"'] = (y == 0).any(1).float().mean().item()
    nobodys = owner[None] == 0
    found['neurons without a group'] = nobodys.sum().item()
    without = [cut(some) for some in (nobodys, as_strong(nobodys, strength, g))]
    found['accuracy of all tasks without these, without random ones as strong'] = [
        accuracies(several, y, d.classes).mean().item() for several in without]
    learned = whole >= LEARNED
    found['tasks learned'] = learned.sum().item()
    if learned.sum() < 2 or not {*d.classes} <= {*data.primes_below(max(d.classes) + 1)}:
        return found  # a group of 3 serves n mod 6 and n mod 15
    necessary = found['necessary'][learned][:, learned]
    own = necessary.diagonal()
    found['own task without its group'] = own.mean().item()
    by_chance = found['as_strong'][:, learned][:, :, learned].diagonal(dim1=1, dim2=2)
    found['own task without random neurons as strong'] = by_chance.mean().item()
    found['other tasks without it'] = ((necessary.sum() - own.sum()) / (len(own) * (len(own) - 1))).item()
    found['own task with its group alone'] = found['sufficient'].diagonal()[learned].mean().item()
    separation = separations(found['necessary'], whole, d.classes)
    found['separation'] = separation.mean().item()
    found['separation, the least of a group'] = separation.min().item()
    nulls = [separations(accuracy, whole, d.classes).mean().item() for accuracy in found['as_strong']]
    found['separation, as strong random neurons: least, most'] = [min(nulls), max(nulls)]
    return found


def shared(m):
    """What all tasks lose without something before the neurons: heads (.., Q), accuracies on rows that were
    not trained on with what each head, then what each pair writes at its mean over these rows."""
    net, classes = m.net, m.d.classes
    rows = unseen_rows(m, most=10000)
    y = m.d.y[rows]
    mid = m.acts['resid_mid'][rows]
    heads = components(net, m.d.x[rows])[1:-1]                                           # H n D
    heads -= heads.mean(1, keepdim=True)
    H = len(heads)
    sets = [some for size in (1, 2) for some in combinations(range(H), size)]

    def without_heads(some):
        left = mid - heads[list(some)].sum(0)
        return (left + net.activation(left @ net.W_in) @ net.W_out) @ net.W_U

    accuracy = accuracies(map(without_heads, sets), y, classes)
    whole = task_losses(m.logits[rows], y, classes)[1]
    found = dict(heads=accuracy)
    for name, some in {'head': accuracy[:H], 'pair of heads': accuracy[H:]}.items():
        if len(some) and (whole >= LEARNED).any():
            halved = (lost(some, whole, classes) > 0.5).sum(1).float()
            found[f'tasks that lose more than half without a {name}'] = halved.mean().item()
    return found


@torch.no_grad()
def surgery(run, names, keep=False):
    """Accuracy of every task on rows that were not trained on, with all neurons, and with the groups of some
    q or k at their means; keep: with all others there. As text. Refused where a group is empty."""
    d, p = run.data, run.p
    need(d.stride and d.n_ops == 1, f'{run.path} is no network of one operation modulo something')
    logits, acts = run.forward()
    found = neurons(SimpleNamespace(d=d, p=p, acts=acts, solver=wave_solver(p, d.classes, d.stride)))
    owner, _ = groups_of(found, d.classes)
    there = owner[owner > 0].unique().tolist()
    missing = [name for name in names if name not in there]
    need(not missing, f'{run.path} has no neurons for {show(missing)}; groups there: {show(there)}')
    group = torch.isin(owner, torch.tensor(names)) != keep
    rows = unseen_rows(run)
    mean = acts['neurons'].mean(0)
    changed = replaced(run.net, logits[rows], acts['neurons'][rows], group, mean)
    both = accuracies([logits[rows], changed], d.y[rows], d.classes)
    lines = [['task', 'all neurons', 'now'], *zip(d.names, *both.tolist())]
    what = 'no others than those' if keep else 'all neurons but those'
    return (f'{run.path} with {what} of {show(names)}: {group.sum()} of {len(group)} are at their means\n'
            f'accuracy on {len(rows):,} numbers never seen\n{aligned(lines)}')


# ---------------------------------------------------------------- letters of waves, waves in place of neurons

def letters(freqs, p):
    """A wave cos(2 pi k n / q) of n = x0 + p x1 makes k / q turns per step of x0 and p k / q per step of x1,
    so W_E has to hold both. These are its letters: turns over the p digits, folded to 0 .. p / 2.
    freqs (B, 2) of (q, k) -> (B, 2)."""
    q, k = freqs.T
    turns = torch.stack([k, k * p % q], 1).double() / q[:, None]
    return p * torch.minimum(turns, 1 - turns)


def dimensions(some_letters, p):
    """How many dimensions over the p digits the cosines and sines of letters span: the effective rank (sum
    s^2)^2 / sum s^4 of these waves, each of norm 1."""
    phases = 2 * torch.pi / p * some_letters.flatten()[:, None] * torch.arange(p)
    basis = functional.normalize(torch.cat([phases.cos(), phases.sin()]))
    return effective(torch.linalg.svdvals(basis).square())


def distances(some_letters, others):
    """From each letter to the nearest of others."""
    return (some_letters[..., None] - others.flatten()).abs().amin(-1)


def at_random(freqs, has, generator):
    """Waves (B,) bool, of each q as many as `has` (B,) has, of any k: by chance."""
    chosen = torch.zeros_like(has)
    for q in freqs[has, 0].unique():
        of_q = torch.nonzero(freqs[:, 0] == q)[:, 0]
        order = torch.randperm(len(of_q), generator=generator)
        chosen[of_q[order[:has[of_q].sum()]]] = True
    return chosen


def alphabet(m, of_neurons, draws=100):
    """Whether the waves of different q share letters, and tasks need them. Waves of q > 7 are counted, as 2,
    3, 5 and 7 have few to choose from; by chance (1 %, median, 99 %) means `at_random`.

    letters (B, 2) and carried (B,) of wave_freqs; band_cuts (p//2 - 2, Q): accuracies on rows that were not
    trained on without the frequencies k, k+1, k+2 in W_E; random_cuts (30, Q): without three random ones.
    """
    p, d, freqs = m.p, m.d, wave_freqs(m.d.classes)
    spelled, has = letters(freqs, p), carried(of_neurons['wave_shares'][0], p)
    late = has & (freqs[:, 0] > 7)
    first = spelled[has & ~late]
    if not late.any():
        return dict(letters=spelled, carried=has) if has.any() else {}
    found = {'letters': spelled, 'carried': has, 'waves of q > 7': late.sum().item()}
    g = torch.Generator().manual_seed(0)
    nulls = [at_random(freqs, late, g) for _ in range(draws)]
    measures = {'dimensions of their letters': lambda some: dimensions(spelled[some], p)}
    if len(first):
        measures['share of their letters within 1 of one of 2, 3, 5, 7'] = (
            lambda some: (distances(spelled[some], first) < 1).double().mean().item())
    for name, measured in measures.items():
        found[name] = measured(late)
        by_chance = [measured(some) for some in nulls]
        found[f'{name}, by chance'] = np.quantile(by_chance, (0.01, 0.5, 0.99)).tolist()

    rows = unseen_rows(m, most=2000)
    whole = task_losses(m.logits[rows], d.y[rows], d.classes)[1]
    W_E, fourier = m.net.W_E[:p].clone(), cos_sin(torch.eye(p)).transpose(0, 1)          # p//2 2 p
    bands = [torch.arange(k, k + 3) for k in range(p // 2 - 2)]
    triples = [torch.randperm(p // 2, generator=g)[:3] for _ in range(30)]
    for name, cuts, kind in (('band_cuts', bands, 'in a row'), ('random_cuts', triples, 'at random')):
        found[name] = []
        for some in cuts:
            Q = fourier[some].flatten(0, 1)                                              # 6 p, orthonormal
            m.net.W_E[:p] = W_E - Q.T @ (Q @ W_E)
            found[name].append(task_losses(m.net(d.x[rows]), d.y[rows], d.classes)[1])
        found[name] = torch.stack(found[name])
        halved = (lost(found[name], whole, d.classes) > 0.5).sum(1).float()
        found[f'tasks that lose more than half without three frequencies of W_E {kind}: mean, most'] = [
            halved.mean().item(), halved.max().item()]
    m.net.W_E[:p] = W_E
    return found


def rebuilt(m, of_neurons):
    """The network when each neuron is replaced by a description of it: by what one digit alone says, by that
    and its own wave (the sum and the difference wave of its best q and k), by that and a wave of another k of
    its q (none if it is the only one), by that and the joint fit of all waves; or by all but its own wave.

    rebuilt_accuracies and rebuilt_losses (2, 6, Q): on training rows and on others; first as they are.
    """
    p, d, freqs = m.p, m.d, wave_freqs(m.d.classes)
    inter, _, inv = m.solver
    inverses = single_inverses(m.solver)
    a = m.acts['neurons']
    both_digits = interactions(a, p)
    B, F = len(freqs), a.shape[1]
    b = inter @ both_digits                                                              # 4B F

    def one_wave(which):
        """Coefficients (4B, F) of one wave of wave_freqs in each neuron, which (F,)."""
        c, each = torch.zeros(4, B, F), torch.arange(F)
        c[:, which, each] = torch.einsum('fij,jf->if', inverses[which], b.view(4, B, F)[:, which, each])
        return c.flatten(0, 1)

    wave = of_neurons['neuron_wave']
    own = (freqs == wave[:, None]).all(2).float().argmax(1)
    start = (freqs[:, 0] < wave[:, :1]).sum(1)  # where the waves of its q begin, and how many there are
    length = (freqs[:, 0] == wave[:, :1]).sum(1)
    step = 1 + torch.rand(F, generator=torch.Generator().manual_seed(0)) * (length - 1)
    other = start + (own - start + step.long()) % length
    fits = {'one digit': 0 * b, 'one digit, own wave': one_wave(own),
            'one digit, a wave of another k': one_wave(other) * (length > 1),
            'one digit, all waves': inv @ b}
    values = {'they are': a} | {name: a - both_digits + inter.T @ c for name, c in fits.items()}
    values['they are, less their own wave'] = 2 * a - both_digits - values['one digit, own wave']
    found = dict(rebuilt_losses=[], rebuilt_accuracies=[])
    for rows in (m.rows[0], unseen_rows(m)):
        whole = m.logits[rows]
        logits = [replaced(m.net, whole, a[rows], slice(None), some[rows]) for some in values.values()]
        losses, accuracy = map(torch.stack, zip(*(task_losses(z, d.y[rows], d.classes) for z in logits)))
        found['rebuilt_losses'].append(losses)
        found['rebuilt_accuracies'].append(accuracy)
    found = {name: torch.stack(both) for name, both in found.items()}
    per_ln_q = (found['rebuilt_losses'] / torch.tensor(d.classes).log()).mean(2)
    for i, name in enumerate(values):
        acc = found['rebuilt_accuracies'][1, i]
        found[f'neurons as {name}'] = [
            acc.mean().item(), (acc >= 0.99).sum().item(), *per_ln_q[:, i].flip(0).tolist()]
    return found


def arrivals(m):
    """When waves come, by the recorded spectra, {} without these. arrived (B,): the first recorded epoch from
    which a wave of wave_freqs is carried for good, -1 if never. arrival_ranks (2, B), for q > 10: of the
    other waves of its q the share whose letters are nearer (mean of both) to those of the waves that came
    before it, and to those of the waves that came after it; -1 for all others."""
    p, records = m.p, m.records
    if not len(records.get('sum_power', [])):
        return {}
    freqs, epochs = wave_freqs(m.d.classes), records['spectra_epoch']
    spelled = letters(freqs, p)
    interaction = np.maximum(records['variance'][:, 0] - records['variance'][:, 1], 1e-30)
    has = carried(torch.from_numpy(records['sum_power'] / interaction[:, None]), p)      # by epoch, B
    since = len(epochs) - has.flip(0).cumprod(0).sum(0)
    ranks = torch.full((2, len(freqs)), -1.0)
    for i in torch.nonzero((since > 0) & (since < len(epochs)) & (freqs[:, 0] > 10))[:, 0]:
        before, after = since < since[i], (since > since[i]) & (since < len(epochs))
        for rank, others in zip(ranks, (before, after)):
            if before.any() and after.any():
                distance = distances(spelled[freqs[:, 0] == freqs[i, 0]], spelled[others]).mean(1)
                less = distance - distance[i - (freqs[:, 0] < freqs[i, 0]).sum()]
                nearer, same = (less < -1e-9).sum(), (less.abs() <= 1e-9).sum() - 1
                rank[i] = (nearer + same / 2) / (len(distance) - 1)
    known = ranks[:, ranks[0] >= 0]
    if not known.numel():
        return {}
    name = 'share of the waves of a q nearer to the letters before a new one, after it'
    arrived = torch.from_numpy(np.append(epochs, -1))[since]
    return {name: known.mean(1).tolist(), 'arrived': arrived, 'arrival_ranks': ranks}


# ---------------------------------------------------------------- letters by design

def design(n_bands, p, classes):
    """An alphabet from number theory alone: bands of letters, (n_bands,) in turns over the p digits, that
    spell waves of every q of wave_freqs. A wave is spelled if both of its letters lie within .8 of a band.
    The search starts with the letters of the smallest q, and moves one band at a time to where the product
    over q of (number of waves + .1) is largest. Refused where a q is left without a wave."""
    freqs, places = wave_freqs(classes), torch.arange(1, p) / 2
    moduli = freqs[:, 0].unique()
    distance = (letters(freqs, p)[..., None] - places).abs()                             # B 2 places
    of_each = (freqs[:, 0] == moduli[:, None]).double()                                  # moduli B

    def waves(chosen):
        return of_each @ (distance[..., chosen] < 0.8).any(2).all(1).double()

    chosen = list(dict.fromkeys(distance.argmin(2).flatten().tolist()))[:n_bands]
    need(len(chosen) == n_bands, f'the waves of this task have {len(chosen)} letters, not {n_bands}')
    for i in [*range(len(chosen))] * 5:
        others = chosen[:i] + chosen[i + 1:]
        free = sorted({*range(len(places))} - {*others})
        chosen[i] = max(free, key=lambda place: (waves([*others, place]) + 0.1).log().sum())
    without = moduli[waves(chosen) == 0].tolist()
    need(not without, f'{n_bands} bands of letters spell no wave of {show(without)}; more are needed')
    return places[chosen].sort().values


def written(bands, p, width):
    """W_E of the digits, (p, width), by hand: for each band cosine and sine of its middle and of half a turn
    to either side, in random directions; a quarter of the power is noise. Its entries are as large as those
    of a trained one (assets/miiii)."""
    turns = (bands[:, None] + torch.tensor([-0.5, 0, 0.5])).flatten()
    phases = 2 * torch.pi / p * torch.arange(p)[:, None] * turns
    waves = functional.normalize(torch.cat([phases.cos(), phases.sin()], 1), dim=0)
    W, noise = waves @ torch.randn(waves.shape[1], width), torch.randn(p, width)
    return 0.148 * (0.75 ** 0.5 * W / W.square().mean().sqrt() + 0.25 ** 0.5 * noise)


# ---------------------------------------------------------------- all measurements, the table

ALWAYS = 'final initial snapshots'
MEASUREMENTS = {  # heading, which networks it is for (see `measure`), at which moments, after which others
    answers: ('answers', 'any', ALWAYS),
    turning: ('answers', 'waves', 'final initial'),
    embedding: ('embedding', 'any', ALWAYS),
    periods_of_embedding: ('embedding', 'any', 'final initial'),
    positions: ('embedding', 'any', ALWAYS),
    attention: ('attention', 'any', ALWAYS),
    neurons: ('neurons', 'waves', ALWAYS),
    polynomials: ('W_E and W_L as waves, by numbers and by logarithms', 'mod p', ALWAYS),
    mechanism: ('key frequencies of the logits', 'one sum', ALWAYS),
    outputs: ('logits of each component', 'no modulus', 'final initial'),
    filters: ('frequencies of the logits filtered', 'no modulus', 'final'),
    circuits: ('circuits', 'waves, one operation', 'final', neurons),
    alphabet: ('letters', 'waves, all primes', 'final', neurons),
    arrivals: ('letters', 'waves, all primes', 'final'),
    rebuilt: ('neurons replaced', 'waves, several moduli', 'final', neurons),
    shared: ('attention', 'waves, one operation', 'final')}
# the arrays that are kept of every moment
SMALL = ('train_losses', 'train_accuracies', 'valid_accuracies')


@torch.no_grad()
def measure(run, weights, moment, solver, key=None):
    """All MEASUREMENTS of the weights of one moment: numbers and short lists; arrays; the labels of the
    numbers by heading. key: the final weights' key frequencies, None to find them."""
    logits, acts = run.forward(weights)
    d, p = run.data, run.p
    m = SimpleNamespace(net=run.net, d=d, p=p, rows=run.rows, logits=logits, acts=acts, solver=solver,
                        key=key, records=run.records)
    sums = (d.x[:, 0] + d.x[:, 1]) % p
    mod_p = d.classes == [p] * d.n_ops
    one_sum = mod_p and d.n_ops == 1 and torch.equal(d.y[:, 0], sums)
    kinds = {'any': True, 'waves': solver is not None, 'no modulus': d.stride == 0, 'mod p': mod_p,
             'one sum': one_sum, 'waves, one operation': solver is not None and d.n_ops == 1,
             'waves, all primes': solver is not None and d.classes == data.primes_below(p),
             'waves, several moduli': solver is not None and len(set(d.classes)) > 1}
    found, results, headings = {}, {}, {}
    for measurement, (heading, kind, moments, *earlier) in MEASUREMENTS.items():
        if kinds[kind] and moment in moments.split():
            some = results[measurement] = measurement(m, *(results[other] for other in earlier))
            new = [name for name in some if not isinstance(some[name], torch.Tensor)]
            if new:
                headings.setdefault(heading, []).extend(new)
            found |= some
    # the next weights go into the same memory, so arrays are copied
    arrays = {name: value.clone() for name, value in found.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in found.items() if name not in arrays}
    return numbers, arrays, headings


def over_snapshots(run, solver, key):
    """Numbers and small arrays of all snapshots and the final weights: snapshot_NAME, by snapshot_epoch."""
    out = {}
    began = time.perf_counter()
    moments = run.snapshots | {run.epoch: run.weights}
    for i, (epoch, weights) in enumerate(moments.items()):
        numbers, arrays, _ = measure(run, weights, 'snapshots', solver, key)
        some = {name: arrays[name].numpy() for name in SMALL if name in arrays}
        for name, value in (numbers | some | dict(epoch=epoch)).items():
            out.setdefault(f'snapshot_{name}', []).append(value)
        if sys.stdout.isatty():
            left = (time.perf_counter() - began) / (i + 1) * (len(moments) - i - 1)
            say(f'\r\033[Ksnapshot {i + 1}/{len(moments)}  ETA {left:.0f} s', end='' if left else '\r\033[K')
    return {name: np.array(values) for name, values in out.items()}


@plain_torch()
def take_apart(run):
    """All there is to say of a run: numbers, arrays; written into the folder run.to."""
    with contextlib.suppress(OSError):
        run.to.mkdir(parents=True, exist_ok=True)
    need(os.access(run.to, os.W_OK), f'cannot write into {run.to}; --to FOLDER writes elsewhere')
    d, solver = run.data, None
    try:
        if d.stride:
            solver = wave_solver(run.p, d.classes, d.stride)
    except data.Refusal as e:
        run.notes.append(f'nothing about neurons: {e}')
    final, arrays, headings = measure(run, run.weights, 'final', solver)
    key = final.get('key frequencies')
    initial, start, _ = measure(run, run.initial, 'initial', solver, key)
    for name in start.keys() & {'singular_values', 'W_E_norms', 'wave_shares'}:
        arrays[f'{name}_initial'] = start[name]
    arrays['freqs'] = wave_freqs(d.classes)
    arrays |= over_snapshots(run, solver, key) if run.snapshots else run.shipped
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    numbers = dict(config=run.config, epoch=run.epoch, final=final, initial=initial, headings=headings)
    run.net.load_state_dict(run.weights)
    write(run.to / 'analysis.npz', lambda f: np.savez(f, **arrays))
    write(run.to / 'analysis.json', lambda f: f.write(json.dumps(numbers, indent=1).encode()))
    return numbers, arrays


# What is said of a run if each number in it is known. In braces stands its label, after "start" for that
# before training, with [i] for one of a list. `sentences` makes some that are known of some runs only.
SENTENCES = [
    'Of the {rows, unseen} {things} that it never saw in training it is right on a share of {accuracy, '
    'unseen}. Always giving the commonest answer would be right on {accuracy, unseen, of the commonest '
    'answer}.',
    'These are means over {several} tasks. {tasks trained} of the tasks are trained, and the number of '
    'those that reach .99 on unseen {things} is {tasks at .99, unseen}.',
    'On {rows, unseen, nor swapped} unseen pairs that were not trained on with the digits swapped either, '
    'it is right on {accuracy, unseen, nor swapped}.',
    'No task has grokked, that is, come to {bar} on what it never saw. On the {rows, train} {things} that '
    'it was trained on it is right on {accuracy, train}.',
    '{n keys} key frequencies k stand out in its logits as cos(2 pi k (x0 + x1 - c) / {p}), c being the '
    'answer. They make {logits in key cosines} of the variance of the logits, as many others {logits in as '
    'many others}.',
    'With these {n keys} alone the loss is {restricted loss} (restricted loss), without them {excluded '
    'loss} (excluded loss). As it is the loss is {loss on all inputs}, and by uniform guessing {guessing}.',
    'Seen as waves over the numbers, its embedding W_E holds in effect {W_E effective frequencies} of '
    '{half} frequencies, and before training {start W_E effective frequencies}. Over discrete logarithms, '
    'which turn products into sums, it holds {W_E effective frequencies by logarithm}, and before training '
    '{start W_E effective frequencies by logarithm}.',
    '{pure neurons} of {neurons that vary} neurons hold one wave: a cosine of {turns}, with its twin that '
    'has -x1 for x1, makes more than half of what needs both digits. Before training {start pure neurons} '
    'of {start neurons that vary} do.',
    'Without the neurons that hold its own waves a task is right on {own task without its group}, without '
    'random ones that write as much on {own task without random neurons as strong}. Without its neurons '
    'the other tasks are right on {other tasks without it}: means over the {tasks learned} tasks that it '
    'has learned.',
    'The separation of these neurons is {separation}: it is 1 where no other task suffers, and 0 where one '
    'suffers as much. Random neurons that write as much have at most {separation, as strong random '
    'neurons: least, most[1]}.',
    'A wave has a frequency over each digit, its two letters. Those of the {waves of q > 7} waves of q > 7 '
    'that the neurons carry span {dimensions of their letters} dimensions, those of as many waves at '
    'random {dimensions of their letters, by chance[1]}.',
    'With each neuron replaced by what one digit says and its own wave, it is right on {neurons as one '
    'digit, own wave[0]} of the unseen; with a wave of another k, on {neurons as one digit, a wave of '
    'another k[0]}.',
    'It is off by at most 2 on {filtered: nothing[1]} of the unseen, by at most 10 on {filtered: '
    'nothing[2]}. Always saying {middle} would be so on {near it[0]} and {near it[1]}.',
    'As waves over the {sums} answers, what the MLP writes has low frequencies, up to {tau, the highest '
    'low frequency}, and high ones. Without the low ones it is right on {filtered: low from MLP[0]}, '
    'without as many random directions on {filtered: low from MLP, random[0]}. Without the high ones it is '
    'right on {filtered: high from MLP[0]}, without as many random directions on {filtered: high from MLP, '
    'random[0]}.',
    'Among the waves over the numbers 0 to {middle} in its embedding W_E those of these periods stand out: '
    '{W_E periods that stand out}. Before training it is these: {start W_E periods that stand out}.']


def spoken(x):
    """A number as a sentence has it: .998, 1.0, 8,938, 3e-7. Less than 1 is not rounded up to 1."""
    if not isinstance(x, float):
        return ', '.join(map(spoken, x)) or 'none' if isinstance(x, list) else show(x)
    if 0.9995 <= x < 1.0005:
        return '1.0' if x > 0.999999 else f'.{int(1e4 * x)}'
    text = f'{x:.0e}' if 0 < abs(x) < 0.001 else f'{x:.2g}' if abs(x) < 0.1 else f'{x:.3g}'
    text = f'{x:,.0f}' if abs(x) >= 999 else text
    return re.sub(r'\b0\.', '.', text).replace('e-0', 'e-')


def sentences(numbers):
    """What a run came to: a list of SENTENCES with the numbers of `take_apart`, each beside its null."""
    p, task, final = numbers['config']['p'], numbers['config']['task'], numbers['final']
    of_n = data.of_n(task)
    known = {f'start {name}': value for name, value in numbers['initial'].items()} | final
    turns = f'2 pi k n / q for one q and k, n = x0 + {p} x1' if of_n else f'2 pi k (x0 + x1) / {p} for one k'
    known |= dict(p=p, half=p // 2, guessing=math.log(p), things='numbers' if of_n else 'pairs', turns=turns)
    if final.get('key frequencies'):
        known['n keys'] = len(final['key frequencies'])
    if final.get('tasks', 1) > 1:
        known['several'] = final['tasks']
    if final.get('tasks at .99, unseen') == 0:
        known['bar'] = 0.99
    if task == 'add':
        near = [((2 * t + 1) * p - t * (t + 1)) / p ** 2 for t in (2, min(10, p - 1))]
        known |= {'middle': p - 1, 'near it': near, 'sums': 2 * p - 1}
    known |= {f'{name}[{i}]': one for name, value in known.items() if isinstance(value, list)
              for i, one in enumerate(value)}
    return [re.sub('{(.+?)}', lambda label: spoken(known[label[1]]), text) for text in SENTENCES
            if known.keys() >= set(re.findall('{(.+?)}', text))]


TABLES = {'filtered': RATES, 'neurons as': ('accuracy', 'tasks at .99', 'loss / ln q', 'in training')}


def table(numbers):
    """The numbers of a run as text, a table for each heading, beside their values at initialisation."""
    o, final, initial = numbers['config'], numbers['final'], numbers['initial']
    text = [f'{o["task"]}, p = {o["p"]}, D = {o["d_model"]}, epoch {numbers["epoch"]:,}']
    for heading, names in numbers['headings'].items():
        rows, lists = [[heading, 'now', 'at initialisation']], []
        for name in names:
            value = final[name]
            if not isinstance(value, list):
                rows.append([name, value, initial.get(name)])
            elif not name.startswith(tuple(TABLES)):
                then = f' (at initialisation {show(initial[name])})' if name in initial else ''
                lists.append(f'{name}: {show(value)}{then}')
        for kind, columns in TABLES.items():
            of_kind = [[name, *final[name]] for name in names if name.startswith(kind)]
            if of_kind:
                lists.append(aligned([['', *columns], *of_kind]))
        text.append('\n'.join([aligned(rows), *lists]))
    return '\n\n'.join(text)


RUNS = Path(__file__).parent / 'assets' / 'runs.csv'  # a row for each run that README and report tell of


def record(run):
    """Append a row of what a finished run came to to assets/runs.csv."""
    file = run.path / 'summary.json'
    need(file.exists(), f'{run.path} holds no finished run')
    s = json.loads(file.read_text())
    need(s['epochs'] == run.epoch and 'commit' in s, f'{file} is older than the run or this version')
    words = [word for word in shlex.split(s['options']) if not word.startswith(('--seed', '--data_seed'))]
    row = [shlex.join(words), run.config['seed'], run.config['data_seed'], s['commit'], s['epochs'],
           len(s['tasks'])]
    for rows in ('valid', 'test'):
        acc = np.array([task[f'{rows}_acc'] for task in s['tasks']])
        row += [f'{acc.mean():.4f}', (acc >= 0.99).sum(), (acc == 1).sum()]
    for key in ('grok_epoch', 'grok_epoch_sustained'):
        row.append(' '.join('-' if task[key] is None else str(task[key]) for task in s['tasks']))
    row += [f'{s["wall_s"] / 60:.3g}', s['device'], s['versions']['torch']]
    with open(RUNS, 'a+', newline='') as f:
        f.seek(0)
        need([*map(str, row)] not in csv.reader(f), f'{run.path} is in {RUNS} already')
        csv.writer(f, lineterminator='\n').writerow(row)


def main(argv):
    def numbers(text):
        return [int(number) for number in text.split(',')]

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    option = parser.add_argument
    option('runs', nargs='*', metavar='RUN', help='a run folder written by train.py')
    option('--to', metavar='FOLDER', help='write into FOLDER/NAME-OF-RUN, not into the run folder')
    option('--record', action='store_true', help='instead: append what the runs came to to assets/runs.csv')
    option('--cut', metavar='Q,Q', type=numbers, help='instead: accuracies without neurons of these q or k')
    option('--keep', metavar='Q,Q', type=numbers, help='instead: accuracies with no other neurons than these')
    option('--embedding', metavar='FILE', help='periods of a matrix with a row per number, .npy or .pt')
    args = parser.parse_args(argv)
    need(args.runs or args.embedding, 'name a run folder, or --embedding FILE')
    names = args.cut if args.keep is None else args.keep
    need(args.cut is None or args.keep is None, '--cut or --keep, not both')
    need(names is None or args.runs and not args.record, '--cut and --keep are for a run, without --record')
    for path in map(Path, args.runs):
        run = load_run(path, args.to)
        if names is not None:
            say(surgery(run, names, keep=args.cut is None))
            continue
        if args.record:
            record(run)
            say(f'{path} is a row of {RUNS} now')
            continue
        run.known = take_apart(run)
        told = [textwrap.fill(text, 100, subsequent_indent='  ') for text in sentences(run.known[0])]
        say('\n'.join([f'{path}', *told, '', table(run.known[0])]))
        say(f'\nevery label is defined in {RUNS.with_name("report.md")}, section Labels\n'
            f'all of it is in {run.to}/analysis.json and analysis.npz\n')
        for note in run.notes:
            say(f'note: {note}')
    if args.embedding:
        W = load_matrix(Path(args.embedding))
        need(len(W) >= 8 and (W - W[0]).any(), f'{args.embedding} needs 8 rows that are not all alike')
        periods = ', '.join(f'{len(W) / k:.4g}' for k in outliers(W)[0]) or 'none'
        say(f'{args.embedding}: {len(W)} rows, {W.shape[1]} columns\nperiods that stand out: {periods}')


if __name__ == '__main__':
    data.run_script(main)
