"""From numbers to pictures: the figures of a run as RUN/figures/NAME.png and .svg. Nothing here trains.

    python plots.py out/miiii                  # every figure of one run
    python plots.py out/miiii --only curves    # one; curves, accuracy and loss also of a run at work
    python plots.py out/miiii out/nanda        # of both, and comparisons in the first one's folder
    python plots.py --data                     # those that need no run, in out/figures
    python plots.py --embedding numbers.npy    # the spectrum of any matrix with a row per number

In a notebook: plots.mechanism(analyze.load_run('assets/nanda')) is a matplotlib figure.
"""
import argparse
import functools
import itertools
import os
from pathlib import Path

if __name__ == '__main__':
    os.environ['MPLBACKEND'] = 'agg'  # files alone: what a notebook has set is of no matter here
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm, PowerNorm

import analyze
import data
from data import need, refuse, say, write
from model import plain_torch

CORNER = 37  # of a large grid only the top left corner is drawn square by square, as in the paper
BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#999999'  # told apart by all eyes and in print
STYLE = {'font.size': 8, 'axes.titlesize': 8, 'figure.titlesize': 9.5, 'legend.fontsize': 7,
         'legend.frameon': False, 'axes.spines.top': False, 'axes.spines.right': False, 'savefig.dpi': 120,
         'image.cmap': 'cividis', 'figure.constrained_layout.use': True, 'lines.linewidth': 1.2}
FIGURES = {}  # name: function, what it takes: no run (none), one, any number, or a file


def our_style():
    """matplotlib's defaults and our style, whatever matplotlibrc says."""
    return plt.style.context(['default', STYLE])


def figure(takes, needs=''):
    """Makes a function a figure: found by its name, drawn in our style. The message that it returns is the
    title, its docstring stands below, small. needs: which runs it is for, as KeyError says of others."""
    def register(draw):
        @functools.wraps(draw)
        def drawn(*given):
            with plain_torch(), our_style():
                try:
                    fig, message = draw(*given)
                except KeyError as e:
                    if needs:
                        raise KeyError(f'{draw.__name__} is only for {needs}') from e
                    raise
                text = ' '.join((draw.__doc__ or draw.__name__).split())
                if takes in ('one', 'any') and len(given) == 1:
                    text = f'{name_of(given[0])}, p = {given[0].p}, epoch {given[0].epoch:,}. {text}'
                fig.suptitle(f'{message}\n', x=0.01, ha='left', parse_math=False)
                fig.text(0.01, 1 - 0.22 / fig.get_figheight(), text, va='top', fontsize=7, color='0.3',
                         parse_math=False, wrap=True)
                return fig
        FIGURES[draw.__name__] = drawn, takes
        return drawn
    return register


# ---------------------------------------------------------------- pieces

def name_of(run):
    """What a run is, for titles: its task, and its folder's name where that is another."""
    task = ''.join(run.config['task'].split())
    return task if run.name == task.replace('*', 'x') else f'{task} ({run.name})'


def rows_of(run):
    """The names of a run's tasks, short: q where the task is n mod q."""
    return [name.removeprefix('n mod ') for name in run.data.names]


def of_each(runs, label, look='.2g'):
    """A number of each run as text."""
    return ', '.join(format(run.final()[label], look) for run in runs)


def spoken(x):
    """A number as the sentences of analyze.py have it: less than 1 is not rounded up to 1."""
    return analyze.spoken(float(x))


def one_modulus(run):
    """Whether all waves are of one q, so that groups of neurons are of a k each."""
    return len(analyze.wave_freqs(run.data.classes)[:, 0].unique()) == 1


def panels(rows, columns, height, **how):
    """A figure as wide as a page, and its axes (rows, columns)."""
    fig, axes = plt.subplots(rows, columns, figsize=(7.5, height), squeeze=False, **how)
    plt.close(fig)  # it is returned: a notebook would show it a second time if pyplot still had it
    return fig, axes


def hinton(ax, grid, corner=CORNER, **labels):
    """Squares whose area is the magnitude, filled if positive; row 0 on top. An axis that is cut says so."""
    for axis, n in zip(('ylabel', 'xlabel'), np.shape(grid)):
        if n > corner and axis in labels:
            labels[axis] += f', the first {corner} of {n}'
    grid = np.asarray(grid, float)[:corner, :corner]
    i, j = np.nonzero(grid)
    value = grid[i, j]
    half = 0.47 * np.sqrt(np.abs(value) / np.abs(grid).max(initial=1e-30))
    corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)])
    squares = np.stack([j, i], 1)[:, None] + half[:, None, None] * corners
    ax.add_collection(PolyCollection(squares[value > 0], facecolor='k', linewidth=0))
    ax.add_collection(PolyCollection(squares[value < 0], facecolor='none', edgecolor='k', linewidth=0.4))
    ax.set(xlim=(-0.7, grid.shape[1] - 0.3), ylim=(grid.shape[0] - 0.3, -0.7), aspect='equal', **labels)


def over_time(fig, ax, epochs, values, names, label, **colours):
    """Rows through training: values (E, R) as colours over epochs on a log scale."""
    picks = np.unique(np.geomspace(1, len(epochs), 300).astype(int) - 1)
    edges = np.append(epochs[picks], epochs[-1] + 1) + 1
    rows = np.arange(len(names) + 1) - 0.5
    mesh = ax.pcolormesh(edges, rows, values[picks].T, rasterized=True, **colours)
    ax.set(xscale='log', xlabel='epoch + 1')
    ax.set_yticks(range(len(names)), names, fontsize=6)
    ax.invert_yaxis()
    fig.colorbar(mesh, ax=ax, label=label, pad=0.02, extend='both' if 'norm' in colours else 'neither')


def log_lines(ax, x, lines, **labels):
    """Lines {name: y} over epochs, told apart by colour, dash and width where they lie together."""
    looks = ((BLUE, '-', 2.2), (ORANGE, '--', 1.4), (GREEN, '-.', 1.2), (GREY, ':', 1.2))
    for (name, y), (colour, dash, width) in zip(lines.items(), looks):
        ax.plot(x + 1, y, c=colour, ls=dash, lw=width, label=name, marker='.' if len(x) < 100 else '', ms=3)
    ax.set(xscale='log', xlabel='epoch + 1', **labels)
    ax.legend(loc='best')  # named, it gives no warning where it takes long


def stems(ax, k, height, marked, **labels):
    """A bar per frequency, those that are marked in colour and with their number."""
    ax.vlines(k, 0, height, colors=np.where(marked, BLUE, GREY), linewidth=2)
    for x, y in zip(k[marked], height[marked]):
        near = k[marked & (abs(k - x) < 4)]
        side = 'center' if len(near) == 1 else 'right' if x == near[0] else 'left'
        ax.annotate(x, (x, y), ha=side, va='bottom', fontsize=6)
    ax.set(xlabel='frequency k', **labels)


# ---------------------------------------------------------------- figures without a run

@figure('none')
def polar():
    """Each number n < 113² is a dot at radius n and angle n radians (figure 1 of Syrkis & Søgaard)."""
    n = np.arange(113 ** 2)
    picks = {'multiples of 17 or 23': n[(n % 17 == 0) | (n % 23 == 0)], 'multiples of 11': n[n % 11 == 0],
             'primes': np.array(data.primes_below(len(n)))}
    fig, axes = panels(1, 3, 2.9, subplot_kw=dict(projection='polar'))
    for ax, (title, r) in zip(axes[0], picks.items()):
        ax.scatter(r % (2 * np.pi), r, s=1, c='k', linewidth=0)
        ax.set(xticks=[], yticks=[], title=title, frame_on=False)
    return fig, 'Multiples of a number lie on spirals, primes where no such spiral runs'


@figure('none')
def inputs():
    """The inputs at p = 11; the area of a square is a digit, in each cell x0 left and x1 right (figure 2)."""
    p = 11
    x = data.make('nanda', p).x[:, :2].view(p, p, 2)                                     # x1 x0 digit
    fig, ((ax,),) = panels(1, 1, 4.2)
    hinton(ax, x.transpose(0, 1).reshape(p, 2 * p), 2 * p, xlabel='x1', ylabel='x0', yticks=range(p))
    ax.set_xticks(np.arange(p) * 2 + 0.5, range(p))
    ax.vlines(np.arange(p + 1) * 2 - 0.5, -0.5, p - 0.5, colors=GREY, linewidth=0.4)
    ax.hlines(np.arange(p + 1) - 0.5, -0.5, 2 * p - 0.5, colors=GREY, linewidth=0.4)
    return fig, 'The network sees a number as its two digits: p² pairs are all there is'


@figure('none')
def targets():
    """The right answers at p = 11, where n = x0 + 11 x1; the area of a square is the answer (figure 3)."""
    p, tasks = 11, []
    for task in ('miiii', 'nanda'):
        d = data.make(task, p)
        tasks += zip(d.names, d.y.T)
    fig, axes = panels(1, len(tasks), 2.1, sharey=True)
    for ax, (name, y) in zip(axes[0], tasks):
        hinton(ax, y.view(p, p).T, title=name, xlabel='x1', xticks=range(0, p, 5), yticks=range(0, p, 5))
    axes[0, 0].set_ylabel('x0')
    return fig, 'n mod q repeats every q numbers, a sum is the same along diagonals'


@figure('file')
def periods(path):
    """How much of each frequency a matrix has over its rows, and, as numbers, the periods that stand out."""
    W = data.load_matrix(Path(path))
    found, norms, noise = analyze.outliers(W)
    k = np.arange(1, len(norms) + 1)
    fig, ((ax, right),) = panels(1, 2, 2.6, width_ratios=(3, 1))
    ax.fill_between(k, noise.min(0), noise.max(0), color='#DDDDDD', label='noise of as much power')
    ax.plot(k, norms, c=BLUE, label='this matrix')
    for f in found:
        at = f, norms[min(round(f), len(k)) - 1]
        ax.annotate(f'{len(W) / f:.3g}', at, ha='center', va='bottom', fontsize=7)
    ax.set(xlabel='frequency k over the rows', ylabel='norm of cos and sin', ylim=(0, 1.35 * norms.max()))
    ax.legend(loc='upper right', ncols=2)
    S = torch.linalg.svdvals(W)
    right.plot(np.arange(1, len(S) + 1), S, c=BLUE)
    right.set(xlabel='index', title='singular values', ylim=(0, None))
    return fig, f'Periods that stand out of the {len(W)} rows of {Path(path).name}: {len(found) or "none"}'


# ---------------------------------------------------------------- figures of one run

@figure('one', 'runs with records')
def accuracy(run):
    """Accuracy of each task through training (figure 5 of Syrkis & Søgaard)."""
    fig = of_each_task(run, 'acc', 'accuracy', vmin=0, vmax=1)
    last = run.records['valid_acc'][-1]
    worst = f', in its worst task on {spoken(last.min())}' if len(last) > 1 else ''
    return fig, f'It ends right on {spoken(last.mean())} of unseen numbers{worst}'


@figure('one', 'runs with records')
def loss(run):
    """Loss of each task through training, the cross-entropy in nats (figure 6 of Syrkis & Søgaard)."""
    r = run.records
    low, high = np.percentile(np.stack([r['train_loss'], r['valid_loss']]), (1, 99.9))
    norm = LogNorm(max(low, 1e-8), max(high, 1e-7))
    mean = r['valid_loss'].mean(1)
    fig = of_each_task(run, 'loss', 'cross-entropy (nats)', norm=norm)
    return fig, f'The loss on unseen numbers peaks at epoch {mean.argmax():,}, and ends at {mean[-1]:.2g}'


def of_each_task(run, kind, label, **colours):
    r = run.records
    titles = dict(valid='numbers it never saw (validation)', train='numbers it is trained on')
    if run.config['dropout'] or run.config.get('dropout_mlp'):
        titles['train'] += ', with dropout'
    if len(run.data.names) == 1:
        fig, ((ax,),) = panels(1, 1, 2.6)
        lines = {title: r[f'{rows}_{kind}'] for rows, title in titles.items()}
        log_lines(ax, r['epoch'], lines, ylabel=label, yscale='log' if kind == 'loss' else 'linear')
    else:
        fig, axes = panels(1, 2, 3.6)
        for ax, rows in zip(axes[0], ('train', 'valid')):
            over_time(fig, ax, r['epoch'], r[f'{rows}_{kind}'], rows_of(run), label, **colours)
            ax.set(title=titles[rows], ylabel='operation' if one_modulus(run) else 'task n mod q')
    return fig


@figure('one', 'runs with records')
def curves(run):
    """Accuracy and loss, mean of the tasks, on numbers it is trained on and on numbers it never saw."""
    r = run.records
    fig, axes = panels(1, 2, 2.8)
    for ax, kind in zip(axes[0], ('acc', 'loss')):
        if len(run.data.names) > 1:
            single = ax.plot(r['epoch'] + 1, r[f'valid_{kind}'], c=GREY, lw=0.5, alpha=0.4)
            single[0].set_label('single tasks, validation')
        lines = dict(validation=r[f'valid_{kind}'].mean(1), training=r[f'train_{kind}'].mean(1))
        log_lines(ax, r['epoch'], lines)
    lowest = min(r['train_loss'].mean(1).min(), r['valid_loss'].mean(1).min())
    axes[0, 0].set_ylabel('accuracy')
    axes[0, 1].set(ylabel='loss (nats)', yscale='log')
    axes[0, 1].set_ylim(bottom=max(lowest, 1e-30) / 3)  # single tasks go far below
    train, valid = r['train_acc'].mean(1), r['valid_acc'].mean(1)
    by_heart, right = (train >= 0.75).argmax(), (valid >= 0.75).argmax()  # 0: never
    if by_heart and valid[by_heart] < 0.5:
        axes[0, 0].annotate('memorises ', (by_heart + 1, 0.75), ha='right')
        axes[0, 0].annotate(' groks' if right else '', (right + 1, 0.25))
    message = f'It ends right on {spoken(train[-1])} of training numbers, {spoken(valid[-1])} of unseen ones'
    if by_heart and right:
        message = f'3 of 4 training answers are right by epoch {by_heart:,}, 3 of 4 unseen ones by {right:,}'
    return fig, message


@figure('one', 'runs with records')
def gradients(run):
    """The norm of the gradient of each matrix, as a share of its largest."""
    r = run.records
    fig, ((ax,),) = panels(1, 1, 2.4)
    norms = r['grad_norm'] / r['grad_norm'].max(0)
    over_time(fig, ax, r['epoch'], norms, r['grad_norm_names'], 'norm / its largest', norm=LogNorm(1e-3, 1))
    peaks = norms.argmax(0)
    return fig, f'Its matrices have their largest gradients at epochs {peaks.min():,} to {peaks.max():,}'


@figure('one')
def singular_vectors(run):
    """A wave, mostly of one frequency over the digits, makes stripes. Filled: positive (figures 9, 10)."""
    n = run.final()['W_E singular values to 50 %']
    vectors = run.arrays()['left_vectors'][:, :n]
    power = analyze.cos_sin(torch.from_numpy(vectors)).square().sum(0)
    waves = (power.amax(0) > power.sum(0) / 2).sum()
    fig, ((ax,),) = panels(1, 1, 0.8 + 7 * min(n, CORNER) / CORNER)
    hinton(ax, vectors.T, xlabel='digit', ylabel='vector')
    return fig, f'Of {n} singular vectors, which make half of W_E, {waves or "none"} can be called waves'


@figure('one', 'tasks with a modulus')
def neuron(run):
    """The neuron that has most of one wave: its activation over all inputs, and its spectrum (figure 4)."""
    a = run.arrays()
    i = a['neuron_ids'][3]
    fig, axes = panels(1, 2, 4.3, width_ratios=(3, 2))
    draw_neuron(axes[0], a, 3)
    share = a['neuron_wave_share'][i]
    q, k = a['neuron_wave'][i]
    wave = f'k = {k}' if one_modulus(run) else f'k/q = {k}/{q}'
    return fig, f'Of what neuron {i} makes of both digits together, {share:.0%} is one wave, {wave}'


def draw_neuron(axes, arrays, column):
    """A corner of the activations over the inputs; the spectrum, sum and difference waves in either half."""
    hinton(axes[0], arrays['neurons'][column], xlabel='x1', ylabel='x0', title='activation')
    dft = np.fft.fftshift(arrays['neurons_dft'][column], axes=0)  # x0 -p//2 .. p//2, x1 0 .. p//2
    h = len(dft) // 2 + 0.5
    axes[1].imshow(dft, cmap='Greys', norm=PowerNorm(0.5, 0), extent=(-0.5, h, -h, h), origin='lower')
    axes[1].set(xlabel='frequency of x1', ylabel='frequency of x0', title='|2-D DFT|, darker: larger')


@figure('one', 'tasks with a modulus')
def waves(run):
    """Shares of what takes both digits. Marked waves are held: they have clearly more than noise has."""
    share = run.arrays()['wave_shares'][0]
    q, k = run.arrays()['freqs'].T
    carried = analyze.carried(torch.tensor(share), run.p).numpy()
    fig, ((ax,),) = panels(1, 1, 2.3 if one_modulus(run) else 4.4)
    message = f'The neurons hold {carried.sum()} of the {len(k)} waves that answers can be made of'
    if one_modulus(run):
        stems(ax, k, share, carried, ylabel='share', ylim=(0, share.max() * 1.15))
        ax.set_xlabel('frequency k: the wave turns k times while one digit goes once through all p')
        return fig, message
    row = {modulus: i for i, modulus in enumerate(np.unique(q))}
    ax.scatter(k / q, [row[modulus] for modulus in q], s=80 * share.clip(0) / share.max(), marker='s',
               c=np.where(carried, 'k', 'w'), edgecolors='k', linewidths=0.3)
    ax.set(xlabel='k/q: turns of the wave cos(2πk n/q) from one number n to the next', ylabel='q')
    ax.set(xlim=(0, 0.51), ylim=(len(row), -1))
    ax.set_yticks(range(len(row)), row, fontsize=6)
    return fig, message


@figure('one', 'tasks with a modulus, with snapshots')
def variance(run):
    """What the neurons depend on. Sums need sum waves; ReLU makes difference waves beside them."""
    a, s = run.arrays(), f'{run.data.stride} ' if run.data.stride > 1 else ''
    kinds = {'x0 or x1 alone': 'one digit alone', 'sum waves': f'sum waves, of x0 + {s}x1',
             'difference waves': f'difference waves, of x0 − {s}x1', 'the rest': 'the rest'}
    fig, ((ax,),) = panels(1, 1, 2.7)
    shares = np.stack([a[f'snapshot_variance of neurons in {kind}'] for kind in kinds])
    colours = ('#DDDDDD', BLUE, ORANGE, '#444444')
    ax.stackplot(a['snapshot_epoch'] + 1, shares, labels=kinds.values(), colors=colours)
    ax.set(xscale='log', xlabel='epoch + 1', ylabel='share of variance', ylim=(0, 1))
    ax.legend(loc='lower left')
    return fig, f'Waves come to make {shares[1:3, -1].sum():.0%} of the variance of the neurons'


@figure('one', 'tasks with a modulus, with snapshots')
def omega(run):
    """Frequencies as we count them, and as Syrkis & Søgaard do, in their text and in their code."""
    a = run.arrays()
    waves, bins = a['snapshot_waves (q, k) carried'], a['snapshot_active bins of a neuron']
    lines = {f'waves that the neurons hold, of {len(a["freqs"])}': waves,
             f"active bins of a neuron's 2-D spectrum (the paper's text), of {run.p ** 2:,}": bins,
             f"the same after the mean over one digit (the paper's code), of {run.p // 2}":
             a['snapshot_active frequencies of a neuron, averaged']}
    fig, ((ax,),) = panels(1, 1, 3.2)
    log_lines(ax, a['snapshot_epoch'], lines, yscale='symlog', ylabel='how many', ylim=(0, 3e4))
    return fig, f'Neurons go from {waves[0]} to {waves[-1]} waves, from {bins[0]:.0f} to {bins[-1]:.0f} bins'


@figure('one', 'tasks with a modulus')
def clusters(run):
    """How much of a neuron is its best wave, and how many neurons have more than half in one."""
    a, one = run.arrays(), one_modulus(run)
    fig, ((ax, bars),) = panels(1, 2, 2.7, width_ratios=(2, 3))
    ax.plot(np.sort(a['neuron_wave_share'])[::-1], c=BLUE)
    ax.set(xlabel='neuron, sorted', ylabel='share of what needs both digits', ylim=(0, 1.02))
    pure = a['neuron_wave_share'] > 0.5
    q, k = a['neuron_wave'][pure].T
    names, counts = np.unique(k if one else q, return_counts=True)
    bars.bar([str(n) for n in names], counts, color=BLUE)
    bars.tick_params(axis='x', labelsize=6, rotation=90 if len(names) > 12 else 0)
    bars.set(xlabel='frequency k' if one else 'modulus q', ylabel='neurons that hold one wave')
    return fig, f'{pure.sum():,} of {len(pure):,} neurons hold one wave each'


@figure('one', 'tasks of one operation with a modulus, once neurons hold waves')
def circuits(run):
    """Accuracy on unseen numbers with one group of neurons, or all others, held at their means."""
    a = run.arrays()
    names, sizes = a['groups'], a['group_sizes']
    of = 'k' if one_modulus(run) else 'q'
    low, most = a['necessary'].min(), a['sufficient'].max()
    message = f'Accuracy is at least {low:.2f} without a group of neurons, at most {most:.2f} with one alone'
    if len(run.data.names) == 1:
        fig, ((ax,),) = panels(1, 1, 2.4)
        x = np.arange(len(names))
        ax.bar(x - 0.2, a['necessary'][:, 0], 0.4, color=BLUE, label=f'without the neurons of {of}')
        ax.bar(x + 0.2, a['sufficient'][:, 0], 0.4, color=ORANGE, label='with no others')
        ax.set_xticks(x, [f'{name}\n{size}' for name, size in zip(names, sizes)])
        ax.set(xlabel=f'{of}, and how many neurons it has', ylabel='accuracy', ylim=(0, 1.3))
        ax.legend(loc='upper center', ncols=2)
        if low >= analyze.LEARNED:
            message = f'No group of neurons is needed: without any one, {low:.1%} of answers stay right'
        return fig, message
    fig, ((ax, count, alone),) = panels(1, 3, 5.2, width_ratios=(6, 1, 1), sharey=True)
    mesh = ax.imshow(a['necessary'], vmin=0, vmax=1, aspect='auto')
    y = np.arange(len(names))
    ax.set_yticks(y, names, fontsize=6)
    tasks = rows_of(run)
    group, task = np.argwhere(a['necessary'] == low)[0]
    message = f'Without the neurons of q = {names[group]} the task {run.data.names[task]} falls to {low:.2f}'
    ax.set_xticks(range(len(tasks)), tasks, fontsize=6, rotation=90)
    ax.set(xlabel='task n mod q', ylabel='without the neurons of q')
    fig.colorbar(mesh, ax=ax, label='accuracy', location='top', aspect=60, pad=0.01)
    for bars, width, colour in ((count, sizes, BLUE), (alone, a['sufficient'].diagonal(), ORANGE)):
        bars.barh(y[:len(width)], width, color=colour)
        bars.tick_params(labelleft=True, labelsize=6)
    count.set(xlabel='neurons of q')
    alone.set(xlabel='accuracy of q\nwith no others', xlim=(0, 1))
    if run.final().get('separation', 0) > 0.5:
        its, rest = (run.final()[name] for name in ('own task without its group', 'other tasks without it'))
        message = f'Each task has its own neurons: without them it falls to {its:.2f}, others keep {rest:.3f}'
    return fig, message


@figure('one', 'tasks of one operation with a modulus')
def shared(run):
    """Accuracy on unseen numbers with what some heads write held at its mean."""
    accuracy, H = run.arrays()['heads'], run.config['n_heads']
    heads = [str(h) for h in range(H)] + [f'{h}, {i}' for h, i in itertools.combinations(range(H), 2)]
    names = rows_of(run)
    fig, ((ax,),) = panels(1, 1, 1.6 + 0.16 * len(heads))
    mesh = ax.imshow(accuracy, vmin=0, vmax=1, aspect='auto', interpolation='nearest')
    ax.set_yticks(range(len(heads)), heads, fontsize=6)
    ax.set_xticks(range(len(names)), names, fontsize=6, rotation=90 if len(names) > 1 else 0)
    ax.set(ylabel='heads taken out', xlabel='task' if one_modulus(run) else 'task n mod q')
    fig.colorbar(mesh, ax=ax, label='accuracy', pad=0.02)
    means = accuracy.mean(1)
    two = f', {means[H:].min():.2f} without two' if H > 1 else ''
    return fig, f'Accuracy is at worst {means[:H].min():.2f} without one head{two}'


@figure('one', 'miiii, basis and masked, once neurons hold waves')
def alphabet(run):
    """A wave needs a letter, a frequency, in each digit; above, both are counted. A large dot is strong."""
    a = run.arrays()
    freqs, has = torch.from_numpy(a['freqs']), torch.from_numpy(a['carried'])
    by_chance = analyze.at_random(freqs, has, torch.Generator().manual_seed(0))
    power = a['wave_shares'][0][has].clip(0)
    fig, axes = panels(2, 2, 4.6, sharex=True, sharey='row', height_ratios=(1, 4))
    for (top, ax), some, title in zip(axes.T, (has, by_chance), ('this network', 'waves at random')):
        x0, x1 = a['letters'][some].T
        strong = 90 * power / power.max()
        dots = ax.scatter(x0, x1, s=strong, c=freqs[some, 0], vmin=0, vmax=1.3 * run.p, linewidths=0)
        ax.set(xlabel='letter of x0: turns over the p digits', ylabel='letter of x1')
        top.hist(a['letters'][some].flatten(), np.arange(run.p // 2 + 2) - 0.25, color=GREY)
        top.set(title=title, ylabel='letters')
    bar = fig.colorbar(dots, ax=axes[1], label='q', aspect=40, pad=0.01)
    bar.ax.set_ylim(2, run.p)
    n, name = run.final(), 'dimensions of their letters'
    if name not in n:
        return fig, 'It holds no waves of q > 7 whose letters could be compared'
    least, chance, _ = n[f'{name}, by chance']
    shared = 'Tasks share letters: these' if n[name] < least else 'The letters of all waves'
    return fig, f'{shared} span {n[name]:.0f} dimensions, those of waves at random {chance:.0f}'


@figure('one', 'miiii, basis and masked, once waves have come')
def spelling(run):
    """A dot is a wave when it comes for good: how many others of its q are nearer to earlier letters."""
    a = run.arrays()
    before, after = a['arrival_ranks']
    new = np.flatnonzero(before >= 0)
    x = a['arrived'][new] + 1
    fig, ((ax,),) = panels(1, 1, 2.8)
    ax.scatter(x, before[new], s=9, color=BLUE, linewidths=0)
    for rank, style, to in ((before, '-', 'before'), (after, '--', 'after')):
        mean = rank[new].mean()
        ax.axhline(mean, c=BLUE, ls=style, lw=0.8, label=f'nearer to those {to} it: mean {mean:.2f}')
    ax.axhline(0.5, c=GREY, ls=':', label='mean by chance')
    accuracy = run.records['valid_acc'].mean(1)
    ax.plot(np.arange(len(accuracy)) + 1, accuracy, c=ORANGE, label='accuracy on unseen numbers')
    ax.set(xscale='log', xlabel='epoch + 1', ylabel='share that is nearer', xlim=(x.min() / 8, len(accuracy)))
    ax.legend(loc='upper left')
    return fig, f'New waves are nearer to the letters in use than {1 - before[new].mean():.0%} of others'


@figure('one', 'modular addition')
def mechanism(run):
    """Restricted loss: with the key cosines alone, cos(2πk (x0 + x1 − c)/p); excluded: without them."""
    a = run.arrays()
    n = run.final()
    d = np.arange(run.p)
    fit = a['fit']
    key = np.array(n['key frequencies'], int)
    fig, ((ax, profile, losses),) = panels(1, 3, 3.3, width_ratios=(2, 2, 3))
    k = np.arange(1, len(fit) + 1)
    stems(ax, k, fit, np.isin(k, key), ylabel='share of the logits')
    in_key = n['logits in key cosines']
    ax.set_title(f'key {in_key:.0%}, as many others {n["logits in as many others"]:.1%}')
    profile.plot(d, a['profile'], 'k.', ms=3, label='mean logit')
    cosines = np.cos(2 * np.pi * np.outer(d, key) / run.p) @ a['amplitude'][key - 1]
    profile.plot(d, cosines, c=ORANGE, label='key cosines', lw=0.8)
    profile.set(xlabel='(x0 + x1 − c) mod p', title='logit of class c, centred')
    profile.legend()
    if 'snapshot_epoch' in a:
        lines = {'all inputs': a['snapshot_loss on all inputs'],
                 'all inputs, key cosines alone (restricted)': a['snapshot_restricted loss'],
                 'training inputs': a['snapshot_train_losses'][:, 0],
                 'training inputs, without key cosines (excluded)': a['snapshot_excluded loss']}
        log_lines(losses, a['snapshot_epoch'], lines, yscale='log', ylabel='loss (nats)')
        losses.legend(loc='upper center', bbox_to_anchor=(0.4, -0.25))
    return fig, (f'{len(key)} cosines make {in_key:.0%} of the logits: with them alone the loss is '
                 f'{n["restricted loss"]:.1g}, without them {n["excluded loss"]:.2g}')


@figure('one', 'arithmetic modulo p')
def bases(run):
    """W_L is W_out W_U. A sum is sparse over the residues 0, 1, 2, …, a product over their logarithms."""
    n = run.final()
    fig, axes = panels(2, 2, 3.9, sharey='row')
    for row, matrix in zip(axes, ('W_E', 'W_L')):
        for ax, basis, by in zip(row, (matrix, f'{matrix}_mult'), ('', ' by logarithm')):
            cos, sin = run.arrays()[f'{basis}_cos_sin']
            k = np.arange(1, len(cos) + 1)
            effective = n[f'{matrix} effective frequencies{by}']
            ax.bar(k - 0.2, cos, 0.4, color=BLUE, label='cosine')
            ax.bar(k + 0.2, sin, 0.4, color=ORANGE, label='sine')
            ax.set(xlabel='frequency k over the ' + ('discrete logarithms' if by else 'residues'))
            ax.set(title=f'{matrix}: {effective:.1f} effective frequencies of {len(k)}')
        row[0].set_ylabel('norm')
    axes[0, 0].set_ylim(top=1.25 * axes[0, 0].get_ylim()[1])
    axes[0, 0].legend(ncols=2, loc='upper right')
    plain, by_log = (n[f'W_L effective frequencies{by}'] for by in ('', ' by logarithm'))
    return fig, f'W_L has {plain:.1f} effective frequencies over the residues, {by_log:.1f} over logarithms'


@figure('one', 'arithmetic modulo p')
def pattern(run):
    """The logit of answer 1 for all a, b, and its spectrum. The order that does not suit it leaves noise."""
    grids = run.arrays()['pattern']
    order, counts = run.arrays()['by_log'], []
    fig, axes = panels(len(grids), 4, 0.4 + 2.2 * len(grids))
    for row, grid, name in zip(axes, grids, rows_of(run)):
        by_log = grid[np.ix_(order, order)]
        for ax, spectrum, values, what in zip(row[::2], row[1::2], (grid, by_log), ('{}', 'logarithm of {}')):
            ax.imshow(values)
            ax.set(xlabel=what.format('b'), ylabel=what.format('a'), title=name)
            n = len(values)
            dft = np.fft.fftshift(np.abs(np.fft.rfft2(values - values.mean())), axes=0)
            extent = (-0.5, n // 2 + 0.5, -(n // 2) - 0.5, n - n // 2 - 0.5)
            spectrum.imshow(dft, cmap='Greys', norm=PowerNorm(0.5, 0), extent=extent, origin='lower')
            counts.append(analyze.effective(torch.from_numpy(dft) ** 2))
            spectrum.set(xlabel='frequency across', ylabel='frequency down', title=f'{counts[-1]:.0f} waves')
    return fig, f'{rows_of(run)[0]} takes {counts[0]:.0f} waves by residue, {counts[1]:.0f} by logarithm'


@figure('one', 'addition without a modulus')
def components(run):
    """How much of each frequency a component writes into the logits, mean over unseen pairs."""
    spectra = run.arrays()['class_spectra']
    n = run.final()
    C = run.data.classes[0]
    tau = n['tau, the highest low frequency']
    shares = n['logits of "=", heads, MLP: low share']
    names = ['"="', *(f'head {h}' for h in range(len(spectra) - 2)), 'MLP']
    fig, axes = panels(len(spectra), 1, 0.5 + 1.15 * len(spectra), sharex=True)
    all_periods = n['logits of "=", heads, MLP: periods']
    for ax, spectrum, name, periods, low in zip(axes[:, 0], spectra, names, all_periods, shares):
        k = np.arange(1, len(spectrum) + 1)
        ax.bar(k, spectrum, 1, color=np.where(k <= tau, BLUE, ORANGE))
        for period in periods:
            at = min(round(C / period), len(spectrum))
            ax.annotate(f'{period:.3g}', (at, spectrum[at - 1]), ha='center', va='bottom', fontsize=6)
        ax.set(ylabel=name, ylim=(0, 1.2 * spectrum.max()))
        ax.set_title(f'{low:.0%} of its power is low (blue, k ≤ {tau})', loc='right', fontsize=7, pad=2)
    axes[-1, 0].set_xlabel(f'frequency k over the {C} classes; where it stands out, its period C/k')
    most = spectra.sum(1).argmax()
    return fig, f'{names[most]} writes most into the logits, {shares[most]:.0%} of it at low frequencies'


@figure('one', 'addition without a modulus')
def filters(run):
    """Right and nearly right answers on unseen pairs without some frequencies in what a component writes."""
    n, names = run.final(), ['nothing']
    names += [f'{band} from {where}' for band in ('low', 'high') for where in ('MLP', 'attention', 'both')]
    rows = np.array([n[f'filtered: {name}'] for name in names])
    random = np.array([n.get(f'filtered: {name}, random', [np.nan] * 5) for name in names])
    fig, axes = panels(1, 1 + rows[:, 3:].any(), 3.1, sharey=True)
    left = axes[0, 0]
    y = np.arange(len(rows))
    for ax, of, columns in zip(axes[0], ('pairs', 'errors'), ((0, 1, 2), (3, 4))):
        for i, (column, colour) in enumerate(zip(columns, (BLUE, ORANGE, GREEN))):
            at = y + 0.27 * (i - 1)
            ax.barh(at, rows[:, column], 0.25, color=colour, label=analyze.RATES[column])
            if ax is left:
                ax.plot(random[:, column], at, 'k|', ms=6, label='' if i else 'random directions instead')
        ax.set(xlim=(0, 1), title=f'share of the {of}')
        ax.legend(loc='lower center', bbox_to_anchor=(0.5, -0.47), ncols=2)
    left.set_yticks(y, ['nothing removed', *names[1:]])
    left.invert_yaxis()
    right, low, high = rows[[0, 3, 6], 0]
    return fig, f'It is right on {right:.0%}; without low frequencies on {low:.0%}, without high {high:.0%}'


# ---------------------------------------------------------------- comparisons, a row per run

@figure('any')
def positional(*runs):
    """W_pos: what is added to either digit. Filled: positive, hollow: negative (figure 7)."""
    fig, axes = panels(len(runs), 1, 0.4 + 1.1 * len(runs))
    for ax, run in zip(axes[:, 0], runs):
        hinton(ax, run.arrays()['W_pos'][:2], xlabel='dimension')
        ax.set_title(f'{name_of(run)}: correlation of the two {run.final()["W_pos correlation"]:.2f}')
        ax.set_yticks((0, 1), ('x0', 'x1'))
    return fig, f'The vectors of the two positions correlate by {of_each(runs, "W_pos correlation", ".2f")}'


@figure('any')
def singular_values(*runs):
    """How many make half and 90 % of their sum (solid), or of the sum of their squares (dashed; figure 8)."""
    fig, axes = panels(len(runs), 1, 0.6 + 1.6 * len(runs), sharex=True)
    for ax, run in zip(axes[:, 0], runs):
        S, null = run.arrays()['singular_values'], run.arrays()['singular_values_initial']
        ax.bar(np.arange(len(S)) + 1, S / S.sum(), color=BLUE, label='trained')
        ax.plot(np.arange(len(S)) + 1, null / null.sum(), c='k', label='at initialisation')
        for share, colour in ((50, ORANGE), (90, GREEN)):
            for of, dash in (('', '-'), (' of variance', '--')):
                count = run.final()[f'W_E singular values to {share} %{of}']
                ax.axvline(count + 0.5, c=colour, ls=dash, label=f'{share} %{of or " of the sum"}: {count}')
        ax.set(ylabel='share of the sum', title=name_of(run))
        ax.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    axes[-1, 0].set_xlabel('index')
    return fig, f'Half of W_E lies in {of_each(runs, "W_E singular values to 50 %")} of its singular values'


@figure('any')
def embedding(*runs):
    """W_E by frequency over the digits, filled: positive; right how much of each (figures 11-13)."""
    fig, axes = panels(len(runs), 2, 0.3 + 3.4 * len(runs))
    for (corner, ax), run in zip(axes, runs):
        norms = run.arrays()['W_E_norms']
        hinton(corner, run.arrays()['W_E_fourier'], xlabel='dimension', title=f'{name_of(run)}: W_E')
        rows = range(0, min(CORNER, run.p), 3)
        names = ['const'] + [f'{"cos" if r % 2 else "sin"} {(r + 1) // 2}' for r in rows[1:]]
        corner.set_yticks(rows, names, fontsize=6)
        line = analyze.threshold(torch.tensor(norms)).item()
        k = np.arange(1, len(norms) + 1)
        ax.bar(k, norms, color=np.where(norms > line, ORANGE, BLUE))
        ax.axhline(line, c=ORANGE, ls='--', lw=0.8, label='mean + 2 sd')
        null = run.arrays()['W_E_norms_initial']
        same_power = null * np.sqrt((norms ** 2).sum() / (null ** 2).sum())
        ax.plot(k, same_power, c='k', lw=0.8, label='at initialisation, scaled to the same power')
        ax.set(xlabel='frequency k', ylabel='norm of cos and sin', ylim=(0, 1.3 * max(line, norms.max())))
        ax.legend(loc='upper right')
    return fig, f'W_E has {of_each(runs, "W_E effective frequencies", ".1f")} effective frequencies'


@figure('any', 'tasks with a modulus')
def neurons(*runs):
    """The first three neurons, and below their spectra. The share is of what takes both digits."""
    fig, axes = panels(2 * len(runs), 3, 0.3 + 5.4 * len(runs))
    for row, run in zip(range(0, len(axes), 2), runs):
        for i in range(3):
            draw_neuron(axes[row:row + 2, i], run.arrays(), i)
            axes[row, i].set_title(f'{name_of(run)}, neuron {i}')
    shares = of_each(runs, 'share of best wave, median neuron', '.0%')
    return fig, f'Of what a median neuron makes of both digits one wave is {shares}'


@figure('any')
def attention(*runs):
    """Attention of the last token to x0 (down: x0). +1: a head looks at x0 alone, −1: at x1 alone."""
    columns = min(8, max(run.config['n_heads'] for run in runs))  # more would be too small to see
    rows = [(run, operation) for run in runs for operation in range(run.data.n_ops)]
    fig, axes = panels(len(rows), columns, 0.6 + 7 / columns * len(rows))
    for row, (run, operation) in zip(axes, rows):
        heads = run.arrays()['attention'][operation::run.data.n_ops]
        scores = run.final()['heads: attention to x0 less x1'][operation::run.data.n_ops]
        for ax in row[len(heads):]:
            ax.axis('off')
        for h, (ax, grid, score) in enumerate(zip(row, heads, scores)):
            image = ax.imshow(grid[:CORNER, :CORNER], vmin=0, vmax=1)
            ax.set_title(f'head {h}: {score:+.2f}', fontsize=8 if columns <= 4 else 6)
            ax.set_xlabel('x1' if run.p <= CORNER else f'x1, the first {CORNER} of {run.p}')
        row[0].set_ylabel(rows_of(run)[operation] if run.data.n_ops > 1 else name_of(run))
    fig.colorbar(image, ax=axes, label='attention to x0', shrink=0.6)
    found = ', '.join(f'{np.abs(run.final()["heads: attention to x0 less x1"]).mean():.2f}' for run in runs)
    return fig, f'On average a head prefers one digit by {found}: 0 is not at all, 1 is wholly'


@figure('any', 'arithmetic modulo p, with snapshots')
def density(*runs):
    """FFD: share of frequencies above half the largest. FCR: smaller of cosine and sine by larger, mean."""
    fig, axes = panels(len(runs), 3, 0.5 + 1.8 * len(runs), sharex=True)
    for (left, *right), run in zip(axes, runs):
        a = run.arrays()
        epochs = a['snapshot_epoch']
        lines = {rows: a[f'snapshot_{rows}_accuracies'].mean(1) for rows in ('valid', 'train')}
        log_lines(left, epochs, lines, ylabel=name_of(run), title='accuracy', ylim=(-0.05, 1.1))
        for ax, measure in zip(right, ('FFD', 'FCR')):
            lines = {matrix: a[f'snapshot_{matrix} {measure}'] for matrix in ('W_E', 'W_L')}
            log_lines(ax, epochs, lines, title=measure, ylim=(-0.05, 1.1))
            for matrix, colour in (('W_E', BLUE), ('W_L', ORANGE)):
                null = run.final()[f'{matrix} {measure}, Gaussian']
                ax.axhline(null, c=colour, ls=':', lw=0.8, label=f'Gaussian {matrix}')
            ax.legend(loc='lower left')
    return fig, f'W_L ends with an FFD of {of_each(runs, "W_L FFD")}; that of Gaussian numbers is near 1'


@figure('any', 'runs with records')
def progress(*runs):
    """Accuracy on unseen numbers (validation), mean of all tasks, of each run through training."""
    fig, ((ax,),) = panels(1, 1, 2.8)
    for run in runs:
        ax.plot(run.records['epoch'], run.records['valid_acc'].mean(1), label=run.name)
    ax.set(xlabel='epoch', ylabel='accuracy', ylim=(0, 1.02))
    ax.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    ends = ', '.join(spoken(run.records['valid_acc'][-1].mean()) for run in runs)
    return fig, f'These runs end right on {ends} of the unseen numbers'


# ---------------------------------------------------------------- files

def draw_file(file, draw, *args):
    """A figure as file.png and file.svg. Returns '', or for which runs the figure is if not for this one."""
    try:
        fig = draw(*args)
    except KeyError as e:
        return e.args[0]
    for kind in ('svg', 'png'):
        with our_style():
            try:
                write(file.with_name(f'{file.name}.{kind}'), functools.partial(fig.savefig, format=kind))
            except data.Refusal as e:
                refuse(f'{e}; --to FOLDER writes elsewhere')
    say(f'{file}.png')
    return ''


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    option = parser.add_argument
    option('runs', nargs='*', metavar='RUN', help='run folder written by train.py')
    option('--only', metavar='NAME', choices=FIGURES, help='one figure: ' + ', '.join(FIGURES))
    option('--to', metavar='FOLDER', help='write into FOLDER/NAME-OF-RUN, what is of no run into FOLDER')
    option('--data', action='store_true', help='the figures that need no run')
    option('--embedding', metavar='FILE', help='the spectrum of a matrix, .npy or .pt')
    args = parser.parse_args(argv)
    need(args.runs or args.data or args.embedding, 'name a run folder, or --data, or --embedding FILE')
    runs = [analyze.load_run(path, args.to) for path in args.runs]
    jobs = []  # folder, name, figure, what it takes
    chosen = {args.only: FIGURES[args.only]} if args.only else FIGURES
    for name, (draw, takes) in chosen.items():
        if takes == 'one':
            jobs += [(run.to, name, draw, run) for run in runs]
        if takes == 'any' and runs:
            jobs.append((runs[0].to, name, draw, *runs))
        if takes == 'none' and args.data:
            jobs.append((args.to or 'out', name, draw))
    if args.embedding:
        jobs.append((args.to or 'out', f'embedding_{Path(args.embedding).stem}', periods, args.embedding))
    what = dict(none='--data', one='a run folder', any='a run folder', file='--embedding FILE')
    if not jobs:
        refuse(f'{args.only} needs {what[FIGURES[args.only][1]]}')
    lacking = [draw_file(Path(folder, 'figures', name), draw, *given) for folder, name, draw, *given in jobs]
    notes = [*{needs for needs in lacking if needs and args.only}]
    if any(lacking):
        notes += [note for run in runs for note in run.notes]
        notes += [f'{run.path} is at epoch 0: a run saves every 30 seconds' for run in runs if run.epoch == 0]
    need('' in lacking, '; '.join(notes))
    for note in notes:
        say(f'note: {note}')


if __name__ == '__main__':
    data.run_script(main)
