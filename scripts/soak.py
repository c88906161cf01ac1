"""A real server under mixed load for a while: every answer is compared with the one it had when alone.

    python scripts/soak.py --seconds 1800

Formulas of two to six terms and plain requests, streamed or whole, of random priorities; some are abandoned
on the way, some are nonsense, and the KV cache is so small that groups are preempted all the time.  Before
and after, plain requests run by themselves, for their latency.  Then the engine is killed under load.

Prints one JSON line; exits with 1 where an answer differed, something was left behind, memory grew, or a
process looked for another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import openai  # noqa: E402
import psutil  # noqa: E402

from tests.support import server, tiny, workload  # noqa: E402

PLAIN_CLIENTS = 4
PLAIN_TOKENS = 16
GROWTH_MIB = 32
"""Resident memory that a process may gain between the second quarter of the run and its last."""

END_SECONDS = 120
NETWORK = """
import os, sys

HERE = (None, "", "localhost", "0.0.0.0", "::", "::1", os.uname().nodename)

def watch(event, arguments):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    place = arguments[1] if event == "socket.connect" else arguments[0]
    if event == "socket.connect":
        if not isinstance(place, tuple):
            return  # a socket of this machine's file system
        place = place[0]
    host = place.decode(errors="replace") if isinstance(place, bytes) else place
    if host not in HERE and not host.startswith("127."):
        with open(os.environ["MARITH_NETWORK_LOG"], "a") as log:
            log.write(f"{event} {host}\\n")

sys.addaudithook(watch)
"""
"""A module ``sitecustomize`` for the server's processes: writes down which other machines they look for."""


@dataclass
class Task:
    """A request and what it was answered when it was alone."""

    text: str
    max_tokens: int
    body: dict[str, Any]
    answer: str = ""

    def ask(self, client: openai.OpenAI, **more: Any) -> Any:
        asked: dict[str, Any] = dict(
            model="tiny", prompt=self.text, max_tokens=self.max_tokens, temperature=0
        )
        return client.completions.create(**asked, **more)


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="of the mixed load")
    parser.add_argument("--clients", type=int, default=16, help="that ask at the same time")
    parser.add_argument("--tasks", type=int, default=48, help="different requests")
    parser.add_argument("--blocks", type=int, default=48, help="of the KV cache, 32 tokens each")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    return parser.parse_args(arguments)


def tasks(rng: random.Random, number: int) -> list[Task]:
    """Plain requests, a third of all, and formulas, some of them constrained."""
    made = []
    shared = workload.words(rng, 20, 20)
    for i in range(number):
        num_terms = rng.choice([2, 2, 3, 3, 4, 6]) if i % 3 else 0
        job = workload.job(rng, num_terms, shared=shared)
        body: dict[str, Any] = {"ignore_eos": True}
        if job.formula is not None:
            asked = json.loads(job.formula.to_json())
            if rng.random() < 0.15:
                asked["constraints"] = {"forbid": ["e"], "max_backoffs": 400}
            body["vllm_xargs"] = {"marith": json.dumps(asked)}
        made.append(Task(job.text, rng.choice([4, 16, 16, 40, 90]), body))
    return made


@dataclass
class Load:
    """Clients that ask until they are told to stop, and what came of it."""

    url: str
    tasks: list[Task]
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)

    def mixed(self, number: int) -> None:
        """One client."""
        rng, client = random.Random(number), self.client()
        while not self.stop.is_set():
            task = rng.choice(self.tasks)
            kind = rng.choice(["whole", "whole", "streamed", "streamed", "aborted", "refused"])
            try:
                outcome = self._one(client, rng, task, kind)
            except Exception as error:
                outcome = f"failed: {type(error).__name__}"
            with self.lock:
                self.outcomes[outcome] += 1

    def _one(self, client: openai.OpenAI, rng: random.Random, task: Task, kind: str) -> str:
        body = task.body | {"priority": rng.randint(0, 3)}
        if kind == "refused":
            body |= {"vllm_xargs": {"marith": rng.choice(["base - *", "{", "nobody", '{"formula": 3}'])}}
            try:
                task.ask(client, extra_body=body)
            except openai.BadRequestError:
                return kind
            return "not refused"
        if kind == "whole":
            text = task.ask(client, extra_body=body).choices[0].text
        else:
            parts = []
            stream = task.ask(client, extra_body=body, stream=True)
            leave = rng.randint(1, 12) if kind == "aborted" else None
            for chunk in stream:
                parts.append(chunk.choices[0].text)
                if len(parts) == leave:
                    stream.close()
                    break
            text = "".join(parts)
        wanted = task.answer[: len(text)] if kind == "aborted" else task.answer
        if text == wanted:
            return kind
        with self.lock:
            self.wrong.append(f"{task.body}: {text!r} instead of {wanted!r}")
        return "wrong"

    def plain(self, seconds: float) -> list[float]:
        """Milliseconds of plain requests of one length that a few clients ask one after the other."""
        found: list[float] = []

        def run(number: int) -> None:
            rng, client = random.Random(number), self.client()
            plain = [task for task in self.tasks if "vllm_xargs" not in task.body]
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                started = time.monotonic()
                client.completions.create(
                    model="tiny",
                    prompt=rng.choice(plain).text,
                    max_tokens=PLAIN_TOKENS,
                    temperature=0,
                    extra_body={"ignore_eos": True, "priority": 0},
                )
                found.append(1e3 * (time.monotonic() - started))

        with ThreadPoolExecutor(PLAIN_CLIENTS) as pool:
            list(pool.map(run, range(PLAIN_CLIENTS)))
        return found


def metrics(url: str) -> dict[str, float]:
    """Every sample of ours and vLLM's, summed over its labels."""
    with urllib.request.urlopen(f"{url}/metrics") as page:
        text = page.read().decode()
    found: Counter[str] = Counter()
    for name, value in re.findall(r"^(vllm(?:_marith)?:\w+)(?:{.*})? (\S+)$", text, re.MULTILINE):
        found[name] += float(value)
    return found


def left_behind(url: str) -> dict[str, float]:
    """What is not back to nothing a while after the last request."""
    names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
    names += ["vllm_marith:num_groups_running", "vllm_marith:num_groups_waiting"]
    left: dict[str, float] = {}
    for _ in range(60):
        now = metrics(url)
        left = {name: now[name] for name in names if now[name]}
        if not left:
            break
        time.sleep(0.5)
    return left


class Memory:
    """Resident memory of a server's processes, sampled while a load runs."""

    def __init__(self, pid: int) -> None:
        self._processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        self._names = [
            " ".join([str(p.pid), *(Path(word).name for word in p.cmdline()[:2])]).strip()
            for p in self._processes
        ]
        self._samples: list[list[float]] = []
        self._stop = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1):
            self._samples.append([p.memory_info().rss / 2**20 for p in self._processes if p.is_running()])

    def growth(self) -> dict[str, float]:
        """MiB that each process has gained, from the second quarter of the samples to the last."""
        quarter = len(self._samples) // 4
        second, last = self._samples[quarter : 2 * quarter], self._samples[-quarter:]
        means = [[statistics.median(column) for column in zip(*part, strict=True)] for part in (second, last)]
        pairs = zip(self._names, *means, strict=True)
        return {name: round(after - before, 1) for name, before, after in pairs}

    def peak(self) -> float:
        return max(map(sum, self._samples))


def kill_engine(load: Load, pid: int) -> dict[str, Any]:
    """Kills the engine core while clients wait for answers; how long the slowest of them then waits."""
    (engine,) = [
        p for p in psutil.Process(pid).children(recursive=True) if "EngineCore" in "".join(p.cmdline())
    ]
    started = threading.Semaphore(0)

    def ask(formula: str | None) -> str:
        """What becomes of an answer of 400 tokens."""
        terms = {"b": {"system": "So"}}
        body: dict[str, Any] = {"ignore_eos": True}
        if formula:
            body["vllm_xargs"] = {"marith": json.dumps({"formula": formula, "terms": terms})}
        try:
            stream = Task("The value", 400, body).ask(load.client(), extra_body=body, stream=True)
            next(iter(stream))
            started.release()
            for _ in stream:
                pass
        except Exception as error:
            return type(error).__name__
        return "complete"

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, formula) for formula in (None, "base - 0.5*b", "base + b", None)]
        for _ in answers:
            started.acquire(timeout=END_SECONDS)
        killed = time.monotonic()
        engine.kill()
        ends = [answer.result(END_SECONDS) for answer in answers]
    seconds = time.monotonic() - killed
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], END_SECONDS)
    ended = not psutil.pid_exists(pid) or bool(gone) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return {"answers": ends, "seconds": round(seconds, 2), "server_ended": ended}


def latency(found: list[float]) -> dict[str, float]:
    ordered = sorted(found)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    return {"requests": len(found), "p50_ms": round(statistics.median(found), 1), "p95_ms": round(p95, 1)}


def run(asked: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The figures, and what is wrong."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(NETWORK)
    network = folder / "network"
    network.touch()
    os.environ["MARITH_NETWORK_LOG"] = str(network)
    # Otherwise vLLM connects a UDP socket to 8.8.8.8, over which it sends nothing, to learn its own address.
    os.environ["VLLM_HOST_IP"] = "127.0.0.1"
    paths = [str(folder / "site"), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    model, log = tiny.make(folder / "tiny"), folder / "log"
    limits = ["--num-gpu-blocks-override", str(asked.blocks), "--scheduling-policy", "priority"]
    with server.serve_process(model, log, {}, *limits) as (url, pid):
        load = Load(url, tasks(random.Random(asked.seed), asked.tasks))
        for task in load.tasks:
            task.answer = task.ask(load.client(), extra_body=task.body).choices[0].text
        alone = load.plain(max(5, asked.seconds / 20))
        before, memory = metrics(url), Memory(pid)
        started = time.monotonic()
        with memory.watched(), ThreadPoolExecutor(asked.clients + 1) as pool:
            clients = [pool.submit(load.mixed, asked.seed + i) for i in range(asked.clients)]
            beside = pool.submit(load.plain, asked.seconds / 4)
            beside_found = beside.result()
            load.stop.wait(max(0, asked.seconds - (time.monotonic() - started)))
            load.stop.set()
            for client in clients:
                client.result(600)
        seconds = time.monotonic() - started
        left, after = left_behind(url), metrics(url)
        again = load.plain(max(5, asked.seconds / 20))
        failed = after["vllm_marith:requests_failed_total"]
        killed = kill_engine(load, pid)
    gained = {name: after[name] - before[name] for name in after}
    outside = sorted(set(network.read_text().splitlines()))
    growth = memory.growth()
    figures = {
        "seed": asked.seed,
        "seconds": round(seconds),
        "clients": asked.clients + PLAIN_CLIENTS,
        "outcomes": dict(load.outcomes),
        "tokens_per_second": round(gained["vllm:generation_tokens_total"] / seconds),
        "group_preemptions": gained["vllm_marith:group_preemptions_total"],
        "preemptions": gained["vllm:num_preemptions_total"],
        "failed": failed,
        "left_behind": left,
        "growth_mib": growth,
        "peak_mib": round(memory.peak()),
        "plain_alone": latency(alone),
        "plain_beside_the_load": latency(beside_found),
        "plain_afterwards": latency(again),
        "engine_killed": killed,
        "looked_for_outside": outside,
    }
    strange = [name for name in load.outcomes if name not in ("whole", "streamed", "aborted", "refused")]
    wrong = [
        *load.wrong[:3],
        *(f"{name}: {load.outcomes[name]} times" for name in strange),
        *(f"left behind: {name} {value}" for name, value in left.items()),
        *([f"{failed} formulas failed"] if failed else []),
        *(f"memory of {name} grew by {gain} MiB" for name, gain in growth.items() if gain > GROWTH_MIB),
        *(["nothing was preempted"] if not gained["vllm_marith:group_preemptions_total"] else []),
        *(["an answer outlived its engine"] if "complete" in killed["answers"] else []),
        *([] if killed["server_ended"] else ["the server outlived its engine"]),
        *outside,
    ]
    return figures, wrong


def main(arguments: list[str] | None = None) -> int:
    asked = options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        figures, wrong = run(asked, Path(folder))
    for sentence in wrong:
        print(f"soak: {sentence}", file=sys.stderr)
    print(json.dumps({"soak": figures, "wrong": len(wrong)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
