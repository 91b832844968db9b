"""The fault matrix: every request of a save and of a load, by two ranks, failed in every way, through a real server.

Law: what a case must come to is decided before it runs, by what is done to which request, and by nothing else.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Listener
from pathlib import Path
from random import Random
from typing import Any, Self

import fault_ranks
from cloudckpt.testing import faults
from cloudckpt.testing.faults import Fault
from cloudckpt.testing.proxy import FaultProxy, Request, fault_proxy

RANKS = 2
PATIENCE_S = 180
"""For the answer of a rank; far more than any case takes."""

SAFE, EITHER, FAILS = "must succeed", "may fail", "must fail"

VERIFIES = {"seaweedfs", "localstack", "rgw"}
"""Servers that refuse a body which does not match its CRC32C."""


@dataclass(frozen=True, slots=True)
class Place:
    """A request, whichever number it has: the n-th of its kind by a rank."""

    rank: int
    operation: str
    index: int
    key: str
    """``manifest.json``, ``shards`` or empty."""
    nbytes: int
    has_reply_body: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is done while a fault waits: a save or a load of a workload."""

    do: str
    workload: str
    overwrite: bool = False
    probes: bool = False
    fails_first: bool = False
    """A part of the last rank is refused: what is broken then is its clean-up."""

    @property
    def name(self) -> str:
        more = [n for n in ("overwrite", "probes", "fails_first") if getattr(self, n)]
        return " ".join([self.do, self.workload, *more]).replace("fails_first", "that fails")


WORKS = (
    Work(do="save", workload="parts"),
    Work(do="save", workload="frames"),
    Work(do="save", workload="small", probes=True),
    Work(do="save", workload="small", overwrite=True),
    Work(do="save", workload="parts", fails_first=True),
    Work(do="load", workload="parts"),
    Work(do="load", workload="frames"),
    Work(do="load", workload="small"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault, or two, in one piece of work, and what it must come to."""

    work: Work
    strikes: tuple[tuple[Place, Fault], ...]
    expected: str
    may_be_damaged: bool = False
    """A body is flipped on its way to a server that verifies none."""

    @property
    def name(self) -> str:
        struck = (f"{f.name} at {p.operation} {p.index} of rank {p.rank} ({p.key})" for p, f in self.strikes)
        return f"{self.work.name}: {', '.join(struck)}"


TRANSIENT = (
    faults.drop(),
    faults.lose_reply(),
    faults.stall(),
    faults.delay(0.05),
    faults.slow_down(),
    faults.answer(500, "InternalError"),
    faults.answer(500, "InternalError", is_carried_out=True),
    faults.answer(400, "RequestTimeout"),
)
OF_REPLIES = (faults.reset_reply(), faults.truncate(), faults.stall_reply(), faults.throttle(100e6))
OF_BODIES = (faults.reset_request(), faults.throttle(100e6))
REFUSALS = (faults.expired(), faults.answer(403, "AccessDenied"))


def strikes_at(place: Place, server: str) -> list[tuple[Fault, str]]:
    """What can be done to a request, and what a save or load that meets it must come to."""
    found = [(f, SAFE) for f in TRANSIENT]
    if place.has_reply_body:
        found += ((f, SAFE) for f in OF_REPLIES)
        found.append((faults.flip(), EITHER))
    if place.nbytes:
        found += ((f, SAFE) for f in OF_BODIES)
        if place.operation in {"PutObject", "UploadPart"}:
            found.append((faults.flip(), SAFE if server in VERIFIES else EITHER))
    if place.operation == "CompleteMultipartUpload":
        found.append((faults.answer(200, "InternalError"), SAFE))
        found.append((faults.answer(200, "InternalError", is_carried_out=True), SAFE))
    if place.operation == "PutObject" and place.key == "manifest.json":
        found.append((faults.conflict(), SAFE))
        found.append((replace(faults.conflict(), is_passed_on=True), SAFE))
    found += ((f, EITHER) for f in REFUSALS)
    return list({f.name: (f, e) for f, e in reversed(found)}.values())[::-1]


def cases_of(work: Work, places: list[Place], server: str) -> list[Case]:
    """Every request of the work, failed in every way.

    But for one: LocalStack loses the bytes of the object that it has when it refuses a damaged one in its place.
    """
    return [
        Case(
            work=work,
            strikes=((place, fault),),
            expected=FAILS if work.fails_first else expected,
            may_be_damaged=fault.flips and bool(place.nbytes) and server not in VERIFIES,
        )
        for place in places
        for fault, expected in strikes_at(place, server)
        if not (server == "localstack" and work.overwrite and fault.flips and place.key == "manifest.json")
    ]


def pairs_of(cases: list[Case], count: int, random: Random) -> list[Case]:
    """Two faults at two requests of one piece of work, drawn by chance."""
    by_work: dict[Work, list[Case]] = {}
    for case in cases:
        by_work.setdefault(case.work, []).append(case)
    found = []
    while len(found) < count:
        first, second = random.sample(by_work[random.choice(list(by_work))], 2)
        if first.strikes[0][0] == second.strikes[0][0]:
            continue
        worst = max((first.expected, second.expected), key=[SAFE, EITHER, FAILS].index)
        found.append(
            Case(
                work=first.work,
                strikes=first.strikes + second.strikes,
                expected=worst,
                may_be_damaged=first.may_be_damaged or second.may_be_damaged,
            )
        )
    return found


def wrong_with(case: Case, facts: list[dict[str, Any]]) -> list[str]:
    """What should not have come of a case; nothing, where all is well."""
    problems = []
    errors = [f["error"] for f in facts]
    failed = any(errors)
    if case.expected == SAFE and failed:
        problems.append(f"failed: {errors}")
    if case.expected == FAILS and not failed:
        problems.append("did not fail")
    for error in errors:
        for module, name, text in (error or {}).values():
            if module != "cloudckpt.errors":
                problems.append(f"{module}.{name} is no error of ours: {text}")
            elif "s3://" not in text and "shards/" not in text and "manifest" not in text:
                problems.append(f"the error names nothing: {name}: {text}")
    if bool(errors[0]) != bool(errors[1]) and case.work.do == "save":
        problems.append(f"one rank failed and the other did not: {errors}")
    if not all(f["is_budget_whole"] for f in facts):
        problems.append("a budget was not whole")
    if case.work.do == "load":
        if not failed and not all(f["is_equal"] for f in facts):
            problems.append("loaded without an error, and not equal")
        return problems
    is_unknown = any(name == "CommitUnknownError" for e in errors for _, name, _ in (e or {}).values())
    there = facts[0]  # the first rank looks, past the proxy
    has_landed = there["is_committed"] and not there["is_old"]
    if there["damage"] and case.may_be_damaged:
        return problems  # the server took a damaged body for good, and loads say so
    if there["is_committed"] and not there["is_equal"] and not there["is_old"]:
        problems.append(f"committed, and not equal to what was saved: {there['damage']}")
    if failed and has_landed and not is_unknown:
        problems.append("failed, and committed")
    if not failed and not has_landed:
        problems.append("succeeded, and nothing is committed")
    if case.work.overwrite and not there["is_committed"]:
        problems.append("what was to be overwritten is gone")
    if there["uploads"]:
        problems.append(f"{len(there['uploads'])} uploads are open: {there['uploads']}")
    return problems


class Pair:
    """Two ranks of torchrun."""

    def __init__(self) -> None:
        key = secrets.token_bytes(16)
        self._listener = Listener(("127.0.0.1", 0), authkey=key)
        host, port = self._listener.address
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        self._process = subprocess.Popen(
            [*command, str(Path(fault_ranks.__file__)), f"{host}:{port}", key.hex()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._connections: dict[int, Any] = {}
        self.pids: dict[int, int] = {}

    def start(self) -> None:
        """Waits until both ranks are there."""
        while len(self._connections) < RANKS:
            connection = self._listener.accept()
            rank, pid = connection.recv()
            self._connections[rank], self.pids[rank] = connection, pid

    def run(self, case: dict[str, Any]) -> list[Any]:
        """What each rank found. Raises EOFError where a rank died, TimeoutError where one does not answer."""
        for rank in range(RANKS):
            self._connections[rank].send(case)
        found = []
        for rank in range(RANKS):
            if not self._connections[rank].poll(PATIENCE_S):
                raise TimeoutError(f"rank {rank} does not answer: {case}")
            found.append(self._connections[rank].recv())
        return found

    def close(self) -> None:
        """Ends the ranks."""
        for connection in self._connections.values():
            try:
                connection.send(None)
            except OSError:
                continue
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for connection in self._connections.values():
            connection.close()
        self._listener.close()


@dataclass
class Tally:
    """What a run of the matrix came to."""

    server: str
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    unstruck: list[str] = field(default_factory=list)
    wrong: list[tuple[str, list[str]]] = field(default_factory=list)
    cases: int = 0
    seconds: float = 0

    def as_json(self) -> str:
        """A line for the record."""
        return json.dumps(
            {
                "server": self.server,
                "cases": self.cases,
                "faults": sum(self.faults.values()),
                "wrong": len(self.wrong),
                "by_fault": dict(sorted(self.faults.items())),
                "by_outcome": dict(sorted(self.outcomes.items())),
                "seconds": round(self.seconds),
            }
        )


class Matrix:
    """Runs cases with two long-lived ranks, each behind a proxy of its own."""

    def __init__(self, server: Any, bucket: str, s3: dict[str, Any]) -> None:
        self._server, self._bucket, self._s3 = server, bucket, s3
        self._stack = ExitStack()
        self._root = f"s3://{bucket}/{secrets.token_hex(6)}"
        self._seed = 1
        self._loadable: dict[str, tuple[str, int]] = {}
        self.tally = Tally(server.name)

    def __enter__(self) -> Self:
        self.proxies: list[FaultProxy] = [
            self._stack.enter_context(fault_proxy(self._server.endpoint_url)) for _ in range(RANKS)
        ]
        self._pair = Pair()
        self._next: Pair | None = None
        self._stack.callback(self._close)
        self._pair.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _close(self) -> None:
        for pair in (self._pair, self._next):
            if pair is not None:
                pair.close()

    def cases(self, works: tuple[Work, ...] = WORKS) -> list[Case]:
        """All cases with one fault: the works are run once to see their requests."""
        return [case for work in works for case in cases_of(work, self.places(work), self._server.name)]

    def places(self, work: Work) -> list[Place]:
        """The requests of a work, from a run in which none is broken."""
        self._run(work, ())
        found, seen = [], Counter[tuple[int, str]]()
        for rank, proxy in enumerate(self.proxies):
            for request in proxy.requests:
                where = rank, request.operation
                if request.fault is None:
                    key = "manifest.json" if request.key.endswith("manifest.json") else "shards" * bool(request.key)
                    has_body = request.method == "GET" or request.operation == "CompleteMultipartUpload"
                    found.append(Place(*where, seen[where], key, request.nbytes, has_body))
                seen[where] += 1
        return found

    def run(self, cases: list[Case], *, stop_at: float = float("inf")) -> Tally:
        """Runs cases, as many as there is time for, and keeps count."""
        began = time.monotonic()
        for case in cases:
            if time.monotonic() > stop_at:
                break
            try:
                facts = self._run(case.work, case.strikes)
            except (EOFError, TimeoutError) as e:
                e.add_note(case.name)
                raise
            struck = [r.fault.name for p in self.proxies for r in p.requests if r.fault is not None]
            self.tally.cases += 1
            self.tally.faults.update(struck)
            failed = any(f["error"] for f in facts)
            if any(f["damage"] for f in facts):
                self.tally.outcomes["damaged by the server, told by loads"] += 1
            else:
                self.tally.outcomes["failed, nothing there" if failed else "succeeded, whole and equal"] += 1
            if case.strikes[0][1].name not in struck and not case.work.fails_first:
                self.tally.unstruck.append(case.name)
            if problems := wrong_with(case, facts):
                self.tally.wrong.append((case.name, problems))
        self.tally.seconds += time.monotonic() - began
        return self.tally

    def _run(self, work: Work, strikes: tuple[tuple[Place, Fault], ...]) -> list[dict[str, Any]]:
        case = self.case_of(work)
        for proxy in self.proxies:
            proxy.clear()
        for place, fault in strikes:
            self.proxies[place.rank].when(nth(place), fault)
        if work.fails_first:
            self.proxies[-1].when(lambda r: r.operation == "UploadPart", faults.answer(403, "AccessDenied"))
        return self._pair.run(case)

    def kill(self, work: Work, place: Place, *, is_carried_out: bool) -> dict[str, Any]:
        """Kills the rank that makes a request, before the server gets it or when it has answered; others come then.

        Returns:
            What the ranks had been told.
        """
        case = self.case_of(work)
        pid = self._pair.pids[place.rank]
        self._stand_by()
        for proxy in self.proxies:
            proxy.clear()
        strike = faults.call(lambda: os.kill(pid, signal.SIGKILL), is_carried_out=is_carried_out)
        if not is_carried_out:  # what the dead had sent by then does not arrive either
            strike = replace(strike, is_passed_on=False, reply_share=0, ending="reset")
        self.proxies[place.rank].when(nth(place), strike)
        try:
            self._pair.run(case)
        except (EOFError, ConnectionError):
            self._pair.close()
        else:
            raise AssertionError(f"the rank that makes {place} was not killed")
        self._pair, self._next = self._next, None
        self._pair.start()
        for proxy in self.proxies:
            proxy.clear()
        return case

    def again(self, case: dict[str, Any]) -> list[dict[str, Any]]:
        """Runs a case once more, with nothing broken."""
        return self._pair.run(case)

    def strike(self, work: Work, place: Place, fault: Fault, **patience: float) -> list[dict[str, Any]]:
        """Runs a work with one fault, by ranks of more patience."""
        case = self.case_of(work) | {"patience": patience}
        for proxy in self.proxies:
            proxy.clear()
        self.proxies[place.rank].when(nth(place), fault)
        return self._pair.run(case)

    def run_at(self, url: str, case: Case) -> tuple[list[dict[str, Any]], int]:
        """Runs a case at a URL; returns what the ranks found, and the seed of what they saved."""
        told = self.case_of(case.work) | {"url": url, "measures": True}
        for proxy in self.proxies:
            proxy.clear()
        for place, fault in case.strikes:
            self.proxies[place.rank].when(nth(place), fault)
        return self._pair.run(told), told["seed"]

    def _stand_by(self) -> None:
        """Begins to start the next pair, which takes seconds."""
        if self._next is None:
            self._next = Pair()

    def case_of(self, work: Work) -> dict[str, Any]:
        """What the ranks are told."""
        self._seed += 2
        url, seed = f"{self._root}/{self._seed}", self._seed
        told = {
            "do": work.do,
            "workload": work.workload,
            "overwrite": work.overwrite,
            "probes": work.probes,
            "s3": self._s3,
            "bucket": self._bucket,
            "proxies": [proxy.url for proxy in self.proxies],
        }
        if work.do == "load":
            if work.workload not in self._loadable:
                self._loadable[work.workload] = url, seed
                self._pair.run(told | {"do": "prepare", "url": url, "seed": seed})
            url, seed = self._loadable[work.workload]
        elif work.overwrite:
            self._pair.run(told | {"do": "prepare", "url": url, "seed": seed - 1})
        return told | {"url": url, "seed": seed}


def nth(place: Place) -> Any:
    """Claims the n-th request of a kind."""
    count = -1

    def claim(request: Request) -> bool:
        nonlocal count
        count += request.operation == place.operation
        return request.operation == place.operation and count == place.index

    return claim


def sample(cases: list[Case], count: int, seed: int) -> list[Case]:
    """So many cases: all with one fault, or some of them; and pairs, where there is room for more.

    Of some, few stall: each costs a timeout.
    """
    random = Random(seed)
    if len(cases) <= count:
        return cases + pairs_of(cases, count - len(cases), random)
    quick, slow = ([c for c in cases if (c.strikes[0][1].ending == "stall") == stalls] for stalls in (False, True))
    few = random.sample(slow, min(len(slow), max(count // 30, count - len(quick))))
    return few + random.sample(quick, count - len(few))


def quiet(work: Work) -> Case:
    """A case in which nothing is broken."""
    return Case(work=work, strikes=(), expected=SAFE)
