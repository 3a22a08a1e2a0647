"""A directory as one host of a cluster sees it over the network: late, out of order, slowly, or with errors of the disk.

    python tests/disks/shared_disk.py BACKING MOUNT --delay 1        # stays in the foreground; ends when MOUNT is unmounted

As on NFS: names and attributes are believed for up to `delay` seconds after they were seen, a missing name too; each new file of
another host is seen after a delay of its own, so that a later file may show before an earlier one; opening a file that is seen
gives its latest content; locks hold on one host only. Two mounts of one directory are two hosts.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any

import mfusepy as fuse

FAILS = ("write", "fsync", "rename", "link", "unlink", "read")


class SharedDisk(fuse.Operations):  # type: ignore[misc]
    """File operations on the backing directory, as one host sees them."""

    use_ns = True

    def __init__(self, backing: Path, delay: float, slow: float, failing: float, seed: int) -> None:
        self.backing, self.delay, self.slow, self.failing = backing, delay, slow, failing
        self.chance, self.guard = random.Random(seed), RLock()
        self.seen: dict[str, tuple[float, Any]] = {}
        """What was last seen at a path, attributes or the number of an error, and until when that is believed."""
        self.visible: dict[tuple[str, int], float] = {}
        """When a file of another host shows here, by path and inode."""
        self.own: set[tuple[str, int]] = set()
        """What this host made."""

    def _meet_the_disk(self, operation: str) -> None:
        time.sleep(self.slow)
        if operation in FAILS and self.chance.random() < self.failing:
            raise fuse.FuseOSError(errno.EIO)

    def _at(self, path: str) -> str:
        return f"{self.backing}{path}"

    def _forget(self, *paths: str) -> None:
        """Ask the server next time: this host has changed these paths, or tried to."""
        with self.guard:
            for path in paths:
                self.seen[path] = (0.0, self.seen.get(path, (0.0, None))[1])

    def _made(self, path: str) -> None:
        with self.guard:
            state = os.lstat(self._at(path))
            self.own.add((path, state.st_ino))
            self.seen[path] = (0.0, _attributes(state))
            self._forget(os.path.dirname(path))

    def _learn(self, path: str) -> None:
        """The server has said that there is such a file."""
        with self.guard, suppress(FileNotFoundError):
            self.visible[path, os.lstat(self._at(path)).st_ino] = 0.0
            self._forget(path)

    def _shows(self, path: str, state: os.stat_result) -> bool:
        """Whether this host sees a file by now: its own and old ones at once, a new one of another host after a delay."""
        file = (path, state.st_ino)
        if path == "/" or file in self.own:
            return True
        is_old = time.time() - state.st_ctime > self.delay
        first = self.visible.setdefault(file, 0.0 if is_old else time.monotonic() + self.chance.uniform(0, self.delay))
        return time.monotonic() >= first

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        self._meet_the_disk("getattr")
        with self.guard:
            until, found = self.seen.get(path, (0.0, None))
            if time.monotonic() >= until:
                try:
                    state = os.lstat(self._at(path))
                    if self._shows(path, state):
                        found = _attributes(state)
                    elif not isinstance(found, dict):  # else it has replaced another file, whose attributes are shown meanwhile
                        found = errno.ENOENT
                except OSError as error:
                    found = error.errno
                self.seen[path] = (time.monotonic() + self.chance.uniform(0, self.delay), found)
        if isinstance(found, dict):
            return found
        raise fuse.FuseOSError(found)

    def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, Any], int]]:
        shown: list[tuple[str, dict[str, Any], int]] = [(".", {}, 0), ("..", {}, 0)]
        for name in os.listdir(self._at(path)):
            with suppress(fuse.FuseOSError):
                shown.append((name, self.getattr(f"{path.rstrip('/')}/{name}"), 0))
        return shown

    def open(self, path: str, flags: int) -> int:
        self._meet_the_disk("open")
        self._learn(path)  # opening asks the server
        return os.open(self._at(path), flags)

    def create(self, path: str, mode: int, flags: int) -> int:
        try:
            made = os.open(self._at(path), flags | os.O_CREAT, mode)
        except FileExistsError:
            self._learn(path)
            raise
        self._made(path)
        return made

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._meet_the_disk("read")
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._meet_the_disk("write")
        self._forget(path)
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        self._forget(path)
        os.truncate(self._at(path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._meet_the_disk("fsync")
        os.fsync(fh)
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def _change(self, change: Callable[..., Any], *paths: str, made: str = "") -> int:
        self._meet_the_disk(change.__name__)
        try:
            change(*(self._at(path) for path in paths))
        except FileExistsError:
            self._learn(paths[-1])
            raise
        self._forget(*paths, *(os.path.dirname(path) for path in paths))
        if made:
            self._made(made)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        return self._change(lambda p: os.mkdir(p, mode), path, made=path)

    def rename(self, old: str, new: str) -> int:
        return self._change(os.rename, old, new, made=new)

    def link(self, target: str, source: str) -> int:
        return self._change(os.link, source, target, made=target)

    def symlink(self, target: str, source: str) -> int:
        os.symlink(source, self._at(target))
        self._made(target)
        return 0

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def unlink(self, path: str) -> int:
        return self._change(os.unlink, path)

    def rmdir(self, path: str) -> int:
        return self._change(os.rmdir, path)

    def chmod(self, path: str, mode: int) -> int:
        return self._change(lambda p: os.chmod(p, mode), path)

    def chown(self, path: str, uid: int, gid: int) -> int:
        return self._change(lambda p: os.chown(p, uid, gid), path)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        return self._change(lambda p: os.utime(p, ns=times) if times else os.utime(p), path)

    def statfs(self, path: str) -> dict[str, int]:
        state = os.statvfs(self._at(path))
        return {name: getattr(state, name) for name in dir(state) if name.startswith("f_") and name not in ("f_flag", "f_fsid")}


def _attributes(state: os.stat_result) -> dict[str, Any]:
    plain = {name: getattr(state, name) for name in ("st_ino", "st_mode", "st_nlink", "st_size", "st_uid", "st_gid")}
    return plain | {f"st_{name}time": getattr(state, f"st_{name}time_ns") for name in "acm"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backing", type=Path)
    parser.add_argument("mount", type=Path)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that each operation takes longer")
    parser.add_argument("--failing", type=float, default=0.0, help="share of writes, flushes, renames, ... that end with EIO")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    disk = SharedDisk(options.backing, options.delay, options.slow, options.failing, options.seed)
    # The kernel keeps nothing: what is late is decided here.
    fuse.FUSE(
        disk, str(options.mount), foreground=True, use_ino=True, attr_timeout=0, entry_timeout=0, negative_timeout=0,
        fsname="ksweep-test",
    )  # fmt: skip
