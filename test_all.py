"""All tests: against brute force, float64, a library, a closed form, planted truth; and users' faults.

    python -m pytest -q test_all.py      # minutes on one CPU core; what needs CUDA skips without it
"""
import contextlib
import csv
import io
import itertools
import json
import math
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ['OMP_NUM_THREADS'] = '1'  # on a busy machine two threads take ten times as long
import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import analyze
import data
import model
import plots
import train
from model import Muon, Transformer, task_losses

torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests are started by nohup ...
signal.signal(signal.SIGINT, signal.default_int_handler)  # ... or with & in a script
HERE = Path(data.__file__).parent
TINY = '--p 11 --d_model 32 --n_heads 2 --precision float32 --device cpu'.split()


# ---------------------------------------------------------------- tools

def run_of(*args):
    """The folder of a small run; the words win over those of TINY."""
    return train.train(train.parse([*TINY, *map(str, args)]))


def resumed(folder, *args):
    """The run in a folder gone on with -> the folder."""
    return train.train(train.parse(['--resume', '--out', str(folder), *map(str, args)]))


def checkpoint(folder):
    return data.load(folder / 'ckpt.pt')


def first_weights(folder):
    return data.load(folder / 'snapshots/00000000.pt', ('model',))['model']


def records(folder):
    with np.load(folder / 'metrics.npz') as saved:
        return dict(saved)


def told(folder, name='summary'):
    """A JSON file of a run folder."""
    return json.loads((folder / f'{name}.json').read_text())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def same_run(a, b):
    """Bit for bit: weights, what the optimisers and the filter remember, records."""
    ours, theirs = checkpoint(a), checkpoint(b)
    assert ours['step'] == theirs['step']
    for key in ('model', 'filter'):
        assert ours[key].keys() == theirs[key].keys()
        assert all(torch.equal(w, theirs[key][name]) for name, w in ours[key].items())
    for one, other in zip(ours['optimizer'], theirs['optimizer'], strict=True):
        for i, memory in one['state'].items():
            assert all(torch.equal(v, other['state'][i][name]) for name, v in memory.items())
    assert (a / 'metrics.npz').read_bytes() == (b / 'metrics.npz').read_bytes()


@pytest.fixture
def fault(monkeypatch, capsys):
    """fault(script, arguments) -> the one line in which it refuses them, as its user sees it."""
    def line(script, *args):
        capsys.readouterr()
        monkeypatch.setattr(sys, 'argv', [f'{script.__name__}.py', *map(str, args)])
        with pytest.raises(SystemExit) as end:
            data.run_script(script.main)
        text = capsys.readouterr().err
        assert end.value.code == 2 and text.count('\n') == 1, text
        assert text.startswith(f'{script.__name__}.py: error: ')
        return text
    return line


@pytest.fixture
def at_epoch(monkeypatch):
    """at_epoch(when, do): do() happens in the middle of an epoch of every run."""
    real = train.snapshot_due

    def arrange(when, do):
        def due(epoch, per_doubling):
            if epoch == when:
                do()
            return real(epoch, per_doubling)
        monkeypatch.setattr(train, 'snapshot_due', due)
    return arrange


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


# ---------------------------------------------------------------- data

@pytest.mark.parametrize('task, p, classes, stride, targets', [
    ('miiii', 13, [2, 3, 5, 7, 11], 13, lambda a, b: [(a + 13 * b) % q for q in (2, 3, 5, 7, 11)]),
    ('masked', 13, [2, 3, 5, 7, 11], 13, lambda a, b: [(a + 13 * b) % q for q in (2, 3, 5, 7, 11)]),
    (' n%6, n % 10', 7, [6, 10], 7, lambda a, b: [(a + 7 * b) % 6, (a + 7 * b) % 10]),
    ('nanda', 11, [11], 1, lambda a, b: [(a + b) % 11]),
    ('add', 12, [23], 0, lambda a, b: [a + b]),
    ('a + b,a*b-2, (a-b)^3', 7, [7] * 3, 1, lambda a, b: [(a + b) % 7, (a * b - 2) % 7, (a - b) ** 3 % 7])])
def test_tokens_and_targets_by_brute_force(task, p, classes, stride, targets):
    d, n_ops = data.make(task, p), 3 if '-' in task else 1
    pairs = [(x0, x1) for x1 in range(p) for x0 in range(p)]
    tokens = [[[*pair, p + o] for o in range(n_ops)] for pair in pairs]
    answers = [targets(*pair) for pair in pairs]
    assert d.x.tolist() == sum(tokens, []) and d.y.tolist() == answers
    assert (d.classes, d.stride, d.n_ops) == (classes, stride, n_ops)
    assert d.in_loss.tolist() == [task != 'masked' or q > 7 for q in classes]
    x, y = d.batch(torch.tensor([3, 20, 37]))
    assert x.tolist() == sum(tokens[3:38:17], []) and y.tolist() == answers[3:38:17]


@pytest.mark.parametrize('n, frac, sizes', [(121, 0.3, [36, 42, 43]), (113 ** 2, 0.3, [3831, 1000, 7938])])
def test_split_is_a_partition_and_seeded(n, frac, sizes):
    rows, again, other = (data.split(n, frac, seed) for seed in (3, 3, 4))
    assert sorted(torch.cat(rows).tolist()) == [*range(n)] and [*map(len, rows)] == sizes
    assert all(map(torch.equal, rows, again)) and not torch.equal(rows[0], other[0])


def test_basis_is_miiii_with_shuffled_rows():
    a, b, again, other = data.make('miiii', 13), *(data.make('basis', 13, seed) for seed in (1, 1, 2))
    assert sorted(a.y.tolist()) == sorted(b.y.tolist()) and (a.y == b.y).all(1).float().mean() < 0.2
    assert torch.equal(b.y, again.y) and not torch.equal(b.y, other.y)


def some_formula(rng, depth):
    """A random formula; read as Python, with ^ for **, it means the same."""
    space, kind = ' ' * rng.integers(2), rng.integers(6) if depth else 0
    if kind == 0:
        return space + rng.choice(['a', 'b', str(rng.integers(200))])
    left, right = (some_formula(rng, depth - 1) for _ in range(2))
    kinds = [f'{left}{space}+{right}', f'{left}-{right}', f'{left}*{space}{right}', f'{space}-{left}',
             f'({left}){rng.choice(["^", "**"])}{rng.integers(12)}']
    return kinds[kind - 1]


def test_formulas_by_brute_force():
    rng, p = np.random.default_rng(0), 13
    n = torch.arange(p * p)
    for formula in {some_formula(rng, rng.integers(1, 6)) for _ in range(400)}:
        plain = eval(f'lambda a, b: {formula.strip().replace("^", "**")}')
        by_hand = [plain(a, b) % p for b in range(p) for a in range(p)]
        assert data.polynomial(formula, n % p, n // p, p).tolist() == by_hand, formula
    x, large = torch.tensor([996]), pow(996, 1000) * pow(123456789, 1000)  # no overflow
    deep = '(' * 99 + 'a' + ')' * 99
    for formula, value in [('a^1000*123456789^1000', large), ('-a^2', -996 ** 2), ('0^0', 1), (deep, 996)]:
        assert data.polynomial(formula, x, x, 997).item() == value % 997


@pytest.mark.parametrize('task, p, named', [
    ('miiii', 12, '12'), ('miiii', 3, '3'), ('nanda', 1, '1'), ('basis', 121, '121'), ('add', 4, '4'),
    ('masked', 11, 'masked'), ('a+' * 100 + 'a', 5, '200'), *((text, 5, repr(text)) for text in (
        '2a', 'a b', 'ab', 'a^b', 'a^-1', 'a^2^3', 'a^1001', '(a+b', 'a+b)', '()', 'a+', 'b*+a', 'b*a(b)',
        'a***b', '0b1', '', 'other', 'a+c', 'a/b', 'a^1.5', 'a.real', '"a"', 'lambda: a', 'a if b', 'a²',
        '__import__("os")', '٣*a', '0x1f', 'a\n#b', 'a[0]', 'a==b', 'True', 'a%b', 'n%4,n%4',
        'n%1', 'n%0', 'n%26', 'n%6,abc', 'a+b,n%6', 'n%6,'))])
def test_everything_else_is_no_data(task, p, named):
    with pytest.raises(data.Refusal) as refusal:
        data.make(task, p)
    assert named in str(refusal.value)


# ---------------------------------------------------------------- model and loss

class TwoBlocks(Transformer):
    blocks = ('1', '')


def plain_forward(W, x, drop=(1, 1), blocks=('',)):
    """The model as the paper writes it, head by head, at all positions. W: dict of weights."""
    z = W['W_E'][x] + W['W_pos']                                             # N T D
    for block in blocks:
        out = torch.zeros_like(z)
        for W_Q, W_K, W_V, W_O in zip(*(W[name + block] for name in ('W_Q', 'W_K', 'W_V', 'W_O'))):
            scores = (z @ W_Q) @ (z @ W_K).transpose(1, 2)                   # N T T, from, to
            out = out + torch.softmax(scores / math.sqrt(W_Q.shape[1]), dim=-1) @ z @ W_V @ W_O
        z = (z + out) * drop[0]
        z = (z + torch.relu(z @ W['W_in' + block]) @ W['W_out' + block]) * drop[1]
    return z[:, -1] @ W['W_U']


@pytest.mark.parametrize('kind', [Transformer, TwoBlocks])
@pytest.mark.parametrize('n_ops', [1, 3])
@pytest.mark.parametrize('rows', [0, 1, 50])  # no dropout, one mask for the batch, one per example
def test_model_is_the_general_forward_pass(kind, n_ops, rows):
    """Also with a block before it, where all positions count. Gradients, too; and what components write."""
    torch.manual_seed(0)
    net = kind(11, 24, 3, 17, n_ops).double()
    x = torch.stack([torch.randint(11, (50,)), torch.randint(11, (50,)), 11 + torch.randint(n_ops, (50,))], 1)
    drop = [torch.rand(2, rows, 1, 24, dtype=torch.float64)] if rows else []
    weights = dict(net.named_parameters())
    logits = net(x, *drop), plain_forward(weights, x, *drop, blocks=kind.blocks)
    ours, oracle = (torch.autograd.grad(z.square().sum(), weights.values()) for z in logits)
    for a, b in (logits, *zip(ours, oracle)):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-10 * b.abs().max()
    if not rows:
        written, acts = analyze.components(net, x), {}
        assert torch.allclose(written.sum(0) @ net.W_U, logits[1])
        net.W_O.data[1] = 0
        net(x, acts=acts)
        assert torch.allclose(acts['resid_mid'], written[[0, 1, 3]].sum(0))


@pytest.mark.parametrize('task, n_tasks', [('miiii', 29), ('a*b,a+b', 1)])
def test_initial_weights(task, n_tasks):
    """Their scale by the text of the paper, .3 of it, and by its code: the first loss is that of guessing."""
    d = data.make(task, 113)

    def start(init):
        torch.manual_seed(0)
        return model.network(dict(p=113, d_model=256, n_heads=4, init=init), d).requires_grad_(False)
    he, small, reference = map(start, ('he', 'small', 'reference'))
    fan_in = dict(W_E=113 + d.n_ops, W_pos=3, W_out=1024)  # of the others it is 256
    stacked = dict(W_Q=4, W_K=4, W_V=4, W_U=n_tasks)
    for name, w in he.named_parameters():
        assert abs(w.std() / math.sqrt(2 / fan_in.get(name, 256)) - 1) < 4 / math.sqrt(2 * w.numel()), name
        assert torch.allclose(small.get_parameter(name), 0.3 * w), name
        assert torch.allclose(reference.get_parameter(name), w / math.sqrt(stacked.get(name, 1))), name
    if task == 'miiii':
        assert sum(w.numel() for w in he.parameters()) == 1_195_264  # with 29 tasks, 1,480 logits
        x, y = d.batch(torch.arange(1000))
        loss, _ = task_losses(reference(x), y, d.classes)
        assert 0.99 < (loss / torch.tensor(d.classes).log()).mean() < 1.05


needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a compiler on a CPU')
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')


@pytest.mark.parametrize('q', [2, 109])
def test_loss_and_gradient_against_float64(q):
    """The right logit ahead by up to 71 or behind by up to 1000: losses from 1e-30, where the usual form has
    0, to 1e+3. Row by row, so that large losses do not hide small ones."""
    margins = torch.cat([torch.linspace(-1000, 0, 41), torch.linspace(0, 71, 141)[1:]])
    z, t = normal(len(margins), q), torch.arange(len(margins))[:, None] % q
    z.scatter_(1, t, -torch.inf)
    z.scatter_(1, t, z.logsumexp(1, keepdim=True) + margins[:, None])
    z64 = z.double().requires_grad_()
    behind = z64.scatter(1, t, -torch.inf).logsumexp(1) - z64.gather(1, t)[:, 0]
    loss64 = torch.logaddexp(torch.zeros_like(behind), behind)  # log(1 + e^behind), exact down to 1e-300
    grad64, = torch.autograd.grad(loss64.sum(), z64)
    for i in range(len(margins)):
        row = z[i:i + 1].clone().requires_grad_()
        loss, _ = task_losses(row, t[i:i + 1], [q])
        grad, = torch.autograd.grad(loss.sum(), row)
        assert abs(loss.item() / loss64[i].item() - 1) < 1e-4
        off = (grad[0] - grad64[i]).abs()
        assert off.max() < 1e-4 * grad64[i].abs().max() and off[t[i]] < 1e-4 * grad64[i, t[i]].abs()


@pytest.mark.parametrize('dtype, close', [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_losses_of_several_tasks_against_torch(dtype, close):
    d = data.make('miiii', 13)
    logits = (normal(169, 28) * torch.linspace(0, 20, 169)[:, None]).to(dtype).requires_grad_()
    loss, acc = task_losses(logits, d.y, d.classes)
    blocks = logits.double().split(d.classes, 1)
    oracle = torch.stack([functional.cross_entropy(z, y) for z, y in zip(blocks, d.y.T)])
    assert torch.allclose(loss.double(), oracle, rtol=1e-4) and loss.dtype == acc.dtype == torch.float32
    weight = torch.arange(1, 6)
    grad, expected = (torch.autograd.grad((weight * x).sum(), logits)[0] for x in (loss, oracle))
    assert torch.allclose(grad, expected, rtol=close, atol=1e-9)


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_cuda)])
def test_all_rows_right_are_exactly_1_and_a_tie_is_wrong(device):
    """A mean by way of the float32 1/N is .99999994 at some N: a task would never count as solved."""
    for n in range(1, 2000, 7) if device == 'cpu' else (41, 1000):  # 41 is the first that shows it
        y = torch.arange(n, device=device)[:, None] % torch.tensor([2, 3], device=device)
        right = torch.cat([functional.one_hot(y[:, 0], 2), functional.one_hot(y[:, 1], 3)], 1).float()
        assert task_losses(right, y, [2, 3])[1].tolist() == [1, 1]
    assert task_losses(0 * right, y, [2, 3])[1].tolist() == [0, 0]
    certain = torch.tensor([[3.0, -torch.inf], [-torch.inf, 0.0]])  # nothing else is possible
    assert torch.cat(task_losses(certain, torch.tensor([[0], [1]]), [2])).tolist() == [0, 1]


# ---------------------------------------------------------------- the step

def start_in_float64(folder):
    """What a run started from: a dict of float64 weights that autograd follows."""
    return {name: w.double().requires_grad_() for name, w in first_weights(folder).items()}


def plain_scores(W, batch, classes, drop=(1, 1)):
    """Loss and accuracy of each task by torch's own cross-entropy. batch: tokens and targets."""
    x, y = batch
    logits, n_ops = plain_forward(W, x, drop), len(x) // len(y)
    blocks = logits.split(classes, 1) if n_ops == 1 else [logits[o::n_ops] for o in range(n_ops)]
    pairs = list(zip(blocks, y.T))
    acc = [(z.argmax(1) == target).double().mean() for z, target in pairs]
    return torch.stack([functional.cross_entropy(*pair) for pair in pairs]), torch.stack(acc)


@pytest.mark.parametrize('task, p, focus, alpha, decay, decay_from, curriculum', [
    ('miiii', 11, 1, 0.9, 0.5, 1.0, 0),
    ('miiii', 11, 1, 0.9, 0.5, 1.0, 38),  # the four tasks enter at epochs 0, 10, 19 and 29
    ('masked', 17, 0, 0.98, 1.0, 0.4, 0),  # trains two of six tasks
    ('a*b,a+b', 11, 0, 0.98, 1.0, 0.4, 0)])  # is the mean over both
def test_a_run_against_a_plain_float64_twin(tmp_path, task, p, focus, alpha, decay, decay_from, curriculum):
    """Every record, the last weights and the filter's memory, by torch's own AdamW from the same start."""
    words = f'--task {task} --p {p} --optimizer adamw --lr 1e-3 --lamb 0.5 --dropout 0 --dropout_mlp 0'
    words += f' --init he --epochs 40 --train_frac 0.5 --focus {focus} --alpha {alpha}'
    words += f' --weight_decay {decay} --decay_from {decay_from} --curriculum {curriculum}'
    folder = run_of(*words.split(), '--out', tmp_path)
    d, (train_rows, valid_rows, _) = data.make(task, p), data.split(p * p, 0.5)
    W, ln_q, twin = start_in_float64(folder), torch.tensor(d.classes).log(), []
    memory = {name: torch.zeros_like(w) for name, w in W.items()}
    adamw = torch.optim.AdamW(W.values(), betas=(0.9, 0.98), weight_decay=decay, foreach=False, fused=False)
    for epoch in range(40):
        loss, acc = plain_scores(W, d.batch(train_rows), d.classes)
        adamw.zero_grad()
        entered = 1 + sum(epoch >= first for first in (10, 19, 29)) if curriculum else len(loss)
        by_hardness = (loss * loss.detach())[:entered].mean() / loss.detach().mean()
        (by_hardness if focus else (loss / ln_q)[d.in_loss].mean()).backward()
        norms = torch.stack([w.grad.norm() for w in W.values()])
        twin.append([loss, acc, *plain_scores(W, d.batch(valid_rows), d.classes), norms])
        for name, w in W.items():
            memory[name] = alpha * memory[name] + (1 - alpha) * w.grad
            w.grad += 0.5 * memory[name]
        left = (40 - epoch) / (40 - decay_from * 40) if epoch > decay_from * 40 else 1
        adamw.param_groups[0]['lr'] = 1e-3 * left
        adamw.step()
    ours, ckpt = records(folder), checkpoint(folder)
    for name, rows in zip(('train_loss', 'train_acc', 'valid_loss', 'valid_acc', 'grad_norm'), zip(*twin)):
        rows = torch.stack(rows).detach().numpy()
        if name.endswith('acc'):  # near a tie rounding may decide
            assert np.abs(ours[name] - rows).mean() < 1e-3, name
        else:
            assert np.allclose(ours[name], rows, rtol=1e-3 if name == 'grad_norm' else 1e-4), name
    for name, w in W.items():
        assert torch.allclose(ckpt['model'][name].double(), w, atol=1e-5), name
        assert torch.allclose(ckpt['filter'][name].double(), memory[name], atol=1e-5), name


def test_muon_against_torch():
    """The same weights after 20 steps, up to bfloat16 rounding; a stack is so many matrices by themselves."""
    torch.manual_seed(0)
    wide, stack = torch.randn(24, 40), torch.randn(2, 40, 24)
    ours = [torch.nn.Parameter(w.clone()) for w in (wide, stack)]
    theirs = [torch.nn.Parameter(w.clone()) for w in (wide, *stack)]
    a = Muon(ours, torch.tensor(0.02), 0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn='original')
    for _ in range(20):
        for w in theirs:
            w.grad = torch.randn_like(w) * torch.rand(())
        ours[0].grad, ours[1].grad = theirs[0].grad.clone(), torch.stack([w.grad for w in theirs[1:]])
        a.step()
        b.step()
    for x, y, first in zip((ours[0], *ours[1]), theirs, (wide, *stack)):
        assert (x - y).norm() < 0.03 * (y - first).norm()


@pytest.mark.parametrize('kind, rows, by_mlp', [('batch', 1, 0.5), ('example', 60, 0.25), ('example', 60, 0)])
def test_dropout_masks(tmp_path, monkeypatch, kind, rows, by_mlp):
    """Two new masks at every epoch, of the share asked for. At a rate of 0 the weights stand still and only
    masks move the loss: the recorded losses are those under the masks, and validation has none."""
    seen, forward = [], Transformer.forward

    def watched(self, x, drop=(1, 1), acts=None):
        if isinstance(drop[0], torch.Tensor):
            seen.append(torch.stack(list(drop)))
        return forward(self, x, drop, acts)
    monkeypatch.setattr(Transformer, 'forward', watched)
    words = '--optimizer adamw --lr 0 --d_model 512 --train_frac 0.5 --init he --epochs 5'
    words += f' --dropout 0.25 --dropout_mlp {by_mlp} --dropout_mask {kind} --out {tmp_path}'
    folder = run_of(*words.split())
    masks = torch.stack(seen)
    assert masks.shape == (5, 2, rows, 1, 512)
    assert len(masks.sign().view(-1, 512).unique(dim=0)) == (10 * rows if by_mlp else 5 * rows + 1)
    for rate, some in zip((0.25, by_mlp), masks.unbind(1)):
        assert torch.allclose(some.unique(), torch.tensor([0, 1 / (1 - rate)] if rate else [1.0]))
    for rate, some in ((0.25, masks[:, 0]), (by_mlp, masks[:, 1]), (by_mlp / 4, masks.amax(1))):
        assert abs((some == 0).float().mean() - rate) <= 4 * math.sqrt(rate * (1 - rate) / some.numel())
    d, W, ours = data.make('miiii', 11), start_in_float64(folder), records(folder)
    training, validation, _ = (d.batch(some) for some in data.split(121, 0.5))
    for drop, loss, valid_loss in zip(masks.double(), ours['train_loss'], ours['valid_loss']):
        assert np.allclose(loss, plain_scores(W, training, d.classes, drop)[0].detach(), rtol=1e-4)
        assert np.allclose(valid_loss, plain_scores(W, validation, d.classes)[0].detach(), rtol=1e-4)


def test_the_rates_of_both_optimisers(tmp_path):
    seen, shape = [], np.minimum(1, (10 - np.arange(10)) / 6)

    def look(optimizer, *_):
        group, of = optimizer.param_groups[0], isinstance(optimizer, Muon)
        seen.append([of, group['lr'].item(), group['weight_decay'], len(group['params'])])
    with register_optimizer_step_pre_hook(look):
        words = '--epochs 10 --decay_from 0.4 --lr 0.1 --muon_lr 0.01 --weight_decay 0.7 --muon_decay 0.3'
        run_of(*words.split(), '--out', tmp_path)
    assert np.allclose(seen[::2], [[False, 0.1 * x, 0.7, 2] for x in shape])
    assert np.allclose(seen[1::2], [[True, 0.01 * x, 0.3, 7] for x in shape])


def test_seeds(tmp_path):
    def run(seed, data_seed):
        out = tmp_path / f'{seed} {data_seed}'
        return run_of('--epochs', 1, '--seed', seed, '--data_seed', data_seed, '--out', out)
    a, b, c = run(0, 0), run(1, 0), run(0, 1)
    w_a, w_b, w_c = (first_weights(folder)['W_U'] for folder in (a, b, c))
    assert torch.equal(w_a, w_c) and not torch.equal(w_a, w_b)
    for folder, data_seed in ((a, 0), (b, 0), (c, 1)):
        batch = data.make('miiii', 11).batch(data.split(121, 0.5, data_seed)[1])
        expected = plain_scores(first_weights(folder), batch, [2, 3, 5, 7])[0]
        assert np.allclose(records(folder)['valid_loss'][0], expected, rtol=1e-4)


def test_precision(tmp_path):
    """bfloat16 is near float32 and not the same, in loss and gradients, also after some steps; attention is
    float32 always."""
    recorded, attention, net = [], [], Transformer(11, 32, 2, 17)
    for precision in ('float32', 'tf32', 'bfloat16'):
        words = f'--epochs 30 --precision {precision} --out {tmp_path}/{precision}'
        recorded.append(records(run_of(*words.split())))
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
            net(data.make('miiii', 11).x, acts=(acts := {}))
        attention.append(acts['att'])
    for name in ('train_loss', 'valid_loss', 'grad_norm'):
        exact, same, rounded = (row[name] for row in recorded)
        assert np.array_equal(exact, same)  # on a CPU
        assert np.allclose(exact[0], rounded[0], rtol=0.05) and not (exact[0] == rounded[0]).any()
    exact, _, rounded = (row['train_loss'][-1].mean() for row in recorded)
    assert rounded == pytest.approx(exact, rel=0.05)
    assert torch.equal(attention[0], attention[2])


def test_float32_products_on_a_cpu_are_float32(monkeypatch):
    """Whichever library multiplies; where it would round, torch's default is kept."""
    a, plain = normal(300, 300), torch.Tensor.__matmul__
    with model.plain_torch():
        assert ((a @ a).double() - a.double() @ a.double()).abs().max() < 1e-3

    def rounding(a, b):
        return plain(a, b) if a.dtype == torch.float64 else plain(a.bfloat16(), b.bfloat16()).float()
    monkeypatch.setattr(torch.Tensor, '__matmul__', rounding)
    assert model.fast_products.__wrapped__() == 'highest'


@pytest.mark.parametrize('device, task, optimizer, first, close', [
    pytest.param('cpu', 'miiii', 'adamw', 50, 1e-3, marks=needs_compiler),
    *(pytest.param('cuda', task, optimizer, 10, 0.01, marks=needs_cuda)  # later rounding has grown
      for task, optimizer in (('miiii', 'adamw'), ('a*b,a+b', 'adamw'), ('add', 'muon')))])
def test_a_compiled_step_is_the_eager_one(tmp_path, device, task, optimizer, first, close):
    """Also resumed, on CUDA captured: the same losses, up to growing rounding; new masks at every epoch."""
    words = f'--task {task} --lamb 0.5 --lr 3e-4 --muon_lr 0.01 --decay_from 1'.split()
    words += ['--optimizer', optimizer]
    on, off = (['--device', device, '--compile', how] for how in ('on', 'off'))
    eager = run_of(*words, *off, '--epochs', 50, '--out', tmp_path / 'eager')
    compiled = resumed(run_of(*words, *on, '--epochs', 25, '--out', tmp_path / 'on'), '--epochs', 50, *on)
    assert np.allclose(*(records(run)['train_loss'][:first] for run in (eager, compiled)), close, close / 50)
    still = run_of(*words, *on, *f'--epochs 50 --lr 0 --muon_lr 0 --lamb 0 --out {tmp_path}/still'.split())
    assert len(np.unique(records(still)['train_loss'].mean(1))) > 45  # only the masks can move the loss


def test_a_run_is_compiled_in_its_first_epoch(tmp_path, monkeypatch):
    """Not again when a rate changes; a second run in the same process is compiled anew."""
    compile, due, graphs, seen = torch.compile, train.snapshot_due, [], []

    def watched(module, dynamic):
        return compile(module, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph)
    monkeypatch.setattr(torch, 'compile', watched)
    monkeypatch.setattr(train, 'snapshot_due', lambda *of: seen.append(len(graphs)) or due(*of))
    monkeypatch.setattr(torch._dynamo.config, 'recompile_limit', 3)
    for i in (0, 1):
        run_of('--epochs', 6, '--compile', 'on', '--out', tmp_path / str(i))
    assert 0 < seen[1] == seen[5] == len(graphs) / 2 and seen[7] == len(graphs)


# ---------------------------------------------------------------- a pretended GPU

WAITS = 'item _local_scalar_dense is_nonzero nonzero masked_select equal _unique2'.split()  # of an operation
SHORT = [*TINY, *'--epochs 9 --spectra_every 4 --lamb 0.5'.split()]


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class OnGpu(torch.Tensor):
    """A tensor that says cuda:0. Its values are in `own`, on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = None
    device = property(lambda self: torch.device('cuda:0'))

    def __new__(cls, own):
        where = own.shape, own.stride(), own.storage_offset()
        self = torch.Tensor._make_wrapper_subclass(cls, *where, dtype=own.dtype)
        self.own = own
        return self

    def cpu(self):
        return torch.ops.aten._to_copy(self, device='cpu')


for name in ('tolist', '__format__', '__reduce_ex__'):  # by way of the CPU, as for any tensor on a GPU
    setattr(OnGpu, name, lambda self, *args, name=name: getattr(self.cpu(), name)(*args))


class Gpu(TorchDispatchMode):
    """Computes everything on the CPU, but an operation that mixes both kinds of tensors raises. In a capture
    so does one that waits for the GPU; the others go onto a tape, and at the end are undone. A replay plays
    the tape."""
    tape = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, given = func.overloadpacket.__name__, tensors((args, kwargs))
        here = [t for t in given if t.dim() and not isinstance(t, OnGpu)]
        there = any(isinstance(t, OnGpu) for t in given)
        onto = str(kwargs.get('device')).startswith('cuda')
        off = name == '_to_copy' and kwargs.get('device') and not onto
        may_mix = name in ('copy_', '_to_copy') or 'index' in name
        assert not (here and there) or may_mix, f'{func} mixes devices'
        by_mask = name.startswith('index') and any(t.dtype == torch.bool for t in given[1:])
        from_host = name in ('copy_', '_to_copy') and not all(isinstance(t, OnGpu) for t in given)
        waits = here or off or from_host or by_mask or name in WAITS
        assert self.tape is None or not waits, f'{func} waits for the GPU'
        kwargs |= dict(device='cpu') if onto else {}
        args, kwargs = tree_map(lambda x: x.own if isinstance(x, OnGpu) else x, (args, kwargs))
        if self.tape is not None and func._schema.is_mutable:
            self.before += [(t, t.clone()) for t in tensors((args, kwargs))]
        out = func(*args, **kwargs)
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if self.tape is not None and not is_view:
            self.tape.append((func, args, kwargs, out))
        if off or not (onto or there):
            return out
        made = tree_map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, made) if there else made

    @contextlib.contextmanager
    def capture(self, graph, stream):
        random, self.tape, self.before = torch.get_rng_state(), [], []
        try:
            yield
        finally:
            tape, self.tape = self.tape, None
            for t, was in reversed(self.before):
                t.copy_(was)
            torch.set_rng_state(random)

        def replay():
            for func, args, kwargs, out in tape:
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs))):
                    old.copy_(new)
        graph.replay = replay
        names = [func.overloadpacket.__name__ for func, *_ in tape]
        self.kernels = Counter(name for name in names if not re.search('_unsafe_view|empty|record_f', name))


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, and `with gpu` its tensors."""
    gpu = Gpu()
    stream = SimpleNamespace(wait_stream=id, is_capturing=lambda: gpu.tape is not None, device_index=0)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', stream.is_capturing)  # of older versions
    gpu.generator = SimpleNamespace(state='old', clone_state=lambda: 'new')
    gpu.generator.graphsafe_set_state = lambda state: vars(gpu.generator).update(state=state)
    answers = dict(_lazy_init=None, device_count=1, is_available=True, set_device=None, Stream=stream,
                   current_stream=stream, stream=contextlib.nullcontext(), get_device_name='pretended',
                   get_rng_state=None, set_rng_state=None)
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    for place, name, value in ((torch.cuda, 'CUDAGraph', lambda: SimpleNamespace(reset=int)),
                               (torch.cuda, 'graph', gpu.capture),
                               (torch.cuda, 'default_generators', [gpu.generator]),
                               (torch.accelerator, 'current_accelerator', lambda **_: torch.device('cuda')),
                               (torch.accelerator, 'current_stream', lambda *_: stream),
                               (model, 'fast_products', lambda: 'highest'),  # one library in both places
                               (torch, 'compile', lambda module, dynamic: lambda *args: module(*args))):
        monkeypatch.setattr(place, name, value)
    switches = torch._C._set_only_lift_cpu_tensors, torch.__future__.set_overwrite_module_params_on_conversion
    with torch.autograd.set_multithreading_enabled(False):
        for how in (True, False):
            for switch in switches:
                switch(how)
            train.usable.cache_clear()
            model.layout.cache_clear()
            if how:
                yield gpu


def run_on(place, out, *words, by=train):
    """The folder of a short run on the CPU (None), or on a pretended GPU."""
    with place or contextlib.nullcontext():
        by.main([*SHORT, *words, f'--device={"cuda" if place else "cpu"}', f'--out={out}'])
    return out


@pytest.mark.parametrize('words', ['', '--preset paper', '--task add', '--task nanda --compile on',
                                   '--curriculum 6', '--task a*b,a+b', '--task a*b,a+b --compile off'])
def test_a_pretended_gpu_computes_what_a_cpu_does(tmp_path, gpu, words):
    same_run(*(run_on(place, tmp_path / str(place), *words.split()) for place in (None, gpu)))


def test_a_sweep_and_a_resumed_run_on_a_pretended_gpu(tmp_path, gpu):
    words = '--sweep=2', '--sweep_space=dropout=0,0.1'
    runs = [run_on(place, tmp_path / str(place), *words) / 'dropout=0.1' for place in (None, gpu)]
    resumed(runs[0], '--epochs', 15)
    with gpu:
        resumed(runs[1], '--epochs', 15)
    same_run(*runs)


@pytest.mark.parametrize('task', ['miiii', 'a*b,a+b'])
def test_an_epoch_has_few_launches(tmp_path, gpu, task):
    """Nearly every operation that is no view is one kernel. A loop over tasks would show here."""
    run_on(gpu, tmp_path, '--task', task)
    assert 100 < gpu.kernels.total() < 260, gpu.kernels


@pytest.fixture(scope='module')
def on_cpu(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, 'fast_products', lambda: 'highest')
        return records(run_on(None, tmp_path_factory.mktemp('short')))


@pytest.mark.parametrize('file, right, wrong, finding', [
    ('train', 'd.classes, device=o.device).log()', 'd.classes).log()', 'mixes'),
    ('train', 'rand(n_masks, 1, o.d_model, device=o.device)', 'rand(n_masks, 1, o.d_model)', 'mixes'),
    ('model', 'torch.arange(3, device=x.device)', 'torch.arange(3)', 'mixes'),
    ('train', 'ln_q * loss.d', 'torch.tensor(d.classes, device=o.device).log() * loss.d', 'waits'),
    ('train', '.clamp(min=1e-30)', '.item()', 'waits'),
    ('train', 'if o.lamb:  #', 'if loss.sum() > 0:  #', 'waits'),
    ('train', '(weight @ loss)', '(weight @ loss)[loss.sum() > 0]', 'waits'),
    ('train', 'loss.detach().mean()', 'loss.detach().mean() * torch.tensor(1.0, device=o.device)', 'waits'),
    ('train', '.fill_(lr * min', ' = torch.tensor(device=o.device, data=lr * min', 'differs'),
    ('train', 'torch._foreach_lerp_(memory, g', 'memory[:] = torch._foreach_lerp(memory, g', 'differs'),
    ('model', 'replay()', 'replay(); out = {name: v.clone() for name, v in out.items()}', 'differs'),
    ('train', 'capturable=cuda', 'capturable=False', 'note: no CUDA graph')])
def test_a_fault_is_found_on_a_pretended_gpu(
        tmp_path, gpu, on_cpu, monkeypatch, capsys, file, right, wrong, finding):
    """Mixed devices, waits in a step, what a capture freezes, an optimiser not made for it."""
    module, broken = dict(train=train, model=model)[file], ModuleType(file)
    source = Path(module.__file__).read_text()
    assert source.count(right) == 1
    broken.__file__ = module.__file__
    exec(source.replace(right, wrong), vars(broken))
    if file == 'model':
        for name in ('Muon', 'captured', 'network'):
            monkeypatch.setattr(train, name, getattr(broken, name))
    try:
        there = records(run_on(gpu, tmp_path, by=broken if file == 'train' else train))
        differs = any((there[name] != on_cpu[name]).any() for name in on_cpu)
        found = capsys.readouterr().out + 'differs' * differs
    except Exception as e:
        found = str(e)
    assert finding in found


def test_what_a_gpu_cannot_do_is_done_without(tmp_path, gpu, on_cpu, monkeypatch, capsys):
    """A capture that fails, a torch.compile that fails: a note, and the same run."""
    @contextlib.contextmanager
    def capture(graph, stream):
        with gpu.capture(graph, stream):
            yield
        try:
            raise RuntimeError('captured nothing\nbut lines')
        finally:
            raise RuntimeError('a previous error')
    monkeypatch.setattr(torch.cuda, 'graph', capture)
    there = records(run_on(gpu, tmp_path))
    assert all((there[name] == on_cpu[name]).all() for name in on_cpu)
    assert capsys.readouterr().out.count('captured nothing)\n') == 1 and gpu.generator.state == 'new'

    def compile(module, dynamic):
        raise RuntimeError('compiled nothing')
    monkeypatch.setattr(torch, 'compile', compile)
    monkeypatch.setattr(train, 'bench', lambda *_: None)
    for words, notes in (('--epochs=49999', 0), ('--epochs=50000', 1)):
        run_on(gpu, tmp_path, words, '--bench=1')
        assert capsys.readouterr().out.count('compiled nothing') == notes
    with pytest.raises(data.Refusal, match='compiled nothing'):
        run_on(gpu, tmp_path, '--compile=on', '--bench=1')


def test_a_gpu_that_cannot_be_used_is_left_alone(gpu, monkeypatch, capsys):
    dead, ones = {'cuda:0'}, torch.ones

    def first(size, device):
        if device in dead:
            raise RuntimeError('driver too old')
        return ones(size)
    monkeypatch.setattr(torch, 'ones', first)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [train.usable(name) for name in ('auto', 'cuda', 'cuda:1')] == ['cuda:1'] * 3
    dead.add('cuda:1')
    train.usable.cache_clear()
    assert train.usable('auto') == 'cpu'
    assert 'cuda:1' in capsys.readouterr().out
    for name in ('cuda', 'cuda:0', 'cuda:7'):
        with pytest.raises(data.Refusal, match=name):
            train.usable(name)


# ---------------------------------------------------------------- waves, neurons, Fourier over rows

def wave(p, q, a, b, phase=0.0):
    """cos(2 pi (a x0 + b x1) / q + phase) over all inputs, from Python integers: (p^2,)."""
    turns = [(a * x0 + b * x1) % q for x1 in range(p) for x0 in range(p)]
    return torch.tensor([math.cos(2 * math.pi * turn / q + phase) for turn in turns])


def layer(activations, p, classes):
    """What the analysis says of the activations of a layer, (p^2, F)."""
    solver = analyze.wave_solver(p, classes, p if len(classes) > 1 else 1)
    acts, d = dict(neurons=activations), SimpleNamespace(classes=classes)
    return analyze.neurons(SimpleNamespace(p=p, d=d, acts=acts, solver=solver))


def test_planted_waves_are_found_by_kind():
    """Sum waves and difference waves, each as such with nearly all of its variance; of 726 (q, k) sixty. For
    q = 2 both are one. White noise has what the closed form says, 1 / (p-1)^2 in each cosine and sine."""
    p, classes = 113, data.primes_below(113)
    freqs, solver = analyze.wave_freqs(classes), analyze.wave_solver(p, classes, p)
    for row, sign in enumerate((1, -1)):
        picks = torch.linspace(row, 725, 60).long().tolist()
        planted = [(q, k, sign * k * p, 0.4) for q, k in freqs[picks].tolist()]
        found = analyze.decompose(torch.stack([wave(p, *one) for one in planted], 1), p, solver)
        assert (found['waves'] / found['variance'])[row, picks].diagonal().min() > 0.99
        single = analyze.single_waves(found['products'], p, solver)
        assert single.argmax(0).tolist() == picks and (single <= 1.001 * found['interaction']).all()
    found = analyze.decompose(normal(p * p, 200), p, solver)
    share = found['waves'][:, 1:].mean(2) / found['interaction'].mean() * (p - 1) ** 2
    assert len(freqs) == 726 and abs(share.mean() - 2) < 0.02 and 1 < share.min() and share.max() < 3


def test_neurons_of_known_kinds():
    """Interaction below 1e-6 of the variance is rounding, no wave has a share of it; above, one has. Whether
    a neuron varies is judged by its own scale. Pictures of neurons have x0 before x1."""
    p, sums, differences = 31, wave(31, 31, 5, 5), wave(31, 31, 7, -7)
    alone = 10 + 5 * wave(p, p, 9, 0) + 2 * wave(p, p, 0, 3)
    kinds = [  # its values; share of the best wave, of one digit alone, of the sum, of the difference
        (1 + wave(p, p, 3, 0), 0, 1, 0, 0),
        (1 + wave(p, p, 0, 4), 0, 1, 0, 0),
        (1e-3 + 1e-3 * sums, 1, 0, 1, 0),
        (1e-6 + 1e-6 * differences, 1, 0, 0, 1),
        (alone + 1e-3 * sums, 0, 1, 0, 0),
        (alone + 0.02 * sums, 1, 1, 0, 0),
        (1000.1 + 0 * sums, 0, 0, 0, 0)]
    values, *expected = zip(*kinds)
    out = layer(torch.stack(values, 1), p, [p])
    found = [out['neuron_wave_share'], *out['neuron_split'][:3]]
    assert torch.allclose(torch.stack(found), torch.tensor(expected).float(), atol=1e-3)
    assert (out['neurons that vary'], out['pure neurons'], out['waves of the pure neurons']) == (6, 3, 2)
    assert out['share of best wave, median neuron'] == pytest.approx(np.median(expected[0]), abs=1e-3)
    assert torch.equal(out['neurons'][0], values[0].view(p, p).T)
    assert out['neurons_dft'][1, 0].argmax() == 4 and out['neurons_dft'][0, :p // 2, 0].argmax() == 3


def test_the_papers_numbers_of_waves_and_their_leakage():
    """726 pairs (q, k), 1,451 nearly orthonormal waves; one of period q < p lights about 70 bins of the 2-D
    DFT, a wave mod p lights 2 (counts of active frequencies by the paper's rule)."""
    p, classes = 113, data.primes_below(113)
    waves = analyze.waves(p, classes, p)
    sums = waves[:2].flatten(0, 1)[torch.arange(1452) != 726]  # for q = 2 there is no sine
    sums = functional.normalize(sums, dim=1)
    assert len(classes) == 29 and sum(classes) == 1480 and len(sums) == 1451
    assert torch.linalg.eigvalsh(sums @ sums.T).aminmax() == pytest.approx((0.745, 1.329), abs=1e-3)
    counts, yes = [], torch.tensor([True])
    for one in (*waves[0], wave(p, p, 25, 25)):
        counts.append(analyze.active_counts(analyze.dft2(one[:, None], p), yes)[0].item())
    *some, of_p = counts
    two = torch.stack([5 + wave(p, p, 4, 4) + wave(p, p, 3, 0) / 2, torch.zeros(p * p)], 1)
    varies = torch.tensor([True, False])
    assert analyze.active_counts(analyze.dft2(two, p), varies).tolist() == [4, 1]  # bins, frequencies of x1
    assert (np.mean(some), min(some), max(some), of_p) == pytest.approx((70.8, 6, 134, 2), abs=0.1)


def test_waves_are_found_mixed_and_after_relu():
    """max(0, cos + cos), as networks have it, is half in the sum wave and half in the difference wave."""
    p, classes = 61, data.primes_below(61)
    freqs, solver = analyze.wave_freqs(classes).tolist(), analyze.wave_solver(p, classes, p)
    planted = {(0, 53, 1): 9 / 2, (0, 59, 1): 4 / 2, (0, 13, 4): 1 / 2, (1, 29, 3): 1 / 2}  # variances
    mix = 3 * wave(p, 53, 1, p) + 2 * wave(p, 59, 1, p, 1.0) + wave(p, 13, 4, 4 * p, 2.0)
    power = analyze.decompose((mix + wave(p, 29, 3, -3 * p))[:, None], p, solver)['waves'][:, :, 0]
    for (kind, q, k), variance in planted.items():
        at = kind, freqs.index([q, k])
        assert abs(power[at] - variance) < 0.15 * variance  # 1/53 and 1/59 overlap a little
        power[at] = 0
    assert power.abs().sum() < 0.05
    picks = freqs[3::30]
    rectified = [torch.relu(wave(p, q, k, 0, 0.3 * q) + wave(p, q, 0, k * p, 0.7 * q)) for q, k in picks]
    out = layer(torch.stack(rectified, 1), p, classes)
    assert out['neuron_wave'].tolist() == picks and out['pure neurons'] == len(picks)
    _, sums, differences, _ = out['neuron_split']
    assert abs(sums.mean() / differences.mean() - 1) < 0.1 and (sums + differences > 0.1).all()


def test_random_weights_carry_nothing():
    d, planted = data.make('miiii', 31), wave(31, 29, 5, 5 * 31) + wave(31, 29, 7, 7 * 31)
    cases = [(torch.ones(31 ** 2, 3), 0), (normal(31 ** 2, 128) + planted[:, None], 2)]
    for seed in range(6):
        torch.manual_seed(seed)
        net, acts = Transformer(31, 128, 4, sum(d.classes)).requires_grad_(False), {}
        net(d.x, acts=acts)
        cases += [(acts['neurons'], 0), (normal(31 ** 2, 128, seed=seed), 0)]
    for activations, carried in cases:
        out = layer(activations, 31, d.classes)
        names = ('waves (q, k) carried', 'moduli q carried', 'pure neurons')
        assert [out[name] for name in names] == [carried, min(carried, 1), 0]
    for shares, carried in (((0.03, 0, 0.09), [0, 0, 1]), ((0.1, 0, 0.3), [1, 0, 1])):  # the mean, or 5 %
        assert analyze.carried(torch.tensor(shares), 113).tolist() == carried


def fourier_basis(n):
    """Orthonormal waves over n rows by their formula: constant, cos 1, sin 1, cos 2, sin 2, ..."""
    phase = 2 * torch.pi / n * torch.arange(n).double() * torch.arange(1, n // 2 + 1)[:, None]
    waves = torch.stack([phase.cos(), phase.sin()], 1).flatten(0, 1) * (2 / n) ** 0.5
    waves[(n - 1) // 2 * 2:] *= 0.5 ** 0.5  # the frequency n/2 of an even n
    return torch.cat([torch.full((1, n), n ** -0.5), waves])


def fourier_features(rows, periods, width, seed=0):
    """Like the number tokens of a pre-trained model (rows, width), rms 0.1: waves in random directions."""
    phase = 2 * torch.pi * torch.arange(rows)[:, None] / torch.tensor(periods, dtype=torch.float64)
    waves = torch.cat([phase.cos(), phase.sin()], 1)
    W = waves @ normal(waves.shape[1], width, seed=seed, dtype=torch.float64)
    return (0.1 * W / W.square().mean().sqrt()).float()


@pytest.mark.parametrize('n', [12, 13])
def test_an_embedding_by_plain_formulas(n):
    """The second singular value passes half of 11, the fourth 9.9; squared, the first and the third."""
    S, basis = torch.tensor([4.0, 3, 2, 1, 0.5, 0.25, 0.25]), fourier_basis(n).float()
    U, V = torch.linalg.qr(normal(n, 7)).Q, torch.linalg.qr(normal(7, 7, seed=1)).Q
    net = SimpleNamespace(W_E=torch.cat([U * S @ V, torch.ones(1, 7)]))  # the last token is no digit
    out = analyze.embedding(SimpleNamespace(net=net, p=n))
    assert torch.allclose(out['singular_values'], S, atol=1e-5)
    assert torch.allclose((out['left_vectors'] * U).sum(0)[:5].abs(), torch.ones(5), atol=1e-3)
    for of, counts in (('', [2, 4]), (' of variance', [1, 3])):
        assert [out[f'W_E singular values to {share} %{of}'] for share in (50, 90)] == counts
    coefficients = basis @ (U * S @ V)
    assert torch.allclose(out['W_E_fourier'], coefficients[:n], atol=1e-5)
    norms = coefficients[1:].view(-1, 14).norm(dim=1)
    assert torch.allclose(out['W_E_norms'], norms, atol=1e-4)
    expected = {'W_E Gini': (norms[:, None] - norms).abs().mean() / (2 * norms.mean()),
                'W_E effective frequencies': norms.square().sum() ** 2 / norms.pow(4).sum(),
                'W_E frequencies above mean + 2 sd': (norms > norms.mean() + 2 * norms.std()).sum()}
    assert [out[name] for name in expected] == pytest.approx([*map(float, expected.values())], rel=1e-4)


def characters(p, ks, directions):
    """Rows 0 .. p-1 of multiplicative characters k, cosine and sine in given directions; 0 has none."""
    log = analyze.by_discrete_log(p).argsort()  # of 1 .. p-1
    phase = 2 * torch.pi / (p - 1) * (torch.tensor(ks) * log[:, None]).double()
    W = torch.cat([phase.cos(), phase.sin()], 1) @ directions
    return torch.cat([0 * W[:1], W])


def test_a_character_is_one_line_in_one_basis_and_flat_in_the_other():
    known = {(2, 4, 7, 9): [1, 0.93], (3, 5, 7, 8): [1, 0.56], (2, 4, 6, 8): [0.5, 0], (1, 3, 5, 7): [0.5, 0]}
    for ks, expected in known.items():
        W = characters(97, ks, normal(8, 128, dtype=torch.float64))
        assert analyze.density_and_ratio(W) == pytest.approx(expected, abs=0.02), ks
    assert analyze.density_and_ratio(normal(97, 128)) == pytest.approx([1, 0.93], abs=0.02)
    five = fourier_features(97, [97 / k for k in (3, 11, 20, 33, 40)], 128)
    assert analyze.density_and_ratio(five)[0] == pytest.approx(5 / 48)
    plane, logits = torch.eye(2, dtype=torch.float64), normal(31 ** 2, 2 * 31)
    net = SimpleNamespace(W_out=plane, W_E=characters(31, [4], plane), W_U=characters(31, [7], plane).T)
    out = analyze.polynomials(SimpleNamespace(p=31, net=net, d=SimpleNamespace(n_ops=2), logits=logits))
    for name, k in (('W_E', 4), ('W_L', 7)):
        assert out[f'{name} effective frequencies by logarithm'] == pytest.approx(1)
        assert out[f'{name} effective frequencies'] == pytest.approx(15)
        assert out[f'{name} Gini by logarithm'] > 0.9 and out[f'{name} Gini'] < 1e-6
        power = out[f'{name}_cos_sin'].square().sum(0), out[f'{name}_mult_cos_sin'].square().sum(0)
        assert torch.allclose(power[0], torch.full((15,), 2.0).double()) and power[1].argmax() == k - 1
    assert out['pattern'][:, 3, 5].tolist() == logits[3 + 31 * 5, [1, 32]].tolist()  # class 1 of both


def test_attention_and_positions_by_brute_force():
    att, W = torch.rand(5 * 5 * 2, 3, 4, generator=seeded()), normal(3, 20)  # 2 operations, 4 heads
    out = analyze.attention(SimpleNamespace(p=5, d=SimpleNamespace(n_ops=2), acts=dict(att=att)))
    for h, o, x0, x1 in itertools.product(range(4), range(2), range(5), range(5)):
        assert out['attention'][2 * h + o, x0, x1] == att[2 * (x0 + 5 * x1) + o, 0, h]
    score = [(att[o::2, 0, h] - att[o::2, 1, h]).mean().item() for h in range(4) for o in range(2)]
    assert out['heads: attention to x0 less x1'] == pytest.approx(score, abs=1e-6)
    out = analyze.positions(SimpleNamespace(net=SimpleNamespace(W_pos=W)))
    assert out['W_pos correlation'] == pytest.approx(np.corrcoef(W[:2])[0, 1], abs=1e-5)


@pytest.mark.parametrize('rows', [100, 261])
def test_periods_that_stand_out(rows):
    """Planted ones, whatever the trend, not when shuffled; and one ten times weaker than another that is off
    the grid, too, so that it leaks into all of the spectrum."""
    noise, order = normal(rows, 64, seed=2), torch.randperm(rows, generator=seeded(2))
    W, k = fourier_features(rows, [2, 5, 10], 64) + 0.05 * noise, [rows / 10, rows / 5, rows / 2]
    trend = 10 * torch.arange(rows)[:, None] / rows
    falling = torch.fft.irfft(torch.fft.rfft(noise, dim=0) / torch.arange(1, rows // 2 + 2)[:, None], rows, 0)
    cases = [(W, k), (W + trend, k), (W[order], []), (trend + noise, []), (falling, [])]
    for strong, apart in itertools.product((12.37, 33.5), (-7, -2.5, 2, 4.4, 9)):  # frequencies
        both = fourier_features(rows, [rows / strong], 64) + 1e-4 * noise
        both += 0.1 * fourier_features(rows, [rows / (strong + apart)], 64, seed=1)
        cases.append((both, sorted([strong, strong + apart])))
    for several in ((5, 10, 20, 40), (30, 32, 34, 36)):  # each is fitted anew when another is found beside it
        some = [k for k in several if k < rows / 2 - 1]
        cases.append((fourier_features(rows, [rows / k for k in some], 64) + 1e-3 * noise, some))
    for planted, expected in cases:
        assert analyze.outliers(planted)[0] == pytest.approx(expected, abs=0.1)
    for few in range(5, 14):  # nothing is left to look at when a wave is found
        assert len(analyze.outliers(fourier_features(few, [few / 2.2], 16) + 1e-3 * noise[:few, :16])[0]) < 3
    _, spectrum, chance = analyze.outliers(noise)
    assert chance.shape[1] == rows // 2 and chance.mean() == pytest.approx(spectrum.mean(), rel=0.05)


# ---------------------------------------------------------------- addition, modulo p and without

KEYS = [3, 7, 12]


def hand_built(p, keys, phases=16):
    """Weights that compute (a + b) mod p by cosines. Attention adds the digits: cos(w a) + cos(w b) and the
    sine make a vector of angle w (a + b) / 2. Neurons look at it from equally spaced angles f, and the sum
    over f of max(0, r cos(angle - f)) cos(2 f - w c) is a multiple of r cos(w (a + b) - w c)."""
    W = {name: torch.zeros_like(w) for name, w in Transformer(p, 32, 4, p).state_dict().items()}
    W['W_V'][:] = torch.eye(32).view(32, 4, 8).transpose(0, 1)
    W['W_O'][:] = torch.eye(32).view(4, 8, 32)
    f = 2 * torch.pi * torch.arange(phases) / phases
    for i, k in enumerate(keys):
        angle, own, write = 2 * torch.pi * k / p * torch.arange(p), phases * i, 2 * len(keys)
        for row, of in ((2 * i, torch.cos), (2 * i + 1, torch.sin)):
            W['W_E'][:p, row] = of(angle)
            W['W_in'][row, own:own + phases] = of(f)
            W['W_out'][own:own + phases, write + row] = of(2 * f)
            W['W_U'][write + row] = 20 * of(angle)
    return W


def test_a_hand_built_network_is_taken_apart(tmp_path):
    """Keys are found in logits, neurons and embedding. Losses and fits by least squares, with noise added."""
    run_of(*f'--task nanda --p 31 --n_heads 4 --epochs 1 --spectra_every 0 --out {tmp_path}'.split())
    ckpt = checkpoint(tmp_path) | dict(model=hand_built(31, KEYS))
    del ckpt['example']
    data.write(tmp_path / 'ckpt.pt', lambda f: torch.save(ckpt, f))
    modular = analyze.load_run(tmp_path)
    n, arrays, d, rows = modular.final(), modular.arrays(), modular.data, modular.rows[0]
    assert arrays['snapshot_valid_accuracies'][-1] == arrays['snapshot_train_accuracies'][-1] == [1]
    assert n['key frequencies'] == KEYS and n['neurons that vary'] == n['pure neurons'] == 48
    assert n['waves (q, k) carried'] == 3 and n['W_E effective frequencies'] < 3.01
    assert arrays['neuron_wave'][:48, 1].tolist() == np.repeat(KEYS, 16).tolist()
    share = arrays['neuron_split'][:, :48].mean(1)  # of one digit alone, in sum and difference wave, the rest
    assert share.sum() == pytest.approx(1, abs=1e-3) and abs(share[1] - share[2]) < 0.1 * share[1]
    assert n['restricted loss'] < 0.3 < math.log(31) - 0.1 < n['excluded loss']
    sums, noise = d.x[:, 0] + d.x[:, 1], normal(31 ** 2, 31) + torch.arange(31) / 9
    logits = modular.forward()[0] / 9 + noise
    out = analyze.mechanism(SimpleNamespace(p=31, d=d, rows=modular.rows, logits=logits, key=None))
    angle = 2 * torch.pi / 31 * sums[:, None] * torch.tensor(KEYS)
    waves = torch.cat([angle.cos(), angle.sin()], 1)
    fitted = waves @ torch.linalg.lstsq(waves, logits).solution
    kinds = {'loss on all inputs': (logits, d.y), 'restricted loss': (logits.mean(0) + fitted, d.y),
             'excluded loss': ((logits - fitted)[rows], d.y[rows])}
    for name, (z, y) in kinds.items():
        assert out[name] == pytest.approx(functional.cross_entropy(z.double(), y[:, 0]).item(), rel=1e-3)
    centred = logits - logits.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    turns = torch.arange(1, 16)[:, None, None] * (sums[:, None] - torch.arange(31)) / 31  # k rows c
    waves = torch.cos(2 * torch.pi * turns)
    amplitude = (waves * centred).mean((1, 2)) / waves.square().mean((1, 2))
    fit = amplitude.square() * waves.square().mean((1, 2)) / centred.square().mean()
    assert np.allclose(out['amplitude'], amplitude, atol=1e-3) and np.allclose(out['fit'], fit, atol=1e-4)
    assert torch.allclose(out['profile'][2], centred.gather(1, (sums[:, None] - 2) % 31).mean())
    key = fit[torch.tensor(KEYS) - 1].sum().item()
    assert out['logits in key cosines'] == pytest.approx(key, abs=1e-4) and key > 0.5
    assert out['logits in as many others'] == pytest.approx((fit.sum().item() - key) / 4, rel=1e-3)


def test_a_table_of_the_rows_fits_key_cosines_no_better_than_others():
    d, rows, logits = data.make('nanda', 31), data.split(31 ** 2, 0.3), torch.zeros(31 ** 2, 31)
    logits[rows[0], d.y[rows[0], 0]] = 1
    with_keys, own = (analyze.mechanism(SimpleNamespace(p=31, d=d, rows=rows, logits=logits, key=key))
                      for key in (KEYS, None))
    assert own['key frequencies'] == []
    key, others = with_keys['logits in key cosines'], with_keys['logits in as many others']
    assert key == pytest.approx(others, rel=1e-4) and 5 * key == pytest.approx(0.3, abs=0.02)  # of 15 k


def test_a_filter_takes_out_what_it_should_and_nothing_else():
    C, k, basis = 21, torch.tensor([1, 4, 10]), fourier_basis(21)
    W_U, z = normal(32, C, dtype=torch.float64), normal(50, 32, seed=1, dtype=torch.float64)
    P = analyze.without(W_U, k)
    waves = basis[[1, 2, 7, 8, 19, 20]] @ W_U.T
    assert torch.allclose(P, torch.eye(32) - torch.linalg.pinv(waves) @ waves)  # the nearest, nothing else
    assert (z @ P @ waves.T).abs().max() < 1e-10 and P.trace().item() == pytest.approx(32 - 6)
    W_U = torch.linalg.qr(W_U).Q @ basis  # each frequency by its own directions
    before, after = (torch.fft.rfft(read @ W_U) for read in (z, z @ analyze.without(W_U, k)))
    before[:, k] = 0
    assert torch.allclose(before, after)


def test_errors_by_brute_force():
    logits = torch.randint(0, 6, (300, 39), generator=seeded()).float()
    y = torch.randint(0, 39, (300,), generator=seeded(1))
    logits[:200].scatter_(1, y[:200, None], 7)
    off = np.zeros(300)
    for i, (row, right) in enumerate(zip(logits.tolist(), y.tolist())):
        guess = max((c for c in range(39) if c != right), key=row.__getitem__)
        off[i] = 0 if row[right] > row[guess] else abs(guess - right)
    wrong = off[off > 0]
    expected = [*(np.mean(off <= most) for most in (0, 2, 10)), np.mean(wrong % 10 == 0), np.mean(wrong == 1)]
    assert analyze.errors(logits, y) == pytest.approx(expected)
    assert analyze.errors(logits[:200], y[:200]) == [1, 1, 1, 0, 0]


def summing_network(p):
    """A network that adds by hand, with logits -0.01 (s - c)^2 + (-1)^(s - c) of class c: low for the size of
    s = x0 + x1, high for its parity. Attention sums, neurons bend at whole numbers, W_U has the waves."""
    C, D = 2 * p - 1, 2 * p + 2
    net, n, waves = Transformer(p, D, 1, C).requires_grad_(False), torch.arange(C).double(), fourier_basis(C)
    off = n[:, None] - n
    features = (-0.01 * off.square() + 1 - 2 * (off % 2)) @ waves.T  # s, what each wave needs
    slopes = features.diff(dim=0, prepend=0 * features[:1])
    bends = slopes.diff(dim=0, prepend=0 * slopes[:1])  # f(s) = sum_t bends[t] relu(s - t + 1)
    for w in net.parameters():
        w.zero_()
    net.W_E[:p, 0] = torch.arange(p).float()
    net.W_pos[2, 1] = 1
    net.W_V[0] = net.W_O[0] = torch.eye(D)  # W_Q = W_K = 0: the mean over three tokens, s / 3 and 1 / 3
    net.W_in[0, :C] = 3
    net.W_in[1, :C] = (1 - n).float() * 3 / 4
    net.W_out[:C, 2:2 + C] = bends.float()
    net.W_U[2:2 + C] = waves.float()
    return net


def test_a_hand_built_adder_loses_its_magnitude_or_its_parity():
    torch.manual_seed(0)
    d, net, rows = data.make('add', 20), summing_network(20), data.split(400, 0.1, n_valid=120)
    m, unseen = SimpleNamespace(d=d, net=net, rows=rows), torch.cat(rows[1:])
    off = (d.x[:, 0] + d.x[:, 1])[:, None] - torch.arange(39)
    assert torch.allclose(net(d.x), -0.01 * off ** 2 + 1 - 2 * (off % 2), atol=1e-2)
    written, out = analyze.components(net, d.x[unseen]), analyze.outputs(m)
    assert out['logits of "=", heads, MLP: periods'][2] == pytest.approx([2], abs=1e-3)  # the parity
    amplitudes = np.abs(np.fft.rfft((written @ net.W_U).numpy()))[..., 1:]
    share = np.square(amplitudes[2, :, :4]).sum() / np.square(amplitudes[2]).sum()
    assert out['logits of "=", heads, MLP: low share'][2] == pytest.approx(share, rel=1e-4)
    assert np.allclose(out['class_spectra'], amplitudes.mean(1), rtol=1e-3, atol=1e-3)
    out, null, g = analyze.filters(m), [], seeded()
    assert out['tau, the highest low frequency'] == 4  # as 50 of 260, of 19
    assert (out['dimensions left without low'], out['dimensions left without high']) == (42 - 8, 42 - 30)
    assert out['filtered: low from attention'][0] == out['filtered: high from attention'][0] == 1
    assert out['filtered: low from both'] == out['filtered: low from MLP']
    low, high = (dict(zip(analyze.RATES, out[f'filtered: {band} from MLP'])) for band in ('low', 'high'))
    assert low['within 10'] < 0.5 and low['errors off by 1'] < 0.02  # anywhere of its parity
    assert high['accuracy'] < 0.3 < high['errors off by 1'] and high['within 10'] == 1  # near
    for _ in range(3):  # what the MLP writes, without 8 random directions
        Q = torch.linalg.qr(torch.randn(42, 8, generator=g)).Q
        left = written.sum(0) - written[-1] @ Q @ Q.T
        null.append(analyze.errors(left @ net.W_U, d.y[unseen, 0]))
    assert out['filtered: low from MLP, random'] == pytest.approx(np.mean(null, 0).tolist(), abs=2e-3)
    for some, right in zip(rows, (1, 240 / 360, 120 / 360)):  # measured on validation and test rows
        m.d = d._replace(y=d.y.index_add(0, some, torch.tensor(1).expand(len(some), 1)) % 39)
        assert analyze.filters(m)['filtered: nothing'][0] == pytest.approx(right)
    m.d, m.net = d, Transformer(20, 16, 2, 39).requires_grad_(False)  # attention is filtered before the MLP
    start, *heads, _ = analyze.components(m.net, d.x[unseen])
    mid = start + sum(heads) @ analyze.without(m.net.W_U, torch.arange(1, 5))
    expected = analyze.errors((mid + torch.relu(mid @ m.net.W_in) @ m.net.W_out) @ m.net.W_U, d.y[unseen, 0])
    assert analyze.filters(m)['filtered: low from attention'] == pytest.approx(expected)


# ---------------------------------------------------------------- what is taken out

def test_planted_groups_and_what_fails_without_them(monkeypatch):
    """Neurons and weights by hand over n < 121: n mod 5 and n mod 7 have neurons of their own, and "does 5
    divide n" reads those of the first. A constant neuron makes a network without waves say 0."""
    n, pairs, columns, W_U = torch.arange(121), [(5, 1), (5, 2), (7, 1), (7, 2), (7, 3)], [], []
    for (q, k), wave in itertools.product(pairs, (torch.cos, torch.sin)):
        columns.append(wave(2 * torch.pi * k * n / q))
        of_5, of_7 = (10 * wave(2 * torch.pi * k * torch.arange(c) / c) * (q == c) for c in (5, 7))
        divides = torch.tensor([10.0, 0.0]) * (q == 5) * (wave is torch.cos)
        W_U.append(torch.cat([of_5 + 3.0 * (q == 7), of_7, divides]))  # 3 for all classes says nothing
    says_0 = torch.tensor([0.1, 0, 0, 0, 0, 0.1, 0, 0, 0, 0, 0, 0, 0, 6])  # 5 | n if both cosines make more
    neurons = torch.stack([*columns, torch.ones(121)], 1)
    y = torch.stack([n % 5, n % 7, (n % 5 != 0).long()], 1)
    d = data.make('miiii', 11)._replace(y=y, classes=[5, 7, 2], names=['5', '7', '5 | n'])
    net = Transformer(11, 44, 1, 14).requires_grad_(False)
    net.W_out.copy_(torch.eye(176, 44) * (torch.arange(44) < 11))
    net.W_U[:11] = torch.stack([*W_U, says_0])
    wave, share = [pair for pair in pairs for _ in 'cs'] + [(2, 1)] * 166, [0.9] * 10 + [0.5] * 166
    found = dict(neuron_wave=torch.tensor(wave), neuron_wave_share=torch.tensor(share))
    acts, logits = dict(neurons=functional.pad(neurons, (0, 165))), neurons @ net.W_U[:11]
    m = SimpleNamespace(net=net, d=d, p=11, rows=data.split(121, 0.3), logits=logits, acts=acts)
    monkeypatch.setattr(data, 'primes_below', lambda n: d.classes)
    out = analyze.circuits(m, found, draws=3)
    y = m.d.y[torch.cat(m.rows[1:])]
    a, b, divides = (y == torch.tensor([0, 0, 1])).float().mean(0).tolist()  # right without own neurons
    assert out['group_sizes'].tolist() == [4, 6, 0]
    assert torch.allclose(out['necessary'], torch.tensor([[a, 1, divides], [1, b, 1], [1, 1, 1]]))
    assert torch.allclose(out['sufficient'], torch.tensor([[1, b, 1], [a, 1, divides], [a, b, divides]]))
    assert (out['as_strong'][:, 2] == 1).all() and out['as_strong'][:, :2].mean() < 0.9
    own = [(1 - a) / (4 / 5) - (1 - divides) / (1 / 2), (1 - b) / (6 / 7), 0]
    nulls = [analyze.separations(x, torch.ones(3), [5, 7, 2]).mean().item() for x in out['as_strong']]
    prime = (y != 0).all(1).float().mean().item()
    expected = {
        'separation': np.mean(own), 'separation, the least of a group': min(own),
        'separation, as strong random neurons: least, most': [min(nulls), max(nulls)],
        'own task without its group': (a + b + 1) / 3, 'other tasks without it': (5 + divides) / 6,
        'own task without random neurons as strong': np.mean([x.diagonal() for x in out['as_strong']]),
        'own task with its group alone': (2 + divides) / 3, 'the same by always saying "no prime"': 1 - prime}
    for name, value in expected.items():
        assert out[name] == pytest.approx(value, abs=1e-5), name
    assert out['primes'].tolist() == pytest.approx([1, 1 - prime, 1 - prime, 1])  # without it all say 0


def test_separations_owners_and_random_groups_in_known_cases():
    without = torch.tensor([[1 / 2, 1 / 5, 1], [1, 1 / 5, 6 / 11], [1, 1, 1 / 11]])  # group by task
    for third, expected in ((1, [0, 0.5, 1]), (0.89, [0, 1])):  # at last the third task is not learned
        found = analyze.separations(without, torch.tensor([1, 1, third]), [2, 5, 11])
        assert np.allclose(found, expected, atol=1e-6)
    gains = analyze.separations(torch.tensor([[1 / 2, 1], [1, 1 / 5]]), torch.tensor([0.95, 0.95]), [2, 5])
    assert gains.tolist() == pytest.approx([1 + 0.05 / 0.75, 1 + 0.05 / 0.45])  # the other task is better
    wave, share = torch.tensor([[7, 1], [7, 2], [3, 1]]), torch.tensor([0.6, 0.5, 0.51])  # .5 is not above
    for classes, of_each, names in (([7, 3], [7, 0, 3], [7, 3]), ([7], [1, 0, 1], [1]),
                                    ([21, 7], [7, 0, 3], [21, 7, 3])):
        owner, groups = analyze.groups_of(dict(neuron_wave=wave, neuron_wave_share=share), classes)
        assert (owner.tolist(), groups) == (of_each, names)
    logits = torch.tensor([[1.0, 0, 2, 2, 0], [0, 1, 2, 2, 3], [0, 1, 3, 2, 2], [0, 1, 2, 2, 1]])  # a tie
    y = torch.tensor([[0, 1], [1, 2], [1, 1], [1, 2]])
    assert analyze.prime_accuracy(logits, y, [2, 3]) == 0.75
    g = seeded()
    strength = torch.rand(50, generator=g)
    groups = torch.rand(4, 50, generator=g) < torch.tensor([[0.1], [0.3], [0.6], [0.0]])
    for _ in range(5):
        drawn = analyze.as_strong(groups, strength, g)
        more = ((drawn.int() - groups.int()) * strength).sum(1)
        assert (more >= -1e-5).all() and (more < strength.max()).all() and not drawn[3].any()
        assert (drawn[1:3] != groups[1:3]).any(1).all()


def test_heads_taken_out_by_brute_force():
    """Of a random network, whose own answers are the right ones, in float64."""
    d, rows = data.make('miiii', 11), data.split(121, 0.4)
    torch.manual_seed(3)
    net, acts = Transformer(11, 36, 3, 17).requires_grad_(False), {}
    net.W_O *= 8
    logits = net(d.x, acts=acts)
    d = d._replace(y=torch.stack([block.argmax(1) for block in logits.split(d.classes, 1)], 1))
    W, unseen = {name: w.double() for name, w in net.state_dict().items()}, torch.cat(rows[1:])

    def without_heads(*some):
        z = acts['resid_mid'].double()
        for h in some:
            values = (W['W_E'][d.x] + W['W_pos']) @ W['W_V'][h]
            head = torch.einsum('nt,ntk,kd->nd', acts['att'][..., h].double(), values, W['W_O'][h])
            z = z + head[unseen].mean(0) - head
        z = (z + (z @ W['W_in']).relu() @ W['W_out']) @ W['W_U']
        guesses = torch.stack([block.argmax(1) for block in z.split(d.classes, 1)], 1)
        return (guesses == d.y)[unseen].float().mean(0)

    m = SimpleNamespace(net=net, d=d, p=11, rows=rows, logits=logits, acts=acts)
    sets = [0], [1], [2], [0, 1], [0, 2], [1, 2]
    expected = torch.stack([without_heads(*some) for some in sets])
    assert torch.allclose(analyze.shared(m)['heads'], expected, atol=1e-3)


def test_neurons_taken_out_by_brute_force(folders):
    """The accuracies of `circuits`, and those that --cut and --keep print."""
    run = analyze.load_run(folders['miiii'])
    a, (logits, acts), unseen = run.arrays(), run.forward(), torch.cat(run.rows[1:])
    group = a['group_sizes'].argmax()
    name = int(a['groups'][group])
    owned = torch.tensor((a['neuron_wave'][:, 0] == name) & (a['neuron_wave_share'] > 0.5))
    assert 0 < owned.sum() == a['group_sizes'][group]
    for keep, taken, found in ((False, owned, a['necessary']), (True, ~owned, a['sufficient'])):
        changed = torch.where(taken, acts['neurons'].mean(0), acts['neurons'])
        both = logits, (acts['resid_mid'] + changed @ run.net.W_out) @ run.net.W_U
        guesses = [torch.stack([block.argmax(1) for block in z.split(run.data.classes, 1)], 1) for z in both]
        expected = torch.stack([(guess == run.data.y)[unseen].float().mean(0) for guess in guesses], 1)
        assert np.allclose(found[group], expected[:, 1], atol=1e-3)
        printed = [line.split()[-2:] for line in analyze.surgery(run, [name], keep).splitlines()[-4:]]
        assert np.allclose(np.array(printed, float), expected, atol=1e-3)


# ---------------------------------------------------------------- letters, waves in place of neurons

def test_letters_spell_waves():
    """Each wave of n is a sum of products of a wave of x0 and one of x1, at its letters. Waves at whole
    letters are orthogonal, letters near to each other span little more than one; chance keeps the q."""
    p, freqs = 13, analyze.wave_freqs([2, 3, 5, 11])
    spelled = analyze.letters(freqs, p)
    assert spelled.shape == (9, 2) and 0 < spelled.min() and spelled.max() <= 6.5
    digit = torch.arange(p, dtype=torch.float64)
    for (q, k), (a, b) in zip(freqs.tolist(), spelled):
        x0, x1 = ([f(2 * math.pi / p * letter * digit) for f in (torch.cos, torch.sin)] for letter in (a, b))
        products = torch.stack([torch.outer(v, u).flatten() for u in x0 for v in x1], 1)
        target = wave(p, q, k, k * p).double()[:, None]
        residual = target - products @ torch.linalg.lstsq(products, target, driver='gelsd').solution
        assert residual.abs().max() < 1e-5, (q, k)
    whole = torch.tensor([[1.0, 2.0], [2.0, 5.0]])
    assert analyze.dimensions(whole, p) == pytest.approx(64 / 12)  # s^2: 1 1 2 2 1 1
    assert analyze.dimensions(torch.tensor([[3.0, 3.01]]), p) < 2.01
    assert analyze.distances(whole, torch.tensor([[2.5, 9.0]])).tolist() == [[1.5, 0.5], [0.5, 2.5]]
    has = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 0]).bool()
    drawn = [analyze.at_random(freqs, has, torch.Generator().manual_seed(i)) for i in range(40)]
    assert all(freqs[some, 0].tolist() == freqs[has, 0].tolist() for some in drawn)
    assert (torch.stack(drawn)[:, 4:].float().mean(0) - 0.6).abs().max() < 0.25  # three of five k of 11


@torch.no_grad()
def test_bands_of_the_embedding_and_neurons_replaced():
    """Bands are Fourier coefficients of W_E set to zero. Neurons that are made of single digits and one wave
    lose nothing when they are replaced by these; all is lost with another k, and without their wave."""
    torch.manual_seed(0)
    p, d = 13, data.make('miiii', 13)
    freqs, solver = analyze.wave_freqs(d.classes), analyze.wave_solver(13, d.classes, 13)
    net, F = Transformer(p, 32, 2, sum(d.classes)), 128
    m = SimpleNamespace(net=net, d=d, p=p, rows=data.split(p * p, 0.4), solver=solver)
    m.logits, before, rows = net(d.x), net.W_E.clone(), torch.cat(m.rows[1:])
    m.d = d._replace(y=torch.stack([z.argmax(1) for z in m.logits.split(d.classes, 1)], 1))  # all is right
    has = torch.isin(torch.arange(12), torch.tensor([0, 1, 3, 5, 8, 10]))
    out = analyze.alphabet(m, dict(wave_shares=has * torch.ones(2, 12)), draws=20)
    assert torch.equal(out['carried'], has) and out['waves of q > 7'] == 2 and torch.equal(net.W_E, before)
    z = torch.fft.rfft(before[:p], dim=0)
    z[2:5] = 0
    net.W_E[:p] = torch.fft.irfft(z, p, dim=0)
    accuracy = task_losses(net(d.x[rows]), m.d.y[rows], d.classes)[1]
    assert torch.allclose(out['band_cuts'][1], accuracy, atol=0.02) and (accuracy < 0.95).any()
    assert out['band_cuts'].shape == (4, 5) and out['random_cuts'].shape == (30, 5)
    for kind, cuts in (('in a row', out['band_cuts']), ('at random', out['random_cuts'])):
        halves = [1 - (1 - 1 / q) / 2 for q in d.classes]  # all was right
        count = [sum(acc < half for acc, half in zip(row, halves)) for row in cuts.tolist()]
        name = f'tasks that lose more than half without three frequencies of W_E {kind}: mean, most'
        assert out[name] == pytest.approx([np.mean(count), max(count)])
    spelled, first = out['letters'], out['letters'][has & (freqs[:, 0] < 8)].flatten().tolist()

    def share(some):
        return np.mean([min(abs(x - y) for y in first) < 1 for x in some.flatten().tolist()])
    for name, measured in {'dimensions of their letters': lambda some: analyze.dimensions(some, p),
                           'share of their letters within 1 of one of 2, 3, 5, 7': share}.items():
        assert out[name] == pytest.approx(measured(spelled[[8, 10]]))
        low, middle, high = out[f'{name}, by chance']
        assert low <= middle <= high and low < high

    best = torch.randint(5, 12, (F,))  # of q = 7 and 11
    basis = analyze.waves(p, d.classes, p)[:, best]                                      # 4 F p^2
    own = (normal(4, F, seed=1)[..., None] * basis).sum(0).T
    n = torch.arange(p * p)
    a = own + normal(p, F, seed=2)[n % p] + normal(p, F, seed=3)[n // p]
    m.acts, m.logits = dict(neurons=a), a @ net.W_out @ net.W_U
    m.d = d._replace(y=torch.stack([z.argmax(1) for z in m.logits.split(d.classes, 1)], 1))
    out = analyze.rebuilt(m, dict(neuron_wave=freqs[best]))
    trained, unseen = out['rebuilt_accuracies'].mean(2)
    for whole, digits, own_wave, another, waves, less in (trained.tolist(), unseen.tolist()):
        assert whole == 1 and min(own_wave, waves) > 0.98 and max(digits, another, less) < 0.9
        assert digits == pytest.approx(less, abs=1e-6)
    assert torch.allclose(out['rebuilt_losses'][:, 2], out['rebuilt_losses'][:, 0], rtol=0.02)
    m.acts['neurons'] = a + 0.8 * own.roll(1, 1)  # a second wave, as a rule of another q
    m.logits = m.acts['neurons'] @ net.W_out @ net.W_U
    m.d = d._replace(y=torch.stack([z.argmax(1) for z in m.logits.split(d.classes, 1)], 1))
    out = analyze.rebuilt(m, dict(neuron_wave=freqs[best]))
    _, _, own_wave, _, waves, _ = out['rebuilt_accuracies'][1].mean(1)
    assert waves > 0.98 > 0.9 > own_wave


@torch.no_grad()
def test_moduli_that_are_not_prime():
    """Each fraction k/q once, in lowest terms: the answers of all moduli are combinations of these waves, and
    these can be told apart. Where they cannot, as of too many moduli, that is refused."""
    p, d = 13, data.make('n%6,n%10,n%15', 13)
    freqs = analyze.wave_freqs(d.classes)
    fractions = {Fraction(k, q) for q in d.classes for k in range(1, q // 2 + 1)}
    assert freqs.tolist() == sorted([f.denominator, f.numerator] for f in fractions)
    analyze.wave_solver(p, d.classes, p)  # is not refused
    basis = torch.cat([torch.ones(1, p * p), analyze.waves(p, d.classes, p)[:2].flatten(0, 1)]).T
    for q, y in zip(d.classes, d.y.T):
        answers = functional.one_hot(y, q).float()
        fitted = basis @ torch.linalg.lstsq(basis, answers, driver='gelsd').solution
        assert (fitted - answers).abs().max() < 1e-4
    with pytest.raises(data.Refusal):
        analyze.wave_solver(p, [26], p)


def test_when_waves_come():
    """Of planted records: for good, and with which letters before; at the start there are none before."""
    p, classes = 13, [2, 3, 5, 11]
    freqs = analyze.wave_freqs(classes)                                                  # (11, 1) is number 4
    there = torch.zeros(5, 9)
    for wave_number, since in ((0, 0), (2, 1), (5, 2), (8, 4)):
        there[since:, wave_number] = 1
    there[1, 7] = 1  # gone again
    records = dict(spectra_epoch=np.arange(5) * 10, sum_power=there.numpy(),
                   variance=np.array([[3.0, 1.0]] * 5))
    m = SimpleNamespace(p=p, d=SimpleNamespace(classes=classes), records=records)
    found = analyze.arrivals(m)
    assert found['arrived'].tolist() == [0, -1, 10, -1, -1, 20, -1, -1, 40]
    spelled = analyze.letters(freqs, p)
    for row, others in enumerate(([0, 2], [8])):
        far = [np.mean([min(abs(a - b) for b in spelled[others].flatten().tolist()) for a in pair])
               for pair in spelled[4:].tolist()]
        nearer, same = sum(x < far[1] - 1e-9 for x in far), sum(abs(x - far[1]) < 1e-9 for x in far) - 1
        assert found['arrival_ranks'][row, 5].item() == pytest.approx((nearer + same / 2) / 4)
    assert (found['arrival_ranks'] == -1).sum() == 16


def test_letters_by_design():
    """By brute force at p = 31: the bands spell waves of every q, no band could be moved to a better place,
    and where some q is left without a wave it is named. W_E by hand has the bands and little else."""
    p, classes = 31, data.primes_below(31)
    waves = {q: [[p * min(t % 1, -t % 1) for t in (Fraction(k, q), Fraction(p * k, q))]
                 for k in range(1, q // 2 + 1)] for q in classes}

    def product(bands):
        def near(pair):
            return all(min(abs(letter - band) for band in [*bands, math.inf]) < 0.8 for letter in pair)
        return math.prod(sum(map(near, pairs)) + 0.1 for pairs in waves.values())
    bands = analyze.design(8, p, classes).tolist()
    best = product(bands)
    assert len(set(bands)) == 8 and best > product([]) * 11 ** len(classes)
    moved = [bands[:i] + [place / 2] + bands[i + 1:] for i in range(8) for place in range(1, p)]
    assert max(map(product, moved)) <= best * (1 + 1e-9)
    with pytest.raises(data.Refusal, match='7 11'):
        analyze.design(3, p, classes)
    W = analyze.written(torch.tensor([4.0, 11.5]), p, 200)
    power = analyze.frequency_norms(W).square()
    assert torch.equal(power.topk(5).indices.sort().values + 1, torch.tensor([3, 4, 5, 11, 12]))
    assert W.square().mean().sqrt() == pytest.approx(0.148, rel=0.1) and power.argmin() > 12


# ---------------------------------------------------------------- run folders

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Small runs of all kinds, trained and analysed by the commands: {name: folder}."""
    folders = {}
    tasks = dict(miiii='miiii', nanda='nanda', formulas='a*b,a-b', sums='add', moduli='n%2,n%4,n%3')
    for name, task in tasks.items():
        epochs = 300 if name == 'moduli' else 30
        folders[name] = tmp_path_factory.mktemp(name) / name
        run_of('--task', task, '--epochs', epochs, '--spectra_every', 8, '--out', folders[name])
        analyze.main([str(folders[name])])
    return folders


@pytest.fixture
def copied(folders, tmp_path):
    """A function: name of a run -> a copy of its folder, to be changed."""
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def output_of(capsys, script, *args):
    capsys.readouterr()
    script.main([*map(str, args)])
    return capsys.readouterr().out


def test_analysis_of_a_run(folders, tmp_path, capsys):
    """Finite, printed, the same again elsewhere without a trace in the folder of the run; as it recorded."""
    folder, before = folders['miiii'], contents(folders['miiii'])
    printed, n = output_of(capsys, analyze, folder, '--to', tmp_path), told(folder, 'analysis')
    assert told(tmp_path / 'miiii', 'analysis') == n and contents(folder) == before
    assert all(name in printed for name in n['final']) and 'NaN' not in json.dumps(n)
    a, m = (dict(np.load(folder / f'{name}.npz')) for name in ('analysis', 'metrics'))
    assert all(np.isfinite(a[name]).all() for name in a)
    start, acts, row = first_weights(folder), analyze.load_run(folder).forward()[1], 3 + 11 * 7
    assert np.allclose(a['singular_values_initial'], np.linalg.svd(start['W_E'][:11])[1], atol=1e-4)
    assert np.isclose(a['attention'][1, 3, 7], acts['att'][row, 0, 1], atol=1e-5)  # of head 1
    assert np.isclose(a['neurons'][2, 3, 7], acts['neurons'][row, 2], atol=1e-5)

    epochs = [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 30]
    assert a['snapshot_epoch'].tolist() == epochs and m['spectra_epoch'].tolist() == [0, 8, 16, 24]
    total, alone = m['variance'].T
    recorded = {
        'variance of neurons in x0 or x1 alone': alone / total,
        'variance of neurons in sum waves': m['sum_power'].sum(1) / total,
        'valid_accuracies': m['valid_acc'][::8]}
    for row, epoch in enumerate((0, 8, 16)):
        for name, values in recorded.items():
            assert np.allclose(a[f'snapshot_{name}'][epochs.index(epoch)], values[row], atol=1e-4), name
    assert np.allclose(a['wave_shares_initial'][0], m['sum_power'][0] / (total - alone)[0], atol=1e-3)


def test_answers_by_brute_force():
    """Of random logits: rows that were trained on, others, and others whose swapped pair is one, too."""
    d, rows, logits = data.make('a*b,a+b', 7), data.split(49, 0.5), normal(49, 14)
    out = analyze.answers(SimpleNamespace(p=7, d=d, rows=rows, logits=logits))
    trained, unseen = ([(n % 7, n // 7) for n in some.tolist()] for some in (rows[0], torch.cat(rows[1:])))
    neither = [(a, b) for a, b in unseen if (b, a) not in trained]
    tasks = (lambda a, b: a * b % 7, lambda a, b: (a + b) % 7)
    for of, pairs in {'train': trained, 'unseen': unseen, 'unseen, nor swapped': neither}.items():
        right = [logits[a + 7 * b, 7 * i:7 * i + 7].argmax() == task(a, b)
                 for i, task in enumerate(tasks) for a, b in pairs]
        assert out[f'rows, {of}'] == len(pairs)
        assert out[f'accuracy, {of}'] == pytest.approx(np.mean(right))
    assert 0 < len(neither) < len(unseen) and out['tasks'] == out['tasks trained'] == 2
    counts = [Counter(task(*pair) for pair in trained) for task in tasks]
    guesses = [min(c for c in count if count[c] == max(count.values())) for count in counts]
    right = [task(*pair) == guess for task, guess in zip(tasks, guesses) for pair in unseen]
    assert out['accuracy, unseen, of the commonest answer'] == pytest.approx(np.mean(right))
    logits[torch.arange(49), d.y[:, 0]] = 9
    for task, logits, solved in (('a*b,a+b', logits, 1), ('a-b', logits[:, :7], 0)):
        out = analyze.answers(SimpleNamespace(p=7, d=data.make(task, 7), rows=rows, logits=logits))
        assert out['tasks at .99, unseen'] == solved
        assert ('rows, unseen, nor swapped' in out) == (task != 'a-b')  # its swaps are no copies


def test_logits_of_answer_less_class_alone():
    """All of a planted sum of cosines, with noise a share by brute force, nearly nothing of noise."""
    d, noise = data.make('n%5,n%3', 7), normal(49, 8)
    cosines = torch.cat([torch.cos(2 * torch.pi / q * (y[:, None] - torch.arange(q)))
                         for q, y in zip(d.classes, d.y.T)], 1)
    name = 'logits: share of answer less class alone: mean, least'
    for logits in (cosines, cosines + noise, noise):
        found, shares = analyze.turning(SimpleNamespace(d=d, logits=logits))[name], []
        for q, y, block in zip(d.classes, d.y.T.tolist(), logits.split(d.classes, 1)):
            z = (block - block.mean(0) - block.mean(1, keepdim=True) + block.mean()).tolist()
            by_step = [np.mean([z[n][c] for n in range(49) for c in range(q) if (y[n] - c) % q == step])
                       for step in range(q)]
            shares.append(np.square(by_step).mean() / np.square(z).mean())
        assert found == pytest.approx([np.mean(shares), min(shares)], abs=1e-5)
    assert found[0] < 0.1  # of noise
    assert analyze.turning(SimpleNamespace(d=d, logits=cosines))[name] == pytest.approx([1, 1], abs=2e-3)


PLANTED = {  # numbers of an analysis by their labels, and as sentences have them; those of a list in braces
    'miiii': ({'rows, unseen': 6385, 'accuracy, unseen': 0.99996, 'tasks': 29, 'tasks trained': 28,
               'accuracy, unseen, of the commonest answer': 0.0768, 'tasks at .99, unseen': 27,
               'pure neurons': 974, 'neurons that vary': 1024, 'tasks learned': 26, 'separation': 0.9645,
               'own task without its group': 0.07505, 'other tasks without it': 0.9979,
               'own task without random neurons as strong': 0.9123,
               'separation, as strong random neurons: least, most': [-0.2957, -0.0911],
               'waves of q > 7': 108, 'dimensions of their letters': 50.21,
               'dimensions of their letters, by chance': [83.98, 90.81, 95.41],
               'neurons as one digit, own wave': [0.9989, 28, 0.1, 0.2],
               'neurons as one digit, a wave of another k': [0.08643, 0, 0.1, 0.2]},
              '6,385 .9999 .077 29 28 27 974 1,024 0 537 .075 .912 .998 26 .965 -.091 108 50.2 90.8 '
              '.999 .086'),
    'nanda': ({'key frequencies': [1, 3, 21], 'logits in key cosines': 0.9078, 'restricted loss': 3.261e-7,
               'logits in as many others': 3.275e-5, 'excluded loss': 5.672, 'loss on all inputs': 1.761e-5,
               'rows, unseen, nor swapped': 6270, 'accuracy, unseen, nor swapped': 1.0},
              '3 .908 3e-5 3e-7 5.67 2e-5 4.73 6,270 1.0'),
    'a*b': ({'W_E effective frequencies': 55.91, 'W_E effective frequencies by logarithm': 8.08,
             'tasks at .99, unseen': 0, 'rows, train': 3831, 'accuracy, train': 1.0},
            '55.9 8.08 55.2 54.4 56 3,831 1.0'),
    'add': ({'filtered: nothing': [0.5, 0.61, 0.82, 0, 0], 'tau, the highest low frequency': 22,
             'filtered: low from MLP': [0.11, 0, 0], 'filtered: low from MLP, random': [0.97, 0, 0],
             'filtered: high from MLP': [0.23, 0, 0], 'filtered: high from MLP, random': [0.46, 0, 0],
             'W_E periods that stand out': [169.2, 4.92]},
            '.61 .82 .044 .177 225 22 .11 .97 .23 .46 169 4.92 none')}  # near 112 are 559 and 2,263 sums
START = {'pure neurons': 0, 'neurons that vary': 537, 'W_E effective frequencies': 55.2,
         'W_E effective frequencies by logarithm': 54.4, 'W_E periods that stand out': []}


@pytest.mark.parametrize('task', PLANTED)
def test_sentences_have_the_numbers(task):
    """All of them, each number in its own form. Without one of them its sentence is left out, no other."""
    final, expected = PLANTED[task]
    numbers = dict(config=dict(task=task, p=113), final=final, initial=START)
    told = analyze.sentences(numbers)
    words = {word.strip('():;').rstrip('.,') for text in told for word in text.split()}
    assert not set(expected.split()) - words and not any('{' in text for text in told)
    for name in final.keys() - {'tasks', 'tasks at .99, unseen', 'key frequencies'}:
        left = {other: value for other, value in final.items() if other != name}
        fewer = analyze.sentences(numbers | dict(final=left))
        assert len(fewer) == len(told) - 1 and not set(fewer) - set(told), name
    assert analyze.sentences(numbers | dict(final={}, initial={})) == []


def test_every_label_is_defined(folders, tmp_path):
    """On the page that the analysis names, in the first column of a table; there … stands for any words."""
    grouped = run_of(*'--p 13 --train_frac 0.8 --epochs 300 --spectra_every 50 --out'.split(), tmp_path)
    section = (HERE / 'assets/report.md').read_text().split('\n## 10. Labels\n')[1]
    cells = [line.split(' | ')[0] for line in section.splitlines() if line.startswith('| `')]
    labels = [label for cell in cells for label in re.findall('`([^`]+)`', cell)]
    patterns = [re.escape(label).replace('…', '.+') for label in labels]
    found = {name for folder in (*folders.values(), grouped) for name in analyze.load_run(folder).final()}
    assert len(found) > 80 and {'separation', 'W_L FFD', 'filtered: nothing', 'restricted loss'} < found
    assert not [name for name in found if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    for headings in (told(folder, 'analysis')['headings'] for folder in folders.values()):
        assert all(f'\n| {heading} | |\n' in section for heading in headings)


def test_the_end_of_a_run_in_words():
    """How many tasks are right, when they came; what helps where none did."""
    def words(*epochs, shuffled=False):
        tasks = [dict(test_acc=0.5 if e is None else 0.99, grok_epoch=e) for e in epochs]
        return ' '.join(train.in_words(tasks, shuffled).split())
    assert {2, 3, 7, 1408} <= set(numbers_of(words(1408, None, 7))) and 12 in numbers_of(words(12))
    options = re.findall('--([a-z_]+)', words(None, None))
    assert options and not set(options) - train.OPTIONS.keys()
    assert {0, 2} <= set(numbers_of(words(None, None)))
    assert '--' not in words(None, shuffled=True) + words(3, None)


def test_what_a_run_came_to(folders):
    """The summary by hand, for every task. Test rows are of two kinds where a and b may be swapped: sums,
    products, n mod q if p mod q is 1."""
    symmetric = {'(x0 + x1) mod 11', 'a*b', 'n mod 2', 'n mod 5', 'x0 + x1'}
    for folder in folders.values():
        run, s = analyze.load_run(folder), told(folder)
        d, (logits, _), rows = run.data, run.forward(), dict(zip(('train', 'valid', 'test'), run.rows))
        trained, _, test = ([(n % 11, n // 11) for n in some.tolist()] for some in run.rows)
        for task, y, block in zip(s['tasks'], d.y.T, logits.split(d.classes, 1), strict=True):
            right, loss = block.argmax(1) == y, functional.cross_entropy(block, y, reduction='none')
            for name, some in rows.items():
                expected = [right[some].float().mean().item(), loss[some].mean().item()]
                assert [task[f'{name}_acc'], task[f'{name}_loss']] == pytest.approx(expected, rel=1e-4)
            for kind, is_seen in dict(seen=True, unseen=False).items():
                some = [a + 11 * b for a, b in test if ((b, a) in trained) == is_seen]
                expected = right[some].float().mean().item() if task['name'] in symmetric else None
                assert task.get(f'test_acc_swapped_{kind}') == pytest.approx(expected)
        for name in ('train', 'valid'):
            accuracies = [task[f'{name}_acc'] for task in s['tasks']]
            assert np.allclose(run.arrays()[f'{name}_accuracies'], accuracies)
        objective = np.mean([task['valid_loss'] / math.log(task['classes']) for task in s['tasks']])
        assert s['objective']['valid'] == pytest.approx(objective, rel=1e-5)
    cases = {(0, 1, 0, 1, 1, 1): (1, 3), (1, 1, 1): (0, 0), (0, 0, 0): (None, None), (1, 1, 0): (0, None)}
    for acc, epochs in cases.items():
        assert train.grok_epochs(np.array(acc[:-1]), acc[-1]) == epochs


def test_an_analysis_is_kept_until_it_is_old_damaged_or_of_another_run(copied, folders, monkeypatch):
    folder, made, real = copied('nanda'), [], analyze.take_apart
    monkeypatch.setattr(analyze, 'take_apart', lambda run: made.append(run) or real(run))
    final, other = told(folder, 'analysis')['final'], (folders['sums'] / 'analysis.json').read_bytes()
    cases = [(lambda: None, 0), (lambda: os.utime(folder / 'ckpt.pt', (3e9, 3e9)), 1),
             (lambda: (folder / 'analysis.json').write_bytes(other[:99]), 2),
             (lambda: (folder / 'analysis.json').write_bytes(other), 3)]
    for spoil, times in cases:
        os.utime(folder / 'ckpt.pt', (1e9, 1e9))
        spoil()
        run = analyze.load_run(folder)
        assert run.final().keys() == final.keys() and 'profile' in run.arrays() and len(made) == times
        assert run.final()['W_E Gini'] == pytest.approx(final['W_E Gini'], rel=1e-3)


def test_a_run_without_snapshots_records_or_room_for_waves(copied, monkeypatch, capsys):
    """What is lacking is told, the rest is there; the numbers of the snapshots may take their place."""
    folder = copied('nanda')
    before, arrays = told(folder, 'analysis'), dict(np.load(folder / 'analysis.npz'))
    np.savez(folder / 'snapshots.npz', **{name: arrays[name] for name in arrays if name[:9] == 'snapshot_'})
    shutil.rmtree(folder / 'snapshots')
    assert 'note' not in output_of(capsys, analyze, folder)
    again = dict(np.load(folder / 'analysis.npz'))
    assert told(folder, 'analysis') == before and again.keys() == arrays.keys()
    assert all(np.array_equal(again[name], values) for name, values in arrays.items())
    for name in ('snapshots.npz', 'metrics.npz'):
        (folder / name).unlink()
    monkeypatch.setattr(analyze, 'wave_solver', lambda *_: data.refuse('no room'))
    printed, final = output_of(capsys, analyze, folder), told(folder, 'analysis')['final']
    assert all(words in printed for words in ('snapshots', 'metrics.npz', 'no room'))
    assert 'pure neurons' not in final and 'logits in key cosines' in final


def test_snapshots_and_records_after_the_checkpoint_are_left_out(copied):
    folder = copied('miiii')
    torch.save(checkpoint(folder) | dict(step=11), folder / 'ckpt.pt')
    os.utime(folder / 'ckpt.pt', (1e9, 1e9))  # older than the analysis of another epoch
    run = analyze.load_run(folder)
    assert len(run.records['valid_acc']) == 11 and run.records['spectra_epoch'].tolist() == [0, 8]
    assert run.arrays()['snapshot_epoch'].tolist() == [0, 1, 2, 3, 4, 6, 8, 11]
    torch.save(checkpoint(folder) | dict(step=0), folder / 'ckpt.pt')  # killed at its first save
    assert analyze.load_run(folder).records == {}


# ---------------------------------------------------------------- figures

def drawn(fig):
    """The numbers that the artists of a figure have: heights and widths of bars, lines, images, meshes, tops
    of stems and areas, squares of `hinton` as a grid."""
    for ax in fig.axes:
        bars = [patch for patch in ax.patches if isinstance(patch, plots.plt.Rectangle)]
        yield from ([bar.get_height() for bar in bars], [bar.get_width() for bar in bars])
        yield from (line.get_ydata() for line in ax.lines)
        shown = (*ax.images, *ax.collections)
        yield from (some.get_array() for some in shown if some.get_array() is not None)
        grid = np.zeros((99, 99))
        for artist in ax.collections:
            corners = [path.vertices for path in artist.get_paths()]
            yield from ([vertices[-1, 1] for vertices in corners], artist.get_offsets())
            yield from (vertices[len(vertices) // 2 + 1:-1, 1][::-1] for vertices in corners)
            for vertices in corners * isinstance(artist, plots.PolyCollection):
                x, y = vertices[:4].mean(0).round().astype(int).clip(0, 98)
                grid[y, x] += np.ptp(vertices[:, 0]) ** 2 * (1 if len(artist.get_facecolor()) else -1)
        yield scaled(grid)[:int(max(ax.get_ylim()) + 0.5), :int(ax.get_xlim()[1] + 0.5)]


def scaled(grid):
    return np.asarray(grid) / np.abs(grid).max().clip(1e-30)


def of_snapshots(*names):
    return lambda run, a, r: [a[f'snapshot_{name}'] for name in names]


def scores_of(run, *columns):
    rows = [value for name, value in run.final().items() if 'filtered' in name and 'random' not in name]
    return [np.array(rows)[:, some].T.flatten() for some in columns]


VARIANCES = [f'variance of neurons in {of}' for of in ('x0 or x1 alone', 'sum waves', 'difference waves')]
SHOWN = [  # figure, a run, the numbers that it must show, of the run, its arrays, its records
    ('accuracy', 'miiii', lambda run, a, r: [r['train_acc'].T, r['valid_acc'].T]),
    ('curves', 'miiii', lambda run, a, r: [r['train_loss'].mean(1), r['valid_loss'].mean(1)]),
    ('gradients', 'nanda', lambda run, a, r: [(r['grad_norm'] / r['grad_norm'].max(0)).T]),
    ('singular_vectors', 'nanda', lambda run, a, r: [
        scaled(a['left_vectors'].T[:run.final()['W_E singular values to 50 %']])]),
    ('neuron', 'nanda', lambda run, a, r: [scaled(a['neurons'][3]), np.fft.fftshift(a['neurons_dft'][3], 0)]),
    ('neurons', 'miiii', lambda run, a, r: map(scaled, a['neurons'][:3])),
    ('waves', 'nanda', lambda run, a, r: [a['wave_shares'][0]]),
    ('waves', 'miiii', lambda run, a, r: [[(k / q, (2, 3, 5, 7).index(q)) for q, k in a['freqs']]]),
    ('variance', 'miiii', lambda *of: np.cumsum(of_snapshots(*VARIANCES)(*of), 0)),
    ('omega', 'nanda', of_snapshots('waves (q, k) carried', 'active bins of a neuron',
                                    'active frequencies of a neuron, averaged')),
    ('clusters', 'miiii', lambda run, a, r: [np.sort(a['neuron_wave_share'])[::-1]]),
    ('circuits', 'miiii', lambda run, a, r: [a['necessary'], a['group_sizes'], a['sufficient'].diagonal()]),
    ('shared', 'miiii', lambda run, a, r: [a['heads']]),
    ('mechanism', 'nanda', lambda run, a, r: [a['fit'], a['profile']]),
    ('mechanism', 'nanda', of_snapshots('loss on all inputs', 'restricted loss', 'excluded loss')),
    ('bases', 'formulas', lambda run, a, r: [a[f'{W}_cos_sin'].flatten() for W in ('W_E', 'W_L_mult')]),
    ('pattern', 'formulas', lambda run, a, r: [*a['pattern'], a['pattern'][1][np.ix_(*[a['by_log']] * 2)]]),
    ('components', 'sums', lambda run, a, r: a['class_spectra']),
    ('filters', 'sums', lambda run, a, r: scores_of(run, [0, 1, 2], [3, 4])),
    ('positional', 'nanda', lambda run, a, r: [scaled(a['W_pos'][:2])]),
    ('singular_values', 'nanda', lambda run, a, r: [a['singular_values'] / a['singular_values'].sum()]),
    ('embedding', 'nanda', lambda run, a, r: [scaled(a['W_E_fourier']), a['W_E_norms']]),
    ('attention', 'formulas', lambda run, a, r: a['attention']),
    ('density', 'formulas', of_snapshots('W_E FFD', 'W_L FFD', 'W_E FCR', 'W_L FCR')),
    ('inputs', 'nanda', lambda *_: [scaled([[x for j in range(11) for x in (i, j)] for i in range(11)])]),
    ('targets', 'nanda', lambda *_: [scaled([[(i + 11 * j) % q for j in range(11)] for i in range(11)])
                                     for q in (2, 3, 5, 7)])]


@pytest.mark.parametrize('name, of, expected', SHOWN)
def test_a_figure_shows_the_numbers(folders, name, of, expected):
    run, (draw, takes) = analyze.load_run(folders[of]), plots.FIGURES[name]
    found = [np.asarray(values) for values in drawn(draw(*[run] * (takes != 'none')))]
    for i, values in enumerate(map(np.asarray, expected(run, run.arrays(), run.records))):
        assert any(x.shape == values.shape and np.allclose(x, values, atol=1e-5) for x in found), i


def test_every_figure_is_drawn_or_told(folders, tmp_path, monkeypatch, capsys, fault):
    monkeypatch.chdir(tmp_path)
    np.save('W.npy', normal(50, 8))
    runs, lacking = {name: analyze.load_run(folders[name]) for name in ('miiii', 'nanda', 'sums')}, set()
    for (name, run), (figure, (draw, takes)) in itertools.product(runs.items(), plots.FIGURES.items()):
        try:
            fig = draw(*dict(one=[run], any=[run], none=[], file=['W.npy'])[takes])
        except KeyError:
            lacking.add((name, figure))
            continue
        for ax in fig.axes:
            assert [*ax.collections, *ax.lines, *ax.patches, *ax.images] or not ax.axison, figure
    assert not plots.plt.get_fignums()  # a notebook shows no figure twice
    assert {('miiii', 'mechanism'), ('sums', 'circuits')} <= lacking
    assert {figure for name, figure in lacking if name == 'nanda'} == {
        'alphabet', 'spelling', 'components', 'filters'}
    r, lines = runs['miiii'].records, plots.curves(runs['miiii']).axes[0].lines
    by_label = {line.get_label()[:5]: line.get_ydata() for line in lines}
    assert all(np.allclose(by_label[rows], r[f'{rows}_acc'].mean(1)) for rows in ('train', 'valid'))
    some = {name: plots.FIGURES[name] for name in ('inputs', 'pattern', 'positional')}
    monkeypatch.setattr(plots, 'FIGURES', some)
    words = [folders['miiii'], folders['formulas'], '--data', '--to', 'to', '--embedding', 'W.npy']
    printed = output_of(capsys, plots, *words)
    drawn = ('to/figures/inputs', 'to/figures/embedding_W', 'to/formulas/figures/pattern',
             'to/miiii/figures/positional')
    for kind in ('png', 'svg'):
        assert {str(file) for file in Path().rglob(f'*.{kind}')} == {f'{file}.{kind}' for file in drawn}
    assert 'note' not in printed  # what is not for a task is told of only if it is asked for
    assert 'pattern' in fault(plots, folders['miiii'], '--only', 'pattern')
    printed = output_of(capsys, plots, folders['miiii'], folders['formulas'], '--only', 'pattern')
    assert [line.split()[:2] for line in printed.splitlines() if 'note' in line] == [['note:', 'pattern']]


# ---------------------------------------------------------------- nothing lost, nothing assumed

@pytest.mark.parametrize('n, times', [(2, 1), (4, 3), (6, 2), (7, 30)])
@pytest.mark.parametrize('name', ['replace', 'fsync'])
def test_a_write_that_fails_for_a_moment(tmp_path, monkeypatch, capsys, name, n, times):
    """From the n-th file on, so many times: told, tried again, and all is there as if nothing had happened.
    From the seventh on it is the last ones, which wait for the disk."""
    words = '--lamb 0.5 --epochs 12 --snapshots 1 --spectra_every 5 --out'.split()
    plain = run_of(*words, tmp_path / 'plain')
    real, calls, slept = getattr(os, name), itertools.count(1), []

    def fails(*of):
        if n <= next(calls) < n + times:
            raise PermissionError(13, 'held')
        return real(*of)
    monkeypatch.setattr(os, name, fails)
    monkeypatch.setattr(data.time, 'sleep', slept.append)
    folder = run_of(*words, tmp_path / 'hindered')
    same_run(plain, folder)
    names = [{file.relative_to(run) for file in run.rglob('*') if file.is_file()} for run in (plain, folder)]
    assert names[0] == names[1] and sum(slept) < 60
    for file in sorted(plain.glob('snapshots/*')):
        assert all(map(torch.equal, *(data.load(run / 'snapshots' / file.name, ('model',))['model'].values()
                                      for run in (plain, folder))))
    printed = capsys.readouterr().out
    assert 'note: cannot write' in printed and 'note: ;' not in printed


def test_late_records_are_written_before_the_checkpoint_that_waits_for_them(tmp_path, monkeypatch):
    late = {}
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', lambda *_: open('/dev/full/no'))
        for name in ('metrics.npz', 'ckpt.pt', 'metrics.npz'):  # of two saves
            data.write(tmp_path / name, lambda f: f.write(b'1'), late)
    data.flush(late)
    assert not late and {*os.listdir(tmp_path)} == {'metrics.npz', 'ckpt.pt'}


@pytest.mark.parametrize('n', [1, 7])
def test_a_write_that_keeps_failing(tmp_path, monkeypatch, fault, n):
    """The first file, which shows whether the folder works, or the last ones: refused, and none is half."""
    real, calls, full = os.fsync, itertools.count(1), os.open('/dev/full', os.O_WRONLY)
    monkeypatch.setattr(os, 'fsync', lambda f: os.write(full, b'1') if next(calls) >= n else real(f))
    monkeypatch.setattr(data.time, 'sleep', lambda seconds: None)
    words = '--epochs 12 --snapshots 1 --out'.split()
    assert 'No space left' in fault(train, *TINY, *words, tmp_path / 'out')
    assert not [*tmp_path.rglob('*.tmp'), *tmp_path.rglob('summary.json')]
    assert n == 1 or checkpoint(tmp_path / 'out')['step'] == 0
    assert n == 7 or not [*tmp_path.rglob('*.pt')]


@pytest.mark.parametrize('bad, step', [('00000001.pt', 12), ('metrics.npz', 0)])
def test_a_file_that_cannot_be_written_holds_up_no_other(tmp_path, monkeypatch, bad, step):
    """But a checkpoint waits for its records, so that the folder can be resumed at any time."""
    def fails(source, target):
        if Path(target).name == bad:
            raise PermissionError(13, 'held')
        real(source, target)
    words, real = '--lamb 0.5 --epochs 12 --snapshots 1 --spectra_every 5 --out'.split(), os.replace
    plain = run_of(*words, tmp_path / 'plain')
    with monkeypatch.context() as patch, pytest.raises(data.Refusal, match=bad):
        patch.setattr(os, 'replace', fails)
        patch.setattr(data.time, 'sleep', lambda seconds: None)
        run_of(*words, tmp_path / 'out')
    assert checkpoint(tmp_path / 'out')['step'] == step
    same_run(plain, resumed(tmp_path / 'out'))


@contextlib.contextmanager
def set_to(name, value, former):
    """torch.set_NAME(value) for a while."""
    getattr(torch, f'set_{name}')(value)
    try:
        yield
    finally:
        getattr(torch, f'set_{name}')(former)


AMBIENT = dict(
    dtype=lambda: set_to('default_dtype', torch.float64, torch.float32), no_grad=torch.no_grad,
    inference=torch.inference_mode, autocast=lambda: torch.autocast('cpu', torch.bfloat16),
    device=lambda: torch.device('meta'), default_device=lambda: set_to('default_device', 'meta', None),
    precision=lambda: set_to('float32_matmul_precision', 'medium', 'highest'))


@pytest.mark.parametrize('name', AMBIENT)
def test_what_a_notebook_has_set_is_of_no_matter_and_given_back(tmp_path, name):
    def states():
        return [torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu'),
                torch.get_float32_matmul_precision(), torch.get_rng_state().tolist()]
    words = '--lamb 0.5 --epochs 6 --snapshots 1 --spectra_every 5 --out'.split()
    plain = run_of(*words, tmp_path / 'plain')
    logits, numbers = analyze.load_run(plain).forward()[0], analyze.load_run(plain).analysis()[0]
    with AMBIENT[name]():
        torch.manual_seed(7)
        before = states()
        folder = run_of(*words, tmp_path / 'set')
        run = analyze.load_run(folder)
        assert torch.equal(run.forward()[0], logits)
        assert run.analysis()[0]['final'] == numbers['final']
        plots.curves(run)
        task_losses(run.forward()[0], run.data.y, run.data.classes)  # leaves nothing behind
        with pytest.raises(data.Refusal):
            run_of(*words, folder)
        assert states() == before
    same_run(plain, folder)


def test_figures_do_not_depend_on_matplotlibrc(folders):
    def png(fig):
        file = io.BytesIO()
        fig.savefig(file, dpi=40)
        return file.getvalue()
    run = analyze.load_run(folders['nanda'])
    plain = png(plots.embedding(run))
    with plots.plt.style.context('dark_background'):
        with plots.plt.rc_context({'font.size': 30, 'text.usetex': True}):
            fig = plots.embedding(run)
        assert png(fig) == plain


def test_the_end_of_a_run_is_evaluated_in_slices(tmp_path, monkeypatch):
    """By at most as many rows as an epoch has; its figures are those of all rows at once."""
    sizes, forward = [], Transformer.forward

    def watched(self, x, *of, **how):
        sizes.append(len(x))
        return forward(self, x, *of, **how)
    monkeypatch.setattr(Transformer, 'forward', watched)
    folder = run_of(*'--task a*b,a+b --train_frac 0.2 --epochs 2 --spectra_every 0 --out'.split(), tmp_path)
    assert max(sizes) <= 2 * 48  # the validation rows of two operations
    run = analyze.load_run(folder)
    logits, test = run.forward()[0][run.rows[2]], run.rows[2]
    for i, values in enumerate(zip(*task_losses(logits, run.data.y[test], run.data.classes))):
        task = told(folder)['tasks'][i]
        assert [task['test_loss'], task['test_acc']] == pytest.approx([v.item() for v in values], rel=1e-5)


def test_numbers_of_three_digits_end_with_their_scores():
    """What needs pairs is left out."""
    d = data.make('add', 5)._replace(y=torch.arange(125)[:, None] % 9)
    rows = dict(zip(('train', 'valid', 'test'), data.split(125, 0.5)))
    task, = train.scores(d, 5, rows, lambda some: torch.tensor([[2.0], [len(some)]]), np.ones((3, 1)))
    assert task['test_acc'] == 32 and 'test_acc_swapped_seen' not in task


def test_a_changed_model_does_not_falsify_older_runs(folders, monkeypatch):
    monkeypatch.setattr(Transformer, 'activation', staticmethod(functional.leaky_relu))
    for path in (folders['nanda'], HERE / 'assets/paper'):
        with pytest.raises(data.Refusal, match='another model'):
            analyze.load_run(path)


def test_small_things_are_told(tmp_path, monkeypatch, capsys):
    """Out of memory, slow bfloat16, a finished run, what a run is, the name of the folder one is in."""
    def main(argv):
        torch.empty(2 ** 60)
    monkeypatch.setattr(sys, 'argv', ['x.py'])
    with pytest.raises(SystemExit) as end:
        data.run_script(main)
    assert end.value.code == 2 and '--d_model' in capsys.readouterr().err
    monkeypatch.setattr(train, 'slow_bfloat16', lambda: True)
    folder = run_of('--precision', 'bfloat16', '--epochs', 1, '--out', tmp_path / 'x')
    resumed(folder)
    printed = capsys.readouterr().out
    assert 'note: this CPU' in printed and 'is finished' in printed
    run = analyze.load_run(folder)
    assert len(repr(run)) < 200 and str(folder) in repr(run)
    monkeypatch.chdir(folder)
    assert analyze.load_run('.', 'to').to == Path('to', 'x')
    assert [data.show(x) for x in (1.0, 0.99996, 0.98765, -2.0)] == ['1', '0.9999', '0.9877', '-2']


# ---------------------------------------------------------------- bad input

class Bomb:
    """Unpickled, it makes a file."""
    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def put(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        torch.save(content, path)


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    """A folder with a good run `source`, damaged copies of it, files without an embedding of 12 digits."""
    shelf = tmp_path_factory.mktemp('shelf')
    source = run_of('--task', 'a+b', '--epochs', 20, '--snapshots', 1, '--out', shelf / 'source')
    run_of('--task', 'a*b,a-b', '--epochs', 1, '--out', shelf / 'two')
    whole, good = (source / 'ckpt.pt').read_bytes(), checkpoint(source)
    config, W_E, bomb, flipped = good['config'], good['model']['W_E'], Bomb(), bytearray(whole)
    bomb.path = shelf / 'went_off'
    flipped[whole.index(W_E.numpy().tobytes()) + 50] ^= 64
    changed = dict(
        inside=dict(model=bomb), listed=dict(model=[]), other=dict(model=dict(W_E=torch.zeros(2))),
        infinite=dict(model=good['model'] | dict(W_E=W_E / 0)), newer=dict(config=config | dict(no=1)),
        older=dict(config={name: config[name] for name in config.keys() - {'focus'}}), many=dict(step='many'),
        forgetful=dict(optimizer=[state | dict(state={}) for state in good['optimizer']]), long=dict(step=40),
        viewer=dict(optimizer=[], filter={}, rng={}), no_rng=dict(rng={}),
        foreign=dict(model=Transformer(13, 32, 2, 13).state_dict()))
    files = {name: ('ckpt.pt', good | change) for name, change in changed.items()} | dict(
        half=('ckpt.pt', whole[:len(whole) // 2]), text=('ckpt.pt', b'hello'), bomb=('ckpt.pt', bomb),
        flipped=('ckpt.pt', bytes(flipped)), a_list=('ckpt.pt', [1, 2]), one_key=('ckpt.pt', dict(model=1)),
        no_records=('metrics.npz', b''),
        other_records=('metrics.npz', (shelf / 'two/metrics.npz').read_bytes()),
        other_snapshot=('snapshots/00000004.pt', (shelf / 'two/ckpt.pt').read_bytes()),
        half_snapshot=('snapshots/00000004.pt', b'half'), blocked=('figures', b'in the way'))
    for name, (file, content) in files.items():
        shutil.copytree(source, shelf / name)
        put(shelf / name / file, content)
    ones = np.ones((12, 16))
    files = {'w.csv': b'1,2', 'empty.pt': b'', 'text.npy': b'1,2,3', 'ones.npy': ones, 'short.npy': ones[:11],
             'nan.npy': ones * np.nan, 'row.npy': ones[:, 0], 'object.npy': np.array([bomb], dtype=object),
             'bomb.pt': bomb, 'dict.pt': dict(W=1), 'complex.pt': torch.ones(12, 16) * 1j,
             'sparse.pt': torch.ones(12, 16).to_sparse(), 'meta.pt': torch.ones(12, 16, device='meta')}
    for name, content in files.items():
        put(shelf / name, content)
    return shelf


here = f'train {" ".join(TINY)} --epochs 3 --out {{out}}'
FAULTS = {  # a command: what follows it | an option, a path or a number in its error, if not all that follows
    f'{here} ': '''--p 12 | 12; --task masked --p 7 | masked; --resume | {out}; --task=-a+c | 'c'
        --train_frac 1 | train_frac; --train_frac nan | train_frac; --d_model 30 --n_heads 4 | 30
        --n_heads 0 | --n_heads; --dropout 1 | --dropout; --lr inf | --lr; --lam 1 | --lam; --p 499 | 499
        --preset auto | --preset; --preset tenfold --task nanda | tenfold; --device cuda:99 | cuda:99
        --curriculum 99999 | --curriculum; --curriculum 2 --epochs 9 --task nanda | --curriculum
        --freeze | --letters; --copy embed | --init_from; --letters 1 | 1
        --letters 5 --task nanda | --letters; --letters 5 --init_from x | --letters
        --sweep_space lr=1,2 | --sweep_space''',
    f'{here} --task a*b --init_from {{shelf}}/': '''source --p 13 | [14, 32]
        source --d_model 16 | [12, 16]; half; source --n_heads 4 --copy block | [2, 32, 16]
        source --task a+b,a-b --copy embed | [12, 32]; listed; source --task miiii | [32, 11]
        source --freeze | --freeze; source --copy W_E | W_E; none; infinite; inside''',
    f'{here} --task add --p 12 --d_model 16 --init_from {{shelf}}/': '''ones.npy --d_model 32 | [12, 32]
        none.npy; ones.npy --copy block | --copy; w.csv; empty.pt; text.npy; object.npy; bomb.pt; dict.pt
        nan.npy; sparse.pt; complex.pt; meta.pt; row.npy; short.npy''',
    f'{here[:-5]}{{shelf}}/': 'source | --resume; w.csv; w.csv/x',
    'train --resume --epochs 30 --out {shelf}/': '''half; text; flipped; bomb; inside; a_list; one_key
        newer; older; listed; other; no_rng; many; forgetful; no_records; viewer; source --lr 0.5 | --lr
        source --p 13 | 13; source --epochs 5 | --epochs; source --init reference | reference
        source --preset paper | paper''',
    f'{here} --sweep ': '''385 | 384; -1 | --sweep; 2 --resume | --resume; 2 --bench 3 | --bench
        1 --sweep_space lr | --lr; 2 --sweep_space lr=1e-3,fast | fast
        2 --sweep_space leraning_rate=1,2 | --leraning_rate; 2 --sweep_space lr=1,2 --lr 1 | 1
        3 --sweep_space task=a+b,a+c,a-b | a+c; 4 --sweep_space train_frac=0.3,0.4,0.5,1 | train_frac''',
    'analyze ': '--to x | --embedding; --record | --embedding',
    'analyze --embedding {shelf}/': 'ones.npy; none.npy; bomb.pt; nan.npy',
    'analyze {shelf}/': '''source --ta 2 | --ta; source --cut 99 | 99; source --cut 3, | --cut
        two --keep 3 | two; source --cut 3 --keep 5 | --keep; source --keep= | --keep
        source --cut 3 --record | --record; many; long; half_snapshot | 00000004.pt
        no_records | metrics.npz; infinite; one_key; foreign; none; half; other_snapshot; other_records
        blocked --to {shelf}/blocked/figures | figures''',
    'plots ': '''--only accuracy | --embedding; --data --only nothing | --only
        --data --only waves | waves; {shelf}/source --only polar | --data; {shelf}/none | none/ckpt.pt
        {shelf}/long | long; {shelf}/blocked --only accuracy | blocked/figures
        {shelf}/blocked --only loss | --to
        --embedding {shelf}/object.npy | object.npy'''}
CASES = [(first, *case.split('|')) for first, some in FAULTS.items()
         for case in some.replace('\n', ';').split(';')]


@pytest.mark.parametrize('case', CASES)
def test_a_fault_is_told_in_one_line_and_leaves_nothing(shelf, tmp_path, monkeypatch, fault, case):
    first, more, says, *_ = *case, case[1]
    monkeypatch.chdir(tmp_path)
    before = contents(shelf)
    script, *args = shlex.split((first + more.strip()).format(shelf=shelf, out=tmp_path))
    line = fault(dict(train=train, analyze=analyze, plots=plots)[script], *args)
    assert says.strip().format(out=tmp_path) in line
    assert not list(tmp_path.iterdir()) and contents(shelf) == before


# ---------------------------------------------------------------- resume, signals, output

@pytest.mark.parametrize('extra', [
    '--optimizer adamw --lamb 0.5', '--dropout_mask batch', '--init reference --lamb 2 --task a*b,a+b'])
def test_resume_is_exact(tmp_path, at_epoch, extra):
    args, seen = [*extra.split(), '--decay_from', 1, '--spectra_every', 7], []
    straight = run_of(*args, '--epochs', 60, '--out', tmp_path / 'a')
    halves = run_of(*args, '--epochs', 23, '--out', tmp_path / 'b')
    at_epoch(30, lambda: seen.append(told(halves)['epochs']))
    same_run(straight, resumed(halves, '--epochs', 60))  # its own options hold
    assert seen == [23] and told(halves)['epochs'] == 60  # a summary is kept until there is a new one


@pytest.mark.parametrize('name, where', [('SIGINT', 'step'), ('SIGTERM', 'write'), ('SIGHUP', 'step')])
def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch, capsys, at_epoch, name, where):
    """The signal comes in the middle of an epoch or of a write: the epoch is done and saved."""
    number, real, out = getattr(signal, name), os.replace, tmp_path / "Anna's run"
    straight, former = run_of('--epochs', 50, '--out', tmp_path / 'straight'), signal.getsignal(number)

    def replace(source, target):
        if Path(target).name == '00000032.pt':
            os.kill(os.getpid(), number)
        real(source, target)
    if where == 'write':
        monkeypatch.setattr(os, 'replace', replace)
    else:
        at_epoch(32, lambda: os.kill(os.getpid(), number))
    with pytest.raises((KeyboardInterrupt, SystemExit)) as end:
        run_of('--epochs', 50, '--out', out)
    assert end.type is KeyboardInterrupt if name == 'SIGINT' else end.value.code == 128 + number
    assert signal.getsignal(number) == former  # handlers are given back
    assert checkpoint(out)['step'] == 33 and not (out / 'summary.json').exists()
    _, *command = capsys.readouterr().out.splitlines()[-1].partition(sys.executable)
    if name == 'SIGINT':  # the command that is printed goes on with it
        assert subprocess.run(''.join(command), shell=True, capture_output=True).returncode == 0
    same_run(straight, resumed(out))


def test_a_second_signal_leaves_at_once_and_nohup_is_kept(tmp_path, at_epoch):
    at_epoch(31, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run_of('--epochs', 50, '--out', tmp_path / 'a')
    assert checkpoint(tmp_path / 'a')['step'] == 0  # as it was saved before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_epoch(5, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert told(run_of('--epochs', 9, '--out', tmp_path / 'b'))['epochs'] == 9
    assert signal.signal(signal.SIGHUP, signal.SIG_DFL) == signal.SIG_IGN


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path, at_epoch):
    seen, before = [], signal.getsignal(signal.SIGINT)
    at_epoch(3, lambda: seen.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=run_of, args=('--epochs', 5, '--out', tmp_path / 'a'))
    thread.start()
    thread.join()
    run_of('--epochs', 5, '--out', tmp_path / 'b')  # while here they are taken
    assert told(tmp_path / 'a')['epochs'] == 5 and seen[0] == before != seen[1]


def python(program, *args, **how):
    """A process that runs a program text with the project at hand."""
    env = os.environ | dict(PYTHONPATH=str(HERE), PYTHONIOENCODING='ascii')
    return subprocess.Popen([sys.executable, '-c', program, *map(str, args)], env=env, text=True, **how)


def in_forks(*jobs):
    """Runs of train.py in forks of one Python: (what to execute before, arguments) each -> exit codes."""
    program = '''
import json, os, sys, torch._dynamo, data, train
for before, argv in json.loads(sys.argv[1]):
    if not os.fork():
        exec(before)
        sys.argv[1:] = argv
        data.run_script(train.main)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr)
'''
    jobs = json.dumps([(before, [*map(str, args)]) for before, args in jobs])
    with python(program, jobs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        return p.communicate()[1].split()


def test_kill_at_any_write_leaves_a_run_that_goes_on(tmp_path):
    """The process dies by SIGKILL when it would rename its n-th file, at its start or while it goes on."""
    die = ('files, real = [0] * {}, os.replace\n'
           'os.replace = lambda *of: real(*of) if files and not files.pop() else os.kill(os.getpid(), 9)')
    args = ['--decay_from', 1, '--snapshots', 1, '--spectra_every', 5, '--epochs']
    straight = run_of(*args, 12, '--out', tmp_path / 'straight')
    half = run_of(*args, 6, '--out', tmp_path / 'half')
    start, jobs = [*TINY, *map(str, args), '12', '--out', str(tmp_path / 'start')], []
    for n in range(4):  # a snapshot, metrics, checkpoint, summary
        shutil.copytree(half, tmp_path / f'{n}')
        jobs.append((die.format(n), ['--resume', '--epochs', 12, '--out', tmp_path / f'{n}']))
    assert in_forks((die.format(0), start), *jobs) == ['-9'] * 5
    assert not (tmp_path / 'start/ckpt.pt').exists()
    train.main(start)  # before there is a checkpoint, the folder is free
    for folder in (tmp_path / 'start', *(resumed(tmp_path / f'{n}', '--epochs', 12) for n in range(4))):
        same_run(straight, folder)


def test_a_run_goes_on_when_its_output_goes_away(tmp_path):
    """A full disk, a reader that has left, nothing to write to at all, letters that cannot be shown."""
    left = 'reader, writer = os.pipe(); os.dup2(writer, 1); os.close(reader)'
    ways = ["os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", left, 'sys.stdout = sys.stderr = None', '']
    jobs = [(way, [*TINY, '--epochs', 5, '--out', tmp_path / f'ü{i}']) for i, way in enumerate(ways)]
    assert in_forks(*jobs) == ['0'] * 4
    assert [told(tmp_path / f'ü{i}')['epochs'] for i in range(4)] == [5] * 4


def test_a_folder_is_held_while_its_run_is_at_work(tmp_path, fault):
    program = '''
import sys, time, train
train.snapshot_due = lambda epoch, _: epoch == 5 and [print('here', flush=True), time.sleep(20)]
train.main(sys.argv[1:])
'''
    args, out = ['--epochs', 12, '--snapshots', 0, '--out'], tmp_path / 'out'
    straight = run_of(*args, tmp_path / 'straight')
    with python(program, *TINY, *args, out, stdout=subprocess.PIPE) as p:
        assert 'here\n' in iter(p.stdout.readline, '')
        before = contents(out)
        for words in (['--resume', '--out', out], [*TINY, *args, out]):
            assert str(out) in fault(train, *words) and contents(out) == before
        p.kill()
    same_run(straight, resumed(out))  # free again


def test_progress_is_one_line_rewritten_on_a_terminal(tmp_path):
    program = '''
import sys, time, train
train.snapshot_due = lambda epoch, _: time.sleep(1.1 if epoch in (5, 9) else 0)
train.main(sys.argv[1:])
'''
    terminal, child = pty.openpty()
    shown = b''
    with python(program, *TINY, '--epochs', 12, '--out', tmp_path, stdout=child, stderr=subprocess.DEVNULL):
        os.close(child)
        with contextlib.suppress(OSError):  # the terminal hangs up when the run ends
            while piece := os.read(terminal, 4096):
                shown += piece
    os.close(terminal)
    rewritten, = (line for line in shown.decode().split('\r\n') if line.startswith('\r'))
    texts = rewritten.split('\r\033[K')[1:]
    assert len(texts) == 3 and all(len(text) < 80 and '/12' in text for text in texts)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    args = '--optimizer adamw --lr 10 --weight_decay 100 --decay_from 1 --epochs 60'.split()
    with pytest.raises(train.Diverged, match='n mod|W_'):
        run_of(*args, '--out', tmp_path / 'a')
    assert all(w.isfinite().all() for w in checkpoint(tmp_path / 'a')['model'].values())
    assert not list(tmp_path.rglob('summary.json'))


# ---------------------------------------------------------------- weights from elsewhere, the sweep

@pytest.mark.parametrize('how, optimizer', [
    ('embed --freeze', 'adamw --lamb 0.5'), ('block', 'adamw --lamb 0.5'), ('block --freeze', 'muon'),
    ('all', 'muon')])
def test_weights_of_another_run(shelf, tmp_path, how, optimizer):
    copied, frozen, filtered = how.split()[0], '--freeze' in how, 'lamb' in optimizer
    task = ['--task', '2*a+b', '--dropout', 0, '--decay_from', 1]
    args = [*task, *f'--copy {how} --optimizer {optimizer}'.split(), '--init_from', shelf / 'source']
    straight = run_of(*args, '--epochs', 20, '--out', tmp_path / 'a')
    theirs = checkpoint(shelf / 'source')['model']
    own = first_weights(run_of(*task, '--epochs', 1, '--out', tmp_path / 'own'))  # by the seed alone
    groups = dict(embed=['W_E'], block=['W_Q', 'W_K', 'W_V', 'W_O', 'W_in', 'W_out'], all=list(own))
    start, ckpt = first_weights(straight), checkpoint(straight)
    held = groups[copied] if frozen else []
    for name, w in start.items():
        assert torch.equal(w, (theirs if name in groups[copied] else own)[name]), name
        assert torch.equal(w, ckpt['model'][name]) == (name in held)  # bit for bit
    moving = [name for name in start if name not in held]
    assert list(ckpt['filter']) == (moving if filtered else [])
    assert sum(len(optimizer['state']) for optimizer in ckpt['optimizer']) == len(moving)
    assert records(straight)['grad_norm_names'].tolist() == moving
    same_run(straight, resumed(run_of(*args, '--epochs', 8, '--out', tmp_path / 'b'), '--epochs', 20))


def test_moduli_that_divide_each_other(folders):
    """A group serves several tasks, so nothing is said of separation, nor of primes."""
    run = analyze.load_run(folders['moduli'])
    final, arrays = run.analysis()[0]['final'], run.arrays()
    held = {tuple(wave) for wave in arrays['neuron_wave'][arrays['neuron_wave_share'] > 0.5].tolist()}
    assert run.data.classes == [2, 4, 3] and {(4, 1), (3, 1)} <= held and final['accuracy, unseen'] > 0.9
    assert arrays['groups'].tolist() == [2, 4, 3] and final['waves (q, k) carried'] > 0
    assert final['neurons as one digit, own wave'][0] > 0.9
    assert not {'separation', 'primes told from other numbers', 'waves of q > 7'} & final.keys()


def test_the_null_of_an_analysis_is_the_start_of_the_run(shelf, tmp_path):
    """Copied weights, or those of its seed and scale, which are drawn again."""
    args = ['--task', '2*a+b', '--copy', 'embed', '--freeze', '--epochs', 5, '--init_from', shelf / 'source']
    run = analyze.load_run(run_of(*args, '--out', tmp_path / 'copied'))
    initial, final = run.analysis()[0]['initial'], run.final()
    assert not run.notes and initial['W_L FCR'] != final['W_L FCR'] and initial['W_E FFD'] == final['W_E FFD']
    shutil.rmtree(run.path / 'snapshots')
    assert len(analyze.load_run(run.path).notes) == 2  # no snapshots, another start
    folder = run_of('--epochs', 2, '--seed', 5, '--init', 'reference', '--out', tmp_path / 'drawn')
    start = first_weights(folder)
    shutil.rmtree(folder / 'snapshots')
    again = analyze.load_run(folder).initial
    assert all(torch.equal(again[name], w) for name, w in start.items())


def test_an_embedding_from_a_file(tmp_path):
    W = normal(12, 20)
    np.save(tmp_path / 'w.npy', W.double())
    torch.save(torch.nn.Parameter(W), tmp_path / 'w.pt')
    args = '--task add --p 12 --d_model 20 --epochs 9 --init_from'.split()
    files = tmp_path / 'w.npy', tmp_path / 'w.pt'
    held = [run_of(*args, file, '--freeze', '--out', tmp_path / file.suffix) for file in files]
    assert all(torch.equal(checkpoint(folder)['model']['W_E'][:12], W) for folder in held)
    (tmp_path / 'w.npy').unlink()  # a run goes on without the file
    before, after = checkpoint(held[0])['model'], checkpoint(resumed(held[0], '--epochs', 12))['model']
    assert [name for name in before if torch.equal(before[name], after[name])] == ['W_E']
    for dtype in ('>f8', '<i4', 'f2'):
        np.save(tmp_path / 'w.npy', np.arange(12).reshape(6, 2).astype(dtype))
        assert data.load_matrix(tmp_path / 'w.npy').tolist() == np.arange(12).reshape(6, 2).tolist()


def test_letters_are_where_a_run_starts(tmp_path):
    args = ['--p', 13, '--letters', 5, '--epochs', 3]
    started = run_of(*args, '--out', tmp_path / 'started')
    frozen = run_of(*args, '--freeze', '--out', tmp_path / 'frozen')
    start, held = first_weights(started)['W_E'], checkpoint(frozen)['model']['W_E']
    assert torch.equal(start, held) and not torch.equal(start, checkpoint(started)['model']['W_E'])
    usual = first_weights(run_of('--p', 13, '--epochs', 1, '--out', tmp_path / 'usual'))['W_E']
    assert torch.equal(start[13], usual[13]) and (start[:13] != usual[:13]).all()  # "=" is as ever
    bands = analyze.design(5, 13, data.primes_below(13))
    letters = analyze.frequency_norms(analyze.written(bands, 13, 2000))
    assert np.corrcoef(analyze.frequency_norms(start[:13]), letters)[0, 1] > 0.8
    shutil.rmtree(started / 'snapshots')
    assert len(analyze.load_run(started).notes) == 2  # no snapshots, another start


def swept(folder):
    with open(folder / 'sweep.csv') as f:
        return list(csv.DictReader(f))


def test_sweep_ranks_its_settings(tmp_path, fault):
    args = [*TINY, '--sweep_space', 'lr=1e-3,1e-2 lamb=0,2', '--out', str(tmp_path / 'a')]
    train.main([*args, '--epochs', '20', '--sweep', '3'])
    before = contents(tmp_path / 'a')
    train.main([*args, '--epochs', '20', '--sweep', '4'])  # one more; the others are not touched
    after = contents(tmp_path / 'a')
    assert all(after[path] == content for path, content in before.items() if path.name != 'sweep.csv')
    rows = swept(tmp_path / 'a')
    pairs = sorted((row['lr'], row['lamb']) for row in rows)
    assert pairs == [('1e-2', '0'), ('1e-2', '2'), ('1e-3', '0'), ('1e-3', '2')]
    losses = [float(row['valid_loss']) for row in rows]
    assert losses == sorted(losses)
    best, s = rows[0], told(Path(rows[0]['folder']))
    alone = run_of('--epochs', 20, '--lr', best['lr'], '--lamb', best['lamb'], '--out', tmp_path / 'b')
    same_run(Path(best['folder']), alone)
    acc = np.array([task['valid_acc'] for task in s['tasks']])
    assert float(best['valid_loss']) == pytest.approx(s['objective']['valid'], rel=1e-5)
    assert float(best['valid_acc']) == pytest.approx(acc.mean()) and int(best['grokked']) == sum(acc >= 0.99)
    assert '0.25' in fault(train, *args, '--epochs', 20, '--sweep', 4, '--weight_decay', 0.25)
    assert '--out' in fault(train, *args, '--sweep', 4)  # the epochs are left out
    train.main([*args, '--sweep', '4', '--epochs', '30'])  # lengthened
    assert all(len(records(Path(row['folder']))['epoch']) == 30 for row in swept(tmp_path / 'a'))
    longer = train.parse([*TINY, '--epochs', '99', '--out', rows[0]['folder']])  # but did not get there
    train.rank(tmp_path, [dict(lr='1e-3')], [longer])
    assert swept(tmp_path)[0]['valid_loss'] == 'inf'


def test_a_stopped_sweep_goes_on_and_a_setting_that_diverges_ranks_last(tmp_path, at_epoch):
    words = '--optimizer adamw --weight_decay 100 --epochs 60 --sweep_space lr=10,1e-3 --sweep 2 --out'
    args = [*TINY, *words.split()]
    straight, stopped = tmp_path / 'straight', tmp_path / 'stopped'
    train.main([*args, str(straight)])

    def stop_the_second():
        if len(os.listdir(stopped)) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    at_epoch(2, stop_the_second)
    with pytest.raises(SystemExit) as end:
        train.main([*args, str(stopped)])
    assert end.value.code == 128 + signal.SIGTERM and not (stopped / 'sweep.csv').exists()
    train.main([*args, str(stopped)])
    (good, bad), again = swept(straight), swept(stopped)
    same_run(Path(good['folder']), Path(again[0]['folder']))
    assert good['lr'] == '1e-3' and bad['lr'] == '10' and bad['valid_loss'] == 'inf'
    assert [row['valid_loss'] for row in again] == [good['valid_loss'], 'inf']


# ---------------------------------------------------------------- presets, options, bench, the table of runs

def test_the_papers_values():
    paper = dict(
        p=113, train_frac=0.5, d_model=256, n_heads=4, epochs=65536, optimizer='adamw', lr=3e-4, alpha=0.98,
        init='reference', weight_decay=1 / 3, decay_from=1, dropout=0.1, dropout_mlp=0.1,
        dropout_mask='batch', lamb=0.5, focus=0)
    nanda = dict(train_frac=0.3, d_model=128, lr=1e-3, weight_decay=1, dropout=0, dropout_mlp=0, lamb=0,
                 init='he', optimizer='adamw', decay_from=1, focus=0)
    tenfold = dict(lr=1e-3, weight_decay=1, dropout_mask='example', decay_from=0.7, epochs=10000)
    fast = dict(optimizer='muon', lamb=0, init='small', focus=1)
    cases = {'': fast | dict(p=113, train_frac=0.5, epochs=1500), '--task add': fast | dict(train_frac=0.1),
             '--preset paper --task basis': paper, '--preset tenfold': paper | tenfold,
             '--preset paper --task nanda': nanda | dict(p=113), '--preset paper --task a*b': nanda,
             '--preset paper --task add': nanda, '--preset paper --lr 0.5': paper | dict(lr=0.5)}
    for words, values in cases.items():
        o = vars(train.parse(words.split()))
        assert o | values == o, words


def test_defaults_are_what_a_run_records_and_help_explains_them(tmp_path, capsys):
    given = dict(device='cpu', out=str(tmp_path), epochs=1, spectra_every=0)
    config = told(train.train(train.parse([f'--{name}={value}' for name, value in given.items()])))['config']
    assert config == train.DEFAULTS | given == checkpoint(tmp_path)['config']
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    for name, (default, meaning, _) in train.OPTIONS.items():
        assert f'--{name} ' in text and f'{meaning} (default: {default})' in text, name


def numbers_of(text):
    words = (word.strip('()[];:%|`').rstrip('.,').replace(',', '') for word in text.split())
    return [float(word) for word in words if word.removeprefix('-').replace('.', '', 1).isdigit()]


def test_bench_tells_the_time_and_saves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.time, 'perf_counter', itertools.count().__next__)  # five epochs take a second
    *_, line = output_of(capsys, train, *TINY, '--bench', 5, '--out', tmp_path).splitlines()
    assert numbers_of(line) == [200, 5] and not list(tmp_path.iterdir())


def test_a_row_of_the_table_of_runs(copied, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(analyze, 'RUNS', tmp_path / 'runs.csv')
    folder = copied('formulas')
    analyze.main([str(folder), '--record'])
    with open(HERE / 'assets/runs.csv') as shipped, open(analyze.RUNS) as ours:
        (header, *others), (row,) = csv.reader(shipped), csv.reader(ours)
    assert {len(other) for other in (row, *others)} == {len(header)}
    s, found = told(folder), dict(zip(header, row))
    expected = dict(epochs=30, tasks=2, minutes=s['wall_s'] / 60)
    for rows in ('valid', 'test'):
        expected[f'{rows} mean'] = np.mean([task[f'{rows}_acc'] for task in s['tasks']])
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-2), name
    words = [*shlex.split(found['options']), f'--seed={found["seed"]}', f'--data_seed={found["data_seed"]}']
    assert vars(train.parse([*words, '--device', 'cpu', '--out', s['config']['out']])) == s['config']
    for summary in ('{"epochs": 20, "commit": ""}', '{"epochs": 30}'):  # of another state, of old code
        (folder / 'summary.json').write_text(summary)
        assert 'summary.json' in fault(analyze, folder, '--record')


# ---------------------------------------------------------------- what is shipped, and it groks

@pytest.mark.parametrize('name, least', [('miiii', 0.99), ('nanda', 1), ('paper', 0.94)])
def test_what_is_told_of_the_shipped_runs_holds(name, least):
    run, tasks = analyze.load_run(HERE / 'assets' / name), told(HERE / 'assets' / name)['tasks']
    logits, _ = run.forward()
    for name, rows in zip(('train', 'valid', 'test'), run.rows):
        acc = task_losses(logits[rows], run.data.y[rows], run.data.classes)[1]
        assert [task[f'{name}_acc'] for task in tasks] == pytest.approx(acc.tolist(), abs=5e-3)  # bfloat16
    assert min(task['valid_acc'] for task in tasks) >= least and not run.notes
    for task, acc in zip(tasks, run.records['valid_acc'].T, strict=True):
        assert task['grok_epoch'] == train.grok_epochs(acc, task['valid_acc'])[0]


def test_what_is_shipped_is_small_and_readme_and_code_are_in_order():
    made_here = {'figures', 'analysis.json', 'analysis.npz'}
    files = [file for file in (HERE / 'assets').rglob('*') if not made_here & set(file.parts)]
    assert sum(file.stat().st_size for file in files) < 8e6
    code = {path.name: path.read_text() for path in HERE.glob('*.py')}
    for name, text in code.items():
        assert not [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 110], name
    readme, report = ((HERE / name).read_text() for name in ('README.md', 'assets/report.md'))
    rows = [line.split('|') for line in readme.splitlines() if line.startswith('|')]
    named = [(row[2].strip(' `'), row[3].strip(' `')) for row in rows if row[2].strip(' `') in code]
    assert len(named) > 4 and all(line in code[file] for file, line in named)
    assert not re.search(r'\[\[[A-Z]|@[A-Z][A-Z0-9]*@', readme + report)  # a number that is still missing


def of_runs(options, column, seeds=(0, 1, 2), precision=' --precision=bfloat16'):
    """A column of assets/runs.csv: the first rows of some options by seed; never is -1."""
    found = {}
    with open(analyze.RUNS) as f:
        for row in csv.DictReader(f):
            if re.sub(r' --(spectra_every|snapshots)=\d+', '', row['options']) == options + precision:
                found.setdefault(int(row['seed']), row[column])
    words = ' '.join(found[seed] for seed in seeds).split()
    return [-1 if word == '-' else float(word) for word in words]


def of_report(section, row, column):
    """The numbers in a cell of a table of the report, by how the names of its row and its column begin."""
    report = (HERE / 'assets/report.md').read_text()
    text = re.findall(rf'^#+ {re.escape(section)}.*?(?=^##|\Z)', report, re.M | re.S)
    for lines in re.findall(r'(?:^\|.*\n)+', ''.join(text), re.M):
        names, _, *others = ([cell.strip(' `*') for cell in line.strip('|\n').split('|')]
                             for line in lines.splitlines())
        at = next((i for i, name in enumerate(names) if i and name.startswith(column)), 0)
        cells = [other[at] for other in others if at and other[0].startswith(row)]
        if cells:
            return numbers_of(cells[0].replace('/', ' '))
    raise KeyError(f'{section}: {row}, {column}')


PAPER, TENFOLD, FAST = '--preset=paper', '--preset=tenfold', '--preset=fast'
AT_30 = f'{FAST} --train_frac=0.3'
CAME = 'first .99 from epoch'


def tasks_that_came(options):
    """The q that came to .99 in the run of seed 0, by when: 2, 3, 5, 13, .."""
    came = dict(zip(data.primes_below(113), of_runs(options, CAME, [0])))
    return sorted((q for q in came if came[q] >= 0), key=came.get)


def and_seeds(values):
    """Seed 0, and again beside the other seeds."""
    return [values[0], *values]


WHERE = {  # how rows of README's table begin, claim and recipe: the numbers of the last two cells, in order,
    # from runs.csv; what is measured by analyze.py is from the report, which was written by hand
    "(a) tasks at 1.0, 50 % of the numbers | paper's": lambda: [
        *of_runs(PAPER, 'valid at 1', [0]), *of_runs(PAPER, 'valid at .99', [0]), 0.99],
    '(a) | tenfold': lambda: and_seeds(of_runs(TENFOLD, 'valid at 1')),
    '(a) | fast': lambda: and_seeds(of_runs(FAST, 'valid at 1')),
    '(a) the same with 80 % |': lambda: [
        *and_seeds(of_runs(f'{FAST} --train_frac=0.8', 'valid at 1')),
        min(of_runs(f'{FAST} --train_frac=0.8', 'test at 1'))],
    '(a) the same with 30 % |': lambda: [
        *of_runs(f'{PAPER} --train_frac=0.3 --init=he --dropout_mask=example', 'valid at 1', [0]), 50],
    '(b) the first tasks': lambda: tasks_that_came(PAPER)[:4],
    '(b) epoch by which half': lambda: [  # the middle of 25, of which two never came
        sorted(of_runs(PAPER, CAME, [0])[4:])[at] for at in (14, 2)],
    '(c) ': lambda: of_report('All claims', '(c) without the filter', 'here'),
    '(d) ': lambda: and_seeds(of_runs(f'{FAST} --dropout=0.0 --dropout_mlp=0.0', 'valid at .99')),
    'tasks have neurons': lambda: of_report('Circuits', 'default', 'separation')[:1],
    'where moduli share': lambda: [*(most(
        x for neurons, q in itertools.product(('6, 8', '15, 19', '33, 34'), (6, 10, 15))
        for x in of_report('Letters', f'without the {neurons}', f'n mod {q}') if x < 0.9)
        for most in (min, max)), 1],
    'tasks share letters': lambda: [
        of_report('Letters', 'dimensions', recipe)[i] for recipe, i in (
            ("paper's", 0), ('by chance', 1), ('default', 0), ('by chance', 0))],
    'letters by design': lambda: [
        *and_seeds(of_runs(f'{AT_30} --letters=14', 'test mean')), of_runs(AT_30, 'test mean')[0],
        *of_report('Thirty per cent', '14 bands at random', 'test')],
    'tasks one after': lambda: [
        *and_seeds(of_runs(f'{AT_30} --decay_from=0.6 --curriculum=1800 --epochs=3000', 'test mean')),
        *of_runs(f'{AT_30} --decay_from=0.6 --epochs=3000', 'test mean', [0]),
        6000, *of_runs(f'{AT_30} --decay_from=0.6 --epochs=6000', 'test mean', [0])],
    '(j) ': lambda: of_report('(j)', 'the least', 'paper'),
    '(q) ': lambda: of_runs(f"{FAST} '--task=a*b+b'", CAME, [0]),
    '(u) ': lambda: of_report('(u)', 'the same with', 'effective')[1::-1],
    '(w) ': lambda: [of_report('All claims', '(w) addition from scratch', 'here')[0], 30]}


NUMBER = r'\d[\d,]*\.?\d*|\.\d+'


def as_written(word, value):
    """Whether a number, as a text has it, is this one, rounded; 1.0 is never rounded up."""
    digits = word.replace(',', '')
    near = abs(float(digits) - value) < 0.501 * 10.0 ** -len(digits.partition('.')[2])
    return near and (float(digits) < 1 or value >= 1)


@pytest.mark.parametrize('start', WHERE)
def test_the_table_of_the_readme_has_the_numbers_of_the_runs(start):
    """One by one; but for brackets, which say how many runs there are."""
    text = (HERE / 'README.md').read_text().split('\n## What came out')[1].split('\n## ')[0]
    rows = [line[2:-2] for line in text.splitlines() if line.startswith('| ')][1:]
    row, = (row for row in rows if row.startswith(start))
    assert len(rows) == len(WHERE)
    words = re.findall(NUMBER, re.sub(r'\(.*?\)', '', ' '.join(row.split(' | ')[-2:])))
    values = WHERE[start]()
    assert len(words) == len(values) and all(map(as_written, words, values)), (words, values)


def test_the_first_screen_of_the_readme_has_the_numbers_of_the_runs():
    text = ' '.join((HERE / 'README.md').read_text().split('\n## ')[0].split())
    told = {'grows until epoch N,': of_report('2. The 29 tasks', 'the validation loss', '')[1:],
            'and n mod 5 by epoch N. Half': of_runs(PAPER, CAME, [0])[2:3],
            'touched .99 by epoch N;': WHERE['(b) epoch by which half']()[:1],
            'at the end N of the 29': of_runs(PAPER, 'valid at .99', [0]),
            'right on N to N of the others': sorted(of_runs(f'{AT_30} --letters=14', 'test mean'))[::2],
            'at random on N to N,': sorted(of_report('Thirty per cent', '14 bands at random', 'test'))[::2],
            'usual start on N (3': of_runs(AT_30, 'test mean', [0]),
            'reaches N in N epochs, the last': [
                *of_runs(f'{AT_30} --letters=14 --epochs=3000', 'test mean', [0]), 3000],
            'the last in N (': [6000],
            'accuracy of N, N and N on': of_runs(FAST, 'test mean', precision=''),
            'came to N, N and N, with N, N and N of the tasks': [
                *of_runs(FAST, 'test mean'), *of_runs(FAST, 'test at .99')],
            'stay right, N on average': of_report('Circuits', 'default', 'other tasks')[:1]}
    for words, values in told.items():
        found = re.search(re.escape(words).replace('N', f'({NUMBER})').replace('\\ ', ' '), text)
        assert found and len(found.groups()) == len(values), words
        assert all(map(as_written, found.groups(), values)), words


def test_it_groks(tmp_path):
    """The real thing, small: trained on some sums mod 31, it is right on every pair it never saw."""
    task, = told(run_of(*'--task nanda --p 31 --d_model 64 --train_frac 0.8 --epochs 400'.split(),
                        '--n_heads', 4, '--spectra_every', 0, '--out', tmp_path))['tasks']
    assert task['valid_acc'] == task['test_acc'] == 1 and 50 < task['grok_epoch'] < 400
