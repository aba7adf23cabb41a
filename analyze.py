"""From a run folder to numbers: what the weights and activations of a trained model hold. Nothing here trains or draws.

    python analyze.py out/miiii [out/nanda ...]

Prints a table per run and writes analysis.json (single numbers) and analysis.npz (arrays) into its folder. Every number stands
beside the same number of the same weights at initialisation, its null.
"""
import argparse
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import data
from data import Refusal, load, refuse, write
from model import Transformer, task_losses


# ---------------------------------------------------------------------------------------------------- spectra

def fourier(W):
    """Coefficients of the columns of W (p, D), p odd, in the orthonormal real Fourier basis over the rows: (p, D), the rows
    const, cos 1, sin 1, cos 2, sin 2, ..."""
    z = torch.fft.rfft(W, dim=0, norm='ortho')[1:] * 2 ** 0.5
    return torch.cat([W.mean(0, keepdim=True) * len(W) ** 0.5, torch.stack([z.real, -z.imag], 1).flatten(0, 1)])


def active(spectrum):
    """How many entries of each column stand above mean + 2 sd of the column: (..., F) -> (F,)."""
    s = spectrum.flatten(0, -2)
    return (s > s.mean(0) + 2 * s.std(0)).sum(0)


def gini(x):
    """Gini coefficient of n values >= 0: 0 if all are equal, near 1 if one has everything."""
    n = len(x)
    return ((2 * torch.arange(1, n + 1) - n - 1) * x.sort().values).sum() / (n * x.sum())


def effective(power):
    """How many of the entries carry it: (sum s)^2 / sum s^2."""
    return power.sum() ** 2 / power.square().sum()


def wave_freqs(classes):
    """The pairs (q, k), (B, 2): every q of `classes` with k = 1 .. q//2. The 29 tasks at p = 113 have B = 726."""
    return torch.tensor([(q, k) for q in classes for k in range(1, q // 2 + 1)])


MAX_MEMORY = 6e9  # bytes: above that no waves are fitted


def wave_memory(p, classes):
    """Bytes that `wave_solver` needs at its peak."""
    return 48 * sum(q // 2 for q in classes) * p ** 2


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
    """Least-squares fit of all waves of a basis (4, B, p^2) together, through the part of each that neither x0 nor x1 has
    alone (its interaction).

    -> inter (4B, p^2), the interactions of the waves; inv (4B, 4B), the inverse of their Gram matrix; and alone (4, 4, B), the
    inverse Gram matrix of the four waves of each (q, k). b = inter @ a and c = inv @ b are the coefficients of an activation
    a (p^2,), whose own marginals do not matter, and c * b / p^2 is the variance that each wave contributes.
    """
    grid = basis.view(-1, p, p)
    inter = (grid - grid.mean(1, keepdim=True) - grid.mean(2, keepdim=True) + grid.mean((1, 2), keepdim=True)).flatten(1)
    gram = inter @ inter.T  # normalised, its eigenvalues run from .048 to 2.02 at p = 113: float32 does
    gram += torch.diag((gram.diagonal() < 1e-3).to(gram.dtype))  # a wave that vanishes has b = c = 0
    blocks = gram.view(4, len(grid) // 4, 4, -1).diagonal(dim1=1, dim2=3)            # 4 4 B
    return inter, torch.linalg.inv(gram), torch.linalg.inv(blocks.permute(2, 0, 1)).permute(1, 2, 0)


def decompose(neurons, p, inter, inv, alone):
    """Where the variance of each activation (p^2, F) lies.

    variance   (F,)       in all
    marginals  (F,)       in functions of x0 alone and of x1 alone; the rest is the interaction
    waves      (2, B, F)  in the sum wave and in the difference wave of each (q, k), cos and sin together. Their sum is what
                          the joint fit explains. White noise has 1/(p-1)^2 of its interaction in each cosine and each sine on
                          average, however alike two waves may be; a single entry can be negative, or more than there is.
    single     (B, F)     in both waves of each (q, k), fitted without the others: never negative, never more than there is
    """
    grid = neurons.view(p, p, -1)                                                    # x1 x0 F
    b = inter @ neurons                                                              # 4B F
    waves = (b * (inv @ b)).view(2, 2, -1, b.shape[1]).sum(1) / p ** 2
    b = b.view(4, -1, b.shape[1])
    return dict(variance=neurons.var(0, correction=0), marginals=sum(grid.mean(axis).var(0, correction=0) for axis in (0, 1)),
                waves=waves, single=torch.einsum('ibf,ijb,jbf->bf', b, alone, b) / p ** 2)


def dft2(neurons, p):
    """|2-D DFT| / p^2 of activations (p^2, F) without their means: (p//2+1, p, F), frequencies of x1 and x0. The other half, of
    negative frequencies of x1, mirrors this one."""
    return torch.fft.rfft2((neurons - neurons.mean(0)).view(p, p, -1), dim=(1, 0), norm='forward').abs()


def neuron_spectra(neurons, p, solver):
    """Spectra of activations (p^2, F) over all inputs, reduced to a dict of small tensors; every mean is over the F neurons.

    spectrum          (p//2+1,) |2-D DFT| / p^2, mean over the frequencies of x0, so that those of x1 remain
    sum_power         (B,) variance in the sum wave of each (q, k)
    difference_power  (B,) variance in the difference wave
    variance          (2,) variance in all, and in the two marginals (functions of x0 alone and of x1 alone)
    active            (3,) see `active_counts`
    """
    parts, dft = decompose(neurons, p, *solver), dft2(neurons, p)
    return dict(spectrum=dft.mean((1, 2)), sum_power=parts['waves'][0].mean(1), difference_power=parts['waves'][1].mean(1),
                variance=torch.stack([parts['variance'].mean(), parts['marginals'].mean()]), active=active_counts(dft))


def active_counts(dft):
    """How many frequencies are active, that is above mean + 2 sd, in `dft2` (p//2+1, p, F), counted in three ways: (3,).

    Bins of a neuron's 2-D DFT, the mean over neurons (the paper's rule); frequencies of x1 after the mean over those of x0, the
    mean over neurons (the averaging of the paper's code, which looks at one neuron); the same in the mean of all neurons. Neurons
    that do not vary, as some at initialisation, are left out.
    """
    bins, own, largest = torch.cat([dft, dft[1:]]), dft[1:].mean(1), dft.amax((0, 1))      # p p F, p//2 F, F
    varies = largest > 1e-5 * largest.max()
    counts = [(active(s) * varies).sum() / varies.sum().clamp(min=1) for s in (bins, own)]
    return torch.stack([*counts, active(own.mean(1, keepdim=True))[0]])


def strong(share, null):
    """Which (q, k) a layer carries: those whose sum wave has more of the interaction than the (q, k) have on average, and
    more than twice what the strongest has at initialisation. share (..., B), null (B,) -> (..., B) bool."""
    return share > share.mean(-1, keepdim=True).clamp(min=2 * null.max())


# ---------------------------------------------------------------------------------------------------- parts of a model
# each returns numbers (floats, short lists) and arrays (tensors), for the weights of one moment

def embedding(W):
    """W_E of the digits (p, D): singular values and p-DFT over the tokens (figures 8 to 13 of the paper)."""
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    coef = fourier(W)
    norms = coef[1:].view(len(W) // 2, -1).norm(dim=1)                               # p//2, cos and sin together
    need = [int((S.cumsum(0) < share * S.sum()).sum()) + 1 for share in (0.5, 0.9)]
    numbers = dict(W_E_n50=need[0], W_E_n90=need[1], W_E_active=active(norms[:, None]), W_E_gini=gini(norms),
                   W_E_effective=effective(norms.square()))
    return numbers, dict(singular_values=S, left_vectors=U, W_E_fourier=coef, W_E_norms=norms)


def positions(W_pos):
    """Pearson correlation of the embeddings of positions 0 and 1 (figure 7)."""
    return dict(W_pos_pearson=torch.corrcoef(W_pos[:2])[0, 1].nan_to_num()), dict(W_pos=W_pos)


def attention(att, p):
    """Attention of the last token, (p^2, 3, H). The score of a head is +1 if it attends x0 alone, -1 if x1 alone, 0 if both alike."""
    mean = att.mean(0)                                                               # 3 H
    return dict(attention_x0=mean[0], attention_x1=mean[1], attention_score=(mean[0] - mean[1]) / (mean[0] + mean[1])), \
        dict(attention=att[:, 0].T.view(-1, p, p).mT)                                # H x0 x1


def mlp(neurons, p, freqs, solver, null=None):
    """The MLP layer over all inputs (p^2, F): neuron by neuron, in the p-DFT and in the waves of the targets.

    A neuron's DFT share is the variance at its best frequency k of the p-DFT: bins (+-k, 0), (0, +-k), (+-k, +-k) (Nanda et al.
    2023). Its wave share is the part of its interaction that the sum and difference wave of its best (q, k) alone explain. `null`: what share
    of the interaction each sum wave has at initialisation.
    """
    parts, dft = decompose(neurons, p, *solver), dft2(neurons, p)
    total, inter = parts['variance'], parts['variance'] - parts['marginals']
    alive = total > 1e-6 * total.mean()  # at initialisation some neurons are constant
    k, power = torch.arange(1, p // 2 + 1), dft.square()
    folded = power[0, k] + power[0, -k] + 2 * (power[k, 0] + power[k, k] + power[k, -k])    # p//2 F
    dft_share, dft_k = (folded / total * alive).nan_to_num().max(0)
    wave_share, wave = (parts['single'] / inter * alive).nan_to_num().max(0)
    share = parts['waves'].mean(2) / inter.mean()                                    # 2 B, of the layer's interaction
    carried = strong(share[0], share[0] if null is None else null)
    clusters = wave[wave_share > 0.5].unique()
    split = torch.stack([parts['marginals'], *parts['waves'].sum(1), inter - parts['waves'].sum((0, 1))])   # 4 F
    shown = torch.tensor([0, 1, 2, wave_share.argmax()])  # three as they come, and the clearest
    names = 'marginals', 'sum_waves', 'difference_waves', 'rest'
    counts = zip(('active_bins', 'active_averaged', 'active_layer'), active_counts(dft))
    numbers = dict(zip(names, split.mean(1) / total.mean())) | dict(counts) | dict(
        waves=carried.sum(), waves_effective=effective(share[0].clamp(min=0)), primes=len(freqs[carried, 0].unique()),
        neurons_alive=alive.sum(), dft_share=dft_share.median(), wave_share=wave_share.median(),
        clustered=(wave_share > 0.5).sum(), clusters=len(clusters))
    return numbers, dict(
        spectrum=dft.mean((1, 2)), neuron_ids=shown, neurons=neurons[:, shown].T.view(-1, p, p).mT, neurons_dft=dft[..., shown].permute(2, 1, 0), wave_shares=share,
        neuron_split=(split / total * alive).nan_to_num(), neuron_wave=freqs[wave], neuron_wave_share=wave_share,
        neuron_k=dft_k + 1, neuron_k_share=dft_share)


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
    key = k[fit > 0.01] if key is None else torch.tensor(key, dtype=torch.long)
    phase = 2 * torch.pi / p * (s[:, None] * key % p)
    basis = torch.cat([phase.cos(), phase.sin()], 1) * (2 / p ** 2) ** 0.5           # p^2 2n, orthonormal
    kept = basis @ (basis.T @ logits)

    def loss(z, rows):
        return task_losses(z[rows], d.y[rows], d.classes)[0][0]
    numbers = dict(key_frequencies=key, cos_fit=fit.sum(), restricted_loss=loss(logits.mean(0) + kept, slice(None)),
                   excluded_loss=loss(logits - kept, train_rows), full_loss=loss(logits, slice(None)), train_loss=loss(logits, train_rows))
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


# ---------------------------------------------------------------------------------------------------- a run

class Folder:
    """A run folder, checked: options, data, network, snapshots and records. Raises Refusal."""

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / 'ckpt.pt').exists():
            raise Refusal(f'{path} is no run folder: there is no {self.path / "ckpt.pt"}')
        ckpt = load(self.path / 'ckpt.pt')
        try:
            o = self.config = ckpt['config']
            self.task, self.p, self.epoch = o['task'], o['p'], ckpt['step']
            self.data = data.make(self.task, self.p, o['data_seed'])
            self.rows = data.split(self.p ** 2, o['train_frac'], o['data_seed'])
            torch.manual_seed(o['seed'])
            self.net = Transformer(self.p, o['d_model'], o['n_heads'], sum(self.data.classes))  # train.py starts from these weights
        except Exception as e:
            raise Refusal(f'{path}/ckpt.pt is not of this program: {" ".join(repr(e).split())[:150]}')
        self.initial = {n: w.clone() for n, w in self.net.state_dict().items()}
        self.final = ckpt['model']
        self.use(self.final, 'ckpt.pt')
        self.snapshots, self.missing = {}, []
        for file in sorted((self.path / 'snapshots').glob('*.pt')):
            try:
                snap = load(file, ('model', 'step'))
                self.use(snap['model'], file)
                self.snapshots[snap['step']] = snap['model']
            except Refusal as e:
                self.missing.append(f'{e}; going on without it')
        if not self.snapshots:
            self.missing.append(f'{path} has no weight snapshots: nothing over snapshots')
        try:
            self.records = dict(np.load(io.BytesIO((self.path / 'metrics.npz').read_bytes())))
        except Exception:
            self.records = {}
            self.missing.append(f'{path} has no readable metrics.npz: no grokking epochs, no curves over epochs')
        if self.records and 'spectra_epoch' not in self.records:
            self.missing.append(f'{path} recorded no spectra: no frequencies over epochs')

    def use(self, weights, name):
        """Put weights into the network. Raises Refusal if they are of another p or size."""
        try:
            self.net.load_state_dict(weights)
        except Exception:
            o = self.config
            raise Refusal(f'{name} is not of a run with task {o["task"]}, p = {o["p"]}, d_model = {o["d_model"]}, n_heads = {o["n_heads"]}')

    @torch.no_grad()
    def measure(self, weights, solver, null=None, key=None):
        """Everything about the weights of one moment: numbers and arrays."""
        self.use(weights, 'weights')
        d, acts = self.data, {}
        logits = self.net(d.x, acts=acts)
        parts = [embedding(weights['W_E'][:self.p]), positions(weights['W_pos']), attention(acts['att'], self.p)]
        if solver:
            parts.append(mlp(acts['neurons'], self.p, wave_freqs(d.classes), solver, null))
        if d.classes == [self.p] and d.stride == 1:
            parts.append(mechanism(logits, d, self.rows[0], key))
        for part, rows in zip(('train', 'valid'), self.rows):
            loss, acc = task_losses(logits[rows], d.y[rows], d.classes)
            parts.append(({f'{part}_losses': loss, f'{part}_accuracies': acc}, {}))
        numbers = {k: v for part, _ in parts for k, v in part.items()}
        return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in numbers.items()}, {k: v for _, part in parts for k, v in part.items()}


def over_snapshots(run, solver, null, key):
    """The numbers of every snapshot as arrays, and its spectra: snapshot_NAME, in the order of snapshot_epoch."""
    out, began, epochs = {}, time.perf_counter(), sorted(run.snapshots)
    for i, epoch in enumerate(epochs):
        numbers, arrays = run.measure(run.snapshots[epoch], solver, null, key)
        numbers.pop('key_frequencies', None)
        for name, value in (dict(epoch=epoch) | numbers | {k: arrays[k] for k in ('W_E_norms', 'spectrum') if k in arrays}).items():
            out.setdefault(f'snapshot_{name}', []).append(value)
        if sys.stdout.isatty():
            left = (time.perf_counter() - began) / (i + 1) * (len(epochs) - i - 1)
            print(f'\r\033[Ksnapshot {i + 1}/{len(epochs)}  ETA {left:.0f} s', end='' if left else '\r\033[K', flush=True)
    return {k: np.array(v) for k, v in out.items()}


def grokking(run, final, snaps):
    """Per task the epoch of 99 % validation accuracy, first and for good, that of 99 % training accuracy, and the lag between.
    Training accuracy is known with dropout at every epoch and without it at the snapshots; the earlier of both counts."""
    out, r = [], run.records
    for i, name in enumerate(run.data.names if r else []):
        first, held = grok_epochs(r['valid_acc'][:, i], final['valid_accuracies'][i])
        fitted = [] if 'snapshot_epoch' not in snaps else snaps['snapshot_epoch'][snaps['snapshot_train_accuracies'][:, i] >= 0.99].tolist()
        train = min(fitted + np.flatnonzero(r['train_acc'][:, i] >= 0.99).tolist(), default=None)
        out.append(dict(name=name, first=first, sustained=held, train=train, lag=None if None in (first, train) else first - train))
    return out


def omega(run, null, snaps):
    """Active frequencies through training, from the recorded spectra and the snapshots: omega_epoch (E,), omega_counts (E, 4), the
    three of `active_counts` and the (q, k) carried, omega_spectrum (E, p//2+1)."""
    at, r = {}, run.records
    if 'spectra_epoch' in r:
        counts = np.column_stack([r['active'], strong(torch.from_numpy(recorded_share(r)), null).sum(1)])
        at |= dict(zip(r['spectra_epoch'].tolist(), zip(counts, r['spectrum'])))
    if 'snapshot_epoch' in snaps:
        counts = np.column_stack([snaps[f'snapshot_{k}'] for k in ('active_bins', 'active_averaged', 'active_layer', 'waves')])
        at |= dict(zip(snaps['snapshot_epoch'].tolist(), zip(counts, snaps['snapshot_spectrum'])))
    epochs = sorted(at)
    return dict(omega_epoch=epochs, omega_counts=[at[e][0] for e in epochs], omega_spectrum=[at[e][1] for e in epochs]) if at else {}


def analyse(path):
    """One run folder -> its numbers, written to analysis.json, and notes on what is missing; its arrays go to analysis.npz."""
    run = Folder(path)
    d, p, solver, null = run.data, run.p, None, None
    if wave_memory(p, d.classes) < MAX_MEMORY:
        solver = wave_solver(p, waves(p, d.classes, d.stride))
    else:
        run.missing.append(f'the waves at p = {p} need {wave_memory(p, d.classes) / 1e9:.0f} GB: no neurons')
    initial, start = run.measure(run.initial, solver)
    if solver:
        null = start['wave_shares'][0]
    final, arrays = run.measure(run.final, solver, null)
    snaps = over_snapshots(run, solver, null, final.get('key_frequencies'))
    arrays |= {f'{k}_initial': start[k] for k in ('singular_values', 'W_E_norms', 'wave_shares') if k in start} | snaps
    if solver:
        arrays |= omega(run, null, snaps)
    numbers = dict(config=run.config, epoch=run.epoch, final=final, initial=initial, grokking=grokking(run, final, snaps))
    arrays |= dict(freqs=wave_freqs(d.classes), classes=d.classes)
    np.savez(buffer := io.BytesIO(), **{k: np.asarray(v) for k, v in arrays.items()})
    write(run.path / 'analysis.npz', buffer.getvalue())
    write(run.path / 'analysis.json', json.dumps(numbers, indent=1).encode())
    return numbers, run.missing


# ---------------------------------------------------------------------------------------------------- the table

LABELS = dict(
    W_E_n50='W_E (digits): singular values to 50 % of their sum', W_E_n90='                              to 90 %',
    W_E_active='  frequencies of its p-DFT above mean + 2 sd', W_E_effective='  effective number of them, of p//2', W_E_gini='  Gini of their norms',
    W_pos_pearson='W_pos: Pearson correlation of positions 0 and 1',
    attention_score='heads: +1 attends x0 alone, -1 x1 alone',
    marginals='neurons, share of variance: in x0 or x1 alone', sum_waves='  in the sum waves of the (q, k)', difference_waves='  in their difference waves', rest='  in the rest',
    active_bins="active frequencies: bins of a neuron's 2-D DFT", active_averaged='  of x1, averaged over those of x0', active_layer='  the same for the mean of all neurons',
    waves='(q, k) carried by the layer, without leakage', waves_effective='  effective number of them', primes='  primes q among them',
    dft_share='variance at best frequency of p-DFT, median neuron', wave_share='interaction at best (q, k), median neuron',
    clustered='  neurons with more than half of it there', clusters='  (q, k) they have in all',
    key_frequencies='key frequencies: > 1 % of the logits', cos_fit='logits: share in cos(w_k (x0 + x1 - c)), all k', full_loss='loss on all inputs', restricted_loss='  restricted to the key frequencies',
    train_loss='loss on training inputs', excluded_loss='  without the key frequencies')


def table(numbers):
    """The numbers of a run as lines of text, beside their values at initialisation."""
    def show(v):
        if isinstance(v, list):
            return ' '.join(map(show, v)) or '-'
        return f'{v:,}' if isinstance(v, int) else f'{v:.3g}' if abs(v) < 1000 else f'{v:,.0f}'
    o = numbers['config']
    lines = [f'{o["task"]}, p = {o["p"]}, D = {o["d_model"]}, epoch {numbers["epoch"]:,}', f'{"":52s} {"now":>24s} {"at initialisation":>24s}']
    lines += [f'{label:52s} {show(numbers["final"][k]):>24s} {show(numbers["initial"][k]):>24s}' for k, label in LABELS.items() if k in numbers['final']]
    order = sorted((g for g in numbers['grokking'] if g['first'] is not None), key=lambda g: g['first'])
    if len(order) > 1:
        lines += ['', 'order of 99 % validation accuracy: ' + ', '.join(g['name'] for g in order)]
    if numbers['grokking']:
        lines += ['', f'{"task":18s} {"valid >= .99 from epoch":>24s} {"for good":>9s} {"train >= .99":>13s} {"lag":>7s}']
        for g in numbers['grokking']:
            first, held, train, lag = ('-' if g[k] is None else f'{g[k]:,}' for k in ('first', 'sustained', 'train', 'lag'))
            lines.append(f'{g["name"]:18s} {first:>24s} {held:>9s} {train:>13s} {lag:>7s}')
    return '\n'.join(lines)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument('runs', nargs='+', metavar='RUN', help='a run folder written by train.py')
    for path in parser.parse_args(argv).runs:
        numbers, missing = analyse(path)
        print(f'{path}: {table(numbers)}\n')
        for line in missing:
            print(f'note: {line}')


if __name__ == '__main__':
    data.run_script(main)
