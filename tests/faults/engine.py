"""A fake server that mlxops cannot distinguish from a real one. It starts in 30 ms, for thousands of trials.

Run under the name `mlx_lm.server`, isolated and without site packages, which is why it uses only what is built in. It
answers `GET /health` and chat completions. `--fake-words TEXT` writes TEXT to its log; `--fake-late S` listens S
seconds later; `--fake-exit N` ends with status N instead of listening; `--fake-mute 1` accepts and never answers;
`--fake-answer sick` completes, and calls itself unhealthy; `--fake-answer deep` completes with what no parser follows;
`--fake-answer endless` begins a completion, and goes on with a space every now and then; `--fake-names FILE` adds the
model of each request to FILE, a line each. While there is a file `broken` in its folder, it is healthy and completes
nothing.
"""

import os
import socket
import sys
import time

ANSWER = b'{"id":"1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"hi"}}]}'


def option(name: str, default: str = "") -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def respond(connection: socket.socket) -> None:
    connection.settimeout(5)
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return
        data += part
    status, body, kind = b"200 OK", b'{"status":"ok"}', option("--fake-answer")
    if data.startswith(b"POST"):
        note_name(connection, data)
        status, body = (b"500 Broken", b"{}") if os.path.exists("broken") else (status, ANSWER)
        body = b"[" * 200_000 if kind == "deep" else body
    elif kind == "sick":
        status = b"503 Service Unavailable"
    if kind == "endless" and data.startswith(b"POST"):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b" ")
            time.sleep(0.1)
    head = b"HTTP/1.1 %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    connection.sendall(head + body)


def note_name(connection: socket.socket, data: bytes) -> None:
    file = option("--fake-names")
    if file:
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += connection.recv(65536)
        with open(file, "a", encoding="utf-8") as names:
            names.write(body.decode().partition('"model": "')[2].partition('"')[0] + "\n")


def main() -> None:
    if words := option("--fake-words"):
        sys.stderr.write(words + "\n")
        sys.stderr.flush()
    time.sleep(float(option("--fake-late", "0")))
    if status := option("--fake-exit"):
        raise SystemExit(int(status))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((option("--host", "127.0.0.1"), int(option("--port", "8080"))))
    listener.listen(64)
    silent = []
    while True:
        connection, _ = listener.accept()
        if option("--fake-mute"):
            silent.append(connection)
            continue
        with connection:
            try:
                respond(connection)
            except OSError:
                continue


if __name__ == "__main__":
    main()
