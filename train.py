"""Train a one-layer transformer on modular arithmetic, full batch, until it groks. One run, one folder.

    python train.py                            # 29 tasks at once, p = 113, by a fast recipe
    python train.py --preset paper             # the same by the paper's recipe
    python train.py --task "a^2+b"             # nanda, add, or polynomials mod p; "a+b,a*b" share one network
"""
import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

import analyze
import data
from data import Refusal, need, refuse, say
from model import (BLOCK, Muon, captured, example_logits, network, plain_torch, slow_bfloat16,
                   task_losses)

# ---------------------------------------------------------------- options, by default the fast recipe

OPTIONS = {}  # name: (default, help, choices)


def option(name, default, help, *choices):
    OPTIONS[name] = default, help, choices


option('task', 'miiii', ', '.join(data.TASKS) + ', formulas as "a^2+b,a*(b-1)", or moduli as "n%6,n%10"')
option('p', 113, 'prime base, for add any number; the inputs are all p^2 pairs of digits')
option('train_frac', 0.5, 'share of the pairs to train on')
option('seed', 0, 'seed of initial weights and dropout')
option('data_seed', 0, 'seed of the split (and of the shuffle in basis)')
option('d_model', 256, 'width D; the MLP has 4D neurons')
option('n_heads', 4, 'attention heads; must divide d_model')
option('init', 'small', 'initial scale: he = the text of the paper, small = .3 of that, reference = its code',
       'he', 'small', 'reference')
option('dropout', 0.05, 'share of the residual stream dropped after attention')
option('dropout_mlp', 0.2, 'and after the MLP')
option('dropout_mask', 'example', 'one mask per example, or one for the whole batch', 'example', 'batch')
option('init_from', '', 'start from the weights of another run folder, or W_E from a .npy or .pt file')
option('copy', 'all', 'what to copy: embed = W_E, block = attention and MLP', 'embed', 'block', 'all')
option('letters', 0, 'start from a W_E by design that holds so many bands of letters, as 14; 0 = at random')
option('freeze', False, 'hold what was copied or designed fixed, of W_E also the row of "="')
option('optimizer', 'muon', 'adamw for all matrices, or muon for all but W_E and W_pos', 'adamw', 'muon')
option('lr', 5e-3, 'learning rate of AdamW')
option('weight_decay', 0.5, 'decoupled weight decay of AdamW')
option('muon_lr', 0.1, 'learning rate of Muon')
option('muon_decay', 0.2, 'decoupled weight decay of Muon')
option('decay_from', 0.4, 'share of the run after which the rates fall linearly to zero; 1 = never')
option('focus', 1.0, 'power of the loss of a task in its weight; 0 = the weight is 1 / ln q, by the paper')
option('curriculum', 0, 'epochs in which the tasks enter the loss one by one, in their order; 0 = at once')
option('lamb', 0.0, 'gain of the gradient filter; 0 = off')
option('alpha', 0.98, 'memory of the gradient filter')
option('epochs', 1500, 'full-batch steps')
option('precision', 'tf32', 'of matrix products; tf32 is float32 on a CPU', 'float32', 'tf32', 'bfloat16')
option('spectra_every', 100, 'epochs between spectra of all neurons; 0 = never (add has none)')
option('snapshots', 2, 'weight snapshots per doubling of the epoch; 0 = none')
option('preset', 'fast', 'recipe, see below; other options win over it', 'fast', 'paper', 'tenfold')
option('device', 'auto', 'auto, cpu, cuda or cuda:N; a Mac trains on its CPU')
option('compile', 'auto', 'torch.compile; auto = on CUDA from 50,000 epochs; off: no CUDA graph, either',
       'auto', 'on', 'off')
option('out', '', 'run folder; out/TASK if not given')
option('resume', False, 'go on with the run in the folder; its own options hold')
option('bench', 0, 'time so many epochs instead, and save nothing')
option('sweep', 0, 'train so many settings drawn from a grid by --seed, a folder each, and rank them')
option('sweep_space', 'dropout=0,0.5,0.2,0.1 dropout_mlp=0,0.5,0.2,0.1 lamb=0,0.5,2 '
                      'weight_decay=0,0.1,0.5,1 d_model=128,256 lr=3e-4,1e-4 n_heads=4,8',
       'grid of the sweep; an option that you set is not varied')

GROUPS = dict(task='what is learned', d_model='the network', optimizer='a step', epochs='a run',
              preset='recipe', device='how')  # each begins at this option
DEFAULTS = {name: default for name, (default, _, _) in OPTIONS.items()}
HOW = {'device', 'compile', 'out', 'resume', 'bench', 'sweep', 'sweep_space'}  # may differ on resume
AT_MOST = dict(p=1000, train_frac=1, dropout=0.99, dropout_mlp=0.99, decay_from=1, alpha=1, focus=4,
               d_model=2 ** 14, epochs=10 ** 7)
PRESETS = {}  # what each changes, by task; basis, masked and moduli have that of miiii, formulas one for all
PRESETS['fast miiii'] = {}
PRESETS['fast nanda'] = dict(train_frac=0.3, d_model=128, lr=1e-2, muon_decay=0.3, epochs=1000)
PRESETS['fast formula'] = dict(p=97, train_frac=0.3, d_model=128, lr=1e-2, muon_decay=0.3, epochs=1000)
PRESETS['fast add'] = dict(p=261, train_frac=0.1, d_model=128, lr=1e-2, muon_decay=0.3, epochs=600)
PRESETS['paper miiii'] = dict(
    init='reference', dropout=0.1, dropout_mlp=0.1, dropout_mask='batch', optimizer='adamw', lr=3e-4,
    weight_decay=1 / 3, decay_from=1.0, focus=0.0, lamb=0.5, epochs=65536, spectra_every=256)
PRESETS['paper nanda'] = dict(
    train_frac=0.3, d_model=128, init='he', dropout=0.0, dropout_mlp=0.0, optimizer='adamw', lr=1e-3,
    weight_decay=1.0, decay_from=1.0, focus=0.0, epochs=25000, spectra_every=256)
PRESETS['paper formula'] = dict(
    p=97, train_frac=0.3, d_model=128, init='he', dropout=0.0, dropout_mlp=0.0, optimizer='adamw', lr=1e-3,
    weight_decay=1.0, decay_from=1.0, focus=0.0, epochs=25000, spectra_every=256)
PRESETS['paper add'] = dict(
    p=261, train_frac=0.3, d_model=128, init='he', dropout=0.0, dropout_mlp=0.0, optimizer='adamw', lr=1e-3,
    weight_decay=1.0, decay_from=1.0, focus=0.0, epochs=25000)
PRESETS['tenfold miiii'] = dict(  # ten times the lr * weight_decay of the paper
    init='reference', dropout=0.1, dropout_mlp=0.1, optimizer='adamw', lr=1e-3, weight_decay=1.0,
    decay_from=0.7, focus=0.0, lamb=0.5, epochs=10000, spectra_every=256)

VERSIONS = dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__)


def recipe(preset, task):
    kind = task if task in ('nanda', 'add') else 'formula'
    if data.of_n(task):
        kind = 'miiii'
    need(f'{preset} {kind}' in PRESETS, f'no preset {preset} for {task}; there are {", ".join(PRESETS)}')
    return DEFAULTS | PRESETS[f'{preset} {kind}']


def changes(o):
    """The options in which a run differs from its preset, and the preset if it is not `fast`."""
    base = recipe(o.preset, o.task) | dict(preset='fast')
    return {name: value for name, value in vars(o).items() if name not in HOW and value != base[name]}


def flags(options):
    """Options as words of a command line."""
    words = [f'--{name}' if value is True else f'--{name}={value}' for name, value in options.items()]
    return shlex.join(words)


def parse(argv):
    """Command line -> all options: defaults < preset < given. A resumed run keeps its own. Raises Refusal."""
    about = ['presets change:']
    for name, options in PRESETS.items():
        rounded = {key: f'{v:g}' if isinstance(v, float) else v for key, v in options.items()}
        about += textwrap.wrap(f'  {name}: {flags(rounded)}', 100, subsequent_indent='    ',
                               break_on_hyphens=False)
    parser = argparse.ArgumentParser(description=__doc__, epilog='\n'.join(about), allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse  # in one line
    group = parser
    for name, (default, text, choices) in OPTIONS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        of_value = dict(type=type(default), choices=choices or None)
        kind = dict(action='store_true') if default is False else of_value
        text = f'{text} (default: {default})'.replace('%', '%%')
        group.add_argument(f'--{name}', help=text, **kind)
    given = vars(parser.parse_args(argv))
    o = argparse.Namespace(**recipe(given.get('preset', 'fast'), given.get('task', 'miiii')) | given)
    o.out = o.out or 'out/' + ''.join(o.task.split()).replace('*', 'x')  # no * in a file's name
    o.device = usable(o.device)
    need(not o.sweep or not o.resume and not o.bench, '--sweep goes with neither --resume nor --bench')
    if o.resume:
        ckpt = data.load(Path(o.out, 'ckpt.pt'))
        need(ckpt['optimizer'], f'cannot resume {o.out}: a copy made for looking, without optimiser state')
        own = ckpt['config']  # without an example it is of a version where --dropout_mlp 0 meant the same
        same = isinstance(own, dict) and own.keys() == OPTIONS.keys() and 'example' in ckpt
        need(same, f'cannot resume {o.out}: its options are not those of this version')
        o = argparse.Namespace(**own | {name: getattr(o, name) for name in HOW})
        o.epochs = max(o.epochs, given.get('epochs', 0))
        for name, value in given.items():
            was = vars(o)[name]
            need(name in HOW or value == was,
                 f'{o.out} was run with --{name} {was}, not {value}: leave that out (only epochs may grow)')
    for name, value in vars(o).items():
        least = 1 if name in ('epochs', 'd_model', 'n_heads') else 0
        most = AT_MOST.get(name, 2 ** 32)
        fine = isinstance(value, str) or least <= value <= most
        need(fine, f'--{name} must lie between {least} and {most}, not {value}')
    need(o.curriculum < o.epochs, f'--curriculum {o.curriculum} does not end within {o.epochs} epochs')
    need(o.d_model % o.n_heads == 0, f'd_model {o.d_model} is not divisible by n_heads {o.n_heads}')
    need(o.init_from or o.copy == 'all', '--copy goes with --init_from')
    need(o.init_from or o.letters or not o.freeze, '--freeze goes with --init_from or --letters')
    need(not (o.init_from and o.letters), 'W_E is either from --init_from or by --letters')
    need(not o.letters or data.of_n(o.task), f'--letters is for tasks modulo numbers, as miiii, not {o.task}')
    return o


@functools.cache
def usable(device):
    """The card that a name stands for: the first one that can do a sum; with auto also the CPU."""
    cards = [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    choice = dict(auto=[*cards, 'cpu'], cuda=cards).get(device, [device])
    for name in choice:
        need(name in (*cards, 'cpu'), f'there is no device {name}, but {", ".join([*cards, "cpu"])}')
        try:
            torch.ones(2, device=name).sum().item()
            return name
        except RuntimeError as e:  # too old a driver, or no kernels for this card in this torch
            say(f'note: {name} cannot be used ({data.brief(e)})')
    refuse(f'device {device} is not available')


@plain_torch()
def train(o):
    """One run from the data to the final table, as train(parse(['--task', 'nanda'])). -> its folder.
    Raises Refusal, and KeyboardInterrupt or SystemExit when a signal has stopped it and all is saved."""
    out, cuda = Path(o.out), o.device != 'cpu'
    commit = git_commit()
    torch.manual_seed(o.seed)
    if cuda:
        torch.cuda.set_device(o.device)
        torch.set_float32_matmul_precision('high' if o.precision == 'tf32' else 'highest')
    bfloat16 = torch.autocast('cuda' if cuda else 'cpu', torch.bfloat16, enabled=o.precision == 'bfloat16',
                              cache_enabled=False)  # the cache lives as long as the outermost autocast

    # data: train, validation and test are one batch each, tokens and targets
    d = data.make(o.task, o.p, o.data_seed, o.device)
    rows = dict(zip(('train', 'valid', 'test'), data.split(len(d.y), o.train_frac, o.data_seed)))
    (x_train, y_train), (x_valid, y_valid) = (d.batch(rows[name].to(o.device)) for name in ('train', 'valid'))
    ln_q = torch.tensor(d.classes, device=o.device).log()
    need(not o.curriculum or d.in_loss.sum() > 1, f'--curriculum is for several tasks, and {o.task} is one')

    def weight_of(tasks):
        return tasks / tasks.sum() / ln_q  # the objective is the mean of CE_q / ln q (eq. 12)

    task_weight = weight_of(d.in_loss)

    # model
    model = network(vars(o), d).to(o.device)
    if o.init_from or o.letters:
        copy_weights(model, o, d)
    named = {name: w for name, w in model.named_parameters() if w.requires_grad}
    params = list(named.values())
    net = model
    if o.compile == 'on' or o.compile == 'auto' and cuda and o.epochs >= 50_000:
        torch.compiler.reset()  # torch compiles few versions of one function, and a sweep has many
        try:
            net = torch.compile(model, dynamic=False)
            with torch.no_grad(), bfloat16:
                net(x_valid)  # the first use compiles: no compiler, Python.h or Triton shows here
        except Exception as e:
            need(o.compile == 'auto', f'torch.compile fails here, leave out --compile on ({data.brief(e)})')
            say(f'note: torch.compile fails here, so this run does without ({data.brief(e)})')
            net = model

    # optimisers; their rates are tensors on the device, so that a CUDA graph can follow a schedule
    by_muon = {n: w for n, w in named.items() if o.optimizer == 'muon' and n not in ('W_E', 'W_pos')}
    by_adamw = [w for name, w in named.items() if name not in by_muon]
    optimizers = [torch.optim.AdamW(by_adamw, torch.tensor(o.lr, device=o.device), betas=(0.9, 0.98),
                                    weight_decay=o.weight_decay, fused=True, capturable=cuda)]
    if by_muon:
        optimizers.append(Muon(by_muon.values(), torch.tensor(o.muon_lr, device=o.device), o.muon_decay))
    memory = [torch.zeros_like(w) for w in params] if o.lamb else []  # of the gradient filter
    rates = o.dropout, o.dropout_mlp

    def dropout_masks():
        if not any(rates):
            return 1, 1
        n_masks = len(x_train) if o.dropout_mask == 'example' else 1
        return [(torch.rand(n_masks, 1, o.d_model, device=o.device) >= rate) / (1 - rate) for rate in rates]

    def evaluate(x, y, drop=(1, 1)):
        with bfloat16:
            logits = net(x, drop).reshape(len(y), -1)
        return task_losses(logits, y, d.classes)

    @torch.no_grad()
    def final(some_rows):
        """Losses and accuracies on any rows, in slices: it needs no more memory than an epoch."""
        total = 0
        for part in some_rows.to(o.device).split(len(y_train)):
            x, y = d.batch(part)
            with bfloat16:
                logits = model(x).reshape(len(y), -1)
            total = total + len(part) * torch.stack(task_losses(logits, y, d.classes)).double()
        return total / len(some_rows)

    def step():
        """One epoch. Its record belongs to the weights before the update; validation is without dropout."""
        loss, acc = evaluate(x_train, y_train, dropout_masks())
        hardness = ln_q * loss.detach() / loss.detach().mean().clamp(min=1e-30)  # all may be 0 at last
        weight = task_weight * hardness ** o.focus  # focus 0: 1 / ln q each; 1: as CE_q
        model.zero_grad()
        (weight @ loss).backward()

        with torch.no_grad():
            valid_loss, valid_acc = evaluate(x_valid, y_valid)
            grads = [w.grad for w in params]
            norms = torch.stack(torch._foreach_norm(grads))
            if o.lamb:  # Grokfast-EMA (Lee et al. 2024): m <- alpha m + (1 - alpha) g ; g <- g + lamb m
                torch._foreach_lerp_(memory, grads, 1 - o.alpha)
                torch._foreach_add_(grads, memory, alpha=o.lamb)
            with bfloat16:  # the products of Muon
                for optimizer in optimizers:
                    optimizer.step()
        return dict(train_loss=loss.detach(), train_acc=acc, valid_loss=valid_loss, valid_acc=valid_acc,
                    grad_norm=norms)

    # records: a row per epoch, or per spectrum, on the device, so that nothing waits for the host
    columns = dict.fromkeys(('train_loss', 'train_acc', 'valid_loss', 'valid_acc'), d.names)
    columns['grad_norm'] = list(named)
    history = {name: torch.zeros(o.epochs, len(labels), device=o.device) for name, labels in columns.items()}
    spectra = {}
    if o.spectra_every and d.stride:
        need(len(d.y) == o.p ** 2, 'spectra are of all pairs of digits; --spectra_every 0 does without')
        try:
            solver = [matrix.to(o.device) for matrix in analyze.wave_solver(o.p, d.classes, d.stride)]
        except Refusal as e:
            refuse(f'{e}; --spectra_every 0 does without spectra')
        one = analyze.spectra_of(model, d, solver, bfloat16)  # of the start, for their lengths
        n_spectra = math.ceil(o.epochs / o.spectra_every)
        spectra = {name: torch.zeros(n_spectra, len(row), device=o.device) for name, row in one.items()}
    epoch, wall = 0, 0.0  # what a step changes, save and restore must name
    late = {}  # files whose writing has failed so far

    def save(late):
        """First metrics.npz, then ckpt.pt: if killed in between, there are records up to the checkpoint."""
        records = dict(epoch=np.arange(epoch), tasks=np.array(d.names), grad_norm_names=np.array(list(named)))
        records |= {name: v[:epoch].cpu().numpy() for name, v in history.items()}
        if spectra:
            at = np.arange(0, epoch, o.spectra_every)
            records |= dict(spectra_epoch=at, freqs=analyze.wave_freqs(d.classes).numpy())
            records |= {name: v[:len(at)].cpu().numpy() for name, v in spectra.items()}
        if epoch:
            data.write(out / 'metrics.npz', lambda f: np.savez(f, **records), late)
        rng = dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state(o.device) if cuda else None)
        ckpt = dict(model=model.state_dict(), optimizer=[x.state_dict() for x in optimizers], step=epoch,
                    filter=dict(zip(named, memory)), rng=rng, config=vars(o), versions=VERSIONS, wall_s=wall,
                    example=example_logits(model, d))
        data.write(out / 'ckpt.pt', lambda f: torch.save(ckpt, f), late)

    def restore():
        nonlocal epoch, wall
        ckpt = data.load(out / 'ckpt.pt')
        try:
            epoch, wall = int(ckpt['step']), float(ckpt['wall_s'])
            model.load_state_dict(ckpt['model'])
            for optimizer, state in zip(optimizers, ckpt['optimizer'], strict=True):
                groups = optimizer.state_dict()['param_groups']  # ours: the rates on our device
                optimizer.load_state_dict(state | dict(param_groups=groups))
                need(len(optimizer.state) == len(groups[0]['params']) or not epoch, 'no optimiser state')
            for name, m in zip(named, memory):
                m.copy_(ckpt['filter'][name])
            torch.set_rng_state(ckpt['rng']['cpu'])
            if cuda and ckpt['rng']['cuda'] is not None:
                torch.cuda.set_rng_state(ckpt['rng']['cuda'], o.device)
            if epoch:
                records = np.load(out / 'metrics.npz')
                for name, table in (history | spectra).items():
                    length = epoch if name in history else math.ceil(epoch / o.spectra_every)
                    table[:length] = torch.from_numpy(records[name][:length])
        except Exception as e:  # a foreign file can fail in any of these lines, in any way
            refuse(f'cannot resume {out}: ckpt.pt or metrics.npz is damaged or missing ({str(e)[:150]!r})')

    if cuda and o.compile != 'off':
        step = captured(step)
    device = f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    if cuda:
        device = torch.cuda.get_device_name()
    sizes = {name: len(some) for name, some in rows.items()}
    counts = ' + '.join(f'{size} {name}' for name, size in sizes.items())
    n_params = sum(w.numel() for w in model.parameters())
    say(f'{o.task}, p = {o.p}: {len(d.classes)} tasks, {counts} rows, {n_params:,} parameters')
    options = flags(dict(preset=o.preset) | changes(o))
    if o.precision == 'bfloat16' and not cuda and slow_bfloat16():
        say('note: this CPU has no products in bfloat16; float32 is several times faster here')
    say(f'options: {options}\non {device}, torch {torch.__version__}')
    if o.bench:
        return bench(step, o.bench)

    # ---------------------------------------------------------------- the loop
    with data.claim(out), contextlib.ExitStack() as held:
        used = {'ckpt.pt', 'metrics.npz', 'summary.json', 'snapshots'} & set(os.listdir(out))
        need(o.resume or not used, f'{out} holds a run; go on with it by --resume, or choose another --out')
        if o.resume:
            restore()
            if epoch == o.epochs:
                say(f'{out} is finished; --epochs N goes on with it, at the rates of a run of N epochs')
        else:
            save(None)  # a full or read-only disk shows itself before any work is done
        with torch.no_grad():  # a yardstick for the eye, before any step
            start_loss = (evaluate(x_valid, y_valid)[0] / ln_q).mean()
        say(f'loss / ln q before epoch {epoch + 1:,}: {start_loss:.3f} (uniform guessing 1.0)')
        stop = stop_signals(held)
        one_line = sys.stdout is not None and sys.stdout.isatty()
        looked = saved = time.perf_counter()
        looked_epoch, last = epoch, epoch == o.epochs
        while not last:
            if o.decay_from < 1:  # the rates are constant, then fall linearly to zero
                remaining = (o.epochs - epoch) / (o.epochs * (1 - o.decay_from))
                for optimizer, lr in zip(optimizers, (o.lr, o.muon_lr)):
                    optimizer.param_groups[0]['lr'].fill_(lr * min(1, remaining))
            if epoch <= o.curriculum:  # in place: of n tasks the i-th enters at epoch (i - 1) curriculum / n
                before = d.in_loss.cumsum(0) - 1
                task_weight.copy_(weight_of(d.in_loss & (before * o.curriculum <= epoch * d.in_loss.sum())))
            if snapshot_due(epoch, o.snapshots):
                snapshot = dict(model=model.state_dict(), step=epoch)
                data.write(out / f'snapshots/{epoch:08}.pt', lambda f: torch.save(snapshot, f), late)
            if spectra and epoch % o.spectra_every == 0:
                for name, row in analyze.spectra_of(model, d, solver, bfloat16).items():
                    spectra[name][epoch // o.spectra_every] = row

            for name, row in step().items():
                history[name][epoch] = row
            epoch += 1

            # from here on: now and then the host looks, the only wait for the device
            now = time.perf_counter()
            last = epoch == o.epochs or bool(stop)
            if not last and now - looked < (1 if one_line else 30):
                continue
            fresh = {name: table[looked_epoch:epoch].cpu().numpy() for name, table in history.items()}
            check_finite(fresh, columns, named, looked_epoch, epoch, out)
            now = time.perf_counter()
            rate = (epoch - looked_epoch) / (now - looked)
            wall += now - looked
            looked, looked_epoch = now, epoch
            acc, train_acc = fresh['valid_acc'][-1], fresh['train_acc'][-1]
            line = f'epoch {epoch:,}/{o.epochs:,} {epoch / o.epochs:4.0%}'
            line += f'  ETA {timedelta(seconds=round((o.epochs - epoch) / rate))}'
            line += f'  grokked {(acc >= 0.99).sum()}/{len(acc)}  train {train_acc.mean():.3f}'
            line += f'  valid {acc.mean():.3f}  worst {acc.min():.3f}  {rate:.3g} epochs/s'
            if one_line:
                line = '\r\033[K' + line[:shutil.get_terminal_size().columns - 1]
            say(line, end='' if one_line and not last else '\n')
            if last or now - saved > 30:
                save(late)
                saved = time.perf_counter()

        if epoch == o.epochs:  # the last figures of every task; training touches the test rows only here
            tasks = scores(d, o.p, rows, final, history['valid_acc'].cpu().numpy())
            weight = weight_of(d.in_loss).tolist()
            objective = {name: np.dot(weight, [task[f'{name}_loss'] for task in tasks]) for name in rows}
            summary = dict(tasks=tasks, objective=objective, split=sizes, epochs=epoch, wall_s=wall,
                           device=device, versions=VERSIONS, commit=commit, options=options, config=vars(o))
            text = json.dumps(summary, indent=1).encode()
            data.write(out / 'summary.json', lambda f: f.write(text), late)
            data.settle(late)
            say(f'\n{in_words(tasks, o.task == "basis")}\n{score_table(tasks)}')
            say(f'{epoch:,} epochs in {timedelta(seconds=round(wall))} on {device}; all of it is in {out}\n'
                'the table is without dropout; the train accuracy of the progress lines is with it')
        if stop:
            data.settle(late)
            how = ['--resume', '--out', o.out, '--device', o.device, '--compile', o.compile]
            again = shlex.join([sys.executable, os.path.abspath(__file__), *how])
            say(f'saved at epoch {epoch:,}; go on with: {again}')
            raise KeyboardInterrupt if stop[0] == signal.SIGINT else SystemExit(128 + stop[0])
    return out


class Diverged(Refusal):
    """A loss, gradient or weight is not finite."""


def check_finite(records, columns, weights, first_epoch, epoch, out):
    """Raises Diverged if a record since first_epoch, or a weight at this epoch, is not finite."""
    bad = [f'{name} of {columns[name][j]} at epoch {first_epoch + i}' for name, block in records.items()
           for i, j in np.argwhere(~np.isfinite(block))[:1]]
    bad += [f'{name} at epoch {epoch}' for name, w in weights.items() if not w.isfinite().all()]
    if bad:
        raise Diverged(f'{bad[0]} is not finite; the last good checkpoint in {out} is kept; '
                       'start anew in another --out with a lower --lr or --muon_lr')


def snapshot_due(epoch, per_doubling):
    """At epochs 0, 1, 2, 3, 4, 6, 8, 11, 16, ...: the same whatever the length of the run."""
    if per_doubling == 0:
        return False
    steps = round(per_doubling * math.log2(max(epoch, 1)))
    return epoch in (0, round(2 ** (steps / per_doubling)))


def copy_weights(model, o, d):
    """--init_from, --copy, --letters, --freeze: matrices of another run, or W_E of the digits from a file or
    by design."""
    source, ours = Path(o.init_from), model.state_dict()
    from_file = source.suffix in ('.npy', '.pt') and not source.is_dir()
    need(not from_file or o.copy != 'block', '--init_from with a file is for W_E: --copy embed')
    block = [name for name in ours if name.startswith(tuple(BLOCK))]
    only_digits = from_file or o.letters
    names = dict(embed=['W_E'], block=block, all=list(ours))['embed' if only_digits else o.copy]
    need(not o.freeze or len(names) < len(ours), '--freeze with --copy all leaves nothing to train')
    for name in names:
        model.get_parameter(name).requires_grad_(not o.freeze)
    if o.resume:  # it has its weights, and goes on without their source
        return
    if o.letters:
        digits = analyze.written(analyze.design(o.letters, o.p, d.classes), o.p, o.d_model)
        theirs = dict(W_E=torch.cat([digits, ours['W_E'][o.p:].cpu()]))
    elif from_file:
        digits = data.load_matrix(source)
        fits = digits.shape == (o.p, o.d_model)
        need(fits, f'{source} is {[*digits.shape]}, and [p, d_model] = {[o.p, o.d_model]} is needed')
        theirs = dict(W_E=torch.cat([digits, ours['W_E'][o.p:].cpu()]))
    else:
        theirs = data.load(source / 'ckpt.pt', ('model', 'config'))['model']
    for name in names:
        new, shape = dict(theirs).get(name), ours[name].shape
        there = [*new.shape] if isinstance(new, torch.Tensor) else 'not there'
        fits = there == [*shape] and new.isfinite().all()
        need(fits, f'--init_from {source}: its {name} is {there}, {[*shape]} and finite numbers are needed')
        ours[name].copy_(new)


def stop_signals(held):
    """A list that gets the first Ctrl-C, TERM or HUP; a second one acts as ever. Not in a thread."""
    caught = []

    def catch(number, _):
        caught.append(number)
        held.close()  # gives the signals back

    if threading.current_thread() is threading.main_thread():
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)}:
            former = signal.getsignal(number)
            if former != signal.SIG_IGN:
                signal.signal(number, catch)
                held.callback(signal.signal, number, former)
    return caught


def git_commit():
    """The last commit of this code, with -dirty if it was changed since; '' where git does not know it."""
    how = dict(shell=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    name = subprocess.run('git log -1 --format=%h -- *.py', **how).stdout.strip()
    changed = subprocess.run('git diff --quiet HEAD -- *.py', **how).returncode == 1
    return f'{name}-dirty' if name and changed else name


# ---------------------------------------------------------------- what a run came to

def grok_epochs(acc, final):
    """First epoch with accuracy >= 0.99, and the first from which it stays there; None if there is none.
    acc (E,) by epoch, then `final`."""
    up = np.append(acc, final) >= 0.99
    down = np.flatnonzero(~up)
    held = down[-1] + 1 if len(down) else 0
    return int(up.argmax()) if up.any() else None, int(held) if held < len(up) else None


def scores(d, p, rows, measure, valid_acc):
    """What every task came to at the end of a run: a list of dicts.

    rows {name: row numbers} of train, valid and test; measure(some rows) -> losses and accuracies (2, Q);
    valid_acc (E, Q) by epoch, for the epochs of .99. Where a and b may be swapped, also the accuracy on test
    rows whose swapped pair was trained on, and on the others; None where there are no such rows.
    """
    sets, symmetric = dict(rows), [False] * len(d.names)
    if len(d.y) == p ** 2:  # pairs of digits
        swapped = torch.arange(p ** 2).view(p, p).T.flatten()
        symmetric = [torch.equal(y, y[swapped]) for y in d.y.T.cpu()]
    if any(symmetric):
        seen = torch.isin(swapped[rows['test']], rows['train'])
        sets |= dict(test_swapped_seen=rows['test'][seen], test_swapped_unseen=rows['test'][~seen])
    measured = {name: measure(some) if len(some) else None for name, some in sets.items()}
    tasks = []
    for i, (name, q) in enumerate(zip(d.names, d.classes)):
        task = dict(name=name, classes=q)
        for of in rows:
            task[f'{of}_loss'], task[f'{of}_acc'] = measured[of][:, i].tolist()
        task['grok_epoch'], task['grok_epoch_sustained'] = grok_epochs(valid_acc[:, i], task['valid_acc'])
        if symmetric[i]:
            for of in ('seen', 'unseen'):
                found = measured[f'test_swapped_{of}']
                task[f'test_acc_swapped_{of}'] = None if found is None else found[1, i].item()
        tasks.append(task)
    return tasks


def in_words(tasks, shuffled=False):
    """The same in two sentences, with what usually helps where no task came. shuffled: nothing can."""
    right = sum(task['test_acc'] >= 0.99 for task in tasks)
    came = sorted(task['grok_epoch'] for task in tasks if task['grok_epoch'] is not None)
    text = f'It is right on .99 or more of the test rows, never seen, in {right} of {len(tasks)} tasks. '
    if came:
        text += f'Of the validation rows it first had .99 at epoch {came[0]:,} in one task'
        text += f', and at epoch {came[-1]:,} in the last of {len(came)}.' if len(came) > 1 else '.'
    elif shuffled:
        text += 'No task came to .99 of the validation rows: the answers are shuffled, there is no rule.'
    else:
        text += ('No task came to .99 of the validation rows. What usually helps is more --epochs, a larger '
                 '--train_frac, or a larger --p or --d_model.')
    return textwrap.fill(text, 100)


def score_table(tasks):
    """The same as text."""
    columns = dict(train_acc='train acc', valid_acc='valid acc', test_acc='test acc',
                   grok_epoch='valid .99 from epoch', grok_epoch_sustained='for good',
                   test_acc_swapped_seen='test if b,a is trained', test_acc_swapped_unseen='if it is not')
    columns = {name: title for name, title in columns.items() if any(name in task for task in tasks)}
    rows = [['task', *columns.values()]]
    rows += [[task['name'], *(task.get(name) for name in columns)] for task in tasks]
    means = [np.mean([task[f'{of}_acc'] for task in tasks]).item() for of in ('train', 'valid', 'test')]
    solved = f'{sum(task["valid_acc"] == 1 for task in tasks)} of {len(tasks)} at 1.0'
    rows.append(['mean', *means, solved, *[''] * (len(columns) - 4)])
    return f'\n{data.aligned(rows)}'


# ---------------------------------------------------------------- other ways to run

def bench(step, epochs):
    """Print how long an epoch takes."""
    def seconds(times):
        start = time.perf_counter()
        for _ in range(times):
            losses = step()['train_loss']
        losses.tolist()  # waits for a GPU
        return (time.perf_counter() - start) / times

    seconds(5)  # compiles, captures, warms up
    each = seconds(epochs)
    say(f'{1e3 * each:.4g} ms per epoch, {1 / each:.4g} epochs/s')


def sweep(o, argv):
    """Train the settings that are not trained yet, a folder each, and rank all."""
    given, axes = {word.split('=')[0] for word in argv}, {}
    for axis in o.sweep_space.split():
        name, _, values = axis.partition('=')
        need(name in DEFAULTS.keys() - HOW, f'--sweep_space: there is no option --{name}')
        if f'--{name}' not in given:
            axes[name] = values.split(',')
    settings = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    need(o.sweep <= len(settings), f'--sweep {o.sweep} of a grid with {len(settings)} settings')
    order = torch.randperm(len(settings), generator=torch.Generator().manual_seed(o.seed))
    settings = [settings[i] for i in order[:o.sweep]]  # a longer sweep begins with the shorter one
    root, runs = Path(o.out if '--out' in given else f'{o.out}-sweep'), []
    for setting in settings:  # most faults show themselves before any work is done
        words = [f'{name}={value}' for name, value in setting.items()]
        out = root / ','.join(words).replace('*', 'x')
        words = [*argv, *(f'--{word}' for word in words), f'--out={out}', '--sweep=0']
        fresh = parse(words)
        d = data.make(fresh.task, fresh.p)  # these refuse what they would refuse then
        data.split(len(d.y), fresh.train_frac)
        if fresh.letters:
            analyze.design(fresh.letters, fresh.p, d.classes)
        planned = parse([*words, '--resume']) if (out / 'ckpt.pt').exists() else fresh
        need(changes(planned) == changes(fresh), f'{out} has other options; choose another --out')
        runs.append(planned)
    for planned in runs:
        summary = Path(planned.out, 'summary.json')
        if summary.exists() and json.loads(summary.read_text())['epochs'] >= planned.epochs:
            continue
        say(f'\n{summary.parent.name}, one of {len(runs)} settings; the same command goes on with them')
        try:
            train(planned)
        except Diverged as e:
            say(f'note: {e}')  # without a summary it ranks last
        gc.collect()  # gives back the memory of a CUDA graph
    say(rank(root, settings, runs))


def rank(root, settings, runs):
    """Rank runs by validation loss in root/sweep.csv, unfinished ones last. -> the best, as text."""
    rows = []
    for setting, o in zip(settings, runs):
        row = setting | dict(valid_loss=np.inf, valid_acc='', grokked='', folder=o.out)
        file = Path(o.out, 'summary.json')
        summary = json.loads(file.read_text()) if file.exists() else dict(epochs=0)
        if summary['epochs'] >= o.epochs:  # else it was made before the run was lengthened
            accs = np.array([task['valid_acc'] for task in summary['tasks']])
            row |= dict(valid_loss=summary['objective']['valid'], valid_acc=accs.mean())
            row['grokked'] = (accs >= 0.99).sum()
        rows.append(row)
    rows.sort(key=lambda row: row['valid_loss'])
    lines = [','.join(rows[0]), *(','.join(f'"{value}"' for value in row.values()) for row in rows)]
    data.write(root / 'sweep.csv', lambda f: f.write('\n'.join(lines).encode()))
    best = [f'{row["valid_loss"]:8.4f}  {Path(row["folder"]).name}' for row in rows[:10]]
    return '\n'.join(['', f'validation loss / ln q, the best of {root / "sweep.csv"}', *best])


def main(argv):
    o = parse(argv)
    need(o.sweep or o.sweep_space == DEFAULTS['sweep_space'], '--sweep_space is for --sweep N')
    if o.sweep:
        sweep(o, argv)
    else:
        train(o)


if __name__ == '__main__':
    data.run_script(main)
