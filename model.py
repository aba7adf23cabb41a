"""The transformer, by hand, with its loss and one optimiser: one block, no biases, no LayerNorm, attention unmasked, logits read at the last position.

    z = W_E[x] + W_pos
    z = drop(z + softmax(z W_Q (z W_K)^T / sqrt(K)) z W_V W_O)     summed over heads
    z = drop(z + ReLU(z W_in) W_out)
    logits = z[:, -1] W_U                                          (Syrkis & Sogaard 2024, eq. 7 to 11)

N examples, T=3 tokens, O operations, V=p+O token ids, D width, H heads, K=D/H, F=4D neurons, Q tasks, C classes of all tasks together.
"""
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
        needed there alone; a key or value depends on its token and position alone, so all there are stand in one table of V
        rows per position. Each example looks its rows up by a product with a one-hot matrix, whose gradient is a product
        too: deterministic, and no slower than a gather with its scattered adds.
        """
        p, (H, _, K) = self.p, self.W_Q.shape
        N, O = len(x), len(self.W_E) - p
        tok = self.W_E + self.W_pos[:, None]                               # T V D, every token at every position
        q = torch.einsum('od,hdk->ohk', tok[2, p:], self.W_Q)              # O H K, the last token is an operation
        k = torch.einsum('tvd,hdk->tvhk', tok, self.W_K)                   # T V H K
        v = torch.einsum('tvd,hdk->tvhk', tok, self.W_V)                   # T V H K
        score = torch.einsum('tvhk,ohk->tvoh', k, q) / K ** 0.5            # T V O H

        hot = (x[..., None] == torch.arange(p + O, device=x.device)).to(tok.dtype)  # N T V
        x0, x1, op = hot[:, 0, :p], hot[:, 1, :p], hot[:, 2, p:]           # N p, N p, N O
        table = torch.cat([score.flatten(2), v.flatten(2)], 2)             # T V OH+D
        row = torch.stack([x0 @ table[0, :p], x1 @ table[1, :p], op @ table[2, p:]], 1)  # N T OH+D
        score, v = row[..., :O * H].view(N, 3, O, H), row[..., O * H:].view(N, 3, H, K)

        att = (score * op[:, None, :, None]).sum(2).softmax(1)             # N T H, the scores of the example's own operation
        mix = (att[..., None] * v).sum(1).flatten(1)                       # N D, heads side by side
        mid = (op @ tok[2, p:] + mix @ self.W_O.flatten(0, 1)) * drop[0]   # N D
        neurons = F.relu(mid @ self.W_in)                                  # N F
        post = (mid + neurons @ self.W_out) * drop[1]                      # N D
        if acts is not None:
            acts.update(att=att, resid_mid=mid, neurons=neurons, resid_post=post)
        return post @ self.W_U                                             # N C


def task_losses(logits, y, classes):
    """Cross-entropy and accuracy of each task: logits (N, C), targets y (N, Q), Q class counts -> loss (Q,), accuracy (Q,).

    Cross-entropy is written as softplus(logsumexp over the wrong classes - logit of the right class). The usual form
    subtracts two nearly equal numbers once a row is confident, so in float32 its losses come in steps of 1.2e-7 and its
    gradient dies; this one keeps full relative precision down to the smallest float. A row counts as correct if the right
    logit beats all others.
    """
    loss, acc = [], []
    for z, t in zip(logits.split(classes, 1), y[..., None].unbind(1)):
        z = z.to(torch.promote_types(z.dtype, torch.float32))              # N q
        right, wrong = z.gather(1, t), z.scatter(1, t, -torch.inf)         # N 1, N q
        top = wrong.detach().amax(1, keepdim=True)                         # N 1
        lse = (wrong - top).exp().sum(1, keepdim=True).log() + top         # N 1
        loss.append(F.softplus(lse - right).mean())
        acc.append((right > top).float().mean())
    return torch.stack(loss), torch.stack(acc)


def flop_per_row(d_model, n_classes):
    """Floating-point operations of the forward pass for one example: the products by W_O, W_in, W_out and W_U. The tables of
    V rows and their lookups are not counted; they would add some 6 % to an epoch at p = 113, D = 256."""
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
