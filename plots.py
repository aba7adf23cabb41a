"""From numbers to files: the figures of a run as RUN/figures/NAME.png and .svg. Nothing here trains or computes.

    python plots.py out/miiii                    # every figure of one run
    python plots.py out/miiii out/nanda          # of both, and the comparisons with a row for each in the first one's folder
    python plots.py --data                       # those that need no run, in out/figures
    python plots.py --embedding numbers.npy      # the spectrum of any matrix with a row per number
    python plots.py out/miiii --only waves       # one of them
    python plots.py out/miiii --animate waves    # and a GIF through training: waves or embedding

Reads analysis.json and analysis.npz of analyze.py (which is run first if they are missing, or older than the run or than it) and metrics.npz.
"""
import argparse
import json
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm, PowerNorm

import analyze
import data
from data import Refusal, refuse, write

CORNER = 37  # of a large grid only the top left corner is drawn square by square, as in the paper
BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#999999'  # told apart in every kind of colour vision, and in print
STYLE = {'font.size': 8, 'axes.titlesize': 8, 'figure.titlesize': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'image.cmap': 'cividis',
         'savefig.dpi': 120, 'legend.frameon': False, 'legend.fontsize': 7, 'figure.constrained_layout.use': True, 'lines.linewidth': 1.2}


class Run:
    """What figures need of a run folder: numbers, arrays (both by analyze.py) and records (metrics.npz, {} without)."""

    def __init__(self, path):
        self.path, (j, z) = Path(path), (Path(path, 'analysis.json'), Path(path, 'analysis.npz'))
        sources = [f.stat().st_mtime for f in (Path(analyze.__file__), *(self.path / n for n in ('ckpt.pt', 'metrics.npz', 'snapshots', 'snapshots.npz'))) if f.exists()]
        if not all(f.exists() and f.stat().st_mtime >= max(sources) for f in (j, z)):
            if (self.path / 'ckpt.pt').exists():
                print(f'{path}: no up-to-date analysis yet, making one', flush=True)
            for note in analyze.analyse(path)[1]:
                print(f'note: {note}')
        try:
            self.numbers, self.arrays = json.loads(j.read_text()), dict(np.load(z))
            self.config, self.final, self.epoch = (self.numbers[k] for k in ('config', 'final', 'epoch'))
            self.p, self.task, self.classes = self.config['p'], self.config['task'], self.arrays['classes'].tolist()
            self.tasks = [name.split()[-1] for name in self.arrays['names'].tolist()]
        except Exception as e:
            raise Refusal(f'{j} or {z.name} cannot be read ({type(e).__name__}); delete both to have them made again')
        self.records = analyze.load_records(self.path, self.classes, self.epoch)
        self.one_modulus = len(set(self.classes)) == 1
        own = self.task.replace('*', 'x')  # as a folder's name tells it
        name = self.path.name.replace(f'task={own}', '').strip(',')  # of a sweep's folder what is not the task
        self.label = self.task if name in ('', own) else f'{self.task} ({name})'
        self.name = f'{self.label}, p = {self.p}, epoch {self.epoch:,}'


# ---------------------------------------------------------------------------------------------------- pieces

def hinton(ax, grid, corner=CORNER, **labels):
    """A grid of squares whose area is the magnitude, filled if positive, hollow if negative; row 0 on top. An axis that is cut says so."""
    for axis, n in zip(('ylabel', 'xlabel'), np.shape(grid)):
        if n > corner and axis in labels:
            labels[axis] += f', the first {corner} of {n}'
    grid = np.asarray(grid, float)[:corner, :corner]
    i, j = np.nonzero(grid)
    value = grid[i, j]
    half = 0.47 * np.sqrt(np.abs(value) / np.abs(grid).max(initial=1e-30))
    squares = np.stack([j, i], 1)[:, None] + half[:, None, None] * [(-1, -1), (-1, 1), (1, 1), (1, -1)]
    ax.add_collection(PolyCollection(squares[value > 0], facecolor='k', linewidth=0))
    ax.add_collection(PolyCollection(squares[value < 0], facecolor='none', edgecolor='k', linewidth=0.4))
    ax.set(xlim=(-0.7, grid.shape[1] - 0.3), ylim=(grid.shape[0] - 0.3, -0.7), aspect='equal', **labels)


def over_time(fig, ax, epochs, values, names, label, **colours):
    """Rows through training: values (E, R) as colours over epochs on a log scale."""
    picks = np.unique(np.geomspace(1, len(epochs), 300).astype(int) - 1)
    edges = np.append(epochs[picks], epochs[-1] + 1) + 1
    mesh = ax.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, values[picks].T, rasterized=True, **colours)
    ax.set(xscale='log', xlabel='epoch + 1')
    ax.set_yticks(range(len(names)), names, fontsize=6)
    ax.invert_yaxis()
    fig.colorbar(mesh, ax=ax, label=label, pad=0.02, extend='both' if 'norm' in colours else 'neither')


def log_lines(ax, x, lines, **labels):
    """Lines {name: y} over epochs on a log scale, told apart by colour and dash."""
    for (name, y), colour, dash in zip(lines.items(), (BLUE, ORANGE, GREEN, GREY), ('-', '--', '-.', ':')):
        ax.plot(x + 1, y, c=colour, ls=dash, label=name, marker='.' if len(x) < 100 else None, ms=3)
    ax.set(xscale='log', xlabel='epoch + 1', **labels)
    ax.legend()


# ---------------------------------------------------------------------------------------------------- figures without a run

def polar():
    """Figure 1 of the paper: n in polar coordinates."""
    n = np.arange(113 ** 2)
    picks = {'multiples of 17 or 23': n[(n % 17 == 0) | (n % 23 == 0)], 'multiples of 11': n[n % 11 == 0], 'primes': np.array(data.primes_below(len(n)))}
    fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.9), subplot_kw=dict(projection='polar'))
    for ax, (title, r) in zip(axes, picks.items()):
        ax.scatter(r % (2 * np.pi), r, s=1, c='k', linewidth=0)
        ax.set(xticks=[], yticks=[], title=title)
        ax.spines['polar'].set_visible(False)
    fig.suptitle('numbers n below 113² = 12,769 at radius n and angle n mod 2π')
    return fig


def inputs(p=11):
    """Figure 2: every input, its two digits in one cell."""
    x = data.make('nanda', p).x[:, :2].view(p, p, 2)                                 # x1 x0 digit
    fig, ax = plt.subplots(figsize=(7.5, 4.2))
    hinton(ax, x.transpose(0, 1).reshape(p, 2 * p), 2 * p, xlabel='x1', ylabel='x0', yticks=range(p))
    ax.set_xticks(np.arange(p) * 2 + 0.5, range(p))
    for i in range(p + 1):
        ax.axvline(2 * i - 0.5, c=GREY, lw=0.4)
        ax.axhline(i - 0.5, c=GREY, lw=0.4)
    fig.suptitle(f'the {p * p} inputs at p = {p}: the area of the squares is the digit, x0 left and x1 right')
    return fig


def targets(p=11):
    """Figure 3: every target of miiii, and that of nanda."""
    tasks = [(name, y) for task in ('miiii', 'nanda') for d in [data.make(task, p)] for name, y in zip(d.names, d.y.T)]
    fig, axes = plt.subplots(1, len(tasks), figsize=(7.5, 2.1), sharey=True)
    for ax, (name, y) in zip(axes, tasks):
        hinton(ax, y.view(p, p).T, title=name, xlabel='x1', xticks=range(0, p, 5), yticks=range(0, p, 5))
    axes[0].set_ylabel('x0')
    fig.suptitle(f'the targets at p = {p}, n = x0 + {p} x1: the area of the squares is the class')
    return fig


def spectrum(path):
    """Any matrix with a row per number: its spectrum over the rows, beside that of its shuffled rows."""
    n, a = analyze.analyse_matrix(path)
    norms, s = a['spectrum'], a['singular_values']
    k = np.arange(1, len(norms) + 1)
    fig, (ax, right) = plt.subplots(1, 2, figsize=(7.5, 2.6), width_ratios=(3, 1))
    ax.fill_between(k, a['null'].amin(0), a['null'].amax(0), color='#DDDDDD', label=f'{len(a["null"])} shuffles of the rows')
    ax.plot(k, norms, c=BLUE, label='in their order')
    for peak, period in zip(a['peaks'], n['periods']):
        ax.annotate(f'{period:.3g}', (peak, norms[peak - 1]), ha='center', va='bottom', fontsize=7)
    ax.set(xlabel='frequency k over the rows; where it stands out, its period', ylabel='norm of cos and sin', ylim=(0, 1.35 * norms.max()))
    ax.legend(loc='upper right', ncols=2)
    right.plot(np.arange(1, len(s) + 1), s, c=BLUE)
    right.set(xlabel='index', title='singular values', ylim=(0, None))
    fig.suptitle(f'{Path(path).name}: {n["rows"]} rows, {n["columns"]} columns'.replace('$', r'\$'))
    return fig


# ---------------------------------------------------------------------------------------------------- figures of one run

def accuracy(run):
    """Figure 5: accuracy of every task through training."""
    return curves(run, 'acc', 'accuracy', vmin=0, vmax=1)


def loss(run):
    """Figure 6: cross-entropy of every task through training."""
    low, high = np.percentile(np.stack([run.records['train_loss'], run.records['valid_loss']]), (1, 99.9))
    return curves(run, 'loss', 'cross-entropy (nats)', norm=LogNorm(max(low, 1e-8), max(high, 1e-7)))


def curves(run, kind, label, **colours):
    r, parts = run.records, (('valid', 'validation'), ('train', 'training, with dropout' if run.config['dropout'] else 'training'))
    if len(run.tasks) == 1:
        fig, ax = plt.subplots(figsize=(7.5, 2.6))
        log_lines(ax, r['epoch'], {name: r[f'{part}_{kind}'] for part, name in parts}, ylabel=label, yscale='log' if kind == 'loss' else 'linear')
    else:
        fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.6))
        for ax, (part, name) in zip(axes[::-1], parts):
            over_time(fig, ax, r['epoch'], r[f'{part}_{kind}'], run.tasks, label, **colours)
            ax.set(title=name, ylabel='operation' if run.one_modulus else 'modulus q')
    fig.suptitle(f'{run.name}: {label} of each task')
    return fig


def gradients(run):
    """Gradient norm of every weight matrix through training."""
    r, fig_ax = run.records, plt.subplots(figsize=(7.5, 2.4))
    over_time(*fig_ax, r['epoch'], r['grad_norm'] / r['grad_norm'].max(0), r['grad_norm_names'], 'norm / its largest', norm=LogNorm(1e-3, 1))
    fig_ax[0].suptitle(f'{run.name}: gradient norm of each matrix')
    return fig_ax[0]


def singular_vectors(run):
    """Figures 9 and 10: left singular vectors of W_E up to half of the sum of the singular values."""
    n = run.final['W_E_n50']
    rows = min(n, CORNER)
    fig, ax = plt.subplots(figsize=(7.5, 0.8 + 7 * rows / CORNER))
    hinton(ax, run.arrays['left_vectors'].T[:rows], xlabel='digit', ylabel='vector')
    fig.suptitle(f'{run.name}: left singular vectors of W_E up to half of the sum ({rows} of {n})')
    return fig


def neuron(run):
    """Figure 4: one neuron over the inputs, and its spectrum: the one that has most of its interaction in one (q, k), q > 3."""
    a, i = run.arrays, run.arrays['neuron_ids'][3]
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 4.2), width_ratios=(3, 2))
    draw_neuron(axes, a, 3)
    q, k = a['neuron_wave'][i]
    fig.suptitle(f'{run.name}: neuron {i}, with {a["neuron_wave_share"][i]:.0%} of its interaction in the waves of q = {q}, k = {k}')
    return fig


def draw_neuron(axes, arrays, column):
    """A corner of the activations over the inputs, and the whole 2-D spectrum: of waves, sum and difference stand in either half."""
    hinton(axes[0], arrays['neurons'][column], xlabel='x1', ylabel='x0', title='activation')
    dft = np.fft.fftshift(arrays['neurons_dft'][column], axes=0)                     # x0 -p//2 .. p//2, x1 0 .. p//2
    h = len(dft) // 2 + 0.5
    axes[1].imshow(dft, cmap='Greys', norm=PowerNorm(0.5, 0), extent=(-0.5, h, h, -h))
    axes[1].set(xlabel='frequency of x1', ylabel='frequency of x0', title='|2-D DFT| without the mean\n(shades by its square root)')


def waves(run):
    """Which (q, k) the MLP layer carries, without leakage."""
    a, n = run.arrays, run.final
    fig, ax = plt.subplots(figsize=(7.5, 2.2 if run.one_modulus else 4.2))
    draw_waves(ax, run, a['wave_shares'][0], a['wave_shares'][0].max())
    fig.suptitle(f'{run.name}: share of the neurons\' interaction in each sum wave; {n["waves"]} of {len(a["freqs"])} carried')
    return fig


def draw_waves(ax, run, share, most):
    """A square per (q, k), its area the share, filled where the layer carries it; for one modulus a stem per k."""
    q, k = run.arrays['freqs'].T
    carried = analyze.carried(torch.tensor(share), run.p).numpy()
    if run.one_modulus:
        return draw_stems(ax, k, share, carried, xlabel='frequency k', ylabel='share', ylim=(0, most * 1.15))
    ax.scatter(k / q, np.searchsorted(run.arrays['classes'], q), s=80 * share.clip(0) / most, marker='s', c=np.where(carried, 'k', 'w'),
               edgecolors='k', linewidths=0.3)
    ax.set(xlabel=f'frequency k/q (cycles per number). Filled: carried. Largest area: {most:.2%}', ylabel='modulus q')
    ax.set(xlim=(0, 0.51), ylim=(len(run.tasks), -1))
    ax.set_yticks(range(len(run.tasks)), run.tasks, fontsize=6)


def draw_stems(ax, k, height, marked, **labels):
    ax.vlines(k, 0, height, colors=np.where(marked, BLUE, GREY), linewidth=2)
    for x, y in zip(k[marked], height[marked]):
        ax.annotate(x, (x, y), ha='center', va='bottom', fontsize=6)
    ax.set(**labels)


def variance(run):
    """What the activations of the neurons are made of, snapshot by snapshot."""
    a, parts = run.arrays, dict(marginals='functions of x0 or x1 alone', sum_waves='sum waves', difference_waves='difference waves', rest='rest')
    fig, ax = plt.subplots(figsize=(7.5, 2.6))
    ax.stackplot(a['snapshot_epoch'] + 1, [a[f'snapshot_{k}'] for k in parts], labels=parts.values(), colors=('#DDDDDD', BLUE, ORANGE, '#444444'))
    ax.set(xscale='log', xlabel='epoch + 1', ylabel='share of variance', ylim=(0, 1))
    ax.legend(loc='lower left')
    fig.suptitle(f'{run.name}: variance of its {len(a["neuron_k"])} neurons over all inputs')
    return fig


def omega(run):
    """Active frequencies through training: by the paper's rule, by its code's averaging, and without leakage."""
    a = run.arrays
    x, counts, spectrum = a['omega_epoch'], a['omega_counts'], a['omega_spectrum'][:, 1:]
    fig, (top, ax) = plt.subplots(2, 1, figsize=(7.5, 4.8), sharex=True)
    mesh = top.pcolormesh(np.append(x, x[-1] + 1) + 1, np.arange(0.5, spectrum.shape[1] + 1),
                          (spectrum / spectrum.max(1, keepdims=True)).T, rasterized=True)
    fig.colorbar(mesh, ax=top, label='amplitude / largest of its epoch', pad=0.02)
    top.set(ylabel='frequency of x1', title='spectrum, mean over the neurons and over the frequencies of x0')
    lines = {'waves (q, k) that the layer carries: no leakage': counts[:, 2],
             'bins of the 2-D DFT above mean + 2 sd, mean over neurons: the paper\'s rule': counts[:, 0],
             'the same of x1 after the mean over x0: its code\'s averaging': counts[:, 1]}
    log_lines(ax, x, lines, yscale='symlog', ylabel='active frequencies', ylim=(0, 2e4))
    ax.legend(loc='upper left')
    fig.suptitle(f'{run.name}: active frequencies of the neurons')
    return fig


def clusters(run):
    """How pure the neurons are, and which modulus (or frequency) they serve."""
    a, one = run.arrays, run.one_modulus
    fig, (ax, bars) = plt.subplots(1, 2, figsize=(7.5, 2.6), width_ratios=(2, 3))
    ax.plot(np.sort(a['neuron_wave_share'])[::-1], c=BLUE, label='of interaction, at best (q, k)')
    ax.plot(np.sort(a['neuron_k_share'])[::-1], c=ORANGE, ls='--', label='of variance, at best k of the p-DFT')
    ax.set(xlabel='neuron, sorted', ylabel='share', ylim=(0, 1.25), yticks=(0, 0.5, 1))
    ax.legend(loc='upper right')
    pure = a['neuron_wave_share'] > 0.5
    names, counts = np.unique(a['neuron_wave'][pure, int(one)], return_counts=True)
    bars.bar([str(n) for n in names], counts, color=BLUE)
    bars.tick_params(axis='x', labelsize=6, rotation=90 if len(names) > 12 else 0)
    bars.set(xlabel='frequency k' if one else 'modulus q', ylabel='neurons', title=f'the {pure.sum()} neurons that have more than half in one (q, k)')
    fig.suptitle(f'{run.name}: neurons by what they serve')
    return fig


def mechanism(run):
    """How a sum mod p is computed (Nanda et al. 2023): cosines in the logits, key frequencies, restricted and excluded loss."""
    a, n, d = run.arrays, run.final, np.arange(run.p)
    fit, key = a['fit'], np.array(n['key_frequencies'], int)
    fig, (ax, profile, losses) = plt.subplots(1, 3, figsize=(7.5, 2.8), width_ratios=(2, 2, 3))
    k = np.arange(1, len(fit) + 1)
    draw_stems(ax, k, fit, np.isin(k, key), xlabel='frequency k', ylabel='share of the logits', title=f'cos(w_k (x0+x1-c)): {n["cos_fit"]:.0%} in all')
    profile.plot(d, a['profile'], 'k.', ms=3, label='mean logit')
    profile.plot(d, np.cos(2 * np.pi * np.outer(d, key) / run.p) @ a['amplitude'][key - 1], c=ORANGE, label='key cosines', lw=0.8)
    profile.set(xlabel='x0 + x1 - c mod p', title='logits, centred')
    profile.legend()
    if 'snapshot_epoch' in a:
        lines = {'all inputs': a['snapshot_full_loss'], 'all inputs, key only': a['snapshot_restricted_loss'],
                 'training inputs': a['snapshot_train_losses'][:, 0], 'training inputs, without key': a['snapshot_excluded_loss']}
        log_lines(losses, a['snapshot_epoch'], lines, yscale='log', ylabel='loss (nats)')
    fig.suptitle(f'{run.name}: key frequencies {", ".join(map(str, key)) or "none"}')
    return fig


def bases(run):
    """Formulas: W_E and W_L by frequency, over the residues and over their discrete logarithms."""
    fig, axes = plt.subplots(2, 2, figsize=(7.5, 3.8), sharey='row')
    for row, matrix in zip(axes, ('W_E', 'W_L')):
        for ax, basis, order in zip(row, (matrix, f'{matrix}_mult'), ('residues', 'discrete logarithms')):
            cos, sin = run.arrays[f'{basis}_cos_sin']
            k, n = np.arange(1, len(cos) + 1), run.final[f'{basis}_effective']
            ax.bar(k - 0.2, cos, 0.4, color=BLUE, label='cosine')
            ax.bar(k + 0.2, sin, 0.4, color=ORANGE, label='sine')
            ax.set(xlabel=f'frequency k, rows in the order of {order}', ylabel='norm' if ax is row[0] else '', title=f'{matrix}: {n:.1f} effective frequencies of {len(k)}')
    axes[0, 0].set_ylim(top=1.25 * axes[0, 0].get_ylim()[1])
    axes[0, 0].legend(ncols=2, loc='upper right')
    fig.suptitle(run.name)
    return fig


def pattern(run):
    """Formulas: the logits of one class over all inputs and their spectrum, by residues and by discrete logarithms."""
    grids, order = run.arrays['pattern'], run.arrays['by_log']
    fig, axes = plt.subplots(len(grids), 4, figsize=(7.5, 0.3 + 2.2 * len(grids)), squeeze=False)
    for row, grid, name in zip(axes, grids, run.tasks):
        for ax, spectrum, values, what in zip(row[::2], row[1::2], (grid, grid[np.ix_(order, order)]), ('', 'log ')):
            ax.imshow(values)
            ax.set(xlabel=f'{what}b', ylabel=f'{what}a', title=f'{name}: logit of class 1')
            n = len(values)
            dft = np.fft.fftshift(np.abs(np.fft.rfft2(values - values.mean())), axes=0)  # a -(n//2) .., b 0 .. n//2
            spectrum.imshow(dft, cmap='Greys', norm=PowerNorm(0.5, 0), extent=(-0.5, n // 2 + 0.5, n - n // 2 - 0.5, -(n // 2) - 0.5))
            spectrum.set(xlabel=f'frequency of {what}b', ylabel=f'of {what}a', title='|2-D DFT|')
    fig.suptitle(f'{run.name} (spectra in shades by their square root)')
    return fig


def components(run):
    """What each part of the network writes into the logits, by frequency over the classes."""
    spectra, n, C = run.arrays['class_spectra'], run.final, run.classes[0]
    names = ['"="', *(f'head {h}' for h in range(len(spectra) - 2)), 'MLP']
    fig, axes = plt.subplots(len(spectra), 1, figsize=(7.5, 0.4 + 1.05 * len(spectra)), sharex=True)
    for ax, spectrum, name, periods, low in zip(axes, spectra, names, n['periods'], n['low_share']):
        k = np.arange(1, len(spectrum) + 1)
        ax.bar(k, spectrum, 1, color=np.where(k <= n['tau'], BLUE, ORANGE))
        for period in periods:
            ax.annotate(f'{period:.3g}', (C / period, spectrum[round(C / period) - 1]), ha='center', va='bottom', fontsize=6)
        ax.set(ylabel=name, ylim=(0, 1.25 * spectrum.max()))
        ax.text(0.6, 0.8, f'{low:.0%} of its power is low (k ≤ {n["tau"]})', transform=ax.transAxes, ha='center', fontsize=7)
    axes[-1].set_xlabel(f'frequency k over the {C} classes; where it stands out, its period C/k')
    fig.suptitle(f'{run.name}: amplitude in the logits of each part, mean over the test set')
    return fig


def filters(run):
    """What is left of the network without low or high frequencies in what its MLP or attention write."""
    rows, n = run.final['filters'], run.final
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.9), sharey=True)
    y = np.arange(len(rows))
    for ax, columns, title in ((left, (0, 1, 2), 'share of the test set'), (right, (3, 4), 'share of the errors')):
        for i, (column, colour) in enumerate(zip(columns, (BLUE, ORANGE, GREEN))):
            ax.barh(y + 0.27 * (i - 1), [row[column] for row, _ in rows.values()], 0.25, color=colour, label=analyze.SCORES[column])
        ax.set(xlim=(0, 1), title=title)
    for i, column in enumerate((0, 1, 2)):
        left.plot([null[column] if null else np.nan for _, null in rows.values()], y + 0.27 * (i - 1), 'k|', ms=6, label='without random directions' if i == 0 else None)
    for ax in (left, right):
        ax.legend(loc='lower center', bbox_to_anchor=(0.5, -0.47), ncols=2)
    left.set_yticks(y, rows)
    left.invert_yaxis()
    fig.suptitle(f'{run.name}: without low (k ≤ {n["tau"]}) or high frequencies')
    return fig


# ---------------------------------------------------------------------------------------------------- comparisons, a row per run

def positional(runs):
    """Figure 7: positional embeddings of the two digits."""
    fig, axes = plt.subplots(len(runs), 1, figsize=(7.5, 0.2 + 1.1 * len(runs)), squeeze=False)
    for ax, run in zip(axes[:, 0], runs):
        hinton(ax, run.arrays['W_pos'][:2], xlabel='dimension', title=f'{run.name}: W_pos, Pearson {run.final["W_pos_pearson"]:.2f} over all dimensions')
        ax.set_yticks((0, 1), ('x0', 'x1'))
    return fig


def singular_values(runs):
    """Figure 8: singular values of W_E, with marks at 50 % and 90 % of their sum."""
    fig, axes = plt.subplots(len(runs), 1, figsize=(7.5, 0.5 + 1.6 * len(runs)), sharex=True, squeeze=False)
    for ax, run in zip(axes[:, 0], runs):
        s, null = run.arrays['singular_values'], run.arrays['singular_values_initial']
        ax.bar(np.arange(len(s)) + 1, s / s.sum(), color=BLUE, label='trained')
        ax.plot(np.arange(len(s)) + 1, null / null.sum(), c='k', label='at initialisation')
        for share, n in ((50, run.final['W_E_n50']), (90, run.final['W_E_n90'])):
            ax.axvline(n + 0.5, c=ORANGE)
            ax.text(n + 1, 0.95, f'{share} %: {n}', transform=ax.get_xaxis_transform(), va='top')
        ax.set(ylabel='share of the sum', title=f'{run.name}: singular values of W_E')
    axes[0, 0].legend(loc='center right')
    axes[-1, 0].set_xlabel('index')
    return fig


def embedding(runs):
    """Figures 11 to 13: W_E in the Fourier basis over the digits."""
    fig, axes = plt.subplots(len(runs), 2, figsize=(7.5, 3.4 * len(runs)), squeeze=False)
    for (corner, ax), run in zip(axes, runs):
        hinton(corner, run.arrays['W_E_fourier'], xlabel='dimension', title=f'{run.name}: W_E')
        rows = range(0, min(CORNER, run.p), 3)
        corner.set_yticks(rows, ['const'] + [f'{"cos" if r % 2 else "sin"} {(r + 1) // 2}' for r in rows[1:]], fontsize=6)
        draw_norms(ax, run, run.arrays['W_E_norms'], run.arrays['W_E_norms'].max())
    return fig


def draw_norms(ax, run, norms, most):
    null, line = run.arrays['W_E_norms_initial'], analyze.threshold(torch.tensor(norms)).item()
    k = np.arange(1, len(norms) + 1)
    ax.bar(k, norms, color=np.where(norms > line, ORANGE, BLUE))
    ax.axhline(line, c=ORANGE, ls='--', lw=0.8, label='mean + 2 sd')
    ax.plot(k, null * np.sqrt((norms ** 2).sum() / (null ** 2).sum()), c='k', lw=0.8, label='at initialisation, scaled to the same power')
    ax.set(xlabel='frequency k', ylabel='norm of cos and sin', ylim=(0, 1.3 * most))
    ax.legend(loc='upper right')


def neurons(runs):
    """The first three neurons over the inputs, and their spectra."""
    fig, axes = plt.subplots(2 * len(runs), 3, figsize=(7.5, 5.4 * len(runs)), squeeze=False)
    for row, run in zip(range(0, len(axes), 2), runs):
        for i in range(3):
            draw_neuron(axes[row:row + 2, i], run.arrays, i)
            axes[row, i].set_title(f'{run.name}\nneuron {i}: activation')
    return fig


def attention(runs):
    """Attention from the last token to x0, head by head, over the inputs."""
    heads = min(8, max(run.config['n_heads'] for run in runs))  # more would be too small to see
    rows = [(run, o) for run in runs for o in range(len(run.arrays['attention']) // run.config['n_heads'])]
    fig, axes = plt.subplots(len(rows), heads, figsize=(7.5, 0.5 + 7 / heads * len(rows)), squeeze=False)
    for row, (run, o) in zip(axes, rows):
        n_ops = len(run.arrays['attention']) // run.config['n_heads']
        for ax in row[run.config['n_heads']:]:
            ax.axis('off')
        for h, (ax, grid, score) in enumerate(zip(row, run.arrays['attention'][o::n_ops], run.final['attention_score'][o::n_ops])):
            image = ax.imshow(grid[:CORNER, :CORNER], vmin=0, vmax=1)
            ax.set(title=f'head {h}: score {score:+.2f}', xlabel='x1', ylabel='' if h else (f'{run.tasks[o]}' if n_ops > 1 else run.label) + '\nx0')
    fig.colorbar(image, ax=axes, label='attention to x0', shrink=0.6)
    names = '; '.join(run.name for run in runs)
    fig.suptitle(f'attention of the last token: {names}\n(first {CORNER} digits; score: mean attention to x0 less that to x1)')
    return fig


def density(runs):
    """Formulas: Fourier frequency density and coefficient ratio of W_E and W_L through training, beside the accuracy."""
    fig, axes = plt.subplots(len(runs), 3, figsize=(7.5, 0.3 + 1.7 * len(runs)), sharex=True, squeeze=False)
    for (left, *right), run in zip(axes, runs):
        a, n = run.arrays, run.final
        epochs, mean = a['snapshot_epoch'], {part: a[f'snapshot_{part}_accuracies'].mean(1) for part in ('train', 'valid')}
        log_lines(left, epochs, {'validation': mean['valid'], 'training': mean['train']}, ylabel=run.label, title='accuracy', ylim=(-0.05, 1.05))
        for ax, measure in zip(right, ('FFD', 'FCR')):
            log_lines(ax, epochs, {m: a[f'snapshot_{m}_{measure}'] for m in ('W_E', 'W_L')}, title=measure, ylim=(-0.05, 1.05))
            for m, colour in (('W_E', BLUE), ('W_L', ORANGE)):
                ax.axhline(n[f'{m}_null_{measure}'], c=colour, ls=':', lw=0.8, label=f'Gaussian, shape of {m}')
            ax.legend()
    for ax in axes[:-1].flat:
        ax.set_xlabel('')
    for ax in axes[1:].flat:
        ax.get_legend().remove()
    return fig


# ---------------------------------------------------------------------------------------------------- animation, main

DATA = [polar, inputs, targets]
SINGLE = {  # with what a run must have for it
    accuracy: 'metrics.npz', loss: 'metrics.npz', gradients: 'metrics.npz', singular_vectors: '', neuron: 'neurons', waves: 'neurons', clusters: 'neurons',
    variance: 'snapshots of neurons', omega: 'spectra or snapshots of neurons', mechanism: 'logits of a single modular sum',
    bases: 'targets mod p', pattern: 'targets mod p', components: 'one set of classes', filters: 'one set of classes'}
COMPARED = {positional: '', singular_values: '', embedding: '', neurons: 'neurons', attention: '', density: 'snapshots of targets mod p'}
KEYS = {  # the array that shows it
    '': 'W_pos', 'metrics.npz': 'valid_acc', 'neurons': 'neurons', 'snapshots of neurons': 'snapshot_rest',
    'spectra or snapshots of neurons': 'omega_epoch', 'logits of a single modular sum': 'profile', 'recorded spectra': 'spectra_epoch',
    'snapshots': 'snapshot_W_E_norms', 'one set of classes': 'class_spectra', 'targets mod p': 'pattern', 'snapshots of targets mod p': 'snapshot_W_E_FFD'}
ANIMATED = dict(waves='recorded spectra', embedding='snapshots')


def animate(run, what):
    """Through training, a frame per record: `waves` from the recorded spectra, `embedding` from the snapshots."""
    if what == 'waves':
        draw, epochs, frames = draw_waves, run.records['spectra_epoch'], analyze.recorded_share(run.records)
    else:
        draw, epochs, frames = draw_norms, run.arrays['snapshot_epoch'], run.arrays['snapshot_W_E_norms']
    fig, ax = plt.subplots(figsize=(6, 4.2), dpi=100)

    def frame(i):
        ax.clear()
        draw(ax, run, frames[i], frames.max())
        ax.set_title(f'{run.label}, p = {run.p}, epoch {epochs[i]:,}: ' + ('interaction of the neurons by (q, k)' if what == 'waves' else 'W_E by frequency'))
    return FuncAnimation(fig, frame, len(frames))


def main(argv):
    by_name = {f.__name__: f for f in [*DATA, *SINGLE, *COMPARED]}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument('runs', nargs='*', metavar='RUN', help='run folder written by train.py')
    parser.add_argument('--data', action='store_true', help='the figures that need no run: ' + ', '.join(f.__name__ for f in DATA))
    parser.add_argument('--embedding', metavar='FILE', help='the spectrum of any matrix with a row per number, .npy or .pt, in out/figures')
    parser.add_argument('--only', metavar='NAME', choices=by_name, help='one figure: ' + ', '.join(by_name))
    parser.add_argument('--animate', choices=ANIMATED, help='also a GIF through training')
    args = parser.parse_args(argv)
    if not args.runs and (args.animate or not (args.data or args.embedding)):
        raise Refusal('name a run folder, or --data for the figures that need none, or --embedding for any matrix')
    if args.only and not (args.data if by_name[args.only] in DATA else args.runs):
        raise Refusal(f'{args.only} needs ' + ('--data' if by_name[args.only] in DATA else 'a run folder'))

    matplotlib.use('Agg')
    runs = [Run(path) for path in args.runs]
    jobs = [(f.__name__, f, [], '', Path('out')) for f in DATA if args.data]  # name, function, runs, what they need, folder
    jobs += [(f.__name__, lambda run, f=f: f(run[0]), [run], needs, run.path) for run in runs for f, needs in SINGLE.items()]
    jobs += [(f.__name__, f, runs, needs, runs[0].path) for f, needs in COMPARED.items() if runs]
    jobs = [job for job in jobs if args.only in (None, job[0])]
    jobs += [(f'embedding_{Path(args.embedding).stem}', lambda: spectrum(args.embedding), [], '', Path('out'))] if args.embedding else []
    jobs += [(args.animate, None, [run], ANIMATED[args.animate], run.path) for run in runs if args.animate]
    drawn = 0
    with plt.rc_context(STYLE):
        for name, draw, given, needs, folder in jobs:
            lacking = [str(run.path) for run in given if KEYS[needs] not in run.arrays | run.records]
            if lacking:
                print(f'note: {name} not {"drawn" if draw else "animated"}: {" and ".join(lacking)} without {needs}')
                continue
            file = folder / 'figures' / f'{name}.{"png" if draw else "gif"}'
            if draw:
                figure = draw(given) if given else draw()
                for kind in ('svg', 'png'):
                    write(file.with_suffix(f'.{kind}'), lambda f: figure.savefig(f, format=kind))
            else:
                with tempfile.TemporaryDirectory() as beside:
                    animate(given[0], name).save(Path(beside, 'a.gif'), PillowWriter(fps=6))
                    write(file, lambda f: f.write(Path(beside, 'a.gif').read_bytes()))
            plt.close('all')
            drawn += 1
            print(file, flush=True)
    if not drawn:
        raise Refusal('nothing drawn')


if __name__ == '__main__':
    data.run_script(main)
