"""Data: all p^2 pairs of digits, the targets of a task, a seeded split. Built in a moment.

Row n of the targets is of the number n = x0 + x1 p, written as the tokens [x0, x1, e]. The answer is read at
e ("=", id p). With O formulas in one task the last token names the formula (ids p, p+1, ...), and each number
has O rows of tokens. Below: the files of a run, and how a script reports what its user can mend.
"""
import ast
import contextlib
import ctypes
import io
import os
import re
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

TASKS = ('miiii', 'nanda', 'basis', 'masked', 'add')


class Data(NamedTuple):
    """N = p^2 pairs of digits, Q tasks, O operations (one per formula, else 1)."""
    x: torch.Tensor        # (N O, 3) token ids: x0, x1, operation; the O rows of a pair follow each other
    y: torch.Tensor        # (N, Q) targets
    names: list            # Q strings
    classes: list          # Q ints: how many classes each task has
    in_loss: torch.Tensor  # (Q,) bool: False where a task is measured but not trained
    stride: int            # waves of interest run in x0 +- stride x1; 0 for add, which has no modulus
    n_ops: int             # O

    def batch(self, rows):
        """Tokens (n O, 3), targets (n, Q) of n pairs. Logits seen as (n, columns) have a block per task."""
        return self.x.view(len(self.y), -1)[rows].view(-1, 3), self.y[rows]


def primes_below(n):
    """All primes q < n in order. At n = 113 there are 29, from 2 to 109."""
    return [q for q in range(2, n) if all(q % r for r in range(2, int(q ** 0.5) + 1))]


def make(task, p, seed=0, device='cpu'):
    """The whole data set of `task` in base p.

    miiii   n mod q for every prime q < p                              (Syrkis & Søgaard 2024, eq. 2)
    nanda   (x0 + x1) mod p                                            (Nanda et al. 2023)
    basis   miiii with the rows of y shuffled by `seed`: no structure left
    masked  miiii whose loss leaves out q in {2, 3, 5, 7}
    add     x0 + x1, no modulus, any p >= 5                            (Zhou et al. 2024)
    n%6,n%10, or any moduli between commas, as miiii
    a formula in a = x0 and b = x1 mod p, or several between commas    (Furuta et al. 2024)
    """
    kind = 'number' if task == 'add' else 'prime'
    need(p >= 5 and (task == 'add' or p in primes_below(p + 1)), f'p must be a {kind} >= 5, and {p} is not')
    n = torch.arange(p * p)
    x0, x1 = n % p, n // p
    if task == 'nanda':
        names, classes, y = [f'(x0 + x1) mod {p}'], [p], ((x0 + x1) % p)[:, None]
    elif task == 'add':
        names, classes, y = ['x0 + x1'], [2 * p - 1], (x0 + x1)[:, None]
    elif of_n(task):
        classes = moduli(task, p) if '%' in task else primes_below(p)
        names, y = [f'n mod {q}' for q in classes], n[:, None] % torch.tensor(classes)
    else:
        formulas = task.split(',')
        y = torch.stack([polynomial(f, x0, x1, p) for f in formulas], 1)
        names, classes = [''.join(f.split()) for f in formulas], [p] * len(formulas)
    if task == 'basis':
        generator = torch.Generator().manual_seed(seed + 2 ** 32)  # not the permutation of the split
        y = y[torch.randperm(len(y), generator=generator)]
    in_loss = torch.tensor([not (task == 'masked' and q in (2, 3, 5, 7)) for q in classes])
    need(in_loss.any(), f'task {task} leaves nothing to train on at p = {p}')
    stride = p if of_n(task) else 0 if task == 'add' else 1
    n_ops = 1 if of_n(task) or task in TASKS else len(names)
    op = p + torch.arange(n_ops).repeat(p * p)
    x = torch.stack([x0.repeat_interleave(n_ops), x1.repeat_interleave(n_ops), op], 1)
    return Data(x.to(device), y.to(device), names, classes, in_loss.to(device), stride, n_ops)


def of_n(task):
    """Whether the answers of a task are remainders of n = x0 + x1 p."""
    return task in ('miiii', 'basis', 'masked') or '%' in task


def moduli(task, p):
    """The list [6, 10] of "n%6,n%10"."""
    parts = [re.fullmatch(r' *n *% *(\d{1,9}) *', part) for part in task.split(',')]
    need(all(parts), f'{task[:200]!r}: a task with % is a list of moduli, as "n%6,n%10"')
    found = [int(part[1]) for part in parts]
    fine = len(set(found)) == len(found) and all(2 <= q <= p * p for q in found)
    need(fine, f'{task[:200]!r}: moduli must differ and lie between 2 and p^2 = {p * p}')
    return found


def polynomial(formula, a, b, p):
    """Values mod p of a polynomial in a and b, tensors of whole numbers below p: + - * ^ (or **), numbers,
    parentheses. Python reads the formula but does not run it; each step is reduced mod p: no overflow."""
    what = f'{formula[:200]!r} is no formula in a and b'
    if foreign := re.search('[^ab0-9+*^() -]|0b', formula):
        refuse(f'{what}: {foreign.group()!r}; other tasks are {", ".join(TASKS)}')
    need(0 < len(formula) <= 200, f'{what} of 1 to 200 characters')
    text = formula.strip().replace('^', '**')

    def value(node):
        match node:
            case ast.Name('a' | 'b'):
                return a if node.id == 'a' else b
            case ast.Constant(int(n)):
                return torch.full_like(a, n % p)
            case ast.UnaryOp(ast.USub(), x):
                return -value(x) % p
            case ast.BinOp(x, ast.Add(), y):
                return (value(x) + value(y)) % p
            case ast.BinOp(x, ast.Sub(), y):
                return (value(x) - value(y)) % p
            case ast.BinOp(x, ast.Mult(), y):
                return value(x) * value(y) % p
            case ast.BinOp(x, ast.Pow(), ast.Constant(int(n))) if n <= 1000:
                return torch.tensor([pow(r, n, p) for r in range(p)])[value(x)]
        refuse(f'{what}: {ast.get_source_segment(text, node)!r}; allowed are + - * and ^ by 0 to 1000')

    try:
        return value(ast.parse(text, mode='eval').body)
    except SyntaxError as e:
        refuse(f'{what}: {e.msg}')


def split(n_rows, train_frac, seed=0, n_valid=1000):
    """Row numbers of train, validation (n_valid, or half of what training leaves) and test: three tensors."""
    n_train = round(train_frac * n_rows)
    n_valid = min(n_valid, (n_rows - n_train) // 2)
    need(n_train > 0 and n_valid > 0, f'train_frac {train_frac} of {n_rows} rows leaves a set of rows empty')
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    return order.split([n_train, n_valid, n_rows - n_train - n_valid])


# ---------------------------------------------------------------- files, and what the user can mend

class Refusal(Exception):
    """Something the user can mend: reported in one line, exit code 2. All above and below raise it."""


def refuse(message):
    raise Refusal(message)


def need(condition, message):
    if not condition:
        refuse(message)


def brief(error):
    """The first line of what an exception says."""
    return (str(error).strip() or repr(error)).splitlines()[0][:150]


def write(path, fill, late=None):
    """A file, whole or not at all, of what fill(buffer) puts into a buffer. Raises Refusal; but given a dict
    `late`, of files whose writing has failed so far, it goes there with a note."""
    buffer, files = io.BytesIO(), {} if late is None else late
    fill(buffer)
    files.pop(Path(path), None)
    files[Path(path)] = buffer
    try:
        flush(files)
    except Refusal as e:
        need(late is not None, e)
        say(f'note: {e}; it is tried again')


def flush(files):
    """Write {path: buffer}, each beside, synced, renamed. What is written leaves the dict; then Refusal, if
    anything is left. A checkpoint comes last, and waits for its records."""
    problem = ''
    for path, buffer in sorted(files.items(), key=lambda item: item[0].name == 'ckpt.pt'):
        if path.name == 'ckpt.pt' and path.with_name('metrics.npz') in files:
            continue
        beside = path.with_name(f'{path.name}.{os.getpid()}.tmp')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, 'wb') as f:
                f.write(buffer.getbuffer())
                f.flush()
                os.fsync(f.fileno())
            os.replace(beside, path)
            del files[path]
        except OSError as e:
            problem = f'cannot write {path}: {e.strerror}'
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
    need(not files, problem)


def settle(late):
    """Write what is late, for a minute again and again. Raises Refusal."""
    for second in range(60 if late else 0):
        with contextlib.suppress(Refusal):
            return flush(late)
        if second == 0:
            say(f'waiting up to a minute for {", ".join(map(str, late))}')
        time.sleep(1)
    flush(late)


def load(path, keys=('model', 'optimizer', 'filter', 'step', 'rng', 'config', 'versions')):
    """A checkpoint, or a snapshot, with these keys: tensors and plain values, nothing in it is executed."""
    need(Path(path).exists(), f'there is no {path}')
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at checksums
        content = torch.load(path, map_location='cpu', weights_only=True)
        whole = not damaged and set(keys) <= content.keys()
    except Exception as e:  # torch raises a dozen types here
        refuse(f'{path} is truncated, corrupt or not of this program ({type(e).__name__})')
    need(whole, f'{path} is corrupt or not of this program')
    return content


def load_matrix(path):
    """One matrix of finite numbers from a .npy or .pt file, as float32; nothing in it is executed."""
    need(path.exists() and path.suffix in ('.npy', '.pt'), f'there is no {path}, or no .npy or .pt file')
    try:
        if path.suffix == '.npy':
            numbers = np.load(path, allow_pickle=False)
            matrix = torch.from_numpy(numbers.astype(np.float32, casting='same_kind'))  # not from complex
        else:
            matrix = torch.load(path, map_location='cpu', weights_only=True).detach()
            need(not matrix.is_complex(), 'complex numbers')
        matrix = matrix.float()
        whole = matrix.ndim == 2 and matrix.numel() > 0 and bool(matrix.isfinite().all())
    except Exception as e:  # numpy and torch raise a dozen types here
        refuse(f'{path} holds no matrix that can be loaded safely ({type(e).__name__})')
    need(whole, f'{path} must hold a matrix of finite numbers, a row per number, not {list(matrix.shape)}')
    return matrix


def claim(out):
    """Hold a folder until the file returned is closed or the process ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / 'lock', 'w')
    except OSError as e:
        refuse(f'cannot write into {out}: {e.strerror}')
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(f'another run is at work in {out}')
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return lock


def say(text, end='\n'):
    """Print, but never fail: who closed the terminal or the pipe has seen enough, and the work goes on."""
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, 'w')


def aligned(rows):
    """Rows of values as lines of text; the columns after the first to the right."""
    rows = [[show(value) for value in row] for row in rows]
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    lines = [[name.ljust(first), *map(str.rjust, values, others)] for name, *values in rows]
    return '\n'.join(map('  '.join, lines))


def show(value):
    """A number, a list of them or None as text."""
    if isinstance(value, list):
        return ' '.join(f'({show(x)})' if isinstance(x, list) else show(x) for x in value) or '-'
    if isinstance(value, float):
        if 0.9999 < value < 1:  # it is not rounded up to 1
            value = 0.9999
        return f'{value:.4g}' if abs(value) < 1000 else f'{value:,.0f}'
    return '-' if value is None else f'{value:,}' if isinstance(value, int) else value


def keep_buffers():
    """Big buffers stay with the process instead of going back to the kernel at every use: an epoch on a CPU
    takes .8 of the time. For a script alone, as it cannot be undone; nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def run_script(main):
    """main(arguments) as a program: what the user can mend ends in one line and exit code 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors='backslashreplace')  # a name that the terminal cannot show is no fault
    keep_buffers()
    try:
        main(sys.argv[1:])
    except (Refusal, OSError, MemoryError, RuntimeError) as e:
        text = ' '.join((str(e) or repr(e)).split())[:600]
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or 'DefaultCPUAllocator' in text:
            text = f'out of memory; lower --p, --d_model or --train_frac ({brief(e)})'
        elif isinstance(e, RuntimeError):
            raise
        with contextlib.suppress(OSError, ValueError):
            print(f'{os.path.basename(sys.argv[0])}: error: {text}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # all files are whole
        sys.exit(130)
