"""`farebox demo` as a newcomer meets it: started, tried as printed, stopped, started again, killed."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from proxy.local.processes import is_running
from tests.local.processes import eventually, postmaster

ROOT = Path(__file__).parents[2]
READY = re.compile(r"^Farebox is ready: (\S+)$", re.M)
_, _, HEALTH_CHECK_TEXT = (ROOT / "Dockerfile").read_text().partition("\nHEALTHCHECK ")[2].partition("CMD ")
HEALTH_CHECK = json.loads(HEALTH_CHECK_TEXT.splitlines()[0])
"""What the container's engine would run now and then."""
KEY = re.compile(r"fb_\w+")


def environment(state: Path, port: int) -> dict[str, str]:
    """The test's own, without what would reach the demo from a developer's shell; python3 is the one that runs this."""
    ours = {
        name: value for name, value in os.environ.items() if not re.match("FAREBOX_|DATABASE_URL|.*_proxy$", name, re.I)
    }
    return ours | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "FAREBOX_STATE_DIR": str(state),
        "FAREBOX_PORT": str(port),
        "FAREBOX_METRICS_PORT": "0",
        "FAREBOX_DEMO_TOKEN_SECONDS": "0",
    }


class Demo:
    """A running `farebox demo`. ``below``: started by a shell, as by make, so that the shell can be killed."""

    def __init__(self, state: Path, port: int, *options: str, below: bool = False) -> None:
        self.state = state
        command = [sys.executable, "-m", "proxy.cli", "demo", *options]
        if below:
            command = ["sh", "-c", '"$@" --with-parent; exit', "sh", *command]
        self.log = (state.parent / "log").open("a+")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(state, port), stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.text = ""

    def read(self) -> None:
        """Wait for what it prints when it is ready."""
        assert self.process.stdout is not None
        while not self.text.endswith("\nEND\n"):
            line = self.process.stdout.readline()
            if not line:
                self.log.seek(0)
                pytest.fail(f"the demo ended with {self.process.wait()}: {self.log.read()}")
            self.text += line

    @property
    def key(self) -> str:
        found = KEY.search(self.text)
        assert found
        return found[0]

    @property
    def server(self) -> int:
        return postmaster(self.state / "postgres/data")

    def pasted(self, heading: str) -> str:
        """What the commands under a heading print, pasted into a shell as they are."""
        block = re.search(rf"^# {heading}.*?\n(.*?)(?=^# |\Z)", self.text, re.M | re.S)
        assert block
        ran = subprocess.run(
            ["sh"],
            input=block[1],
            env=environment(self.state, 0),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        """End it, whatever became of it."""
        self.process.kill()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()


@pytest.fixture
def state(state_path: Path) -> Path:
    return state_path


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


@pytest.fixture
def start(state: Path, port: int) -> Iterator[Callable[..., Demo]]:
    """Starts the demo; what a test leaves running is ended."""
    with contextlib.ExitStack() as stack:

        def start_one(*options: str, below: bool = False) -> Demo:
            demo = Demo(state, port, *options, below=below)
            stack.callback(demo.close)
            demo.read()
            return demo

        yield start_one


def command(state: Path, port: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "proxy.cli", *arguments],
        cwd=ROOT,
        env=environment(state, port),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def balance(state: Path, port: int) -> Decimal:
    shown = command(state, port, "accounts", "show", "demo", "--json")
    assert shown.returncode == 0, shown.stderr
    account = json.loads(shown.stdout)
    assert Decimal(account["held"]) == 0
    return Decimal(account["balance"])


def open_port(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_newcomer_tries_what_is_printed(start: Callable[..., Demo], state: Path, port: int) -> None:
    demo = start()
    ready = READY.search(demo.text)
    assert ready
    assert ready[1] == f"http://127.0.0.1:{port}/v1"

    streamed = demo.pasted("Ask")
    assert streamed.rstrip().endswith("data: [DONE]")
    assert "from the demo upstream" in demo.pasted("The same with the OpenAI SDK")
    left = balance(state, port)
    assert 990 < left < 1000, "the CLI in another terminal sees what the two answers cost"
    assert Decimal(json.loads(demo.pasted("See the credits fall"))["balance"]) == left

    assert subprocess.run(HEALTH_CHECK, env=environment(state, port), check=False).returncode == 0

    second = command(state, port, "demo")
    assert second.returncode == 1
    assert f"http://127.0.0.1:{port}/v1 (pid {demo.process.pid}, since 20" in second.stderr
    elsewhere = command(state.parent / "other", port, "demo")
    assert elsewhere.returncode == 1
    assert f"Port {port} of 127.0.0.1 is in use" in elsewhere.stderr
    assert "FAREBOX_PORT=" in elsewhere.stderr

    server = demo.server
    assert demo.end(signal.SIGTERM) == 0
    assert not is_running(server)
    unhealthy = subprocess.run(HEALTH_CHECK, env=environment(state, port), capture_output=True, check=False)
    assert unhealthy.returncode == 1

    again = start()
    assert again.key == demo.key
    assert balance(state, port) == left, "the second start granted something"
    assert again.end(signal.SIGINT) == 0
    assert balance(state, port) == left, "the CLI starts the database where nobody runs it"


def test_kill_9_leaves_nothing_running(start: Callable[..., Demo], port: int) -> None:
    demo = start()
    server = demo.server
    demo.end(signal.SIGKILL)
    assert eventually(lambda: not is_running(server) and not open_port(port), seconds=2)


def test_the_death_of_make_ends_it_too(start: Callable[..., Demo], port: int) -> None:
    demo = start(below=True)
    server = demo.server
    demo.process.send_signal(signal.SIGKILL)
    assert eventually(lambda: not is_running(server) and not open_port(port), seconds=5)


def test_a_provider_key_in_the_shell_is_no_consent(start: Callable[..., Demo], monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the demo still answers from its own upstream, whose text nobody else writes."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-lying-around")
    demo = start()
    assert "from the demo upstream" in demo.pasted("The same with the OpenAI SDK")
    assert demo.end(signal.SIGTERM) == 0


def test_real_upstreams_without_a_key_are_named_and_never_replaced(
    start: Callable[..., Demo], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    demo = start("--real-upstreams")
    assert "No model can be served yet: the environment variable OPENAI_API_KEY is not set" in demo.text
    answer = json.loads(demo.pasted("Ask"))
    assert answer["error"]["code"] == "upstream_key_missing"
    assert "OPENAI_API_KEY" in answer["error"]["message"]
    assert demo.end(signal.SIGTERM) == 0
