"""A file system that fails on request: EIO, ENOSPC, or no answer at all; for tests on Linux with the right to mount.

It passes a folder through by the kernel's FUSE protocol (linux/fuse.h, version 7.31), spoken over /dev/fuse by one
process of the standard library: no libfuse is needed. The errors are those that the kernel gives to a system call, so
what writes by whatever library meets them. Two names cannot be exchanged (renameat2). Stopped by SIGSTOP, the process
leaves every access waiting, as a file server that is gone does. `python fuse.py BEHIND MOUNTED` serves until its
standard input closes.
"""

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HEADER, ANSWER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
ATTRIBUTES, CHANGES = struct.Struct("<6Q10I"), struct.Struct("<II6Q8I")
MAX_WRITE = 1 << 17
DEVICE = "/dev/fuse"
DETACH = 2
UNANSWERED = (2, 36, 42)
"""FORGET, INTERRUPT and BATCH_FORGET, to which the kernel expects no answer."""
MODE, SIZE, ACCESSED, MODIFIED, ACCESSED_NOW, MODIFIED_NOW = 1, 8, 16, 32, 128, 256
"""Bits of the attributes that SETATTR changes."""
LIBC = ctypes.CDLL(None, use_errno=True)


class Fuse:
    """The serving side: files by node number, and the fault that was asked for."""

    def __init__(self, behind: str, device: int) -> None:
        self.device, self.behind = device, behind
        self.paths, self.numbers, self.last = {1: ""}, {"": 1}, 1
        self.counts: dict[str, int] = {}
        self.fault: dict[str, Any] = {}
        self.hits = 0

    def command(self, line: str) -> str:
        """Sets the fault, or {} for none, and forgets what was counted; returns the counts until then."""
        answer = json.dumps({"counts": self.counts, "hits": self.hits})
        self.counts, self.hits, self.fault = {}, 0, json.loads(line)
        return answer

    def check(self, kind: str) -> None:
        """Counts an operation, and raises the fault where this is the one."""
        count = self.counts[kind] = self.counts.get(kind, 0) + 1
        fault = self.fault
        if kind == fault.get("kind") and (count == fault["number"] or (fault["stays"] and count > fault["number"])):
            self.hits += 1
            raise OSError(fault["error"], "")

    def path(self, node: int, name: bytes = b"") -> str:
        """The path behind a node, or behind a name in it."""
        return os.path.join(self.behind, self.relative(node, name))

    def relative(self, node: int, name: bytes = b"") -> str:
        """The same below the folder that is passed through."""
        below = os.fsdecode(name.split(b"\0")[0])
        return os.path.join(self.paths[node], below) if below else self.paths[node]

    def attributes(self, where: str | int) -> bytes:
        """What stat says of a path or an open file."""
        of = os.lstat(where) if isinstance(where, str) else os.fstat(where)
        times = (of.st_atime_ns, of.st_mtime_ns, of.st_ctime_ns)
        whole, parts = [time // 10**9 for time in times], [time % 10**9 for time in times]
        fixed = (of.st_mode, of.st_nlink, of.st_uid, of.st_gid, of.st_rdev, 4096, 0)
        return ATTRIBUTES.pack(of.st_ino, of.st_size, of.st_blocks, *whole, *parts, *fixed)

    def entry(self, node: int, name: bytes) -> bytes:
        """A node for a name, new ones numbered; nothing is cached by the kernel."""
        found, relative = self.attributes(self.path(node, name)), self.relative(node, name)
        if (number := self.numbers.get(relative)) is None:
            number = self.last = self.last + 1
            self.numbers[relative], self.paths[number] = number, relative
        return struct.pack("<4Q2I", number, 0, 0, 0, 0, 0) + found

    def moved(self, old: str, new: str) -> None:
        """Nodes of a renamed path, and of all below it, get their new paths."""
        self.numbers.pop(new, None)
        for number, path in self.paths.items():
            if path == old or path.startswith(f"{old}/"):
                self.numbers.pop(path, None)
                self.paths[number] = new + path[len(old) :]
                self.numbers[self.paths[number]] = number

    def lookup(self, node: int, body: bytes) -> bytes:
        return self.entry(node, body)

    def getattr(self, node: int, body: bytes) -> bytes:
        flags, _, handle = struct.unpack_from("<IIQ", body)
        return struct.pack("<QII", 0, 0, 0) + self.attributes(handle if flags & 1 else self.path(node))

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, _, accessed, modified, _, a_parts, m_parts, _, mode, *_ = CHANGES.unpack_from(body)
        path = self.path(node)
        if valid & MODE:
            os.chmod(path, stat.S_IMODE(mode))
        if valid & SIZE:
            self.check("write")
            os.truncate(path, size)
        if valid & (ACCESSED | MODIFIED):
            of = os.stat(path)
            times = [of.st_atime_ns, of.st_mtime_ns]
            if valid & ACCESSED and not valid & ACCESSED_NOW:
                times[0] = accessed * 10**9 + a_parts
            if valid & MODIFIED and not valid & MODIFIED_NOW:
                times[1] = modified * 10**9 + m_parts
            os.utime(path, ns=(times[0], times[1]))
        return struct.pack("<QII", 0, 0, 0) + self.attributes(path)

    def readlink(self, node: int, body: bytes) -> bytes:
        return os.fsencode(os.readlink(self.path(node)))

    def symlink(self, node: int, body: bytes) -> bytes:
        name, target, _ = body.split(b"\0", 2)
        os.symlink(target, os.fsencode(self.path(node, name)))
        return self.entry(node, name)

    def mkdir(self, node: int, body: bytes) -> bytes:
        self.check("create")
        os.mkdir(self.path(node, body[8:]), struct.unpack_from("<I", body)[0])
        return self.entry(node, body[8:])

    def unlink(self, node: int, body: bytes) -> bytes:
        os.unlink(self.path(node, body))
        self.numbers.pop(self.relative(node, body), None)
        return b""

    def rmdir(self, node: int, body: bytes) -> bytes:
        os.rmdir(self.path(node, body))
        self.numbers.pop(self.relative(node, body), None)
        return b""

    def rename(self, node: int, body: bytes) -> bytes:
        self.check("rename")
        (target,) = struct.unpack_from("<Q", body)
        old, new, _ = body[8:].split(b"\0", 2)
        os.rename(self.path(node, old), self.path(target, new))
        self.moved(self.relative(node, old), self.relative(target, new))
        return b""

    def link(self, node: int, body: bytes) -> bytes:
        os.link(self.path(struct.unpack_from("<Q", body)[0]), self.path(node, body[8:]))
        return self.entry(node, body[8:])

    def open(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", os.open(self.path(node), os.O_RDWR), 0, 0)

    def create(self, node: int, body: bytes) -> bytes:
        self.check("create")
        _, mode = struct.unpack_from("<II", body)
        handle = os.open(self.path(node, body[16:]), os.O_RDWR | os.O_CREAT, stat.S_IMODE(mode))
        return self.entry(node, body[16:]) + struct.pack("<QII", handle, 0, 0)

    def read(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(handle, size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        self.check("write")
        handle, offset, size = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(handle, body[40 : 40 + size], offset), 0)

    def statfs(self, node: int, body: bytes) -> bytes:
        of = os.statvfs(self.behind)
        sizes = (of.f_blocks, of.f_bfree, of.f_bavail, of.f_files, of.f_ffree, of.f_bsize, of.f_namemax, of.f_frsize)
        return struct.pack("<5Q3I28x", *sizes)

    def release(self, node: int, body: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def flush(self, node: int, body: bytes) -> bytes:
        return b""

    def fsync(self, node: int, body: bytes) -> bytes:
        self.check("fsync")
        return b""

    def init(self, node: int, body: bytes) -> bytes:
        read_ahead = struct.unpack_from("<III", body)[2]
        big_writes = 1 << 5
        return struct.pack("<4I2H2I2H32x", 7, 31, read_ahead, big_writes, 8, 8, MAX_WRITE, 1, 0, 0)

    def opendir(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", 0, 0, 0)

    def readdir(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        answer = b""
        with os.scandir(self.path(node)) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for place, entry in enumerate(entries[offset:], start=offset + 1):
            name = os.fsencode(entry.name)
            kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
            item = struct.pack("<QQII", entry.inode(), place, len(name), kind) + name
            item += bytes(-len(item) % 8)
            if len(answer) + len(item) > size:
                break
            answer += item
        return answer

    def answer(self, request: bytes) -> None:
        """Does what the kernel asks for."""
        _, code, unique, node, *_ = HEADER.unpack_from(request)
        if code in UNANSWERED:
            return
        operations: dict[int, Callable[[int, bytes], bytes]] = {
            1: self.lookup, 3: self.getattr, 4: self.setattr, 5: self.readlink, 6: self.symlink, 9: self.mkdir,
            10: self.unlink, 11: self.rmdir, 12: self.rename, 13: self.link, 14: self.open, 15: self.read,
            16: self.write, 17: self.statfs, 18: self.release, 20: self.fsync, 25: self.flush, 26: self.init,
            27: self.opendir, 28: self.readdir, 29: self.flush, 30: self.fsync, 35: self.create,
        }  # fmt: skip
        fault, content = 0, b""
        try:
            # An operation that is not here is one that the kernel does without.
            content = operations[code](node, request[HEADER.size :]) if code in operations else b""
            fault = 0 if code in operations else errno.ENOSYS
        except OSError as error:
            fault = error.errno or errno.EIO
        with contextlib.suppress(FileNotFoundError):  # the process that asked has been killed
            os.write(self.device, ANSWER.pack(ANSWER.size + len(content), -fault, unique) + content)


def mount(device: int, folder: str) -> None:
    """Mounts what an open /dev/fuse serves."""
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    if LIBC.mount(b"faulty", os.fsencode(folder), b"fuse", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)


def serve(behind: str, folder: str) -> None:
    """Serves until standard input closes, and unmounts."""
    device = os.open(DEVICE, os.O_RDWR)
    mount(device, folder)
    fuse = Fuse(behind, device)
    print("mounted", flush=True)
    try:
        while True:
            ready = select.select([device, sys.stdin], [], [])[0]
            if sys.stdin in ready:
                if not (line := sys.stdin.readline()):
                    return
                print(fuse.command(line), flush=True)
            if device in ready:
                fuse.answer(os.read(device, MAX_WRITE + 4096))
    finally:
        LIBC.umount2(os.fsencode(folder), DETACH)


class FaultyDisk:
    """The side of a test: `folder` is the mounted one; used as a context manager by `faulty_disk`."""

    def __init__(self, folder: Path, process: "subprocess.Popen[str]") -> None:
        self.folder, self._process = folder, process

    def fail(self, kind: str = "", number: int = 1, error: int = errno.EIO, stays: bool = False) -> dict[str, Any]:
        """Lets an operation fail from now on; without a kind, none.

        Args:
            kind: "create" (of files and folders), "write" (a change of the size too), "fsync" or "rename".
            number: Which of them, counted from this call on.
            error: What the system call returns.
            stays: Whether the later ones fail too.

        Returns:
            What happened since the last call: `counts` of operations by kind, and `hits`, the failures.
        """
        fault = {"kind": kind, "number": number, "error": error, "stays": stays} if kind else {}
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(fault) + "\n")
        stdin.flush()
        found: dict[str, Any] = json.loads(stdout.readline())
        return found

    def freeze(self) -> None:
        """No access is answered any more."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """All accesses are answered, those that wait too."""
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def faulty_disk(place: Path, behind: Path | None = None) -> Iterator[FaultyDisk]:
    """Mounts one in a folder; needs `fuse_missing` to be None. `behind` has its content; by default another folder."""
    folder = place / "mounted"
    folder.mkdir()
    if behind is None:
        behind = place / "behind"
        behind.mkdir()
    command = [sys.executable, "-I", __file__, str(behind), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "mounted\n", f"{folder} was not mounted"
        yield FaultyDisk(folder, process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            LIBC.umount2(os.fsencode(folder), DETACH)
        process.stdout.close()


def fuse_missing() -> str | None:
    """Why none can be mounted, or None where one can: a folder is mounted for a moment."""
    try:
        device = os.open(DEVICE, os.O_RDWR)
    except OSError as error:
        return f"{DEVICE} ({error.strerror})"
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(device, folder)
            LIBC.umount2(os.fsencode(folder), DETACH)
        except OSError as error:
            return f"the right to mount a FUSE file system ({error.strerror})"
        finally:
            os.close(device)
    return None


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
