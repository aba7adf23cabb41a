"""Train a one-layer transformer on modular arithmetic, full batch, until it groks. One run, one folder.

    python train.py                           # 29 tasks at once, p = 113: the paper's run with a GPU, a fast recipe without
    python train.py --task nanda              # modular addition
    python train.py --task "a^2+b"            # any polynomial in a and b mod p; several, as "a+b,a*b", share one network
    python train.py --resume --out out/miiii  # go on where a run stopped
    python train.py --bench 50                # how fast, and how close to the matrix-product limit
    python train.py --sweep 20                # 20 settings of the paper's grid, ranked; the same command again goes on with it
    torchrun --nproc_per_node 8 train.py --sweep 384  # all of them, a GPU for each process (not run on GPUs yet)
    python train.py --help                    # every option with the paper's value; at its end what each preset changes

Without a GPU the first ends after 6 to 6.5 minutes on 2 cores (x86-64 with bfloat16 arithmetic, torch 2.13.0) at a mean validation
accuracy of .990 to .995 (3 seeds), the second after 26 seconds at 1.0 (3 seeds). On a GPU: not run yet.
"""
import time
STARTED = time.perf_counter()  # before torch, which takes seconds

import argparse
import csv
import dataclasses
import difflib
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

import analyze
import data
from data import Refusal, load, refuse, write
from model import Muon, Transformer, flop_per_row, fused_losses, set_precision, task_losses


# ---------------------------------------------------------------------------------------------------- options

def opt(default, help, **limits):
    return dataclasses.field(default=default, metadata=dict(help=help, **limits))


@dataclass(frozen=True)
class Options:
    """The defaults are the paper's run (Syrkis & Sogaard 2024, Table 2); PRESETS below says what else is meant by a name."""
    task: str = opt('miiii', f'what to learn: {", ".join(data.TASKS)}, or formulas in a and b between commas, as "a^2+b,a*(b-1)" (--task=-a+b if it begins with a minus); '
                    'a name for several: ' + ', '.join(data.FAMILIES))
    p: int = opt(113, 'prime base, for add any number; the inputs are all p^2 pairs of digits', lo=5, hi=1000)
    train_frac: float = opt(0.3, 'share of the inputs to train on', lo=0, hi=1)
    seed: int = opt(0, 'seed of initial weights and dropout', lo=0, hi=2**32 - 1)
    data_seed: int = opt(0, 'seed of the split (and of the shuffle in basis)', lo=0, hi=2**32 - 1)
    d_model: int = opt(256, 'width D; the MLP has 4D neurons', lo=1, hi=2**14)
    n_heads: int = opt(4, 'attention heads; must divide d_model', lo=1, hi=2**14)
    dropout: float = opt(0.1, 'share of the residual stream dropped after each of the two adds', lo=0, hi=0.99)
    dropout_mask: str = opt('example', 'one mask per example, or one per step for the whole batch', choices=('example', 'batch'))
    optimizer: str = opt('adamw', 'adamw for all matrices, or muon for all but W_E and W_pos', choices=('adamw', 'muon'))
    lr: float = opt(3e-4, 'learning rate of AdamW', lo=0, hi=10)
    weight_decay: float = opt(1 / 3, 'decoupled weight decay of AdamW', lo=0, hi=100)
    muon_lr: float = opt(0.05, 'learning rate of Muon', lo=0, hi=10)
    muon_decay: float = opt(0.1, 'decoupled weight decay of Muon', lo=0, hi=100)
    decay_from: float = opt(1.0, 'share of the epochs after which the learning rates fall linearly to zero; 1 = never', lo=0, hi=1)
    lamb: float = opt(0.5, 'gain of the gradient filter, 0 = off', lo=0, hi=100)
    alpha: float = opt(0.98, 'memory of the gradient filter', lo=0, hi=1)
    init_from: str = opt('', 'run folder of the same p, size and number of operations to copy weights from; or a .npy or .pt file with a row per digit, for W_E alone')
    copy: str = opt('all', 'what to copy: embed = W_E, block = attention and MLP', choices=('embed', 'block', 'all'))
    freeze: bool = opt(False, 'hold what was copied fixed')
    epochs: int = opt(65536, 'full-batch steps', lo=1, hi=10**7)
    precision: str = opt('tf32', 'of matrix products; weights and loss are float32 always, and tf32 is float32 without CUDA',
                         choices=('float32', 'tf32', 'bfloat16'))
    spectra_every: int = opt(256, 'record the spectra of all neurons every so many epochs, 0 = never (add has none)', lo=0, hi=10**7)
    snapshots: int = opt(2, 'weight snapshots per doubling of the epoch, 0 = none', lo=0, hi=64)
    preset: str = opt('auto', 'paper or fast recipe; auto = paper with CUDA, fast without', choices=('auto', 'paper', 'fast'))
    device: str = opt('auto', 'auto, cpu, cuda or cuda:N')
    compile: str = opt('auto', 'compile the model, on CUDA also the loss, and capture the step as a graph; auto = on CUDA (a CPU gains little)',
                       choices=('auto', 'on', 'off'))
    out: str = opt('', 'run folder, out/TASK if not given')
    resume: bool = opt(False, 'go on with the run in the folder; its own options hold')
    bench: int = opt(0, 'time so many epochs instead, save nothing; 0 = train', lo=0, hi=10**6)
    sweep: int = opt(0, 'train so many settings drawn from a grid (by --seed), a folder each, and rank them; around the paper preset unless --preset fast; 0 = one run', lo=0, hi=10**5)
    sweep_space: str = opt('dropout=0,0.5,0.2,0.1 lamb=0,0.5,2 weight_decay=0,0.1,0.5,1 d_model=128,256 lr=3e-4,1e-4 n_heads=4,8',
                           'grid of the sweep, as option=value,value; the default is the paper\'s (Table 1), less the options given by themselves')

    def __post_init__(self):
        for f in dataclasses.fields(self):
            v, lo, hi = getattr(self, f.name), f.metadata.get('lo', -math.inf), f.metadata.get('hi', math.inf)
            if not isinstance(v, (f.type, int) if f.type is float else f.type) or v not in f.metadata.get('choices', [v]):
                raise Refusal(f'--{f.name} cannot be {v!r}')
            if f.type in (int, float) and not lo <= v <= hi:
                raise Refusal(f'--{f.name} must lie between {lo} and {hi}, not {v}')
        if self.d_model % self.n_heads:
            raise Refusal(f'd_model {self.d_model} is not divisible by n_heads {self.n_heads}')
        if not self.init_from and (self.freeze or self.copy != 'all'):
            raise Refusal('--copy and --freeze go with --init_from')
        if self.init_from and not self.from_file and Path(self.init_from).is_file():
            raise Refusal(f'--init_from {self.init_from} is neither a run folder nor a .npy or .pt file')
        if self.from_file and self.copy == 'block':
            raise Refusal('--init_from with a file is for W_E: --copy embed')
        if self.freeze and self.copied() is None:
            raise Refusal('--freeze with --copy all leaves nothing to train')

    @property
    def from_file(self):
        """Whether W_E comes from a matrix in a file, not from a run."""
        return self.init_from.endswith(('.npy', '.pt')) and not Path(self.init_from).is_dir()

    def copied(self):
        """Names of the matrices to copy, None for all."""
        return COPIED.get('embed' if self.from_file else self.copy)


MUON = dict(optimizer='muon', lamb=0.0, precision='bfloat16')
NANDA = dict(d_model=128, dropout=0.0, lr=1e-3, weight_decay=1.0, lamb=0.0, epochs=25000)
FAST_NANDA = dict(MUON, d_model=128, lr=1e-2, weight_decay=1.0, muon_decay=0.3, decay_from=0.4, epochs=1000)
PRESETS = {
    'paper': {'miiii': {}, 'nanda': NANDA, 'formula': dict(NANDA, p=97), 'add': dict(NANDA, p=261)},
    'fast': {'miiii': dict(MUON, train_frac=0.5, lr=1e-2, weight_decay=1.0, decay_from=0.4, epochs=3000, spectra_every=100),
             'nanda': FAST_NANDA, 'formula': dict(FAST_NANDA, p=97), 'add': dict(FAST_NANDA, p=261, train_frac=0.1, epochs=600)},
}
COPIED = dict(embed=('W_E',), block=('W_Q', 'W_K', 'W_V', 'W_O', 'W_in', 'W_out'))


def recipe(preset, task):
    """What a preset changes in the options: basis and masked take the settings of miiii, all formulas have one."""
    return PRESETS[preset][task if task in ('nanda', 'add') else 'miiii' if task in data.TASKS else 'formula']


VERSIONS = dict(python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__)
TORCHRUN = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
HOW = {'device', 'compile', 'out', 'resume', 'bench', 'sweep', 'sweep_space'}  # where and how a run runs, not what it is: free to differ on resume


def parse(argv):
    """Command line -> the options given there, by name. Raises Refusal."""
    recipes = '\n'.join(f'  {name:5s} {task:7s} ' + (' '.join(f'{k}={v}' for k, v in o.items()) or 'the defaults')
                        for name, tasks in PRESETS.items() for task, o in tasks.items())
    families = '\n'.join(f'  {name:10s} {formulas}' for name, formulas in data.FAMILIES.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f'presets (an option on the command line wins over them):\n{recipes}\n\nnames for several formulas:\n{families}',
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse  # instead of usage and two lines
    fields = {'--' + f.name: f for f in dataclasses.fields(Options)}
    for flag, f in fields.items():
        kind = dict(action='store_true') if f.type is bool else dict(type=f.type, choices=f.metadata.get('choices'))
        parser.add_argument(flag, help=f'{f.metadata["help"]} (default: {f.default})', **kind)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split('=')[0], fields, 1)
        raise Refusal(f'unknown option {word}' + (f', did you mean {near[0]}?' if near else ', see --help'))
    return vars(given)


def resolve(given):
    """Options given -> all options and the checkpoint to resume, if any. Weakest first: defaults, preset, given options;
    a resumed run keeps its own options, and those given may only repeat them or raise `epochs`. Raises Refusal."""
    task, device, preset = given.get('task', 'miiii'), given.get('device', 'auto'), given.get('preset', 'auto')
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    here = ['cpu'] + ['cuda'] * torch.cuda.is_available() + [f'cuda:{i}' for i in range(torch.cuda.device_count())]
    if device not in here:
        raise Refusal(f'device {device} is not available, here is {", ".join(here)}')
    if preset == 'auto':
        preset = 'paper' if device.startswith('cuda') else 'fast'
    how = dict(device=device, out=given.get('out') or f'out/{task}')
    if not given.get('resume'):
        own = dict(recipe(preset, task))
        if device == 'cpu' and own.get('precision') == 'bfloat16' and 'precision' not in given:
            if matmul_rate(device, 'bfloat16') < 0.7 * matmul_rate(device, 'float32'):
                own['precision'] = 'float32'  # processors without bfloat16 arithmetic emulate it, slowly
        return Options(**own | given | how | dict(preset=preset)), None
    ckpt = load(Path(how['out']) / 'ckpt.pt')
    try:
        own = Options(**ckpt['config'])
    except TypeError as e:
        raise Refusal(f'{how["out"]}/ckpt.pt has options that this version does not know: {e}')
    differ = [k for k, v in given.items() if k not in HOW and (k, v) != ('preset', 'auto') and v != getattr(own, k)
              and not (k == 'epochs' and v > own.epochs)]
    if differ:
        raise Refusal('the run to resume disagrees (only epochs may grow): ' + ', '.join(f'{k} is {getattr(own, k)} there, {given[k]} here' for k in differ)
                      + '; leave the option out, or start anew in another --out')
    return dataclasses.replace(own, **{k: v for k, v in given.items() if k != 'preset'} | how), ckpt


def network(o, d):
    """A new model for data d."""
    return Transformer(o.p, o.d_model, o.n_heads, sum(d.classes) // d.n_ops, d.n_ops)


def weights_to_copy(o, model):
    """The matrices that --init_from and --copy ask for, by name. Raises Refusal if the run there has none that fit the model."""
    if o.from_file:
        rows = data.load_matrix(Path(o.init_from))
        if len(rows) != o.p:
            raise Refusal(f'--init_from {o.init_from}: {len(rows)} rows, one for each of {o.p} digits are needed')
        if rows.shape[1] != o.d_model:  # to the model's width by fixed random directions, which keep lengths and angles, roughly
            print(f'note: {o.init_from} has {rows.shape[1]} columns, brought to d_model = {o.d_model} by a random projection (seed 0)')
            rows = rows @ torch.randn(rows.shape[1], o.d_model, generator=torch.Generator().manual_seed(0)) / o.d_model ** 0.5
        return dict(W_E=torch.cat([rows, model.W_E.detach()[o.p:].cpu()]))
    source, out = load(Path(o.init_from, 'ckpt.pt'), ('model', 'config')), {}
    for name in o.copied() or dict(model.named_parameters()):
        try:
            p, w, shape = source['config']['p'], source['model'][name], model.get_parameter(name).shape
            if p != o.p or w.shape != shape:
                raise Refusal(f'--init_from {o.init_from}: its {name} is {list(w.shape)} at p = {p}, here {list(shape)} at p = {o.p}')
            if not w.isfinite().all():
                raise Refusal(f'--init_from {o.init_from}: its {name} is not finite')
        except (TypeError, KeyError, AttributeError, IndexError):
            raise Refusal(f'--init_from {o.init_from}: its ckpt.pt is not of this program')
        out[name] = w
    return out


# ---------------------------------------------------------------------------------------------------- one run

class Run:
    """Data, weights, optimiser and records of one run, all on one device. `step` is one epoch."""

    def __init__(self, o, ckpt=None):
        self.o, self.device = o, torch.device(o.device)
        self.cuda = self.device.type == 'cuda'
        self.products = 'float32' if o.precision == 'tf32' and not self.cuda else o.precision  # what the name comes to here
        self.compiled = o.compile == 'on' or (o.compile == 'auto' and self.cuda)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        set_precision(o.device, o.precision)
        torch.manual_seed(o.seed)
        try:
            self.data = d = data.make(o.task, o.p, o.data_seed, o.device)
            self.split = data.split(len(d.y), o.train_frac, o.data_seed)
        except ValueError as e:
            raise Refusal(e)
        if not d.in_loss.any():
            raise Refusal(f'task {o.task} leaves nothing to train on at p = {o.p}')
        self.parts = [d.part(rows.to(self.device)) for rows in self.split]  # train, valid, test
        self.ln_q = torch.tensor(d.classes, device=self.device).log()
        self.task_weight = d.in_loss / d.in_loss.sum() / self.ln_q  # the mean over trained tasks of CE_q / ln q (eq. 12)

        self.model = network(o, d).to(self.device)
        self.logits, self.losses = self.model, fused_losses(d.classes, self.device) if self.cuda else task_losses
        if self.compiled:
            torch.compiler.reset()  # of the runs before in a sweep: torch compiles few versions of one function, then runs it eagerly
            self.logits = torch.compile(self.model, dynamic=False)
        if self.compiled and self.cuda:
            self.losses = torch.compile(self.losses, dynamic=False)
        if o.init_from and not ckpt:
            with torch.no_grad():
                for name, w in weights_to_copy(o, self.model).items():
                    self.model.get_parameter(name).copy_(w)
        if o.freeze:
            for name in o.copied():
                self.model.get_parameter(name).requires_grad_(False)
        named = {n: w for n, w in self.model.named_parameters() if w.requires_grad}
        self.names, self.weights = list(named), list(named.values())  # what is trained
        self.filter = [torch.zeros_like(w) for w in self.weights] if o.lamb else []

        # learning rates live on the device, so that a captured graph can follow a schedule
        by_muon = [w for n, w in named.items() if o.optimizer == 'muon' and n not in ('W_E', 'W_pos')]
        by_adamw = [w for n, w in named.items() if o.optimizer != 'muon' or n in ('W_E', 'W_pos')]
        self.optimizers = [torch.optim.AdamW(by_adamw, torch.tensor(o.lr, device=self.device), betas=(0.9, 0.98),
                                             weight_decay=o.weight_decay, fused=True, capturable=self.cuda)]
        if by_muon:
            self.optimizers.append(Muon(by_muon, torch.tensor(o.muon_lr, device=self.device), o.muon_decay))

        self.epoch, self.wall_s = 0, 0.0  # epochs done, for the host
        self.t = torch.zeros(1, dtype=torch.int64, device=self.device)  # and for the device
        per_task = ('train_loss', 'train_acc', 'valid_loss', 'valid_acc')  # the records: preallocated, written without a sync
        widths = dict.fromkeys(per_task, len(d.classes)) | dict(grad_norm=len(named))
        self.metrics = {k: torch.zeros(o.epochs, width, device=self.device) for k, width in widths.items()}
        self.spectra, self.solver, self.snapshots = {}, None, {}
        if o.spectra_every and d.modular:
            B, n = len(analyze.wave_freqs(d.classes)), -(-o.epochs // o.spectra_every)
            if analyze.wave_memory(o.p, d.classes) > analyze.MAX_MEMORY:
                raise Refusal(f'the spectra at p = {o.p} need {analyze.wave_memory(o.p, d.classes) / 1e9:.0f} GB; --spectra_every 0 does without')
            widths = dict(spectrum=o.p // 2 + 1, sum_power=B, difference_power=B, variance=2, active=2)
            self.spectra = {k: torch.zeros(n, width, device=self.device) for k, width in widths.items()}
        if ckpt:
            self.restore(ckpt)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.o.precision == 'bfloat16')

    def forward(self, x, y, drop=(1, 1)):
        """Tokens and targets -> logits (N, C), loss (Q,), accuracy (Q,), and the objective's gradient at the logits (N, C). The logits are
        there for `backward` alone: the gradient may have their memory."""
        with self.autocast():
            logits = self.logits(x, drop).reshape(len(y), -1)
        return logits, *self.losses(logits, y, self.data.classes, self.task_weight, overwrite=True)

    def masks(self, n):
        """Two dropout masks for the residual stream of n examples, scaled so that its mean stays."""
        o = self.o
        if not o.dropout:
            return 1, 1
        shape = 2, 1 if o.dropout_mask == 'batch' else n, o.d_model
        draws = torch.empty(-(-math.prod(shape) // 4), dtype=torch.int64, device=self.device).random_(-2 ** 63, None)  # all 64 bits random
        drop = round(2 ** 16 * o.dropout)  # of 2^16 values; each draw makes four elements
        keep = draws.view(torch.int16)[:math.prod(shape)].view(shape) >= drop - 2 ** 15
        return keep / (1 - drop / 2 ** 16)

    def step(self):
        """One epoch. What it records belongs to the weights before its update: training with dropout, validation without."""
        o, (x, y) = self.o, self.parts[0]
        logits, loss, acc, grad = self.forward(x, y, self.masks(len(x)))
        self.model.zero_grad()
        logits.backward(grad)  # autograd.grad may lay gradients out otherwise than weights, which fused AdamW misreads
        grads = [w.grad for w in self.weights]

        with torch.no_grad():
            _, valid_loss, valid_acc, _ = self.forward(*self.parts[1])
            norms = torch.stack(torch._foreach_norm(grads))
            for record, row in zip(self.metrics.values(), (loss, acc, valid_loss, valid_acc, norms)):
                record.index_copy_(0, self.t, row[None])

        if o.lamb:  # the gradient filter (Grokfast-EMA, Lee et al. 2024): m <- alpha m + (1-alpha) g ;  g <- g + lamb m
            torch._foreach_lerp_(self.filter, grads, 1 - o.alpha)
            torch._foreach_add_(grads, self.filter, alpha=o.lamb)

        for optimizer, lr in zip(self.optimizers, (o.lr, o.muon_lr)):
            if o.decay_from < 1:  # constant, then linear to zero
                left = (o.epochs - self.t[0]) / (o.epochs * (1 - o.decay_from))
                optimizer.param_groups[0]['lr'].copy_(lr * left.clamp(max=1))
            with self.autocast():
                optimizer.step()
        self.t += 1

    @torch.no_grad()
    def record_spectra(self):
        """The spectra of all neurons over all p^2 inputs, at the weights before the next update."""
        if self.solver is None:
            basis = analyze.waves(self.o.p, self.data.classes, self.data.stride)
            self.solver = [m.to(self.device) for m in analyze.wave_solver(self.o.p, basis)]
        acts = {}
        with self.autocast():
            self.model(self.data.x, acts=acts)
        rows = analyze.neuron_spectra(acts['neurons'].float().view(self.o.p ** 2, -1), self.o.p, self.solver)
        for name, record in self.spectra.items():
            record.index_copy_(0, self.t // self.o.spectra_every, rows[name][None])

    def captured(self, fn):
        """fn itself, or on CUDA, if compiled, fn as one CUDA graph. The first three calls run plainly and count like any other; they
        warm up what a capture must not meet cold (compilation, optimiser state, workspaces). The fourth captures."""
        if not (self.compiled and self.cuda):
            return fn
        graph, side, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device), 0

        def call():
            nonlocal calls
            calls += 1
            if calls <= 3:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    fn()
                torch.cuda.current_stream().wait_stream(side)
                return
            if calls == 4:
                with torch.cuda.graph(graph):
                    fn()
            graph.replay()
        return call

    @torch.no_grad()
    def evaluate(self):
        """Loss and accuracy of each task on train, validation and test rows, without dropout: (3, 2, Q). Not compiled, for one call. And
        for sums without a modulus `analyze.errors` of each part."""
        out, errors = [], []
        for x, y in self.parts:
            with self.autocast():
                logits = self.model(x).view(len(y), -1)
            errors += [] if self.data.modular else [analyze.plain(analyze.errors(logits, y[:, 0]))]
            out.append(torch.stack(task_losses(logits, y, self.data.classes)[:2]))
        return torch.stack(out).cpu(), errors

    # from here on: files

    def snapshot(self):
        """Copy the weights on the device at log-spaced epochs 0, 1, 2, 3, 4, 6, 8, 11, 16, ...: the same whatever `epochs` is."""
        e, s = self.epoch, self.o.snapshots
        if s > 0 and (e == 0 or e == round(2 ** (round(s * math.log2(e)) / s))):
            self.snapshots[e] = {n: w.detach().clone() for n, w in self.model.named_parameters()}

    def records(self):
        """The content of metrics.npz: everything recorded so far, by name."""
        out = dict(epoch=np.arange(self.epoch), tasks=np.array(self.data.names), grad_norm_names=np.array(self.names))
        out |= {k: v[:self.epoch].cpu().numpy() for k, v in self.metrics.items()}
        if self.spectra:
            epochs = np.arange(0, self.epoch, self.o.spectra_every)
            out |= dict(spectra_epoch=epochs, freqs=analyze.wave_freqs(self.data.classes).numpy())
            out |= {k: v[:len(epochs)].cpu().numpy() for k, v in self.spectra.items()}
        return out

    def save(self):
        """Snapshots, metrics.npz, then ckpt.pt: whatever happens in between, there are records up to the checkpoint."""
        for epoch, weights in self.snapshots.items():
            write(Path(self.o.out, 'snapshots', f'{epoch:08}.pt'), dict(model=weights, step=epoch))
        self.snapshots.clear()
        if self.epoch:
            np.savez(buffer := io.BytesIO(), **self.records())
            write(Path(self.o.out, 'metrics.npz'), buffer.getvalue())
        write(Path(self.o.out, 'ckpt.pt'), dict(
            model=self.model.state_dict(), optimizer=[x.state_dict() for x in self.optimizers],
            filter=dict(zip(self.names, self.filter)), step=self.epoch,
            rng=dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state(self.device) if self.cuda else None),
            config=dataclasses.asdict(self.o), versions=VERSIONS, wall_s=self.wall_s))

    def restore(self, ckpt):
        """The state that `save` wrote. Raises Refusal if it does not fit."""
        try:
            if not ckpt['optimizer']:
                raise ValueError('a copy made by --ship, without what resuming needs')
            self.model.load_state_dict(ckpt['model'])
            self.epoch, self.wall_s = int(ckpt['step']), float(ckpt['wall_s'])
            self.t.fill_(self.epoch)
            for optimizer, old in zip(self.optimizers, ckpt['optimizer'], strict=True):
                optimizer.load_state_dict(dict(old, param_groups=optimizer.state_dict()['param_groups']))  # keeps our rates, on our device
                for w in optimizer.param_groups[0]['params'] if self.epoch else []:
                    if not optimizer.state[w] or any(v.shape not in (w.shape, ()) for v in optimizer.state[w].values()):
                        raise ValueError('the optimiser state is not that of these weights')
            for m, name in zip(self.filter, self.names):
                m.copy_(ckpt['filter'][name].view(m.shape))
            torch.set_rng_state(ckpt['rng']['cpu'])
            if self.cuda and ckpt['rng']['cuda'] is not None:
                torch.cuda.set_rng_state(ckpt['rng']['cuda'], self.device)
            if self.epoch:
                records = np.load(io.BytesIO(Path(self.o.out, 'metrics.npz').read_bytes()))
                for buffers, every in ((self.metrics, 1), (self.spectra, self.o.spectra_every)):
                    for name, buffer in buffers.items():
                        buffer = buffer[:-(-self.epoch // every)]
                        buffer.copy_(torch.from_numpy(records[name][:len(buffer)]).view(buffer.shape))
        except Exception as e:  # a foreign file can fail in any of these lines, in any way
            raise Refusal(f'cannot resume: ckpt.pt or metrics.npz in {self.o.out} is damaged, missing or of another program: {" ".join(repr(e).split())[:150]}')


# ---------------------------------------------------------------------------------------------------- the loop

SAVE_EVERY = 30  # seconds between checkpoints, or 20 times as long as one takes
ONE_LINE = sys.stdout.isatty() and not TORCHRUN
LINE_EVERY = 30  # seconds between progress lines where they cannot be rewritten in place


def train(run):
    """From run.epoch to the last epoch, then a save. Returns the signal that stopped it early, if one did."""
    o, signals = run.o, []

    def on_signal(number, _):
        if signals:
            os._exit(128 + number)
        signals.append(number)
        os.write(2, b'\nsaving after this epoch; once more to leave at once\n')

    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    step, record_spectra = run.captured(run.step), run.captured(run.record_spectra)
    began, saved_at, start = time.perf_counter(), time.perf_counter(), run.epoch
    line_at, wall_before, save_cost, chunk, rate, row = -math.inf, run.wall_s, 0.0, 1, 0.0, None
    try:
        while run.epoch < o.epochs and not signals:
            first, chunk_began = run.epoch, time.perf_counter()
            while run.epoch < min(first + chunk, o.epochs) and not signals:
                run.snapshot()
                if run.spectra and run.epoch % o.spectra_every == 0:
                    record_spectra()
                step()
                run.epoch += 1

            # from here on: the host looks, about once a second
            row = check_finite(run, first)
            now = time.perf_counter()
            speed = (run.epoch - first) / (now - chunk_began)
            rate = 0.8 * rate + 0.2 * speed if first > start + 1 else speed  # the first epoch has much to set up
            chunk = max(1, min(2 * chunk, int(speed)))
            run.wall_s = wall_before + now - began
            if first > start and (ONE_LINE or now - line_at > LINE_EVERY):
                line_at = now
                progress(run, row, rate)
            if now - saved_at > max(SAVE_EVERY, 20 * save_cost):
                run.save()
                saved_at, save_cost = time.perf_counter(), time.perf_counter() - now
        if row is not None:
            progress(run, row, rate, end='\n')
            run.snapshot()
            run.save()
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return signals[0] if signals else None


class NotFinite(Refusal):
    pass


def check_finite(run, first):
    """The newest row of the records, on the host, by the loop's only sync. Raises NotFinite naming epoch and task if a loss,
    gradient or weight since epoch `first` is not finite; nothing is saved then."""
    rows = torch.cat([v[first:run.epoch] for v in run.metrics.values()], 1)
    flat = torch.cat([rows.flatten()] + [w.detach().sum()[None] for w in run.weights]).cpu()
    rows, sums = flat[:rows.numel()].view(rows.shape), flat[rows.numel():]
    columns = [f'the loss of {n}' for n in run.data.names] * 4 + [f'the gradient of {n}' for n in run.names]
    bad = [(first + i, columns[j]) for i, j in (~rows.isfinite()).nonzero()[:1].tolist()]
    bad += [(run.epoch, f'the weight {n}') for n, ok in zip(run.names, sums.isfinite()) if not ok]
    if bad:
        raise NotFinite(f'{bad[0][1]} is not finite at epoch {bad[0][0]}; the last good checkpoint in {run.o.out} is kept; '
                        'start anew in another --out with a lower --lr or --muon_lr')
    return rows[-1]


def hms(seconds):
    return str(timedelta(seconds=round(seconds)))


def progress(run, row, rate, end=''):
    """One line, rewritten in place on a terminal, a line of its own in a log."""
    o, Q = run.o, len(run.data.classes)
    acc = row[3 * Q:4 * Q]
    line = (f'[{os.environ.get("RANK")}] ' * TORCHRUN + f'epoch {run.epoch:,}/{o.epochs:,} {run.epoch / o.epochs:4.0%}  ETA {hms((o.epochs - run.epoch) / rate)}  grokked {(acc >= 0.99).sum()}/{Q}  '
            f'valid mean {acc.mean():.3f} worst {acc.min():.3f}  {rate:.3g} epochs/s')
    if ONE_LINE:
        print('\r\033[K' + line[:shutil.get_terminal_size().columns - 1], end=end, flush=True)
    else:
        print(line, flush=True)


def finish(run):
    """The last figures of every task; the test set is touched here, once. Writes summary.json, prints the table."""
    o, d, valid_acc = run.o, run.data, run.metrics['valid_acc'][:run.epoch].cpu().numpy()
    (final, errors), tasks = run.evaluate(), []
    for i, name in enumerate(d.names):
        first, held = analyze.grok_epochs(valid_acc[:, i], final[1, 1, i].item())
        task = dict(name=name, classes=d.classes[i], grok_epoch=first, grok_epoch_sustained=held)
        for j, part in enumerate(('train', 'valid', 'test')):
            task[f'{part}_loss'], task[f'{part}_acc'] = final[j, :, i].tolist()
        tasks.append(task)
    tasks[0] |= {f'{part}_errors': e for part, e in zip(('train', 'valid', 'test'), errors)}
    objective = dict(zip(('train', 'valid', 'test'), (final[:, 0] @ run.task_weight.cpu()).tolist()))  # mean of CE_q / ln q
    summary = dict(tasks=tasks, objective=objective, split=dict(zip(('train', 'valid', 'test'), map(len, run.split))), epochs=run.epoch, wall_s=run.wall_s,
                   epochs_per_s=run.epoch / run.wall_s, device=device_name(o.device), versions=VERSIONS, config=dataclasses.asdict(o))
    write(Path(o.out, 'summary.json'), json.dumps(summary, indent=1).encode())

    print(f'\n{"task":18s} {"train acc":>9s} {"valid acc":>9s} {"test acc":>9s} {"valid >= .99 from epoch":>24s} {"for good":>9s}')
    for t in tasks:
        grok = ['-' if t[k] is None else f'{t[k]:,}' for k in ('grok_epoch', 'grok_epoch_sustained')]
        print(f'{t["name"]:18s} {t["train_acc"]:9.4f} {t["valid_acc"]:9.4f} {t["test_acc"]:9.4f} {grok[0]:>24s} {grok[1]:>9s}')
    mean = final[:, 1].mean(1)
    print(f'{"mean":18s} {mean[0]:9.4f} {mean[1]:9.4f} {mean[2]:9.4f} {(final[1, 1] == 1).sum():>13} of {len(tasks)} at 1.0')
    for part, e in zip(('valid', 'test'), errors[1:]):
        print(f'{part}: ' + ', '.join(f'{name} {v:.4f}' for name, v in zip(analyze.SCORES, e)))
    print(f'{run.epoch:,} epochs in {hms(run.wall_s)} on {summary["device"]}; all of it is in {o.out}')


# ---------------------------------------------------------------------------------------------------- speed, main

def device_name(device):
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    return f'{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'


def gflop_per_epoch(o, d):
    """Counted work of one epoch on data d in training (forward and backward, twice the forward, nothing frozen) and in validation (forward): two numbers."""
    train, valid, _ = data.split(len(d.y), o.train_frac)
    return [flop_per_row(o.d_model, sum(d.classes) // d.n_ops) * d.n_ops * rows / 1e9 for rows in (3 * len(train), len(valid))]


def timed(device, fn, n):
    """Seconds per call of fn: n calls in up to nine groups, the median over the groups."""
    def clock():
        if device.startswith('cuda'):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times, groups = [], min(n, 9)
    for i in range(groups):
        calls, began = n // groups + (i < n % groups), clock()
        for _ in range(calls):
            fn()
        times.append((clock() - began) / calls)
    return sorted(times)[groups // 2]


def matmul_rate(device, precision):
    """GFLOP/s of large matrix products in this precision on this machine."""
    set_precision(device, precision)
    return product_rate(device, torch.bfloat16 if precision == 'bfloat16' else torch.float32)


def product_rate(device, dtype):
    """The best of a few shapes."""
    best, g = 0, torch.Generator(device).manual_seed(0)  # its own, so that a run draws the same masks with or without this
    for m, k, n in [(8192, 8192, 8192), (16384, 1024, 4096)] if device.startswith('cuda') else [(4096, 256, 1024), (4096, 1024, 256)]:
        a, b = (torch.randn(shape, generator=g, device=device).to(dtype) for shape in ((m, k), (k, n)))
        out = a @ b
        best = max(best, 2 * m * k * n / timed(device, lambda: torch.mm(a, b, out=out), 27) / 1e9)
    return best


def bench(run, o):
    """Time o.bench epochs and their parts, the same epochs by the general form of the model, and a plain matrix product, all in
    one run, whose records have room for o.bench + 6 epochs. Prints lines to read; the last one is JSON."""
    device = o.device

    def ms(fn, n):
        run.t.zero_()
        timed(device, fn, 5)
        return 1e3 * timed(device, fn, n)

    epoch = run.captured(run.step)
    ms(epoch, 1)
    r = dict(ready_s=time.perf_counter() - STARTED, epoch_ms=ms(epoch, o.bench))
    r['validation_ms'] = ms(run.captured(torch.no_grad()(lambda: run.forward(*run.parts[1]))), 9)
    r['training_ms'] = r['epoch_ms'] - r['validation_ms']  # with update and records
    r['spectra_ms'] = ms(run.captured(run.record_spectra), 1) if run.spectra else None
    run.logits = torch.compile(run.model.general_forward, dynamic=False) if run.compiled else run.model.general_forward
    r['general_form_ms'] = ms(run.captured(run.step), min(9, o.bench))

    r['training_gflop'], r['validation_gflop'] = gflop_per_epoch(o, run.data)
    r['product_gflops'] = matmul_rate(device, o.precision)
    r['share'] = r['training_gflop'] / r['training_ms'] * 1e3 / r['product_gflops']
    torch.set_float32_matmul_precision('highest')
    r['default_float32_gflops'] = product_rate(device, torch.float32)
    print(f'{run.products}, compile {"on" if run.compiled else "off"}: {r["epoch_ms"]:.4g} ms per epoch, {1e3 / r["epoch_ms"]:.4g} per second, '
          f'{r["validation_ms"]:.3g} ms of it validation; the first six done {r["ready_s"]:.1f} s after the start')
    print(f'training: {r["training_gflop"]:.4g} GFLOP at {100 * r["share"]:.2g} % of the {r["product_gflops"]:.4g} GFLOP/s of a matrix product '
          f'(by torch\'s default in float32: {r["default_float32_gflops"]:.4g} GFLOP/s)')
    print(f'general form of the model: {r["general_form_ms"]:.4g} ms per epoch, {r["general_form_ms"] / r["epoch_ms"]:.2f} times as long')
    if run.spectra:
        print(f'spectra of all neurons: {r["spectra_ms"]:.4g} ms each time')
    print(json.dumps(r | dict(device=device_name(device), versions=VERSIONS, config=dataclasses.asdict(o))))


def one_run(given):
    """A whole run, or its bench, by the options given. Returns an exit code if a signal stopped it."""
    o, ckpt = resolve(given)
    run, folder = Run(dataclasses.replace(o, epochs=max(o.epochs, o.bench + 6)) if o.bench else o, ckpt), Path(o.out)
    if folder.exists() and not folder.is_dir():
        raise Refusal(f'{folder} is not a folder')
    if not o.bench and not o.resume and any((folder / f).exists() for f in ('ckpt.pt', 'metrics.npz', 'summary.json', 'snapshots')):
        raise Refusal(f'{folder} holds a run; go on with it by --resume, or choose another folder by --out')

    params, device = sum(w.numel() for w in run.model.parameters()), device_name(o.device)
    print(f'{o.task} p={o.p}: {len(run.data.classes)} tasks, {sum(run.data.classes):,} classes, '
          f'{"/".join(str(len(r)) for r in run.split)} train/validation/test rows, {params:,} parameters, {device}')
    if o.bench:
        return bench(run, o)
    how = f'{o.optimizer}, {run.products}, {o.epochs:,} epochs' + (f', {" ".join(o.copied())} frozen' if o.freeze else '')
    if o.resume:
        print(f'resumed at epoch {run.epoch:,}: preset {o.preset}, {how}' + '; nothing left to do, raise --epochs' * (run.epoch == o.epochs))
    else:
        why, hint = 'as asked', ''
        if given.get('preset', 'auto') == 'auto':
            other = 'fast' if o.preset == 'paper' else 'paper'
            o2, _ = resolve(given | dict(preset=other))
            seconds = o2.epochs * max(2e-3, 2 * sum(gflop_per_epoch(o2, run.data)) / matmul_rate(o2.device, o2.precision))
            set_precision(o.device, o.precision)
            about = f'{seconds / 3600:.1f} hours' if seconds > 3600 else f'{math.ceil(seconds / 60)} min'
            why = f'the default {"with" if run.cuda else "without"} CUDA'
            hint = f'; the other, some {about} here: python train.py {analyze.flags(given | dict(preset=other, out=f"{o.out}-{other}"))}'
        print(f'preset {o.preset} ({why}): {how}{hint}')
    with torch.no_grad():
        _, loss, _, _ = run.forward(*run.parts[1])
    print(f'loss / ln q before epoch {run.epoch + 1}: {(loss / run.ln_q).mean():.3f} (uniform guessing 1.0)', flush=True)

    if not ckpt:
        run.save()  # a full or read-only disk shows itself before any work is done
    if run.epoch < o.epochs:
        (folder / 'summary.json').unlink(missing_ok=True)  # of a shorter run
    stopped_by = train(run)
    if stopped_by:
        print(f'saved at epoch {run.epoch:,}; go on with: python train.py --resume --out {shlex.quote(o.out)}')
        return 128 + stopped_by
    finish(run)


# ---------------------------------------------------------------------------------------------------- many runs

def sweep_settings(given):
    """Options given -> a dict of options for each run of the sweep, in an order that the seed fixes: a longer sweep begins with the
    shorter one. An option given by itself leaves the default grid. Raises Refusal."""
    types, grid = {f.name: f.type for f in dataclasses.fields(Options) if f.name not in HOW | {'preset', 'init_from', 'freeze'}}, {}
    for axis in given.get('sweep_space', Options.sweep_space).split():
        name, _, values = axis.partition('=')
        try:
            values = [types[name](v) for v in values.split(',')]
            if name == 'task':  # the formulas of a family, each by itself
                values = [f for v in values for f in data.FAMILIES.get(v, v).split(',')]
        except (KeyError, ValueError):
            raise Refusal(f'--sweep_space takes option=value,value ..., not {axis!r}')
        if name in grid or len(set(values)) < len(values) or name in given and 'sweep_space' in given:
            raise Refusal(f'--sweep_space has {axis!r}, and some of that is given twice')
        if name not in given:
            grid[name] = values
    settings = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    if not 0 < given['sweep'] <= len(settings):
        raise Refusal(f'--sweep {given["sweep"]} of a grid with {len(settings)} settings')
    order = torch.randperm(len(settings), generator=torch.Generator().manual_seed(given.get('seed', Options.seed)))
    return [settings[i] for i in order[:given['sweep']]]


def sweep(given):
    """Train every setting that is not trained yet, each in its own folder, then rank all by the validation loss at their end, as the
    paper did. Of the processes that torchrun starts each takes its share. Returns an exit code if a signal stopped it."""
    if given.get('resume') or given.get('bench'):
        raise Refusal('--sweep goes with neither --resume nor --bench; the same command again goes on with a sweep')
    settings = sweep_settings(given)
    folder = Path(given.get('out') or f'out/{given.get("task", Options.task)}-sweep')
    given = {k: v for k, v in given.items() if k not in ('sweep', 'sweep_space', 'out')}
    given['preset'] = 'fast' if given.get('preset') == 'fast' else 'paper'
    rank, world = (int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])) if TORCHRUN else (0, 1)
    if TORCHRUN and torch.cuda.is_available() and given.get('device', 'auto') in ('auto', 'cuda'):
        given['device'] = f'cuda:{os.environ["LOCAL_RANK"]}'
    given['precision'] = resolve(given | settings[0])[0].precision  # measured once, if at all

    plan, checked = [], {}
    for setting in settings:  # every fault of an option shows itself before any work is done
        out = folder / ','.join(f'{k}={v}' for k, v in setting.items())
        options = given | setting | dict(out=str(out))
        o, _ = resolve(options)
        try:
            if (o.task, o.p) not in checked:
                checked[o.task, o.p] = data.make(o.task, o.p)
        except ValueError as e:
            raise Refusal(e)
        if o.init_from and not (out / 'ckpt.pt').exists():
            weights_to_copy(o, network(o, checked[o.task, o.p]))
        if (out / 'ckpt.pt').exists():
            options['resume'] = True
            own, _ = resolve(options)
            for k, v in dataclasses.asdict(o).items():
                if k not in HOW and getattr(own, k) != v:
                    raise Refusal(f'{out} was trained with --{k} {getattr(own, k)}, now it is {v}: not one sweep; give the same command, or another --out')
        plan.append((setting, out, options, o.epochs))

    if TORCHRUN:
        torch.distributed.init_process_group('gloo', timeout=timedelta(days=365))  # shares end hours apart
    rows, trained, began, share = [], 0, time.perf_counter(), list(enumerate(plan))[rank::world]
    for i, (setting, out, options, epochs) in share:
        eta = f', ETA {hms((time.perf_counter() - began) / trained * (len(share) - len(rows)))} for all' if trained else ''
        print(f'\nsetting {i + 1} of {len(settings)}: {out.name}{eta}', flush=True)
        row = setting | dict(valid_loss=math.inf, folder=str(out))
        try:
            if not (out / 'summary.json').exists() or json.loads((out / 'summary.json').read_text())['epochs'] < epochs:
                trained += 1
                if stopped := one_run(options):
                    print('the same command again goes on with the whole sweep')
                    return stopped
            s = json.loads((out / 'summary.json').read_text())
            row |= dict(valid_loss=s['objective']['valid'], valid_acc=sum(t['valid_acc'] for t in s['tasks']) / len(s['tasks']),
                        grokked=sum(t['valid_acc'] >= 0.99 for t in s['tasks']), epochs=s['epochs'], wall_s=s['wall_s'])
        except NotFinite as e:
            print(f'note: {e}')  # it ranks last
        rows.append(row)

    shares = [rows]
    if TORCHRUN:
        torch.distributed.gather_object(rows, shares := [None] * world if rank == 0 else None)
        torch.distributed.destroy_process_group()
    if rank == 0:
        rows = sorted(sum(shares, []), key=lambda row: row['valid_loss'] if math.isfinite(row['valid_loss']) else math.inf)
        table = csv.DictWriter(text := io.StringIO(), dict.fromkeys([*settings[0], 'valid_loss', 'valid_acc', 'grokked', 'epochs', 'wall_s', 'folder']), lineterminator='\n')
        table.writeheader()
        table.writerows(rows)
        write(folder / 'sweep.csv', text.getvalue().encode())
        print(f'\nvalidation loss / ln q of {len(rows)} settings, all of them in {folder / "sweep.csv"}')
        for row in rows[:10]:
            print(f'{row["valid_loss"]:8.4f}  {Path(row["folder"]).name}')


def main(argv):
    given = parse(argv)
    if given.get('sweep'):
        return sweep(given)
    if TORCHRUN or 'sweep_space' in given:
        raise Refusal('torchrun and --sweep_space are for --sweep N')
    return one_run(given)


if __name__ == '__main__':
    data.run_script(main)
