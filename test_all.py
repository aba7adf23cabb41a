"""All tests: against brute force, float64, a library, a closed form, planted truth; and every fault a user can meet.

    python -m pytest -q test_all.py      # minutes on two CPU cores; what needs CUDA skips without it
"""
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
import data
import model
import plots
import train
from model import Muon, Transformer, fused_losses, orthogonalize, set_precision, task_losses

HERE = Path(__file__).parent
TINY = '--task miiii --p 11 --d_model 32 --n_heads 2 --precision float32 --device cpu'.split()


def cli(*args, script='train.py', timeout=120, **kw):
    """A script as a user runs it -> finished process with its output as text."""
    return subprocess.run([sys.executable, HERE / script, *map(str, args)], capture_output=True, text=True, timeout=timeout, **kw)


def refused(*args, script='train.py'):
    """The one line of an error, after checking that it is one line, on stderr, with exit code 2."""
    done = cli(*args, script=script)
    assert done.returncode == 2, done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith(f'{script}: error: '), done.stderr
    return done.stderr


def refused_here(*args):
    """The message of an error, without the seconds that a new process takes."""
    with pytest.raises(data.Refusal) as refusal:
        train.main([*args])
    return str(refusal.value)


def make_run(*args):
    o, _ = train.resolve(train.parse([*TINY, *map(str, args)]))
    return train.Run(o)


# ------------------------------------------------------------------------------------------------ data

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


def test_split_is_a_partition_and_seeded():
    for n, frac in [(121, 0.3), (121, 0.5), (12769, 0.9)]:
        parts = data.split(n, frac, seed=3)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))
        assert len(parts[0]) == round(frac * n) and len(parts[1]) == min(1000, (n - len(parts[0])) // 2)
        assert all(torch.equal(a, b) for a, b in zip(parts, data.split(n, frac, seed=3)))
        assert not torch.equal(parts[0], data.split(n, frac, seed=4)[0])


def test_basis_is_miiii_with_shuffled_rows():
    a, b = data.make('miiii', 13), data.make('basis', 13, seed=1)
    assert sorted(a.y.tolist()) == sorted(b.y.tolist())          # whole rows move
    assert (a.y == b.y).all(1).float().mean() < 0.2              # and nearly all of them do
    assert torch.equal(b.y, data.make('basis', 13, seed=1).y) and not torch.equal(b.y, data.make('basis', 13, seed=2).y)


@pytest.mark.parametrize('task, p', [('miiii', 12), ('miiii', 3), ('nanda', 1), ('basis', 121), ('other', 11)])
def test_data_refuses(task, p):
    with pytest.raises(ValueError):
        data.make(task, p)


def some_formula(rng, depth):
    """A random formula; read as Python, with ^ for **, it means the same."""
    def pad(text):
        return ' ' * rng.integers(2) + text
    kind = rng.choice(['leaf', 'sum', 'product', 'power', 'minus', 'parentheses']) if depth else 'leaf'
    if kind == 'leaf':
        return pad(rng.choice(['a', 'b', str(rng.integers(200))]))
    parts = [some_formula(rng, depth - 1) for _ in range(2)]
    if kind in ('sum', 'product'):
        return parts[0] + pad(rng.choice(['+', '-']) if kind == 'sum' else '*') + parts[1]
    return {'power': f'({parts[0]}){rng.choice(["^", "**"])}{rng.integers(12)}', 'minus': pad('-') + parts[0], 'parentheses': f'({parts[0]})'}[kind]


def test_formulas_by_brute_force():
    rng, p, seen = np.random.default_rng(0), 13, set()
    n = torch.arange(p * p)
    for _ in range(400):
        formula = some_formula(rng, rng.integers(1, 6))
        seen.add(formula)
        plain = eval(f'lambda a, b: {formula.strip().replace("^", "**")}')
        assert data.evaluate(formula, n % p, n // p, p).tolist() == [plain(a, b) % p for b in range(p) for a in range(p)], formula
    assert len(seen) > 300 and sum('^' in f for f in seen) > 50
    x = torch.tensor([996])
    assert data.evaluate('a^1000*123456789^1000', x, x, 997).item() == pow(996, 1000) * pow(123456789, 1000) % 997  # no overflow
    assert data.evaluate('-a^2', x, x, 997).item() == -996 ** 2 % 997 and data.evaluate('0^0', x, x, 997).item() == 1


@pytest.mark.parametrize('formula, place, what', [
    ('a+c', 3, 'a, b, a number'), ('2a', 2, 'operation'), ('a b', 3, 'operation'), ('ab', 2, 'operation'), ('1 2', 3, 'operation'), ('a/b', 2, 'operation'), ('a^b', 3, 'whole number'),
    ('a^-1', 3, 'whole number'), ('a^(2)', 3, 'whole number'), ('a^2^3', 4, 'operation'), ('a^1001', 3, '1000'), ('a^1.5', 4, 'operation'), ('(a+b', 5, ')'), ('a+b)', 4, 'operation'), ('()', 2, 'a, b'),
    ('a+', 3, 'the end'), ('', 1, 'the end'), ('+a', 1, 'not +'), ('a(b)', 2, 'operation'), ('a.real', 2, 'operation'), ('"a"', 1, 'not "'), ('__import__("os")', 1, 'not _'), ('lambda: a', 1, 'not l'), ('a if b', 3, 'operation'),
    ('a²', 2, 'operation'), ('٣*a', 1, 'number'), ('0x1f', 2, 'operation'), ('a\n#b', 3, 'operation'), ('a[0]', 2, 'operation'), ('a==b', 2, 'operation'), ('True', 1, 'not T'), ('a%b', 2, 'operation'), ('a***b', 4, 'not *')])
def test_everything_else_is_no_formula(formula, place, what):
    with pytest.raises(ValueError, match=f'character {place}: ') as refusal:
        data.evaluate(formula, torch.arange(3), torch.arange(3), 5)
    assert what in str(refusal.value)
    with pytest.raises(ValueError):
        data.make(formula, 5)


def test_formulas_are_bounded():
    for formula in ('a+' * 200 + 'a', '9' * 10**6):
        with pytest.raises(ValueError, match='at most 200'):
            data.make(formula, 5)
    assert data.make('(' * 99 + 'a' + ')' * 99, 5).y.unique().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match='the same modulo 5'):
        data.make('a+b, b+6*a', 5)


def test_a_mixture_by_brute_force():
    p, plain = 7, [lambda a, b: a + b, lambda a, b: a * b - 2, lambda a, b: (a - b) ** 3]
    d, rows = data.make('a + b,a*b-2, (a-b)^3', p), torch.tensor([3, 20, 48])
    assert d.names == ['a+b', 'a*b-2', '(a-b)^3'] and d.classes == [p] * 3 and d.n_ops == 3 and d.in_loss.all()
    for n in range(p * p):
        for o in range(3):
            assert d.x[3 * n + o].tolist() == [n % p, n // p, p + o]
            assert d.y[n, o] == plain[o](n % p, n // p) % p
    x, y = d.part(rows)
    assert x.tolist() == [d.x[3 * n + o].tolist() for n in rows for o in range(3)] and torch.equal(y, d.y[rows])
    assert torch.equal(data.make('a+b', p).y, data.make('nanda', p).y) and torch.equal(data.make('a+b', p).x, data.make('nanda', p).x)
    assert data.make('elementary', p).names == ['a+b', 'a-b', 'a*b'] and all(data.make(f, 11) for f in data.FAMILIES)


@pytest.mark.parametrize('p', [5, 12])
def test_sums_by_brute_force(p):
    d = data.make('add', p)
    assert d.classes == [2 * p - 1] and d.names == ['x0 + x1'] and d.n_ops == 1
    assert [(*x, *y) for x, y in zip(d.x.tolist(), d.y.tolist())] == [(x0, x1, p, x0 + x1) for x1 in range(p) for x0 in range(p)]
    with pytest.raises(ValueError, match='number >= 5'):
        data.make('add', 4)


# ------------------------------------------------------------------------------------------------ model

def plain_forward(W, x, drop):
    """The model as the paper writes it, head by head. W: dict of weights."""
    H, D, K = W['W_Q'].shape
    z = W['W_E'][x] + W['W_pos'][None]                           # N T D
    out = torch.zeros_like(z)
    for h in range(H):
        q, k, v = (z @ W[name][h] for name in ('W_Q', 'W_K', 'W_V'))
        att = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(K), dim=-1)   # N T T, from, to
        out = out + att @ v @ W['W_O'][h]
    z = (z + out) * drop[0][:, None]
    z = (z + torch.relu(z @ W['W_in']) @ W['W_out']) * drop[1][:, None]
    return (z @ W['W_U'])[:, -1]


@pytest.mark.parametrize('n_ops', [1, 3])
@pytest.mark.parametrize('rows', [1, 50])  # one mask for the batch, or one per example
def test_model_is_the_general_forward_pass(n_ops, rows):
    torch.manual_seed(0)
    p, D, H, C, N = 11, 24, 3, 17, 50
    net = Transformer(p, D, H, C, n_ops).double()
    x = torch.stack([torch.randint(p, (N,)), torch.randint(p, (N,)), p + torch.randint(n_ops, (N,))], 1)
    drop = torch.rand(2, rows, D, dtype=torch.float64)
    forms = [plain_forward(dict(net.named_parameters()), x, drop), net(x, drop), net.general_forward(x, drop)]
    oracle, *grads = [torch.autograd.grad(z.square().sum(), list(net.parameters())) for z in forms]
    for logits, ours in zip(forms[1:], grads):
        assert logits.shape == (N, C) and (logits - forms[0]).abs().max() < 1e-10
        for a, b in zip(ours, oracle):
            assert (a - b).abs().max() <= 1e-10 * b.abs().max()
    assert torch.allclose(net(x), net.general_forward(x), atol=1e-10)  # without dropout


@pytest.mark.parametrize('scale', [1, 4, 10])
def test_saturated_attention_keeps_its_gradients(scale):
    """The digits below "=" in every head, by 7, 119 and 743 or more: float32 agrees with the general form, gradients too, though at
    the larger scales those of W_Q and W_K all but vanish."""
    torch.manual_seed(0)
    net, x = Transformer(11, 24, 3, 17), data.make('nanda', 11).x
    with torch.no_grad():
        net.W_E[-1] += 1
        net.W_K.copy_(net.W_Q)
        net.W_Q *= scale
        net.W_K *= scale
    logits, oracle = net(x), net.general_forward(x)
    names = [n for n, _ in net.named_parameters()]
    a, b = (dict(zip(names, torch.autograd.grad(z.square().sum(), list(net.parameters())))) | dict(logits=z) for z in (logits, oracle))
    assert (b['W_K'].abs().max() < 1e-6 * b['W_V'].abs().max()) == (scale > 1)
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-3 * b[name].abs().max(), name


def test_acts_are_those_of_the_forward_pass():
    torch.manual_seed(0)
    net, acts = Transformer(7, 8, 2, 10).double(), {}
    x = data.make('nanda', 7).x
    logits = net(x, acts=acts)
    assert (acts['att'].shape, acts['neurons'].shape) == ((49, 3, 2), (49, 32))
    assert torch.allclose(acts['att'].sum(1), torch.ones(49, 2, dtype=torch.float64))
    assert torch.equal(acts['neurons'], torch.relu(acts['resid_mid'] @ net.W_in))
    assert torch.equal(acts['resid_post'] @ net.W_U, logits)


def test_parameters_count_shapes_and_initialisation():
    torch.manual_seed(0)
    net = Transformer(113, 256, 4, 1480)
    shapes = dict(W_E=(114, 256), W_pos=(3, 256), W_Q=(4, 256, 64), W_K=(4, 256, 64), W_V=(4, 256, 64), W_O=(4, 64, 256),
                  W_in=(256, 1024), W_out=(1024, 256), W_U=(256, 1480))
    assert {n: tuple(w.shape) for n, w in net.state_dict().items()} == shapes
    assert sum(w.numel() for w in net.parameters()) == 114 * 256 + 3 * 256 + 4 * 256 * 256 + 2 * 256 * 1024 + 256 * 1480 == 1_195_264
    fan_in = dict(W_E=114, W_pos=3, W_Q=256, W_K=256, W_V=256, W_O=256, W_in=256, W_out=1024, W_U=256)
    for n, w in net.state_dict().items():
        assert abs(w.std() / math.sqrt(2 / fan_in[n]) - 1) < 4 / math.sqrt(2 * w.numel()), n  # four standard errors


# ------------------------------------------------------------------------------------------------ loss

@pytest.mark.parametrize('form', ['task_losses', 'fused_losses', 'compiled'])
def test_loss_and_gradient_against_float64(form):
    """One row per margin, the right logit ahead by up to 69 or behind by up to 1000: losses from 1e-30 to 1e+3."""
    torch.manual_seed(0)
    if form == 'compiled' and not shutil.which('g++'):
        pytest.skip('torch.compile needs a C++ compiler on a CPU')
    margins = torch.cat([torch.linspace(-1000, 0, 41), torch.linspace(0, 71, 141)[1:]])
    for q in (2, 3, 109):
        losses = task_losses if form == 'task_losses' else fused_losses([q], 'cpu')
        losses = torch.compile(losses, dynamic=False) if form == 'compiled' else losses
        z = torch.randn(len(margins), q)
        t = torch.randint(q, (len(margins),))
        z.scatter_(1, t[:, None], -torch.inf)
        z.scatter_(1, t[:, None], (z.logsumexp(1) + margins)[:, None])
        z64 = z.double().requires_grad_()
        others = z64.clone().scatter(1, t[:, None], -torch.inf).logsumexp(1)
        diff = others - z64.gather(1, t[:, None])[:, 0]
        loss64 = torch.logaddexp(torch.zeros_like(diff), diff)  # log(1 + e^diff), exact in float64 down to 1e-300
        grad64, = torch.autograd.grad(loss64.sum(), z64)
        assert loss64.min() < 1e-30 and loss64.max() > 990
        for i in range(len(margins)):  # row by row, so that large losses do not hide small ones
            loss, _, grad = losses(z[i:i + 1], t[i:i + 1, None], [q], torch.ones(1), False)
            assert abs(loss.item() / loss64[i].item() - 1) < 1e-4
            assert (grad.double() - grad64[i]).abs().max() < 1e-4 * grad64[i].abs().max()
            assert (grad.double() - grad64[i])[0, t[i]].abs() < 1e-4 * grad64[i, t[i]].abs()
    plain = torch.nn.functional.cross_entropy(torch.tensor([[40.0, 0.0]]), torch.tensor([0]))
    assert plain == 0  # what the form above is for


def test_loss_and_accuracy_against_torch_on_several_tasks():
    torch.manual_seed(0)
    d = data.make('miiii', 13)
    logits = torch.randn(169, sum(d.classes))
    loss, acc, _ = task_losses(logits, d.y, d.classes)
    for i, z in enumerate(logits.split(d.classes, 1)):
        assert torch.allclose(loss[i], torch.nn.functional.cross_entropy(z, d.y[:, i]))
        assert acc[i] == (z.argmax(1) == d.y[:, i]).float().mean()
    loss, _, _ = task_losses(torch.zeros(169, sum(d.classes)), d.y, d.classes)
    assert torch.allclose(loss / torch.tensor(d.classes).log(), torch.ones(5))  # uniform guessing


@pytest.mark.parametrize('task', ['miiii', 'nanda', 'a*b,a+b'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_forms_of_the_loss_agree(task, dtype):
    """On several tasks at once with weights: the form for CUDA, the one that overwrites the logits, bfloat16 logits, a transposed matrix."""
    torch.manual_seed(0)
    d = data.make(task, 13)
    logits, weight = (torch.randn(169, sum(d.classes)) * torch.linspace(0, 30, 169)[:, None]).to(dtype), torch.rand(len(d.classes))
    loss, acc, grad = task_losses(logits.float(), d.y, d.classes, weight)
    before = logits.clone()
    for other in (fused_losses(d.classes, 'cpu')(logits, d.y, d.classes, weight, True), task_losses(logits.T.contiguous().T, d.y, d.classes, weight, True),
                  task_losses(logits, d.y, d.classes, weight), task_losses(before, d.y, d.classes, weight, True)):
        assert torch.allclose(other[0], loss, rtol=1e-4) and torch.equal(other[1], acc) and other[2].dtype == dtype
        assert torch.allclose(other[2].float(), grad, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-30)
    assert torch.equal(before, other[2]) and not torch.equal(before, logits)  # overwritten, the others' argument is not


def test_masked_leaves_its_columns_alone():
    run = make_run('--task', 'masked', '--p', 13, '--epochs', 1)
    logits, loss, _, grad = run.forward(*run.parts[0])
    grad, = torch.autograd.grad(logits, [run.model.W_U], grad)
    assert run.data.classes == [2, 3, 5, 7, 11]
    assert (grad[:, :17] == 0).all() and (grad[:, 17:] != 0).any()
    assert torch.allclose(run.task_weight @ loss, loss[-1] / math.log(11))


# ------------------------------------------------------------------------------------------------ the step

def test_filter_and_adamw_against_a_plain_loop():
    """30 epochs against torch's default AdamW and the filter written out by hand, from the same gradients."""
    args = '--optimizer adamw --lamb 0.5 --alpha 0.9 --dropout 0 --lr 1e-3 --weight_decay 0.5 --decay_from 1 --epochs 30'.split()
    run, twin = make_run(*args), make_run(*args)
    params = list(twin.model.parameters())
    adamw = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.5, foreach=False, fused=False)
    memory = [torch.zeros_like(w) for w in params]
    for _ in range(30):
        run.step()
        logits, _, _, grad = twin.forward(*twin.parts[0])
        for i, (w, g) in enumerate(zip(params, torch.autograd.grad(logits, params, grad))):
            memory[i] = 0.9 * memory[i] + 0.1 * g
            w.grad = g + 0.5 * memory[i]
        adamw.step()
    for a, b, m, n in zip(run.weights, params, run.filter, memory):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(m, n, atol=1e-5)
    assert not make_run('--lamb', 0, '--epochs', 1).filter


def test_muon_against_torch():
    """On 2-D matrices, where torch's own takes part: the same weights after 20 steps up to its bfloat16 products."""
    torch.manual_seed(0)
    start = [torch.randn(24, 40), torch.randn(40, 24)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    a = Muon(ours, torch.tensor(0.02), 0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn='original')
    for _ in range(20):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step(), b.step()
    for x, y, s in zip(ours, theirs, start):
        assert (x - y).norm() < 0.03 * (y - s).norm()
    stack = torch.randn(3, 24, 40)
    for i in range(3):  # a stack is orthogonalised matrix by matrix, singular values near 1
        assert torch.allclose(orthogonalize(stack)[i], orthogonalize(stack[i]), atol=1e-5)
    sv = torch.linalg.svdvals(orthogonalize(stack))
    assert 0.5 < sv.min() and sv.max() < 1.3


def test_dropout_masks():
    for kind, rows in [('batch', 1), ('example', 60)]:
        run = make_run('--dropout', 0.25, '--dropout_mask', kind, '--d_model', 512, '--train_frac', 0.5)
        m = run.masks(60)
        assert m.shape == (2, rows, 512) and torch.allclose(m.unique(), torch.tensor([0, 4 / 3]))
        assert abs((m == 0).float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / m.numel())
        assert not torch.equal(m, run.masks(60))
    assert make_run('--dropout', 0).masks(60) == (1, 1)


def test_learning_rate_schedule():
    run, rates = make_run('--epochs', 10, '--decay_from', 0.4, '--lr', 0.1, '--optimizer', 'muon', '--muon_lr', 0.01), []
    for _ in range(10):
        run.step()
        rates.append([x.param_groups[0]['lr'].item() for x in run.optimizers])
    shape = np.minimum(1, (10 - np.arange(10)) / 6)
    assert np.allclose(rates, np.outer(shape, [0.1, 0.01]), rtol=1e-5)


def test_first_losses_pinned_by_a_plain_float64_twin():
    """Mean loss / ln q of 40 epochs: the paper's model, loss, filter and AdamW written plainly in float64 from the same weights."""
    run = make_run(*'--optimizer adamw --lamb 0.5 --epochs 40 --dropout 0 --lr 1e-3 --weight_decay 1 --train_frac 0.5 --decay_from 0.4'.split())
    W = {n: torch.nn.Parameter(w.detach().double()) for n, w in run.model.named_parameters()}
    memory, (x, y), twin = {n: 0 for n in W}, run.parts[0], []
    adamw = torch.optim.AdamW(W.values(), betas=(0.9, 0.98), weight_decay=1.0)
    for epoch in range(40):
        run.step()
        logits = plain_forward(W, x, torch.ones(2, 1, 32, dtype=torch.float64))
        loss = sum(torch.nn.functional.cross_entropy(z, t) / math.log(z.shape[1]) for z, t in zip(logits.split([2, 3, 5, 7], 1), y.T)) / 4
        adamw.zero_grad()
        loss.backward()
        for n, w in W.items():
            memory[n] = 0.98 * memory[n] + 0.02 * w.grad
            w.grad += 0.5 * memory[n]
        adamw.param_groups[0]['lr'] = 1e-3 * min(1, (40 - epoch) / 24)
        adamw.step()
        twin.append(loss.item())
    ours = (run.metrics['train_loss'] / run.ln_q).mean(1).numpy()
    assert np.allclose(ours, twin, rtol=1e-4)
    assert np.allclose(ours[[0, 1, 10, 39]], [5.118945, 4.211175, 1.398876, 1.031196], rtol=1e-4)


def test_a_mixture_is_the_mean_over_its_operations():
    """Gradient, loss and accuracy of a mixture against plain cross-entropy over its rows, operation by operation."""
    run = make_run(*'--task a*b,a+b,a-2 --optimizer adamw --lamb 0 --epochs 1 --dropout 0 --spectra_every 1'.split())
    rows, p = run.split[0], 11
    pairs = torch.stack([rows % p, rows // p], 1)
    assert run.model.W_E.shape == (14, 32) and run.model.W_U.shape == (32, 11)
    W, by_hand = {n: w.detach().clone().requires_grad_() for n, w in run.model.named_parameters()}, []
    for o, f in enumerate((lambda a, b: a * b, lambda a, b: a + b, lambda a, b: a - 2)):
        x = torch.cat([pairs, torch.full((len(rows), 1), p + o)], 1)
        z, target = plain_forward(W, x, torch.ones(2, 1, 32)), f(*pairs.T) % p
        by_hand.append((torch.nn.functional.cross_entropy(z, target), (z.argmax(1) == target).float().mean()))
    (sum(loss for loss, _ in by_hand) / 3 / math.log(p)).backward()
    run.record_spectra()
    run.step()
    assert torch.allclose(run.metrics['train_loss'][0], torch.stack([loss for loss, _ in by_hand]), atol=1e-5)
    assert torch.allclose(run.metrics['train_acc'][0], torch.stack([acc for _, acc in by_hand]))
    norms = torch.stack([W[n].grad.norm() for n in run.names])
    assert torch.allclose(run.metrics['grad_norm'][0], norms, rtol=1e-4)
    neurons = []  # of each operation, over all pairs
    for o in range(3):
        acts, x = {}, run.data.x[o::3]
        assert (x[:, 2] == p + o).all()
        t = Transformer(p, 32, 2, p, 3)
        t.load_state_dict({n: w.detach() for n, w in W.items()})
        t(x, acts=acts)
        neurons.append(acts['neurons'].detach())
    expected = analyze.neuron_spectra(torch.cat(neurons, 1), p, run.solver)
    assert all(torch.allclose(run.spectra[k][0], v, atol=1e-4) for k, v in expected.items())


def losses_of(run, fn, epochs):
    for _ in range(epochs):
        fn()
    return run.metrics['train_loss'][:epochs].cpu()


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler on a CPU')
def test_eager_and_compiled_agree():
    """The same losses over 50 epochs with dropout and filter on, up to float32 rounding grown over the epochs."""
    args = ('--epochs', 50, '--optimizer', 'adamw', '--lamb', 0.5, '--lr', '3e-4')
    eager = make_run(*args, '--compile', 'off')
    a = losses_of(eager, eager.step, 50)
    compiled = make_run(*args, '--compile', 'on')  # draws the same weights and masks: every run seeds itself
    assert torch.allclose(losses_of(compiled, compiled.step, 50), a, rtol=1e-3, atol=1e-5)
    assert a[-1].mean() < a[0].mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('task', ['miiii', 'a*b,a+b', 'add'])
def test_captured_graph_is_the_eager_step(task):
    """200 epochs: the same losses and filter memory as without capture, dropout different at every replay."""
    args = ('--task', task, '--device', 'cuda', '--epochs', 200, '--optimizer', 'adamw', '--lamb', 0.5, '--lr', '3e-4')
    eager = make_run(*args, '--compile', 'off')
    a = losses_of(eager, eager.step, 200)
    graph = make_run(*args, '--compile', 'on')
    b = losses_of(graph, graph.captured(graph.step), 200)
    assert torch.allclose(a[:50], b[:50], rtol=1e-2, atol=1e-4)
    assert all(torch.allclose(x, y, rtol=0.1, atol=1e-3) for x, y in zip(eager.filter, graph.filter))
    frozen = make_run(*args, '--lr', 0, '--lamb', 0, '--weight_decay', 0, '--compile', 'on')
    c = losses_of(frozen, frozen.captured(frozen.step), 50).mean(1)
    assert len(c.unique()) > 45  # weights stand still, so only the masks can move the loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_fast_recipe_on_cuda_resumes_under_capture(tmp_path):
    args = '--task miiii --p 11 --d_model 32 --n_heads 2 --preset fast --spectra_every 5 --device cuda --decay_from 1'.split()
    assert cli(*args, '--epochs', 60, '--out', tmp_path / 'a').returncode == 0
    assert cli(*args, '--epochs', 30, '--out', tmp_path / 'b').returncode == 0
    assert cli('--resume', '--epochs', 60, '--out', tmp_path / 'b').returncode == 0
    a, b = (np.load(tmp_path / x / 'metrics.npz') for x in 'ab')
    assert np.allclose(a['train_loss'], b['train_loss'], rtol=0.05, atol=1e-3) and np.isfinite(b['spectrum']).all()


# ------------------------------------------------------------------------------------------------ spectra

def test_waves_and_their_count():
    classes = data.primes_below(113)
    freqs, basis = analyze.wave_freqs(classes), analyze.waves(113, classes, 113)
    assert len(freqs) == 726 and int((basis[:2].abs().sum(-1) > 0).sum()) == 1451
    sums = basis[:2].flatten(0, 1)
    sums = torch.nn.functional.normalize(sums[sums.any(1)], dim=1)
    eigenvalues = torch.linalg.eigvalsh(sums @ sums.T)
    assert abs(eigenvalues[0] - 0.745) < 1e-3 and abs(eigenvalues[-1] - 1.329) < 1e-3  # nearly orthonormal
    for i in (0, 5, 400, 725):
        q, k = freqs[i].tolist()
        n = np.arange(113 ** 2)
        assert np.allclose(basis[0, i], np.cos(2 * np.pi * k * n / q), atol=1e-5)
        if q > 2:
            assert np.allclose(basis[1, i], np.sin(2 * np.pi * k * n / q), atol=1e-5)
            assert np.allclose(basis[2, i], np.cos(2 * np.pi * k * (n % 113 - 113 * (n // 113)) / q), atol=1e-5)


def test_neuron_spectra_find_planted_waves():
    p, classes = 31, data.primes_below(31)
    freqs, basis = analyze.wave_freqs(classes), analyze.waves(p, classes, p)
    at = {tuple(f): i for i, f in enumerate(freqs.tolist())}
    n = torch.arange(p * p)
    wave = lambda q, k, sign: torch.cos(2 * torch.pi * k * (n % p + sign * p * (n // p)) / q + 0.7)
    marginal = torch.cos(2 * torch.pi * 3 * (n % p) / 29)
    neurons = torch.stack([wave(29, 5, 1) + 3, 2 * wave(23, 4, -1) + marginal], 1)
    solver = analyze.wave_solver(p, basis)
    out = analyze.neuron_spectra(neurons, p, solver)
    assert out['spectrum'].shape == (16,) and out['sum_power'].shape == out['difference_power'].shape == (len(freqs),)
    assert abs(out['sum_power'][at[29, 5]] / (0.5 / 2) - 1) < 0.05        # variance 1/2, mean over two neurons
    assert abs(out['difference_power'][at[23, 4]] / (2 / 2) - 1) < 0.05
    rest = out['sum_power'].sum() + out['difference_power'].sum() - out['sum_power'][at[29, 5]] - out['difference_power'][at[23, 4]]
    assert rest < 0.01
    own = torch.tensor(np.abs(np.fft.fft2((neurons - neurons.mean(0)).T.reshape(2, p, p).numpy())) / p ** 2)[:, :p // 2 + 1].mean(2).T
    assert torch.allclose(out['spectrum'].double(), own.mean(1).double(), atol=1e-5)
    assert torch.allclose(out['variance'][0], neurons.var(0, correction=0).mean()) and abs(out['variance'][1] - 0.5 / 2) < 0.02
    mod_p = 5 + torch.cos(2 * torch.pi * 4 * (n % p + n // p) / p)[:, None]   # two bins, one frequency of x1; the mean does not count
    assert analyze.neuron_spectra(mod_p, p, solver)['active'].tolist() == [2, 1]


def plane_wave(p, q, k, stride, sign=1, phase=0.0):
    """cos(2 pi k (x0 +- stride x1) / q + phase) over all inputs, from Python integers: (p^2,)."""
    return torch.tensor([math.cos(2 * math.pi * (k * (x0 + sign * stride * x1) % q) / q + phase) for x1 in range(p) for x0 in range(p)])


@pytest.fixture(scope='module')
def at_113():
    """Frequencies and solver of the 29 tasks."""
    classes = data.primes_below(113)
    return analyze.wave_freqs(classes), analyze.wave_solver(113, analyze.waves(113, classes, 113))


def test_leakage_of_the_papers_count():
    """A wave mod p lights 2 bins of the 2-D DFT; a wave of period q < p about 70 on average (from 6 to 134), though it is one wave."""
    p = 113
    mod_p = analyze.dft2(plane_wave(p, p, 25, 1)[:, None], p)
    assert mod_p.shape == (57, 113, 1) and mod_p[25, 25, 0] > 0.49 and analyze.active_counts(mod_p, torch.ones(1, dtype=bool)).tolist() == [2, 1]
    wave = analyze.waves(p, data.primes_below(p), p)[0]
    counts = torch.cat([analyze.active(torch.fft.fft2(part.view(-1, p, p)).abs().flatten(1).T) for part in wave.split(242)])
    assert len(counts) == 726 and abs(counts.float().mean() - 70.8) < 0.1 and (counts.min(), counts.max()) == (6, 134)
    assert abs(analyze.active_counts(analyze.dft2(wave[::9].T, p), torch.ones(81, dtype=bool))[0] - counts[::9].float().mean()) < 0.1


def test_planted_waves_are_found_by_kind(at_113):
    """A sum wave, a difference wave and a marginal, each as such with nearly all of its variance; the worst of 60 (q, k)."""
    p, (freqs, solver) = 113, at_113
    picks = freqs[torch.linspace(0, 725, 60).long()].tolist()
    for sign, row in ((1, 0), (-1, 1)):
        neurons = torch.stack([plane_wave(p, q, k, p, sign, 0.4) for q, k in picks if q > 2 or sign == 1], 1)
        parts, at = analyze.decompose(neurons, p, solver), [i for i in torch.linspace(0, 725, 60).long().tolist() if freqs[i, 0] > 2 or sign == 1]
        share = parts['waves'] / parts['variance']
        assert all(share[row, i, j] > 0.99 for j, i in enumerate(at))
        single = analyze.single_waves(parts['products'], p, solver)
        assert (single.argmax(0) == torch.tensor(at)).all() and (single <= 1.001 * (parts['variance'] - parts['marginals'])).all()
    marginal = torch.cos(2 * torch.pi * 7 * torch.arange(p * p).remainder(p) / 101)[:, None]
    parts = analyze.decompose(marginal, p, solver)
    assert parts['marginals'] / parts['variance'] > 0.999 and parts['waves'].sum() < 1e-3


def test_a_mixture_is_recovered_with_its_shares(at_113):
    p, (freqs, solver) = 113, at_113
    at = {tuple(f): i for i, f in enumerate(freqs.tolist())}
    mix = 3 * plane_wave(p, 107, 1, p) + 2 * plane_wave(p, 109, 1, p, phase=1.0) + 1 * plane_wave(p, 13, 4, p, phase=2.0) + 1 * plane_wave(p, 29, 3, p, -1)
    parts = analyze.decompose(mix[:, None], p, solver)
    power = parts['waves'][:, :, 0]
    # 1/107 and 1/109 overlap a little, so the variance each contributes holds half of their covariance
    coefficients = {(0, 107, 1): 9 / 2, (0, 109, 1): 4 / 2, (0, 13, 4): 1 / 2, (1, 29, 3): 1 / 2}
    for (row, q, k), variance in coefficients.items():
        assert abs(power[row, at[q, k]] - variance) < 0.15 * variance
        power[row, at[q, k]] = 0
    assert power.abs().sum() < 0.05
    noise = torch.randn(p * p, 200, generator=torch.Generator().manual_seed(0))  # the closed form for white noise
    parts = analyze.decompose(noise, p, solver)
    mean = parts['waves'][:, freqs[:, 0] > 2].mean(2) / (parts['variance'] - parts['marginals']).mean() * 112 ** 2
    assert abs(mean.mean() - 2) < 0.02 and mean.min() > 1 and mean.max() < 3


def test_the_wave_is_found_after_relu(at_113):
    """A neuron max(0, cos(w x0 + a) + cos(w p x1 + b)), as networks have them: its (q, k), and sum and difference alike."""
    p, (freqs, solver) = 113, at_113
    g, x = torch.Generator().manual_seed(1), torch.arange(p)
    picks = freqs[3 + torch.randperm(723, generator=g)[:40]]
    a, b = torch.rand(2, 40, generator=g) * 6.28
    w = 2 * torch.pi * picks[:, 1] / picks[:, 0]
    neurons = torch.relu(torch.cos(w * x[:, None] + a)[None] + torch.cos(w * p * x[:, None] + b)[:, None]).flatten(0, 1)  # x1 x0 -> row n
    numbers, arrays = analyze.mlp(neurons, p, freqs, solver)
    assert torch.equal(arrays['neuron_wave'], picks) and numbers['pure'] == 40 and numbers['clusters'] == len(picks.unique(dim=0))
    assert arrays['neuron_wave_share'].min() > 0.5 and arrays['neuron_wave_share'].max() <= 1
    assert abs(numbers['sum_waves'] / numbers['difference_waves'] - 1) < 0.1
    total = sum(numbers[k] for k in ('marginals', 'sum_waves', 'difference_waves', 'rest'))
    assert abs(total - 1) < 1e-4 and torch.allclose(arrays['neuron_split'].sum(0), torch.ones(40), atol=1e-3)


def test_the_p_dft_share_counts_every_wave_of_a_frequency():
    """Sum, difference and both marginals of a frequency k mod p are wholly k's own."""
    p, x0 = 31, torch.arange(31 ** 2) % 31
    neurons = torch.stack([plane_wave(p, p, 5, 1), plane_wave(p, p, 7, 1, -1), torch.cos(2 * torch.pi * 3 * x0 / p), torch.cos(2 * torch.pi * 4 * (torch.arange(p * p) // p) / p)], 1)
    numbers, arrays = analyze.mlp(neurons + 1, p, analyze.wave_freqs([p]), analyze.wave_solver(p, analyze.waves(p, [p], 1)))
    assert arrays['neuron_k'].tolist() == [5, 7, 3, 4] and torch.allclose(arrays['neuron_k_share'], torch.ones(4), atol=1e-4)
    assert torch.allclose(arrays['neuron_split'], torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0.0]]), atol=1e-4)


def test_fft_against_a_plain_dft():
    p, W = 13, torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
    n = torch.arange(p)
    rows = [torch.full((p,), p ** -0.5)]
    for k in range(1, p // 2 + 1):
        rows += [(2 / p) ** 0.5 * torch.cos(2 * torch.pi * k * n / p), (2 / p) ** 0.5 * torch.sin(2 * torch.pi * k * n / p)]
    basis = torch.stack(rows)
    assert torch.allclose(basis @ basis.T, torch.eye(p), atol=1e-6)
    assert torch.allclose(analyze.fourier(W), basis @ W, atol=1e-5)
    a = torch.randn(p * p, 3, generator=torch.Generator().manual_seed(1))
    F = torch.exp(-2j * torch.pi * n[:, None] * n / p)
    full = torch.einsum('ab,cd,bdf->acf', F, F, (a - a.mean(0)).view(p, p, 3).to(F.dtype)).abs() / p ** 2
    assert torch.allclose(analyze.dft2(a, p), full[:7], atol=1e-5) and torch.allclose(full[7:], full[1:7].flip(0).flip(1).roll(1, 1), atol=1e-5)


@pytest.mark.parametrize('n', [12, 13])
def test_cosines_and_sines_of_any_length(n):
    W, i = torch.randn(n, 4, generator=torch.Generator().manual_seed(0)), torch.arange(n)
    cos, sin = analyze.cos_sin(W)
    for k in range(1, n // 2 + 1):
        scale = (1 / n if 2 * k == n else 2 / n) ** 0.5
        assert torch.allclose(cos[k - 1], scale * torch.cos(2 * torch.pi * k * i / n) @ W, atol=1e-5)
        assert torch.allclose(sin[k - 1], scale * torch.sin(2 * torch.pi * k * i / n) @ W, atol=1e-5)
    assert torch.isclose(cos.square().sum() + sin.square().sum(), (W - W.mean(0)).square().sum())  # the whole of it
    grid = torch.cos(2 * torch.pi * torch.stack([3 * i[:, None] + 0 * i, 5 * (i[:, None] + i), 2 * (i[:, None] - i), 6 * (i[:, None] + i) + 0.1 * n]) / n + 0.4).flatten(1).T
    share, k = analyze.best_frequency(analyze.dft2(grid, n), grid.var(0, correction=0))
    assert k.tolist() == [3, 5, 2, 6] and torch.allclose(share, torch.ones(4), atol=1e-4)


def test_discrete_logarithms_by_brute_force():
    for p in data.primes_below(120):
        powers = analyze.by_discrete_log(p).tolist()
        g = next(g for g in range(1, p) if len({g ** i % p for i in range(p - 1)}) == p - 1)  # the smallest generator
        assert all(next(i for i in range(p) if g ** i % p == r) == powers.index(r) for r in range(1, p)) and len(powers) == p - 1
    for n in (0, 1, 4, 12, 91):
        with pytest.raises(ValueError, match='prime'):
            analyze.by_discrete_log(n)


def characters(p, ks, directions=torch.randn(8, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))):
    """Rows 0 .. p-1 of multiplicative characters k, each cosine and sine in a direction of its own; 0 has none."""
    log = analyze.by_discrete_log(p).argsort()                                       # of 1 .. p-1
    phase = 2 * torch.pi * (torch.tensor(ks) * log[:, None] % (p - 1)).double() / (p - 1)
    W = torch.cat([phase.cos(), phase.sin()], 1) @ directions[:2 * len(ks)]
    return torch.cat([0 * W[:1], W])


def test_density_and_ratio_against_known_values():
    def of(W):
        return pytest.approx([v.item() for v in analyze.density_and_ratio(W)], abs=0.02)
    g = torch.Generator().manual_seed(0)
    assert of(torch.randn(97, 128, generator=g)) == [1, 0.93]
    five, n = 0, torch.arange(97)[:, None]                                           # five frequencies, ten random directions
    for k in (3, 11, 20, 33, 40):
        phase = 2 * torch.pi * (k * n % 97).double() / 97
        five = five + phase.cos() * torch.randn(128, generator=g) + phase.sin() * torch.randn(128, generator=g)
    assert analyze.density_and_ratio(five)[0].item() == pytest.approx(5 / 48)
    for ks, expected in (((2, 4, 7, 9), (1, 0.93)), ((3, 5, 7, 8), (1, 0.56)), ((2, 4, 6, 8), (0.5, 0)), ((1, 3, 5, 7), (0.5, 0))):
        assert of(characters(97, ks)) == list(expected), ks


def test_a_character_is_one_line_in_one_basis_and_flat_in_the_other():
    class net:
        W_out = torch.eye(2, dtype=torch.float64)
        W_E, W_U = characters(31, [4], W_out), characters(31, [7], W_out).T
    turns = characters(31, [4], torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))  # the wave in six phases
    grid = turns[:, None] * turns                                                    # x1 x0: products of a wave of either
    neurons = torch.cat([grid.flatten(0, 1), plane_wave(31, 31, 5, 1)[:, None].expand(-1, 2).double()], 1)
    numbers, arrays = analyze.polynomials(net, 31)
    assert [int(numbers[k]) for k in ('W_E_mult_key', 'W_L_mult_key')] == [4, 7] and numbers['W_E_mult_effective'].item() == pytest.approx(1) == numbers['W_L_mult_effective'].item()
    assert numbers['W_E_mult_gini'] > 0.9 and numbers['W_L_gini'] < 1e-6 and numbers['W_E_effective'].item() == pytest.approx(15) == numbers['W_L_effective'].item()
    assert torch.allclose(arrays['W_E_cos_sin'].square().sum(0), 2 * torch.ones(15, dtype=torch.float64))  # sqrt(p) at every k of the DFT
    assert numbers['centre'] == 0
    net.W_E = net.W_E.roll(5, 0)                                                     # now a wave in the logarithm of n - 5
    shifted, _ = analyze.polynomials(net, 31)
    assert shifted['centre'] == 5 and shifted['centre_gini'] == pytest.approx(numbers['W_E_mult_gini'].item()) and shifted['W_E_mult_gini'] < 0.2
    k_share, _ = analyze.best_frequency(analyze.dft2(neurons, 31), neurons.var(0, correction=0))
    numbers, _ = analyze.sharp(neurons, k_share, 31, 2)
    assert numbers['sharp_mult'].tolist() == [4, 2] and numbers['sharp'].tolist() == [0, 2]  # columns of two operations


@pytest.mark.parametrize('task', ['add', 'a*b,a+b'])
def test_components_sum_to_the_logits(task):
    d, net = data.make(task, 7), Transformer(7, 16, 4, 13 if task == 'add' else 7, 1 if task == 'add' else 2)
    x, _ = d.part(torch.arange(5, 40))
    with torch.no_grad():
        parts = analyze.components(net, x)
        assert parts.shape == (6, len(x), 16) and torch.allclose(parts.sum(0) @ net.W_U, net(x), atol=1e-4)
        assert torch.allclose(parts[0], (net.W_E[x[:, 2]] + net.W_pos[2]))
        only = Transformer(7, 16, 4, 13 if task == 'add' else 7, 1 if task == 'add' else 2)
        only.load_state_dict(net.state_dict())
        only.W_out.zero_()
        only.W_O[[0, 1, 3]] = 0                                                       # head 2 alone
        assert torch.allclose(only(x), (parts[0] + parts[3]) @ net.W_U, atol=1e-4)


def test_a_filter_takes_out_what_it_should_and_nothing_else():
    g, C = torch.Generator().manual_seed(0), 21
    W_U, k, z = torch.randn(32, C, generator=g, dtype=torch.float64), torch.tensor([1, 4, 10]), torch.randn(50, 32, generator=g, dtype=torch.float64)
    P = analyze.without(W_U, k)
    before, after = (torch.fft.rfft(logits, dim=1) for logits in (z @ W_U, z @ P @ W_U))
    assert after[:, k].abs().max() < 1e-10 < before[:, k].abs().min() and torch.allclose(P @ P, P) and torch.isclose(P.trace(), torch.tensor(32 - 6.0).double())
    A = analyze.cos_sin(W_U.T)[:, k - 1].flatten(0, 1)
    assert torch.allclose(P, torch.eye(32, dtype=torch.float64) - torch.linalg.pinv(A) @ A)   # nothing else is taken: the nearest vector
    n = torch.arange(C)
    waves = [torch.ones(C)] + [f(2 * torch.pi * j * n / C) for j in range(1, 11) for f in (torch.cos, torch.sin)]
    W_U = torch.linalg.qr(torch.randn(32, C, generator=g)).Q @ torch.stack(waves)      # each frequency by directions of its own
    z, P = z.float(), analyze.without(W_U, k)
    before, after = (torch.fft.rfft(logits, dim=1) for logits in (z @ W_U, z @ P @ W_U))
    others = [j for j in range(11) if j not in k.tolist()]                             # the constant is among them
    assert torch.allclose(after[:, others], before[:, others], atol=1e-4) and after[:, k].abs().max() < 1e-4 and torch.allclose(P @ P, P, atol=1e-5)


def test_errors_by_brute_force():
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randint(0, 6, (300, 39), generator=g).float(), torch.randint(0, 39, (300,), generator=g)
    logits[:200].scatter_(1, y[:200, None], 7)
    for modulus in (None, 39):
        off = []
        for z, t in zip(logits.tolist(), y.tolist()):
            best = max(v for c, v in enumerate(z) if c != t)
            d = 0 if z[t] > best else abs(next(c for c, v in enumerate(z) if v == best and c != t) - t)
            off.append(min(d, modulus - d) if modulus else d)
        wrong = [d for d in off if d]
        expected = [sum(d <= most for d in off) / 300 for most in (0, 2, 10)] + [sum(d % 10 == 0 for d in wrong) / len(wrong), sum(d == 1 for d in wrong) / len(wrong)]
        assert analyze.plain(analyze.errors(logits, y, modulus)) == pytest.approx(expected) and wrong
    assert analyze.plain(analyze.errors(torch.eye(4), torch.arange(4))) == [1, 1, 1, 0, 0]


def summing_network(p):
    """A network that adds by hand, with logits -0.01 (s - c)^2 + (-1)^(s - c) of class c: a low part for the magnitude of s = x0 + x1, a
    high part for its parity. Attention brings the sum to one dimension, neurons bend at every whole number, W_U has the waves."""
    C, D = 2 * p - 1, 2 * p + 2
    net, n = Transformer(p, D, 1, C), torch.arange(C).double()
    waves = analyze.fourier(torch.eye(C, dtype=torch.float64))                       # orthonormal rows over the classes
    off = n[:, None] - n
    features = (-0.01 * off.square() + 1 - 2 * (off % 2)) @ waves.T                  # s, what each wave needs
    bends = features.diff(dim=0, prepend=0 * features[:1]).diff(dim=0, prepend=0 * features[:1])  # f(s) = sum_t bends[t] relu(s - t + 1)
    with torch.no_grad():
        for w in net.parameters():
            w.zero_()
        net.W_E[:p, 0], net.W_pos[2, 1] = torch.arange(p).float(), 1.0
        net.W_V[0], net.W_O[0] = torch.eye(D), torch.eye(D)                          # W_Q = W_K = 0: the mean over three tokens, s / 3 and 1 / 3
        net.W_in[0, :C], net.W_in[1, :C] = 3.0, (1 - n).float() * 3 / 4
        net.W_out[:C, 2:2 + C], net.W_U[2:2 + C] = bends.float(), waves.float()
    return net


def test_a_hand_built_adder_loses_its_magnitude_or_its_parity():
    p = 20
    d, net = data.make('add', p), summing_network(p)
    with torch.no_grad():
        parts = analyze.components(net, d.x)
        (numbers, arrays), cut = analyze.output(net.W_U, parts, tau=6), analyze.filters(net, parts, d.y[:, 0], None, tau=6)
    f = {name: row for name, (row, _) in cut['filters'].items()}
    nulls = [null for _, null in cut['filters'].values()]
    assert nulls[0] is None and all(len(null) == 5 and 0 <= null[0] <= null[1] <= null[2] <= 1 for null in nulls[1:])
    drawn, g = [], torch.Generator().manual_seed(0)
    for _ in range(3):                                                                # what the MLP writes without 12 random directions
        Q = torch.linalg.qr(torch.randn(2 * p + 2, 12, generator=g)).Q
        drawn.append(analyze.errors((parts.sum(0) - parts[-1] @ Q @ Q.T) @ net.W_U.detach(), d.y[:, 0]))
    assert nulls[1].tolist() == pytest.approx(torch.tensor(drawn).mean(0).tolist(), abs=2e-3)
    assert f['nothing'][0] == f['low from attention'][0] == f['high from attention'][0] == 1 and (cut['left_without_low'], cut['left_without_high']) == (2 * p + 2 - 12, 2 * p + 2 - 26)
    assert f['low from MLP'] == f['low from both'] and f['low from MLP'][2] < 0.5 and f['low from MLP'][4] < 0.02   # anywhere, not at a neighbour
    assert f['high from MLP'][2] == 1 and f['high from MLP'][0] < 0.3 and f['high from MLP'][4] > 0.3               # near, and of any parity
    with torch.no_grad():
        low, high = (analyze.components(net, d.x)[2] @ analyze.without(net.W_U, k) @ net.W_U for k in (torch.arange(1, 7), torch.arange(7, 20)))
    same = [((z.argmax(1) - d.y[:, 0]) % 2 == 0).float().mean() for z in (low, high)]
    assert same[0] > 0.8 and same[1] < 0.6                                          # the parity survives the one filter, not the other
    assert numbers['periods'][2].tolist() == pytest.approx([39 / 19]) and arrays['class_spectra'][:2].abs().max() < 1e-3               # period 39 / 19 is the parity
    sums, c = d.x[:, 0] + d.x[:, 1], torch.arange(39)
    with torch.no_grad():
        assert torch.allclose(net(d.x), (-0.01 * (sums[:, None] - c) ** 2 + 1 - 2 * ((sums[:, None] - c) % 2)), atol=1e-2)


def test_prominences_against_known_values():
    assert analyze.prominences(torch.tensor([1.0, 3, 2, 5, 0, 4, 3.5, 3.8, 1])).tolist() == pytest.approx([0, 1, 0, 4, 0, 3, 0, 0.3, 0], abs=1e-6)
    assert analyze.prominences(torch.tensor([4.0, 1, 2])).tolist() == [3, 0, 1] and analyze.prominences(torch.ones(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize('rows, found', [(100, [10, 5, 2]), (261, [261 / 26, 261 / 52, 261 / 130])])  # the nearest frequencies
def test_planted_periods_are_found_and_shuffled_ones_not(tmp_path, capsys, rows, found):
    W = data.fourier_features(rows, [2, 5, 10], 64) + 0.05 * torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    assert W.square().mean().sqrt().item() == pytest.approx(0.1, abs=0.02)
    np.save(tmp_path / 'w.npy', W)
    numbers, arrays = analyze.analyse_matrix(tmp_path / 'w.npy')
    assert numbers['periods'] == pytest.approx(found) and numbers['by_chance'] < min(numbers['prominences']) and numbers['n90'] <= 64
    assert np.allclose(arrays['singular_values'], np.linalg.svd(W.numpy())[1], atol=1e-4)
    torch.save(W[torch.randperm(rows, generator=torch.Generator().manual_seed(2))], tmp_path / 'w.pt')
    analyze.main(['--embedding', str(tmp_path / 'w.pt')])
    assert 'stand out of the spectrum over the rows (prominence): none' in capsys.readouterr().out
    scrambled = [data.fourier_features(rows, [2, 5, 10], 64, seed, scrambled=True) for seed in range(20)]
    assert sum(len(analyze.outliers(m)[0]) > 0 for m in scrambled) <= 1              # by chance two or three in a hundred
    trend = torch.arange(rows)[:, None] / rows @ torch.ones(1, 64)
    assert (rows / analyze.outliers(trend + 0.1 * W)[0]).tolist() == pytest.approx(found)   # however strong a trend is


def test_statistics_against_known_values():
    assert analyze.gini(torch.ones(10)) == 0 and torch.isclose(analyze.gini(torch.tensor([0.0] * 9 + [5])), torch.tensor(0.9))
    x = torch.rand(40, generator=torch.Generator().manual_seed(0))
    assert torch.isclose(analyze.gini(x), (x[:, None] - x).abs().mean() / (2 * x.mean()))  # its definition
    assert analyze.effective(torch.tensor([2.0, 2, 2, 0, 0])) == 3
    assert analyze.active(torch.tensor([[1.0, 9], [1, 9], [1, 9], [1, 9], [1, 9], [1, 9], [9, 9]])).tolist() == [1, 0] and torch.allclose(analyze.threshold(x[:, None]), x.mean() + 2 * x.std())
    S = torch.tensor([4.0, 3, 2, 1, 0.5, 0.25, 0.25])  # half of 11 is passed by the second, 9.9 by the fourth
    Q = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0))).Q
    numbers, arrays = analyze.embedding(Q * S @ Q.T)
    assert torch.allclose(arrays['singular_values'], S, atol=1e-5) and (numbers['W_E_n50'], numbers['W_E_n90']) == (2, 4)
    norms = (torch.fft.rfft(Q * S @ Q.T, dim=0)[1:].abs().square().sum(1) * 2 / 7).sqrt()
    assert torch.allclose(arrays['W_E_norms'], norms, atol=1e-4) and torch.isclose(numbers['W_E_gini'], analyze.gini(norms), atol=1e-4)
    assert torch.isclose(numbers['W_E_effective'], norms.square().sum() ** 2 / norms.pow(4).sum(), atol=1e-4)
    same = (arrays['left_vectors'] * Q).sum(0).abs()  # the last two values are equal, their vectors free
    assert torch.allclose(same[:5], torch.ones(5), atol=1e-3)


def test_random_weights_carry_nothing():
    """Nothing is beyond ten times white noise in random networks, nor in white noise; a planted wave is, and the weaker half of many is not."""
    d = data.make('miiii', 31)
    freqs, solver = analyze.wave_freqs(d.classes), analyze.wave_solver(31, analyze.waves(31, d.classes, 31))
    for seed in range(6):
        torch.manual_seed(seed)
        Transformer(31, 128, 4, sum(d.classes)).requires_grad_(False)(d.x, acts=(acts := {}))
        for neurons in (acts['neurons'], torch.randn(31 ** 2, 128)):
            numbers, arrays = analyze.mlp(neurons, 31, freqs, solver)
            assert numbers['waves'] == numbers['primes'] == numbers['clusters'] == 0 and numbers['wave_share'] < 0.1
    numbers, arrays = analyze.mlp(torch.randn(31 ** 2, 128) + plane_wave(31, 29, 5, 31)[:, None] + plane_wave(31, 29, 7, 31)[:, None], 31, freqs, solver)
    assert numbers['waves'] == 2 and numbers['primes'] == 1 and numbers['waves_effective'] < 10
    share = torch.tensor([[0.1] * 4 + [0.3] * 4 + [0.0] * 2, [1e-3] * 10])
    assert analyze.carried(share, 113).tolist() == [[False] * 4 + [True] * 4 + [False] * 2, [False] * 10]
    dead, _ = analyze.mlp(torch.rand(8).expand(31 ** 2, 8).contiguous(), 31, freqs, solver)
    assert all(math.isfinite(v) for v in dead.values()) and dead['neurons_alive'] == dead['waves'] == 0


def hand_built(p, keys, phases=16):
    """Weights (D = 32) that compute (a + b) mod p by cosines. Attention averages the two digits, so the residual stream has
    cos(w a) + cos(w b) and the sine: a vector of angle w (a + b) / 2. Neurons look at it from equally spaced angles f, and the
    sum of max(0, r cos(angle - f)) cos(2 f - w c) over f is a multiple of r cos(w (a + b) - w c)."""
    D, x = 32, torch.arange(p)
    W = {n: torch.zeros_like(w) for n, w in Transformer(p, D, 4, p).state_dict().items()}
    W['W_pos'][:2, -1] = 1e-3  # not zero, so that the correlation is defined
    W['W_V'][:], W['W_O'][:] = torch.eye(D).view(D, 4, 8).transpose(0, 1), torch.eye(D).view(4, 8, D)
    f = 2 * torch.pi * torch.arange(phases) / phases
    for i, k in enumerate(keys):
        w, neurons, into = 2 * torch.pi * k / p, slice(phases * i, phases * (i + 1)), 2 * len(keys) + 2 * i
        W['W_E'][:p, 2 * i], W['W_E'][:p, 2 * i + 1] = torch.cos(w * x), torch.sin(w * x)
        W['W_in'][2 * i, neurons], W['W_in'][2 * i + 1, neurons] = torch.cos(f), torch.sin(f)
        W['W_out'][neurons, into], W['W_out'][neurons, into + 1] = torch.cos(2 * f), torch.sin(2 * f)
        W['W_U'][into], W['W_U'][into + 1] = 20 * torch.cos(w * x), 20 * torch.sin(w * x)
    return W


def test_a_hand_built_adder_is_taken_apart(tmp_path):
    """Its accuracy is 1, its key frequencies are found in logits, neurons and embedding; without them it is lost, with them alone not."""
    p, keys = 31, [3, 7, 12]
    assert cli(*'--task nanda --p 31 --d_model 32 --epochs 1 --spectra_every 0 --device cpu --out'.split(), tmp_path).returncode == 0
    ckpt = data.load(tmp_path / 'ckpt.pt')
    data.write(tmp_path / 'ckpt.pt', ckpt | dict(model=hand_built(p, keys)))
    numbers, _ = analyze.analyse(tmp_path)
    a, n = np.load(tmp_path / 'analysis.npz'), numbers['final']
    d, net = data.make('nanda', p), Transformer(p, 32, 4, p)
    net.requires_grad_(False).load_state_dict(hand_built(p, keys))
    logits = net(d.x, acts=(acts := {}))
    waves = torch.stack([wave(2 * torch.pi * k * (d.x[:, 0] + d.x[:, 1]) / p) for k in keys for wave in (torch.cos, torch.sin)], 1)
    fitted = waves @ torch.linalg.lstsq(waves, logits).solution   # restricted and excluded loss by a plain least-squares fit
    rows = data.split(p * p, numbers['config']['train_frac'])[0]
    for name, z, r in (('restricted', logits.mean(0) + fitted, slice(None)), ('excluded', logits - fitted, rows)):
        assert np.isclose(n[f'{name}_loss'], torch.nn.functional.cross_entropy(z[r].double(), d.y[r, 0]), rtol=0.02), name
    c = (logits - logits.mean(0)) - (logits - logits.mean(0)).mean(1, keepdim=True)
    s = (d.x[:, 0] + d.x[:, 1])[:, None] - torch.arange(p)
    cosines = [torch.cos(2 * torch.pi * k * s / p) for k in range(1, 16)]
    assert np.allclose(a['fit'], [(w * c).mean() ** 2 / (w * w).mean() / (c * c).mean() for w in cosines], atol=1e-4)
    grid = acts['neurons'].view(p, p, -1)[:, :, 3].double().numpy()                 # a neuron of the first key, by plain least squares
    x1, x0 = np.meshgrid(np.arange(p), np.arange(p), indexing='ij')
    angles = [2 * np.pi * keys[0] * x / p for x in (x0, x1, x0 + x1, x0 - x1)]
    columns = np.stack([f(t).ravel() for t in angles for f in (np.cos, np.sin)], 1)
    target = (grid - grid.mean()).ravel()
    explained = columns @ np.linalg.lstsq(columns, target, rcond=None)[0]
    assert np.isclose(a['neuron_k_share'][3], explained.var() / target.var(), rtol=1e-3) and n['primes'] == 1
    assert n['valid_accuracies'] == n['train_accuracies'] == [1]
    assert n['key_frequencies'] == keys and n['waves'] == 3 and n['W_E_effective'] < 3.01
    assert n['full_loss'] < 0.2 and abs(n['restricted_loss'] - n['full_loss']) < 0.1 and n['excluded_loss'] > math.log(p) - 0.1
    assert n['cos_fit'] > 0.5 and np.allclose(a['fit'][[k - 1 for k in range(1, 16) if k not in keys]], 0, atol=1e-4)
    assert np.allclose(n['attention_score'], 0, atol=1e-6) and abs(n['W_pos_pearson'] - 1) < 1e-4
    best = a['neuron_k'][:48].reshape(3, 16)
    assert (best == np.array(keys)[:, None]).all() and (a['neuron_k_share'][:48] > 0.8).all()
    assert (a['neuron_wave'][:48, 1].reshape(3, 16) == np.array(keys)[:, None]).all() and not a['neuron_k_share'][48:].any()
    assert n['neurons_alive'] == 48
    att = torch.zeros(p * p, 3, 2)
    att[:, 0, 0], att[:, 1, 1] = 1, 1
    assert analyze.attention(att, p)[0]['attention_score'].tolist() == [1, -1]  # a head on x0, a head on x1


# ------------------------------------------------------------------------------------------------ analysis and figures of run folders

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Small runs of both kinds, analysed by the command: name -> (folder, what the command printed)."""
    out = {}
    for name, task in dict(miiii='miiii', nanda='nanda', again='miiii', formulas='a*b,a+b', sums='add').items():
        folder = tmp_path_factory.mktemp(name)
        args = [*TINY, '--task', task, '--epochs', 30, '--spectra_every', 10, '--out', folder]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert not train.main([*map(str, args)])
            printed.truncate(0), printed.seek(0)
            assert not analyze.main([str(folder)])
        out[name] = folder, printed.getvalue()
    return out


def leaves(x):
    return [y for v in (x.values() if isinstance(x, dict) else x) for y in leaves(v)] if isinstance(x, (dict, list)) else [x]


def test_analysis_of_a_run(folders):
    folder, printed = folders['miiii']
    n, a = json.loads((folder / 'analysis.json').read_text()), np.load(folder / 'analysis.npz')
    assert all(math.isfinite(v) for v in leaves(n) if isinstance(v, float)) and all(np.isfinite(a[k]).all() for k in a.files if k != 'names')
    ckpt, start = data.load(folder / 'ckpt.pt'), data.load(folder / 'snapshots' / '00000000.pt', ('model',))
    W_E, W_pos = ckpt['model']['W_E'][:11].numpy(), ckpt['model']['W_pos'].numpy()
    S = np.linalg.svd(W_E)[1]
    assert np.allclose(a['singular_values'], S, atol=1e-4) and n['final']['W_E_n50'] == np.searchsorted(S.cumsum(), 0.5 * S.sum()) + 1
    assert np.isclose(n['final']['W_pos_pearson'], np.corrcoef(W_pos[0], W_pos[1])[0, 1], atol=1e-5)
    assert np.allclose(a['singular_values_initial'], np.linalg.svd(start['model']['W_E'][:11].numpy())[1], atol=1e-4)  # the null is the run's own start
    assert np.allclose(a['snapshot_W_E_norms'][0], a['W_E_norms_initial'], atol=1e-4) and a['snapshot_epoch'].tolist() == [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 30]
    assert a['omega_epoch'].tolist() == [0, 1, 2, 3, 4, 6, 8, 10, 11, 16, 20, 23, 30] and a['omega_counts'].shape == (13, 3)
    assert np.allclose(a['omega_spectrum'][-1], a['spectrum']) and a['omega_counts'][-1, 2] == n['final']['waves']
    assert np.allclose(a['snapshot_valid_accuracies'][-1], n['final']['valid_accuracies'])
    acts, d = {}, data.make('miiii', 11)
    net = Transformer(11, 32, 2, 17)
    net.load_state_dict(ckpt['model'])
    net(d.x, acts=acts)
    assert np.allclose(a['attention'][1, 3, 7], acts['att'][3 + 11 * 7, 0, 1].item(), atol=1e-5)      # head 1, x0 = 3, x1 = 7
    assert np.allclose(a['neurons'][2, 3, 7], acts['neurons'][3 + 11 * 7, 2].item(), atol=1e-5)
    m = np.load(folder / 'metrics.npz')
    s = json.loads((folder / 'summary.json').read_text())
    assert [(g['first'], g['sustained']) for g in n['grokking']] == [(t['grok_epoch'], t['grok_epoch_sustained']) for t in s['tasks']]
    assert np.allclose(n['final']['valid_accuracies'], [t['valid_acc'] for t in s['tasks']])
    assert np.allclose(a['omega_counts'][7, :2], m['active'][1]) and np.allclose(analyze.recorded_share(dict(m))[0], a['wave_shares_initial'][0], atol=1e-3)
    assert 'n mod 7' in printed and 'Pearson' in printed
    assert (folder / 'analysis.json').read_text() == (folders['again'][0] / 'analysis.json').read_text().replace(str(folders['again'][0]), str(folder))


def test_analysis_of_sums(folders, tmp_path):
    folder, printed = folders['sums']
    n, s = json.loads((folder / 'analysis.json').read_text()), json.loads((folder / 'summary.json').read_text())
    assert n['final']['filters']['nothing'][0] == pytest.approx(s['tasks'][0]['test_errors'], abs=1e-6) and s['tasks'][0]['test_errors'][0] == pytest.approx(s['tasks'][0]['test_acc'])
    assert 'low from MLP' in printed and 'within 10' in printed and n['final']['tau'] == 2 and len(n['final']['low_share']) == 4
    folder, d = folders['nanda'][0], data.make('nanda', 11)
    n, run = json.loads((folder / 'analysis.json').read_text())['final'], analyze.Folder(folder)
    rows, scores = run.rows[2], n['filters']['nothing'][0]
    run.use(run.final, '')
    guess = run.net(d.x[rows]).argmax(1)
    off = torch.minimum((guess - d.y[rows, 0]) % 11, (d.y[rows, 0] - guess) % 11)                   # the shorter way round
    assert scores[:3] == pytest.approx([(off <= most).float().mean().item() for most in (0, 2, 10)]) and (guess - d.y[rows, 0]).abs().max() > 6
    mixed = json.loads((folders['formulas'][0] / 'analysis.json').read_text())['final']['filters']['nothing'][0]
    assert mixed[0] == pytest.approx(np.mean([t['test_acc'] for t in json.loads((folders['formulas'][0] / 'summary.json').read_text())['tasks']]))
    assert 'high from both' in folders['formulas'][1] and analyze.analyse(shutil.copytree(folder, tmp_path / 'n'), 2)[0]['final']['tau'] == 2
    for args, says in ((['--tau', '5'], '11 classes run to 5'), (['--tau', '2', '--collect'], 'does not go with')):
        with pytest.raises(data.Refusal, match=says):
            analyze.main([str(folder), *args])
    with pytest.raises(data.Refusal, match='one set of classes'):
        analyze.main([str(folders['miiii'][0]), '--tau', '2'])


def test_grokking_epochs_from_records_and_snapshots():
    """Three tasks: fitted first with dropout, fitted first at a snapshot without, never."""
    class run:
        epoch, data = 4, data.make('miiii', 7)
        records = dict(valid_acc=np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0.0]]), train_acc=np.array([[0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 0.0]]))
    snaps = dict(snapshot_epoch=np.array([1, 2]), snapshot_train_accuracies=np.array([[0, 1, 0], [1, 1, 0]]))
    out = analyze.grokking(run, dict(valid_accuracies=[1, 1, 0]), snaps)
    assert [tuple(g.values())[1:] for g in out] == [(1, 3, 2, -1), (4, 4, 1, 3), (None, None, None, None)]
    assert [g['train'] for g in analyze.grokking(run, dict(valid_accuracies=[1, 1, 0]), {})] == [3, 2, None]
    run.records = {}
    assert analyze.grokking(run, {}, snaps) == []


def test_every_figure(folders, tmp_path):
    nanda, formulas, miiii = (shutil.copytree(folders[k][0], tmp_path / k) for k in ('nanda', 'formulas', 'miiii'))
    np.save(tmp_path / 'numbers.npy', data.fourier_features(50, [2, 5], 8))
    done = cli(nanda, formulas, miiii, '--data', '--embedding', 'numbers.npy', '--animate', 'waves', script='plots.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {tmp_path / 'out': plots.DATA, nanda: [*plots.SINGLE, *plots.COMPARED], formulas: plots.SINGLE, miiii: plots.SINGLE}
    lacking = {nanda: ['density'], formulas: ['mechanism'], miiii: ['mechanism', 'bases', 'pattern', 'components', 'filters']}  # a comparison is of all
    for folder, figures in expected.items():
        for f in figures:
            for kind in ('png', 'svg'):
                file = folder / 'figures' / f'{f.__name__}.{kind}'
                assert (f.__name__ in lacking.get(folder, ())) != file.exists(), file
    assert (tmp_path / 'out' / 'figures' / 'embedding_numbers.png').exists()
    assert f'mechanism not drawn: {miiii} without logits of a single' in done.stdout and f'density not drawn: {miiii} without' in done.stdout
    assert all((x / 'figures' / 'waves.gif').read_bytes()[:3] == b'GIF' for x in (miiii, nanda))
    done = cli(nanda, '--only', 'omega', '--animate', 'embedding', script='plots.py')
    assert done.stdout.split() == [str(nanda / 'figures' / 'omega.png'), str(nanda / 'figures' / 'embedding.gif')]


def test_figures_show_the_numbers(folders):
    """No figure is empty, and in some the drawn values are read back."""
    plots.plt.rcParams['figure.max_open_warning'] = 0
    miiii, nanda = (plots.Run(folders[k][0]) for k in ('miiii', 'nanda'))
    figures = {f.__name__: f() for f in plots.DATA} | {f.__name__: f(nanda) for f in plots.SINGLE}
    formulas = plots.Run(folders['formulas'][0])
    figures |= {f.__name__: f([nanda, formulas] if f is plots.density else [miiii, nanda]) for f in plots.COMPARED}
    for name, fig in figures.items():
        for ax in fig.axes:
            empty = not (ax.collections or ax.lines or ax.patches or ax.images or ax.artists)
            assert not empty or name == 'clusters', name  # so short a run may have no pure neurons
    draw = plots.waves(miiii).axes[0].collections[0]
    q, k = miiii.arrays['freqs'].T
    rows = [[2, 3, 5, 7].index(x) for x in q]
    assert np.allclose(draw.get_offsets(), np.column_stack([k / q, rows])) and np.isclose(draw.get_sizes().max(), 80)
    mesh = plots.accuracy(miiii).axes[1].collections[0].get_array()
    assert np.allclose(mesh, np.load(miiii.path / 'metrics.npz')['valid_acc'].T)                     # a row per task, epochs across
    mod2 = figures['targets'].axes[0].collections[0]                                               # n mod 2 = 1 at odd x0 + x1
    assert sorted(tuple(p.vertices[:4].mean(0).round().astype(int)) for p in mod2.get_paths()) == sorted((x1, x0) for x0 in range(11) for x1 in range(11) if (x0 + 11 * x1) % 2)
    bars = [b.get_height() for b in figures['singular_values'].axes[1].patches]
    assert np.allclose(bars, nanda.arrays['singular_values'] / nanda.arrays['singular_values'].sum())
    assert np.allclose(figures['attention'].axes[1].images[0].get_array(), miiii.arrays['attention'][1])
    losses = {line.get_label(): line.get_ydata() for line in figures['mechanism'].axes[2].lines}
    assert np.isclose(losses['all inputs'][-1], nanda.final['full_loss']) and np.isclose(losses['training inputs, without key'][-1], nanda.final['excluded_loss'])
    counts = {line.get_label(): line.get_ydata() for line in figures['omega'].axes[1].lines}
    assert np.allclose([y[-1] for y in counts.values()], [nanda.final[n] for n in ('waves', 'active_bins', 'active_averaged')])
    for row, run in zip(figures['density'].axes[3:6], [formulas] * 3):
        lines = {line.get_label(): line.get_ydata() for line in row.lines}
        measure = row.get_title()
        for label, y in lines.items():
            means = dict(validation=np.mean(run.final['valid_accuracies']), training=np.mean(run.final['train_accuracies']))
            name = label if label in ('W_E', 'W_L') else f'{label[-3:]}_null'
            assert np.isclose(y[-1], means[label] if measure == 'accuracy' else run.final[f'{name}_{measure}']), (measure, label)
    sums = plots.Run(folders['sums'][0])
    heights = np.array([b.get_height() for ax in plots.components(sums).axes for b in ax.patches])
    assert np.allclose(heights, sums.arrays['class_spectra'].flatten()) and len(heights) == 4 * 10
    drawn = [b.get_width() for ax in plots.filters(sums).axes for b in ax.patches]
    assert np.allclose(drawn, [row[i] for i in range(5) for row, _ in sums.final['filters'].values()])
    shown = plots.pattern(formulas)
    folder = analyze.Folder(formulas.path)
    folder.use(folder.final, '')
    with torch.no_grad():
        logits = folder.net(torch.tensor([[3, 7, 11], [3, 7, 12], [8, 4, 11]]))[:, 1]     # of class 1; 2, 4, 8 are powers 1, 2, 3 of the generator 2
    assert np.allclose([shown.axes[0].images[0].get_array()[3, 7], shown.axes[4].images[0].get_array()[3, 7], shown.axes[2].images[0].get_array()[3, 2]], logits, atol=1e-4)
    assert 'a*b' in shown.axes[0].get_title() and 'a+b' in shown.axes[4].get_title()
    bars = np.array([b.get_height() for b in plots.bases(formulas).axes[1].patches])
    own = analyze.cos_sin(folder.net.W_E[:11].detach()[analyze.by_discrete_log(11)]).norm(dim=2)
    assert np.allclose(bars, own.flatten(), atol=1e-4)
    plots.plt.close('all')


def test_hinton_draws_areas_and_signs():
    fig, ax = plots.plt.subplots()
    plots.hinton(ax, [[4.0, -1.0], [0.0, 1.0]])
    filled, hollow = (sorted(path.get_extents().width * path.get_extents().height for path in c.get_paths()) for c in ax.collections)
    assert len(filled) == 2 and len(hollow) == 1 and np.isclose(filled[1] / filled[0], 4) and np.isclose(hollow[0], filled[0])
    plots.plt.close(fig)


def test_a_run_without_snapshots_or_records(folders, tmp_path):
    """What cannot be drawn is said, the rest is drawn."""
    folder = shutil.copytree(folders['nanda'][0], tmp_path / 'run')
    shutil.rmtree(folder / 'snapshots')
    (folder / 'metrics.npz').unlink()
    done = cli(folder, script='analyze.py')
    assert done.returncode == 0 and 'no weight snapshots' in done.stdout and 'no metrics.npz' in done.stdout
    done = cli(folder, script='plots.py')
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if 'not drawn' in line] == ['accuracy', 'loss', 'gradients', 'variance', 'omega', 'density']
    assert (folder / 'figures' / 'mechanism.png').exists()


def test_a_shipped_run_is_taken_like_its_own_folder(folders, tmp_path):
    folder, to = folders['miiii'][0], tmp_path / 'small'
    done = cli(folder, '--ship', to, script='analyze.py')
    assert done.returncode == 0, done.stderr
    assert sum(f.stat().st_size for f in to.iterdir()) < sum(f.stat().st_size for f in folder.rglob('*.*')) / 4
    own, small = (np.load(x / 'metrics.npz') for x in (folder, to))
    assert all(np.array_equal(own[k], small[k]) if own[k].dtype != np.float32 or 'acc' in k or k == 'variance' else np.allclose(own[k], small[k], rtol=2 ** -12, atol=0) for k in own.files)
    done = cli(to, script='analyze.py')
    assert done.returncode == 0 and 'note' not in done.stdout, done.stderr + done.stdout
    assert (to / 'analysis.json').read_text() == (folder / 'analysis.json').read_text().replace(str(folder), '')
    own, small = (np.load(x / 'analysis.npz') for x in (folder, to))
    assert own.files == small.files and all(np.allclose(own[k], small[k], rtol=1e-3, atol=1e-3) for k in own.files if own[k].dtype.kind in 'fi')
    done = cli(to, script='plots.py')
    assert done.returncode == 0 and [line.split()[1] for line in done.stdout.splitlines() if 'not drawn' in line] == ['mechanism', 'bases', 'pattern', 'components', 'filters', 'density']  # as of its own
    assert 'made by --ship' in refused('--resume', '--epochs', 40, '--out', to)
    assert 'must not exist' in refused(folder, '--ship', to, script='analyze.py')
    assert 'one run' in refused(folder, folder, '--ship', tmp_path / 'b', script='analyze.py')
    (to / 'snapshots.npz').write_bytes(b'half')
    assert 'snapshots.npz cannot be read' in cli(to, script='analyze.py').stdout


def test_perfect_from():
    acc = np.ones((40, 3))
    acc[:7, 0], acc[20, 2] = 0, 0.999
    assert [analyze.perfect_from(acc, for_epochs=n) for n in (1, 13, 14, 19, 20)] == [7, 7, 21, 21, None]
    assert analyze.perfect_from(acc, 0.99, 30) == 7


def test_order_and_span_of_a_result():
    r = dict(tasks=dict(name=[f'n mod {q}' for q in (2, 3, 5, 7, 11, 13)], grok_epoch=[4, 9, 9, None, 1200, 30]))
    assert analyze.order(4)(r) == '2-3=5-13' and analyze.order(29)(r) == '2-3=5-13-11' and analyze.span(r) == '30-1,200'
    assert analyze.span(dict(tasks=dict(r['tasks'], grok_epoch=[4, 9, 9, None, None, 30]))) == '30-30 (1 never)'
    assert analyze.order(3)(dict(tasks=dict(name=['n mod 2'], grok_epoch=[None]))) == 'none'


def test_values_of_a_mixture():
    r = dict(tasks=dict(grok_epoch=[None, 1234], valid_acc=[0.5, 1.0]), final=dict(x=0.123, y=[3, 4]))
    assert analyze.came_or_got(r) == '(0.50)+1,234' and analyze.joined('x', 'y', fmt='.1f')(r) == '0.1/3.0+4.0'


def test_results_are_collected_and_reported(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze, 'RESULTS', tmp_path / 'results.json')
    for _ in range(2):  # the second takes the place of the first
        analyze.main([str(folders['nanda'][0]), str(folders['miiii'][0]), str(folders['formulas'][0]), '--collect'])
    runs = {r['config']['task']: r for r in analyze.results()}
    assert len(analyze.results()) == 3 and runs['nanda']['initial']['W_E_n50'] and not runs['a*b,a+b']['initial']
    r, m = runs['miiii'], np.load(folders['miiii'][0] / 'metrics.npz')
    s = json.loads((folders['miiii'][0] / 'summary.json').read_text())
    assert r['tasks']['valid_acc'] == pytest.approx([t['valid_acc'] for t in s['tasks']], rel=1e-3) and r['config'] == s['config'] | dict(out='')
    for i, name in enumerate(m['grad_norm_names']):
        total = m['grad_norm'][:, i].sum()
        e = r['half_of_gradients'][name]
        assert m['grad_norm'][:e, i].sum() < total / 2 <= m['grad_norm'][:e + 1, i].sum() * (1 + 1e-6)
    capsys.readouterr()
    analyze.main(['--report'])
    shown = capsys.readouterr().out
    assert f'`{analyze.command(r["config"])}` | 1 | 30 |' in shown and 'not run' in shown
    again = dataclasses.asdict(train.resolve(train.parse(analyze.command(r['config']).split()))[0])  # these options make the same run
    assert all(again[k] == v for k, v in r['config'].items() if k not in train.HOW | {'spectra_every', 'snapshots'})
    folder = shutil.copytree(folders['nanda'][0], tmp_path / 'unfinished')
    (folder / 'summary.json').unlink()
    assert 'holds no finished run' in refused(folder, '--collect', script='analyze.py') and 'holds no finished run' in refused(folder, '--ship', tmp_path / 'b', script='analyze.py')
    assert not (tmp_path / 'b').exists() and 'name a run' in refused('--report', '--collect', script='analyze.py') and '--collect' in refused(folder, '--note', 'x', script='analyze.py')


@pytest.mark.parametrize('task', ['miiii', 'nanda'])
def test_the_shipped_runs_are_those_of_the_results(task):
    """Every task of the shipped weights is right on all validation rows, and the results say of them what they hold."""
    run = analyze.Folder(HERE / 'assets' / task)
    with torch.no_grad():
        numbers = {part: task_losses(run.net(run.data.x[rows]), run.data.y[rows], run.data.classes)[1].tolist() for part, rows in zip(('valid', 'test'), run.rows[1:])}
    assert set(numbers['valid']) == {1.0} and not run.missing
    r, = [r for r in analyze.results() if r['config'] == run.config]
    assert r['tasks']['valid_acc'] == numbers['valid'] and r['tasks']['test_acc'] == pytest.approx(numbers['test'], abs=1e-3)
    shown = analyze.embedding(run.net.W_E[:113])[0] | analyze.positions(run.net.W_pos)[0]
    assert all(r['final'][k] == pytest.approx(v, rel=1e-3) for k, v in analyze.plain(shown).items())
    assert r['tasks']['grok_epoch'] == [analyze.grok_epochs(acc, 1)[0] for acc in run.records['valid_acc'].T]
    assert sum(f.stat().st_size for f in (HERE / 'assets').rglob('*') if 'figures' not in f.parts and 'analysis' not in f.stem) < 8e6


def test_the_readme_shows_the_report(capsys):
    analyze.main(['--report'])
    tables = capsys.readouterr().out.strip().split('\n\n')
    assert len(tables) >= 3 and all(table in (HERE / 'README.md').read_text() for table in tables)


def test_without_room_for_waves(folders, tmp_path, monkeypatch):
    """At a large p the neurons are left out, and the rest is there."""
    folder = shutil.copytree(folders['nanda'][0], tmp_path / 'run')
    monkeypatch.setattr(analyze, 'MAX_MEMORY', 0)
    numbers, notes = analyze.analyse(folder)
    assert 'nothing about neurons' in notes[0] and 'waves' not in numbers['final'] and 'cos_fit' in numbers['final'] and 'waves' not in analyze.table(numbers)
    monkeypatch.undo()
    with pytest.raises(data.Refusal, match='nothing drawn'):
        plots.main([str(folder), '--only', 'neurons'])


def test_bad_folders(folders, tmp_path):
    assert 'no run folder' in refused(tmp_path, script='analyze.py') and 'no run folder' in refused(tmp_path, script='plots.py')
    assert 'name a run' in refused(script='analyze.py') and '--data' in refused(script='plots.py') and 'only' in refused('--data', '--only', 'nothing', script='plots.py')
    assert 'needs a run' in refused('--data', '--only', 'waves', script='plots.py') and 'name a run' in refused('--data', '--animate', 'waves', script='plots.py')
    folder = shutil.copytree(folders['miiii'][0], tmp_path / 'run')
    good = (folder / 'ckpt.pt').read_bytes()
    ckpt = data.load(folder / 'ckpt.pt')
    for bad in (dict(ckpt, config=ckpt['config'] | dict(p=13)), dict(ckpt, config=ckpt['config'] | dict(p=12)), dict(ckpt, config={})):
        data.write(folder / 'ckpt.pt', bad)
        assert 'ckpt.pt is not of' in refused(folder, script='analyze.py')
    (folder / 'ckpt.pt').write_bytes(good[:5000])
    assert 'truncated' in refused(folder, script='analyze.py')
    (folder / 'ckpt.pt').write_bytes(good)
    data.write(folder / 'ckpt.pt', dict(ckpt, model=ckpt['model'] | dict(W_U=ckpt['model']['W_U'] * math.nan)))
    assert 'not finite' in refused(folder, script='analyze.py')
    shutil.copy(folders['nanda'][0] / 'metrics.npz', folder)
    data.write(folder / 'ckpt.pt', dict(ckpt, step=11, model={n: w.half() for n, w in ckpt['model'].items()}))  # half precision, behind its snapshots
    done = cli(folder, script='analyze.py')
    assert done.returncode == 0 and 'no metrics.npz of this run' in done.stdout and np.load(folder / 'analysis.npz')['snapshot_epoch'].tolist() == [0, 1, 2, 3, 4, 6, 8, 11]
    shutil.copy(folders['miiii'][0] / 'metrics.npz', folder)
    cli(folder, script='analyze.py')
    assert np.load(folder / 'analysis.npz')['omega_epoch'].max() == 11 and len(json.loads((folder / 'analysis.json').read_text())['grokking']) == 4
    (folder / 'ckpt.pt').write_bytes(good)
    torch.save(dict(model=Transformer(13, 32, 2, 17).state_dict(), step=5), folder / 'snapshots' / '00000005.pt')
    (folder / 'snapshots' / '00000007.pt').write_bytes(b'half')
    done = cli(folder, script='analyze.py')
    assert done.returncode == 0 and '00000005.pt is not of a run with' in done.stdout and '00000007.pt is truncated' in done.stdout
    (folder / 'analysis.json').unlink()
    (folder / 'analysis.json').mkdir()
    assert 'cannot write' in refused(folder, script='analyze.py')
    (folder / 'analysis.json').rmdir()
    (folder / 'analysis.json').write_text('{')
    assert 'cannot be read' in refused(folder, script='plots.py')
    (folder / 'analysis.json').unlink()
    (folder / 'figures').write_text('in the way')
    assert 'cannot write' in refused(folder, '--only', 'waves', script='plots.py')


# ------------------------------------------------------------------------------------------------ the run folder

def same_run(a, b):
    ca, cb = (torch.load(Path(x, 'ckpt.pt'), weights_only=True) for x in (a, b))
    assert ca['step'] == cb['step'] and all(torch.equal(ca['model'][k], cb['model'][k]) for k in ca['model'])
    assert Path(a, 'metrics.npz').read_bytes() == Path(b, 'metrics.npz').read_bytes()


def test_run_folder(tmp_path):
    done = cli(*TINY, '--epochs', 40, '--spectra_every', 16, '--train_frac', 0.4, '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    ckpt = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert {'model', 'optimizer', 'filter', 'step', 'rng', 'config', 'versions'} <= ckpt.keys() and ckpt['step'] == 40
    m = np.load(tmp_path / 'metrics.npz')
    assert m['epoch'].tolist() == list(range(40)) and m['grad_norm'].shape == (40, 9)
    assert m['grad_norm_names'].tolist() == list(ckpt['model'])
    for name in ('train_loss', 'train_acc', 'valid_loss', 'valid_acc'):
        assert m[name].shape == (40, 4) and np.isfinite(m[name]).all() and m[name].any()
    assert m['spectra_epoch'].tolist() == [0, 16, 32] and m['spectrum'].shape == (3, 6) and m['sum_power'].shape == (3, len(m['freqs']))
    s = json.loads((tmp_path / 'summary.json').read_text())
    assert s['split'] == dict(train=48, valid=36, test=37) and s['epochs'] == 40 and s['config']['train_frac'] == 0.4
    assert [t['name'] for t in s['tasks']] == ['n mod 2', 'n mod 3', 'n mod 5', 'n mod 7'] and [t['classes'] for t in s['tasks']] == [2, 3, 5, 7]
    snaps = sorted(int(f.stem) for f in (tmp_path / 'snapshots').iterdir())
    assert snaps == [0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32]
    # snapshot 16 is the weights that row 16 was measured at, and the summary that of the checkpoint: recompute both
    d = data.make('miiii', 11)
    rows = data.split(121, 0.4)
    net = Transformer(11, 32, 2, 17)
    net.load_state_dict(torch.load(tmp_path / 'snapshots' / '00000016.pt', weights_only=True)['model'])
    loss, acc, _ = task_losses(net(d.x[rows[1]]), d.y[rows[1]], d.classes)
    assert np.allclose(m['valid_loss'][16], loss.detach(), rtol=1e-4) and np.allclose(m['valid_acc'][16], acc)
    acts = {}
    net(d.x, acts=acts)
    spectra = analyze.neuron_spectra(acts['neurons'].detach(), 11, analyze.wave_solver(11, analyze.waves(11, d.classes, 11)))
    for name, row in spectra.items():
        assert np.allclose(m[name][1], row, rtol=1e-3, atol=1e-6), name
    net.load_state_dict(ckpt['model'])
    for part, r in zip(('train', 'valid', 'test'), rows):
        loss, acc, _ = task_losses(net(d.x[r]), d.y[r], d.classes)
        assert np.allclose([t[f'{part}_loss'] for t in s['tasks']], loss.detach(), rtol=1e-4)
        assert np.allclose([t[f'{part}_acc'] for t in s['tasks']], acc)


def test_grok_epochs():
    run = make_run('--epochs', 6)
    run.epoch = 6
    acc = torch.tensor([[0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0.0]])
    final = torch.tensor([1, 1, 0, 0.5])
    assert [analyze.grok_epochs(a, f) for a, f in zip(acc, final)] == [(1, 3), (0, 0), (None, None), (1, None)]


@pytest.mark.parametrize('extra', ['--optimizer adamw --lamb 0.5 --decay_from 1', '--optimizer muon --decay_from 1 --dropout_mask example'])
def test_resume_is_exact(tmp_path, extra):
    a, b, args = tmp_path / 'a', tmp_path / 'b', [*TINY, *extra.split(), '--spectra_every', 7]
    assert cli(*args, '--epochs', 60, '--out', a).returncode == 0
    assert cli(*args, '--epochs', 23, '--out', b).returncode == 0
    assert cli('--resume', '--epochs', 60, '--out', b).returncode == 0  # its own options hold
    same_run(a, b)


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_resumes_exactly(tmp_path, monkeypatch, capsys, sig):
    """The signal comes in the middle of an epoch, or while the host looks; either way the last epoch is saved."""
    args, handler = [*TINY, '--epochs', '70'], signal.getsignal(signal.SIGINT)
    assert not train.main([*args, '--out', str(tmp_path / 'straight')])
    for where in ('step', 'check_finite'):
        home, out = {'step': train.Run, 'check_finite': train}[where], tmp_path / where
        real = getattr(home, where)

        def interrupted(run, *rest):
            if run.epoch == 31 or (where == 'check_finite' and 31 <= run.epoch < 60):
                os.kill(os.getpid(), sig)
                monkeypatch.setattr(home, where, real)
            return real(run, *rest)
        monkeypatch.setattr(home, where, interrupted)
        assert train.main([*args, '--out', str(out)]) == 128 + sig
        step = train.load(out / 'ckpt.pt')['step']
        assert 31 <= step < 70 and f'saved at epoch {step}' in capsys.readouterr().out and not (out / 'summary.json').exists()
        assert not train.main(['--resume', '--out', str(out)])
        same_run(tmp_path / 'straight', out)
    assert signal.getsignal(signal.SIGINT) == handler  # handlers are given back


def test_second_signal_leaves_at_once(tmp_path):
    p = subprocess.Popen([sys.executable, '-u', HERE / 'train.py', *TINY, '--epochs', '100000', '--out', tmp_path], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert any('before epoch 1' in line for line in p.stdout)
    while not list((tmp_path).glob('ckpt.pt')):
        time.sleep(0.05)
    time.sleep(0.5)
    p.send_signal(signal.SIGINT), p.send_signal(signal.SIGINT)
    assert p.wait(timeout=30) == 130
    train.load(tmp_path / 'ckpt.pt')


def test_kill_at_any_write_leaves_a_run_that_goes_on(tmp_path):
    """The process dies by SIGKILL at the n-th sync or rename of its life: at its start, or when it saves over a checkpoint."""
    deadly = '''
import os, sys, train
left = int(sys.argv.pop(1))
def deadly(real):
    def call(*args):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
        return real(*args)
    return call
os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
sys.exit(train.main(sys.argv[1:]))
'''
    args, env = [*TINY, '--decay_from', '1', '--snapshots', '1', '--spectra_every', '5'], os.environ | dict(PYTHONPATH=str(HERE))

    def die(n, *args):
        p = subprocess.run([sys.executable, '-c', deadly, str(n), *args], env=env, capture_output=True, text=True)
        assert p.returncode == -9, p.stderr

    straight, half, out = (str(tmp_path / name) for name in ('straight', 'half', 'out'))
    assert not train.main([*args, '--epochs', '12', '--out', straight]) and not train.main([*args, '--epochs', '6', '--out', half])
    for n in range(2):  # before there is a checkpoint, the folder is free
        die(n, *args, '--epochs', '12', '--out', out)
        assert not Path(out, 'ckpt.pt').exists()
    for n in range(8):  # snapshot, metrics, checkpoint, summary: a sync and a rename each
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(half, out)
        die(n, '--resume', '--epochs', '12', '--out', out)
        assert not train.main(['--resume', '--epochs', '12', '--out', out])
        same_run(straight, out)
        assert Path(out, 'summary.json').exists()


def test_progress_is_one_line_rewritten_on_a_terminal_and_plain_lines_in_a_log(tmp_path):
    terminal, child = pty.openpty()
    args = [sys.executable, str(HERE / 'train.py'), *TINY, '--epochs', '400', '--out']
    p = subprocess.Popen([*args, str(tmp_path / 'a')], stdout=child, stderr=child)
    os.close(child)
    shown = b''
    with contextlib.suppress(OSError):  # the terminal hangs up when the run ends
        while piece := os.read(terminal, 4096):
            shown += piece
    lines = shown.decode().split('\r\n')
    rewritten = [line for line in lines if line.startswith('\r')]
    assert p.wait() == 0 and len(rewritten) == 1 and rewritten[0].count('\r') > 1 and 'ETA' in rewritten[0]
    log = cli(*TINY, '--epochs', 400, '--out', tmp_path / 'b').stdout
    assert '\r' not in log and '100%' in log and 'epochs/s' in log and 'grokked' in log


# ------------------------------------------------------------------------------------------------ from another run's weights

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp('source')
    assert not train.main([*TINY, '--task', 'a+b', '--epochs', '20', '--snapshots', '0', '--out', str(folder)])
    return folder


@pytest.mark.parametrize('how, optimizer', [('embed', 'muon'), ('embed --freeze', 'adamw --lamb 0.5'), ('block', 'adamw --lamb 0.5'), ('block --freeze', 'muon'), ('all', 'muon')])
def test_weights_of_another_run(source, tmp_path, how, optimizer):
    part, frozen = how.split()[0], '--freeze' in how
    theirs, args = data.load(source / 'ckpt.pt')['model'], [*TINY, *f'--task 2*a+b --copy {how} --optimizer {optimizer} --decay_from 1 --dropout 0'.split(), '--init_from', str(source)]
    assert not train.main([*args, '--epochs', '20', '--out', str(tmp_path / 'a')])
    start, ckpt = data.load(tmp_path / 'a' / 'snapshots' / '00000000.pt', ('model',))['model'], data.load(tmp_path / 'a' / 'ckpt.pt')
    own = make_run('--task', '2*a+b', '--dropout', 0).model.state_dict()  # what the seed alone gives
    for name, w in start.items():
        copied = part == 'all' or name in dict(embed='W_E', block='W_Q W_K W_V W_O W_in W_out')[part].split()
        assert torch.equal(w, theirs[name] if copied else own[name]), name
        assert torch.equal(w, ckpt['model'][name]) == (copied and frozen), name       # bit for bit
        assert (name in ckpt['filter']) == ('lamb' in optimizer and not (copied and frozen))
    trained = [n for n in start if not (frozen and torch.equal(start[n], ckpt['model'][n]))]
    assert sum(len(x['state']) for x in ckpt['optimizer']) == len(trained)
    assert np.load(tmp_path / 'a' / 'metrics.npz')['grad_norm_names'].tolist() == trained
    assert not train.main([*args, '--epochs', '8', '--out', str(tmp_path / 'b')]) and not train.main(['--resume', '--epochs', '20', '--out', str(tmp_path / 'b')])
    same_run(tmp_path / 'a', tmp_path / 'b')


def test_a_copied_start_is_the_null_of_its_analysis(source, tmp_path):
    assert not train.main([*TINY, *'--task 2*a+b --copy embed --freeze --epochs 5'.split(), '--init_from', str(source), '--out', str(tmp_path / 'a')])
    numbers, missing = analyze.analyse(tmp_path / 'a')
    assert not missing and all(numbers['initial'][k] == numbers['final'][k] for k in ('W_E_FFD', 'W_E_mult_gini')) and numbers['initial']['W_L_FCR'] != numbers['final']['W_L_FCR']
    shutil.rmtree(tmp_path / 'a' / 'snapshots')
    assert 'began with copied weights' in ' '.join(analyze.analyse(tmp_path / 'a')[1])
    assert "--task '2*a+b'" in analyze.command(numbers['config']) and '--copy embed --freeze --epochs 5' in analyze.command(numbers['config'])


@pytest.mark.parametrize('args, says', [
    (['--p', 13], 'p = 13'), (['--d_model', 16], '[12, 16]'), (['--n_heads', 4, '--copy', 'block'], '[2, 32, 16]'), (['--task', 'a+b,a-b', '--copy', 'embed'], 'W_E is [12, 32]'),
    (['--task', 'miiii'], 'W_U is [32, 11]'), (['--freeze'], 'nothing to train'), (['--init_from', 'nowhere', '--copy', 'embed'], 'there is no nowhere'), (['--init_from', '', '--freeze'], '--init_from'),
    (['--init_from', '', '--copy', 'embed'], '--init_from'), (['--copy', 'W_E'], 'W_E')])
def test_no_weights_that_do_not_fit(source, tmp_path, args, says):
    assert says in refused_here(*TINY, '--task', 'a*b', '--init_from', str(source), '--out', str(tmp_path / 'a'), *map(str, args)) and not list(tmp_path.iterdir())


def test_an_embedding_from_a_file(tmp_path, capsys):
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / 'w.npy', W.double())
    torch.save(W, tmp_path / 'w.pt')
    ends = []
    for file, width in (('w.npy', 20), ('w.pt', 20), ('w.npy', 16)):
        out = tmp_path / f'{file}{width}'
        assert not train.main([*f'--task add --p 12 --d_model {width} --n_heads 2 --epochs 9 --device cpu --freeze --precision float32'.split(), '--init_from', str(tmp_path / file), '--out', str(out)])
        ends.append(data.load(out / 'ckpt.pt')['model']['W_E'])
        said = capsys.readouterr().out
        assert ('random projection' in said) == (width == 16) and 'W_E frozen' in said
    assert torch.equal(ends[0][:12], W) and torch.equal(ends[1][:12], W)
    lengths = ends[2][:12].norm(dim=1) / W.norm(dim=1)
    assert ends[2].shape == (13, 16) and 0.6 < lengths.min() and lengths.max() < 1.5    # lengths stay, roughly
    again = make_run('--task', 'add', '--p', 12, '--d_model', 16, '--init_from', tmp_path / 'w.npy')
    assert torch.equal(again.model.W_E[:12], ends[2][:12]) and again.model.W_E.requires_grad
    (tmp_path / 'w.npy').unlink()                                                      # a run goes on without the file
    out, before = tmp_path / 'w.npy16', data.load(tmp_path / 'w.npy16' / 'ckpt.pt')['model']
    assert not train.main(['--resume', '--epochs', '12', '--out', str(out)])
    after = data.load(out / 'ckpt.pt')['model']
    assert [name for name in before if torch.equal(before[name], after[name])] == ['W_E']


@pytest.mark.parametrize('dtype', ['>f8', '<i4', 'f2'])
def test_matrices_of_many_kinds(tmp_path, dtype):
    W = np.arange(12.0).reshape(6, 2)
    np.save(tmp_path / 'w.npy', W.astype(dtype))
    torch.save(torch.nn.Parameter(torch.from_numpy(W)), tmp_path / 'w.pt')
    assert all(np.array_equal(data.load_matrix(tmp_path / name), W) and data.load_matrix(tmp_path / name).dtype == torch.float32 for name in ('w.npy', 'w.pt'))


def test_bad_embedding_files(tmp_path):
    def says(name, content=None, **kw):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif name.endswith('.npy') and content is not None:
            np.save(tmp_path / name, content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        line = refused_here(*'--task add --p 12 --d_model 16 --n_heads 2 --epochs 3 --device cpu'.split(), '--init_from', str(tmp_path / name), '--out', str(tmp_path / 'run'), *kw.get('more', []))
        if not kw:
            with pytest.raises(data.Refusal):
                analyze.main(['--embedding', str(tmp_path / name)])
        return line

    def refused_analysis(path, content):
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
        with pytest.raises(data.Refusal) as e:
            analyze.main(['--embedding', str(path)])
        return str(e.value)
    good, bomb = np.ones((12, 16)), Path('/tmp/bomb_went_off')
    bomb.unlink(missing_ok=True)
    assert 'not there' in says('none.npy') and 'loaded safely' in says('empty.npy', b'') and 'loaded safely' in says('empty.pt', b'') and 'loaded safely' in says('text.npy', b'1,2,3')
    assert 'not finite' in says('nan.npy', good * np.nan) and '[12]' in says('row.npy', good[:, 0]) and 'loaded safely' in says('words.npy', np.array([['a']]))
    assert 'loaded safely' in says('object.npy', np.array([Bomb()], dtype=object)) and 'loaded safely' in says('bomb.pt', Bomb()) and 'holds a dict' in says('dict.pt', dict(W=1))
    assert all('loaded safely' in says(f'{i}.pt', m) for i, m in enumerate((torch.ones(12, 16).to_sparse(), torch.ones(12, 16) * 1j, torch.ones(12, 16, device='meta'))))
    assert '.npy or .pt' in refused_analysis(tmp_path / 'w.csv', b'1,2') and 'same numbers' in refused_analysis(tmp_path / 'good.npy', good)
    assert 'neither a run folder' in says('a.txt', b'1,2', more=['--freeze'])
    assert '11 rows' in says('short.npy', good[:11], more=['--copy', 'embed']) and 'for W_E' in says('good.npy', good, more=['--copy', 'block'])
    assert not bomb.exists() and not (tmp_path / 'run').exists()


def test_damaged_source(source, tmp_path):
    def says():
        return refused_here(*TINY, '--task', 'a*b', '--init_from', str(tmp_path), '--out', str(tmp_path / 'a'))
    (tmp_path / 'ckpt.pt').write_bytes((source / 'ckpt.pt').read_bytes()[:-100])
    assert 'truncated' in says()
    good = torch.load(source / 'ckpt.pt')
    for bad, expected in (([], 'not of this program'), ({}, 'not of this program'), (dict(W_E=3), 'not of this program'), (good['model'] | dict(W_E=good['model']['W_E'] / 0), 'not finite')):
        torch.save(good | dict(model=bad), tmp_path / 'ckpt.pt')
        assert expected in says()
    torch.save(good | dict(config=[]), tmp_path / 'ckpt.pt')
    assert 'not of this program' in says()


# ------------------------------------------------------------------------------------------------ the sweep

def swept(folder):
    with open(Path(folder) / 'sweep.csv') as f:
        return list(csv.DictReader(f))


def test_sweep_ranks_its_settings(tmp_path, capsys):
    args = [*TINY, '--epochs', '20', '--sweep_space', 'lr=1e-3,1e-2 lamb=0,2', '--out', str(tmp_path / 'a')]
    assert not train.main([*args, '--sweep', '3'])
    rows = swept(tmp_path / 'a')
    ckpts = {Path(r['folder'], 'ckpt.pt'): Path(r['folder'], 'ckpt.pt').stat().st_mtime_ns for r in rows}
    assert len(ckpts) == 3 and [float(r['valid_loss']) for r in rows] == sorted(float(r['valid_loss']) for r in rows)
    assert not train.main([*args, '--sweep', '4'])  # one more; the others are not touched
    rows = swept(tmp_path / 'a')
    assert {(r['lr'], r['lamb']) for r in rows} == {('0.001', '0.0'), ('0.001', '2.0'), ('0.01', '0.0'), ('0.01', '2.0')}
    assert all(path.stat().st_mtime_ns == t for path, t in ckpts.items())
    best = rows[0]
    assert not train.main([*TINY, '--epochs', '20', '--preset', 'paper', '--lr', best['lr'], '--lamb', best['lamb'], '--out', str(tmp_path / 'b')])
    same_run(best['folder'], tmp_path / 'b')
    tasks = json.loads((tmp_path / 'b' / 'summary.json').read_text())['tasks']
    assert float(best['valid_loss']) == pytest.approx(sum(t['valid_loss'] / math.log(t['classes']) for t in tasks) / 4, rel=1e-5)
    assert float(best['valid_acc']) == pytest.approx(sum(t['valid_acc'] for t in tasks) / 4) and best['epochs'] == '20'
    with pytest.raises(data.Refusal, match='disagrees'):
        train.main([*args, '--sweep', '4', '--weight_decay', '1'])
    with pytest.raises(data.Refusal, match='epochs 20, now it is 65536'):  # an option left out this time
        train.main([a for a in [*args, '--sweep', '4'] if a not in ('--epochs', '20')])
    capsys.readouterr()
    assert not train.main([*args, '--sweep', '4', '--epochs', '30'])  # lengthened
    assert capsys.readouterr().out.count('resumed at epoch 20') == 4 and {r['epochs'] for r in swept(tmp_path / 'a')} == {'30'}


def test_sweep_draws_from_the_papers_grid():
    settings = train.sweep_settings(dict(sweep=384))
    assert len({tuple(s.items()) for s in settings}) == 384 and train.sweep_settings(dict(sweep=5)) == settings[:5]
    assert {k: sorted({s[k] for s in settings}) for k in settings[0]} == dict(
        dropout=[0, .1, .2, .5], lamb=[0, .5, 2], weight_decay=[0, .1, .5, 1], d_model=[128, 256], lr=[1e-4, 3e-4], n_heads=[4, 8])
    assert train.sweep_settings(dict(sweep=5, seed=1)) != settings[:5]
    formulas = train.sweep_settings(dict(sweep=8, sweep_space='task=elementary,a*b+b train_frac=0.3,0.5'))
    assert sorted({s['task'] for s in formulas}) == ['a*b', 'a*b+b', 'a+b', 'a-b'] and {s['train_frac'] for s in formulas} == {0.3, 0.5}
    assert len(train.sweep_settings(dict(sweep=192, d_model=128))) == 192 and 'd_model' not in train.sweep_settings(dict(sweep=1, d_model=128))[0]


@pytest.mark.parametrize('args, says', [
    ([97], '96 settings'), ([2, '--sweep_space', 'lr=1e-3,fast'], 'lr=1e-3,fast'), ([2, '--sweep_space', 'leraning_rate=1,2'], 'leraning_rate'),
    ([2, '--sweep_space', 'freeze=True,False'], 'freeze'), ([2, '--sweep_space', 'init_from=a,b'], 'init_from'), ([2, '--init_from', 'nowhere', '--sweep_space', 'lr=1,2'], 'there is no nowhere'),
    ([2, '--sweep_space', 'lr'], "'lr'"), ([2, '--sweep_space', 'lr=1,2', '--lr', 1], 'given twice'), ([2, '--sweep_space', 'lr=1,1.0'], 'given twice'),
    ([2, '--sweep_space', 'lr=1 lr=2'], 'given twice'), ([2, '--sweep_space', 'lr=1e-3,-1'], 'must lie'), ([2, '--sweep_space', 'seed=1,2', '--n_heads', 3], 'divisible'),
    ([-1], '-1 of a grid'), ([3, '--sweep_space', 'task=a+b,a+c,a-b'], 'character 3'), ([0, '--sweep_space', 'lr=1,2'], 'for --sweep N'),
    ([2, '--resume'], '--resume'), ([2, '--bench', 3], '--bench'), (['x'], 'sweep')])
def test_bad_sweeps(tmp_path, args, says):
    tiny = TINY[2:] if 'task=' in str(args) else TINY
    assert says in refused_here(*tiny, '--epochs', '3', '--out', str(tmp_path), '--sweep', *map(str, args)) and not list(tmp_path.rglob('*.pt'))


def test_a_stopped_sweep_goes_on(tmp_path, monkeypatch, capsys):
    args, real = [*TINY, '--epochs', '40', '--sweep_space', 'lr=1e-3,1e-2', '--sweep', '2', '--out'], train.Run.step
    assert not train.main([*args, str(tmp_path / 'straight')])

    def step(run):
        if run.epoch == 9 and len(list((tmp_path / 'sweep').iterdir())) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(train.Run, 'step', real)
        real(run)
    monkeypatch.setattr(train.Run, 'step', step)
    assert train.main([*args, str(tmp_path / 'sweep')]) == 128 + signal.SIGTERM
    assert 'same command again' in capsys.readouterr().out and not (tmp_path / 'sweep' / 'sweep.csv').exists()
    assert not train.main([*args, str(tmp_path / 'sweep')])
    for a, b in zip(swept(tmp_path / 'straight'), swept(tmp_path / 'sweep'), strict=True):
        assert a['valid_loss'] == b['valid_loss']
        same_run(a['folder'], b['folder'])


def test_every_setting_is_compiled(monkeypatch):
    """torch gives up on a function after eight versions of it; a sweep needs more."""
    graphs, real = [], torch.compile

    def backend(graph, example):
        graphs.append(graph)
        return graph
    monkeypatch.setattr(torch, 'compile', lambda fn, **kw: real(fn, backend=backend, **kw))
    for width in range(2, 24, 2):
        run = make_run('--d_model', width, '--compile', 'on', '--dropout', 0, '--epochs', 1)
        run.step()
        assert len(graphs) == width, width  # two for each: with gradient and without


def test_a_setting_that_diverges_ranks_last(tmp_path):
    assert not train.main([*TINY, '--weight_decay', '100', '--epochs', '60', '--sweep_space', 'lr=10,1e-3', '--sweep', '2', '--out', str(tmp_path)])
    good, bad = swept(tmp_path)
    assert good['lr'] == '0.001' and bad['lr'] == '10.0' and bad['valid_loss'] == 'inf' and bad['epochs'] == ''


def test_a_sweep_over_two_processes_survives_the_death_of_one(tmp_path):
    """Rank 1 dies by SIGKILL in the middle of its second setting; the next start does what is missing."""
    (tmp_path / 'deadly.py').write_text("""
import os, signal, sys, train
runs, real = [], train.Run.step
def step(run):
    if run.epoch == 12:
        runs.append(run)
    if len(runs) == 2 and run.epoch == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    real(run)
if os.environ['RANK'] == '1':
    train.Run.step = step
train.main(sys.argv[1:])
""")
    args = [*TINY, '--epochs', '30', '--sweep_space', 'lr=1e-3,1e-2,1e-4 lamb=0,2', '--sweep', '5', '--out', str(tmp_path / 'sweep')]
    env = dict(os.environ, PYTHONPATH=str(HERE), OMP_NUM_THREADS='1')

    def start(script):
        return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', script, *args],
                              capture_output=True, text=True, env=env, timeout=120)
    first = start(tmp_path / 'deadly.py')
    done = {f: f.read_bytes() for f in (tmp_path / 'sweep').glob('*/summary.json')}
    assert first.returncode and 1 <= len(done) <= 4 and not (tmp_path / 'sweep' / 'sweep.csv').exists(), first.stderr
    second = start(HERE / 'train.py')
    assert second.returncode == 0, second.stderr
    rows = swept(tmp_path / 'sweep')
    assert len(rows) == 5 and all(r['epochs'] == '30' for r in rows) and all(f.read_bytes() == content for f, content in done.items())
    assert [float(r['valid_loss']) for r in rows] == sorted(float(r['valid_loss']) for r in rows)


def test_torchrun_is_for_sweeps(tmp_path):
    env = dict(os.environ, TORCHELASTIC_RUN_ID='x')
    done = cli(*TINY, '--epochs', 3, '--out', tmp_path, env=env)
    assert done.returncode == 2 and 'are for --sweep N' in done.stderr


# ------------------------------------------------------------------------------------------------ bad input and faults

@pytest.mark.parametrize('args, says', [
    (['--p', 12], 'prime'), (['--p', 4], 'p must'), (['--task', 'masked', '--p', 7], 'masked'),
    (['--task', 'a+c'], 'character 3'), (['--task', 'foo,a'], "'foo' is no formula"), (['--task=-a+c'], 'character 4'), (['--task', 'a+b', '--p', 12], 'prime'), (['--freeze'], '--init_from'),
    (['--train_frac', 1], 'empty'), (['--train_frac', 0], 'empty'), (['--train_frac', 'nan'], 'train_frac'),
    (['--d_model', 30, '--n_heads', 4], 'divisible'), (['--lam', 1], '--lamb'), (['--leraning_rate=1'], 'unknown option'),
    (['--dropout', 1], 'dropout'), (['--epochs', 0], 'epochs'), (['--lr', 'fast'], 'lr'), (['--task', 'nands'], 'nanda'),
    (['--device', 'nowhere'], 'device'), (['--device', 'meta'], 'device'), (['--p', 997], 'spectra'), (['--out', 'x' * 300], 'File name'), (['--resume'], 'there is no')])
def test_bad_options(tmp_path, args, says):
    assert says in refused('--out', tmp_path, *args)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
def test_cuda_without_cuda(tmp_path):
    assert 'cuda' in refused('--device', 'cuda', '--out', tmp_path)


def test_a_folder_is_never_overwritten_and_a_resume_must_agree(tmp_path):
    args = [*TINY, '--epochs', 10, '--out', tmp_path]
    assert cli(*args).returncode == 0
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    assert '--resume' in refused(*args)
    line = refused(*args, '--resume', '--lr', 0.5, '--p', 13)
    assert 'lr' in line and 'p is 11' in line
    assert 'epochs' in refused('--resume', '--out', tmp_path, '--epochs', 5)
    assert cli('--resume', '--out', tmp_path).returncode == 0  # finished already: nothing happens to it
    assert {f: f.read_bytes() for f in before if f.name != 'summary.json'} == {f: b for f, b in before.items() if f.name != 'summary.json'}


class Bomb:
    def __reduce__(self):
        return os.system, ('touch /tmp/bomb_went_off',)


def test_bad_checkpoints(tmp_path):
    assert cli(*TINY, '--epochs', 5, '--out', tmp_path).returncode == 0
    path, resume = tmp_path / 'ckpt.pt', ['--resume', '--out', str(tmp_path)]
    good = path.read_bytes()
    bomb = Path('/tmp/bomb_went_off')
    bomb.unlink(missing_ok=True)
    foreign = train.load(path)
    W_U = good.index(foreign['model']['W_U'].numpy().tobytes())
    flipped = good[:W_U + 50] + bytes([good[W_U + 50] ^ 64]) + good[W_U + 51:]
    torch.save(Bomb(), path)
    assert 'ckpt.pt' in refused(*resume) and not bomb.exists()
    torch.save(foreign | dict(model=Bomb()), path)
    assert 'ckpt.pt' in refused(*resume) and not bomb.exists()
    for bad in (good[:len(good) // 2], good[:100], b'', b'hello', flipped):
        path.write_bytes(bad)
        assert 'ckpt.pt' in refused_here(*resume)
    for content in ([1, 2], {'model': 1}, foreign | dict(model={'W_E': torch.zeros(2)}), foreign | dict(config={'no': 1}),
                    foreign | dict(rng={}), foreign | dict(optimizer=[]), foreign | dict(step='many'), foreign | dict(optimizer=[dict(x, state={}) for x in foreign['optimizer']])):
        torch.save(content, path)
        refused_here(*resume)
    path.write_bytes(good)
    (tmp_path / 'metrics.npz').write_bytes(b'')
    assert 'cannot resume' in refused_here(*resume)


def test_no_place_to_write(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    assert 'is not a folder' in refused(*TINY, '--epochs', 5, '--out', tmp_path / 'file')
    assert 'cannot write' in refused(*TINY, '--epochs', 5, '--out', tmp_path / 'file' / 'below')
    assert (tmp_path / 'file').read_text() == 'in the way'


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    """The disk fills up after the first save: the error says so and the first checkpoint still loads."""
    real, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(28, 'No space left on device')
        real(fd)
    monkeypatch.setattr(train.os, 'fsync', full)
    with pytest.raises(train.Refusal, match='No space left'):
        train.main([*TINY, '--epochs', '20', '--out', str(tmp_path)])
    assert train.load(tmp_path / 'ckpt.pt')['step'] == 0
    assert not list(tmp_path.rglob('*.tmp'))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    line = refused(*TINY, '--optimizer', 'adamw', '--lr', 10, '--weight_decay', 100, '--decay_from', 1, '--epochs', 3000, '--out', tmp_path)
    assert 'not finite at epoch' in line and ('n mod' in line or 'W_' in line)
    assert all(w.isfinite().all() for w in train.load(tmp_path / 'ckpt.pt')['model'].values())


# ------------------------------------------------------------------------------------------------ presets, bench, help

def test_defaults_are_the_papers_run():
    o = train.Options()
    assert (o.dropout, o.lamb, o.weight_decay, o.d_model, o.lr, o.n_heads, o.p, o.epochs) == (0.1, 0.5, 1 / 3, 256, 3e-4, 4, 113, 65536)
    o, _ = train.resolve(dict(task='nanda', preset='paper', device='cpu'))
    assert (o.d_model, o.n_heads, o.lr, o.weight_decay, o.dropout) == (128, 4, 1e-3, 1, 0)
    auto, _ = train.resolve({})
    assert auto.preset == ('paper' if torch.cuda.is_available() else 'fast')
    o, _ = train.resolve(dict(preset='fast', lr=0.5, device='cpu'))
    assert o.lr == 0.5 and o.optimizer == 'muon'  # a given option wins over the preset


def test_precision():
    """bfloat16 is near float32 and not the same, in loss and gradients; attention is float32 always."""
    loss, grads, att = {}, {}, {}
    for k in ('float32', 'tf32', 'bfloat16'):
        run, acts = make_run('--precision', k), {}
        logits, loss[k], _, grad = run.forward(*run.parts[0])
        logits.backward(grad)
        grads[k] = [w.grad.flatten() for w in run.weights]
        with run.autocast():
            run.model(run.parts[0][0], acts=acts)
        att[k] = acts['att']
    assert torch.equal(loss['float32'], loss['tf32']) and torch.equal(att['float32'], att['bfloat16'])  # on a CPU
    assert torch.allclose(loss['float32'], loss['bfloat16'], rtol=0.05) and not torch.equal(loss['float32'], loss['bfloat16'])
    assert all(torch.cosine_similarity(a, b, dim=0) > 0.99 for a, b in zip(grads['float32'], grads['bfloat16']))


def test_fast_recipe_avoids_slow_bfloat16(monkeypatch):
    for slow, precision in [('float32', 'bfloat16'), ('bfloat16', 'float32')]:
        monkeypatch.setattr(train, 'matmul_rate', lambda device, p: 1 if p == slow else 2)
        assert train.resolve(dict(preset='fast', device='cpu'))[0].precision == precision


def test_seeds():
    a, b, c = make_run(), make_run('--seed', 1), make_run('--data_seed', 1)
    assert torch.equal(a.split[0], b.split[0]) and not torch.equal(a.model.W_U, b.model.W_U) and not torch.equal(a.masks(9), b.masks(9))
    assert torch.equal(a.model.W_U, c.model.W_U) and not torch.equal(a.split[0], c.split[0])


def test_bench_prints_json(tmp_path):
    assert cli(*TINY, '--epochs', 3, '--spectra_every', 2, '--out', tmp_path / 'run').returncode == 0
    again = cli('--resume', '--bench', 5, '--out', tmp_path / 'run')  # of a finished run
    assert again.returncode == 0 and again.stdout.splitlines()[-1].startswith('{'), again.stderr
    done = cli(*TINY, '--bench', 5, '--epochs', 3, '--out', tmp_path / 'none', '--spectra_every', 2)
    assert done.returncode == 0 and not (tmp_path / 'none').exists(), done.stderr
    r = json.loads(done.stdout.splitlines()[-1])
    per_row = 2 * (32 * 32 + 32 * 128 + 128 * 32 + 32 * 17)  # W_O, W_in, W_out, W_U
    assert math.isclose(r['training_gflop'], per_row * 3 * 60 / 1e9) and math.isclose(r['validation_gflop'], per_row * 30 / 1e9)
    assert math.isclose(r['share'] * r['product_gflops'] * r['training_ms'], per_row * 3 * 60 / 1e6, rel_tol=1e-6)
    assert not train.main([*TINY, '--task', 'a*b,a+b', '--bench', '5', '--out', str(tmp_path / 'none')])  # a mixture, by the general form too
    assert r['config']['epochs'] == 3 and min(r[k] for k in ('epoch_ms', 'validation_ms', 'general_form_ms', 'spectra_ms', 'ready_s', 'default_float32_gflops')) > 0


def test_counted_work_at_the_papers_setting():
    training, validation = train.gflop_per_epoch(train.Options(), data.make('miiii', 113))
    assert abs(training - 3 * 7.42) < 0.02 and abs(validation - 1.94) < 0.01  # 7.4 GFLOP forward on 3,831 rows, and 1,000 for validation
    one, three = (train.gflop_per_epoch(train.Options(), data.make(task, 113)) for task in ('nanda', 'elementary'))
    assert np.allclose(three, 3 * np.array(one))


def test_float32_products_are_float32(monkeypatch):
    """Whichever library multiplies; where it would round, torch's default is kept. TF32 is for CUDA, if asked for."""
    torch.manual_seed(0)
    a = torch.randn(300, 300)
    for precision, on_cuda in (('tf32', 'high'), ('float32', 'highest'), ('bfloat16', 'highest')):
        set_precision('cuda:0', precision)
        assert torch.get_float32_matmul_precision() == on_cuda
        set_precision('cpu', precision)
        assert torch.get_float32_matmul_precision() != 'high' and ((a @ a).double() - a.double() @ a.double()).abs().max() < 1e-3
    assert not model.products_are_rounded()
    monkeypatch.setattr(model, 'products_are_rounded', lambda: True)
    set_precision('cpu', 'float32')
    assert torch.get_float32_matmul_precision() == 'highest'
    monkeypatch.undo()
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: plain(a, b) if a.dtype == torch.float64 else plain(a.bfloat16(), b.bfloat16()).float())
    assert model.products_are_rounded()


def test_help_explains_every_option():
    done = cli('--help')
    assert done.returncode == 0
    for f in train.dataclasses.fields(train.Options):
        assert f'--{f.name}' in done.stdout and f'{f.metadata["help"]} (default: {f.default})' in ' '.join(done.stdout.split())


# ------------------------------------------------------------------------------------------------ it groks

def test_it_groks(tmp_path):
    """The real thing, small: trained on half of the sums mod 31, the network is right on every pair it never saw."""
    done = cli(*'--task nanda --p 31 --d_model 64 --train_frac 0.5 --epochs 600 --preset fast --precision float32 --device cpu --out'.split(), tmp_path, timeout=500)
    task, = json.loads((tmp_path / 'summary.json').read_text())['tasks']
    assert task['valid_acc'] == 1 and task['test_acc'] == 1 and 50 < task['grok_epoch'] < 600, done.stdout
