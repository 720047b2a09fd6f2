"""Where the numbers of a run go besides its own files: Weights & Biases, TensorBoard.

Each has a thread of its own, fed by a queue. The training puts numbers into the queue and goes on: it waits neither for
a login, a server or a disk, and nothing that goes wrong there ends it. What cannot be logged is a warning; the run's
own ``metrics.jsonl`` holds the numbers in any case.
"""

import importlib.util
import json
import logging
import netrc
import os
import queue
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import ignite.distributed as idist
import numpy as np
from torch import Tensor, nn

from aimnet2mult.config.builder import nearest
from aimnet2mult.utils.files import check_writable

if TYPE_CHECKING:
    from aimnet2mult.train.schema import TrainConfig, WandbInitConfig, WatchModelConfig

logger = logging.getLogger(__name__)

WANDB_MODES = ("online", "offline", "disabled")
"""Values of ``wandb.init.mode``."""

WATCHED = ("gradients", "parameters", "all")
"""Values of ``wandb.watch_model.log``."""

REACH_TIMEOUT = 5.0
"""Seconds until a server of Weights & Biases that does not answer is given up, and the run is logged offline."""

INIT_TIMEOUT = 20.0
"""Seconds until a server that answers but does not start the run is given up."""

FINISH_TIMEOUT = 10.0
"""Seconds that W&B may take at the end for what is not uploaded yet."""

CLOSE_TIMEOUT = INIT_TIMEOUT + FINISH_TIMEOUT
"""Seconds that the end of a run waits for a logger, which may have to start yet."""

HISTOGRAM_BINS = 64
"""Bins of the histograms of weights and gradients in W&B."""

ModuleRow = tuple[str, str, dict[str, list[int]]]
"""A module: name (dotted, as in the checkpoint), class, and {weight: shape}."""


# --------------------------------------------------------------------------------------------------
# what the training uses
# --------------------------------------------------------------------------------------------------


def start_loggers(
    config: "TrainConfig", folder: Path, settings: Mapping[str, Any], resumed: Mapping[str, Any] | None = None
) -> "Loggers":
    """Start the loggers that the settings name; returns at once, on all ranks but the first without any logger.

    Parameters
    ----------
    config : TrainConfig
        Its sections ``wandb`` and ``tensorboard``.
    folder : Path
        Folder of the run, for files of the loggers unless the settings name another.
    settings : mapping
        What the run's page shows as its configuration.
    resumed : mapping, optional
        `Loggers.state_dict` from the checkpoint of the run that is continued, whose curves are continued.

    Returns
    -------
    Loggers
        To be closed, or used in a ``with`` statement.
    """
    state = dict(resumed or {})
    if idist.get_rank() != 0:
        return Loggers([], None, state)
    started: list[Logger] = []
    watched = None
    if config.wandb is not None and (mode := wandb_mode(config.wandb.init)) != "disabled":
        state.setdefault("wandb_id", secrets.token_hex(4))  # not from the random numbers of the training
        wandb = Logger(WandbSink(config, folder, settings, mode, state["wandb_id"]))
        if "iteration" in state:
            wandb.put(state["numbers"], state["iteration"])
        started.append(wandb)
        watched = config.wandb.watch_model
    if config.tensorboard is not None:
        purge_step = None if resumed is None else state.get("iteration", -1) + 1
        directory = config.tensorboard.dir or folder / "tensorboard"
        started.append(Logger(TensorBoardSink(directory, settings, purge_step)))
    return Loggers(started, watched, state)


class Loggers:
    """All loggers of a run.

    Parameters
    ----------
    loggers : list of Logger
        Those that are on; none is fine.
    watched : WatchModelConfig or None
        Which histograms are logged, and how often.
    state : dict
        What is kept for a run that continues this one.
    """

    def __init__(self, loggers: "list[Logger]", watched: "WatchModelConfig | None", state: dict[str, Any]) -> None:
        self.loggers = loggers
        self._watched = watched
        self._state = state
        self._graph_is_due = watched is not None and watched.log_graph

    def log(self, numbers: Mapping[str, Any], iteration: int) -> None:
        """Log by name numbers, arrays (as histograms) and what `module_tree` returns."""
        plain = {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
        if self._state.get("iteration") != iteration:
            self._state.update(iteration=iteration, numbers={})
        self._state["numbers"].update(plain)
        for log in self.loggers:
            log.put(numbers, iteration)

    def watch(self, model: nn.Module, iteration: int) -> None:
        """Log histograms of weights and gradients if they are due; to be called while gradients are there."""
        if self._watched is None:
            return
        if self._graph_is_due:
            self.log({"graph_0": module_tree(model)}, iteration)
            self._graph_is_due = False
        if iteration % self._watched.log_freq == 0:
            self.log(watched_values(model, self._watched.log), iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that continues this one needs.

        This is the id of the W&B run, and the numbers of the last step that was logged: W&B keeps a step back until
        the next one, and a run that is killed in between loses it.
        """
        return {**self._state, "numbers": dict(self._state.get("numbers", {}))}

    def close(self, exit_code: int = 0) -> None:
        """Write out what is left; ends within CLOSE_TIMEOUT. W&B shows another code than 0 as a failed run."""
        for log in self.loggers:
            log.finish(exit_code)
        for log in self.loggers:
            log.join()

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(0 if error is None else 255 if isinstance(error, KeyboardInterrupt) else 1)


def check_loggers(config: "TrainConfig") -> list[str]:
    """Return what is wrong with the settings of the loggers, one message a problem."""
    return [*_check_wandb(config), *_check_tensorboard(config)]


def _check_wandb(config: "TrainConfig") -> Iterator[str]:
    if config.wandb is None:
        return
    mode = config.wandb.init.mode
    if mode not in WANDB_MODES:
        yield f"wandb.init.mode: {mode!r} is not a mode; {nearest(mode, WANDB_MODES)}"
    elif mode != "disabled" and importlib.util.find_spec("wandb") is None:
        yield (
            'wandb: the package wandb is not installed; `pip install "aimnet2mult[train]"`, '
            "or set wandb=null or wandb.init.mode=disabled"
        )
    yield from _check_folder("wandb.init.dir", config.wandb.init.dir)
    watch = config.wandb.watch_model
    if watch is not None and watch.log not in WATCHED:
        yield f"wandb.watch_model.log: expected {', '.join(WATCHED[:-1])} or {WATCHED[-1]}, found {watch.log!r}"
    if watch is not None and watch.log_freq < 1:
        yield f"wandb.watch_model.log_freq: expected 1 or more iterations, found {watch.log_freq}"


def _check_tensorboard(config: "TrainConfig") -> Iterator[str]:
    if config.tensorboard is None:
        return
    if importlib.util.find_spec("tensorboard") is None:
        yield (
            'tensorboard: the package tensorboard is not installed; `pip install "aimnet2mult[tensorboard]"`, '
            "or set tensorboard=null"
        )
    yield from _check_folder("tensorboard.dir", config.tensorboard.dir)


def _check_folder(key: str, folder: Path | None) -> Iterator[str]:
    """Check that a folder is there or can be made, and that files can be written into it."""
    if folder is None:
        return
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        check_writable(existing / ".written_by_a_logger")
    except OSError as error:
        yield f"{key}: {error}"


# --------------------------------------------------------------------------------------------------
# a thread and its queue
# --------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Where a `Logger` sends numbers; all methods run in the thread of the logger and may raise."""

    name: str
    """What the log calls it."""

    place: str
    """Where what it has written is found."""

    def open(self) -> None:
        """Get ready."""

    def write(self, numbers: Mapping[str, Any], iteration: int) -> None:
        """Log numbers, arrays and the tree of a model by name; what was written survives the end of the process."""

    def close(self, exit_code: int) -> None:
        """Finish."""


class Logger:
    """Sends what it is given to a sink, in order, from a thread of its own."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], int] | int] = queue.SimpleQueue()
        self._finishing = False
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._run, name=f"logger-{sink.name}", daemon=True)
        self._thread.start()

    def put(self, numbers: Mapping[str, Any], iteration: int) -> None:
        """Have numbers logged; returns at once."""
        if self._thread.is_alive():
            self._queue.put((dict(numbers), iteration))

    def finish(self, exit_code: int) -> None:
        """Have the sink closed after all that was put before; returns at once."""
        if not self._finishing:
            self._finishing = True
            self._queue.put(exit_code)

    def join(self) -> None:
        """Wait until the sink is closed, at most CLOSE_TIMEOUT."""
        self._thread.join(CLOSE_TIMEOUT)
        if self._thread.is_alive():
            self._warn(f"not finished after {CLOSE_TIMEOUT:.0f} s; what it holds is in {self._sink.place}")

    def _run(self) -> None:
        try:
            self._sink.open()
            self._consume()
        except Exception as error:  # libraries, servers and disks fail in their own ways; none may end the training
            self._warn(f"{_one_line(error)}; the run goes on without it")

    def _consume(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, int):
                self._sink.close(item)
                return
            try:
                self._sink.write(*item)
            except Exception as error:  # as in _run; what comes later may succeed
                self._warn(f"{_one_line(error)}; not all numbers are logged")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: %s", self._sink.name, message)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _json(settings: Mapping[str, Any]) -> str:
    """Return settings as text; fidelities, which may be numbers, become words."""
    return json.dumps(settings, indent=1, ensure_ascii=False, default=str)


_importing = threading.RLock()
"""Held while a thread imports: a reader process forked then would inherit locks of modules that nobody releases."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_importing.acquire, after_in_parent=_importing.release, after_in_child=_importing.release
    )


# --------------------------------------------------------------------------------------------------
# Weights & Biases
# --------------------------------------------------------------------------------------------------


class WandbSink:
    """A run of Weights & Biases that never asks.

    Without a login or without an answer from the server the run is logged offline, and the log says so. Numbers are
    logged with ``step=iteration``.

    A continued run keeps its id. Online, its curves go on where they were; W&B ignores steps that it has already, and
    since a continued run repeats exactly what the killed one did after its last checkpoint, nothing is lost by that.
    Offline, there is a folder ``offline-run-*`` for each part, all with the same id. ``wandb sync wandb/offline-run-*``
    uploads them as one run; parts of a run that began online belong to it as well.

    Parameters
    ----------
    config : TrainConfig
        Its section ``wandb``.
    folder : Path
        For wandb's files unless ``wandb.init.dir`` names another.
    settings : mapping
        What the run's page shows as its configuration.
    mode : str
        ``online`` or ``offline``.
    run_id : str
        Id of the run, new or of the run that is continued.
    """

    name = "wandb"

    def __init__(
        self, config: "TrainConfig", folder: Path, settings: Mapping[str, Any], mode: str, run_id: str
    ) -> None:
        assert config.wandb is not None
        init = config.wandb.init
        self._mode: Any = mode
        self._directory = init.dir or folder
        self._arguments: dict[str, Any] = {
            "id": run_id,
            "resume": "allow",
            "name": init.name or config.run_name,
            "project": init.project or config.project_name,
            "entity": init.entity,
            "notes": init.notes,
            "group": init.group,
            "tags": init.tags or None,
            "dir": str(self._directory),
            "config": json.loads(_json(settings)),
        }
        self._run: Any = None
        self.place = str(self._directory / "wandb")

    def open(self) -> None:
        """Start the run, offline where it cannot be online."""
        with _importing:
            import wandb
        # Elsewhere wandb makes its folder among the temporary files, and says so to nobody.
        self._directory.mkdir(parents=True, exist_ok=True)
        # A report on wandb itself, where packets get lost, holds up the end by 10 s.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        settings = wandb.Settings(
            silent=True,
            console="off",
            login_timeout=1.0,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1.0,
        )
        if self._mode == "online" and (reason := wandb_obstacle(wandb.setup(settings).settings)):
            self._go_offline(reason)
        if self._mode == "online":
            try:
                self._run = wandb.init(mode="online", settings=settings, **self._arguments)
            except (wandb.Error, OSError) as error:
                self._go_offline(_one_line(error))
                wandb.teardown()  # which holds the id of the run that did not start
        if self._mode == "offline":
            self._run = wandb.init(mode="offline", settings=settings, **self._arguments)
        self.place = str(Path(self._run.dir).parent)
        if self._mode == "online":
            logger.info("wandb: %s", self._run.url)
        else:
            logger.info("wandb: offline run in %s; `wandb sync` with this folder uploads it", self.place)

    def _go_offline(self, reason: str) -> None:
        logger.warning("wandb: %s; the run is logged offline", reason)
        self._mode = "offline"

    def write(self, numbers: Mapping[str, Any], iteration: int) -> None:
        """Log numbers as a step of the run."""
        import wandb

        row: dict[str, Any] = {}
        for name, value in numbers.items():
            if isinstance(value, list):
                self._run.summary[name] = _wandb_graph(value)
            else:
                histogram = isinstance(value, np.ndarray)
                row[name] = wandb.Histogram(np_histogram=np.histogram(value, HISTOGRAM_BINS)) if histogram else value
        self._run.log(row, step=iteration)

    def close(self, exit_code: int) -> None:
        """Finish the run; what is not uploaded in FINISH_TIMEOUT stays in its folder."""
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            logger.warning("wandb: not all is uploaded; `wandb sync %s` does it later", self.place)


def wandb_mode(init: "WandbInitConfig") -> str:
    """Return the mode of a run: that of the settings, unless the environment variable WANDB_MODE keeps it offline."""
    environment = os.environ.get("WANDB_MODE", "")
    return environment if init.mode == "online" and environment in ("offline", "disabled") else init.mode


def wandb_obstacle(settings: Any) -> str | None:
    """Return why a run cannot be logged online, or None: no login, or no answer from the server.

    Parameters
    ----------
    settings : wandb.Settings
        Server and key as wandb takes them from environment and files.
    """
    url = settings.base_url
    server = urlsplit(url).netloc or url
    known = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if not (any(os.environ.get(name) for name in known) or settings.api_key or _netrc_knows(url)):
        return f"no login for {server} (`wandb login`, or the environment variable WANDB_API_KEY)"
    try:
        with urllib.request.urlopen(url, timeout=REACH_TIMEOUT):
            return None
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError, HTTPException) as error:
        return f"{server} does not answer ({_one_line(error)})"


def _netrc_knows(url: str) -> bool:
    """Whether the file in which ``wandb login`` keeps keys has one for a server."""
    default = Path("~/_netrc" if os.name == "nt" else "~/.netrc").expanduser()
    path = Path(os.environ.get("NETRC") or default).expanduser()
    parts = urlsplit(url)
    hosts = {parts.netloc, parts.hostname or ""}
    if parts.hostname in PUBLIC_SERVERS:
        hosts.add(PUBLIC_SERVERS[0])
    try:
        keys = netrc.netrc(str(path))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(keys.authenticators(host) is not None for host in hosts if host)


PUBLIC_SERVERS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Names of the public server of W&B; a key for the first is good for the others."""


def _wandb_graph(tree: list[ModuleRow]) -> Any:
    from wandb.data_types import Graph, Node

    graph = Graph("torch")
    for name, kind, shapes in tree:
        node = graph.add_node(Node(id=name, name=name, class_name=kind, size=shapes))
        parent = graph.nodes_by_id.get(name.rpartition(".")[0] if "." in name else "")
        if parent is not None and parent is not node:
            graph.add_edge(parent, node)
    return graph


# --------------------------------------------------------------------------------------------------
# TensorBoard
# --------------------------------------------------------------------------------------------------


class TensorBoardSink:
    """Event files for TensorBoard.

    Parameters
    ----------
    folder : Path
        For the files.
    settings : mapping
        Configuration of the run, shown as text.
    purge_step : int or None
        For a continued run, the first step that will be logged again.
    """

    name = "tensorboard"

    def __init__(self, folder: Path, settings: Mapping[str, Any], purge_step: int | None) -> None:
        self._folder = folder
        self._settings = settings
        self._purge_step = purge_step
        self._writer: Any = None
        self.place = str(folder)

    def open(self) -> None:
        """Open a new event file."""
        with _importing:
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        if self._purge_step is None:
            self._writer.add_text("settings", f"```\n{_json(self._settings)}\n```", 0)
        logger.info("tensorboard: `tensorboard --logdir %s` shows the curves", self._folder)

    def write(self, numbers: Mapping[str, Any], iteration: int) -> None:
        """Log numbers as scalars."""
        for name, value in numbers.items():
            if isinstance(value, np.ndarray):
                self._writer.add_histogram(name, value, iteration)
            elif isinstance(value, int | float):
                self._writer.add_scalar(name, value, iteration)
        self._writer.flush()  # so that curves are up to date and a killed run loses nothing

    def close(self, exit_code: int) -> None:
        """Close the file."""
        self._writer.close()


# --------------------------------------------------------------------------------------------------
# what there is to see of a model
# --------------------------------------------------------------------------------------------------


def watched_values(model: nn.Module, what: str) -> dict[str, np.ndarray]:
    """Return a model's ``gradients``, ``parameters`` or ``all`` of them by name: a copy of the values that are finite.

    A weight without a finite value, or without a gradient, is left out.
    """
    tensors: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        if what in ("parameters", "all"):
            tensors[f"parameters/{name}"] = parameter.detach()
        if what in ("gradients", "all"):
            tensors[f"gradients/{name}"] = parameter.grad
    values = {name: tensor.double().cpu().numpy() for name, tensor in tensors.items() if tensor is not None}
    finite = {name: array[np.isfinite(array)] for name, array in values.items()}
    return {name: array for name, array in finite.items() if array.size}


def module_tree(model: nn.Module) -> list[ModuleRow]:
    """Return what a model is made of, parents first; the model itself has the empty name."""
    return [
        (name, type(module).__name__, {key: list(p.shape) for key, p in module.named_parameters(recurse=False)})
        for name, module in model.named_modules()
    ]
