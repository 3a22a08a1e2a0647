"""Whether a process lives: who it is by its kernel's own account, and one pure function of what can be seen of it.

The wall clock plays no part: it may be set while a rank runs, and `btime` in /proc/stat, from which psutil computes when a
process began, moves with it. Where nothing is proven the life of a process is unknown, and `rank_records.is_alive` counts its
silence.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

import psutil

Life = Literal["alive", "dead", "unknown"]
Lock = Literal["", "held", "free"]
SAME_START_SECONDS = 1.0
"""Two readings of the start of one process differ by less, while nobody sets the clock."""


@dataclass(frozen=True)
class ProcessIdentity:
    """Who a process is. Field names are those of heartbeats, job.json, leases and submissions."""

    pid: int
    host: str
    process_started: float
    """Start by the wall clock (seconds since 1970): all that earlier versions wrote, and all that there is without /proc."""
    boot_id: str = ""
    """Which run of which kernel: containers on one machine share it. Empty without /proc, and in files of earlier versions."""
    namespaces: str = ""
    """The namespaces that the pid and the start are counted in: two containers on one machine differ."""
    start_ticks: int = 0
    """Start in clock ticks since boot: with boot, namespaces and pid it is one process for ever."""


@dataclass(frozen=True)
class TableEntry:
    """The process that has a pid here now."""

    start_ticks: int
    process_started: float


@dataclass(frozen=True, kw_only=True)
class LifeEvidence:
    """All that is known of a process whose life is in question."""

    process: ProcessIdentity
    reader: ProcessIdentity
    """The process that asks."""
    entry: TableEntry | Literal["none", "hidden"] = "hidden"
    """What has the pid in the reader's process table; hidden where the table cannot be read, or hides processes of others."""
    lock: Lock = ""
    """State of the lock that the process holds for as long as it lives; empty where it holds none, or nobody can tell."""


def life_of(evidence: LifeEvidence) -> Life:
    """Return whether a process is alive or dead, if that is proven, and else that it is unknown."""
    process, reader, entry = evidence.process, evidence.reader, evidence.entry
    by_lock: Life = {"held": "alive", "free": "dead", "": "unknown"}[evidence.lock]  # type: ignore[assignment]
    # 1. Another kernel. A host name does not tell a machine that was restarted from another one, and a lock seen free across a
    #    network file system, or held by a node that crashed, proves nothing.
    if process.boot_id and reader.boot_id and process.boot_id != reader.boot_id:
        return "unknown"
    # 2. The same kernel, which keeps its locks itself and frees them with the process.
    if process.boot_id and process.boot_id == reader.boot_id:
        if process.namespaces != reader.namespaces or entry == "hidden":
            return by_lock
        return "alive" if isinstance(entry, TableEntry) and entry.start_ticks == process.start_ticks else "dead"
    # 3. No boot is known: a system without /proc, or a file of an earlier version. Host name and clock have to do.
    if process.host != reader.host or entry == "hidden":
        return "unknown"
    if entry == "none":
        return "dead"
    if abs(entry.process_started - process.process_started) < SAME_START_SECONDS:
        return "alive"
    # Without /proc the clock may have been set since; earlier versions did not allow for that, and hold no lock.
    return "dead" if reader.boot_id else by_lock


def gather_life(process: ProcessIdentity, lock: Path | None = None) -> LifeEvidence:
    """Look a process up; `lock` is the file that it keeps locked, if it does."""
    reader = ProcessIdentity(os.getpid(), socket.gethostname(), 0.0, *_of_kernel())
    elsewhere = process.boot_id != reader.boot_id if process.boot_id and reader.boot_id else process.host != reader.host
    if elsewhere:
        return LifeEvidence(process=process, reader=reader)
    entry = "hidden" if process.namespaces not in ("", reader.namespaces) else _look_up(process.pid)
    # Looking at a lock takes it for a moment: only where the process table does not tell.
    in_sight = bool(process.boot_id and reader.boot_id) and process.namespaces == reader.namespaces and entry != "hidden"
    return LifeEvidence(process=process, reader=reader, entry=entry, lock="" if lock is None or in_sight else lock_state(lock))


def is_in_this_table(process: ProcessIdentity) -> bool:
    """Return whether a process is alive under its pid here, so that a signal to the pid reaches it and no other."""
    evidence = gather_life(process)
    return isinstance(evidence.entry, TableEntry) and life_of(evidence) == "alive"


def identity_of(pid: int) -> ProcessIdentity:
    """Return the identity of this process, or of another one in its namespaces.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    try:
        started = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        if pid != os.getpid():
            raise
        started = 0.0  # /proc is that of another namespace
    # The host's name may change while a process runs; what a process is counted by does not.
    return ProcessIdentity(pid, socket.gethostname(), started, *_of_kernel(), _start_ticks(pid))


def identity_in(record: Mapping[str, Any]) -> ProcessIdentity:
    """Return the identity that a record states; one of an earlier version lacks some fields, one of a later has more."""
    names = {field.name for field in fields(ProcessIdentity)}
    return ProcessIdentity(**{name: value for name, value in record.items() if name in names})


def boot_id() -> str:
    """Return which run of which kernel this is; empty where the kernel does not say."""
    return _of_kernel()[0]


@cache
def _of_kernel() -> tuple[str, str]:
    """Return the boot id and the namespaces of this process; empty where the kernel does not say."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Start ticks are counted in the time namespace (Linux 5.6 and later).
        links = [f"/proc/self/ns/{name}" for name in ("pid", "time")]
        return boot, " ".join(os.readlink(link) for link in links if os.path.lexists(link))
    return "", ""


def _start_ticks(pid: int) -> int:
    """Return when a process began, in clock ticks since boot; 0 without /proc, or if it has ended meanwhile."""
    with suppress(OSError):
        after_name = (
            Path(f"/proc/{'self' if pid == os.getpid() else pid}/stat").read_text().rpartition(")")[2]
        )  # the name may hold spaces and brackets
        return int(after_name.split()[19])
    return 0


def _look_up(pid: int) -> TableEntry | Literal["none", "hidden"]:
    """Return what has a pid in this process's table."""
    try:
        if boot_id() and os.readlink("/proc/self") != str(os.getpid()):
            return "hidden"  # the /proc of another namespace is mounted here
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return "none"
        return TableEntry(_start_ticks(pid), process.create_time())
    except psutil.NoSuchProcess:
        return "hidden" if _belongs_to_another(pid) else "none"
    except (psutil.AccessDenied, OSError):
        return "hidden"


def _belongs_to_another(pid: int) -> bool:
    """Return whether a process of another user has the pid: /proc hides it where it is mounted with hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return False


def hold_lock(path: Path) -> IO[bytes] | None:
    """Lock a file for as long as the returned file stays open, at most as long as this process lives; None where that fails.

    flock as it is: `filelock` has no look at a lock that leaves no trace.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        return file
    return None


def lock_state(path: Path) -> Lock:
    """Return whether somebody holds the lock of a file; nothing is written. Empty where nobody can tell."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two readers do not take one another for the holder
    except BlockingIOError:
        return "held"
    except OSError:
        return ""
    return "free"
