"""A fake server with the options of `mlx_lm.server`, that misbehaves on request. It starts in 30 ms.

    mlx_lm.server --model NAME --host ADDRESS --port PORT [--fake-OPTION VALUE ...]

A real process with a real listener, for thousands of trials, and for what a real engine does rarely. Installed by
tests/lab/quick.py under the engine's name, isolated and without site packages, which is why it imports so little. It
answers `GET /health`, `GET /v1/models` and chat completions. While there is a file `broken` in its folder, it is
healthy and completes nothing. Other options are ignored.

    --fake-act ACT       what it does, see ACTS
    --fake-words TEXT    write TEXT to its log at the start; \\e in it is ESC, and \\a is BEL
    --fake-late SECONDS  listen so much later
    --fake-until FILE    listen as soon as FILE is there; `{port}` in its name is the port
    --fake-only PORT     end with status 1 on any other port
    --fake-exit STATUS   end instead of listening
    --fake-rate NUMBER   stream the tokens that are asked for, so many a second, then the usage; a prompt that is new is
                         read a hundred times as fast
    --fake-names FILE    add the model of each request to FILE, a line each
    --fake-answers FILE  add the prompt of each completion to FILE when it has all of the answer, a line each
    --fake-status STATUS answer each completion with this status
    --fake-slow SECONDS  take so long for each completion
    --fake-parts NUMBER  a stream has so many parts; without it, it has no end
    --fake-memory MB     hold so much real memory; with the act `family`, its child does
    --fake-ignore NAMES  ignore these signals: `int` (as does a server that a shell started with `&`), `term`, or both,
                         separated by a comma
    --fake-linger SECONDS  on SIGTERM or SIGINT serve on, keep the memory, and end so much later
"""

import _thread
import os
import signal
import socket
import sys
import time

ACTS = {
    "ok": "serves",
    "deaf": "never listens",
    "mute": "accepts, and never answers",
    "sick": "completes, and calls itself unhealthy",
    "broken": "is healthy, and answers every completion with 500",
    "deep": "completes with what no parser follows",
    "endless": "begins a completion, and goes on with a space every now and then",
    "stranger": "has a process of another session answer on its port",
    "leaves": "ends, and leaves a child in its group that serves",
    "family": "serves, with a child in its group",
}


def option(name: str, default: str = "") -> str:
    """Return the value of an option, the last one if it is given twice."""
    words = sys.argv[::-1]
    return words[words.index(name) - 1] if name in words else default


ACT = option("--fake-act", "ok")
MODEL = option("--model")
"""The only model that it completes with. Without one it takes every name."""
PARTS = int(option("--fake-parts", "0"))
held: list[bytes] = []
prompts: set[str] = set()
"""The messages that it has answered with --fake-rate."""


def respond(connection: socket.socket) -> None:
    connection.settimeout(5)
    asked, body = request(connection)
    if not asked:
        return
    status, answer = "200 OK", '{"status":"ok"}'
    if asked.startswith(b"POST"):
        if '"stream":true' in body and (rate := float(option("--fake-rate", "0"))):
            return stream_at(connection, body, rate)
        if ACT == "endless" or ('"stream":true' in body and not PARTS):
            stream(connection)
        status, answer = completion(asked_model(body))
        time.sleep(float(option("--fake-slow", "0")))
        if status == "200 OK" and '"stream":true' in body:
            return stream_parts(connection, prompt_of(body))
        if status == "200 OK":
            note("--fake-answers", prompt_of(body))
    elif asked.startswith(b"GET /v1/models "):
        answer = f'{{"object":"list","data":[{{"id":"{MODEL}"}}]}}'
    elif ACT == "sick":
        status = "503 Service Unavailable"
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(answer)}\r\n\r\n"
    connection.sendall((head + answer).encode())


def request(connection: socket.socket) -> tuple[bytes, str]:
    """Return the head, empty if the client went away, and the body without spaces, which no test's model name has."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return b"", ""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head, body.decode().replace(" ", "")


def asked_model(body: str) -> str:
    model = body.partition('"model":"')[2].partition('"')[0]
    note("--fake-names", model)
    return model


def prompt_of(body: str) -> str:
    return body.partition('"content":"')[2].partition('"')[0]


def note(name: str, line: str) -> None:
    """Add a line to the file that an option names, if it is given."""
    if file := option(name):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(line + "\n")


def completion(model: str) -> tuple[str, str]:
    """Return the status and the body of an answer to a completion of this model."""
    if ACT == "broken" or os.path.exists("broken"):
        return "500 Broken", '{"error":"BatchEncoding has no attribute input_ids"}'
    if status := option("--fake-status"):
        return f"{status} Refused", '{"error":{"message":"no"}}'
    if MODEL and model not in (MODEL, "default_model"):
        return "404 Not Found", f'{{"error":"no model {model}"}}'
    if ACT == "deep":
        return "200 OK", "[" * 200_000
    message = f'{{"role":"assistant","content":"from {os.getpid()}"}}'
    choices = f'[{{"index":0,"message":{message}}}]'
    return "200 OK", f'{{"id":"1","object":"chat.completion","model":"{model}","choices":{choices}}}'


def stream(connection: socket.socket) -> None:
    """Send until the client goes away."""
    part = b" " if ACT == "endless" else b'data: {"choices": [{"delta": {"content": "and"}}]}\n\n'
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        connection.sendall(part)
        time.sleep(0.05)


def stream_at(connection: socket.socket, body: str, rate: float) -> None:
    """Send as many tokens as the request asks for, at this rate, and what an engine counts."""
    messages = body.partition('"messages":')[2].partition("]")[0]
    tokens = int(body.partition('"max_tokens":')[2].partition(",")[0])
    prompt = len(messages) // 4
    cached = prompt - 1 if messages in prompts else 0
    prompts.add(messages)
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n: a comment\n\n")
    connection.sendall(b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n')
    time.sleep((prompt - cached) / rate / 100)
    for number in range(tokens):
        time.sleep(1 / rate if number else 0)
        connection.sendall(b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n')
    counts = f'"prompt_tokens": {prompt}, "completion_tokens": {tokens}'
    usage = f'{{{counts}, "prompt_tokens_details": {{"cached_tokens": {cached}}}}}'
    connection.sendall(f'data: {{"choices": [], "usage": {usage}}}\n\ndata: [DONE]\n\n'.encode())


def stream_parts(connection: socket.socket, prompt: str) -> None:
    """Send a stream that ends."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n")
    for number in range(PARTS):
        connection.sendall(part(f'"delta":{{"content":"{number} "}}'))
        time.sleep(0.05)
    connection.sendall(part('"delta":{},"finish_reason":"stop"'))
    note("--fake-answers", prompt)
    connection.sendall(b"data: [DONE]\n\n")


def part(choice: str) -> bytes:
    return f'data: {{"id":"1","object":"chat.completion.chunk","choices":[{{"index":0,{choice}}}]}}\n\n'.encode()


def serve() -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((option("--host", "127.0.0.1"), int(option("--port", "8080"))))
    listener.listen(64)
    silent = []
    while True:
        connection, _ = listener.accept()
        if ACT == "mute":
            silent.append(connection)
        else:
            _thread.start_new_thread(answer, (connection,))


def answer(connection: socket.socket) -> None:
    with connection:
        try:
            respond(connection)
        except OSError:
            pass  # the client went away


def handle_signals() -> None:
    if linger := float(option("--fake-linger", "0")):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: _thread.start_new_thread(end_after, (linger,)))
    for name in filter(None, option("--fake-ignore").split(",")):
        signal.signal(signal.Signals[f"SIG{name.upper()}"], signal.SIG_IGN)


def end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(0)


def start_child() -> None:
    """Start a child of its group that holds the memory. Return when it does."""
    ready, announce = os.pipe()
    if not os.fork():
        hold_memory()
        os.write(announce, b"\n")
        wait_for_ever()
    os.read(ready, 1)


def hold_memory() -> None:
    """Hold memory that is written to, so that all of it is there."""
    held.append(b"\1" * (int(option("--fake-memory", "0")) * 1_000_000))


def wait_for_ever() -> None:
    while True:
        signal.pause()


def main() -> None:
    print("loading", MODEL, flush=True)  # noqa: T201
    if words := option("--fake-words"):
        print(words.replace("\\e", "\x1b").replace("\\a", "\a"), file=sys.stderr, flush=True)  # noqa: T201
    if option("--fake-only", option("--port")) != option("--port"):
        raise SystemExit(1)
    handle_signals()
    time.sleep(float(option("--fake-late", "0")))
    file = option("--fake-until").replace("{port}", option("--port"))
    while file and not os.path.exists(file):
        time.sleep(0.01)
    if status := option("--fake-exit"):
        raise SystemExit(int(status))
    if ACT not in ACTS:
        raise SystemExit(f"unknown act {ACT}: {', '.join(ACTS)}")
    if ACT == "family":
        start_child()
    else:
        hold_memory()
    if ACT == "deaf":
        wait_for_ever()
    if ACT in {"stranger", "leaves"} and os.fork():
        if ACT == "leaves":
            raise SystemExit(0)
        wait_for_ever()
    if ACT == "stranger":
        os.setsid()
    serve()


if __name__ == "__main__":
    main()
