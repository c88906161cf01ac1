"""A Ray cluster of one machine with `marith deploy` on it, and clients that count what becomes of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.support import engines, server

START_SECONDS = 400

TERMS = {"calm": {"system": "Stay calm."}, "loud": {"system": "Shout."}}
FORMULA = json.dumps({"formula": "base + calm - 0.5*loud", "terms": TERMS})
PRESET = "steer"
PROMPTS = [f"The {word} of the list" for word in ("first", "length", "name", "rest", "type", "end")]


@dataclass(frozen=True)
class Job:
    """One request of the load, greedy, so that its answer is known."""

    prompt: str
    kind: str  # plain, formula or preset
    stream: bool
    tokens: int

    def ask(self, client: openai.OpenAI) -> str:
        """The answer's text; raises what the client raises, and AssertionError where it is cut short."""
        options: dict[str, Any] = {"model": PRESET if self.kind == "preset" else "tiny"}
        if self.kind == "formula":
            options["extra_body"] = {"vllm_xargs": {"marith": FORMULA}}
        options |= {"prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0}
        if not self.stream:
            return client.completions.create(**options).choices[0].text
        parts = [
            chunk.choices[0] for chunk in client.completions.create(**options, stream=True) if chunk.choices
        ]
        assert parts, "a stream without anything in it"
        assert parts[-1].finish_reason, "a stream that stopped without saying why, and without an error"
        return "".join(part.text for part in parts)


def jobs(tokens: int) -> list[Job]:
    """Plain requests, formulas and presets, whole and streamed."""
    kinds = ("plain", "formula", "preset")
    return [Job(p, kind, stream, tokens) for p in PROMPTS for kind in kinds for stream in (False, True)]


def presets(folder: Path) -> Path:
    """The folder, with the formula of the load as the preset `PRESET`."""
    (folder / f"{PRESET}.yaml").write_text(FORMULA)  # JSON is YAML
    return folder


def single_process(model: Path, work: Sequence[Job]) -> dict[Job, str]:
    """The answers of an engine in this process."""
    from vllm import SamplingParams

    with engines.engine(model, max_num_seqs=24) as llm:
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=job.tokens,
                extra_args=None if job.kind == "plain" else {"marith": FORMULA},
            )
            for job in work
        ]
        found = llm.generate([job.prompt for job in work], parameters, use_tqdm=False)
    return {job: output.outputs[0].text for job, output in zip(work, found, strict=True)}


@dataclass
class Load:
    """Clients that ask until they are told to stop.

    Attributes:
        outcomes: how often a request had its whole answer (`complete`), an error that the client raised
            (`error`), or neither (`silent`): a wrong or shortened answer that looked like one.
    """

    url: str
    work: Sequence[Job]
    expected: Mapping[Job, str]
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    silent: list[tuple[Job, str]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _client(self, number: int) -> None:
        client = client_of(self.url)
        turn = number
        while not self._stop.is_set():
            job = self.work[turn % len(self.work)]
            turn += 7
            try:
                text = job.ask(client)
            except openai.OpenAIError as error:
                self._count("error", f"{type(error).__name__}: {error}"[:120])
            except Exception as error:
                if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore"):
                    with self._lock:
                        self.silent.append((job, repr(error)))
                    self._count("silent")
                else:  # what the openai client lets through while it reads a stream
                    self._count("error", f"{type(error).__name__}: {error}"[:120])
            else:
                if text != self.expected[job]:
                    with self._lock:
                        self.silent.append((job, text))
                self._count("complete" if text == self.expected[job] else "silent")

    def _count(self, outcome: str, error: str = "") -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            if error:
                self.errors[error] += 1

    @contextmanager
    def running(self, clients: int) -> Iterator[Load]:
        threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(120)
            assert not any(thread.is_alive() for thread in threads), "a client waits for ever"

    def until(self, outcome: str, count: int, seconds: float = 120) -> None:
        """Waits until so many more requests have come to this."""
        before = self.outcomes[outcome]
        wait_for(lambda: self.outcomes[outcome] >= before + count, seconds, f"{count} more {outcome}")


@dataclass(frozen=True)
class Ray:
    """A cluster of this machine.

    Attributes:
        address: of its dashboard.
        process: whose descendants are all of the cluster's processes.
    """

    address: str
    process: psutil.Process

    def find(self, word: str) -> list[psutil.Process]:
        """Its processes with this word in their command line."""
        found = []
        for process in self.process.children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found


@contextmanager
def cluster(log: Path, cpus: int = 4) -> Iterator[Ray]:
    """A Ray cluster of its own."""
    home = tempfile.mkdtemp(prefix="ray")  # sockets lie in it, whose paths have to be short
    dashboard = server.free_port()
    line = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    line += ["--num-cpus", str(cpus), "--num-gpus", "0", "--temp-dir", home, "--node-ip-address", "127.0.0.1"]
    line += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    line += ["--object-store-memory", str(100 << 20)]
    for option in ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"):
        line += [f"--{option}", str(server.free_port())]
    line += ["--ray-client-server-port", str(server.free_port())]
    with log.open("w") as output:
        process = subprocess.Popen(
            line, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{dashboard}"

            def answers() -> bool:
                assert process.poll() is None, f"ray ended:\n{log.read_text()[-2000:]}"
                try:
                    return httpx.get(f"{address}/api/serve/applications/", timeout=5).status_code == 200
                except httpx.HTTPError:
                    return False

            wait_for(answers, START_SECONDS, "Ray's dashboard")
            yield Ray(address, psutil.Process(process.pid))
        finally:
            everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for one in everything:
                with suppress(psutil.NoSuchProcess):
                    one.kill()  # asked to end, Ray's processes take most of a minute
            process.wait()
            psutil.wait_procs(everything, timeout=20)
            shutil.rmtree(home, ignore_errors=True)


def environment() -> dict[str, str]:
    """As of a server, without what a Ray cluster that is there already would say."""
    inherited = {name: value for name, value in server.environment().items() if name != "RAY_ADDRESS"}
    return {**inherited, "VLLM_LOGGING_LEVEL": "WARNING", "RAY_SERVE_LOG_TO_STDERR": "0"}


@dataclass(frozen=True)
class Deployed:
    """A deployment made by the command.

    Attributes:
        ray: where.
        url: of the server.
        model, presets: what it was made with.
    """

    ray: Ray
    url: str
    model: Path
    presets: Path

    def again(self, *options: str) -> str:
        """The command, in this process, for what the attributes say now; what it prints.

        Raises AssertionError with what it prints when it fails.
        """
        from vllm_marith import cli

        line = server.command(self.model, int(self.url.rpartition(":")[2]), {"presets": str(self.presets)})
        arguments = line[line.index("serve") + 1 :]
        output = StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
            command = ["marith", "deploy", "--ray-address", self.ray.address, *options, *arguments]
            patch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        assert not ended.value.code, output.getvalue()
        return output.getvalue()

    def replicas(self) -> list[psutil.Process]:
        """The replicas' processes."""
        return self.ray.find("ray::ServeReplica")

    def engines(self) -> list[psutil.Process]:
        """The engine cores' processes."""
        return self.ray.find("VLLM::EngineCore")


def deploy(ray: Ray, model: Path, presets: Path, *options: str) -> Deployed:
    """`marith deploy`, on a free port."""
    made = Deployed(ray, f"http://127.0.0.1:{server.free_port()}", model, presets)
    made.again(*options)
    return made


def client_of(url: str, **options: Any) -> openai.OpenAI:
    """An unmodified client that asks once."""
    return openai.OpenAI(
        **{"base_url": f"{url}/v1", "api_key": "-", "max_retries": 0, "timeout": 120, **options}
    )


def wait_for(met: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `met`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := met():
            return found
        time.sleep(0.2)
    raise TimeoutError(f"waited {seconds:g} s for {what}")
