"""The transformer, its loss and Muon, by hand. One block, no biases, no LayerNorm, attention unmasked, logits
read at the last position (Syrkis & Søgaard 2024, eq. 7 to 11):

    z = W_E[x] + W_pos
    z = drop(z + softmax(z W_Q (z W_K)^T / sqrt(K)) z W_V W_O)      summed over heads
    z = drop(z + ReLU(z W_in) W_out)
    logits = z[:, -1] W_U

N rows, T = 3 tokens, O operations, V = p + O, D width, H heads, K = D/H, F = 4D neurons, Q tasks, C classes.
"""
import contextlib
import functools
import math
import platform
import warnings

import torch
from torch import nn
from torch.nn import functional

from data import brief, say

warnings.filterwarnings('ignore', 'index_reduce')  # which has been called a beta since torch 1.12

# Initial weights have std sqrt(2 / fan-in). Each matrix: its shape, the fan-in by the paper's text (`he`: the
# dimensions that it contracts), and by its code (`reference`: the stack of heads or tasks, too).
MATRICES = dict(
    W_E=('VD', 'V', 'V'), W_pos=('TD', 'T', 'T'), W_Q=('HDK', 'D', 'HD'), W_K=('HDK', 'D', 'HD'),
    W_V=('HDK', 'D', 'HD'), W_O=('HKD', 'HK', 'HK'), W_in=('DF', 'D', 'D'), W_out=('FD', 'F', 'F'),
    W_U=('DC', 'D', 'QD'))
BLOCK = ('W_Q', 'W_K', 'W_V', 'W_O', 'W_in', 'W_out')


class Transformer(nn.Module):
    """n_ops operation tokens beside p digits; the logits of all tasks side by side in n_classes columns.
    init: he, reference, or small, .3 of he."""
    activation = staticmethod(functional.relu_)  # of the MLP; in place, for memory
    blocks = ('',)  # a block is what its matrices' names end in: ('1', '') are two. The last one is analysed

    def __init__(self, p, d_model, n_heads, n_classes, n_ops=1, n_tasks=1, init='he'):
        super().__init__()
        size = dict(V=p + n_ops, T=3, D=d_model, H=n_heads, K=d_model // n_heads, F=4 * d_model,
                    C=n_classes, Q=n_tasks)

        def add(name, block=''):
            shape, by_text, by_code = MATRICES[name]
            fan_in = math.prod(size[dimension] for dimension in (by_code if init == 'reference' else by_text))
            scale = 0.3 if init == 'small' else 1.0
            weight = torch.randn([size[dimension] for dimension in shape]) * scale * (2 / fan_in) ** 0.5
            self.register_parameter(name + block, nn.Parameter(weight))

        add('W_E')
        add('W_pos')
        for block in self.blocks:
            for name in BLOCK:
                add(name, block)
        add('W_U')

    def forward(self, x, drop=(1, 1), acts=None):
        """Token ids (N, 3) -> logits (N, C).
        drop: two masks (1, 1, D) for the whole batch, or (N, 1, D), already divided by the share they keep;
        all blocks have the same.
        acts: a dict that receives what analysis looks at in the last block, all but values at "=".

        Two savings, both exact, a third of the work of the general form: the last block is asked at "=" alone
        (queries, W_O, MLP), and the first one finds scores and values in tables, as it sees few vectors.
        """
        table = self.W_E + self.W_pos[:, None]                                   # T V D, any token anywhere
        z = None                                                                 # N T D between two blocks
        for block in self.blocks:
            W_Q, W_K, W_V, W_O, W_in, W_out = (self.get_parameter(name + block) for name in BLOCK)
            asked = slice(2, 3) if block == self.blocks[-1] else slice(0, 3)     # A of the T positions
            with torch.autocast(x.device.type, enabled=False):  # attention is cheap: float32 always
                if z is None:
                    pre, scores, values = look_up(x, asked, table, W_Q, W_K, W_V)
                else:
                    pre = z[:, asked]
                    q, k, values = heads(pre, W_Q), heads(z, W_K), heads(z, W_V)
                    scores = torch.einsum('nahk,nthk->ntah', q, k)
                att = (scores / W_Q.shape[2] ** 0.5).softmax(1)                  # N T A H
                mixed = (att[..., None] * values[:, :, None]).sum(1).flatten(2)  # N A D, heads side by side
            mid = (pre + mixed @ W_O.flatten(0, 1)) * drop[0]                    # N A D
            neurons = self.activation(mid @ W_in)                                # N A F
            z = (mid + neurons @ W_out) * drop[1]                                # N A D
        if acts is not None:
            acts.update(att=att[:, :, 0], values=values, resid_pre=pre[:, 0], resid_mid=mid[:, 0],
                        neurons=neurons[:, 0])
        return (self.W_U.T @ z[:, 0].T).T                                # N C, in memory C N for the loss


def heads(z, W):
    """Vectors (.., D) as each head reads them through its matrix of W (H, D, K): (.., H, K)."""
    return torch.einsum('...d,hdk->...hk', z, W)


def look_up(x, asked, table, W_Q, W_K, W_V):
    """What a block needs of tokens x (N, T) whose vectors stand in a table (T, V, D): those at the A asked
    positions, the scores (N, T, A, H) with which they look at all T, values (N, T, H, K) of all."""
    V = table.shape[1]
    row = x + V * torch.arange(3, device=x.device)                               # N T, of TV
    asker = row[:, asked] - V * asked.start                                      # N A, of AV
    asking, everything = table[asked].flatten(0, 1), table.flatten(0, 1)         # AV D, TV D
    q, k, v = heads(asking, W_Q), heads(everything, W_K), heads(everything, W_V)
    scores = torch.einsum('ahk,bhk->abh', q, k).flatten(0, 1)                    # AVTV H, asked and seen
    pair = len(k) * asker[:, None] + row[:, :, None]                             # N T A, of AVTV
    return take(asking, asker), take(scores, pair), take(v.flatten(1), row).unflatten(2, v.shape[1:])


def take(table, index):
    """Rows of a table (V, ..). As torch's embedding, but the gradient of that sorts and may wait on a GPU."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


def network(o, d):
    """A new model for the data d by the options o, a dict. Formulas share their columns of logits."""
    n_tasks, n_classes = len(d.classes) // d.n_ops, sum(d.classes) // d.n_ops
    return Transformer(o['p'], o['d_model'], o['n_heads'], n_classes, d.n_ops, n_tasks, o['init'])


@torch.no_grad()
def example_logits(net, d):
    """Logits of some inputs. A checkpoint keeps them, to tell whether the code is still the same function."""
    return net(d.x[::len(d.x) // 8 | 1]).float().cpu()


def task_losses(logits, y, classes):
    """Cross-entropy and accuracy of each task: logits (N, C), targets (N, Q) -> (Q,), (Q,), in float32.

    Written as softplus(logsumexp over the wrong classes - right logit). The usual form subtracts two nearly
    equal numbers once a row is confident: float32 losses then come in steps of 1.2e-7 and gradients die. This
    one is exact down to the smallest float. A tie is wrong. Rows are counted, so that all of them make 1.0.
    """
    starts, owner = layout(tuple(classes), y.device)
    loss, right = TaskLosses.apply(logits, y.T + starts, owner)
    return loss, (right.sum(1).double() / len(y)).float()  # on a GPU float32 / is a product with 1 / N


class TaskLosses(torch.autograd.Function):
    """The losses, with their gradient written out: autograd keeps and reads several copies of the logits, by
    far the largest tensor of a step. Classes are rows here: what is read together lies together. By row,
    with behind = logsumexp of the wrong logits - right logit, loss = softplus(behind):
    d loss / d wrong = sigmoid(behind) exp(wrong) / sum of exp(wrong) ;  d loss / d right = -sigmoid(behind)
    """

    @staticmethod
    def forward(ctx, logits, answers, owner):
        z = logits.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)      # C N
        right = z.gather(0, answers)                                             # Q N
        wrong = z.scatter_(0, answers, -torch.inf)
        # not below -3e38: where no other class is possible, -inf - -inf would be nan
        top = torch.full_like(right, -3e38).index_reduce_(0, owner, wrong, 'amax')
        powers = wrong.sub_(top[owner]).exp_()                                   # C N
        total = torch.zeros_like(right).index_add_(0, owner, powers)             # Q N
        behind = total.log() + (top - right)                                     # Q N
        is_right = right > top
        ctx.save_for_backward(answers, owner, powers, total, behind)
        ctx.mark_non_differentiable(is_right)
        return functional.softplus(behind).mean(1), is_right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        answers, owner, powers, total, behind = ctx.saved_tensors
        slope = grad[:, None] * behind.sigmoid() / behind.shape[1]               # Q N
        dz = powers * (slope / total)[owner]                                     # C N
        return dz.scatter_(0, answers, -slope).T, None, None


@functools.cache
@torch.inference_mode(False)
def layout(classes, device):
    """Tasks side by side: the first column of each (Q, 1), the task of each column (C,). Made once, as in a
    capture nothing can come from the host."""
    starts = torch.tensor([0, *classes[:-1]]).cumsum(0)[:, None]
    owner = torch.arange(len(classes)).repeat_interleave(torch.tensor(classes))
    return starts.to(device), owner.to(device)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024), for matrices and stacks of them (heads):
    m <- mu m + (1 - mu) g ;  u <- mu m + (1 - mu) g
    W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) orthogonalize(u)
    torch.optim.Muon is the same, but takes neither stacks nor a learning rate that lives on the device."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, mu, params = group['lr'], group['momentum'], group['params']
            for w in params:
                if not self.state[w]:
                    self.state[w]['momentum'] = torch.zeros_like(w)
            memory, grads = [self.state[w]['momentum'] for w in params], [w.grad for w in params]
            torch._foreach_lerp_(memory, grads, 1 - mu)
            updates = torch._foreach_lerp(grads, memory, mu)
            wide = [u if u.shape[-2] <= u.shape[-1] else u.mT for u in updates]
            for shape in {u.shape[-2:] for u in wide}:  # the matrices of one shape together: fewer launches
                alike = [u.view(-1, *shape) for u in wide if u.shape[-2:] == shape]
                torch._foreach_copy_(alike, orthogonalize(torch.cat(alike)).split([len(u) for u in alike]))
            torch._foreach_mul_(updates, [max(1, w.shape[-2] / w.shape[-1]) ** 0.5 for w in params])
            torch._foreach_mul_(updates, lr)
            torch._foreach_mul_(params, 1 - lr * group['weight_decay'])
            torch._foreach_sub_(params, updates)


def orthogonalize(X):
    """The nearest orthogonal matrix to each of X (B, rows <= columns), roughly: five Newton-Schulz steps."""
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X


@functools.cache
def fast_products():
    """The precision at which products of float32 are fastest on a CPU without being less than float32."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('medium')  # by oneDNN instead of MKL ...
    a = torch.linspace(-1, 1, 2 ** 16).sin().view(256, 256)
    rounds = ((a @ a).double() - a.double() @ a.double()).abs().max() > 1e-3  # ... or in bfloat16
    torch.set_float32_matmul_precision(former)
    return 'highest' if rounds else 'medium'


@contextlib.contextmanager
def plain_torch():
    """torch as this program expects it, whatever a notebook has set: float32 on the CPU by default, with
    gradients, no autocast, fast products. At the end these are as before, and so are random numbers."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    by_default = torch.device('cpu') if torch.get_default_device().type != 'cpu' else contextlib.nullcontext()
    cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with (torch.inference_mode(False), torch.autocast('cpu', enabled=False), torch.random.fork_rng(cards),
          torch.autocast('cuda', enabled=False), by_default):
        try:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision(fast_products())
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)


def slow_bfloat16():
    """Whether this CPU is one that has to imitate products in bfloat16, as x86 without AVX512_BF16 or AMX."""
    return platform.machine() in ('x86_64', 'AMD64') and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def captured(fn):
    """fn as one CUDA graph, one launch per epoch (not run on a card yet). The first three calls run plainly
    and count like any other: they warm up what a capture must not meet cold. The fourth captures; if that
    fails, it and all later ones run plainly, too."""
    if torch.version.hip:
        say('note: no graph of an epoch on ROCm, which does not tell when a capture goes wrong')
        return fn
    graph, side, calls, out, fails = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, None, False

    def call():
        nonlocal calls, out, fails
        calls += 1
        if calls == 4:
            try:
                with torch.cuda.graph(graph, stream=side):
                    out = fn()
            except RuntimeError as e:  # nothing has run. What spoiled a capture is the context of its error
                fails = True
                graph.reset()
                generator = torch.cuda.default_generators[side.device_index]
                generator.graphsafe_set_state(generator.clone_state())  # the old one may think it is captured
                say(f'note: no CUDA graph here, so an epoch takes longer ({brief(e.__context__ or e)})')
        if calls > 3 and not fails:
            graph.replay()
            return out
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            out = fn()
        torch.cuda.current_stream().wait_stream(side)
        return out
    return call
