"""What ssh is to mpirun, for hosts that have none: `serve` runs commands on a host, `HOST COMMAND` asks for one."""

import os
import socket
import socketserver
import subprocess
import sys
import time

PORT = 2222
CONNECT_WAIT_S = 20.0


class Commands(socketserver.StreamRequestHandler):
    """One command a connection: a line in, its output out."""

    def handle(self) -> None:
        command = self.rfile.readline().decode()
        out = self.connection.fileno()
        subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def connect(host: str) -> socket.socket:
    """A host's server may be about to start."""
    deadline = time.monotonic() + CONNECT_WAIT_S
    while True:
        try:
            return socket.create_connection((host, PORT), CONNECT_WAIT_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def call(host: str, command: str) -> None:
    """Print what the command says; returns when it ends."""
    with connect(host) as connection:
        connection.settimeout(None)
        connection.sendall(f"cd {os.getcwd()} && {command}\n".encode())
        while data := connection.recv(1 << 16):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        Server(("", PORT), Commands).serve_forever()
    else:
        words = [word for word in sys.argv[1:] if word != "-x"]
        call(words[0], " ".join(words[1:]))
