"""The transformer, its loss and Muon, by hand. One block, no biases, no LayerNorm, attention unmasked, logits
read at the last position (Syrkis & Søgaard 2024, eq. 7 to 11):

    z = W_E[x] + W_pos
    z = drop(z + softmax(z W_Q (z W_K)^T / sqrt(K)) z W_V W_O)      summed over heads
    z = drop(z + ReLU(z W_in) W_out)
    logits = z[:, -1] W_U

N rows, T = 3 tokens, O operations, V = p + O, D width, H heads, K = D/H, F = 4D neurons, Q tasks, C classes.
"""
import contextlib
import ctypes
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

# Initial weights have std sqrt(2 / fan-in). The fan-in of `he` (the paper's text) is the dimension that the
# matrix contracts; that of `reference` (its code) counts the stack of heads or tasks, too. `small` is .3 he.
HE = dict(W_E='V', W_pos='T', W_Q='D', W_K='D', W_V='D', W_O='D', W_in='D', W_out='F', W_U='D')
FAN_IN = dict(he=HE, small=HE, reference=HE | dict(W_Q='HD', W_K='HD', W_V='HD', W_U='QD'))


class Transformer(nn.Module):
    """n_ops operation tokens beside p digits; the logits of all tasks side by side in n_classes columns."""
    activation = staticmethod(F.relu_)  # of the MLP; in place, for memory

    def __init__(self, p, d_model, n_heads, n_classes, n_ops=1, n_tasks=1, init='he'):
        super().__init__()
        V, D, H, K = p + n_ops, d_model, n_heads, d_model // n_heads
        self.p = p
        size = dict(V=V, T=3, D=D, H=H, F=4 * D, Q=n_tasks)

        def weight(name, *shape):
            fan_in = math.prod(size[dimension] for dimension in FAN_IN[init][name])
            scale = 0.3 if init == 'small' else 1.0
            return nn.Parameter(torch.randn(shape) * scale * (2 / fan_in) ** 0.5)

        self.W_E = weight('W_E', V, D)
        self.W_pos = weight('W_pos', 3, D)
        self.W_Q, self.W_K, self.W_V = (weight(name, H, D, K) for name in ('W_Q', 'W_K', 'W_V'))
        self.W_O = weight('W_O', H, K, D)
        self.W_in = weight('W_in', D, 4 * D)
        self.W_out = weight('W_out', 4 * D, D)
        self.W_U = weight('W_U', D, n_classes)

    def forward(self, x, drop=(1, 1), acts=None):
        """Token ids (N, 3) -> logits (N, C).
        drop: two masks, (1, D) for the whole batch or (N, D), already divided by the share they keep.
        acts: a dict that receives what analysis looks at, all of the last position.
        Only this position is read, so queries, W_O, MLP and W_U are needed there alone. Scores and values
        come from tables by token, position and operation. Exact, a third of the work of the general form.
        """
        H, D, K = self.W_Q.shape
        V = len(self.W_E)
        with torch.autocast(x.device.type, enabled=False):  # attention is cheap: float32 always
            table = self.W_E + self.W_pos[:, None]                               # T V D
            queries = torch.einsum('vd,hdk->vhk', table[2], self.W_Q)            # V H K
            keys = torch.einsum('tvd,hdk->tvhk', table, self.W_K)                # T V H K
            values = torch.einsum('tvd,hdk->tvhk', table, self.W_V)              # T V H K
            scores = torch.einsum('ohk,tvhk->otvh', queries[self.p:], keys) / K ** 0.5  # O T V H
            row = x + V * torch.arange(3, device=x.device)                       # N T, of T V rows
            op = x[:, 2:] - self.p                                               # N 1
            att = F.embedding(3 * V * op + row, scores.view(-1, H)).softmax(1)   # N T H
            v = F.embedding(row, values.view(-1, D)).view(-1, 3, H, K)           # N T H K
            mixed = (att[..., None] * v).sum(1).flatten(1)                       # N D, heads side by side
            z = F.embedding(x[:, 2], table[2])                                   # N D
        mid = (z + mixed @ self.W_O.flatten(0, 1)) * drop[0]                     # N D
        neurons = self.activation(mid @ self.W_in)                               # N F
        post = (mid + neurons @ self.W_out) * drop[1]                            # N D
        if acts is not None:
            acts.update(att=att, resid_mid=mid, neurons=neurons, resid_post=post)
        return post @ self.W_U                                                   # N C


def task_losses(logits, y, classes):
    """Cross-entropy and accuracy of each task: logits (N, C), targets (N, Q) -> (Q,), (Q,), in float32.

    Written as softplus(logsumexp over the wrong classes - right logit). The usual form subtracts two nearly
    equal numbers once a row is confident: float32 losses then come in steps of 1.2e-7 and gradients die. This
    one is exact down to the smallest float. A tie is wrong. Rows are counted, so that all of them make 1.0.
    """
    z = logits.float()
    starts = itertools.accumulate([0, *classes])
    columns = torch.stack([target + start for target, start in zip(y.unbind(1), starts)], 1)  # N Q
    right = z.gather(1, columns)                                                 # N Q
    wrong = z.scatter(1, columns, -torch.inf).split(classes, 1)                  # Q times N q
    top = torch.stack([block.detach().amax(1).clamp(min=-3e38) for block in wrong], 1)  # N Q
    sums = [(block - most).exp().sum(1) for block, most in zip(wrong, top[..., None].unbind(1))]
    loss = F.softplus(torch.stack(sums, 1).log() + (top - right))                # N Q
    return loss.mean(0), ((right > top).sum(0).double() / len(y)).float()  # float32 / is not exact compiled


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
            lr, mu = group['lr'], group['momentum']
            for w in group['params']:
                if not self.state[w]:
                    self.state[w]['momentum'] = torch.zeros_like(w)
                m = self.state[w]['momentum']
                m.lerp_(w.grad, 1 - mu)
                update = orthogonalize(w.grad.lerp(m, mu))
                scale = max(1, w.shape[-2] / w.shape[-1]) ** 0.5
                w.mul_(1 - lr * group['weight_decay']).sub_(lr * scale * update)


def orthogonalize(G):
    """The nearest orthogonal matrix to each of G, roughly: five Newton-Schulz steps."""
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return X.mT if G.shape[-2] > G.shape[-1] else X


def fast_cpu():
    """Twice the epochs per second on a CPU, with the same results up to rounding. Nothing for a GPU."""
    torch.set_float32_matmul_precision('medium')  # float32 products by oneDNN instead of MKL ...
    a = torch.linspace(-1, 1, 2 ** 16).sin().view(256, 256)
    if ((a @ a).double() - a.double() @ a.double()).abs().max() > 1e-3:
        torch.set_float32_matmul_precision('highest')  # ... unless it would round them to bfloat16
    with contextlib.suppress(OSError, AttributeError, TypeError):  # where there is no glibc
        libc = ctypes.CDLL(None)  # keep big buffers instead of giving them back to the kernel at every use
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def captured(fn):
    """fn as one CUDA graph, one launch per epoch (not run yet). The first three calls run plainly and count
    like any other: they warm up what a capture must not meet cold. The fourth captures."""
    graph, side, calls, out = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, None

    def call():
        nonlocal calls, out
        calls += 1
        if calls <= 3:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                out = fn()
            torch.cuda.current_stream().wait_stream(side)
            return out
        if calls == 4:
            with torch.cuda.graph(graph):
                out = fn()
        graph.replay()
        return out
    return call
