"""Side effects of a block: files, threads, settings, random state, output, patched functions, sockets."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import functools
import gc
import io
import locale
import logging
import os
import pickle
import random
import re
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import torch
from torch import Tensor, nn

from .. import models

#: Variables and files that torch's optimizers create at their first use.
_TORCH = "TORCHINDUCTOR"
#: Files in which ``phosphene.methods`` caches what it looks up, and their folders.
_LOOKUP_CACHE = re.compile(r"\.cache(/phosphene(/[^/]+-(outlines|infos)\.json)?)?")


@contextmanager
def record_side_effects(side_effects: list[str]) -> Iterator[None]:
    """Append a sentence for each side effect in the block: files, threads, settings, output, ..."""
    out, err = io.StringIO(), io.StringIO()
    working, temporary, environment = Path.cwd(), tempfile.tempdir, dict(os.environ)
    with tempfile.TemporaryDirectory() as parent:
        folders = {what: Path(parent, what) for what in ("working", "temporary", "home")}
        for folder in folders.values():
            folder.mkdir()
        os.chdir(folders["working"])
        tempfile.tempdir = str(folders["temporary"])
        os.environ |= {"HOME": str(folders["home"]), "TMPDIR": str(folders["temporary"])}
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state, threads, files = _process_state(), set(threading.enumerate()), _open_files()
                with _audit(parent, side_effects):
                    try:
                        yield
                    finally:
                        side_effects += _changes(state)
                        side_effects += [
                            f"thread {t.name} still runs"
                            for t in {*threading.enumerate()} - threads
                            if not t.daemon
                        ]
                        side_effects += [f"{path} is still open" for _, path in _open_files() - files]
        finally:
            moved = Path.cwd().resolve() != folders["working"].resolve()
            os.chdir(working)
            tempfile.tempdir = temporary
            _set_environment(environment)
            if moved:
                side_effects.append("the working directory changed")
            for what, folder in folders.items():
                names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
                names = [
                    n for n in names if not n.startswith(_TORCH.lower()) and not _LOOKUP_CACHE.fullmatch(n)
                ]
                if names:
                    side_effects.append(f"files were left in the {what} directory: {', '.join(names[:3])}")
            for stream, name in ((out, "standard output"), (err, "standard error")):
                if stream.getvalue().strip():
                    side_effects.append(f"it wrote to {name}: {stream.getvalue().strip()[:80]!r}")


def _open_files() -> set[tuple[int, str]]:
    return {(file.fd, file.path) for file in psutil.Process().open_files()}


# --- sockets, processes and files elsewhere --------------------------------------------------------

#: The folder that the block may write to, and its side effects; None outside of a block.
_audited: tuple[str, list[str]] | None = None

_PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
_WRITES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
)


def _on_audit_event(event: str, arguments: tuple[Any, ...]) -> None:
    if _audited is None:
        return
    folder, side_effects = _audited
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo"):
        side_effects.append(f"it used the network: {event} {arguments[-1]!r:.80}")
    elif event in _PROCESSES:
        side_effects.append(f"it started a process: {event} {arguments[:1]!r:.80}")
    elif event in _WRITES or (event == "open" and _writes(*arguments[1:3])):
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)) and not _allowed(os.fsdecode(path), folder):
            side_effects.append(f"it wrote to {os.fsdecode(path)}")


def _writes(mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return not {*mode}.isdisjoint("wax+")
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _allowed(path: str, folder: str) -> bool:
    """Whether a path is below the block's folder, or no file, or a compiler's cache."""
    absolute = os.path.abspath(path)
    caches = ("__pycache__", _TORCH.lower(), ".pyc")
    return absolute.startswith((folder, "/dev/", "/proc/")) or any(part in absolute for part in caches)


@functools.cache
def _add_audit_hook() -> None:
    sys.addaudithook(_on_audit_event)  # for the rest of the process: it cannot be removed


@contextmanager
def _audit(folder: str, side_effects: list[str]) -> Iterator[None]:
    global _audited
    _add_audit_hook()
    outer, _audited = _audited, (folder, side_effects)
    try:
        yield
    finally:
        _audited = outer


# --- the process's state -----------------------------------------------------------------------------


def _set_environment(variables: Mapping[str, str]) -> None:
    for name in [n for n in os.environ if n not in variables and not n.startswith(_TORCH)]:
        del os.environ[name]
    os.environ.update(variables)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


def _list(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Read a list and restore it in place."""

    def restore(value: Any) -> None:
        getattr(owner, name)[:] = value

    return (lambda: list(getattr(owner, name))), restore


def _flushes_denormals() -> bool:
    return float(torch.tensor(1e-39, dtype=torch.float32).mul(0.5)) == 0


def _signal_handlers() -> dict[int, Any]:
    return {int(number): signal.getsignal(number) for number in signal.valid_signals()}


def _set_signal_handlers(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None and signal.getsignal(number) is not handler:
            with contextlib.suppress(OSError, ValueError):  # SIGKILL; another thread than the main one
                signal.signal(number, handler)


def _loggers() -> dict[str, tuple[Any, ...]]:
    named = {n: v for n, v in logging.root.manager.loggerDict.items() if isinstance(v, logging.Logger)}
    return {
        name: (logger.level, tuple(logger.handlers), logger.disabled, logger.propagate, tuple(logger.filters))
        for name, logger in {"root": logging.root, **named}.items()
    }


def _set_loggers(loggers: Mapping[str, tuple[Any, ...]]) -> None:
    for name, (level, handlers, disabled, propagate, filters) in loggers.items():
        logger = logging.root if name == "root" else logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters
        logger.disabled, logger.propagate = disabled, propagate


def _matplotlib_settings() -> dict[str, Any]:
    library = sys.modules.get("matplotlib")
    # "backend" is resolved at its first use.
    return {} if library is None else {k: v for k, v in dict.items(library.rcParams) if k != "backend"}


def _set_matplotlib_settings(settings: Mapping[str, Any]) -> None:
    if settings:
        dict.update(sys.modules["matplotlib"].rcParams, settings)


def _figures() -> list[int]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    return [] if pyplot is None else list(pyplot.get_fignums())


def _close_figures(figures: list[int]) -> None:
    for number in _figures():
        if number not in figures:
            sys.modules["matplotlib.pyplot"].close(number)


def _global_hooks() -> dict[str, list[Any]]:
    module = nn.modules.module
    return {
        n: list(hooks)
        for n, hooks in vars(module).items()
        if n.startswith("_global") and hasattr(hooks, "keys")
    }


def _set_print_options(options: Mapping[str, Any]) -> None:
    vars(torch._tensor_str.PRINT_OPTS).update(options)


_cudnn, _matmul = torch.backends.cudnn, torch.backends.cuda.matmul

#: Process-wide settings, restored so that one case cannot affect the next.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "whether gradients are on": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic switch": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "torch's matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the flushing of denormal numbers": (_flushes_denormals, torch.set_flush_denormal),
    "torch's print options": (lambda: dict(vars(torch._tensor_str.PRINT_OPTS)), _set_print_options),
    **{f"cuDNN's {n} switch": _attribute(_cudnn, n) for n in ("benchmark", "deterministic", "enabled")},
    "cuDNN's TF32 switch": _attribute(_cudnn, "allow_tf32"),
    "the TF32 switch of CUDA's matmul": _attribute(_matmul, "allow_tf32"),
    "the half precision reductions of CUDA's matmul": _attribute(
        _matmul, "allow_fp16_reduced_precision_reduction"
    ),
    "the flash attention switch": (
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.enable_flash_sdp,
    ),
    "the efficient attention switch": (
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
    "the plain attention switch": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "oneDNN's switch": (
        lambda: torch._C._get_mkldnn_enabled(),
        lambda value: torch._C._set_mkldnn_enabled(value),
    ),
    "numpy's handling of errors": (np.geterr, lambda value: np.seterr(**value)),
    "numpy's print options": (np.get_printoptions, lambda value: np.set_printoptions(**value)),
    "the environment": (
        lambda: {n: v for n, v in os.environ.items() if not n.startswith(_TORCH)},
        _set_environment,
    ),
    "the warning filters": _list(warnings, "filters"),
    "warnings.showwarning": _attribute(warnings, "showwarning"),
    "the logging": (_loggers, _set_loggers),
    "logging.disable": (lambda: logging.root.manager.disable, logging.disable),
    "sys.path": _list(sys, "path"),
    "sys.meta_path": _list(sys, "meta_path"),
    "sys.excepthook": _attribute(sys, "excepthook"),
    "sys.displayhook": _attribute(sys, "displayhook"),
    "threading.excepthook": _attribute(threading, "excepthook"),
    "the trace function": (sys.gettrace, sys.settrace),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "the switch interval": (sys.getswitchinterval, sys.setswitchinterval),
    "the signal handlers": (_signal_handlers, _set_signal_handlers),
    "the locale": (lambda: locale.setlocale(locale.LC_ALL), lambda v: locale.setlocale(locale.LC_ALL, v)),
    "whether garbage is collected": (gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
    "the thresholds of gc": (gc.get_threshold, lambda value: gc.set_threshold(*value)),
    "the callbacks of gc": _list(gc, "callbacks"),
    "matplotlib's rcParams": (_matplotlib_settings, _set_matplotlib_settings),
    "pyplot's figures": (_figures, _close_figures),
}

#: What a library changes at its first use, and a method only if it does so at each call.
_EXIT = "an exit function was registered (atexit)"

#: State that is read only.
_STATE: dict[str, Callable[[], Any]] = {
    "torch's random state": torch.get_rng_state,
    "Python's random state": random.getstate,
    "numpy's random state": lambda: pickle.dumps(np.random.get_state()),
    "torch's default device": torch.get_default_device,
    "inference mode": torch.is_inference_mode_enabled,
    "autocast": lambda: (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
    "the hooks of all modules": _global_hooks,
    "the torch function modes": torch.overrides._get_current_function_mode_stack,
}

#: Modules and classes whose functions must stay what they are.
_NAMESPACES: dict[str, Any] = {
    "torch": torch,
    "torch.nn.functional": nn.functional,
    "torch.nn": nn,
    "torch.nn.init": nn.init,
    "torch.autograd": torch.autograd,
    "torch.autograd.functional": torch.autograd.functional,
    "torch.random": torch.random,
    "torch.Tensor": torch.Tensor,
    "torch.nn.Module": nn.Module,
    **{
        f"torch.nn.{part.__name__}": part
        for part in (nn.Conv2d, nn.Linear, nn.ReLU, nn.GELU, nn.MaxPool2d, nn.BatchNorm2d, nn.LayerNorm)
    },
    "numpy": np,
    "numpy.random": np.random,
    "PIL.Image": PIL.Image,
    "PIL.Image.Image": PIL.Image.Image,
    "builtins": builtins,
    "random": random,
    "phosphene.models.Model": models.Model,
}


def _process_state() -> dict[str, Any]:
    return {
        "settings": {name: read() for name, (read, _) in _SETTINGS.items()},
        "state": {name: read() for name, read in _STATE.items()},
        "exit functions": atexit._ncallbacks(),
        "functions": {where: dict(vars(owner)) for where, owner in _NAMESPACES.items()},
        "modules": dict(sys.modules),
    }


def _changes(before: Mapping[str, Any]) -> list[str]:
    """What differs from an earlier state, one sentence each; settings, functions and modules are restored."""
    sentences = []
    for name, (read, restore) in _SETTINGS.items():
        if not _same(before["settings"][name], read()):
            sentences.append(f"{name} changed")
            restore(before["settings"][name])
    for name, read in _STATE.items():
        if not _same(before["state"][name], read()):
            sentences.append(f"{name} changed")
    # Fewer are no effect of the block: garbage collection removes those of objects from before it.
    if atexit._ncallbacks() > before["exit functions"]:
        sentences.append(_EXIT)
    for where, owner in _NAMESPACES.items():
        now = vars(owner)
        for name, value in before["functions"][where].items():
            if now.get(name) is not value and callable(value):
                sentences.append(f"{where}.{name} was replaced")
                setattr(owner, name, value)
    for name, module in before["modules"].items():
        if sys.modules.get(name) is not module:
            sentences.append(f"the module {name} was replaced or removed")
            sys.modules[name] = module
    return sentences


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def is_first_use(side_effects: list[str], imported: Set[str]) -> bool:
    """Whether side effects may be a library's at its first import or use: they are a method's if they recur.

    ``imported``: the names of the modules that were imported before.
    """
    return side_effects == [_EXIT] or bool(side_effects and sys.modules.keys() - imported)
