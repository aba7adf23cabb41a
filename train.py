"""Train a one-layer transformer on modular arithmetic, full batch, until it groks. One run, one folder.

    python train.py                          # 29 tasks at once, p = 113: the paper's run with a GPU, a fast recipe without
    python train.py --task nanda             # modular addition
    python train.py --resume --out out/miiii # go on where a run stopped
    python train.py --bench 50               # how fast, and how close to the matrix-product limit
"""
import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import io
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from model import Transformer, task_losses


# ---------------------------------------------------------------------------------------------------- options

def opt(default, help, **limits):
    return dataclasses.field(default=default, metadata=dict(help=help, **limits))


@dataclass(frozen=True)
class Options:
    """The defaults are the paper's run (Syrkis & Sogaard 2024, Table 2); PRESETS below says what else is meant by a name."""
    task: str = opt('miiii', 'what to learn', choices=data.TASKS)
    p: int = opt(113, 'prime base; the inputs are all p^2 pairs of digits', lo=5, hi=1000)
    train_frac: float = opt(0.3, 'share of the inputs to train on', lo=0, hi=1)
    seed: int = opt(0, 'seed of initial weights and dropout', lo=0, hi=2**63 - 1)
    data_seed: int = opt(0, 'seed of the split (and of the shuffle in basis)', lo=0, hi=2**63 - 1)
    d_model: int = opt(256, 'width D; the MLP has 4D neurons', lo=1, hi=2**14)
    n_heads: int = opt(4, 'attention heads; must divide d_model', lo=1, hi=2**14)
    dropout: float = opt(0.1, 'share of the residual stream dropped after each of the two adds', lo=0, hi=0.99)
    dropout_mask: str = opt('batch', 'one mask per step for the whole batch, or one per example', choices=('batch', 'example'))
    optimizer: str = opt('adamw', 'adamw for all matrices, or muon for all but W_E and W_pos', choices=('adamw', 'muon'))
    lr: float = opt(3e-4, 'learning rate of AdamW', lo=0, hi=10)
    weight_decay: float = opt(1 / 3, 'decoupled weight decay of AdamW', lo=0, hi=100)
    muon_lr: float = opt(0.05, 'learning rate of Muon', lo=0, hi=10)
    muon_decay: float = opt(0.3, 'decoupled weight decay of Muon', lo=0, hi=100)
    decay_from: float = opt(1.0, 'share of the epochs after which the learning rates fall linearly to zero; 1 = never', lo=0, hi=1)
    lamb: float = opt(0.5, 'gain of the gradient filter, 0 = off', lo=0, hi=100)
    alpha: float = opt(0.98, 'memory of the gradient filter', lo=0, hi=1)
    epochs: int = opt(65536, 'full-batch steps', lo=1, hi=10**9)
    precision: str = opt('tf32', 'of matrix products; weights and loss are float32 always, and tf32 is float32 without CUDA',
                         choices=('float32', 'tf32', 'bfloat16'))
    spectra_every: int = opt(0, 'record the spectra of all neurons every so many epochs, 0 = never', lo=0, hi=10**9)
    snapshots: int = opt(2, 'weight snapshots per doubling of the epoch, 0 = none', lo=0, hi=64)
    preset: str = opt('auto', 'paper or fast recipe; auto = paper with CUDA, fast without', choices=('auto', 'paper', 'fast'))
    device: str = opt('auto', 'auto, cpu, cuda or cuda:N')
    compile: str = opt('auto', 'compile the step, on CUDA also capture it as a graph; auto = on CUDA', choices=('auto', 'on', 'off'))
    out: str = opt('', 'run folder, out/TASK if not given')
    resume: bool = opt(False, 'go on with the run in the folder; its own options hold')
    bench: int = opt(0, 'time so many epochs, save nothing', lo=0, hi=10**9)


MUON = dict(optimizer='muon', lamb=0.0, precision='bfloat16')
PRESETS = {
    'paper': {'miiii': {}, 'nanda': dict(d_model=128, dropout=0.0, lr=1e-3, weight_decay=1.0, lamb=0.0, epochs=25000)},
    'fast': {'miiii': dict(MUON, train_frac=0.5, lr=4e-3, weight_decay=1.0, decay_from=0.4, epochs=4000),
             'nanda': dict(MUON, d_model=128, lr=4e-3, weight_decay=1.0, decay_from=0.4, epochs=1000)},
}   # basis and masked take the settings of miiii
HOW = {'device', 'compile', 'out', 'resume', 'bench'}  # where and how a run runs, not what it is: free to differ on resume


class Refusal(Exception):
    """Something the user can mend: reported in one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refusal(message)


def parse(argv):
    """Command line -> the options given there, by name. Raises Refusal."""
    recipes = '\n'.join(f'  {name:5s} {task:5s} ' + (' '.join(f'{k}={v}' for k, v in o.items()) or 'the defaults')
                        for name, tasks in PRESETS.items() for task, o in tasks.items())
    parser = Parser(description=__doc__, epilog=f'presets (an option on the command line wins over them):\n{recipes}',
                    allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = {'--' + f.name: f for f in dataclasses.fields(Options)}
    for flag, f in fields.items():
        kind = dict(action='store_true') if f.type is bool else dict(type=f.type, choices=f.metadata.get('choices'))
        parser.add_argument(flag, help=f'{f.metadata["help"]} (default: {f.default})', **kind)
    given, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split('=')[0], fields, 1)
        raise Refusal(f'unknown option {word}' + (f', did you mean {near[0]}?' if near else ', see --help'))
    for flag, f in fields.items():
        v, lo, hi = getattr(given, f.name, None), f.metadata.get('lo'), f.metadata.get('hi')
        if v is not None and lo is not None and not lo <= v <= hi:
            raise Refusal(f'{flag} must lie between {lo} and {hi}, not {v}')
    return vars(given)


def resolve(given):
    """Options given -> all options and the checkpoint to resume, if any. Weakest first: defaults, preset, given options;
    a resumed run keeps its own options, and those given may only repeat them or raise `epochs`. Raises Refusal."""
    task, device, preset = given.get('task', 'miiii'), given.get('device', 'auto'), given.get('preset', 'auto')
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = str(torch.device(device))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise Refusal(f'device {device} is not available here: {str(e).splitlines()[0]}')
    if preset == 'auto':
        preset = 'paper' if device.startswith('cuda') else 'fast'
    how = dict(device=device, out=given.get('out') or f'out/{task}')
    if not given.get('resume'):
        recipe = dict(PRESETS[preset]['nanda' if task == 'nanda' else 'miiii'])
        if recipe.get('precision') == 'bfloat16' and matmul_rate(device, 'bfloat16') < matmul_rate(device, 'float32'):
            recipe['precision'] = 'float32'  # processors without bfloat16 arithmetic emulate it, slowly
        return Options(**recipe | given | how | dict(preset=preset)), None
    ckpt = load(Path(how['out']) / 'ckpt.pt')
    try:
        own = Options(**ckpt['config'])
    except TypeError as e:
        raise Refusal(f'{how["out"]}/ckpt.pt has options that this version does not know: {e}')
    differ = [k for k, v in given.items() if k not in HOW and (k, v) != ('preset', 'auto') and v != getattr(own, k)
              and not (k == 'epochs' and v > own.epochs)]
    if differ:
        raise Refusal('the run to resume disagrees: ' + ', '.join(f'{k} is {getattr(own, k)} there, {given[k]} here' for k in differ)
                      + f'; leave the option out, or choose another --out than {how["out"]}')
    return dataclasses.replace(own, **{k: v for k, v in given.items() if k != 'preset'} | how), ckpt


# ---------------------------------------------------------------------------------------------------- the optimiser

class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024) for 2-D weights and stacks of them (the heads), each matrix by itself.

    m <- mu m + (1 - mu) g ;  u <- mu m + (1 - mu) g ;  W <- (1 - lr decay) W - lr sqrt(max(1, rows/cols)) orth(u)
    The same as torch.optim.Muon, which takes neither stacks nor a learning rate that lives on the device.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, mu = group['lr'], group['momentum']
            for w in group['params']:
                m = self.state[w].setdefault('momentum', torch.zeros_like(w))
                m.lerp_(w.grad, 1 - mu)
                u = orthogonalize(w.grad.lerp(m, mu)) * max(1, w.shape[-2] / w.shape[-1]) ** 0.5
                w.mul_(1 - lr * group['weight_decay']).sub_(lr * u)


def orthogonalize(G):
    """The orthogonal matrix nearest to each matrix of G, roughly: five Newton-Schulz steps bring its singular values near 1."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


# ---------------------------------------------------------------------------------------------------- one run

class Run:
    """Data, weights, optimiser and records of one run, all on one device. `step` is one epoch."""

    def __init__(self, o, ckpt=None):
        self.o, self.device = o, torch.device(o.device)
        torch.set_float32_matmul_precision('high' if o.precision == 'tf32' else 'highest')  # CUDA: TF32 or true float32 products
        torch.manual_seed(o.seed)
        try:
            self.data = d = data.make(o.task, o.p, o.data_seed, o.device)
            self.split = data.split(len(d.x), o.train_frac, o.data_seed)
            self.model = Transformer(o.p, o.d_model, o.n_heads, sum(d.classes)).to(self.device)
        except ValueError as e:
            raise Refusal(str(e))
        self.parts = [(d.x[rows], d.y[rows]) for rows in (r.to(self.device) for r in self.split)]  # train, valid, test
        # loss of an epoch = task_weight . CE: the mean over trained tasks of CE_q / ln q (eq. 12)
        self.ln_q = torch.tensor(d.classes, device=self.device).log()
        self.task_weight = d.in_loss / d.in_loss.sum() / self.ln_q

        named = dict(self.model.named_parameters())
        self.names, self.weights = list(named), list(named.values())
        by_muon = [w for n, w in named.items() if o.optimizer == 'muon' and n not in ('W_E', 'W_pos')]
        by_adam = [w for w in self.weights if not any(w is m for m in by_muon)]
        lr = lambda v: torch.tensor(v, device=self.device)  # on the device, so that a captured graph can change it
        self.optimizers = [torch.optim.AdamW(by_adam, lr(o.lr), betas=(0.9, 0.98), weight_decay=o.weight_decay, fused=True,
                                             capturable=self.device.type == 'cuda')]
        if by_muon:
            self.optimizers.append(Muon(by_muon, lr(o.muon_lr), o.muon_decay))
        self.filter = [torch.zeros_like(w) for w in self.weights] if o.lamb else []

        self.t = torch.zeros(1, dtype=torch.int64, device=self.device)  # epochs done, for the device; self.epoch, for the host
        self.epoch, self.wall_s = 0, 0.0
        Q = len(d.classes)
        self.rows = torch.zeros(o.epochs, 4 * Q + len(self.weights), device=self.device)
        self.compiled = o.compile == 'on' or (o.compile == 'auto' and self.device.type == 'cuda')
        self.measure = torch.compile(self.forward) if self.compiled else self.forward
        if o.spectra_every:
            self.init_spectra()
        if ckpt:
            self.restore(ckpt)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.o.precision == 'bfloat16')

    def forward(self, x, y, drop=(1, 1)):
        """Tokens and targets -> loss (Q,) and accuracy (Q,)."""
        with self.autocast():
            logits = self.model(x, drop)
        return task_losses(logits, y, self.data.classes)

    def masks(self, n):
        """Two dropout masks for the residual stream of n examples, scaled to keep its mean."""
        o = self.o
        shape = (2, 1 if o.dropout_mask == 'batch' else n, o.d_model)
        return (torch.rand(shape, device=self.device) >= o.dropout) / (1 - o.dropout) if o.dropout else (1, 1)

    def step(self):
        """One epoch. Row t of the records is measured at the weights after t updates: training with dropout, validation without."""
        o, (x, y) = self.o, self.parts[0]
        loss, acc = self.measure(x, y, self.masks(len(x)))
        grads = torch.autograd.grad(self.task_weight @ loss, self.weights)

        with torch.no_grad():  # the record
            valid_loss, valid_acc = self.measure(*self.parts[1])
            norms = torch.stack([g.norm() for g in grads])
            self.rows.index_copy_(0, self.t, torch.cat([loss, acc, valid_loss, valid_acc, norms])[None])

        if o.lamb:  # the gradient filter: m <- alpha m + (1-alpha) g ;  g <- g + lamb m   (Lee et al. 2024, alg. 1; here eq. 13)
            for g, m in zip(grads, self.filter):
                m.lerp_(g, 1 - o.alpha)
                g.add_(m, alpha=o.lamb)

        for w, g in zip(self.weights, grads):
            w.grad = g
        for optimizer, lr in zip(self.optimizers, (o.lr, o.muon_lr)):
            if o.decay_from < 1:  # learning rate: constant, then linear to zero
                left = (o.epochs - self.t[0]) / (o.epochs * (1 - o.decay_from))
                optimizer.param_groups[0]['lr'].copy_(lr * left.clamp(max=1))
            with self.autocast():
                optimizer.step()
        self.t += 1

    def init_spectra(self):
        """Buffers for record_spectra, and the matrix that solves for all waves of data.waves in one least-squares fit."""
        o = self.o
        self.freqs, basis = data.waves(o.p, self.data.classes, self.data.stride)
        grid = basis.to(self.device).view(-1, o.p, o.p)
        waves = (grid - grid.mean(1, keepdim=True) - grid.mean(2, keepdim=True) + grid.mean((1, 2), keepdim=True)).flatten(1)
        gram = waves @ waves.T
        gram += torch.diag((gram.diagonal() < 1e-9).double())  # the waves that vanish (q = 2) get coefficient 0
        self.solve = torch.linalg.solve(gram, waves).float()   # 4B p^2
        self.wave_power = waves.square().mean(1).float()       # 4B
        width = o.p // 2 + 1 + 2 * len(self.freqs) + 4
        self.spectra = torch.zeros(-(-o.epochs // o.spectra_every), width, device=self.device)

    @torch.no_grad()
    def record_spectra(self):
        """One row about all F neurons over all p^2 inputs, at the weights after t updates. Means are over neurons.

        spectrum          (p//2+1,) mean of |rfft2| / p^2, averaged over the frequency of x0: the frequency of x1 remains
        sum_power         (B,) variance carried by the sum wave of each (q, k), all waves fitted together
        difference_power  (B,) the same for the difference waves
        variance          (2,) mean total variance, and the part of it in the two marginals
        active            (2,) frequencies above mean + 2 sd: in `spectrum`, and in each neuron's own (mean count)
        """
        p, acts = self.o.p, {}
        with self.autocast():
            self.model(self.data.x, acts=acts)
        a = acts['neurons'].float()                                       # p^2 F
        grid = a.view(p, p, -1)                                           # x1 x0 F
        spec = torch.fft.rfft2(grid, dim=(1, 0), norm='forward').abs().mean(1)  # p//2+1 F
        power = ((self.solve @ a).square().mean(1) * self.wave_power).view(2, 2, -1).sum(1)  # 2 B
        variance = a.var(0, correction=0).mean()
        marginal = grid.mean(0).var(0, correction=0).mean() + grid.mean(1).var(0, correction=0).mean()
        count = lambda s: (s > s.mean(0) + 2 * s.std(0)).sum(0).float().mean()
        mean = spec.mean(1)
        row = torch.cat([mean, power.flatten(), torch.stack([variance, marginal, count(mean), count(spec)])])
        self.spectra.index_copy_(0, self.t // self.o.spectra_every, row[None])

    def captured(self, fn):
        """On CUDA, if compiled: fn as one CUDA graph. The first three calls run plainly, as any other, and warm up what a
        capture must not meet cold (compilation, optimiser state, workspaces); then fn is captured, and replayed from there on."""
        if not (self.compiled and self.device.type == 'cuda'):
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

    # from here on: what the host reads and writes

    def metrics(self):
        """The records so far as numpy arrays, by the names of metrics.npz."""
        o, Q = self.o, len(self.data.classes)
        rows = self.rows[:self.epoch].cpu().numpy()
        out = dict(zip(('train_loss', 'train_acc', 'valid_loss', 'valid_acc', 'grad_norm'), np.split(rows, [Q, 2 * Q, 3 * Q, 4 * Q], 1)))
        out |= dict(epoch=np.arange(self.epoch), grad_norm_names=np.array(self.names), tasks=np.array(self.data.names))
        if o.spectra_every:
            epochs, half, B = np.arange(0, self.epoch, o.spectra_every), o.p // 2 + 1, len(self.freqs)
            spectra = self.spectra[:len(epochs)].cpu().numpy()
            out |= dict(zip(('spectrum', 'sum_power', 'difference_power', 'variance', 'active'),
                            np.split(spectra, [half, half + B, half + 2 * B, half + 2 * B + 2], 1)))
            out |= dict(spectra_epoch=epochs, freqs=self.freqs.numpy())
        return out

    def save(self):
        """metrics.npz, then ckpt.pt: whatever happens in between, there are records up to the checkpoint."""
        folder, buffer = Path(self.o.out), io.BytesIO()
        np.savez(buffer, **self.metrics())
        write(folder / 'metrics.npz', buffer.getvalue())
        rng = dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state(self.device) if self.device.type == 'cuda' else None)
        write_pt(folder / 'ckpt.pt', dict(
            model=self.model.state_dict(), optimizer=[x.state_dict() for x in self.optimizers],
            filter=dict(zip(self.names, self.filter)), step=self.epoch, rng=rng, config=dataclasses.asdict(self.o),
            versions=versions(), wall_s=self.wall_s))

    def restore(self, ckpt):
        """The state of `save` back, in place. Raises Refusal if the checkpoint is not one of this program's."""
        folder = Path(self.o.out)
        try:
            self.model.load_state_dict(ckpt['model'])
            for optimizer, state in zip(self.optimizers, ckpt['optimizer'], strict=True):
                optimizer.load_state_dict(state)
            for m, name in zip(self.filter, self.names):
                m.copy_(ckpt['filter'][name])
            self.epoch, self.wall_s = ckpt['step'], ckpt['wall_s']
            self.t.fill_(self.epoch)
            torch.set_rng_state(ckpt['rng']['cpu'])
            if self.device.type == 'cuda' and ckpt['rng']['cuda'] is not None:
                torch.cuda.set_rng_state(ckpt['rng']['cuda'], self.device)
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as e:
            raise Refusal(f'{folder}/ckpt.pt does not fit this program: {str(e).splitlines()[0]}')
        try:
            with np.load(folder / 'metrics.npz') as old:
                stack = lambda *names: torch.from_numpy(np.concatenate([old[n] for n in names], 1))
                self.rows[:self.epoch] = stack('train_loss', 'train_acc', 'valid_loss', 'valid_acc', 'grad_norm')[:self.epoch]
                if self.o.spectra_every:
                    n = -(-self.epoch // self.o.spectra_every)
                    self.spectra[:n] = stack('spectrum', 'sum_power', 'difference_power', 'variance', 'active')[:n]
        except Exception as e:
            raise Refusal(f'{folder}/metrics.npz is missing or does not fit ckpt.pt ({type(e).__name__})')

    @torch.no_grad()
    def evaluate(self):
        """Loss and accuracy of each task on train, validation and test rows, no dropout: (3, 2, Q). Once, at the end of a run."""
        return torch.stack([torch.stack(self.forward(x, y)) for x, y in self.parts]).cpu()

    def snapshot_due(self):
        """Log-spaced epochs 0, 1, 2, 3, 4, 6, 8, 11, 16, ...: the same whatever `epochs` is."""
        e, s = self.epoch, self.o.snapshots
        return s > 0 and (e == 0 or e == round(2 ** (round(s * math.log2(e)) / s)))


def write(path, content):
    """Bytes to a file, whole or not at all: written beside, synced, renamed. Raises Refusal if the disk does not take it."""
    beside = path.with_name(path.name + '.tmp')
    try:
        with open(beside, 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise Refusal(f'cannot write {path}: {e.strerror}; what was there before is kept')


def write_pt(path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def load(path):
    """A checkpoint, tensors and plain values only: nothing in it is executed. Raises Refusal."""
    if not path.exists():
        raise Refusal(f'nothing to resume: there is no {path}')
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # torch raises a dozen types here
        raise Refusal(f'{path} is truncated, corrupt or not a checkpoint of this program ({type(e).__name__})')
    if not isinstance(ckpt, dict) or not {'model', 'optimizer', 'filter', 'step', 'rng', 'config', 'versions'} <= ckpt.keys():
        raise Refusal(f'{path} is not a checkpoint of this program')
    return ckpt


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


def device_name(device):
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    return f'{torch.cpu.get_capabilities().get("cpu_name", platform.machine())}, {torch.get_num_threads()} threads'


def gflop_per_epoch(o, classes):
    """Counted work of one epoch: products at the last position, backward = 2 forward, validation forward only. Tables of
    V rows, lookups and the optimiser are not counted."""
    per_row = 2 * (o.d_model ** 2 + 2 * o.d_model * 4 * o.d_model + o.d_model * sum(classes))
    train, valid, _ = data.split(o.p ** 2, o.train_frac)
    return per_row * (3 * len(train) + len(valid)) / 1e9


def matmul_rate(device, precision):
    """GFLOP/s of large matrix products on this machine: the best of a few shapes, each the median of nine."""
    torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
    dtype = torch.bfloat16 if precision == 'bfloat16' else torch.float32
    best = 0
    for m, k, n in [(8192, 8192, 8192), (16384, 1024, 4096)] if device.startswith('cuda') else [(4096, 256, 1024), (4096, 1024, 256)]:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        out, times = a @ b, []
        for _ in range(9):
            began = clock(device)
            torch.mm(a, b, out=out)
            times.append(clock(device) - began)
        best = max(best, 2 * m * k * n / sorted(times)[4] / 1e9)
    return best


def clock(device):
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def hms(seconds):
    m, s = divmod(round(seconds), 60)
    return f'{m // 60}:{m % 60:02}:{s:02}' if m >= 60 else f'{m}:{s:02}'


# ---------------------------------------------------------------------------------------------------- train, bench, main

SAVE_EVERY = 30  # seconds, or 20 times as long as a save takes
LINE_EVERY = 30  # seconds between progress lines where they are not rewritten in place


def train(run):
    """The whole loop, from run.epoch to the end. Returns the signal that ended it early, or None."""
    o, folder, signals = run.o, Path(run.o.out), []

    def on_signal(number, _):
        if signals:
            os._exit(128 + number)
        signals.append(number)
        print('\nstopping after this epoch; once more to leave at once', flush=True)

    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    step, record_spectra, snapshots = run.captured(run.step), run.captured(run.record_spectra), {}
    began = line_at = saved = time.perf_counter()
    wall_before, save_cost, chunk, rate = run.wall_s, 0.0, 1, None

    while run.epoch < o.epochs and not signals:
        first, chunk_began = run.epoch, time.perf_counter()
        while run.epoch < min(first + chunk, o.epochs) and not signals:
            if run.snapshot_due():
                snapshots[run.epoch] = {n: w.detach().clone() for n, w in zip(run.names, run.weights)}
            if o.spectra_every and run.epoch % o.spectra_every == 0:
                record_spectra()
            step()
            run.epoch += 1

        # from here on: the host looks, about once a second
        rows = run.rows[first:run.epoch].cpu()  # the one sync
        now = time.perf_counter()
        run.wall_s, took = wall_before + now - began, now - chunk_began
        rate = (run.epoch - first) / took if rate is None else 0.8 * rate + 0.2 * (run.epoch - first) / took
        chunk = max(1, min(2 * chunk, int(chunk / took)))
        check_finite(run, rows, first)
        done = run.epoch == o.epochs or bool(signals)
        if sys.stdout.isatty() or done or now - line_at > LINE_EVERY:
            line_at = now
            progress(run, rows[-1], rate)
        if done or now - saved > max(SAVE_EVERY, 20 * save_cost):
            for epoch, weights in snapshots.items():
                write_pt(folder / 'snapshots' / f'{epoch:08}.pt', dict(model=weights, step=epoch))
            snapshots.clear()
            run.save()
            saved, save_cost = time.perf_counter(), time.perf_counter() - now
    for s, handler in handlers.items():
        signal.signal(s, handler)
    return signals[0] if signals else None


def check_finite(run, rows, first):
    """Raises Refusal with the epoch and the task if a loss, gradient or weight is not finite; nothing is saved after that."""
    Q = len(run.data.classes)
    bad = (~rows.isfinite()).nonzero()
    if len(bad):
        epoch, column = first + int(bad[0, 0]), int(bad[0, 1])
        what = f'loss of {run.data.names[column % Q]}' if column < 4 * Q else f'gradient of {run.names[column - 4 * Q]}'
    elif not all(w.isfinite().all() for w in run.weights):
        epoch, what = run.epoch, 'weights'
    else:
        return
    raise Refusal(f'{what} not finite at epoch {epoch}; stopped, the last good checkpoint in {run.o.out} is kept')


def progress(run, row, rate):
    o, Q = run.o, len(run.data.classes)
    acc = row[3 * Q:4 * Q]
    line = (f'epoch {run.epoch:,}/{o.epochs:,} {run.epoch / o.epochs:4.0%}  {rate:.3g} epochs/s  ETA {hms((o.epochs - run.epoch) / rate)}  '
            f'valid acc mean {acc.mean():.3f} worst {acc.min():.3f}  grokked {(acc >= 0.99).sum()}/{Q}')
    end = '' if sys.stdout.isatty() and run.epoch < o.epochs else '\n'
    print(('\r\033[K' if sys.stdout.isatty() else '') + line, end=end, flush=True)


def finish(run):
    """Final figures of every task: the test set is touched here, once. Writes summary.json and the last snapshot."""
    o, d, metrics = run.o, run.data, run.metrics()
    final = run.evaluate()  # 3 2 Q
    tasks = []
    for i, (name, classes) in enumerate(zip(d.names, d.classes)):
        reached = metrics['valid_acc'][:, i] >= 0.99
        below = np.flatnonzero(~reached)
        start = 0 if not len(below) else int(below[-1]) + 1
        tasks.append(dict(name=name, classes=classes, grok_epoch=int(reached.argmax()) if reached.any() else None,
                          grok_epoch_sustained=start if start < len(reached) else None)
                     | {f'{part}_{what}': float(final[j, k, i]) for j, part in enumerate(('train', 'valid', 'test'))
                        for k, what in enumerate(('loss', 'acc'))})
    summary = dict(tasks=tasks, split=dict(zip(('train', 'valid', 'test'), map(len, run.split))), epochs=run.epoch, wall_s=run.wall_s,
                   epochs_per_s=run.epoch / run.wall_s, device=device_name(o.device), versions=versions(), config=dataclasses.asdict(o))
    if run.snapshot_due():
        write_pt(Path(o.out) / 'snapshots' / f'{run.epoch:08}.pt', dict(model=run.model.state_dict(), step=run.epoch))
    write(Path(o.out) / 'summary.json', json.dumps(summary, indent=1).encode())

    print(f'\n{"task":20s} {"train acc":>9s} {"valid acc":>9s} {"test acc":>9s} {"99 % at epoch":>14s} {"for good":>9s}')
    for t in tasks:
        print(f'{t["name"]:20s} {t["train_acc"]:9.4f} {t["valid_acc"]:9.4f} {t["test_acc"]:9.4f} '
              f'{t["grok_epoch"] if t["grok_epoch"] is not None else "-":>14} {t["grok_epoch_sustained"] if t["grok_epoch_sustained"] is not None else "-":>9}')
    mean = final[:, 1].mean(1)
    print(f'{"mean":20s} {mean[0]:9.4f} {mean[1]:9.4f} {mean[2]:9.4f}   {int((final[1, 1] == 1).sum())} of {len(tasks)} tasks at 1.0 on validation')
    print(f'{run.epoch:,} epochs in {hms(run.wall_s)} on {summary["device"]}; everything is in {o.out}')


def bench(run):
    """Time o.bench epochs after a warm-up, and a matrix product in the same run. The last line printed is JSON."""
    o = run.o
    step = run.captured(run.step)
    for _ in range(5):
        step()
    began = clock(o.device)
    for _ in range(o.bench):
        step()
    seconds = (clock(o.device) - began) / o.bench
    work, limit = gflop_per_epoch(o, run.data.classes), matmul_rate(o.device, o.precision)
    result = dict(ms_per_epoch=seconds * 1e3, epochs_per_s=1 / seconds, gflop_per_epoch=work, gflops=work / seconds,
                  matmul_gflops=limit, share=work / seconds / limit, device=device_name(o.device))
    print(f'{o.bench} epochs, {o.precision}: {seconds * 1e3:.4g} ms each, {1 / seconds:.4g} per second; {work:.4g} GFLOP counted per epoch,')
    print(f'{work / seconds:.4g} GFLOP/s, {work / seconds / limit:.0%} of the {limit:.4g} GFLOP/s of a plain matrix product')
    print(json.dumps(result))


def main(argv):
    given = parse(argv)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc gives big buffers back to the kernel and faults them in again,
        libc = ctypes.CDLL(None)                                   # page by page, in every epoch; keeping them saves a quarter of the time
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)           # M_MMAP_MAX, M_TRIM_THRESHOLD
    o, ckpt = resolve(given)
    folder = Path(o.out)
    if not o.bench and not o.resume and any((folder / f).exists() for f in ('ckpt.pt', 'metrics.npz', 'summary.json')):
        raise Refusal(f'{folder} holds a run; go on with it by --resume, or choose another folder by --out')
    if o.bench:
        o = dataclasses.replace(o, epochs=o.bench + 5)
    run = Run(o, ckpt)

    params, device = sum(w.numel() for w in run.weights), device_name(o.device)
    print(f'{o.task} p={o.p}: {len(run.data.classes)} tasks, {sum(run.data.classes):,} classes, '
          f'{"/".join(str(len(r)) for r in run.split)} train/validation/test rows, {params:,} parameters, {device}')
    if o.bench:
        return bench(run)
    other = 'fast' if o.preset == 'paper' else 'paper'
    why = 'as asked' if given.get('preset', 'auto') != 'auto' else 'resumed' if o.resume else f'the default {"with" if o.preset == "paper" else "without"} CUDA'
    o2, _ = resolve({k: v for k, v in given.items() if k != 'resume'} | dict(preset=other))
    command = ' '.join([f'--{k} {v}' for k, v in given.items() if k not in ('preset', 'resume', 'out')] + [f'--preset {other}'])
    seconds = gflop_per_epoch(o2, run.data.classes) * o2.epochs / matmul_rate(o2.device, o2.precision) * 2
    torch.set_float32_matmul_precision('high' if o.precision == 'tf32' else 'highest')
    print(f'preset {o.preset} ({why}): {o.optimizer}, {o.precision}, {o.epochs:,} epochs; the other: python train.py {command}, roughly {hms(seconds)} here')
    with torch.no_grad():
        loss, _ = run.forward(*run.parts[1])
    print(f'loss / ln q before epoch {run.epoch + 1}: {(loss / run.ln_q).mean():.3f} (uniform guessing 1.0)', flush=True)

    try:
        (folder / 'snapshots').mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Refusal(f'cannot make the folder {folder}: {e.strerror}')
    if not ckpt:
        run.save()  # a full or read-only disk shows itself now
    stopped_by = train(run)
    if stopped_by:
        print(f'saved at epoch {run.epoch:,}; go on with: python train.py --resume --out {o.out}')
        return 128 + stopped_by
    finish(run)


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except Refusal as e:
        print(f'train.py: error: {e}', file=sys.stderr)
        sys.exit(2)
