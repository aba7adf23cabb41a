"""Data: all p^2 pairs of digits, the targets of a task, a seeded split. Built in a moment, nothing downloaded or stored.

Row n of every table is the number n = x0 + x1 p, written as the tokens [x0, x1, e]. The answer is read at e ("=", id p).
At the end: how the scripts write and load the files of a run, and how they report what the user can mend.
"""
import contextlib
import ctypes
import io
import os
import sys
import zipfile
from typing import NamedTuple

import torch

TASKS = ('miiii', 'nanda', 'basis', 'masked')


class Data(NamedTuple):
    """N = p^2 examples, Q tasks, one set of tensors on one device."""
    x: torch.Tensor        # (N, 3) token ids: x0, x1, operation
    y: torch.Tensor        # (N, Q) targets
    names: list            # Q strings
    classes: list          # Q ints: how many classes each task has
    in_loss: torch.Tensor  # (Q,) bool: False where a task is measured but not trained
    stride: int            # every target is (x0 + stride x1) mod its classes: p for numbers, 1 for nanda


def primes_below(n):
    """All primes q < n in order. At n = 113 there are 29, from 2 to 109."""
    return [q for q in range(2, n) if all(q % r for r in range(2, int(q ** 0.5) + 1))]


def make(task, p, seed=0, device='cpu'):
    """The whole data set of `task` in base p.

    miiii   n mod q for every prime q < p                              (Syrkis & Sogaard 2024, eq. 2)
    nanda   (x0 + x1) mod p                                            (Nanda et al. 2023; eq. 1 of the former)
    basis   miiii with the rows of y shuffled by `seed`: no structure  (section Tasks)
    masked  miiii whose loss leaves out q in {2, 3, 5, 7}              (section Tasks)

    Raises ValueError for an unknown task and a p that is not a prime >= 5.
    """
    if task not in TASKS:
        raise ValueError(f'task must be one of {", ".join(TASKS)}, not {task!r}')
    if p < 5 or p not in primes_below(p + 1):
        raise ValueError(f'p must be a prime >= 5, and {p} is not')
    n = torch.arange(p * p)
    x = torch.stack([n % p, n // p, torch.full_like(n, p)], 1)
    classes, stride = ([p], 1) if task == 'nanda' else (primes_below(p), p)
    names = [f'(x0 + x1) mod {p}'] if task == 'nanda' else [f'n mod {q}' for q in classes]
    y = (x[:, 0] + stride * x[:, 1])[:, None] % torch.tensor(classes)
    if task == 'basis':
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + 2 ** 32))]  # not the split's own permutation
    in_loss = torch.tensor([not (task == 'masked' and q in (2, 3, 5, 7)) for q in classes])
    return Data(x.to(device), y.to(device), names, classes, in_loss.to(device), stride)


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
