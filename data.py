"""Data: all p^2 pairs of digits, the targets of a task, a seeded split. Built in a moment, nothing downloaded or stored.

Row n of the targets is of the number n = x0 + x1 p, written as the tokens [x0, x1, e]. The answer is read at e ("=", id p). With O formulas
in one task the last token names the formula (ids p, p+1, ...), and each number has O rows of tokens.
At the end: how the scripts write and load the files of a run, and how they report what the user can mend.
"""
import contextlib
import ctypes
import io
import os
import re
import sys
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import torch

TASKS = ('miiii', 'nanda', 'basis', 'masked', 'add')
FAMILIES = {  # of formulas (Furuta et al. 2024); as a task a name means a mixture of all, as a value of task in --sweep_space a run of each
    'elementary': 'a+b,a-b,a*b',
    'linear': '2*a+b,2*a-b,2*a+3*b,2*a-3*b',
    'cross': 'a*b+b,a*b-b,a*b+a+b',
    'squares': 'a^2+b,a^2-b,a^2+b^2,a^2-b^2',
    'powers': 'a^3+b^3,a^4+b^4,a^5+b^5,a^6+b^6,a^7+b^7',
    'factored': '(a+b)^2,(a+b)^3,(a-b)^2,(a-b)^3,(a-b)^4,(a+b)^2+a+b',
    'unfactored': 'a^2+a*b+b^2,a^2+a*b+b^2+a,a^3+a*b,a^3+a*b^2+b',
}


class Data(NamedTuple):
    """N = p^2 pairs of digits, Q tasks, O operations (1, or one per formula), one set of tensors on one device."""
    x: torch.Tensor        # (N O, 3) token ids: x0, x1, operation; the O rows of a pair follow each other
    y: torch.Tensor        # (N, Q) targets
    names: list            # Q strings
    classes: list          # Q ints: how many classes each task has
    in_loss: torch.Tensor  # (Q,) bool: False where a task is measured but not trained
    stride: int            # waves of interest run in x0 +- stride x1: p for numbers, 1 modulo p; 0 for add, which has no modulus and none
    n_ops: int             # O

    @property
    def modular(self):
        return self.stride > 0

    def part(self, rows):
        """Tokens (n O, 3) and targets (n, Q) of n pairs. Logits of these tokens, seen as (n, columns), have a block of columns per task."""
        return self.x.view(len(self.y), -1)[rows].view(-1, 3), self.y[rows]


def primes_below(n):
    """All primes q < n in order. At n = 113 there are 29, from 2 to 109."""
    return [q for q in range(2, n) if all(q % r for r in range(2, int(q ** 0.5) + 1))]


def make(task, p, seed=0, device='cpu'):
    """The whole data set of `task` in base p.

    miiii   n mod q for every prime q < p                              (Syrkis & Sogaard 2024, eq. 2)
    nanda   (x0 + x1) mod p                                            (Nanda et al. 2023; eq. 1 of the former)
    basis   miiii with the rows of y shuffled by `seed`: no structure  (section Tasks)
    masked  miiii whose loss leaves out q in {2, 3, 5, 7}              (section Tasks)
    add     x0 + x1, no modulus, any p                                 (Zhou et al. 2024)
    a formula in a = x0 and b = x1, or several between commas, mod p   (Furuta et al. 2024); a name in FAMILIES stands for its formulas

    Raises ValueError for a task that is none of these, two formulas that are the same, and a p that is not a prime >= 5
    (for add: not a number >= 5).
    """
    if p < 5 or task != 'add' and p not in primes_below(p + 1):
        raise ValueError(f'p must be a {"number" if task == "add" else "prime"} >= 5, and {p} is not')
    n = torch.arange(p * p)
    x0, x1, names, classes, stride = n % p, n // p, [f'(x0 + x1) mod {p}'], [p], 1
    if task == 'nanda':
        y = ((x0 + x1) % p)[:, None]
    elif task == 'add':
        names, classes, stride, y = ['x0 + x1'], [2 * p - 1], 0, (x0 + x1)[:, None]
    elif task in TASKS:
        classes, stride = primes_below(p), p
        names, y = [f'n mod {q}' for q in classes], n[:, None] % torch.tensor(classes)
    else:
        formulas = FAMILIES.get(task, task).split(',')
        try:
            y = torch.stack([evaluate(f, x0, x1, p) for f in formulas], 1)
        except ValueError as e:
            words = [f for f in task.split(',') if f.isalpha() and f.strip('ab')]
            raise ValueError(f'{words[0]!r} is no formula in a and b; by themselves there are {", ".join((*TASKS, *FAMILIES))}' if words else e)
        names, classes = [''.join(f.split()) for f in formulas], [p] * len(formulas)
        if len(y.T.unique(dim=0)) < len(names):
            raise ValueError(f'two formulas of {task!r} are the same modulo {p}')
    if task == 'basis':
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + 2 ** 32))]  # not the split's own permutation
    in_loss = torch.tensor([not (task == 'masked' and q in (2, 3, 5, 7)) for q in classes])
    n_ops = 1 if task in TASKS else len(names)
    x = torch.stack([v.repeat_interleave(n_ops) for v in (x0, x1)] + [p + torch.arange(n_ops).repeat(p * p)], 1)
    return Data(x.to(device), y.to(device), names, classes, in_loss.to(device), stride, n_ops)


def evaluate(formula, a, b, p):
    """Values mod p of a polynomial in a and b, tensors of whole numbers below p: + - * ^ (also **) and unary minus, whole numbers,
    parentheses, spaces; an exponent is a whole number. Python never sees it, and every step is reduced mod p, so nothing overflows.

    Raises ValueError, which shows the place, for anything else, for more than 200 characters and exponents above 1,000.
    """
    if len(formula) > 200:
        raise ValueError(f'a formula has at most 200 characters, not {len(formula)}')
    tokens = [(m[1], m.start(1)) for m in re.finditer(r'\s*([0-9]+|\*\*|\S)', formula)] + [('the end', len(formula))]

    def comes(*some):
        return tokens[0][0] in some

    def take():
        return tokens.pop(0)[0]

    def expected(what):
        raise ValueError(f'formula {formula!r}, character {tokens[0][1] + 1}: expected {what}, not {tokens[0][0]}')

    def number():
        return tokens[0][0][0] in '0123456789'

    def sums():
        value = products()
        while comes('+', '-'):
            value = (value + products() if take() == '+' else value - products()) % p
        return value

    def products():
        value = signed()
        while comes('*'):
            take()
            value = value * signed() % p
        return value

    def signed():
        if comes('-'):
            take()
            return -signed() % p
        value = atom()
        if comes('^', '**'):
            take()
            if not number() or int(tokens[0][0]) > 1000:
                expected('a whole number up to 1000')
            n = int(take())
            value = torch.tensor([pow(r, n, p) for r in range(p)])[value]
        return value

    def atom():
        if comes('a', 'b'):
            return a if take() == 'a' else b
        if number():
            return torch.full_like(a, int(take()) % p)
        if not comes('('):
            expected('a, b, a number, - or (')
        take()
        value = sums()
        if not comes(')'):
            expected('an operation or )')
        take()
        return value

    value = sums()
    if len(tokens) > 1:
        expected('an operation')
    return value


def split(n_rows, train_frac, seed=0, n_valid=1000):
    """Row numbers of train, validation and test: three disjoint tensors from one permutation seeded by `seed`.

    Validation gets n_valid rows, at small p at most half of what training leaves; test gets the rest.
    Raises ValueError if a part would be empty.
    """
    n_train = round(train_frac * n_rows)
    n_valid = min(n_valid, (n_rows - n_train) // 2)
    if n_train < 1 or n_valid < 1:
        raise ValueError(f'train_frac {train_frac} of {n_rows} rows leaves a part of the split empty')
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    return order.split([n_train, n_valid, n_rows - n_train - n_valid])


def fourier_features(rows, periods, width, seed=0, scrambled=False):
    """A stand-in for the number tokens of a pre-trained model (rows, width): a cosine and a sine of each period in the row number, each in
    a random direction; rms 0.1 per entry. Scrambled, every row has each wave at a random phase of its own: nothing left to add."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * len(periods), width, generator=g, dtype=torch.float64)
    turn = torch.arange(rows)[:, None] / torch.tensor(periods, dtype=torch.float64)  # rows, periods
    turn = torch.rand(turn.shape, generator=g, dtype=torch.float64) if scrambled else turn
    W = torch.cat([torch.cos(2 * torch.pi * turn), torch.sin(2 * torch.pi * turn)], 1) @ directions
    return (0.1 * W / W.square().mean().sqrt()).float()


def load_matrix(path):
    """The numbers in a .npy or .pt file as a float32 tensor (rows, columns); nothing in it is executed. Raises Refusal if it is not there or
    is anything but one matrix of finite numbers."""
    if not path.exists():
        raise Refusal(f'{path} is not there')
    if path.suffix not in ('.npy', '.pt'):
        raise Refusal(f'{path} is no .npy or .pt file')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns of files that are refused below
            m = np.load(path, allow_pickle=False) if path.suffix == '.npy' else torch.load(path, map_location='cpu', weights_only=True)
        if isinstance(m, np.ndarray):
            m = torch.from_numpy(m.astype(m.dtype.newbyteorder('=')))
        if isinstance(m, torch.Tensor):
            if m.is_complex() or m.layout != torch.strided or m.is_nested or m.is_meta:
                raise TypeError
            m = m.detach().float()
    except Exception as e:  # numpy and torch raise a dozen types here
        raise Refusal(f'{path} holds no matrix that can be loaded safely ({type(e).__name__})')
    if not isinstance(m, torch.Tensor):
        raise Refusal(f'{path} holds a {type(m).__name__}, not a matrix')
    if m.dim() != 2 or not m.numel():
        raise Refusal(f'{path} must hold one matrix, a row per number, not {list(m.shape)}')
    if not m.isfinite().all():
        raise Refusal(f'{path} has numbers that are not finite in float32')
    return m


# ---------------------------------------------------------------------------------------------------- files and faults

class Refusal(Exception):
    """Something the user can mend: reported in one line, exit code 2."""


def refuse(message):
    raise Refusal(message)


def write(path, content):
    """Bytes, or a dict by torch.save, to a file, whole or not at all: written beside, synced, renamed. Raises Refusal if the
    disk does not take it."""
    if isinstance(content, dict):
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getvalue()
    beside = path.with_name(path.name + '.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise Refusal(f'cannot write {path}: {e.strerror}; nothing saved before is lost')


def load(path, keys=('model', 'optimizer', 'filter', 'step', 'rng', 'config', 'versions')):
    """A checkpoint, or a snapshot: tensors and plain values only, nothing in it is executed. Raises Refusal if it is not
    there, not whole, or without one of `keys`."""
    if not path.exists():
        raise Refusal(f'there is no {path}')
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at checksums
        content = torch.load(path, map_location='cpu', weights_only=True)
        if damaged or not set(keys) <= content.keys():
            raise ValueError
    except Exception as e:  # torch raises a dozen types here
        raise Refusal(f'{path} is truncated, corrupt or not of this program ({type(e).__name__})')
    return content


def run_script(main):
    """Exit with what main(arguments) returns; what the user can mend ends in one line and exit code 2."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc gives big buffers back to the kernel and faults them in again,
        libc = ctypes.CDLL(None)                                   # page by page, at every use; keeping them saves a fifth of an epoch
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)           # M_MMAP_MAX, M_TRIM_THRESHOLD
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # who reads our output has seen enough
        os._exit(1)
    except (Refusal, OSError, MemoryError, torch.OutOfMemoryError) as e:
        text = str(e) if isinstance(e, Refusal) else ' '.join(repr(e).split())[:300]
        print('\n' * sys.stdout.isatty() + f'{os.path.basename(sys.argv[0])}: error: {text}', file=sys.stderr)  # not behind a progress line
        sys.exit(2)
    except KeyboardInterrupt:  # nothing is lost: files are written whole
        sys.exit(130)
