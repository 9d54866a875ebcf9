"""PostgreSQL as Debian packages it, for the time of a test: on loopback, in a folder of its own that goes with it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.faults.soak import Failed
from tests.processes import free_port

USER, DATABASE = "orchestrator", "postgres"


def binaries() -> Path | None:
    """Where the server's programs are; None when it is not installed. Debian keeps them out of PATH."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    return max(found, key=lambda path: path.parts[-3]).parent if found else None


class Postgres:
    """A server with one user and a new password. It refuses root, so root runs it as `postgres`."""

    def __init__(self) -> None:
        """Raises Failed where there is no PostgreSQL, or it does not start."""
        found = binaries()
        if found is None:
            raise Failed(
                "PostgreSQL is not installed. On Debian: apt-get install postgresql (the server that it starts is not "
                "used). Or give --database postgresql+psycopg2://USER:PASSWORD@HOST/NAME, or --sqlite."
            )
        self.binaries, self.port, self.password = found, free_port(), secrets.token_hex(12)
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-", dir="/tmp"))
        self.process: subprocess.Popen[bytes] | None = None
        (self.folder / "password").write_text(self.password)
        if os.geteuid() == 0:
            for path in (self.folder, self.folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    @property
    def uri(self) -> str:
        """For MLflow, with the driver: SQLAlchemy's default is another one since 2.1."""
        return f"postgresql+psycopg2://{USER}:{self.password}@127.0.0.1:{self.port}/{DATABASE}"

    def _words(self, program: str, *words: str) -> list[str]:
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.geteuid() == 0 else []
        return [*user, str(self.binaries / program), "-D", str(self.folder / "data"), *words]

    def _start(self) -> None:
        log = self.folder / "log"
        make = self._words("initdb", "-U", USER, "-E", "UTF8", "--locale=C", "--auth=scram-sha-256", "--no-sync")
        make.append(f"--pwfile={self.folder / 'password'}")
        serve = self._words("postgres", "-p", str(self.port), "-c", "listen_addresses=127.0.0.1")
        serve += ["-c", "unix_socket_directories=", "-c", "fsync=off"]
        with open(log, "wb") as out:
            if subprocess.run(make, cwd=self.folder, stdout=out, stderr=out, check=False).returncode:
                raise Failed(f"initdb failed: {log.read_text()}")
            self.process = subprocess.Popen(serve, cwd=self.folder, stdout=out, stderr=out, start_new_session=True)
        until = time.monotonic() + 60
        while "ready to accept connections" not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > until:
                raise Failed(f"PostgreSQL did not start: {log.read_text()}")
            time.sleep(0.1)

    def value(self, query: str) -> object:
        """The single value that a query gives."""
        import psycopg2

        connection = psycopg2.connect(self.uri.replace("+psycopg2", ""))
        try:
            with connection.cursor() as cursor:
                cursor.execute(query)
                return cursor.fetchone()[0]
        finally:
            connection.close()

    def stop(self) -> None:
        """End the server and all of its connections, and delete what it kept."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # its "fast" shutdown
            self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)
