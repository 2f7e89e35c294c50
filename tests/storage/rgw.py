"""A real S3 server for tests: Ceph RGW with one monitor and one disk daemon, on loopback, in a folder of its own.

Nothing of it outlives the process that made it, however that ends: each daemon is told by the system when the thread
that started it is gone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

INSTALL = "apt-get install -y --no-install-recommends ceph-mon ceph-osd radosgw ceph-common"
BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool", "setpriv")
DEADLINE_S = 60.0

CONF = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
ms_bind_ipv6 = false
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_allow_insecure_global_id_reclaim = false
keyring = {root}/keyring
mon_data = {root}/mon
osd_data = {root}/osd
run_dir = {root}/run
admin_socket = {root}/run/$name.asok
pid_file = {root}/run/$name.pid
crash_dir = {root}/crash
log_file = {root}/log/$name.log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_crush_chooseleaf_type = 0
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_data_avail_warn = 2
# By default a change of the map waits a second: a fresh cluster would take 20 s instead of 5 s.
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
osd_objectstore = bluestore
bluestore_block_size = 4294967296
osd_memory_target = 939524096
# A new bucket is announced to every gateway that watches; a killed one would be waited for 30 s.
osd_client_watch_timeout = 1
osd_class_load_list = *
osd_class_default_list = *

[client.rgw]
rgw_data = {root}/rgw
# Without tcp_nodelay a small read takes 44 ms instead of 2 ms.
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 32
rgw_run_sync_thread = false
"""


def why_not() -> str:
    """Why no RGW can be started here, with what to type; '' if one can."""
    missing = [name for name in BINARIES if shutil.which(name) is None]
    return f"no {', '.join(missing)} here; as root: {INSTALL}" if missing else ""


class Rgw:
    """``root``: an empty folder. Starts when made (about 5 s); ``close`` ends it."""

    secret_key = "not-a-secret-at-all"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._conf = root / "ceph.conf"
        mon_port, port = _free_ports(2)
        self.endpoint = f"http://127.0.0.1:{port}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # A daemon dies with the thread that started it (PR_SET_PDEATHSIG), so that thread must be one that stays.
        self._starter = ThreadPoolExecutor(1, "rgw")
        try:
            self._create(mon_port, port)
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 reads to come here, and to look nowhere else."""
        nothing = str(self.root / "nothing")
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": _access_key("tests"),
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": nothing,
            "AWS_SHARED_CREDENTIALS_FILE": nothing,
        }

    @functools.cached_property
    def bucket(self) -> str:
        """A bucket for tests that work below a prefix of their own: a new one takes 0.3 s."""
        return self.new_bucket()

    def new_bucket(self, owner: Literal["tests", "theirs"] = "tests") -> str:
        """Makes an empty bucket and gives its name. That of "theirs" is closed to ``environment``."""
        import boto3

        name = f"tests-{uuid.uuid4().hex[:12]}"
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=_access_key(owner),
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
        )
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return name

    def start(self) -> None:
        """Starts every daemon that does not run, and returns when the server answers."""
        if not self._runs("mon"):
            self._start("mon", "ceph-mon", "-i", "a")
        if not self._runs("osd"):
            self._start_osd()
        if not (self.root / "users").exists():
            for user in ("tests", "theirs"):
                self._admin("user", "create", f"--uid={user}", f"--display-name={user}",
                            f"--access-key={_access_key(user)}", f"--secret-key={self.secret_key}")  # fmt: skip
            (self.root / "users").touch()
        if not self._runs("rgw"):
            (self.root / "run" / "client.rgw.asok").unlink(missing_ok=True)
            self._start("rgw", "radosgw", "-n", "client.rgw")
        self._wait("radosgw", self.answers)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except urllib.error.HTTPError as exc:
            exc.close()
        except OSError:
            return False
        return True

    def kill_gateway(self) -> None:
        """kill -9 of radosgw alone; ``start`` brings it back in about 0.2 s."""
        self._kill("rgw")

    def kill_all(self) -> None:
        """kill -9 of everything; ``start`` brings it back in about 4 s."""
        for name in ("rgw", "osd", "mon"):
            self._kill(name)

    def stop_disk(self) -> None:
        """SIGSTOP of the disk daemon: what was asked waits, and lands after ``continue_disk``."""
        self._daemons["osd"].send_signal(signal.SIGSTOP)

    def continue_disk(self) -> None:
        self._daemons["osd"].send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def quota(self, *, max_objects: int) -> Iterator[None]:
        """Each bucket made meanwhile holds at most ``max_objects``."""
        self._admin("quota", "set", "--quota-scope=bucket", "--uid=tests", f"--max-objects={max_objects}")
        self._admin("quota", "enable", "--quota-scope=bucket", "--uid=tests")
        try:
            yield
        finally:
            self._admin("quota", "disable", "--quota-scope=bucket", "--uid=tests")

    def close(self) -> None:
        self.kill_all()
        self._starter.shutdown()
        shutil.rmtree(self.root, ignore_errors=True)

    def _create(self, mon_port: int, port: int) -> None:
        for folder in ("mon", "osd", "rgw", "run", "log", "crash"):
            (self.root / folder).mkdir(parents=True)
        fsid, keyring = str(uuid.uuid4()), str(self.root / "keyring")
        self._conf.write_text(CONF.format(fsid=fsid, root=self.root, mon_port=mon_port, port=port))
        for name, *caps in (
            ("mon.", "mon", "allow *"),
            ("client.admin", "mon", "allow *", "osd", "allow *"),
            ("client.rgw", "mon", "allow rwx", "osd", "allow rwx"),
            ("osd.0", "mon", "allow profile osd", "osd", "allow *"),
        ):
            allowed = [word for who, what in zip(caps[::2], caps[1::2], strict=True) for word in ("--cap", who, what)]
            create = [] if Path(keyring).exists() else ["--create-keyring"]
            self._run("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *allowed)
        monmap = str(self.root / "monmap")
        self._run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", "--fsid", fsid, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)

    def _start_osd(self) -> None:
        if not (self.root / "osd" / "ready").exists():
            osd_uuid = str(uuid.uuid4())
            self._run("ceph", "--connect-timeout", "20", "osd", "new", osd_uuid)
            self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        daemon = self._start("osd", "ceph-osd", "-i", "0")

        def up() -> bool:
            """The map names this very process: with an earlier one's address radosgw would wait 15 s for the dead."""
            dump = self._run("ceph", "--connect-timeout", "5", "osd", "dump", check=False)
            return any(line.startswith("osd.0 up") and f"/{daemon.pid}" in line for line in dump.splitlines())

        self._wait("ceph-osd", up)

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        dying_with_us = ["setpriv", "--pdeathsig", "KILL", *command, "-c", str(self._conf), "-f"]
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            start = self._starter.submit(
                subprocess.Popen, dying_with_us, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
            self._daemons[name] = start.result(DEADLINE_S)
        return self._daemons[name]

    def _runs(self, name: str) -> bool:
        return name in self._daemons and self._daemons[name].poll() is None

    def _kill(self, name: str) -> None:
        if self._runs(name):
            self._daemons[name].kill()
            self._daemons[name].wait(DEADLINE_S)

    def _admin(self, *arguments: str) -> None:
        self._run("radosgw-admin", "-n", "client.rgw", *arguments)

    def _run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=os.environ | {"CEPH_CONF": str(self._conf)}, capture_output=True, text=True, timeout=DEADLINE_S
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not ready():
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text(errors="replace")[-1000:] for log in self.root.glob("log/*.out"))
                raise TimeoutError(f"{what} is not ready after {DEADLINE_S:.0f} s:\n{logs}")
            time.sleep(0.03)


def _access_key(user: str) -> str:
    return f"ACCESSKEY{user.upper()}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
