"""A real object store on this machine: moto's S3 server in a process of its own, for benchmarks and tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Run the server for the length of the block, on a free port of the loopback interface.

    Yields:
        Environment variables by which its clients find it and log in.

    Raises:
        RuntimeError: if it does not start, such as where moto is not installed.
    """
    command = [sys.executable, "-c", _SERVE]
    # It ends with its standard input, so also where this process is killed.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()
            if not address:
                raise RuntimeError("moto's S3 server does not start; pip install 'moto[s3]' flask flask-cors")
            yield {
                "AWS_ACCESS_KEY_ID": "vitrail",
                "AWS_SECRET_ACCESS_KEY": "not-so-secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": "http://{}:{}".format(*address),
            }
        finally:
            process.kill()  # what it has is in its memory
