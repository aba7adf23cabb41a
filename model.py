"""The transformer, by hand, with its loss and one optimiser: one block, no biases, no LayerNorm, attention unmasked, logits read at the last position.

    z = W_E[x] + W_pos
    z = drop(z + softmax(z W_Q (z W_K)^T / sqrt(K)) z W_V W_O)     summed over heads
    z = drop(z + ReLU(z W_in) W_out)
    logits = z[:, -1] W_U                                          (Syrkis & Sogaard 2024, eq. 7 to 11)

N examples, T=3 tokens, O operations, V=p+O token ids, D width, H heads, K=D/H, F=4D neurons, Q tasks, C classes of all tasks together, M of the largest.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class Transformer(nn.Module):
    """p digits and n_ops operation tokens in; out come the logits of all tasks, side by side in n_classes columns.

    He normal initialisation: std sqrt(2 / fan_in), fan_in being the length of the dimension that the matrix contracts.
    """

    def __init__(self, p, d_model, n_heads, n_classes, n_ops=1):
        super().__init__()
        V, D, H, K, N_F, C = p + n_ops, d_model, n_heads, d_model // n_heads, 4 * d_model, n_classes

        def he(fan_in, *shape):
            return nn.Parameter(torch.randn(shape) * (2 / fan_in) ** 0.5)

        self.p = p
        self.W_E, self.W_pos = he(V, V, D), he(3, 3, D)
        self.W_Q, self.W_K, self.W_V, self.W_O = he(D, H, D, K), he(D, H, D, K), he(D, H, D, K), he(D, H, K, D)
        self.W_in, self.W_out = he(D, D, N_F), he(N_F, N_F, D)
        self.W_U = he(D, D, C)

    def forward(self, x, drop=(1, 1), acts=None):
        """Token ids x (N, 3) -> logits (N, C).

        drop: two masks, already divided by the share they keep, for the residual stream after each of the two adds; each is
        (1, D), one for the whole batch, or (N, D), one per example. acts: a dict that receives what analysis looks at, all
        at the last position: att (N, T, H), resid_mid (N, D), neurons (N, F) after ReLU, resid_post (N, D).

        This is exact algebra, not the general form. Only the last position is read, so queries, W_O, the MLP and W_U are
        needed there alone; a score or value depends on token, position and operation alone, so all there are stand in tables,
        p rows for each digit and O for the operation. Each example looks its rows up by a product with a one-hot matrix, whose
        gradient is a product too: deterministic, and no slower than a gather with its scattered adds.
        """
        p, (H, _, K) = self.p, self.W_Q.shape
        N, O = len(x), len(self.W_E) - p
        with torch.autocast(x.device.type, enabled=False):                 # attention is a small part of the work: never bfloat16
            tok = torch.cat([self.W_E[:p] + self.W_pos[0], self.W_E[:p] + self.W_pos[1], self.W_E[p:] + self.W_pos[2]])  # R D, R = 2p+O
            q = torch.einsum('od,hdk->ohk', tok[2 * p:], self.W_Q)         # O H K, the last token is an operation
            k = torch.einsum('rd,hdk->rhk', tok, self.W_K)                 # R H K
            v_table = torch.einsum('rd,hdk->rhk', tok, self.W_V).flatten(1)  # R D
            score_table = torch.einsum('rhk,ohk->roh', k, q).flatten(1) / K ** 0.5  # R OH

            ids = torch.arange(p + O, device=x.device)
            hot = [(x[:, t:t + 1] == some).to(q.dtype) for t, some in enumerate((ids[:p], ids[:p], ids[p:]))]  # N p, N p, N O
            op = hot[2]

            def look_up(table):
                return [one @ rows for one, rows in zip(hot, table.split([p, p, O]))]  # for each of the T tokens: N, columns of the table

            score = torch.stack(look_up(score_table), 1).view(N, 3, O, H)
            att = (score * op[:, None, :, None]).sum(2).softmax(1)         # N T H, by the example's own operation
            mix = sum(a[..., None] * v.view(N, H, K) for a, v in zip(att.unbind(1), look_up(v_table))).flatten(1)  # N D, heads side by side
        mid = (op @ tok[2 * p:] + mix @ self.W_O.flatten(0, 1)) * drop[0]  # N D
        neurons = (mid @ self.W_in).relu_()                                # N F
        post = (mid + neurons @ self.W_out) * drop[1]                      # N D
        if acts is not None:
            acts.update(att=att, resid_mid=mid, neurons=neurons, resid_post=post)
        return post @ self.W_U                                             # N C

    def general_forward(self, x, drop=(1, 1)):
        """What `forward` computes, as the paper writes it: every position, nothing reordered. For --bench, which times both."""
        mid_drop, post_drop = (m if isinstance(m, int) else m[:, None] for m in drop)
        z = self.W_E[x] + self.W_pos                                       # N T D
        q, k, v = (torch.einsum('ntd,hdk->nhtk', z, W) for W in (self.W_Q, self.W_K, self.W_V))  # N H T K
        att = (q @ k.mT / self.W_Q.shape[2] ** 0.5).softmax(3)             # N H T T, from, to
        z = (z + torch.einsum('nhtk,hkd->ntd', att @ v, self.W_O)) * mid_drop  # N T D
        z = (z + F.relu(z @ self.W_in) @ self.W_out) * post_drop           # N T D
        return (z @ self.W_U)[:, -1]                                       # N C


def task_losses(logits, y, classes, weight=None, overwrite=False):
    """Cross-entropy and accuracy of each task, and the gradient by hand, in one pass.

    logits (N, C), targets y (N, Q), Q class counts -> loss (Q,), accuracy (Q,), and the gradient (N, C) of weight @ loss (of their
    sum if no weight (Q,) is given) with respect to the logits, all computed in float32. If overwrite, the gradient may take the
    memory of the logits, which are lost then.

    Cross-entropy is written as softplus(logsumexp over the wrong classes - logit of the right class). The usual form
    subtracts two nearly equal numbers once a row is confident, so in float32 its losses come in steps of 1.2e-7 and its
    gradient dies; this one keeps full relative precision down to the smallest float. A row counts as correct if the right
    logit beats all others.
    """
    N, z = len(y), logits.detach().contiguous() if overwrite else logits.detach().clone(memory_format=torch.contiguous_format)
    flat, start = z.view(-1), torch.tensor([0, *classes[:-1]], device=y.device).cumsum(0)
    place = (y + start + z.shape[1] * torch.arange(N, device=y.device)[:, None]).T.contiguous()  # Q N, the right logits within flat
    right = flat[place].float()                                            # Q N
    flat[place] = -torch.inf
    weight = torch.ones(len(classes), device=y.device) if weight is None else weight
    top, margin, slope = [], [], []
    for z_q, r, w in zip(z.split(classes, 1), right[..., None], weight / N):  # a task at a time: its columns stay in the cache
        e = z_q.float()                                                    # N q, for float32 z_q itself
        top.append(e.amax(1, keepdim=True))                                # N 1
        total = e.sub_(top[-1]).mul_(math.log2(math.e)).exp2_().sum(1, keepdim=True)  # N 1, on a CPU exp takes longer than exp2
        margin.append(total.log() + (top[-1] - r))                         # N 1, logsumexp of the wrong logits - the right one
        slope.append(margin[-1].sigmoid() * w)                             # N 1, d (weight @ loss) / d margin
        z_q.copy_(e.mul_(slope[-1] / total))                               # N q, d (weight @ loss) / d wrong logits
    top, margin, slope = (torch.stack(v)[..., 0] for v in (top, margin, slope))  # Q N
    flat[place] = -slope.to(z.dtype)
    return F.softplus(margin).mean(1), (right > top).float().mean(1), z


def fused_losses(classes, device):
    """-> a function like task_losses, for CUDA, where a loop over 29 tasks is hundreds of small kernels: all tasks at once, padded
    to the longest. Compiled, the padded tables need not exist outside a kernel. It ignores the argument overwrite."""
    q = torch.tensor(classes, device=device)                               # Q
    start, task = q.cumsum(0) - q, torch.arange(len(q), device=device).repeat_interleave(q)  # Q, C

    def losses(logits, y, classes, weight, overwrite):
        z, right_column = logits.detach().float(), y + start               # N C, N Q
        place = torch.arange(max(classes), device=y.device)                # M
        column = (start[:, None] + place).clamp(max=sum(classes) - 1)      # Q M, the columns of a task
        right = z.gather(1, right_column)                                  # N Q
        absent = (place >= q[:, None]) | (place == y[..., None])           # N Q M
        wrong = z[:, column].masked_fill(absent, -torch.inf)               # N Q M
        top = wrong.amax(2)                                                # N Q
        total = (wrong - top[..., None]).exp().sum(2)                      # N Q
        margin = total.log() + (top - right)                               # N Q
        slope = margin.sigmoid() * (weight / len(y))                       # N Q
        grad = (z - top[:, task]).exp() * (slope / total)[:, task]         # N C
        grad = torch.where(torch.arange(len(task), device=y.device) == right_column[:, task], -slope[:, task], grad)
        return F.softplus(margin).mean(0), (right > top).float().mean(0), grad.to(logits.dtype)
    return losses


def set_precision(device, precision):
    """Products of float32 matrices: TF32 on CUDA if asked for (10 bits of mantissa), else true float32.

    On a CPU 'medium' has torch call oneDNN instead of MKL: 2.2 times as fast on an EPYC with AVX512. Where a processor has matrix
    units for bfloat16 it would round to that, so it is kept only if a product shows that nothing is rounded."""
    cuda = device.startswith('cuda')
    torch.set_float32_matmul_precision('medium' if not cuda else 'high' if precision == 'tf32' else 'highest')
    if not cuda and products_are_rounded():
        torch.set_float32_matmul_precision('highest')


def products_are_rounded():
    """Whether float32 products on the CPU have fewer bits than float32, by trying one: an error of 5e-5 is usual, TF32 would have 5e-3."""
    a = torch.linspace(-1, 1, 2 ** 16).sin().view(256, 256)
    return ((a @ a).double() - a.double() @ a.double()).abs().max() > 1e-3


def flop_per_row(d_model, n_classes):
    """Floating-point operations of the forward pass for one example: the products by W_O, W_in, W_out and W_U. The tables for
    attention and their lookups are not counted; they would add 5 % to an epoch at p = 113, D = 256."""
    return 2 * d_model * (d_model + 2 * 4 * d_model + n_classes)


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
                if not self.state[w]:
                    self.state[w]['momentum'] = torch.zeros_like(w)
                m = self.state[w]['momentum']
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
