"""All tests: against brute force, float64, a library, a closed form, planted truth; and users' faults.

    python -m pytest -q test_all.py      # minutes on two CPU cores; what needs CUDA skips without it
"""
import concurrent.futures
import contextlib
import csv
import functools
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
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import analyze
import data
import model
import plots
import train
from model import Muon, Transformer, orthogonalize, task_losses

HERE = Path(__file__).parent
TINY = '--task miiii --p 11 --d_model 32 --n_heads 2 --precision float32 --device cpu'.split()


def cli(*args, script='train.py', timeout=120, **kw):
    """A script as a user runs it -> finished process with its output as text."""
    command = [sys.executable, HERE / script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kw)


def refused(*args, script='train.py'):
    """The one line of an error, after checking that it is one line, on stderr, with exit code 2."""
    done = cli(*args, script=script)
    assert done.returncode == 2, done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f'{script}: error: '), done.stderr
    return done.stderr


def refused_here(*args):
    """The message of an error, without the seconds that a new process takes."""
    with pytest.raises(data.Refusal) as refusal:
        train.main([str(arg) for arg in args])
    message = str(refusal.value)
    assert len(message.splitlines()) == 1
    return message


def trained(out, *args):
    """The folder of a small run, trained without a word; the words win over those of TINY."""
    o = train.parse([*TINY, *map(str, args), '--out', str(out)])
    with contextlib.redirect_stdout(io.StringIO()):
        return train.train(o)


# ---------------------------------------------------------------- data

@pytest.mark.parametrize('p', [11, 13])
def test_targets_by_brute_force(p):
    d, n = data.make('miiii', p), data.make('nanda', p)
    primes = [q for q in range(2, p) if not [r for r in range(2, q) if q % r == 0]]
    assert d.classes == primes and n.classes == [p]
    row = 0
    for x1 in range(p):
        for x0 in range(p):
            assert d.x[row].tolist() == [x0, x1, p]
            assert d.y[row].tolist() == [(x0 + p * x1) % q for q in primes]
            assert n.y[row].tolist() == [(x0 + x1) % p]
            row += 1
    assert row == len(d.x) == len(d.y)


def test_the_papers_counts():
    d = data.make('miiii', 113)
    assert len(d.classes) == 29 and d.classes[-1] == 109 and sum(d.classes) == 1480
    assert [len(part) for part in data.split(113 ** 2, 0.3)] == [3831, 1000, 7938]


@pytest.mark.parametrize('n, frac', [(121, 0.3), (121, 0.5), (12769, 0.9)])
def test_split_is_a_partition_and_seeded(n, frac):
    parts, again, other = (data.split(n, frac, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))
    assert len(parts[0]) == round(frac * n)
    assert len(parts[1]) == min(1000, (n - len(parts[0])) // 2)
    assert all(torch.equal(a, b) for a, b in zip(parts, again))
    assert not torch.equal(parts[0], other[0])


def test_basis_is_miiii_with_shuffled_rows():
    a, b, again, other = data.make('miiii', 13), *(data.make('basis', 13, seed) for seed in (1, 1, 2))
    assert sorted(a.y.tolist()) == sorted(b.y.tolist())          # whole rows move
    assert (a.y == b.y).all(1).float().mean() < 0.2              # and nearly all of them do
    assert torch.equal(b.y, again.y) and not torch.equal(b.y, other.y)


def some_formula(rng, depth):
    """A random formula; read as Python, with ^ for **, it means the same."""
    def pad(text):
        return ' ' * rng.integers(2) + text

    kinds = ['leaf', 'sum', 'product', 'power', 'minus', 'parentheses']
    kind = rng.choice(kinds) if depth else 'leaf'
    if kind == 'leaf':
        return pad(rng.choice(['a', 'b', str(rng.integers(200))]))
    left, right = (some_formula(rng, depth - 1) for _ in range(2))
    if kind == 'sum':
        return left + pad(rng.choice(['+', '-'])) + right
    if kind == 'product':
        return left + pad('*') + right
    if kind == 'power':
        return f'({left}){rng.choice(["^", "**"])}{rng.integers(12)}'
    return pad('-') + left if kind == 'minus' else f'({left})'


def test_formulas_by_brute_force():
    rng, p, seen = np.random.default_rng(0), 13, set()
    n = torch.arange(p * p)
    for _ in range(400):
        formula = some_formula(rng, rng.integers(1, 6))
        seen.add(formula)
        plain = eval(f'lambda a, b: {formula.strip().replace("^", "**")}')
        by_hand = [plain(a, b) % p for b in range(p) for a in range(p)]
        assert data.evaluate(formula, n % p, n // p, p).tolist() == by_hand, formula
    assert len(seen) > 300 and sum('^' in formula for formula in seen) > 50


def test_formulas_at_the_limits():
    x, large = torch.tensor([996]), pow(996, 1000) * pow(123456789, 1000)  # no overflow
    deep = '(' * 99 + 'a' + ')' * 99
    for formula, value in [('a^1000*123456789^1000', large), ('-a^2', -996 ** 2), ('0^0', 1), (deep, 996)]:
        assert data.evaluate(formula, x, x, 997).item() == value % 997


@pytest.mark.parametrize('formula, piece', [
    ('2a', 'decimal'), ('a b', 'syntax'), ('ab', "'ab'"), ('a^b', "'a**b'"), ('a^-1', "'a**-1'"),
    ('a^2^3', "'a**2**3'"), ('a^1001', "'a**1001'"), ('(a+b', 'never closed'), ('a+b)', "unmatched ')'"),
    ('()', "'()'"), ('a+', 'syntax'), ('b*+a', "'+a'"), ('b*a(b)', "'a(b)'"), ('a***b', 'syntax'),
    ('0b1', ''),  # a number to Python
    *((formula, 'other tasks are miiii') for formula in (
        '', 'other', 'a+c', 'a/b', 'a^1.5', 'a.real', '"a"', '__import__("os")', 'lambda: a', 'a if b',
        'a²', '٣*a', '0x1f', 'a\n#b', 'a[0]', 'a==b', 'True', 'a%b'))])
def test_everything_else_is_no_formula(formula, piece):
    with pytest.raises(data.Refusal) as refusal:
        data.make(formula, 5)
    message = str(refusal.value)
    assert message.startswith(f'{formula!r} is no formula in a and b') and piece in message


@pytest.mark.parametrize('task, p, says', [
    ('miiii', 12, 'prime >= 5, and 12 is not'), ('miiii', 3, 'prime >= 5'), ('nanda', 1, 'prime >= 5'),
    ('basis', 121, 'prime >= 5'), ('add', 4, 'number >= 5'), ('masked', 11, 'nothing to train on'),
    ('a+b, b+6*a', 5, 'the same modulo 5'), ('a+' * 100 + 'a', 5, 'at most 200')])
def test_data_refuses(task, p, says):
    with pytest.raises(data.Refusal, match=says):
        data.make(task, p)


def test_a_mixture_by_brute_force():
    p, plain = 7, [lambda a, b: a + b, lambda a, b: a * b - 2, lambda a, b: (a - b) ** 3]
    d = data.make('a + b,a*b-2, (a-b)^3', p)
    assert d.names == ['a+b', 'a*b-2', '(a-b)^3'] and d.classes == [p] * 3
    assert d.n_ops == 3 and d.in_loss.all()
    for n in range(p * p):
        for o in range(3):
            assert d.x[3 * n + o].tolist() == [n % p, n // p, p + o]
            assert d.y[n, o] == plain[o](n % p, n // p) % p
    rows = torch.tensor([3, 20, 48])
    x, y = d.part(rows)
    assert x.tolist() == [d.x[3 * n + o].tolist() for n in rows for o in range(3)]
    assert torch.equal(y, d.y[rows])
    sums, nanda = data.make('a+b', 7), data.make('nanda', 7)
    assert torch.equal(sums.y, nanda.y) and torch.equal(sums.x, nanda.x)
    assert data.make('elementary', 7).names == ['a+b', 'a-b', 'a*b']
    for family, formulas in data.FAMILIES.items():
        assert data.make(family, 11).names == formulas.split(',')


@pytest.mark.parametrize('p', [5, 12])
def test_sums_by_brute_force(p):
    d = data.make('add', p)
    assert d.classes == [2 * p - 1] and d.names == ['x0 + x1'] and d.n_ops == 1
    by_hand = [(x0, x1, p, x0 + x1) for x1 in range(p) for x0 in range(p)]
    assert [(*x, *y) for x, y in zip(d.x.tolist(), d.y.tolist())] == by_hand


# ---------------------------------------------------------------- model

def plain_forward(W, x, drop=None):
    """The model as the paper writes it, head by head. W: dict of weights."""
    H, D, K = W['W_Q'].shape
    drop = torch.ones(2, 1, D) if drop is None else drop
    z = W['W_E'][x] + W['W_pos'][None]                           # N T D
    out = torch.zeros_like(z)
    for h in range(H):
        q, k, v = (z @ W[name][h] for name in ('W_Q', 'W_K', 'W_V'))
        att = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(K), dim=-1)   # N T T, from, to
        out = out + att @ v @ W['W_O'][h]
    z = (z + out) * drop[0][:, None]
    z = (z + torch.relu(z @ W['W_in']) @ W['W_out']) * drop[1][:, None]
    return (z @ W['W_U'])[:, -1]


def with_gradients(logits, net):
    """Logits, and the gradients of the sum of their squares, by name."""
    names, weights = zip(*net.named_parameters())
    return dict(zip(names, torch.autograd.grad(logits.square().sum(), weights)), logits=logits)


@pytest.mark.parametrize('n_ops', [1, 3])
@pytest.mark.parametrize('rows', [0, 1, 50])  # no dropout, one mask for the batch, one per example
def test_model_is_the_general_forward_pass(n_ops, rows):
    torch.manual_seed(0)
    p, D, H, C, N = 11, 24, 3, 17, 50
    net = Transformer(p, D, H, C, n_ops).double()
    x = torch.stack([torch.randint(p, (N,)), torch.randint(p, (N,)), p + torch.randint(n_ops, (N,))], 1)
    drop = [torch.rand(2, rows, D, dtype=torch.float64)] if rows else []
    ours = with_gradients(net(x, *drop), net)
    oracle = with_gradients(plain_forward(dict(net.named_parameters()), x, *drop), net)
    assert ours['logits'].shape == (N, C)
    for name in oracle:
        assert (ours[name] - oracle[name]).abs().max() <= 1e-10 * oracle[name].abs().max(), name


@pytest.mark.parametrize('scale', [1, 4, 10])
def test_saturated_attention_keeps_its_gradients(scale):
    """The digits below "=" in every head, by 7, 119 and 743 or more: float32 agrees with the general form,
    gradients too, though at the larger scales those of W_Q and W_K all but vanish."""
    torch.manual_seed(0)
    net, x = Transformer(11, 24, 3, 17), data.make('nanda', 11).x
    with torch.no_grad():
        net.W_E[-1] += 1
        net.W_K.copy_(net.W_Q)
        net.W_Q *= scale
        net.W_K *= scale
    ours = with_gradients(net(x), net)
    oracle = with_gradients(plain_forward(dict(net.named_parameters()), x), net)
    assert (oracle['W_K'].abs().max() < 1e-6 * oracle['W_V'].abs().max()) == (scale > 1)
    for name in oracle:
        assert (ours[name] - oracle[name]).abs().max() <= 1e-3 * oracle[name].abs().max(), name


def test_acts_are_those_of_the_forward_pass():
    torch.manual_seed(0)
    net, acts = Transformer(7, 8, 2, 10).double(), {}
    x = data.make('nanda', 7).x
    logits = net(x, acts=acts)
    assert (acts['att'].shape, acts['neurons'].shape) == ((49, 3, 2), (49, 32))
    assert torch.allclose(acts['att'].sum(1), torch.ones(49, 2, dtype=torch.float64))
    assert torch.equal(acts['neurons'], torch.relu(acts['resid_mid'] @ net.W_in))
    assert torch.equal(acts['resid_post'] @ net.W_U, logits)


def test_parameters_count_and_shapes():
    net = Transformer(113, 256, 4, 1480)
    shapes = dict(
        W_E=(114, 256), W_pos=(3, 256), W_Q=(4, 256, 64), W_K=(4, 256, 64), W_V=(4, 256, 64),
        W_O=(4, 64, 256), W_in=(256, 1024), W_out=(1024, 256), W_U=(256, 1480))
    assert {name: tuple(w.shape) for name, w in net.state_dict().items()} == shapes
    by_hand = 114 * 256 + 3 * 256 + 4 * 256 * 256 + 2 * 256 * 1024 + 256 * 1480
    assert sum(w.numel() for w in net.parameters()) == by_hand == 1_195_264


@pytest.mark.parametrize('init, heads, unembed, lowest, highest', [
    ('he', 256, 256, 1.5, 10),
    ('reference', 4 * 256, 29 * 256, 0.99, 1.05)])  # the code of the paper: no head start, no handicap
def test_initial_scale_and_first_loss(init, heads, unembed, lowest, highest):
    torch.manual_seed(0)
    d = data.make('miiii', 113)
    net = Transformer(113, 256, 4, 1480, n_tasks=29, init=init)
    fan_in = dict(W_Q=heads, W_K=heads, W_V=heads, W_U=unembed)
    fan_in |= dict(W_E=114, W_pos=3, W_O=256, W_in=256, W_out=1024)
    for name, w in net.state_dict().items():
        four_standard_errors = 4 / math.sqrt(2 * w.numel())
        assert abs(w.std() / math.sqrt(2 / fan_in[name]) - 1) < four_standard_errors, name
    x, y = d.part(torch.randperm(113 ** 2)[:1000])
    with torch.no_grad():
        loss, _ = task_losses(net(x), y, d.classes)
    assert lowest < (loss / torch.tensor(d.classes).log()).mean() < highest


def test_initial_scale_of_a_run(tmp_path):
    """Of the same random numbers, with 2 heads and 4 tasks, which formulas share."""
    for task, n_tasks in (('miiii', 4), ('a*b,a+b', 1)):
        he, reference = (
            start_in_float64(trained(tmp_path / task / init, '--task', task, '--epochs', 1, '--init', init))
            for init in ('he', 'reference'))
        smaller = dict(W_Q=2, W_K=2, W_V=2, W_U=n_tasks)
        for name in he:
            assert torch.allclose(reference[name], he[name] / smaller.get(name, 1) ** 0.5), name


# ---------------------------------------------------------------- loss

def padded_losses(logits, y, classes):
    """The loss in a second form: all tasks side by side, padded to the longest."""
    most = max(classes)
    blocks = [F.pad(z, (0, most - z.shape[1]), value=-torch.inf) for z in logits.float().split(classes, 1)]
    z, target = torch.stack(blocks, 1), y[..., None]                             # N Q most, N Q 1
    right = z.gather(2, target)
    wrong = z.scatter(2, target, -torch.inf)
    loss = F.softplus(wrong.logsumexp(2, keepdim=True) - right).mean((0, 2))
    return loss, (right > wrong.amax(2, keepdim=True)).sum((0, 2)) / len(y)


@pytest.mark.parametrize('form', [task_losses, padded_losses, 'compiled'])
@pytest.mark.parametrize('q', [2, 3, 109])
def test_loss_and_gradient_against_float64(form, q):
    """The right logit ahead by up to 71 or behind by up to 1000: losses from 1e-30 to 1e+3.
    Row by row, so that large losses do not hide small ones."""
    if form == 'compiled' and not shutil.which('g++'):
        pytest.skip('torch.compile needs a C++ compiler on a CPU')
    losses = torch.compile(task_losses, dynamic=False) if form == 'compiled' else form
    torch.manual_seed(0)
    margins = torch.cat([torch.linspace(-1000, 0, 41), torch.linspace(0, 71, 141)[1:]])
    z, t = torch.randn(len(margins), q), torch.randint(q, (len(margins), 1))
    z.scatter_(1, t, -torch.inf)
    z.scatter_(1, t, z.logsumexp(1, keepdim=True) + margins[:, None])

    z64 = z.double().requires_grad_()
    behind = z64.scatter(1, t, -torch.inf).logsumexp(1) - z64.gather(1, t)[:, 0]
    loss64 = torch.logaddexp(torch.zeros_like(behind), behind)  # log(1 + e^behind), exact down to 1e-300
    grad64, = torch.autograd.grad(loss64.sum(), z64)
    assert loss64.min() < 1e-30 and loss64.max() > 990

    for i in range(len(margins)):
        row = z[i:i + 1].clone().requires_grad_()
        loss, _ = losses(row, t[i:i + 1], [q])
        grad, = torch.autograd.grad(loss.sum(), row)
        assert abs(loss.item() / loss64[i].item() - 1) < 1e-4
        off = (grad[0] - grad64[i]).abs()
        assert off.max() < 1e-4 * grad64[i].abs().max()
        assert off[t[i]] < 1e-4 * grad64[i, t[i]].abs()
    usual = F.cross_entropy(torch.tensor([[40.0, 0.0]]), torch.tensor([0]))
    assert usual == 0  # what the form above is for


def test_loss_and_accuracy_against_torch_on_several_tasks():
    torch.manual_seed(0)
    d = data.make('miiii', 13)
    logits = torch.randn(169, sum(d.classes))
    loss, acc = task_losses(logits, d.y, d.classes)
    for i, z in enumerate(logits.split(d.classes, 1)):
        assert torch.allclose(loss[i], F.cross_entropy(z, d.y[:, i]))
        assert acc[i] == (z.argmax(1) == d.y[:, i]).sum() / 169
    guessing, _ = task_losses(torch.zeros(169, sum(d.classes)), d.y, d.classes)
    assert torch.allclose(guessing, torch.tensor(d.classes).log())


@pytest.mark.parametrize('task', ['miiii', 'nanda', 'a*b,a+b'])
@pytest.mark.parametrize('dtype, close', [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_two_forms_of_the_loss_agree(task, dtype, close):
    """Values and gradients, on several tasks with weights, from rows of chance to confident ones."""
    torch.manual_seed(0)
    d = data.make(task, 13)
    confidence = torch.linspace(0, 30, 169)[:, None]
    logits = (torch.randn(169, sum(d.classes)) * confidence).to(dtype).requires_grad_()
    weight = torch.rand(len(d.classes))
    loss, acc = task_losses(logits, d.y, d.classes)
    padded_loss, padded_acc = padded_losses(logits, d.y, d.classes)
    assert torch.allclose(loss, padded_loss, rtol=1e-4) and torch.equal(acc, padded_acc)
    assert loss.dtype == acc.dtype == torch.float32
    grad, padded_grad = (torch.autograd.grad(weight @ x, logits)[0] for x in (loss, padded_loss))
    assert torch.allclose(grad, padded_grad, rtol=close, atol=1e-30)


@pytest.mark.parametrize('losses', [task_losses, padded_losses])
def test_all_rows_right_are_exactly_1_and_a_tie_is_wrong(losses):
    """A mean by way of the float32 1/N is .99999994 at some N: a task would never count as solved."""
    for n in range(1, 2000, 7):
        y = torch.stack([torch.arange(n) % 2, torch.arange(n) % 3], 1)
        right = torch.cat([F.one_hot(y[:, 0], 2), F.one_hot(y[:, 1], 3)], 1).float()
        assert losses(right, y, [2, 3])[1].tolist() == [1, 1]
    assert losses(torch.zeros(n, 5), y, [2, 3])[1].tolist() == [0, 0]


def test_masked_leaves_its_columns_alone(tmp_path):
    words = '--task masked --p 13 --optimizer adamw --weight_decay 0 --dropout 0 --epochs 3'
    folder = trained(tmp_path, *words.split())
    before = data.load(folder / 'snapshots/00000000.pt', ['model'])['model']['W_U']
    after = data.load(folder / 'ckpt.pt')['model']['W_U']
    assert before.shape[1] == 2 + 3 + 5 + 7 + 11
    assert torch.equal(before[:, :17], after[:, :17]) and (before[:, 17:] != after[:, 17:]).any(0).all()
    summary = json.loads((folder / 'summary.json').read_text())
    assert summary['objective']['train'] == pytest.approx(summary['tasks'][-1]['train_loss'] / math.log(11))


# ---------------------------------------------------------------- the step

def start_in_float64(folder):
    """What a run started from: a dict of float64 weights that autograd follows."""
    weights = data.load(folder / 'snapshots/00000000.pt', ['model'])['model']
    return {name: w.double().requires_grad_() for name, w in weights.items()}


def records(folder):
    """All that a run recorded, by name."""
    with np.load(folder / 'metrics.npz') as saved:
        return dict(saved)


def plain_scores(W, part, classes, drop=None):
    """Loss and accuracy of each task by torch's own cross-entropy. part: tokens and targets."""
    x, y = part
    pairs = list(zip(plain_forward(W, x, drop).split(classes, 1), y.T))
    loss = [F.cross_entropy(z, target) for z, target in pairs]
    acc = [(z.argmax(1) == target).double().mean() for z, target in pairs]
    return torch.stack(loss), torch.stack(acc)


PINNED = {0: 5.118945, 1: 4.211175, 10: 1.398876, 39: 1.031196}  # epoch: mean of loss / ln q


@pytest.mark.parametrize('epochs, focus, alpha, decay, decay_from, pinned', [
    (40, 0, 0.98, 1.0, 0.4, PINNED),
    (30, 1, 0.9, 0.5, 1.0, {})])
def test_a_run_against_a_plain_float64_twin(tmp_path, epochs, focus, alpha, decay, decay_from, pinned):
    """The paper's model, loss, filter and schedule, and torch's own AdamW, written plainly in float64 from
    the same first weights: every record, the last weights and the memory of the filter."""
    words = '--optimizer adamw --lr 1e-3 --lamb 0.5 --dropout 0 --dropout_mlp 0 --init he'.split()
    words += ['--epochs', epochs, '--focus', focus, '--alpha', alpha]
    words += ['--weight_decay', decay, '--decay_from', decay_from]
    folder = trained(tmp_path, *words)
    d, (train_rows, valid_rows, _) = data.make('miiii', 11), data.split(121, 0.5)
    W = start_in_float64(folder)
    twin = dict(train_loss=[], train_acc=[], valid_loss=[], valid_acc=[], grad_norm=[])
    memory = {name: torch.zeros_like(w) for name, w in W.items()}
    adamw = torch.optim.AdamW(W.values(), betas=(0.9, 0.98), weight_decay=decay, foreach=False, fused=False)
    ln_q = torch.tensor([2, 3, 5, 7]).log()
    for epoch in range(epochs):
        loss, acc = plain_scores(W, d.part(train_rows), [2, 3, 5, 7])
        valid_loss, valid_acc = plain_scores(W, d.part(valid_rows), [2, 3, 5, 7])
        adamw.zero_grad()
        objective = (loss * loss.detach()).sum() / loss.detach().sum() if focus else (loss / ln_q).mean()
        objective.backward()
        norms = torch.stack([w.grad.norm() for w in W.values()])
        for name, w in W.items():
            memory[name] = alpha * memory[name] + (1 - alpha) * w.grad
            w.grad += 0.5 * memory[name]
        rate = 1e-3
        if epoch > decay_from * epochs:
            rate *= (epochs - epoch) / (epochs - decay_from * epochs)
        adamw.param_groups[0]['lr'] = rate
        adamw.step()
        for name, row in zip(twin, (loss, acc, valid_loss, valid_acc, norms)):
            twin[name].append(row.detach().numpy())

    ours, ckpt = records(folder), data.load(folder / 'ckpt.pt')
    for name, close in dict(train_loss=1e-4, valid_loss=1e-4, grad_norm=1e-3).items():
        assert np.allclose(ours[name], twin[name], rtol=close), name
    for name in ('train_acc', 'valid_acc'):  # near a tie rounding may decide
        assert np.abs(ours[name] - twin[name]).mean() < 1e-3, name
    for name, w in W.items():
        assert torch.allclose(ckpt['model'][name].double(), w, atol=1e-5), name
        assert torch.allclose(ckpt['filter'][name].double(), memory[name], atol=1e-5), name
    means = (ours['train_loss'] / ln_q.numpy()).mean(1)
    assert {epoch: means[epoch] for epoch in pinned} == pytest.approx(pinned, rel=1e-4)


def test_muon_against_torch():
    """On 2-D matrices, which torch's own takes: the same weights after 20 steps, up to bfloat16 rounding."""
    torch.manual_seed(0)
    start = [torch.randn(24, 40), torch.randn(40, 24)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    a = Muon(ours, torch.tensor(0.02), 0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn='original')
    for _ in range(20):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y, first in zip(ours, theirs, start):
        assert (x - y).norm() < 0.03 * (y - first).norm()


def test_a_stack_is_orthogonalised_matrix_by_matrix():
    torch.manual_seed(0)
    stack = torch.randn(3, 24, 40)
    for one, all_at_once in zip(stack, orthogonalize(stack)):
        assert torch.allclose(all_at_once, orthogonalize(one), atol=1e-5)
    singular = torch.linalg.svdvals(orthogonalize(stack))
    assert 0.5 < singular.min() and singular.max() < 1.3


@pytest.mark.parametrize('kind, rows', [('batch', 1), ('example', 60)])
def test_dropout_masks(tmp_path, monkeypatch, kind, rows):
    """Two new masks at every epoch, of the share asked for. At a rate of 0 the weights stand still and only
    masks move the loss: the recorded losses are those under the masks, and validation has none."""
    seen, forward = [], Transformer.forward

    def watched(self, x, drop=(1, 1), acts=None):
        if drop != (1, 1):
            seen.append(torch.stack(drop))
        return forward(self, x, drop, acts)

    monkeypatch.setattr(Transformer, 'forward', watched)
    still = '--optimizer adamw --lr 0 --d_model 512 --train_frac 0.5 --init he --epochs 5'.split()
    folder = trained(tmp_path / 'a', *still, '--dropout', 0.25, '--dropout_mlp', 0.5, '--dropout_mask', kind)
    masks = torch.stack(seen)
    assert masks.shape == (5, 2, rows, 512) and len(masks.flatten(0, 1).unique(dim=0)) == 10
    for rate, some in zip((0.25, 0.5), masks.unbind(1)):
        assert torch.allclose(some.unique(), torch.tensor([0, 1 / (1 - rate)]))
        assert abs((some == 0).float().mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / some.numel())

    d, W, ours = data.make('miiii', 11), start_in_float64(folder), records(folder)
    part = d.part(data.split(121, 0.5)[0])
    for drop, loss in zip(masks.double(), ours['train_loss']):
        assert np.allclose(loss, plain_scores(W, part, d.classes, drop)[0].detach(), rtol=1e-4)
    constant = records(trained(tmp_path / 'b', *still, '--dropout', 0, '--dropout_mlp', 0))
    assert len(seen) == 5
    assert np.ptp(ours['train_loss'], 0).min() > 1e-2
    assert max(np.ptp(constant['train_loss'], 0).max(), np.ptp(ours['valid_loss'], 0).max()) < 1e-5


def test_learning_rate_schedule(tmp_path):
    """The rates at every step: constant, then linear to zero. Muon has all but two of the matrices."""
    rates = {torch.optim.AdamW: [], Muon: []}

    def look(optimizer, *_):
        rates[type(optimizer)].append(optimizer.param_groups[0]['lr'].item())

    hook = register_optimizer_step_pre_hook(look)
    try:
        words = '--optimizer muon --lamb 0 --epochs 10 --decay_from 0.4 --lr 0.1 --muon_lr 0.01'
        ckpt = data.load(trained(tmp_path, *words.split()) / 'ckpt.pt')
    finally:
        hook.remove()
    shape = np.minimum(1, (10 - np.arange(10)) / 6)
    assert np.allclose(rates[torch.optim.AdamW], 0.1 * shape) and np.allclose(rates[Muon], 0.01 * shape)
    assert [len(optimizer['state']) for optimizer in ckpt['optimizer']] == [2, 7] and not ckpt['filter']


def test_a_mixture_is_the_mean_over_its_operations(tmp_path):
    """Operation by operation: gradient, loss and accuracy by torch's own, and the spectra of neurons."""
    words = '--optimizer adamw --epochs 1 --focus 0 --dropout 0 --dropout_mlp 0 --spectra_every 1'.split()
    folder = trained(tmp_path, *words, '--task', 'a*b,a+b,a-2', '--train_frac', 0.5)
    W, p, ours = start_in_float64(folder), 11, records(folder)
    assert W['W_E'].shape == (14, 32) and W['W_U'].shape == (32, 11)
    d, rows = data.make('a*b,a+b,a-2', p), data.split(121, 0.5)[0]
    net, neurons, losses, accs = Transformer(p, 32, 2, p, 3), [], [], []
    net.load_state_dict(W)
    a, b = rows % p, rows // p
    for o, target in enumerate((a * b % p, (a + b) % p, (a - 2) % p)):
        logits = plain_forward(W, torch.stack([a, b, torch.full_like(a, p + o)], 1))
        losses.append(F.cross_entropy(logits, target))
        accs.append((logits.argmax(1) == target).double().mean())
        x = d.x[o::3]
        assert (x[:, 2] == p + o).all()
        acts = {}
        net(x, acts=acts)
        neurons.append(acts['neurons'].detach())
    (sum(losses) / 3 / math.log(p)).backward()
    assert np.allclose(ours['train_loss'][0], torch.stack(losses).detach(), rtol=1e-4)
    assert np.allclose(ours['train_acc'][0], torch.stack(accs))
    assert ours['grad_norm_names'].tolist() == list(W)
    assert np.allclose(ours['grad_norm'][0], [w.grad.norm() for w in W.values()], rtol=1e-3)
    together = torch.cat(neurons, 1)
    sums, differences = analyze.decompose(together, p, analyze.solver_for(p, d))['waves'].mean(2)
    expected = dict(sum_power=sums, difference_power=differences)
    expected['spectrum'] = analyze.dft2(together, p).mean((1, 2))
    for name, row in expected.items():
        assert np.allclose(ours[name][0], row, rtol=1e-3, atol=1e-5), name


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler on a CPU')
def test_eager_and_compiled_agree(tmp_path):
    """The same losses over 50 epochs with dropout and filter, up to rounding that grows with the epochs."""
    words = '--epochs 50 --optimizer adamw --lamb 0.5 --lr 3e-4 --compile'.split()
    eager, compiled = (records(trained(tmp_path / how, *words, how))['train_loss'] for how in ('off', 'on'))
    assert np.allclose(compiled, eager, rtol=1e-3, atol=1e-5)
    assert eager[-1].mean() < eager[0].mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('n', [41, 1000])
def test_all_rows_right_are_exactly_1_on_cuda(n):
    """Compiled, where a division may become a product with 1/n: 41 is the first n to show that."""
    y = torch.arange(n, device='cuda')[:, None] % 3
    _, acc = torch.compile(task_losses, dynamic=False)(F.one_hot(y[:, 0], 3).float(), y, [3])
    assert acc.item() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('task', ['miiii', 'a*b,a+b', 'add'])
def test_captured_graph_is_the_eager_step(tmp_path, task):
    """200 epochs: the same losses and filter memory as without capture, new dropout at every replay."""
    words = '--device cuda --epochs 200 --optimizer adamw --lamb 0.5 --lr 3e-4 --task'.split() + [task]
    eager = trained(tmp_path / 'eager', *words, '--compile', 'off')
    graph = trained(tmp_path / 'graph', *words, '--compile', 'on')
    a, b = (records(folder)['train_loss'][:50] for folder in (eager, graph))
    assert np.allclose(a, b, rtol=1e-2, atol=1e-4)
    a, b = (data.load(folder / 'ckpt.pt')['filter'] for folder in (eager, graph))
    assert all(torch.allclose(a[name], b[name], rtol=0.1, atol=1e-3) for name in a)
    still = trained(tmp_path / 'still', *words, *'--epochs 50 --lr 0 --lamb 0 --compile on'.split())
    assert len(np.unique(records(still)['train_loss'].mean(1))) > 45  # only the masks can move the loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_fast_recipe_on_cuda_resumes_under_capture(tmp_path):
    words = ['--device', 'cuda', '--preset', 'fast', '--spectra_every', 5, '--decay_from', 1, '--epochs']
    whole = records(trained(tmp_path / 'a', *words, 60))
    trained(tmp_path / 'b', *words, 30)
    assert cli('--resume', '--epochs', 60, '--out', tmp_path / 'b').returncode == 0
    resumed = records(tmp_path / 'b')
    assert np.allclose(whole['train_loss'], resumed['train_loss'], rtol=0.05, atol=1e-3)
    assert np.isfinite(resumed['spectrum']).all()


# ---------------------------------------------------------------- spectra

def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    """Standard normal numbers."""
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def fourier_features(rows, periods, width, seed=0, scrambled=False):
    """Like the number tokens of a pre-trained model (rows, width), rms 0.1: cosine and sine of each period in
    the row number, in random directions. Scrambled, every row has each wave at a random phase."""
    g = seeded(seed)
    directions = torch.randn(2 * len(periods), width, generator=g, dtype=torch.float64)
    turns = torch.arange(rows)[:, None] / torch.tensor(periods, dtype=torch.float64)     # rows periods
    if scrambled:
        turns = torch.rand(turns.shape, generator=g, dtype=torch.float64)
    phase = 2 * torch.pi * turns
    W = torch.cat([phase.cos(), phase.sin()], 1) @ directions
    return (0.1 * W / W.square().mean().sqrt()).float()


def plane_wave(p, q, k, stride, sign=1, phase=0.0):
    """cos(2 pi k (x0 +- stride x1) / q + phase) over all inputs, from Python integers: (p^2,)."""
    turns = [k * (x0 + sign * stride * x1) % q for x1 in range(p) for x0 in range(p)]
    return torch.tensor([math.cos(2 * math.pi * turn / q + phase) for turn in turns])


def cosine_of_digit(p, q, k, which):
    """cos(2 pi k x / q) over all inputs, where x is digit 0 or 1: (p^2,)."""
    digit = torch.arange(p * p) // p ** which % p
    return torch.cos(2 * torch.pi * k * digit / q)


def fit_of(p, classes, stride):
    """(q, k) of the waves of some classes, where each stands among them, and their solver."""
    freqs = analyze.wave_freqs(classes)
    at = {tuple(pair): i for i, pair in enumerate(freqs.tolist())}
    return freqs, at, analyze.wave_solver(p, analyze.waves(p, classes, stride))


def layer(neurons, p, classes, solver):
    """What the analysis says of the activations of a layer, (p^2, F)."""
    d = SimpleNamespace(classes=classes)
    return analyze.neurons(SimpleNamespace(p=p, d=d, acts=dict(neurons=neurons), solver=solver))


@pytest.fixture(scope='module')
def at_113():
    """`fit_of` the 29 tasks."""
    return fit_of(113, data.primes_below(113), 113)


def test_waves_and_their_count():
    p, classes = 113, data.primes_below(113)
    freqs = analyze.wave_freqs(classes)
    basis = analyze.waves(p, classes, p)
    assert len(freqs) == 726
    sums = basis[:2].flatten(0, 1)
    sums = F.normalize(sums[sums.any(1)], dim=1)
    assert len(sums) == 1451
    eigenvalues = torch.linalg.eigvalsh(sums @ sums.T)
    assert eigenvalues.aminmax() == pytest.approx((0.745, 1.329), abs=1e-3)  # nearly orthonormal
    n = np.arange(p ** 2)
    difference = n % p - p * (n // p)
    for i in (5, 400, 725):
        q, k = freqs[i].tolist()
        angles = [2 * np.pi * k / q * phase for phase in (n, difference)]
        expected = [wave(angle) for angle in angles for wave in (np.cos, np.sin)]
        assert np.allclose(basis[:, i], expected, atol=1e-5)
    assert np.allclose(basis[:, 0], [(-1.0) ** n, 0 * n, 0 * n, 0 * n], atol=1e-5)  # q = 2


def test_recorded_spectra_find_planted_waves():
    def recorded(neurons, solver):
        def stub(x, acts):
            acts.update(neurons=neurons)
        d = SimpleNamespace(x=None, y=neurons)
        return analyze.spectra_of(stub, d, solver, contextlib.nullcontext())

    p = 31
    _, at, solver = fit_of(p, data.primes_below(p), p)
    first = plane_wave(p, 29, 5, p, phase=0.7) + 3
    second = 2 * plane_wave(p, 23, 4, p, sign=-1, phase=0.7) + cosine_of_digit(p, 29, 3, 0)
    neurons = torch.stack([first, second], 1)
    out = recorded(neurons, solver)
    # half the square of the amplitude, and the mean over two neurons
    planted = [out['sum_power'][at[29, 5]].item(), out['difference_power'][at[23, 4]].item()]
    assert planted == pytest.approx([0.25, 1], rel=0.05)
    assert out['sum_power'].sum() + out['difference_power'].sum() - sum(planted) < 0.01
    assert torch.allclose(out['variance'][0], neurons.var(0, correction=0).mean())
    assert abs(out['variance'][1] - 0.25) < 0.02

    grids = (neurons - neurons.mean(0)).T.reshape(2, p, p).numpy()
    by_numpy = np.abs(np.fft.fft2(grids))[:, :p // 2 + 1].mean((0, 2)) / p ** 2
    assert np.allclose(out['spectrum'], by_numpy, atol=1e-5)
    # four bins, one frequency of x1; the mean does not count
    mod_p = 5 + plane_wave(p, p, 4, 1) + cosine_of_digit(p, p, 3, 0) / 2
    assert recorded(mod_p[:, None], solver)['active'].tolist() == [4, 1]


def test_leakage_of_the_papers_count():
    """A wave mod p lights 2 bins of the 2-D DFT; one of period q < p, though one wave, 6 to 134, about 70."""
    p = 113
    mod_p = analyze.dft2(plane_wave(p, p, 25, 1)[:, None], p)
    assert mod_p.shape == (57, 113, 1) and mod_p[25, 25, 0] > 0.49
    assert analyze.active_counts(mod_p, torch.tensor([True])).tolist() == [2, 1]
    waves = analyze.waves(p, data.primes_below(p), p)[0]
    counts = []
    for some in waves.split(242):
        bins = torch.fft.fft2(some.view(-1, p, p)).abs().flatten(1)
        bar = bins.mean(1, keepdim=True) + 2 * bins.std(1, keepdim=True)
        counts.append((bins > bar).sum(1))
    counts = torch.cat(counts).float()
    assert len(counts) == 726 and abs(counts.mean() - 70.8) < 0.1
    assert (counts.min(), counts.max()) == (6, 134)
    some = analyze.dft2(waves[::9].T, p)
    alive = torch.ones(81, dtype=torch.bool)
    assert abs(analyze.active_counts(some, alive)[0] - counts[::9].mean()) < 0.1


def test_planted_waves_are_found_by_kind(at_113):
    """Sum waves and difference waves, each as such with nearly all of its variance; 60 (q, k)."""
    p = 113
    freqs, _, solver = at_113
    for row, sign in enumerate((1, -1)):
        picks = torch.linspace(0, 725, 60).long().tolist()
        picks = [i for i in picks if freqs[i, 0] > 2 or sign == 1]
        neurons = torch.stack([plane_wave(p, *freqs[i].tolist(), p, sign, 0.4) for i in picks], 1)
        parts = analyze.decompose(neurons, p, solver)
        share = parts['waves'] / parts['variance']
        assert share[row, picks].diagonal().min() > 0.99
        single = analyze.single_waves(parts['products'], p, solver)
        assert single.argmax(0).tolist() == picks
        assert (single <= 1.001 * parts['interaction']).all()


def test_what_one_digit_has_alone_is_in_no_wave(at_113):
    """Interaction below 1e-6 of the variance is rounding, no wave has a share of it; above, one has."""
    freqs, _, solver = at_113
    alone = 10 + 5 * cosine_of_digit(113, 113, 9, 0) + 5 * cosine_of_digit(113, 113, 3, 1)
    wave = plane_wave(113, 29, 5, 113)
    neurons = torch.stack([alone, alone + 1e-3 * wave, alone + 0.02 * wave], 1)
    out = layer(neurons, 113, data.primes_below(113), solver)
    assert out['neuron_wave_share'].tolist() == pytest.approx([0, 0, 1], abs=1e-3)
    assert out['neuron_wave'][2].tolist() == [29, 5]
    assert out['neurons that vary'] == 3
    assert out['pure neurons'] == out['pure neurons by the sum wave alone'] == 1
    assert out['variance of neurons in x0 or x1 alone'] == pytest.approx(1, abs=1e-5)
    assert out['neuron_split'][:, 0].tolist() == [1, 0, 0, 0]


def test_a_neuron_varies_by_its_own_scale():
    _, _, solver = fit_of(31, [31], 1)
    wave = 1 + plane_wave(31, 31, 5, 1)
    neurons = torch.stack([wave, 1e-3 * wave, 1e-6 * wave, 1000.1 + 0 * wave, 0 * wave], 1)
    out = layer(neurons, 31, [31], solver)
    assert out['neurons that vary'] == out['pure neurons'] == 3
    assert out['neuron_k_share'].tolist() == pytest.approx([1, 1, 1, 0, 0], abs=1e-4)
    assert out['active bins of a neuron'] == 2


def test_a_mixture_is_recovered_with_its_shares(at_113):
    p = 113
    _, at, solver = at_113
    mix = 3 * plane_wave(p, 107, 1, p) + 2 * plane_wave(p, 109, 1, p, phase=1.0)
    mix += plane_wave(p, 13, 4, p, phase=2.0) + plane_wave(p, 29, 3, p, sign=-1)
    power = analyze.decompose(mix[:, None], p, solver)['waves'][:, :, 0]
    # 1/107 and 1/109 overlap a little, so the variance each contributes holds half of their covariance
    planted = {(0, 107, 1): 9 / 2, (0, 109, 1): 4 / 2, (0, 13, 4): 1 / 2, (1, 29, 3): 1 / 2}
    for (row, q, k), variance in planted.items():
        assert abs(power[row, at[q, k]] - variance) < 0.15 * variance
        power[row, at[q, k]] = 0
    assert power.abs().sum() < 0.05


def test_white_noise_has_what_the_closed_form_says(at_113):
    """1 / (p-1)^2 of its interaction in each cosine and each sine."""
    p = 113
    freqs, _, solver = at_113
    parts = analyze.decompose(normal(p * p, 200), p, solver)
    share = parts['waves'][:, freqs[:, 0] > 2].mean(2) / parts['interaction'].mean() * 112 ** 2
    assert abs(share.mean() - 2) < 0.02 and share.min() > 1 and share.max() < 3


def test_the_wave_is_found_after_relu(at_113):
    """max(0, cos(w x0 + a) + cos(w p x1 + b)), as networks have them: half of it in the sum wave, half in the
    difference wave, so that neurons are pure by both together and none is by the sum wave alone."""
    p = 113
    freqs, _, solver = at_113
    g = seeded(1)
    x = torch.arange(p)
    picks = freqs[3 + torch.randperm(723, generator=g)[:40]]
    a, b = torch.rand(2, 40, generator=g) * 6.28
    w = 2 * torch.pi * picks[:, 1] / picks[:, 0]
    of_x0 = torch.cos(w * x[:, None] + a)
    of_x1 = torch.cos(w * p * x[:, None] + b)
    neurons = torch.relu(of_x0[None] + of_x1[:, None]).flatten(0, 1)  # x1 x0 -> row n
    out = layer(neurons, p, data.primes_below(p), solver)
    share = out['neuron_wave_share']
    assert torch.equal(out['neuron_wave'], picks)
    assert out['pure neurons'] == 40 and out['waves of the pure neurons'] == len(picks.unique(dim=0))
    assert out['pure neurons by the sum wave alone'] == 0
    assert 0.5 < share.min() and share.max() <= 1
    for of, shares in (('wave', share), ('k', out['neuron_k_share'])):  # of 40 the mean of the middle two
        assert out[f'share of best {of}, median neuron'] == pytest.approx(np.median(shares), rel=1e-6)
        assert shares.median() < np.median(shares)
    kinds = ('sum waves', 'difference waves', 'x0 or x1 alone', 'the rest')
    sums, differences, *others = (out[f'variance of neurons in {kind}'] for kind in kinds)
    assert abs(sums / differences - 1) < 0.1
    assert sums + differences + sum(others) == pytest.approx(1, abs=1e-4)
    assert torch.allclose(out['neuron_split'].sum(0), torch.ones(40), atol=1e-3)


def test_the_p_dft_share_counts_every_wave_of_a_frequency():
    """Sum, difference and both marginals of a frequency k mod p are wholly k's own."""
    p = 31
    _, _, solver = fit_of(p, [p], 1)
    waves = [plane_wave(p, p, 5, 1), plane_wave(p, p, 7, 1, sign=-1)]
    waves += [cosine_of_digit(p, p, 3, 0), cosine_of_digit(p, p, 4, 1)]
    out = layer(torch.stack(waves, 1) + 1, p, [p], solver)
    assert out['neuron_k'].tolist() == [5, 7, 3, 4]
    assert torch.allclose(out['neuron_k_share'], torch.ones(4), atol=1e-4)
    split = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0.0]])
    assert torch.allclose(out['neuron_split'], split, atol=1e-4)
    assert (out['pure neurons'], out['pure neurons by the sum wave alone']) == (2, 1)


def fourier_basis(n):
    """Orthonormal waves over n rows by their formula: constant, cos 1, sin 1, cos 2, sin 2, ..."""
    rows = [torch.full((n,), n ** -0.5, dtype=torch.float64)]
    for k in range(1, n // 2 + 1):
        scale = (1 / n if 2 * k == n else 2 / n) ** 0.5
        phase = 2 * torch.pi * k * torch.arange(n, dtype=torch.float64) / n
        rows += [scale * wave(phase) for wave in (torch.cos, torch.sin)]
    return torch.stack(rows)


@pytest.mark.parametrize('n', [12, 13])
def test_fourier_transforms_of_any_length(n):
    W, i = normal(n, 4), torch.arange(n)
    basis = fourier_basis(n).float()
    assert torch.allclose(basis.T @ basis, torch.eye(n), atol=1e-6)  # the whole of it
    net = SimpleNamespace(W_E=torch.cat([W, W[:1]]))
    of_embedding = analyze.embedding(SimpleNamespace(net=net, p=n))['W_E_fourier']
    assert torch.allclose(of_embedding, (basis @ W)[:n], atol=1e-5)
    power = (basis @ W)[1:].square().view(-1, 2, 4).sum((1, 2))
    assert torch.allclose(analyze.spectrum(W).square(), power[:n // 2], atol=1e-4)

    a = normal(n * n, 3, seed=1)
    grid = (a - a.mean(0)).view(n, n, 3).numpy()
    full = np.abs(np.fft.fft2(grid, axes=(0, 1))) / n ** 2
    assert np.allclose(analyze.dft2(a, n), full[:n // 2 + 1], atol=1e-5)
    x0, x1 = i.expand(n, n), i[:, None]
    turns = torch.stack([3 * x1 + 0 * x0, 5 * (x1 + x0), 2 * (x1 - x0), 6 * (x1 + x0) + 0.1 * n])
    waves = torch.cos(2 * torch.pi * turns / n + 0.4).flatten(1).T
    share, k = analyze.best_frequency(analyze.dft2(waves, n), waves.var(0, correction=0))
    assert k.tolist() == [3, 5, 2, 6] and torch.allclose(share, torch.ones(4), atol=1e-4)


def test_discrete_logarithms_by_brute_force():
    for p in data.primes_below(120):
        powers = ([g ** i % p for i in range(p - 1)] for g in range(1, p))
        of_generators = (row for row in powers if len(set(row)) == p - 1)
        assert analyze.by_discrete_log(p).tolist() == next(of_generators)


def characters(p, ks, directions):
    """Rows 0 .. p-1 of multiplicative characters k, cosine and sine in given directions; 0 has none."""
    log = analyze.by_discrete_log(p).argsort()  # of 1 .. p-1
    turns = torch.tensor(ks) * log[:, None] % (p - 1)
    phase = 2 * torch.pi * turns.double() / (p - 1)
    W = torch.cat([phase.cos(), phase.sin()], 1) @ directions
    return torch.cat([0 * W[:1], W])


def test_density_and_ratio_against_known_values():
    measured = analyze.density_and_ratio
    assert measured(normal(97, 128)) == pytest.approx([1, 0.93], abs=0.02)
    periods = [97 / k for k in (3, 11, 20, 33, 40)]
    five = fourier_features(97, periods, 128)  # ten random directions
    assert measured(five)[0] == pytest.approx(5 / 48)
    directions = normal(8, 128, dtype=torch.float64)
    known = {2479: [1, 0.93], 3578: [1, 0.56], 2468: [0.5, 0], 1357: [0.5, 0]}  # the digits are four k
    for ks, expected in known.items():
        W = characters(97, [*map(int, str(ks))], directions)
        assert measured(W) == pytest.approx(expected, abs=0.02), ks


def test_a_character_is_one_line_in_one_basis_and_flat_in_the_other():
    plane = torch.eye(2, dtype=torch.float64)
    net = SimpleNamespace(W_out=plane, W_E=characters(31, [4], plane), W_U=characters(31, [7], plane).T)
    m = SimpleNamespace(p=31, net=net)
    out = analyze.polynomials(m)
    for name, k in (('W_E', 4), ('W_L', 7)):
        assert out[f'{name} key frequencies by logarithm'] == [k]
        assert out[f'{name} effective frequencies by logarithm'] == pytest.approx(1)
        assert out[f'{name} effective frequencies'] == pytest.approx(15)
        assert out[f'{name} Gini by logarithm'] > 0.9 and out[f'{name} Gini'] < 1e-6
    flat = 2 * torch.ones(15, dtype=torch.float64)  # sqrt(p) at every k of the DFT
    assert torch.allclose(out['W_E_cos_sin'].square().sum(0), flat)
    assert out['W_E sparsest about'] == 0
    net.W_E = net.W_E.roll(5, 0)  # now a wave in the logarithm of n - 5
    shifted = analyze.polynomials(m)
    assert shifted['W_E sparsest about'] == 5 and shifted['W_E Gini by logarithm'] < 0.2
    assert shifted['W_E Gini about it'] == pytest.approx(out['W_E Gini by logarithm'])


def test_neurons_that_are_sharp_over_residues_or_over_logarithms():
    six = characters(31, [4], normal(2, 6, dtype=torch.float64))  # a wave in six phases
    products = (six[:, None] * six).flatten(0, 1)  # x1 x0: a wave of either
    of_sums = plane_wave(31, 31, 5, 1)[:, None].expand(-1, 2).double()
    neurons = torch.cat([products, of_sums], 1)  # columns of two operations
    logits = normal(31 ** 2, 2 * 31)
    m = SimpleNamespace(p=31, d=SimpleNamespace(n_ops=2), logits=logits, acts=dict(neurons=neurons))
    out = analyze.sharp(m)
    assert out['sharp neurons by logarithm'] == [4, 2] and out['sharp neurons'] == [0, 2]
    a, b = 3, 5
    assert out['pattern'][:, a, b].tolist() == logits[a + 31 * b, [1, 32]].tolist()  # class 1 of both


@pytest.mark.parametrize('task', ['add', 'a*b,a+b'])
def test_components_sum_to_the_logits(task):
    d = data.make(task, 7)
    net = Transformer(7, 16, 4, d.classes[0], d.n_ops).requires_grad_(False)
    x, _ = d.part(torch.arange(5, 40))
    parts = analyze.components(net, x)
    assert parts.shape == (6, len(x), 16)
    assert torch.allclose(parts.sum(0) @ net.W_U, net(x), atol=1e-4)
    assert torch.allclose(parts[0], net.W_E[x[:, 2]] + net.W_pos[2])
    net.W_out.zero_()
    net.W_O[[0, 1, 3]] = 0  # head 2 alone
    assert torch.allclose(net(x), (parts[0] + parts[3]) @ net.W_U, atol=1e-4)


def test_a_filter_takes_out_what_it_should_and_nothing_else():
    def through(W_U, P, z):
        """Amplitudes over the classes, without and with the filter."""
        return [torch.fft.rfft(read @ W_U, dim=1) for read in (z, z @ P)]

    g, C = seeded(), 21
    k = torch.tensor([1, 4, 10])
    W_U = torch.randn(32, C, generator=g, dtype=torch.float64)
    z = torch.randn(50, 32, generator=g, dtype=torch.float64)
    P = analyze.without(W_U, k)
    before, after = through(W_U, P, z)
    assert after[:, k].abs().max() < 1e-10 < before[:, k].abs().min()
    assert torch.allclose(P @ P, P) and P.trace().item() == pytest.approx(32 - 6)
    A = analyze.cos_sin(W_U.T)[:, k - 1].flatten(0, 1)
    nearest = torch.eye(32, dtype=torch.float64) - torch.linalg.pinv(A) @ A
    assert torch.allclose(P, nearest)  # nothing else is taken

    directions = torch.linalg.qr(torch.randn(32, C, generator=g, dtype=torch.float64)).Q
    W_U = directions @ fourier_basis(C)  # each frequency by its own
    before, after = through(W_U, analyze.without(W_U, k), z)
    others = [j for j in range(11) if j not in k.tolist()]  # the constant is among them
    assert torch.allclose(after[:, others], before[:, others])
    assert after[:, k].abs().max() < 1e-10


@pytest.mark.parametrize('modulus', [None, 39])
def test_errors_by_brute_force(modulus):
    g = seeded()
    logits = torch.randint(0, 6, (300, 39), generator=g).float()
    y = torch.randint(0, 39, (300,), generator=g)
    logits[:200].scatter_(1, y[:200, None], 7)
    off = []
    for row, right in zip(logits.tolist(), y.tolist()):
        guess = max((c for c in range(39) if c != right), key=row.__getitem__)
        distance = 0 if row[right] > row[guess] else abs(guess - right)
        off.append(min(distance, modulus - distance) if modulus else distance)
    off = np.array(off)
    wrong = off[off > 0]
    expected = [np.mean(off <= most) for most in (0, 2, 10)]
    expected += [np.mean(wrong % 10 == 0), np.mean(wrong == 1)]
    assert analyze.errors(logits, y, modulus) == pytest.approx(expected)
    assert analyze.errors(logits[:200], y[:200], modulus) == [1, 1, 1, 0, 0]


def test_the_loss_is_0_where_nothing_else_is_possible():
    logits = torch.tensor([[3.0, -torch.inf], [-torch.inf, 0.0]])
    loss, acc = task_losses(logits, torch.tensor([[0], [1]]), [2])
    assert (loss.item(), acc.item()) == (0, 1)


def summing_network(p):
    """A network that adds by hand, with logits -0.01 (s - c)^2 + (-1)^(s - c) of class c: a low part for
    the magnitude of s = x0 + x1, a high part for its parity. Attention brings the sum to one dimension,
    neurons bend at every whole number, W_U has the waves."""
    C, D = 2 * p - 1, 2 * p + 2
    net, n = Transformer(p, D, 1, C).requires_grad_(False), torch.arange(C).double()
    waves = fourier_basis(C)  # orthonormal rows over the classes
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


@pytest.fixture(scope='module')
def adder():
    """`summing_network` in base 20 as a part of the analysis takes it; its parts on rows not trained on."""
    d, net, rows = data.make('add', 20), summing_network(20), data.split(400, 0.1, n_valid=120)
    parts = analyze.components(net, d.x[torch.cat(rows[1:])])
    return SimpleNamespace(d=d, net=net, rows=rows, tau=6), parts


@pytest.fixture(scope='module')
def filtered(adder):
    """The scores of the adder without some frequencies; {'filtered: ...': {score: value}} and more."""
    out = analyze.filters(adder[0])
    return {key: dict(zip(analyze.SCORES, v)) if isinstance(v, list) else v for key, v in out.items()}


def test_the_hand_built_adder_adds(adder):
    m, parts = adder
    sums = m.d.x[:, 0] + m.d.x[:, 1]
    off = sums[:, None] - torch.arange(39)
    assert torch.allclose(m.net(m.d.x), -0.01 * off ** 2 + 1 - 2 * (off % 2), atol=1e-2)
    out = analyze.outputs(m)
    assert out['logits of "=", heads, MLP: periods'][2] == pytest.approx([2], abs=1e-3)  # the parity
    assert out['class_spectra'][:2].abs().max() < 1e-3
    amplitudes = np.abs(np.fft.rfft((parts[2] @ m.net.W_U).numpy()))[:, 1:]
    share = np.square(amplitudes[:, :6]).sum() / np.square(amplitudes).sum()
    assert out['logits of "=", heads, MLP: low share'][2] == pytest.approx(share, rel=1e-4)
    assert np.allclose(out['class_spectra'][2], amplitudes.mean(0), rtol=1e-3)


def test_the_hand_built_adder_loses_its_magnitude_or_its_parity(filtered):
    assert filtered['tau, the highest low frequency'] == 6
    assert filtered['dimensions left without low'] == 42 - 12
    assert filtered['dimensions left without high'] == 42 - 26
    for name in ('nothing', 'low from attention', 'high from attention'):
        assert filtered[f'filtered: {name}']['accuracy'] == 1
    low, high = (filtered[f'filtered: {band} from MLP'] for band in ('low', 'high'))
    assert filtered['filtered: low from both'] == low
    assert low['within 10'] < 0.5 and low['errors off by 1'] < 0.02  # anywhere of its parity
    assert high['within 10'] == 1 and high['accuracy'] < 0.3
    assert high['errors off by 1'] > 0.3  # near, and of any parity


def test_filters_stand_beside_random_directions(adder, filtered):
    (m, parts), g, drawn = adder, seeded(), []
    for _ in range(3):  # what the MLP writes, without 12 random directions
        Q = torch.linalg.qr(torch.randn(42, 12, generator=g)).Q
        left = parts.sum(0) - parts[-1] @ Q @ Q.T
        drawn.append(analyze.errors(left @ m.net.W_U, m.d.y[torch.cat(m.rows[1:]), 0]))
    null = [*filtered['filtered: low from MLP, random'].values()]
    assert null == pytest.approx(np.mean(drawn, 0).tolist(), abs=2e-3)


def test_filters_are_measured_on_validation_and_test_rows_together(adder):
    """By the answers, made wrong in one part after the other."""
    m, _ = adder
    right = []
    for rows in m.rows:
        y = m.d.y.clone()
        y[rows] = (y[rows] + 1) % 39
        changed = SimpleNamespace(**vars(m) | dict(d=m.d._replace(y=y)))
        right.append(analyze.filters(changed)['filtered: nothing'][0])
    assert right == pytest.approx([1, 240 / 360, 120 / 360])


@pytest.mark.parametrize('rows', [100, 261])
def test_planted_periods_are_found_and_shuffled_ones_not(tmp_path, capsys, rows):
    periods = [2, 5, 10]
    W = fourier_features(rows, periods, 64) + 0.05 * normal(rows, 64, seed=1)
    k, times, by_chance, spectrum, _ = analyze.outliers(W)
    assert sorted(rows / k) == pytest.approx(periods, rel=2e-3) and by_chance < times.min()
    assert len(spectrum) == rows // 2 and spectrum.argmax() + 1 in k.round()
    trend = torch.arange(rows)[:, None] / rows @ torch.ones(1, 64)
    assert analyze.outliers(trend + 0.1 * W)[0] == pytest.approx(k, abs=0.02)  # however strong a trend is
    shuffled = torch.randperm(rows, generator=seeded(2))
    for order, said in (slice(None), 'times of the spectrum'), (shuffled, '): none'):
        torch.save(W[order], tmp_path / 'w.pt')
        analyze.main(['--embedding', str(tmp_path / 'w.pt')])
        assert said in capsys.readouterr().out


@pytest.mark.parametrize('rows', [100, 261])
def test_a_period_ten_times_weaker_than_another_off_the_grid(rows):
    """Neither is a whole frequency, so that the strong one leaks into all of the spectrum."""
    for strong, apart in itertools.product((12.37, 33.5), (-7, -2.5, 2, 4.4, 9)):  # frequencies
        W = fourier_features(rows, [rows / strong], 64)
        W += 0.1 * fourier_features(rows, [rows / (strong + apart)], 64, seed=1) + 1e-4 * normal(rows, 64)
        assert sorted(analyze.outliers(W)[0] - strong) == pytest.approx(sorted([0, apart]), abs=0.1)


@pytest.mark.parametrize('kind', ['Gaussian', 'scrambled', 'falling as 1/k'])
def test_nothing_stands_out_of_noise(kind):
    mistaken, k = 0, torch.arange(131).clamp(min=1)
    for seed in range(20):
        W = normal(261, 64, seed=seed)
        if kind == 'scrambled':
            W = fourier_features(261, [2, 5, 10], 64, seed, scrambled=True)
        if kind == 'falling as 1/k':
            W = torch.fft.irfft(torch.fft.rfft(W, dim=0) / k[:, None], n=261, dim=0)
        mistaken += len(analyze.outliers(W)[0]) > 0
    assert mistaken <= 1  # by chance two or three in a hundred


def test_a_large_matrix_takes_seconds():
    W, began = fourier_features(50_000, [10], 64) + normal(50_000, 64), time.perf_counter()
    assert analyze.outliers(W)[0] == pytest.approx([5000], abs=0.1)
    assert time.perf_counter() - began < 20


def test_statistics_against_known_values():
    assert analyze.gini(torch.ones(10)) == 0
    assert analyze.gini(torch.tensor([0.0] * 9 + [5])) == pytest.approx(0.9)
    x = torch.rand(40, generator=seeded())
    by_definition = (x[:, None] - x).abs().mean() / (2 * x.mean())
    assert analyze.gini(x) == pytest.approx(by_definition.item(), rel=1e-5)
    assert analyze.effective(torch.tensor([2.0, 2, 2, 0, 0])) == 3
    assert torch.allclose(analyze.threshold(x[:, None]), x.mean() + 2 * x.std())


def test_embedding_of_a_matrix_with_known_singular_values():
    """The second of S passes half of 11, the fourth 9.9; the first half of 30.375, the third 27.3."""
    S = torch.tensor([4.0, 3, 2, 1, 0.5, 0.25, 0.25])
    Q = torch.linalg.qr(normal(7, 7)).Q
    W = Q * S @ Q.T
    with_operation = torch.cat([W, torch.ones(1, 7)])  # that token is no digit
    out = analyze.embedding(SimpleNamespace(p=7, net=SimpleNamespace(W_E=with_operation)))
    assert torch.allclose(out['singular_values'], S, atol=1e-5)
    for of, counts in (('', [2, 4]), (' of variance', [1, 3])):
        assert [out[f'W_E singular values to {share} %{of}'] for share in (50, 90)] == counts
    amplitudes = torch.fft.rfft(W, dim=0)[1:].abs()
    norms = amplitudes.norm(dim=1) * (2 / 7) ** 0.5
    assert torch.allclose(out['W_E_norms'], norms, atol=1e-4)
    assert out['W_E Gini'] == pytest.approx(analyze.gini(norms), abs=1e-4)
    effective = norms.square().sum() ** 2 / norms.pow(4).sum()
    assert out['W_E effective frequencies'] == pytest.approx(effective.item(), rel=1e-4)
    same = (out['left_vectors'] * Q).sum(0).abs()  # the last two values are equal, their vectors free
    assert torch.allclose(same[:5], torch.ones(5), atol=1e-3)


def test_random_weights_carry_nothing():
    """Random networks and white noise are never beyond ten times white noise; a planted wave is."""
    d = data.make('miiii', 31)
    _, _, solver = fit_of(31, d.classes, 31)
    for seed in range(6):
        torch.manual_seed(seed)
        net = Transformer(31, 128, 4, sum(d.classes)).requires_grad_(False)
        acts = {}
        net(d.x, acts=acts)
        for neurons in (acts['neurons'], torch.randn(31 ** 2, 128)):
            out = layer(neurons, 31, d.classes, solver)
            assert out['waves (q, k) carried'] == out['moduli q carried'] == out['pure neurons'] == 0
            assert out['share of best wave, median neuron'] < 0.1
    planted = plane_wave(31, 29, 5, 31) + plane_wave(31, 29, 7, 31)
    out = layer(normal(31 ** 2, 128) + planted[:, None], 31, d.classes, solver)
    assert (out['waves (q, k) carried'], out['moduli q carried']) == (2, 1)
    assert out['waves carried, effective number'] < 10
    dead = layer(torch.rand(8).expand(31 ** 2, 8).contiguous(), 31, d.classes, solver)
    assert all(torch.as_tensor(value).isfinite().all() for value in dead.values())
    assert dead['neurons that vary'] == dead['waves (q, k) carried'] == 0


def test_the_weaker_half_of_many_waves_is_not_carried():
    share = torch.tensor([[0.1] * 4 + [0.3] * 4 + [0.0] * 2, [1e-3] * 10])
    expected = [[False] * 4 + [True] * 4 + [False] * 2, [False] * 10]
    assert analyze.carried(share, 113).tolist() == expected


def hand_built(p, keys, phases=16):
    """Weights (D = 32) that compute (a + b) mod p by cosines. Attention averages the two digits, so the
    residual stream has cos(w a) + cos(w b) and the sine: a vector of angle w (a + b) / 2. Neurons look at it
    from equally spaced angles f, and the sum of max(0, r cos(angle - f)) cos(2 f - w c) over f is a multiple
    of r cos(w (a + b) - w c)."""
    D, x = 32, torch.arange(p)
    W = {name: torch.zeros_like(w) for name, w in Transformer(p, D, 4, p).state_dict().items()}
    W['W_pos'][:2, -1] = 1e-3  # not zero, so that the correlation is defined
    W['W_V'][:] = torch.eye(D).view(D, 4, 8).transpose(0, 1)
    W['W_O'][:] = torch.eye(D).view(4, 8, D)
    f = 2 * torch.pi * torch.arange(phases) / phases
    for i, k in enumerate(keys):
        w = 2 * torch.pi * k / p
        neurons, read = slice(phases * i, phases * (i + 1)), 2 * i
        write = 2 * len(keys) + 2 * i
        for shift, wave in enumerate((torch.cos, torch.sin)):
            W['W_E'][:p, read + shift] = wave(w * x)
            W['W_in'][read + shift, neurons] = wave(f)
            W['W_out'][neurons, write + shift] = wave(2 * f)
            W['W_U'][write + shift] = 20 * wave(w * x)
    return W


KEYS = [3, 7, 12]


@pytest.fixture(scope='module')
def modular(tmp_path_factory):
    """A run modulo 31 with `hand_built` weights."""
    words = '--task nanda --p 31 --n_heads 4 --epochs 1 --spectra_every 0'
    folder = trained(tmp_path_factory.mktemp('built'), *words.split())
    ckpt = data.load(folder / 'ckpt.pt') | dict(model=hand_built(31, KEYS))
    data.write(folder / 'ckpt.pt', lambda f: torch.save(ckpt, f))
    return analyze.load_run(folder)


def test_a_hand_built_network_is_taken_apart(modular):
    """Its accuracy is 1, and its key frequencies are found in logits, neurons and embedding."""
    n, arrays = modular.final, modular.arrays
    assert arrays['snapshot_valid_accuracies'][-1] == arrays['snapshot_train_accuracies'][-1] == [1]
    assert n['key frequencies'] == KEYS
    assert n['waves (q, k) carried'] == 3 and n['moduli q carried'] == 1
    assert n['W_E effective frequencies'] < 3.01
    assert np.allclose(n['heads: attention to x0 less x1'], 0, atol=1e-6)
    assert n['W_pos correlation'] == pytest.approx(1, abs=1e-4)
    assert n['neurons that vary'] == 48
    own = np.repeat(KEYS, 16)
    assert (arrays['neuron_k'][:48] == own).all() and (arrays['neuron_wave'][:48, 1] == own).all()
    assert (arrays['neuron_k_share'][:48] > 0.8).all() and not arrays['neuron_k_share'][48:].any()


def test_a_neurons_share_by_plain_least_squares(modular):
    """Of the variance of a neuron of the first key, in all waves of its frequency."""
    neuron = modular.forward()[1]['neurons'][:, 3].double().numpy()
    x0, x1, _ = modular.data.x.T.numpy()
    w = 2 * np.pi * 3 / 31
    angles = [w * x0, w * x1, w * (x0 + x1), w * (x0 - x1)]
    columns = np.stack([wave(angle) for angle in angles for wave in (np.cos, np.sin)], 1)
    target = neuron - neuron.mean()
    explained = columns @ np.linalg.lstsq(columns, target, rcond=None)[0]
    assert np.isclose(modular.arrays['neuron_k_share'][3], explained.var() / target.var(), rtol=1e-3)


def test_losses_without_the_key_frequencies_and_with_them_alone(modular):
    """Both by a plain least-squares fit: without the keys all is lost, with them alone nothing."""
    n, d, logits = modular.final, modular.data, modular.forward()[0]
    sums = d.x[:, 0] + d.x[:, 1]
    angles = [2 * torch.pi * k * sums / 31 for k in KEYS]
    waves = torch.stack([wave(angle) for angle in angles for wave in (torch.cos, torch.sin)], 1)
    fitted = waves @ torch.linalg.lstsq(waves, logits).solution
    rows = data.split(31 ** 2, modular.config['train_frac'])[0]

    def loss(z, rows):
        return F.cross_entropy(z[rows].double(), d.y[rows, 0])
    assert np.isclose(n['restricted loss'], loss(logits.mean(0) + fitted, slice(None)), rtol=0.02)
    assert np.isclose(n['excluded loss'], loss(logits - fitted, rows), rtol=0.02)
    full = n['loss on all inputs']
    assert full < 0.2 and abs(n['restricted loss'] - full) < 0.1
    assert n['excluded loss'] > math.log(31) - 0.1


def test_how_well_cosines_fit_the_logits(modular):
    n, d, logits = modular.final, modular.data, modular.forward()[0]
    centred = logits - logits.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    sums = d.x[:, 0] + d.x[:, 1]
    turns = torch.arange(1, 16)[:, None, None] * (sums[:, None] - torch.arange(31)) / 31  # k rows c
    waves = torch.cos(2 * torch.pi * turns)
    products = (waves * centred).mean((1, 2))
    expected = products.square() / waves.square().mean((1, 2)) / centred.square().mean()
    fit = modular.arrays['fit']
    assert np.allclose(fit, expected, atol=1e-4)
    assert n['logits in key cosines'] == pytest.approx(sum(fit[k - 1] for k in KEYS))
    assert n['logits in key cosines'] > 0.5
    assert n['logits in as many others'] < 1e-4


def test_a_table_of_the_rows_fits_key_cosines_no_better_than_others():
    d, rows = data.make('nanda', 31), data.split(31 ** 2, 0.3)
    known = torch.zeros(31 ** 2, 1)
    known[rows[0]] = 1
    logits = known * F.one_hot(d.y[:, 0], 31)
    out = analyze.mechanism(SimpleNamespace(p=31, d=d, rows=rows, logits=logits, key=KEYS))
    key, others = out['logits in key cosines'], out['logits in as many others']
    assert out['key frequencies'] == KEYS
    assert key == pytest.approx(others, rel=1e-4) and 5 * key == pytest.approx(0.3, abs=0.02)  # of 15 k
    own = analyze.mechanism(SimpleNamespace(p=31, d=d, rows=rows, logits=logits, key=None))
    assert own['key frequencies'] == []


def test_scores_of_attention():
    p = 31
    att = torch.zeros(p * p, 3, 2)
    att[:, 0, 0] = att[:, 1, 1] = 1  # a head on x0, a head on x1
    out = analyze.attention(SimpleNamespace(p=p, d=SimpleNamespace(n_ops=1), acts=dict(att=att)))
    assert out['heads: attention to x0 less x1'] == [1, -1]


# ---------------------------------------------------------------- parts taken out

def planted_groups():
    """Neurons and weights by hand over n < 121: n mod 5 and n mod 7 have neurons of their own, and "does 5
    divide n" reads those of the first. A constant neuron makes a network without waves say 0."""
    n = torch.arange(121)
    y = torch.stack([n % 5, n % 7, (n % 5 != 0).long()], 1)
    pairs = [(5, 1), (5, 2), (7, 1), (7, 2), (7, 3)]
    columns, W_U = [], []
    for q, k in pairs:
        for wave in (torch.cos, torch.sin):
            columns.append(wave(2 * torch.pi * k * n / q))
            of_5, of_7 = (10 * wave(2 * torch.pi * k * torch.arange(c) / c) * (q == c) for c in (5, 7))
            divides = torch.tensor([10.0, 0.0]) * (q == 5) * (wave is torch.cos)
            nothing = 3.0 * (q == 7)  # the same to all classes
            W_U.append(torch.cat([of_5 + nothing, of_7, divides]))
    columns.append(torch.ones(121))
    says_0 = torch.zeros(14)
    says_0[[0, 5]] = 0.1
    says_0[13] = 6  # 5 divides n if the two cosines make more
    W_U = torch.stack([*W_U, says_0])
    neurons = torch.stack(columns, 1)
    d = data.make('miiii', 11)._replace(y=y, classes=[5, 7, 2], names=['5', '7', '5 | n'])
    net = Transformer(11, 44, 1, 14).requires_grad_(False)
    net.W_out.zero_()
    net.W_out[:11, :11] = torch.eye(11)
    net.W_U.zero_()
    net.W_U[:11] = W_U
    waves = torch.tensor([pair for pair in pairs for _ in 'cs'] + [(2, 1)] * 166)
    found = dict(neuron_wave=waves, neuron_wave_share=torch.tensor([0.9] * 10 + [0.5] * 166))
    acts = dict(neurons=F.pad(neurons, (0, 176 - 11)))
    rows = data.split(121, 0.3)
    return SimpleNamespace(net=net, d=d, p=11, rows=rows, logits=neurons @ W_U, acts=acts, found=found)


def test_planted_groups_and_what_fails_without_them():
    m = planted_groups()
    out = analyze.circuits(m, draws=3)
    y = m.d.y[torch.cat(m.rows[1:])]
    a, b, _ = (y == 0).float().mean(0)  # what remains for a task without its neurons
    divides = (y == 1).float().mean(0)[2]
    assert out['groups'].tolist() == [5, 7, 2] and out['group_sizes'].tolist() == [4, 6, 0]
    assert torch.allclose(out['necessary'], torch.tensor([[a, 1, divides], [1, b, 1], [1, 1, 1]]))
    assert torch.allclose(out['sufficient'], torch.tensor([[1, b, 1], [a, 1, divides], [a, b, divides]]))
    assert torch.allclose(out['written'], torch.tensor([[1, 0, 1], [0, 1, 0], [0.0, 0, 0]]), atol=1e-5)
    losses = out['necessary_losses']
    assert (losses[out['necessary'] == 1] < 0.5).all() and losses[0, 0] > 1 and losses[1, 1] > 1
    assert (out['resampled'][[0, 1], [0, 1]] < 0.5).all() and (out['resampled'] != out['necessary']).any()
    assert (out['resampled'][[0, 1, 1], [1, 0, 2]] == 1).all() and (out['resampled'][2] == 1).all()
    for null in (out['random'], out['as_strong']):
        assert null.shape == (3, 3, 3) and (null[:, 2] == 1).all()  # no neurons, nothing lost
    assert out['random'][:, :2].mean() > 0.95  # a few of 176, most of which do nothing
    assert out['as_strong'][:, :2].mean() < 0.9
    own = torch.stack([(1 - a) / (4 / 5) - (1 - divides) / (1 / 2), (1 - b) / (6 / 7), torch.zeros(())])
    assert out['separation'] == pytest.approx(own.mean().item(), abs=1e-5)
    assert out['separation, the least of a group'] == pytest.approx(own.min().item(), abs=1e-5)
    expected = analyze.separations(out['resampled'], torch.ones(3), [5, 7, 2]).mean().item()
    assert out['separation, resampled'] == pytest.approx(expected, abs=1e-6)
    assert out['separation, waves above 0.7'] == out['separation']
    assert out['separation, waves above 0.3'] == out['separation']  # the constant joins a group, of q = 2
    for name in ('random', 'as_strong'):
        nulls = [analyze.separations(x, torch.ones(3), [5, 7, 2]).mean().item() for x in out[name]]
        expected = [min(nulls), np.mean(nulls), max(nulls)]
        assert out[f'separation, {name}: least, mean, most'] == pytest.approx(expected, abs=1e-6)
    assert out['tasks learned'] == 3
    assert out['own task without its group'] == pytest.approx(((a + b + 1) / 3).item())
    assert out['other tasks without it'] == pytest.approx((5 + divides.item()) / 6)
    assert out['own task with its group alone'] == pytest.approx((2 + divides.item()) / 3)
    prime = (y != 0).all(1).float().mean().item()
    assert out['primes'].tolist() == pytest.approx([1, 1 - prime, 1 - prime, 1])  # without it all say 0
    assert out['the same by always saying "no prime"'] == pytest.approx(1 - prime)


def test_separation_in_known_cases():
    """A row is a group that is taken out."""
    classes = [2, 5, 11]
    chance = 1 / torch.tensor(classes)
    whole = torch.ones(3)
    apart = torch.where(torch.eye(3, dtype=bool), chance, 1)
    assert torch.allclose(analyze.separations(apart, whole, classes), torch.ones(3))
    assert torch.allclose(analyze.separations(chance.repeat(3, 1), whole, classes), torch.zeros(3))
    assert torch.allclose(analyze.separations(torch.ones(3, 3), whole, classes), torch.zeros(3))
    apart[0, 1:] = chance[1:]  # the group of the first task serves the others, too
    assert torch.allclose(analyze.separations(apart, whole, classes), torch.tensor([0.0, 1, 1]))
    apart[1, 2] = (1 + chance[2]) / 2  # and that of the second half of the third
    assert torch.allclose(analyze.separations(apart, whole, classes), torch.tensor([0, 0.5, 1]))
    two = analyze.separations(apart, torch.tensor([1, 1, 0.89]), classes)  # the third is not learned
    assert torch.allclose(two, torch.tensor([0.0, 1]))


def test_random_groups_are_as_large_or_as_strong():
    g = seeded()
    strength = torch.rand(50, generator=g)
    groups = torch.rand(4, 50, generator=g) < torch.tensor([[0.1], [0.3], [0.6], [0.0]])
    for _ in range(5):
        as_many, as_strong = analyze.random_groups(groups, strength, g)
        assert torch.equal(as_many.sum(1), groups.sum(1)) and (as_many[:3] != groups[:3]).any(1).all()
        total, ours = (groups * strength).sum(1), (as_strong * strength).sum(1)
        assert (ours[:3] >= total[:3] - 1e-5).all() and (ours - total < strength.max()).all() and ours[3] == 0
        assert (as_strong[1:3] != groups[1:3]).any(1).all()


def test_a_share_at_the_bar_is_not_above_it():
    wave = torch.tensor([[7, 1], [5, 2], [3, 1]])
    share = torch.tensor([0.6, 0.5, 0.4])
    assert analyze.owners(wave, share, False).tolist() == [7, 0, 0]
    assert analyze.owners(wave, share, True, 0.45).tolist() == [1, 2, 0]
    logits = torch.tensor([[1.0, 0, 2, 2, 0], [0, 1, 2, 2, 3], [0, 1, 3, 2, 2], [0, 1, 2, 2, 1]])
    assert analyze.says_prime(logits, [2, 3]).tolist() == [False, True, False, True]  # the last is a tie


def test_parts_taken_out_by_brute_force():
    """Neurons, heads and frequencies of a random network against plain forward passes in float64."""
    d, rows = data.make('miiii', 11), data.split(121, 0.4)
    torch.manual_seed(3)
    net = Transformer(11, 32, 2, 17).requires_grad_(False)
    acts = {}
    logits = net(d.x, acts=acts)
    g = seeded(4)
    q = torch.tensor(d.classes)[torch.randint(4, (128,), generator=g)]
    share = torch.rand(128, generator=g)
    found = dict(neuron_wave=torch.stack([q, q], 1), neuron_wave_share=share)
    m = SimpleNamespace(net=net, d=d, p=11, rows=rows, logits=logits, acts=acts, found=found)
    out = analyze.circuits(m, draws=2) | analyze.shared(m)
    unseen = torch.cat(rows[1:])
    W = {name: w.double() for name, w in net.state_dict().items()}

    def losses(z):
        blocks = z[unseen].split(d.classes, 1)
        return torch.stack([F.cross_entropy(block, d.y[unseen, i]) for i, block in enumerate(blocks)])

    def accuracies(z):
        guesses = torch.stack([block.argmax(1) for block in z[unseen].split(d.classes, 1)], 1)
        return (guesses == d.y[unseen]).float().mean(0)
    neurons, mid = acts['neurons'].double(), acts['resid_mid'].double()
    for i, modulus in enumerate(d.classes):
        group = (q == modulus) & (share > 0.5)
        for name, taken in (('necessary', group), ('sufficient', ~group)):
            changed = torch.where(taken, neurons.mean(0), neurons)
            z = (mid + changed @ W['W_out']) @ W['W_U']
            assert torch.allclose(out[name][i], accuracies(z), atol=0.02), name
            if name == 'necessary':
                assert torch.allclose(out['necessary_losses'][i], losses(z).float(), atol=1e-4)
    assert (out['necessary'] != out['necessary'][0]).any()

    def of_heads(kept):
        z = mid.clone()
        for h in range(2):
            values = (W['W_E'][d.x] + W['W_pos']) @ W['W_V'][h]
            head = torch.einsum('nt,ntk,kd->nd', acts['att'][..., h].double(), values, W['W_O'][h])
            z = z if h in kept else z - head + head[unseen].mean(0)
        return accuracies((z + (z @ W['W_in']).relu() @ W['W_out']) @ W['W_U'])
    expected = torch.stack([of_heads([1]), of_heads([0]), of_heads([])])
    assert torch.allclose(out['heads'], expected, atol=0.02)

    n = torch.arange(11, dtype=torch.float64)[:, None]
    for k in range(1, 6):
        basis = torch.cat([wave(2 * torch.pi * k * n / 11) for wave in (torch.cos, torch.sin)], 1)
        changed = W['W_E'].clone()
        changed[:11] -= basis @ torch.linalg.lstsq(basis, changed[:11]).solution
        expected = accuracies(plain_forward(W | dict(W_E=changed), d.x))
        assert torch.allclose(out['frequencies'][k - 1], expected, atol=0.02)
    assert torch.equal(net(d.x), logits)  # the network is as it was


def test_groups_of_one_modulus_and_surgery(modular, capsys):
    """Every key is a group. Without all of them nothing is left, without all others nothing is lost."""
    assert modular.arrays['groups'].tolist() == KEYS and modular.arrays['group_sizes'].tolist() == [16] * 3

    def now(*args):
        *_, line = lines_of(capsys, analyze.main, modular.path, *args)
        name, before, after = line.rsplit(maxsplit=2)
        assert before == '1' and name == '(x0 + x1) mod 31'
        return float(after)
    assert now('--keep', '3,7,12') == 1
    assert now('--cut', '3,7,12') < 0.1
    for name, option in (('necessary', '--cut'), ('sufficient', '--keep')):
        assert now(option, '7,7') == pytest.approx(modular.arrays[name][1, 0], abs=1e-3)


def test_surgery_on_several_moduli():
    """The same numbers as in the analysis of the shipped run, by the command of the README."""
    run = analyze.load_run(HERE / 'assets/miiii')
    _, _, header, *rows = analyze.surgery(run, [3]).splitlines()
    assert header.split() == ['task', 'all', 'neurons', 'now'] and len(rows) == 30
    *tasks, (*_, prime, prime_now) = (row.split() for row in rows)
    now = {task[2]: float(task[4]) for task in tasks}
    assert now.pop('3') < 0.7 and min(now.values()) > 0.98
    assert float(prime) > 0.999 and float(prime_now) < 0.99
    *tasks, _ = (row.split() for row in analyze.surgery(run, [3], keep=True).splitlines()[3:])
    now = {task[2]: float(task[4]) for task in tasks}
    assert now.pop('3') > 0.9 and now['5'] < 0.3 and now['109'] < 0.05


# ---------------------------------------------------------------- analysis and figures of run folders

@pytest.fixture(scope='module')
def analysed(tmp_path_factory):
    """Small runs of all kinds by the commands: {name: folder}, {name: what training and analysis printed}."""
    folders, printed = {}, {}
    tasks = dict(miiii='miiii', nanda='nanda', again='miiii', formulas='a*b,a-b', sums='add')
    for name, task in tasks.items():
        folders[name] = tmp_path_factory.mktemp(name)
        words = f'--task {task} --epochs 30 --spectra_every 8 --out {folders[name]}'.split()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            train.main([*TINY, *words])
            analyze.main([str(folders[name])])
        printed[name] = output.getvalue()
    return folders, printed


@pytest.fixture
def folders(analysed):
    return analysed[0]


@pytest.fixture
def copied(folders, tmp_path):
    """A function: name of a run -> a copy of its folder, to be changed."""
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


@pytest.fixture
def results_file(tmp_path, monkeypatch):
    """Where results are collected, in place of the shipped ones."""
    monkeypatch.setattr(analyze, 'RESULTS', tmp_path / 'results.json')
    return tmp_path / 'results.json'


def told(folder, name='analysis'):
    """A JSON file of a run folder."""
    return json.loads((folder / f'{name}.json').read_text())


def lines_of(capsys, main, *args):
    """What a command prints, in lines."""
    capsys.readouterr()
    main([*map(str, args)])
    return capsys.readouterr().out.splitlines()


def numbers_in(x):
    """All numbers in dicts and lists."""
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else None
    if parts is None:
        return [x] if isinstance(x, (int, float)) else []
    return [number for part in parts for number in numbers_in(part)]


def rewrite(folder, **changed):
    """ckpt.pt with something else in it."""
    ckpt = data.load(folder / 'ckpt.pt') | changed
    torch.save(ckpt, folder / 'ckpt.pt')


def unanalysed(folder):
    """The same folder, without its analysis."""
    for file in folder.glob('analysis.*'):
        file.unlink()
    return folder


def test_analysis_of_a_run(analysed):
    folders, printed = analysed
    folder, again = folders['miiii'], folders['again']
    n = told(folder)
    a = np.load(folder / 'analysis.npz')
    assert all(map(math.isfinite, numbers_in(n)))
    assert all(np.isfinite(a[name]).all() for name in a.files if name != 'names')
    assert all(name in printed['miiii'] for name in n['final'])
    same = (again / 'analysis.json').read_text().replace(str(again), str(folder))
    assert (folder / 'analysis.json').read_text() == same

    ckpt = data.load(folder / 'ckpt.pt')
    start = data.load(folder / 'snapshots' / '00000000.pt', ('model',))
    W_E, W_pos = (ckpt['model'][name].numpy() for name in ('W_E', 'W_pos'))
    S = np.linalg.svd(W_E[:11])[1]
    assert np.allclose(a['singular_values'], S, atol=1e-4)
    assert n['final']['W_E singular values to 50 %'] == np.searchsorted(S.cumsum(), 0.5 * S.sum()) + 1
    pearson = np.corrcoef(W_pos[0], W_pos[1])[0, 1]
    assert np.isclose(n['final']['W_pos correlation'], pearson, atol=1e-5)
    S = np.linalg.svd(start['model']['W_E'][:11].numpy())[1]
    assert np.allclose(a['singular_values_initial'], S, atol=1e-4)  # the run's own start

    d, acts = data.make('miiii', 11), {}
    net = Transformer(11, 32, 2, 17)
    net.load_state_dict(ckpt['model'])
    net(d.x, acts=acts)
    row, x0, x1 = 3 + 11 * 7, 3, 7
    assert np.isclose(a['attention'][1, x0, x1], acts['att'][row, 0, 1].item(), atol=1e-5)  # head 1
    assert np.isclose(a['neurons'][2, x0, x1], acts['neurons'][row, 2].item(), atol=1e-5)


def test_analysis_agrees_with_the_records_of_the_run(folders):
    folder = folders['miiii']
    tasks = told(folder, 'summary')['tasks']
    a, m = (np.load(folder / f'{name}.npz') for name in ('analysis', 'metrics'))
    epochs = [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 30]
    assert a['snapshot_epoch'].tolist() == epochs
    total, alone = m['variance'].T
    recorded = {
        'spectrum': m['spectrum'], 'variance of neurons in x0 or x1 alone': alone / total,
        'variance of neurons in sum waves': m['sum_power'].sum(1) / total,
        'active bins of a neuron': m['active'][:, 0],
        'active frequencies of a neuron, averaged': m['active'][:, 1]}
    for row, epoch in enumerate((0, 8, 16)):
        at = epochs.index(epoch)
        for name, values in recorded.items():
            assert np.allclose(a[f'snapshot_{name}'][at], values[row], atol=1e-4), name
        assert np.allclose(a['snapshot_valid_losses'][at], m['valid_loss'][epoch], rtol=1e-4)
    shares = m['sum_power'][0] / (total - alone)[0]
    assert np.allclose(a['wave_shares_initial'][0], shares, atol=1e-3)
    norms = a['W_E_norms_initial'], a['W_E_norms']
    assert np.allclose(a['snapshot_W_E_norms'][[0, -1]], norms, atol=1e-4)
    for accuracies in (a['valid_accuracies'], a['snapshot_valid_accuracies'][-1]):
        assert np.allclose(accuracies, [task['valid_acc'] for task in tasks])


def test_scores_of_unseen_rows(folders, copied):
    """Beside the filters: of validation and test rows. Modulo p an error is the shorter way round."""
    def scores(run, rows):
        x, y = run.data.part(rows)
        off = (run.net(x).argmax(1) - y.flatten()).abs()
        if run.data.modular:
            off = torch.minimum(off, 11 - off)
        wrong = off[off > 0]
        shares = [*(off <= most for most in (0, 2, 10)), wrong % 10 == 0, wrong == 1]
        return [share.float().mean().item() for share in shares]

    for name in ('sums', 'nanda', 'formulas'):
        run = analyze.load_run(folders[name])
        run.forward()  # has the final weights
        _, valid, test = run.rows
        assert run.final['filtered: nothing'] == pytest.approx(scores(run, torch.cat([valid, test])))
        if name == 'sums':
            task, = told(folders[name], 'summary')['tasks']
            assert task['test_errors'] == pytest.approx(scores(run, test))
    label = 'tau, the highest low frequency'
    folder = copied('sums')
    assert told(folder)['final'][label] == 2
    analyze.main([str(folder), '--tau', '3'])
    assert told(folder)['final'][label] == 3


def test_pairs_whose_swapped_pair_was_trained_on(analysed):
    """Test rows of two kinds, where a and b may be swapped: sums, products, n mod q if p mod q is 1."""
    folders, printed = analysed
    symmetric = {'(x0 + x1) mod 11', 'a*b', 'n mod 2', 'n mod 5', 'x0 + x1'}
    for name in ('nanda', 'formulas', 'miiii', 'sums'):
        run = analyze.load_run(folders[name])
        d, (logits, _) = run.data, run.forward()
        train_pairs, _, test_pairs = ([(n % 11, n // 11) for n in rows.tolist()] for rows in run.rows)
        tasks = told(folders[name], 'summary')['tasks']
        for task, y, block in zip(tasks, d.y.T, logits.split(d.classes, 1), strict=True):
            right = block.argmax(1) == y
            kinds = dict(seen=[], unseen=[])
            for a, b in test_pairs:
                kinds['seen' if (b, a) in train_pairs else 'unseen'].append(right[a + 11 * b].item())
            expected = [np.mean(kind) for kind in kinds.values() if task['name'] in symmetric]
            got = [task[key] for key in task if key.startswith('test_acc_swapped')]
            assert got == pytest.approx(expected)
            line, = (line for line in printed[name].splitlines() if line.startswith(f'{task["name"]} '))
            assert line.split()[-2:] == ([f'{acc:.4g}' for acc in expected] or ['-', '-'])


def test_no_test_row_of_a_kind():
    """Every test row has its swapped pair in training: of the others there is nothing to say."""
    d, n = data.make('a+b', 5), torch.arange(25)
    a, b = n % 5, n // 5
    rows = dict(train=n[a < b], valid=n[a == b], test=n[a > b])
    logits = {part: F.one_hot(d.y[some, 0], 5).float() for part, some in rows.items()}
    parts = {part: d.part(some) for part, some in rows.items()}
    tasks, _ = analyze.scores(d, logits, parts, torch.ones(1), np.ones((1, 1)))
    assert (tasks[0]['test_acc_swapped_seen'], tasks[0]['test_acc_swapped_unseen']) == (1, None)


def test_three_lines_in_a_notebook():
    run = analyze.load_run(HERE / 'assets/nanda')
    logits, acts = run.forward()
    n = torch.arange(113 ** 2)
    answers = (n % 113 + n // 113) % 113
    assert (logits.argmax(1) == answers).all()
    shapes = {name: list(values.shape) for name, values in acts.items()}
    assert shapes == dict(att=[12769, 3, 4], resid_mid=[12769, 128], neurons=[12769, 512],
                          resid_post=[12769, 128])
    assert torch.allclose(acts['resid_post'] @ run.weights['W_U'], logits, atol=1e-3)
    others, _ = run.forward(run.initial)
    assert (others.argmax(1) == answers).float().mean() < 0.1
    settings = dict(plots.plt.rcParams)
    assert isinstance(plots.accuracy(run), plots.plt.Figure) and dict(plots.plt.rcParams) == settings
    plots.plt.close('all')


def test_weights_in_transformer_lens():
    """The names and shapes are those of its HookedTransformer; what we have not, biases, is zero there."""
    lens = pytest.importorskip('transformer_lens')
    run = analyze.load_run(HERE / 'assets/nanda')
    theirs = lens.HookedTransformer(lens.HookedTransformerConfig(
        n_layers=1, d_model=128, n_heads=4, d_head=32, d_mlp=512, act_fn='relu', normalization_type=None,
        attention_dir='bidirectional', d_vocab=114, d_vocab_out=113, n_ctx=3, device='cpu'))
    mlp, places = 'blocks.0.mlp.', dict(W_E='embed.', W_pos='pos_embed.', W_U='unembed.')
    places |= dict(W_in=mlp, W_out=mlp)
    weights = {places.get(name, 'blocks.0.attn.') + name: w for name, w in run.weights.items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and not any('W_' in name for name in missing)
    with torch.no_grad():
        logits = theirs(run.data.x)[:, -1]
    assert (logits.argmax(1) == run.data.y[:, 0]).all()
    assert torch.allclose(logits, run.forward()[0], atol=1e-2)


# figures that a run has no numbers for
OF_ONE_MODULUS = {'mechanism', 'bases', 'pattern', 'components', 'filters', 'density'}
OF_WAVES = {'neuron', 'waves', 'variance', 'omega', 'clusters', 'neurons'}
OF_GROUPS = {'circuits', 'shared', 'formation'}
LACKING = dict(nanda=set(), miiii=OF_ONE_MODULUS, formulas={'mechanism'} | OF_GROUPS,
               sums=OF_WAVES | OF_GROUPS | OF_ONE_MODULUS - {'components', 'filters'})


@pytest.fixture
def runs(folders):
    """The runs by name, opened; figures are closed afterwards."""
    yield {name: analyze.load_run(folder) for name, folder in folders.items()}
    plots.plt.close('all')


def heights(ax):
    return np.array([bar.get_height() for bar in ax.patches])


def lines(ax):
    """The y of the lines by their label."""
    return {line.get_label(): line.get_ydata() for line in ax.lines}


def image(ax):
    return ax.images[0].get_array()


@pytest.mark.parametrize('name', LACKING)
def test_every_figure_has_content_and_a_title_or_is_lacking(runs, name):
    run, lacking = runs[name], set()
    for figure, (draw, takes) in plots.FIGURES.items():
        if takes == 'file':
            continue
        given = [] if takes == 'none' else [run]
        try:
            fig = draw(*given)
        except KeyError:
            lacking.add(figure)
            continue
        for ax in fig.axes:
            assert [*ax.collections, *ax.lines, *ax.patches, *ax.images, *ax.texts] or not ax.axison, figure
        assert ' '.join(draw.__doc__.split()).removesuffix('.') in ' '.join(fig.get_suptitle().split())
        plots.plt.close('all')
    assert lacking == LACKING[name]


def test_files_of_figures(copied, tmp_path, monkeypatch, capsys):
    """In the folder of the run, or of the first in a comparison; those of no run in out/."""
    formulas, miiii = map(copied, ('formulas', 'miiii'))
    monkeypatch.chdir(tmp_path)
    np.save('numbers.npy', fourier_features(50, [2, 5], 8))
    some = {name: plots.FIGURES[name] for name in ('inputs', 'waves', 'pattern', 'positional', 'density')}
    monkeypatch.setattr(plots, 'FIGURES', some)
    more = ['--data', '--embedding', 'numbers.npy']
    printed = lines_of(capsys, plots.main, formulas, miiii, *more)
    expected = {'out': {'inputs', 'embedding_numbers'}, 'formulas': {'waves', 'pattern', 'positional'},
                'miiii': {'waves'}}
    for folder, names in expected.items():
        files = {file.name for file in (tmp_path / folder / 'figures').iterdir()}
        assert files == {f'{name}.{kind}' for name in names for kind in ('png', 'svg')}, folder
    notes = [line for line in printed if line.startswith('note: ')]
    assert notes == [f"note: pattern not drawn: no 'pattern' in {miiii}",
                     f"note: density not drawn: no 'snapshot_W_E FFD' in {formulas} or {miiii}"]
    for folder, gif in ((formulas, 'waves'), (miiii, 'waves'), (miiii, 'embedding')):
        printed = lines_of(capsys, plots.main, folder, '--only', 'positional', '--animate', gif)
        files = [folder / 'figures' / name for name in ('positional.png', f'{gif}.gif')]
        assert printed == [*map(str, files)] and files[1].read_bytes()[:3] == b'GIF'


@pytest.mark.parametrize('backend', ['module://matplotlib_inline.backend_inline', 'nonsense'])
def test_curves_need_neither_an_analysis_nor_a_backend_nor_the_folder(copied, tmp_path, backend):
    """What a notebook leaves in MPLBACKEND, a folder that may not be written to, no wait."""
    folder = unanalysed(copied('nanda'))
    before = contents(folder)
    done = cli(folder, '--only', 'accuracy', '--to', tmp_path / 'to', script='plots.py',
               env=os.environ | dict(MPLBACKEND=backend))
    assert done.returncode == 0, done.stderr
    file = tmp_path / 'to/nanda/figures/accuracy.png'
    assert done.stdout.splitlines() == [str(file)]
    assert contents(tmp_path / 'to').keys() == {file, file.with_suffix('.svg')}
    assert contents(folder) == before


def test_results_elsewhere(copied, folders, tmp_path, capsys):
    """--to FOLDER: analysis and figures in FOLDER/NAME-OF-RUN, nothing in the folder of the run."""
    folder, to = unanalysed(copied('nanda')), tmp_path / 'to'
    before = contents(folder)
    lines_of(capsys, analyze.main, folder, '--to', to)
    printed = lines_of(capsys, plots.main, folder, '--only', 'waves', '--to', to)
    assert printed == [str(to / 'nanda/figures/waves.png')]  # and no other analysis
    assert contents(folder) == before
    assert told(to / 'nanda') == told(folders['nanda'])


def test_two_runs_of_one_name(folders, tmp_path, capsys):
    """What --to holds of the first is not taken for the second."""
    first, second = (shutil.copytree(folders[name], tmp_path / name / 'run') for name in ('nanda', 'sums'))
    lines_of(capsys, analyze.main, first, '--to', tmp_path)
    with pytest.raises(data.Refusal, match='nothing drawn'):
        plots.main([str(second), '--only', 'mechanism', '--to', str(tmp_path)])


def test_an_analysis_older_than_its_run_is_made_again(copied, capsys):
    folder = copied('nanda')
    assert analyze.load_run(folder).final == told(folder)['final']
    assert not capsys.readouterr().out
    whole = (folder / 'analysis.json').read_bytes()
    half = functools.partial((folder / 'analysis.json').write_bytes, whole[:99])
    for spoil in (functools.partial(os.utime, folder / 'ckpt.pt'), half):
        spoil()
        assert analyze.load_run(folder).final == json.loads(whole)['final']
        assert 'no up-to-date analysis yet' in capsys.readouterr().out


def test_figures_of_many_tasks_show_the_numbers(runs):
    miiii, nanda = runs['miiii'], runs['nanda']
    mesh = plots.accuracy(miiii).axes[1].collections[0].get_array()
    assert np.allclose(mesh, miiii.records['valid_acc'].T)  # a row per task, epochs across
    both = plots.attention(miiii, nanda)
    assert np.allclose(image(both.axes[1]), miiii.arrays['attention'][1])
    bars = heights(plots.singular_values(miiii, nanda).axes[1])
    S = nanda.arrays['singular_values']
    assert np.allclose(bars, S / S.sum())
    mod_2 = plots.targets().axes[0].collections[0].get_paths()  # n mod 2 = 1 at odd x0 + x1
    squares = [tuple(path.vertices[:4].mean(0).round()) for path in mod_2]
    assert sorted(squares) == [(x1, x0) for x1 in range(11) for x0 in range(11) if (x0 + x1) % 2]


def test_when_waves_and_tasks_come(runs):
    """Task 3 is half learned before its waves are, task 5 after: at 3/8 and at 3/4 of their way."""
    freqs = analyze.wave_freqs([3, 5])
    up = np.array([[1, 1, 5, 5], [0, 2, 4, 4], [1, 3, 5, 5]]).T.astype(float)  # (3, 1), (5, 1), (5, 2)
    acc = np.full((31, 2), 0.2)
    acc[15:, 0] = acc[15:, 1] = 0.95
    acc[:, 0] = np.where(np.arange(31) >= 14, 0.95, 0.2)
    records = dict(freqs=freqs.numpy(), sum_power=up, variance=np.array([[100, 50.0]] * 4), valid_acc=acc,
                   spectra_epoch=np.arange(4) * 10, epoch=np.arange(31))
    d = SimpleNamespace(classes=[3, 5], names=['n mod 3', 'n mod 5'])
    analysis = {}, dict(groups=np.array([3, 5]))
    other = analyze.Run(**vars(runs['miiii']) | dict(data=d, records=records, analysis=analysis))
    names, epochs, waves, learning, at_half = analyze.formation(other)
    assert names.tolist() == [3, 5] and epochs.tolist() == [0, 10, 20, 30]
    assert np.allclose(waves.T, [[0, 0, 1, 1], [0, 0.5, 1, 1]])
    assert np.allclose(learning.T, [[0, 0, 1, 1]] * 2)
    assert np.allclose(at_half, [0.4, 0.75])
    shown = [ax.collections[0].get_array() for ax in plots.formation(other).axes[:2]]
    assert np.allclose(shown, [waves.T, learning.T])
    records['valid_acc'] = acc * 0.9  # not learned
    assert np.isnan(analyze.formation(other)[-1]).all()
    one = analyze.Run(**vars(other) | dict(data=SimpleNamespace(classes=[5], names=['a + b'])))
    one.records = records | dict(freqs=freqs.numpy()[1:], sum_power=up[:, 1:], valid_acc=acc[:, 1:])
    one.analysis = {}, dict(groups=np.array([1, 2]))
    assert np.allclose(analyze.formation(one)[2].T, [[0, 0.5, 1, 1]] * 2)


def test_figures_of_circuits_show_the_numbers(runs):
    run = runs['miiii']
    a = run.arrays
    Q = len(a['groups'])
    matrix = np.arange(Q * Q).reshape(Q, Q) / Q ** 2  # a row without one group
    changed = a | dict(necessary=matrix, sufficient=matrix.T, group_sizes=np.arange(Q))
    other = analyze.Run(**vars(run) | dict(analysis=(run.analysis[0], changed)))
    ax, count, alone, _ = plots.circuits(other).axes
    assert np.array_equal(image(ax), matrix) and ax.get_ylabel().startswith('without')
    assert [bar.get_width() for bar in count.patches] == list(range(Q))
    assert np.allclose([bar.get_width() for bar in alone.patches], matrix.diagonal())
    frequencies, heads, _ = plots.shared(run).axes
    assert np.array_equal(image(frequencies), a['frequencies']) and np.array_equal(image(heads), a['heads'])
    assert [label.get_text() for label in heads.get_yticklabels()] == ['0', '1', '0, 1']


@pytest.mark.parametrize('moduli', [[2, 3, 5, 7], [7, 2, 5, 3]])
def test_waves_of_moduli_in_any_order(runs, moduli):
    """Each square stands at k/q in the row that is named q, its area is the share."""
    run = runs['miiii']
    freqs = analyze.wave_freqs(moduli)
    share = torch.rand(len(freqs), generator=torch.Generator().manual_seed(0))
    arrays = dict(freqs=freqs.numpy(), wave_shares=share.numpy()[None])
    d = run.data._replace(classes=moduli, names=[f'n mod {q}' for q in moduli])
    other = analyze.Run(**vars(run) | dict(data=d, analysis=(run.analysis[0], arrays)))
    ax = plots.waves(other).axes[0]
    squares = ax.collections[0]
    names = {y: label.get_text() for y, label in zip(ax.get_yticks(), ax.get_yticklabels())}
    for (x, y), area, (q, k), held in zip(squares.get_offsets(), squares.get_sizes(), freqs.tolist(), share):
        assert names[y] == str(q) and x == pytest.approx(k / q)
        assert area == pytest.approx(80 * (held / share.max()).item())
    assert list(names.values()) == [str(q) for q in moduli]


def test_figures_of_one_modulus_show_the_numbers(runs):
    nanda, sums = runs['nanda'], runs['sums']
    losses = lines(plots.mechanism(nanda).axes[2])
    assert np.isclose(losses['all inputs'][-1], nanda.final['loss on all inputs'])
    last = losses['training inputs, without key waves (excluded)'][-1]
    assert np.isclose(last, nanda.final['excluded loss'])
    last = [y[-1] for y in lines(plots.omega(nanda).axes[1]).values()]
    names = ('waves (q, k) carried', 'active bins of a neuron', 'active frequencies of a neuron, averaged')
    assert np.allclose(last, [nanda.final[name] for name in names])
    bars = np.concatenate([heights(ax) for ax in plots.components(sums).axes])
    assert len(bars) == 4 * 10 and np.allclose(bars, sums.arrays['class_spectra'].flatten())
    for run, columns in ((sums, [0, 1, 2, 3, 4]), (nanda, [0, 1, 2, 4])):  # modulo p tens say nothing
        widths = [bar.get_width() for ax in plots.filters(run).axes for bar in ax.patches]
        scores = [run.final[name] for name in run.final if 'filtered' in name and 'random' not in name]
        assert np.allclose(widths, np.array(scores)[:, columns].T.flatten())


def test_figures_of_formulas_show_the_numbers(runs):
    formulas = runs['formulas']
    n, d = formulas.final, formulas.data
    axes = plots.density(runs['nanda'], formulas).axes[3:]
    of_accuracy, *others = map(lines, axes)
    for part, label in dict(valid='validation', train='training').items():
        assert np.isclose(of_accuracy[label][-1], formulas.arrays[f'{part}_accuracies'].mean())
    for measure, drawn in zip(('FFD', 'FCR'), others):
        assert all(np.isclose(drawn[name][-1], n[f'{name} {measure}']) for name in ('W_E', 'W_L'))
        for name in ('W_E', 'W_L'):
            assert np.allclose(drawn[f'Gaussian {name}'], n[f'{name} {measure}, Gaussian'])

    axes = plots.pattern(formulas).axes
    assert 'a*b' in axes[0].get_title() and 'a-b' in axes[4].get_title()
    rows = [3 + 11 * 7, 8 + 11 * 4]
    logits = formulas.forward()[0][rows].unflatten(1, (d.n_ops, 11))[..., 1]  # of class 1
    # 8 and 4 stand at their logarithms 3 and 2
    shown = [[image(axes[0])[3, 7], image(axes[4])[3, 7]], [image(axes[2])[3, 2], image(axes[6])[3, 2]]]
    assert np.allclose(shown, logits, atol=1e-4)
    W_E = formulas.weights['W_E'][:11][analyze.by_discrete_log(11)]
    norms = analyze.cos_sin(W_E).norm(dim=2)
    assert np.allclose(heights(plots.bases(formulas).axes[1]), norms.flatten(), atol=1e-4)


def test_a_figure_says_how_much_it_shows(runs):
    """The first 37 of more; of less it has no word of 37. And eight titles have room beside each other."""
    def words(figure):
        return ' '.join(text.get_text() for text in figure.findobj(plots.plt.Text))

    assert 'first 37' not in words(plots.attention(runs['nanda'], runs['miiii']))
    many = dict(runs['nanda'].final, **{'heads: attention to x0 less x1': [-0.99] * 8})
    arrays = dict(attention=np.ones((8, 40, 40)) / 2)
    run = analyze.Run(**vars(runs['nanda']) | dict(p=40, analysis=(dict(final=many), arrays)))
    run.config = run.config | dict(n_heads=8)
    fig = plots.attention(run)
    assert 'first 37 of 40' in words(fig)
    fig.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in fig.axes[:8]]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))
    for n in (37, 40):
        fig, ax = plots.plt.subplots()
        plots.hinton(ax, np.eye(n), xlabel='digit')
        assert (f'first 37 of {n}' in words(fig)) == (n == 40)


def test_hinton_draws_areas_and_signs():
    def areas(collection):
        boxes = [path.get_extents() for path in collection.get_paths()]
        return sorted(box.width * box.height for box in boxes)

    fig, ax = plots.plt.subplots()
    plots.hinton(ax, [[4.0, -1.0], [0.0, 1.0]])
    filled, hollow = map(areas, ax.collections)
    plots.plt.close(fig)
    assert len(filled) == 2 and np.isclose(filled[1] / filled[0], 4)
    assert len(hollow) == 1 and np.isclose(hollow[0], filled[0])


def test_a_run_without_snapshots_or_records(copied, monkeypatch, capsys):
    """What cannot be drawn is said, the rest is drawn."""
    folder = copied('nanda')
    shutil.rmtree(folder / 'snapshots')
    (folder / 'metrics.npz').unlink()
    printed = '\n'.join(lines_of(capsys, analyze.main, folder))
    assert 'no weight snapshots' in printed and 'no metrics.npz' in printed
    lacking = ['loss', 'gradients', 'variance', 'density']
    some = {name: plots.FIGURES[name] for name in (*lacking, 'mechanism')}
    monkeypatch.setattr(plots, 'FIGURES', some)
    for gif in ('waves', 'embedding'):
        printed = lines_of(capsys, plots.main, folder, '--animate', gif)
        notes = [line.split()[1] for line in printed if 'not drawn' in line]
        assert notes == [*lacking, f'{gif}.gif']
    assert (folder / 'figures/mechanism.png').exists()


def test_what_snapshots_told_travels_without_their_weights(folders, copied, capsys):
    """snapshots.npz in place of the folder: the same numbers, to the last digit, and no note."""
    folder = copied('nanda')
    arrays = dict(np.load(folder / 'analysis.npz'))
    some = {name: values for name, values in arrays.items() if name.startswith('snapshot_')}
    np.savez(folder / 'snapshots.npz', **some)
    shutil.rmtree(folder / 'snapshots')
    printed = lines_of(capsys, analyze.main, folder)
    assert not any('note' in line for line in printed), printed
    assert told(folder) == told(folders['nanda'])
    again = np.load(folder / 'analysis.npz')
    assert set(again.files) == set(arrays) and len(some) > 30
    assert all(np.array_equal(again[name], values) for name, values in arrays.items())


def test_a_run_at_work(copied):
    """Snapshots and records after the checkpoint are left out."""
    folder = copied('miiii')
    weights = data.load(folder / 'ckpt.pt')['model']
    rewrite(folder, step=11, model={name: w.half() for name, w in weights.items()})
    run = analyze.load_run(folder)
    assert not run.notes and run.records['epoch'].tolist() == list(range(11))
    assert run.records['spectra_epoch'].tolist() == [0, 8]
    assert run.arrays['snapshot_epoch'].tolist() == [0, 1, 2, 3, 4, 6, 8, 11]


def test_perfect_from():
    acc = np.ones((40, 3))
    acc[:7, 0] = 0
    acc[20, 2] = 0.999
    epochs = [analyze.perfect_from(acc, for_epochs=n) for n in (1, 13, 14, 19, 20)]
    assert epochs == [7, 7, 21, 21, None]


UNTOLD = train.HOW | {'seed', 'data_seed', 'snapshots', 'spectra_every'}  # options that a command leaves out


@pytest.mark.parametrize('words', [
    '--preset fast',
    '--preset paper --task nanda --seed 3',
    '--task miiii --snapshots 0 --optimizer adamw',
    "--task='-a+b*(a-1)' --weight_decay 0.3333333333333333 --lr 3e-4 --muon_lr 0.123456789",
    "--task add --init_from 'my numbers.npy' --copy embed --freeze --decay_from 1 --device cpu"])
def test_the_command_of_a_result_gives_its_options_back(words):
    o = train.parse(shlex.split(words))
    result = dict(config=vars(o), changed=train.changes(o), note='')
    command = analyze.command(result)
    again = train.parse(shlex.split(command))
    for name in vars(o).keys() - UNTOLD:
        assert getattr(again, name) == getattr(o, name), name
    assert analyze.command(result | dict(note='other code')) == f'{command} (other code)'


def test_results_are_collected_and_reported(folders, results_file, capsys):
    names = ('nanda', 'miiii', 'formulas')
    for _ in range(2):  # the second takes the place of the first
        lines_of(capsys, analyze.main, *(folders[name] for name in names), '--collect')
    results = {r['config']['task']: r for r in analyze.results()}
    assert len(analyze.results()) == len(results) == 3
    shown = lines_of(capsys, analyze.main, '--report')
    assert len(shown) == 5 and len({line.count('|') for line in shown}) == 1
    for name in names:
        summary = told(folders[name], 'summary')
        r = results[summary['config']['task']]
        names_of = [[task['name'] for task in of['tasks']] for of in (r, summary)]
        assert names_of[0] == names_of[1]
        assert numbers_in(r['tasks']) == pytest.approx(numbers_in(summary['tasks']), rel=1e-3)
        assert r['config'] == summary['config'] | dict(out='')
        assert r['changed'] == summary['changed']
        for label, value in told(folders[name])['final'].items():
            assert numbers_in(r['final'][label]) == pytest.approx(numbers_in(value), rel=1e-3), label
        row, = (line for line in shown if f'`{analyze.command(r)}`' in line)
        valid = np.mean([task['valid_acc'] for task in r['tasks']])
        assert f'| 30 | {valid:.4f} | 0/{len(r["tasks"])} |' in row
    m = np.load(folders['miiii'] / 'metrics.npz')
    for name, norms in zip(m['grad_norm_names'], m['grad_norm'].T):
        epoch, half = results['miiii']['half_of_gradients'][name], norms.sum() / 2
        assert norms[:epoch].sum() < half <= norms[:epoch + 1].sum() * (1 + 1e-6)


def test_collecting_at_once_loses_no_run(folders, results_file):
    """Two processes, each slow between reading the results and writing them."""
    program = '''
import pathlib, sys, time, analyze
read = analyze.results
def slowly():
    found = read()
    time.sleep(0.5)
    return found
analyze.results, analyze.RESULTS = slowly, pathlib.Path(sys.argv[1])
analyze.main([*sys.argv[2:], '--collect'])
'''
    both = [folders[name] for name in ('miiii', 'nanda')]
    at_work = [python(program, results_file, folder, stdout=subprocess.DEVNULL) for folder in both]
    assert [process.wait(60) for process in at_work] == [0, 0]
    tasks = [r['config']['task'] for r in analyze.results()]
    assert sorted(tasks) == ['miiii', 'nanda']


def test_the_commands_of_the_shipped_results_give_their_options_back():
    for r in analyze.results():
        command = analyze.command(r | dict(note=''))
        again = train.parse(shlex.split(command))
        for name in r['config'].keys() - UNTOLD:
            assert getattr(again, name) == r['config'][name], (command, name)


@pytest.mark.parametrize('name', ['miiii', 'nanda', 'paper'])
def test_the_shipped_runs_are_those_of_the_results(name):
    """What is told of them holds: all tasks of miiii at .99, nanda at 1, paper above .94."""
    run = analyze.load_run(HERE / 'assets' / name)
    numbers, arrays = analyze.measure(run, run.weights, 'snapshots', None)
    least = dict(miiii=0.99, nanda=1, paper=0.94)[name]
    assert arrays['valid_accuracies'].min() >= least and not run.notes
    r, = (r for r in analyze.results() if r['config'] == run.config)
    shared = numbers.keys() & r['final'].keys()
    assert 'W_E Gini' in shared and 'heads: attention to x0 less x1' in shared
    for label in shared:
        ours, theirs = numbers_in(numbers[label]), numbers_in(r['final'][label])
        assert theirs == pytest.approx(ours, rel=2e-3, abs=1e-4), label
    x, y = run.data.part(run.rows[2])
    test_acc = task_losses(run.net(x), y, run.data.classes)[1].tolist()
    most = 5e-3 if name == 'paper' else 1e-3  # it was recorded in bfloat16
    assert [task['test_acc'] for task in r['tasks']] == pytest.approx(test_acc, abs=most)
    known = [task['grok_epoch'] for task in r['tasks']]
    last = [task['valid_acc'] for task in r['tasks']]
    first = [analyze.grok_epochs(acc, end)[0] for acc, end in zip(run.records['valid_acc'].T, last)]
    assert first == known


def test_what_is_shipped_is_small():
    made_here = {'figures', 'analysis.json', 'analysis.npz'}
    files = [file for file in (HERE / 'assets').rglob('*') if not made_here & set(file.parts)]
    assert sum(file.stat().st_size for file in files) < 8e6


def test_the_report_has_the_table_of_all_runs(capsys):
    table = '\n'.join(lines_of(capsys, analyze.main, '--report'))
    assert len(table.splitlines()) > 50 and table in (HERE / 'assets/report.md').read_text()


def test_the_numbers_of_the_readme_stand_in_the_report():
    """Those of the table under "What came out"."""
    def numbers(text):
        found = re.findall(r'\d+(?:,\d{3})*(?:\.\d+)?|\.\d+', text)
        return {float(number.replace(',', '')) for number in found}

    section = (HERE / 'README.md').read_text().split('\n## What came out')[1].split('\n## ')[0]
    cells = ' '.join(line for line in section.splitlines() if line.startswith('|'))
    of_report = numbers((HERE / 'assets/report.md').read_text())
    assert len(numbers(cells)) > 10 and not numbers(cells) - of_report


def test_without_room_for_waves(copied, monkeypatch, capsys):
    """At a large p the neurons are left out, and the rest is there."""
    folder = copied('nanda')
    monkeypatch.setattr(analyze, 'solver_for', lambda p, d: data.refuse('no room'))
    printed = lines_of(capsys, analyze.main, folder)
    assert 'note: nothing about neurons: no room' in printed
    final = told(folder)['final']
    assert 'pure neurons' not in final and 'logits in key cosines' in final
    assert not any(line.startswith('pure neurons') for line in printed)
    with pytest.raises(data.Refusal, match='nothing drawn'):
        plots.main([str(folder), '--only', 'neurons'])


BROKEN = Transformer(11, 32, 2, 11).state_dict() | dict(W_U=torch.ones(32, 11) / 0)
DAMAGED = dict(  # a file of nanda, and what it holds now: bytes, nothing, that of another run, other options
    no_run=('ckpt.pt', None), half_run=('ckpt.pt', b'half'), no_options=('ckpt.pt', dict(config={})),
    long_run=('ckpt.pt', dict(step=40)), odd_run=('ckpt.pt', dict(step='many')),
    foreign_weights=('ckpt.pt', dict(model=Transformer(13, 32, 2, 13).state_dict())),
    infinite=('ckpt.pt', dict(model=BROKEN)),
    foreign_snapshot=('snapshots/00000004.pt', 'sums'), half_snapshot=('snapshots/00000004.pt', b'half'),
    foreign_records=('metrics.npz', 'miiii'), half_records=('metrics.npz', b'half'),
    no_summary=('summary.json', None), old_summary=('summary.json', b'{"epochs": 20}'),
    good=('figures', b'in the way'))


@pytest.mark.parametrize('line', '''
    analyze | --collect | name a run
    analyze | --embedding none.npy | none.npy is not there
    analyze | good --tau 5 | --tau must be below 5
    analyze | good --tau=-1 | --tau is above 0
    analyze | good --tau 2 --collect | not for --collect
    analyze | good --ta 2 | --ta
    analyze | miiii --tau 2 | --tau is for tasks of one set of classes
    analyze | miiii --cut 4 | has no neurons for 4; 
    analyze | miiii --cut 3, | no list of numbers
    analyze | miiii --cut 3 --keep 5 | not both
    analyze | formulas --keep 3 | no network of one operation
    analyze | good --keep= | no list of numbers
    analyze | good --cut 3 --collect | for a run, without --collect
    analyze | no_run | there is no {folder}/ckpt.pt
    analyze | half_run | ckpt.pt is truncated
    analyze | no_options | belong together
    analyze | odd_run | belong together
    analyze | long_run | a metrics.npz of another run
    analyze | foreign_weights | belong together
    analyze | infinite | not finite
    analyze | foreign_snapshot | belong together
    analyze | half_snapshot | 00000004.pt is truncated
    analyze | foreign_records | a metrics.npz of another run
    analyze | half_records | metrics.npz is damaged
    analyze | no_summary --collect | holds no finished run
    analyze | old_summary --collect | has gone on since
    analyze | good --to {folder}/figures | cannot write {folder}/figures/nanda/analysis
    plots | --only accuracy | name a run
    plots | --data --only nothing | --only: invalid choice
    plots | --data --only waves | waves needs a run folder
    plots | good --only spectrum | spectrum needs --embedding
    plots | good --only polar | polar needs --data
    plots | miiii --only pattern | nothing drawn
    plots | no_run | there is no {folder}/ckpt.pt
    plots | good --only accuracy | cannot write {folder}/figures/accuracy'''.split('\n')[1:])
def test_a_fault_of_a_run_folder_is_told(folders, copied, results_file, line):
    folder = copied('nanda')
    script, words, says = line.strip().format(folder=folder).split(' | ')
    args = [str(folder if word in DAMAGED else folders.get(word, word)) for word in words.split()]
    for name, content in (DAMAGED[word] for word in words.split() if word in DAMAGED):
        if isinstance(content, dict):
            rewrite(folder, **content)
        elif content is None:
            (folder / name).unlink()
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            other = 'ckpt.pt' if 'snapshots' in name else name
            shutil.copy(folders[content] / other, folder / name)
    with pytest.raises(data.Refusal) as refusal:
        dict(analyze=analyze, plots=plots)[script].main(args)
    message = str(refusal.value)
    assert says in message and '\n' not in message and not results_file.exists()


def test_a_folder_without_a_run_is_told_in_one_line(tmp_path):
    assert f'there is no {tmp_path}' in refused(tmp_path, script='analyze.py')


# ---------------------------------------------------------------- the run folder

def run_of(*args):
    """A run of TINY with more options -> its folder."""
    return train.train(train.parse([*TINY, *map(str, args)]))


def resumed(folder, *args):
    """The run in a folder gone on with -> the folder."""
    return train.train(train.parse(['--resume', '--out', str(folder), *map(str, args)]))


def summary(folder):
    return json.loads(Path(folder, 'summary.json').read_text())


def first_weights(folder):
    return data.load(folder / 'snapshots/00000000.pt', ('model',))['model']


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def same_run(a, b):
    """Bit for bit: weights, what the optimisers and the filter remember, records."""
    ours, theirs = (data.load(Path(folder, 'ckpt.pt')) for folder in (a, b))
    assert ours['step'] == theirs['step']
    for key in ('model', 'filter'):
        assert ours[key].keys() == theirs[key].keys()
        assert all(torch.equal(w, theirs[key][name]) for name, w in ours[key].items())
    for one, other in zip(ours['optimizer'], theirs['optimizer'], strict=True):
        for i, memory in one['state'].items():
            assert all(torch.equal(v, other['state'][i][name]) for name, v in memory.items())
    assert Path(a, 'metrics.npz').read_bytes() == Path(b, 'metrics.npz').read_bytes()


@pytest.fixture
def at_epoch(monkeypatch):
    """at_epoch(n, do): do() happens in the middle of epoch n of every run."""
    real = train.snapshot_due

    def arrange(when, do):
        def due(epoch, per_doubling):
            if epoch == when:
                do()
            return real(epoch, per_doubling)
        monkeypatch.setattr(train, 'snapshot_due', due)
    return arrange


@pytest.fixture
def fault(monkeypatch, capsys):
    """fault(arguments) -> the one line in which train.py refuses them, as its user sees it."""
    def line(*args):
        capsys.readouterr()
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(str, args)])
        with pytest.raises(SystemExit) as end:
            data.run_script(train.main)
        text = capsys.readouterr().err
        assert end.value.code == 2
        assert text.startswith('train.py: error: ') and text.count('\n') == 1, text
        return text
    return line


def test_run_folder(tmp_path):
    run_of('--epochs', 40, '--spectra_every', 16, '--train_frac', 0.4, '--out', tmp_path)
    ckpt = data.load(tmp_path / 'ckpt.pt')
    assert ckpt['step'] == 40
    m = np.load(tmp_path / 'metrics.npz')
    assert m['epoch'].tolist() == list(range(40)) and m['grad_norm'].shape == (40, 9)
    assert m['grad_norm_names'].tolist() == list(ckpt['model'])
    for name in ('train_loss', 'train_acc', 'valid_loss', 'valid_acc'):
        assert m[name].shape == (40, 4) and np.isfinite(m[name]).all() and m[name].any()
    assert m['spectra_epoch'].tolist() == [0, 16, 32] and m['spectrum'].shape == (3, 6)
    assert m['sum_power'].shape == (3, len(m['freqs']))
    s = summary(tmp_path)
    assert s['split'] == dict(train=48, valid=36, test=37) and s['epochs'] == 40
    assert s['config']['train_frac'] == 0.4 and s['changed']['train_frac'] == 0.4
    assert [task['name'] for task in s['tasks']] == ['n mod 2', 'n mod 3', 'n mod 5', 'n mod 7']
    assert [task['classes'] for task in s['tasks']] == [2, 3, 5, 7]
    snapshots = sorted(int(f.stem) for f in (tmp_path / 'snapshots').iterdir())
    assert snapshots == [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32]

    # snapshot 16 is the weights that row 16 was measured at, the summary is of the checkpoint: both again
    d = data.make('miiii', 11)
    parts = dict(zip(('train', 'valid', 'test'), data.split(121, 0.4)))
    net = Transformer(11, 32, 2, 17)

    def recomputed(part):
        x, y = d.part(parts[part])
        loss, acc = task_losses(net(x), y, d.classes)
        return loss.detach(), acc

    net.load_state_dict(data.load(tmp_path / 'snapshots/00000016.pt', ('model',))['model'])
    loss, acc = recomputed('valid')
    assert np.allclose(m['valid_loss'][16], loss, rtol=1e-4) and np.allclose(m['valid_acc'][16], acc)
    spectra = analyze.spectra_of(net, d, analyze.solver_for(11, d), contextlib.nullcontext())
    for name, row in spectra.items():
        assert np.allclose(m[name][1], row, rtol=1e-3, atol=1e-6), name
    net.load_state_dict(ckpt['model'])
    for part in parts:
        loss, acc = recomputed(part)
        assert np.allclose([task[f'{part}_loss'] for task in s['tasks']], loss, rtol=1e-4)
        assert np.allclose([task[f'{part}_acc'] for task in s['tasks']], acc)
        mean = (loss / torch.tensor(d.classes).log()).mean()
        assert s['objective'][part] == pytest.approx(mean.item(), rel=1e-4)


def test_grok_epochs():
    acc = np.array([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]])
    epochs = [analyze.grok_epochs(row, final) for row, final in zip(acc, (1, 1, 0, 0.5))]
    assert epochs == [(1, 3), (0, 0), (None, None), (1, None)]


@pytest.mark.parametrize('extra', [
    '--optimizer adamw --lamb 0.5', '--dropout_mask batch', '--init reference --lamb 2'])
def test_resume_is_exact(tmp_path, extra):
    args = [*extra.split(), '--decay_from', 1, '--spectra_every', 7]
    straight = run_of(*args, '--epochs', 60, '--out', tmp_path / 'a')
    halves = run_of(*args, '--epochs', 23, '--out', tmp_path / 'b')
    same_run(straight, resumed(halves, '--epochs', 60))  # its own options hold


def test_either_initial_scale(tmp_path):
    """The same random numbers, times the root of the ratio of the fan-ins. The analysis knows which."""
    he = run_of('--epochs', 2, '--out', tmp_path / 'a', '--init', 'he')
    small = first_weights(run_of('--epochs', 2, '--out', tmp_path / 'c'))
    reference = run_of('--epochs', 2, '--out', tmp_path / 'b', '--init', 'reference')
    for config in (data.load(reference / 'ckpt.pt')['config'], summary(reference)['config']):
        assert config['init'] == 'reference'
    more = dict(W_Q=2, W_K=2, W_V=2, W_U=4)  # heads, tasks
    ours, theirs = first_weights(he), first_weights(reference)
    for name, w in ours.items():
        assert torch.allclose(theirs[name] * more.get(name, 1) ** 0.5, w, atol=1e-6), name
        assert torch.allclose(small[name], 0.3 * w, atol=1e-6), name
    initial = analyze.load_run(reference).initial
    shutil.rmtree(reference / 'snapshots')  # the analysis draws the first weights again
    again = analyze.load_run(reference).initial
    assert all(torch.equal(again[name], w) for name, w in initial.items())


def test_a_run_from_before_there_was_a_choice_of_init(tmp_path):
    straight = run_of('--decay_from', 1, '--epochs', 12, '--out', tmp_path / 'a')
    old = run_of('--decay_from', 1, '--epochs', 5, '--out', tmp_path / 'b')
    ckpt = data.load(old / 'ckpt.pt')
    del ckpt['config']['init']
    torch.save(ckpt, old / 'ckpt.pt')
    assert analyze.load_run(old).epoch == 5
    resumed(old, '--epochs', 12)
    assert summary(old)['config']['init'] == 'he'
    same_run(straight, old)


def test_a_lengthened_run_keeps_its_summary_until_it_has_a_new_one(tmp_path, at_epoch):
    seen, folder = [], run_of('--epochs', 5, '--out', tmp_path)
    at_epoch(8, lambda: seen.append(summary(folder)['epochs']))
    resumed(folder, '--epochs', 9)
    assert seen == [5] and summary(folder)['epochs'] == 9


# ---------------------------------------------------------------- signals, kill, two at a time

@pytest.mark.parametrize('name, ends', [
    ('SIGINT', KeyboardInterrupt), ('SIGTERM', SystemExit), ('SIGHUP', SystemExit)])
@pytest.mark.parametrize('where', ['step', 'write'])
def test_stopped_run_resumes_exactly(tmp_path, monkeypatch, capsys, at_epoch, name, ends, where):
    """The signal comes in the middle of an epoch or of a write: the epoch is done and saved."""
    number = getattr(signal, name)
    former, replace = signal.getsignal(number), os.replace

    def interrupted(source, target):
        if Path(target).name == '00000032.pt':
            os.kill(os.getpid(), number)
        replace(source, target)

    straight = run_of('--epochs', 50, '--out', tmp_path / 'straight')
    if where == 'write':
        monkeypatch.setattr(os, 'replace', interrupted)
    else:
        at_epoch(32, lambda: os.kill(os.getpid(), number))
    with pytest.raises(ends) as end:
        run_of('--epochs', 50, '--out', tmp_path / 'out')
    assert ends is KeyboardInterrupt or end.value.code == 128 + number
    assert 'saved at epoch 33' in capsys.readouterr().out
    assert signal.getsignal(number) == former  # handlers are given back
    assert data.load(tmp_path / 'out/ckpt.pt')['step'] == 33
    assert not (tmp_path / 'out/summary.json').exists()
    same_run(straight, resumed(tmp_path / 'out'))


def test_second_signal_leaves_at_once(tmp_path, at_epoch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    at_epoch(31, twice)
    with pytest.raises(KeyboardInterrupt):
        run_of('--epochs', 50, '--out', tmp_path)
    assert data.load(tmp_path / 'ckpt.pt')['step'] == 0  # as it was saved before


def test_what_is_printed_after_a_stop_works_as_printed(tmp_path, monkeypatch, capsys, at_epoch):
    monkeypatch.chdir(tmp_path)
    straight = run_of('--epochs', 20, '--out', 'straight')
    at_epoch(7, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_of('--epochs', 20, '--out', "Anna's run")
    command = capsys.readouterr().out.split('go on with: ')[1].strip()
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_run(straight, "Anna's run")


def test_nohup(tmp_path, at_epoch):
    """Who starts a run with HUP ignored wants it to go on when the terminal closes."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_epoch(5, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert summary(run_of('--epochs', 9, '--out', tmp_path))['epochs'] == 9
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path, at_epoch):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    seen, before = [], handlers()
    at_epoch(3, lambda: seen.append(handlers()))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        folder = pool.submit(run_of, '--epochs', 5, '--out', tmp_path / 'a').result()
    assert folder == tmp_path / 'a' and summary(folder)['epochs'] == 5
    assert seen == [before] and handlers() == before
    run_of('--epochs', 5, '--out', tmp_path / 'b')  # while here they are taken
    assert len(seen) == 2 and not set(seen[1]) & set(before) and handlers() == before


def python(program, *args, **kw):
    """A process that runs a program text with the project at hand."""
    env = os.environ | dict(PYTHONPATH=str(HERE)) | kw.pop('env', {})
    command = [sys.executable, '-c', program, *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, **kw)


def test_kill_at_any_write_leaves_a_run_that_goes_on(tmp_path):
    """The process dies by SIGKILL when it would rename its n-th file, at its start or while it goes on."""
    program = '''
import json, os, sys, train
def die_at(n, argv):
    left, real = [None] * n, os.replace
    def replace(*args):
        if not left:
            os.kill(os.getpid(), 9)
        left.pop()
        real(*args)
    os.replace = replace
    train.main(argv)
for n, argv in json.loads(sys.argv[1]):
    child = os.fork()  # much faster than a new Python
    if not child:
        die_at(n, argv)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
'''
    args = ['--decay_from', 1, '--snapshots', 1, '--spectra_every', 5, '--epochs']
    straight = run_of(*args, 12, '--out', tmp_path / 'straight')
    half = run_of(*args, 6, '--out', tmp_path / 'half')
    start = [*TINY, *map(str, args), '12', '--out', str(tmp_path / 'start')]
    jobs = [(0, start)]
    for n in range(4):  # a snapshot, metrics, checkpoint, summary
        shutil.copytree(half, tmp_path / f'{n}')
        jobs.append((n, ['--resume', '--epochs', '12', '--out', str(tmp_path / f'{n}')]))
    with python(program, json.dumps(jobs), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as p:
        assert p.stderr.read().split() == ['-9'] * 5
    assert not (tmp_path / 'start/ckpt.pt').exists()
    train.main(start)  # before there is a checkpoint, the folder is free
    same_run(straight, tmp_path / 'start')
    for n in range(4):
        same_run(straight, resumed(tmp_path / f'{n}', '--epochs', 12))
        assert summary(tmp_path / f'{n}')['epochs'] == 12


def test_two_runs_started_in_one_folder_at_the_same_moment(tmp_path):
    program = "import data, train; print('ready', flush=True); input(); data.run_script(train.main)"
    straight = run_of('--epochs', 30, '--out', tmp_path / 'straight')
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    args = [*TINY, '--epochs', 30, '--out', tmp_path / 'out']
    both = [python(program, *args, **pipes) for _ in range(2)]
    for p in both:
        assert p.stdout.readline() == 'ready\n'
    for p in both:
        p.stdin.write('\n')
        p.stdin.flush()
    said = {}
    for p in both:
        errors = p.communicate(timeout=60)[1]
        said[p.returncode] = errors
    assert sorted(said) == [0, 2], said
    assert said[2].count('\n') == 1 and str(tmp_path / 'out') in said[2]
    same_run(straight, tmp_path / 'out')
    assert not list(tmp_path.rglob('*.tmp'))


def test_a_folder_is_held_while_its_run_is_at_work(tmp_path, fault):
    program = '''
import sys, time, train
def due(epoch, per_doubling):
    if epoch == 5:
        print('here', flush=True)
        time.sleep(100)
train.snapshot_due = due
train.main(sys.argv[1:])
'''
    args = ['--epochs', 12, '--snapshots', 0, '--out']
    straight, out = run_of(*args, tmp_path / 'straight'), tmp_path / 'out'
    with python(program, *TINY, *args, out, stdout=subprocess.PIPE) as p:
        assert 'here\n' in iter(p.stdout.readline, '')
        before = contents(out)
        assert 'another run is at work' in fault('--resume', '--out', out)
        assert 'another run is at work' in fault(*TINY, *args, out)
        assert contents(out) == before
        p.kill()
    same_run(straight, resumed(out))  # free again


# ---------------------------------------------------------------- what a run says

def test_progress_is_one_line_rewritten_on_a_terminal_and_plain_lines_in_a_log(tmp_path, capsys):
    program = '''
import sys, time, train
def due(epoch, per_doubling):
    time.sleep(1.1 if epoch in (5, 9) else 0)
train.snapshot_due = due
train.main(sys.argv[1:])
'''
    terminal, child = pty.openpty()
    narrow = dict(COLUMNS='60')
    args = [*TINY, '--epochs', 12, '--out', tmp_path / 'a']
    p = python(program, *args, stdout=child, stderr=child, env=narrow)
    os.close(child)
    shown = b''
    with contextlib.suppress(OSError):  # the terminal hangs up when the run ends
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    assert p.wait() == 0
    rewritten, = (line for line in shown.decode().split('\r\n') if line.startswith('\r'))
    texts = rewritten.split('\r\033[K')[1:]
    assert len(texts) == 3 and all(len(text) < 60 and 'ETA' in text for text in texts)
    run_of('--epochs', 12, '--out', tmp_path / 'b')
    log = capsys.readouterr().out
    assert '\r' not in log and '100%' in log and 'epochs/s' in log and 'grokked' in log


def test_a_run_goes_on_when_its_output_goes_away(tmp_path):
    """A reader that leaves, or has left before the start; nothing to write to at all; a full disk."""
    command = shlex.join([sys.executable, str(HERE / 'train.py'), *TINY, '--epochs', '5', '--out'])
    runs = []
    for i, how in enumerate(['| head -1', '2>&1 | true', '>&-', '>&- 2>&-', '> /dev/full']):
        line = f'{command} {tmp_path}/{i} {how}'
        shell = ['bash', '-o', 'pipefail', '-c', line]
        p = subprocess.Popen(shell, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        runs.append(p)
    for i, p in enumerate(runs):
        errors = p.communicate(timeout=60)[1]
        assert p.returncode == 0 and not errors, p.args
        assert summary(tmp_path / f'{i}')['epochs'] == 5
        assert data.load(tmp_path / f'{i}/ckpt.pt')['step'] == 5


def test_a_name_that_the_terminal_cannot_show(tmp_path):
    out, env = tmp_path / 'über', os.environ | dict(PYTHONIOENCODING='ascii')
    done = cli(*TINY, '--epochs', 5, '--out', out, env=env)
    assert done.returncode == 0 and summary(out)['epochs'] == 5, done.stderr
    assert r'\xfcber' in done.stdout


def test_the_start_tells_what_was_changed(tmp_path, capsys):
    def told(*args):
        train.main([*map(str, args), '--device', 'cpu', '--out', str(tmp_path / str(len(args)))])
        line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith('options: '))
        return line.removeprefix('options: ')
    plain = '--preset=fast --p=11 --d_model=32 --n_heads=2 --epochs=3 --precision=float32'
    assert told(*TINY, '--epochs', 3) == plain
    args = '--preset paper --task 2*a+b --p 11 --d_model 32 --epochs 3 --lr 0.5'.split()
    words = told(*args)
    assert words.startswith('--preset=paper ') and "'--task=2*a+b'" in words and '--lr=0.5' in words
    as_told, as_given = train.parse(shlex.split(words)), train.parse(args)
    assert as_told == as_given  # the line makes the same run again


@pytest.mark.parametrize('args, name', [
    ('--optimizer adamw --muon_lr 0.2', 'muon_lr'),
    ('--optimizer adamw --muon_decay 0.3', 'muon_decay'),
    ('--alpha 0.9', 'alpha'),
    ('--dropout 0 --dropout_mlp 0 --dropout_mask batch', 'dropout_mask'),
    ('--task add --spectra_every 7', 'spectra_every')])
def test_an_option_without_effect_is_told(tmp_path, capsys, args, name):
    run_of('--epochs', 2, '--out', tmp_path / 'a', *args.split())
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith('note: ')]
    assert notes == [f'note: --{name} has no effect here']
    run_of('--epochs', 2, '--out', tmp_path / 'b')
    assert 'note' not in capsys.readouterr().out


def test_names_that_every_system_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, tiny = run_of('--task', 'a * b', '--epochs', 2), TINY[2:]
    assert plain == Path('out/axb') and summary(plain)['config']['task'] == 'a * b'
    train.main([*tiny, *'--epochs 2 --sweep 2 --sweep_space task=a*b,2*a*b'.split()])
    train.main([*TINY, *'--task 3*a --epochs 2 --sweep 1 --sweep_space lr=1e-3'.split()])
    names = {str(path.relative_to('out')) for path in Path('out').rglob('*')}
    assert {'miiii-sweep/task=axb', 'miiii-sweep/task=2xaxb', '3xa-sweep/lr=1e-3'} <= names
    assert not set(''.join(names)) & set('*:?"<>|\\')


# ---------------------------------------------------------------- from another run's weights

class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    """A folder with a good run `source`, damaged copies of it, files without an embedding of 12 digits."""
    shelf = tmp_path_factory.mktemp('shelf')
    source = run_of('--task', 'a+b', '--epochs', 20, '--snapshots', 0, '--out', shelf / 'source')
    whole, good = (source / 'ckpt.pt').read_bytes(), data.load(source / 'ckpt.pt')
    W_E, bomb = good['model']['W_E'], Bomb(shelf / 'bomb_went_off')
    flipped = bytearray(whole)
    flipped[whole.index(W_E.numpy().tobytes()) + 50] ^= 64
    forgetful = [state | dict(state={}) for state in good['optimizer']]
    damaged = dict(
        half=whole[:len(whole) // 2], short=whole[:-100], empty=b'', text=b'hello', flipped=bytes(flipped),
        bomb=bomb, a_list=[1, 2], one_key=dict(model=1), no_records=whole)
    changed = dict(
        bomb_inside=dict(model=bomb), listed=dict(model=[]), no_weights=dict(model={}),
        number=dict(model=dict(W_E=3)), other=dict(model=dict(W_E=torch.zeros(2))),
        infinite=dict(model=dict(W_E=W_E / 0)), unknown=dict(config=dict(no=1)), config_list=dict(config=[]),
        no_rng=dict(rng={}), many=dict(step='many'), forgetful=dict(optimizer=forgetful),
        viewer=dict(optimizer=[], filter={}, rng={}))
    damaged |= {name: good | change for name, change in changed.items()}
    for name, content in damaged.items():
        shutil.copytree(source, shelf / name)
        put(shelf / name / 'ckpt.pt', content)
    (shelf / 'no_records/metrics.npz').write_bytes(b'')

    ones = np.ones((12, 16))
    files = {
        'w.csv': b'1,2', 'empty.npy': b'', 'empty.pt': b'', 'text.npy': b'1,2,3', 'good.npy': ones,
        'short.npy': ones[:11], 'nan.npy': ones * np.nan, 'row.npy': ones[:, 0],
        'words.npy': np.array([['a']]), 'object.npy': np.array([bomb], dtype=object), 'bomb.pt': bomb,
        'dict.pt': dict(W=1), 'sparse.pt': torch.ones(12, 16).to_sparse(),
        'complex.pt': torch.ones(12, 16) * 1j, 'meta.pt': torch.ones(12, 16, device='meta')}
    for name, content in files.items():
        put(shelf / name, content)
    return shelf


def put(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        torch.save(content, path)


@pytest.mark.parametrize('how, optimizer', [
    ('embed', 'muon'), ('embed --freeze', 'adamw --lamb 0.5'), ('block', 'adamw --lamb 0.5'),
    ('block --freeze', 'muon'), ('all', 'muon')])
def test_weights_of_another_run(shelf, tmp_path, how, optimizer):
    part, frozen, filtered = how.split()[0], '--freeze' in how, 'lamb' in optimizer
    task = ['--task', '2*a+b', '--dropout', 0, '--decay_from', 1]
    args = [*task, *f'--copy {how} --optimizer {optimizer}'.split(), '--init_from', shelf / 'source']
    straight = run_of(*args, '--epochs', 20, '--out', tmp_path / 'a')
    theirs = data.load(shelf / 'source/ckpt.pt')['model']
    own = first_weights(run_of(*task, '--epochs', 1, '--out', tmp_path / 'own'))  # by the seed alone
    groups = dict(embed=['W_E'], block=['W_Q', 'W_K', 'W_V', 'W_O', 'W_in', 'W_out'], all=list(own))
    start, ckpt = first_weights(straight), data.load(straight / 'ckpt.pt')
    held = groups[part] if frozen else []
    for name, w in start.items():
        assert torch.equal(w, (theirs if name in groups[part] else own)[name]), name
        assert torch.equal(w, ckpt['model'][name]) == (name in held)  # bit for bit
    moving = [name for name in start if name not in held]
    assert list(ckpt['filter']) == (moving if filtered else [])
    assert sum(len(optimizer['state']) for optimizer in ckpt['optimizer']) == len(moving)
    assert np.load(straight / 'metrics.npz')['grad_norm_names'].tolist() == moving
    same_run(straight, resumed(run_of(*args, '--epochs', 8, '--out', tmp_path / 'b'), '--epochs', 20))


def test_a_copied_start_is_the_null_of_its_analysis(shelf, tmp_path):
    args = '--task 2*a+b --copy embed --freeze --epochs 5'.split()
    folder = run_of(*args, '--init_from', shelf / 'source', '--out', tmp_path)
    run = analyze.load_run(folder)
    initial, final = run.analysis[0]['initial'], run.final
    assert not run.notes and initial['W_L FCR'] != final['W_L FCR']
    assert all(initial[name] == final[name] for name in ('W_E FFD', 'W_E Gini by logarithm'))
    command = analyze.command(summary(folder) | dict(note=''))
    assert all(words in command for words in ("'--task=2*a+b'", '--copy=embed --freeze', '--epochs=5'))
    shutil.rmtree(folder / 'snapshots')
    assert 'lacks the weights it began with' in ' '.join(analyze.load_run(folder).notes)


def test_an_embedding_from_a_file(tmp_path):
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / 'w.npy', W.double())
    torch.save(W, tmp_path / 'w.pt')

    def run(file, name, *more):
        args = '--task add --p 12 --d_model 20 --epochs 9 --init_from'.split()
        return run_of(*args, tmp_path / file, *more, '--out', tmp_path / name)

    def end(folder):
        return data.load(folder / 'ckpt.pt')['model']

    held = [run(file, f'held {file}', '--freeze') for file in ('w.npy', 'w.pt')]
    assert all(torch.equal(end(folder)['W_E'][:12], W) for folder in held)
    free = run('w.npy', 'free')
    assert torch.equal(first_weights(free)['W_E'][:12], W)
    assert not torch.equal(end(free)['W_E'], first_weights(free)['W_E'])
    (tmp_path / 'w.npy').unlink()
    before, after = end(held[0]), end(resumed(held[0], '--epochs', 12))  # a run goes on without the file
    assert [name for name in before if torch.equal(before[name], after[name])] == ['W_E']


@pytest.mark.parametrize('dtype', ['>f8', '<i4', 'f2'])
def test_matrices_of_many_kinds(tmp_path, dtype):
    W = np.arange(12.0).reshape(6, 2)
    np.save(tmp_path / 'w.npy', W.astype(dtype))
    torch.save(torch.nn.Parameter(torch.from_numpy(W)), tmp_path / 'w.pt')
    for name in ('w.npy', 'w.pt'):
        loaded = analyze.load_matrix(tmp_path / name)
        assert np.array_equal(loaded, W) and loaded.dtype == torch.float32


# ---------------------------------------------------------------- the sweep

def swept(folder):
    with open(Path(folder) / 'sweep.csv') as f:
        return list(csv.DictReader(f))


def test_sweep_ranks_its_settings(tmp_path, capsys, fault):
    args = [*TINY, '--sweep_space', 'lr=1e-3,1e-2 lamb=0,2', '--out', str(tmp_path / 'a')]
    train.main([*args, '--epochs', '20', '--sweep', '3'])
    before = contents(tmp_path / 'a')
    assert len(swept(tmp_path / 'a')) == 3
    train.main([*args, '--epochs', '20', '--sweep', '4'])  # one more; the others are not touched
    after = contents(tmp_path / 'a')
    assert all(after[path] == content for path, content in before.items() if path.name != 'sweep.csv')
    rows = swept(tmp_path / 'a')
    assert list(rows[0]) == 'lr lamb valid_loss valid_acc grokked folder'.split()
    pairs = sorted((row['lr'], row['lamb']) for row in rows)
    assert pairs == [('1e-2', '0'), ('1e-2', '2'), ('1e-3', '0'), ('1e-3', '2')]
    losses = [float(row['valid_loss']) for row in rows]
    assert losses == sorted(losses)

    best = rows[0]
    alone = run_of('--epochs', 20, '--lr', best['lr'], '--lamb', best['lamb'], '--out', tmp_path / 'b')
    same_run(best['folder'], alone)
    tasks = summary(alone)['tasks']
    objective = np.mean([task['valid_loss'] / math.log(task['classes']) for task in tasks])
    assert float(best['valid_loss']) == pytest.approx(objective, rel=1e-5)
    assert float(best['valid_acc']) == pytest.approx(np.mean([task['valid_acc'] for task in tasks]))
    assert best['grokked'] == str(sum(task['valid_acc'] >= 0.99 for task in tasks))

    assert '--weight_decay' in fault(*args, '--epochs', 20, '--sweep', 4, '--weight_decay', 0.25)
    assert 'was trained with other options' in fault(*args, '--sweep', 4)  # the epochs are left out
    capsys.readouterr()
    train.main([*args, '--sweep', '4', '--epochs', '30'])  # lengthened
    assert capsys.readouterr().out.count('before epoch 21:') == 4
    assert {summary(row['folder'])['epochs'] for row in swept(tmp_path / 'a')} == {30}


def test_sweep_draws_from_the_papers_grid(tmp_path, monkeypatch):
    def drawn(*args):
        """The options of all runs that a sweep would make."""
        runs = []
        monkeypatch.setattr(train, 'train', runs.append)
        train.main([*'--p 11 --device cpu --out'.split(), str(tmp_path), '--sweep', *map(str, args)])
        return runs

    def settings(runs):
        return [tuple(getattr(o, name) for name in grid) for o in runs]

    grid = dict(dropout=[0, .1, .2, .5], lamb=[0, .5, 2], weight_decay=[0, .1, .5, 1], d_model=[128, 256],
                lr=[1e-4, 3e-4], n_heads=[4, 8])
    runs = drawn(384, '--preset', 'paper')
    assert len(set(settings(runs))) == 384 and {o.preset for o in runs} == {'paper'}
    assert {name: sorted({getattr(o, name) for o in runs}) for name in grid} == grid
    few = drawn(5)
    assert settings(few) == settings(runs)[:5] != settings(drawn(5, '--seed', 1))
    assert {(o.preset, o.optimizer) for o in few} == {('fast', 'muon')}
    assert len({o.out for o in few}) == 5 and all(Path(o.out).parent == tmp_path for o in few)
    narrow = drawn(192, '--d_model', 128)  # an option given by itself leaves the grid
    assert len(set(settings(narrow))) == 192 and {o.d_model for o in narrow} == {128}
    formulas = drawn(8, '--sweep_space', 'task=elementary,a*b+b train_frac=0.3,0.5')
    assert {(o.task, o.train_frac) for o in formulas} == {
        (task, share) for task in ('a+b', 'a-b', 'a*b', 'a*b+b') for share in (0.3, 0.5)}


def test_a_stopped_sweep_goes_on(tmp_path, at_epoch):
    args = [*TINY, '--epochs', '40', '--sweep_space', 'lr=1e-3,1e-2', '--sweep', '2', '--out']
    straight, stopped = str(tmp_path / 'straight'), str(tmp_path / 'stopped')
    train.main([*args, straight])

    def stop_the_second():
        if len(os.listdir(stopped)) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    at_epoch(9, stop_the_second)
    with pytest.raises(SystemExit) as end:
        train.main([*args, stopped])
    assert end.value.code == 128 + signal.SIGTERM and not Path(stopped, 'sweep.csv').exists()
    train.main([*args, stopped])
    for a, b in zip(swept(straight), swept(stopped), strict=True):
        assert a['valid_loss'] == b['valid_loss']
        same_run(a['folder'], b['folder'])


def test_every_setting_is_compiled(tmp_path, monkeypatch):
    """torch gives up on a function after eight versions of it; a sweep needs more."""
    graphs, counts, real = [], [], torch.compile

    def backend(graph, example):
        graphs.append(graph)
        return graph
    monkeypatch.setattr(torch, 'compile', lambda fn, **kw: real(fn, **kw | dict(backend=backend)))
    monkeypatch.setenv('CXX', sys.executable)  # no compiler is needed
    for width in range(2, 24, 2):
        run_of('--d_model', width, '--compile', 'on', '--epochs', 1, '--out', tmp_path / f'{width}')
        counts.append(len(graphs))
        graphs.clear()
    assert counts[0] and set(counts) == {counts[0]}, counts


def test_a_setting_that_diverges_ranks_last(tmp_path):
    args = '--weight_decay 100 --optimizer adamw --epochs 60 --sweep_space lr=10,1e-3 --sweep 2'.split()
    train.main([*TINY, *args, '--out', str(tmp_path)])
    good, bad = swept(tmp_path)
    assert good['lr'] == '1e-3' and bad['lr'] == '10'
    assert bad['valid_loss'] == 'inf' and not bad['valid_acc'] and not bad['grokked']


def test_a_sweep_over_two_processes_survives_the_death_of_one(tmp_path):
    """Rank 1 dies by SIGKILL in its second setting; the next start does what is missing."""
    (tmp_path / 'deadly.py').write_text('''
import os, signal, sys, train
runs = []
def due(epoch, per_doubling):
    if epoch == 12:
        runs.append(epoch)
    if len(runs) == 2 and epoch == 15:
        os.kill(os.getpid(), signal.SIGKILL)
if os.environ['RANK'] == '1':
    train.snapshot_due = due
train.main(sys.argv[1:])
''')
    space = ['--sweep_space', 'lr=1e-3,1e-2,1e-4 lamb=0,2']
    args = [*TINY, *'--epochs 30 --sweep 5'.split(), *space, '--out', tmp_path / 'sweep']
    torchrun = [sys.executable, *'-m torch.distributed.run --standalone --nproc_per_node 2'.split()]
    env = os.environ | dict(PYTHONPATH=str(HERE), OMP_NUM_THREADS='1')

    def start(script):
        command = [*torchrun, script, *args]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)

    first = start(tmp_path / 'deadly.py')
    done = {path: path.read_bytes() for path in (tmp_path / 'sweep').glob('*/summary.json')}
    assert first.returncode and 1 <= len(done) <= 4, first.stderr
    second = start(HERE / 'train.py')
    assert second.returncode == 0, second.stderr
    rows = swept(tmp_path / 'sweep')
    assert len(rows) == 5 and all(summary(row['folder'])['epochs'] == 30 for row in rows)
    assert all(path.read_bytes() == content for path, content in done.items())
    losses = [float(row['valid_loss']) for row in rows]
    assert losses == sorted(losses)


def test_torchrun_is_for_sweeps(tmp_path):
    args, env = [*TINY, '--epochs', 3, '--out', tmp_path / 'a'], os.environ | dict(WORLD_SIZE='2', RANK='0')
    done = cli(*args, env=env | dict(TORCHELASTIC_RUN_ID='x'))
    assert done.returncode == 2 and 'are for --sweep N' in done.stderr and not list(tmp_path.iterdir())
    assert cli(*args, env=env).returncode == 0  # somebody else's WORLD_SIZE


# ---------------------------------------------------------------- bad input and faults

tiny = ' '.join(TINY[2:])
FAULTS = {  # arguments: the lines that follow them, and words of the error
    tiny: """
        --p 12 | prime
        --p 4 | p must
        --task a+b --p 12 | prime
        --task masked --p 7 | masked
        --task nands | nanda
        --task a+c | 'a+c' is no formula
        --task foo,a | 'foo' is no formula
        --task=-a+c | '-a+c' is no formula
        --train_frac 1 | empty
        --train_frac 0 | empty
        --train_frac nan | train_frac
        --d_model 30 --n_heads 4 | divisible
        --n_heads 0 | n_heads
        --dropout 1 | dropout
        --epochs 0 | epochs
        --lr fast | --lr
        --lr=-1 | --lr
        --lr inf | --lr
        --lam 1 | --lam
        --leraning_rate=1 | --leraning_rate
        --preset auto | paper
        --p 499 | spectra
        --device meta | device
        --freeze | --init_from
        --copy embed | --init_from
        --resume | there is no
        --sweep_space lr=1,2 | for --sweep N""",
    f'{tiny} --task a*b --init_from': """
        {shelf}/source --p 13 | [14, 32]
        {shelf}/source --d_model 16 | [12, 16]
        {shelf}/source --n_heads 4 --copy block | [2, 32, 16]
        {shelf}/source --task a+b,a-b --copy embed | W_E is [12, 32]
        {shelf}/source --task miiii | W_U is [32, 11]
        {shelf}/source --freeze | nothing to train
        {shelf}/source --copy W_E | W_E
        {shelf}/none --copy embed | there is no {shelf}/none
        {shelf}/short | truncated
        {shelf}/listed | listed
        {shelf}/no_weights | no_weights
        {shelf}/number | number
        {shelf}/infinite --copy embed | finite""",
    '--task add --p 12 --d_model 16 --n_heads 2 --device cpu --init_from': """
        {shelf}/none.npy | not there
        {shelf}/w.csv | there is no
        {shelf}/empty.npy | loaded safely
        {shelf}/empty.pt | loaded safely
        {shelf}/text.npy | loaded safely
        {shelf}/words.npy | loaded safely
        {shelf}/object.npy | loaded safely
        {shelf}/bomb.pt | loaded safely
        {shelf}/dict.pt | loaded safely
        {shelf}/sparse.pt | loaded safely
        {shelf}/complex.pt | loaded safely
        {shelf}/meta.pt | loaded safely
        {shelf}/nan.npy | not finite
        {shelf}/row.npy | [12]
        {shelf}/short.npy | 11 rows
        {shelf}/good.npy --d_model 32 | --d_model 16 would fit
        {shelf}/good.npy --copy block | for W_E""",
    '--epochs 30 --resume --out': """
        {shelf}/half | truncated
        {shelf}/empty | truncated
        {shelf}/text | truncated
        {shelf}/flipped | corrupt
        {shelf}/bomb | corrupt
        {shelf}/bomb_inside | corrupt
        {shelf}/a_list | not of this program
        {shelf}/one_key | not of this program
        {shelf}/unknown | unknown options
        {shelf}/config_list | config_list
        {shelf}/listed | cannot resume
        {shelf}/other | cannot resume
        {shelf}/no_rng | cannot resume
        {shelf}/many | cannot resume
        {shelf}/forgetful | cannot resume
        {shelf}/no_records | cannot resume
        {shelf}/viewer | a copy made for looking, without optimiser state""",
    f'{tiny} --sweep': """
        97 | 96 settings
        -1 | --sweep
        x | --sweep
        2 --resume | neither --resume
        2 --bench 3 | --bench
        1 --sweep_space lr | lr
        2 --sweep_space lr=1e-3,fast | fast
        2 --sweep_space lr=1e-3,-1 | must lie
        2 --sweep_space leraning_rate=1,2 | leraning_rate
        2 --sweep_space freeze=True,False | freeze
        2 --sweep_space seed=1,2 --n_heads 3 | divisible
        2 --sweep_space lr=1,2 --lr 1 | 1 settings
        2 --sweep_space lr=1,2 --init_from none | there is no none
        3 --sweep_space task=a+b,a+c,a-b | 'a+c'
        4 --sweep_space train_frac=0.3,0.4,0.5,1 | empty
        0 --sweep_space lr=1,2 | for --sweep N"""}
CASES = [(first, *line.split(' | ')) for first, lines in FAULTS.items() for line in lines.split('\n')[1:]]


@pytest.mark.parametrize('first, more, words', CASES)
def test_a_fault_is_told_in_one_line_and_leaves_nothing(shelf, tmp_path, fault, first, more, words):
    before = contents(shelf)
    args = shlex.split(f'{first} {more}'.format(shelf=shelf))
    assert words.format(shelf=shelf) in fault('--epochs', 3, '--out', tmp_path, *args)
    assert not list(tmp_path.iterdir()) and contents(shelf) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
def test_cuda_without_cuda(tmp_path, fault):
    assert 'cuda' in fault('--device', 'cuda', '--out', tmp_path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', 'w.csv empty.npy empty.pt text.npy words.npy object.npy bomb.pt dict.pt '
                                 'sparse.pt complex.pt meta.pt nan.npy row.npy good.npy none.npy'.split())
def test_no_analysis_of_what_is_no_matrix(shelf, name):
    """In good.npy all numbers are the same."""
    with pytest.raises(data.Refusal):
        analyze.main(['--embedding', str(shelf / name)])
    assert not (shelf / 'bomb_went_off').exists()


def test_a_folder_is_never_overwritten_and_a_resume_must_agree(tmp_path, fault):
    args = [*TINY, '--epochs', 10, '--out', tmp_path]
    folder = run_of(*args)
    before = contents(folder)
    assert '--resume' in fault(*args)
    for other in ('--lr 0.5', '--p 13', '--epochs 5', '--init reference', '--preset paper'):
        name, value = other.split()
        line = fault('--resume', '--out', folder, name, value)
        assert name in line and value in line
    resumed(folder)  # finished already: nothing happens to it
    after = contents(folder)
    assert all(after[path] == content for path, content in before.items() if path.name != 'summary.json')


def test_a_shipped_copy_is_for_looking(tmp_path, fault):
    folder = shutil.copytree(HERE / 'assets/nanda', tmp_path / 'nanda')
    before = contents(folder)
    args = ['--device', 'cpu', '--out', folder]
    assert 'a copy made for looking, without optimiser state' in fault('--resume', *args)
    assert contents(folder) == before
    assert '--resume' in fault('--task', 'nanda', *args)


@pytest.mark.parametrize('CXX, named', [('', 'g++'), ('nowhere', 'nowhere')])
def test_compiling_needs_a_compiler(tmp_path, monkeypatch, fault, CXX, named):
    monkeypatch.setenv('CXX', CXX)
    monkeypatch.setenv('PATH', str(tmp_path))
    line = fault(*TINY, '--epochs', 3, '--compile', 'on', '--out', tmp_path)
    assert named in line and '--compile off' in line and not list(tmp_path.iterdir())


def test_no_place_to_write(tmp_path, fault):
    (tmp_path / 'file').write_text('in the way')
    places = {'file': 'File exists', 'file/below': 'Not a directory', 'x' * 300: 'File name too long'}
    for out, words in places.items():
        assert words in fault(*TINY, '--epochs', 5, '--out', tmp_path / out)
    assert (tmp_path / 'file').read_text() == 'in the way' and len(list(tmp_path.iterdir())) == 1


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, fault):
    """The disk fills up after the first save: the error says so, the first checkpoint still loads."""
    real, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(28, 'No space left on device')
        real(fd)
    monkeypatch.setattr(os, 'fsync', full)
    assert 'No space left' in fault(*TINY, '--epochs', 20, '--out', tmp_path)
    assert data.load(tmp_path / 'ckpt.pt')['step'] == 0
    assert not list(tmp_path.rglob('*.tmp'))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    args = '--optimizer adamw --lr 10 --weight_decay 100 --decay_from 1 --epochs 60'.split()
    with pytest.raises(train.Diverged, match='(n mod|W_).* at epoch .*not finite'):
        run_of(*args, '--out', tmp_path)
    assert all(w.isfinite().all() for w in data.load(tmp_path / 'ckpt.pt')['model'].values())
    assert not (tmp_path / 'summary.json').exists()


# ---------------------------------------------------------------- presets, precision, seeds, bench, help

def test_the_papers_values():
    paper = dict(
        p=113, train_frac=0.5, d_model=256, n_heads=4, epochs=65536, optimizer='adamw', lr=3e-4,
        init='reference', weight_decay=1 / 3, decay_from=1, dropout=0.1, dropout_mask='batch', lamb=0.5,
        alpha=0.98, focus=0)
    for_nanda = dict(train_frac=0.3, d_model=128, lr=1e-3, weight_decay=1, dropout=0, lamb=0, init='he')
    o = vars(train.parse(['--preset', 'paper']))
    assert o | paper == o
    o = vars(train.parse(['--preset', 'paper', '--task', 'nanda']))
    assert o | paper | dict(epochs=o['epochs'], dropout_mask='example') | for_nanda == o
    o = vars(train.parse(['--preset', 'tenfold']))
    faster = dict(lr=1e-3, weight_decay=1, dropout_mask='example', decay_from=0.7, epochs=10000)
    assert o | paper | faster == o
    assert o['lr'] * o['weight_decay'] == pytest.approx(10 * paper['lr'] * paper['weight_decay'])
    given = train.parse(['--preset', 'paper', '--lr', '0.5'])  # wins over the preset
    assert given.lr == 0.5 and given.optimizer == 'adamw'


def test_defaults_are_what_a_run_records(tmp_path):
    train.main(['--out', str(tmp_path), '--epochs', '1', '--device', 'cpu'])
    config = summary(tmp_path)['config']
    assert config == train.DEFAULTS | dict(out=str(tmp_path), epochs=1, device='cpu')
    assert data.load(tmp_path / 'ckpt.pt')['config'] == config
    assert summary(tmp_path)['changed'] == dict(epochs=1)
    fast = dict(
        task='miiii', p=113, train_frac=0.5, optimizer='muon', lamb=0, epochs=1500, init='small', focus=1)
    assert train.DEFAULTS | fast == train.DEFAULTS


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert not end.value.code
    for name, (default, meaning, _) in train.OPTIONS.items():
        assert f'--{name} ' in text and f'{meaning} (default: {default})' in text, name


def test_precision(tmp_path):
    """bfloat16 is near float32 and not the same, in loss and gradients; attention is float32 always."""
    losses, gradients, attention = {}, {}, {}
    torch.manual_seed(0)
    d, net = data.make('miiii', 11), Transformer(11, 32, 2, 17)
    for precision in ('float32', 'tf32', 'bfloat16'):
        args = ['--optimizer', 'adamw', '--precision', precision, '--epochs', 1]
        folder = run_of(*args, '--out', tmp_path / precision)
        losses[precision] = np.load(folder / 'metrics.npz')['train_loss'][0]
        memory = data.load(folder / 'ckpt.pt')['optimizer'][0]['state']
        # after one step the memory of AdamW is a tenth of the gradient
        gradients[precision] = [weight['exp_avg'].flatten() for weight in memory.values()]
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
            net(d.x, acts=(acts := {}))
        attention[precision] = acts['att']
    assert np.array_equal(losses['float32'], losses['tf32'])  # on a CPU
    assert np.allclose(losses['float32'], losses['bfloat16'], rtol=0.05)
    assert not np.array_equal(losses['float32'], losses['bfloat16'])
    assert len(gradients['float32']) == 9
    for exact, rounded in zip(gradients['float32'], gradients['bfloat16'], strict=True):
        assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99
    assert torch.equal(attention['float32'], attention['bfloat16'])


def test_float32_products_on_a_cpu_are_float32(monkeypatch):
    """Whichever library multiplies; where it would round, torch's default is kept."""
    former = torch.get_float32_matmul_precision()
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    model.fast_cpu()
    assert ((a @ a).double() - a.double() @ a.double()).abs().max() < 1e-3
    plain = torch.Tensor.__matmul__

    def rounding(a, b):
        return plain(a, b) if a.dtype == torch.float64 else plain(a.bfloat16(), b.bfloat16()).float()
    monkeypatch.setattr(torch.Tensor, '__matmul__', rounding)
    model.fast_cpu()
    assert torch.get_float32_matmul_precision() == 'highest'
    torch.set_float32_matmul_precision(former)


def test_seeds(tmp_path):
    def run(name, *args):
        folder = run_of('--epochs', 1, '--out', tmp_path / name, *args)
        return first_weights(folder), np.load(folder / 'metrics.npz')

    def expected(weights, data_seed):
        """Validation losses of these weights on the split of this seed."""
        d, net = data.make('miiii', 11), Transformer(11, 32, 2, 17)
        net.load_state_dict(weights)
        x, y = d.part(data.split(121, 0.5, data_seed)[1])
        return task_losses(net(x), y, d.classes)[0].detach()

    (w0, m0), (w1, m1), (w2, m2) = run('a'), run('b', '--seed', 1), run('c', '--data_seed', 1)
    assert torch.equal(w0['W_U'], w2['W_U']) and not torch.equal(w0['W_U'], w1['W_U'])
    for weights, records, data_seed in ((w0, m0, 0), (w1, m1, 0), (w2, m2, 1)):
        assert np.allclose(records['valid_loss'][0], expected(weights, data_seed), rtol=1e-4)
    assert not np.allclose(m0['valid_loss'][0], expected(w0, 1), rtol=1e-2)
    # from the same weights another seed differs in the dropout alone
    copied = run('d', '--seed', 1, '--init_from', tmp_path / 'a')[1]
    again = run('e', '--init_from', tmp_path / 'a')[1]
    assert np.array_equal(copied['valid_loss'], again['valid_loss'])
    assert not np.allclose(copied['train_loss'], again['train_loss'], rtol=1e-3)


def test_bench_counts_the_work(tmp_path, monkeypatch, capsys):
    real = torch.randn

    def small(*shape, **kw):  # the plain product beside it would take seconds
        return real(64, 64) if shape == (4096, 1024) else real(*shape, **kw)
    monkeypatch.setattr(torch, 'randn', small)

    def bench(*args):
        train.main([*map(str, args), '--device', 'cpu'])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    folder = run_of('--epochs', 3, '--out', tmp_path / 'run')
    before = contents(folder)
    one = bench('--resume', '--bench', 5, '--out', folder)  # of a finished run
    assert contents(folder) == before and one['config']['epochs'] == 3
    per_row = 2 * (32 * 32 + 32 * 128 + 128 * 32 + 32 * 17)  # W_O, W_in, W_out, W_U
    assert one['gflop'] == pytest.approx(per_row * (3 * 60 + 30) / 1e9)
    assert one['gflops'] * one['epoch_ms'] == pytest.approx(one['gflop'] * 1e3)
    assert one['epoch_ms'] > 0 and one['product_gflops'] > 0
    three = bench(*TINY, '--task', 'elementary', '--bench', 5, '--out', tmp_path / 'none')
    per_row = 2 * (32 * 32 + 32 * 128 + 128 * 32 + 32 * 11)
    assert three['gflop'] == pytest.approx(3 * per_row * (3 * 36 + 42) / 1e9)
    # forward 7.42 GFLOP for 3,831 rows and 1.94 for 1,000; backward twice the forward
    paper = bench('--preset', 'paper', '--train_frac', 0.3, '--bench', 1, '--out', tmp_path / 'none')
    assert paper['gflop'] == pytest.approx(3 * 7.42 + 1.94, abs=0.03)
    assert not (tmp_path / 'none').exists()


# ---------------------------------------------------------------- the code, and it groks

def test_the_readme_names_lines_that_are_there():
    row = r'^\| [^|]+ \| `(\w+\.py)` \| `([^|]+)` \| \d+ \|$'
    rows = re.findall(row, (HERE / 'README.md').read_text(), re.M)
    assert len(rows) == 8
    assert all(code in (HERE / file).read_text() for file, code in rows)


def test_lines_are_short():
    for path in HERE.glob('*.py'):
        wide = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
        assert not wide, f'{path.name}, lines {wide}'


def test_it_groks(tmp_path):
    """The real thing, small: trained on some sums mod 31, it is right on every pair it never saw."""
    train.main([*'--task nanda --p 31 --d_model 64 --train_frac 0.6 --epochs 600'.split(),
                *'--precision float32 --device cpu --out'.split(), str(tmp_path)])
    task, = summary(tmp_path)['tasks']
    assert task['valid_acc'] == 1 and task['test_acc'] == 1 and 50 < task['grok_epoch'] < 600
