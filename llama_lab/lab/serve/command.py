"""`llama-lab serve`: start the server on a port of this machine, and keep it up until Ctrl-C."""

import argparse
import errno
import glob
import importlib.util
import socket
from pathlib import Path

from llama_lab.config.errors import ConfigError
from llama_lab.config.flags import Parser
from llama_lab.config.schema import Problem
from llama_lab.lab.patterns import RUN_HELP, matches
from llama_lab.training.run_folder import named_run, no_run

SCOPE = "this request"
LOOPBACK = ("127.0.0.1", "localhost")
PORT = 8000
NEEDED = ("starlette", "uvicorn")


def run_serve_command(words: list[str]) -> int:
    """Serve runs until Ctrl-C.

    Args:
        words: what follows `serve` on the command line.

    Returns:
        The exit code: 0 ended by Ctrl-C, 2 not understood.

    Raises:
        ConfigError: there is no such run or checkpoint, the port is in use, or the server's packages are missing.
    """
    try:
        asked = _parser().parse_intermixed_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError([("llama-lab serve", f"needs {' and '.join(missing)}: pip install 'llama_lab[serve]'")], scope=SCOPE)
    folders = _named(asked.runs)
    listener = _listen(asked.host, asked.port)
    with listener:
        return _serve(asked, folders, listener)


def _serve(asked: argparse.Namespace, folders: list[Path], listener: socket.socket) -> int:
    import uvicorn

    from llama_lab.lab.serve.app import build_app
    from llama_lab.lab.serve.shelf import Shelf

    shelf = Shelf(folders, loaded=asked.loaded, running=asked.running, device=asked.device, precision=asked.precision)
    port = listener.getsockname()[1]
    is_local = asked.host in LOOPBACK
    hosts = [*LOOPBACK, asked.host] if is_local else ["*"]
    app = build_app(shelf, waiting=asked.waiting, running=asked.running, hosts=hosts)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        limit_concurrency=4 * (asked.waiting + asked.running) + 16,
        timeout_graceful_shutdown=1,
    )
    entries = shelf.entries()
    address = f"http://{asked.host if is_local else socket.gethostname()}:{port}"
    count = f"{len(entries)} checkpoint{'s' if len(entries) > 1 else ''} of {len(folders)} run{'s' if len(folders) > 1 else ''}"
    if not is_local:
        print(f"--host {asked.host}: everyone who reaches this machine can use it; there is no password", flush=True)
    print(f"Serving {count} at {address}/ (Ctrl-C ends it)", flush=True)
    print(
        f'    curl {address}/v1/completions -H \'Content-Type: application/json\' -d \'{{"prompt": "The", "max_tokens": 20}}\'',
        flush=True,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        shelf.close()
    print("Ended")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="llama-lab serve",
        description="Try checkpoints side by side on a local page, and ask them through OpenAI's /v1/completions.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"{RUN_HELP}; or a pattern for several")
    parser.add_argument("--port", type=_port, default=PORT, metavar="N", help=f"default: {PORT}; 0 takes a free one")
    parser.add_argument("--host", default=LOOPBACK[0], help=f"default: {LOOPBACK[0]}, which only this machine reaches")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, mps, or auto for the best there is (default)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="dtype of weights and activations")
    parser.add_argument("--loaded", type=_count, default=4, metavar="N", help="checkpoints in memory at most (default: 4)")
    parser.add_argument("--running", type=_count, default=2, metavar="N", help="checkpoints that compute at once (default: 2)")
    parser.add_argument("--waiting", type=_count, default=16, metavar="N", help="requests that wait at most (default: 16)")
    return parser


def _named(words: list[str]) -> list[Path]:
    """The runs that paths and patterns name, each once.

    Raises:
        ConfigError: a word names none.
    """
    found: dict[Path, None] = {}
    problems: list[Problem] = []
    for word in words:
        try:
            path = named_run(Path(word))
        except ConfigError as error:
            problems += error.problems
            continue
        is_pattern = glob.has_magic(word) and not path.exists()
        paths = matches(word) if is_pattern else [path]
        runs = [path for path in paths if (path / "config.yaml").is_file()]
        if not runs:
            problems.append((word, "matches no run; name a run's folder, outputs/<name>/<run id>" if is_pattern else no_run(path)))
        found |= dict.fromkeys(runs)
    if problems:
        raise ConfigError(problems, scope=SCOPE)
    return list(found)


def _listen(host: str, port: int) -> socket.socket:
    """The port, held.

    Raises:
        ConfigError: another program has it, or this machine has no such address.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
        return listener
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            rule = f"is in use by another program; try --port {port + 1 if port < 65535 else PORT}, or --port 0 for a free one"
            raise ConfigError([(f"--port {port}", rule)], scope=SCOPE) from None
        if error.errno == errno.EACCES:
            rule = f"may not be used by you; try --port {PORT}"
            raise ConfigError([(f"--port {port}", rule)], scope=SCOPE) from None
        rule = f"is no address of this machine ({error.strerror or error}); try {LOOPBACK[0]}"
        raise ConfigError([(f"--host {host}", rule)], scope=SCOPE) from None


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; try {PORT}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; try 4")
    return int(text)
