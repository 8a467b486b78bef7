"""A fake server with the options of `mlx_lm.server`, that misbehaves on request. It starts in 30 ms.

    mlx_lm.server --model NAME --host ADDRESS --port PORT [--fake-OPTION VALUE ...]

A real process with a real listener, for thousands of trials, and for what a real engine does rarely. Installed by
tests/lab/quick.py under the engine's name, isolated and without site packages, which is why it imports so little. It
answers `GET /health`, `GET /v1/models` and chat completions, those of `probe` as a good model would. While there is a
file `broken` in its folder, it is healthy and completes nothing.
Other options are ignored.

    --fake-act ACT       what it does, see ACTS
    --fake-words TEXT    write TEXT to its log at the start; \\e in it is ESC, and \\a is BEL
    --fake-flaw FLAW     how its completions are flawed, see FLAWS; a file `flaw` in its folder comes first
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
import json
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
FLAWS = {
    "empty": "its answers are empty, and its usage counts no token",
    "hidden": "its first tokens have no text",
    "wordy": "it generates more tokens than it is asked for",
    "no-reason": "it gives no finish reason",
    "no-done": "its streams do not end with [DONE]",
    "no-usage": "its streams have no usage",
    "comment": "its streams have a comment in the event of a chunk",
    "error": "its streams have an error in them",
    "cut": "its streams end in the middle",
    "deaf-system": "it does not follow a system prompt",
    "no-system": "it refuses a system prompt",
    "no-call": "it calls no tool",
    "bad-call": "the arguments of its tool calls are not JSON",
    "other-call": "its tool calls do not fit the schema",
    "no-turn": "it does not take a tool's result",
    "think": "its reasoning leaks into the answer",
    "no-think": "it does not reason",
    "markup": "it leaves a token of its template in an answer",
    "no-json": "it does not follow a JSON schema",
    "one-at-a-time": "it answers nothing else while it streams",
    "serial": "a request waits until the one before has its answer",
    "silent-beside": "it does not answer while it streams",
    "busy-beside": "it answers 429 while it streams",
    "left": "it answers nothing after a client has left a stream",
    "busy": "it answers 429",
    "busy-later": "it answers 429 once it has answered the proof",
    "busy-twice": "it answers 429 twice once it has answered the proof",
    "mute": "it does not answer",
}
state = {"streams": 0, "left": False, "refused": 0}


def option(name: str, default: str = "") -> str:
    """Return the value of an option, the last one if it is given twice."""
    words = sys.argv[::-1]
    return words[words.index(name) - 1] if name in words else default


ACT = option("--fake-act", "ok")
MODEL = option("--model")
"""The only model that it completes with. Without one it takes every name."""
PARTS = int(option("--fake-parts", "0"))
held: list[bytes] = []
one_at_a_time = _thread.allocate_lock()
prompts: set[str] = set()
"""The messages that it has answered with --fake-rate."""


def respond(connection: socket.socket) -> None:
    connection.settimeout(5)
    asked, body = request(connection)
    if not asked:
        return
    status, answer = "200 OK", '{"status":"ok"}'
    if asked.startswith(b"POST"):
        flaw = flawed(body)
        if flaw.startswith("busy"):
            state["refused"] += 1
            return reply(connection, "429 Busy", '{"error":"the queue is full"}')
        if '"stream":true' in body and flaw == "mute":
            wait_for_ever()
        if '"stream":true' in body and (rate := float(option("--fake-rate", "0"))):
            return stream_at(connection, body, rate)
        if '"stream_options":' in body and not PARTS:
            with one_at_a_time if flaw == "serial" else connection:
                return stream_completion(connection, body, flaw)
        if ACT == "endless" or ('"stream":true' in body and not PARTS):
            stream(connection)
        if flaw == "serial":
            with one_at_a_time:
                time.sleep(0.05)
        status, answer = completion(asked_model(body), body, flaw)
        time.sleep(float(option("--fake-slow", "0")))
        if status == "200 OK" and '"stream":true' in body:
            return stream_parts(connection, prompt_of(body))
        if status == "200 OK":
            note("--fake-answers", prompt_of(body))
    elif asked.startswith(b"GET /v1/models "):
        answer = f'{{"object":"list","data":[{{"id":"{MODEL}"}}]}}'
    elif ACT == "sick":
        status = "503 Service Unavailable"
    reply(connection, status, answer)


def reply(connection: socket.socket, status: str, answer: str) -> None:
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


def completion(model: str, body: str, flaw: str) -> tuple[str, str]:
    """Return the status and the body of an answer to a completion of this model."""
    if flaw in {"mute", "silent-beside"}:
        wait_for_ever()
    if ACT == "broken" or os.path.exists("broken"):
        return "500 Broken", '{"error":"BatchEncoding has no attribute input_ids"}'
    if status := option("--fake-status"):
        return f"{status} Refused", '{"error":{"message":"no"}}'
    if MODEL and model not in (MODEL, "default_model"):
        return "404 Not Found", f'{{"error":"no model {model}"}}'
    if ACT == "deep":
        return "200 OK", "[" * 200_000
    status, message, finish, tokens = said(body, flaw)
    choices = [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}]
    usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}
    answer = {"id": "1", "object": "chat.completion", "model": model, "choices": choices, "usage": usage}
    return status, json.dumps(answer)


def flawed(body: str) -> str:
    """Return the flaw with which a request is answered; empty for none."""
    try:
        with open("flaw", encoding="utf-8") as file:
            flaw = file.read()
    except OSError:
        flaw = option("--fake-flaw")
    if flaw and flaw not in FLAWS:
        raise SystemExit(f"unknown flaw {flaw}")
    left = state["left"] and '"stream":true' not in body
    beside = state["streams"] > 0
    later = "Sayhi" not in body
    hits = {
        "one-at-a-time": beside,
        "silent-beside": beside,
        "busy-beside": beside,
        "busy-later": later,
        "busy-twice": later and state["refused"] < 2,
        "left": left,
    }
    return flaw if hits.get(flaw, True) else ""


def said(body: str, flaw: str) -> tuple[str, dict[str, object], str | None, int]:
    """Return status, message, finish reason and tokens of the answer to a request, as `probe` sends it."""
    limit = int(body.partition('"max_tokens":')[2].partition(",")[0].rstrip("}") or 16)
    if flaw in {"one-at-a-time", "left"}:
        return "500 Broken", {"content": None}, None, 0
    if "Countfrom1" in body:
        tokens = {"empty": 0, "wordy": limit + 6}.get(flaw, limit)
        return "200 OK", {"content": "1," * tokens}, "length", tokens
    if "17+25" in body:
        answer: dict[str, object] = {"reasoning": "7 and 5 make 12.", "content": "42"}
        if limit < 20:
            return "200 OK", {"reasoning": "7 and 5", "content": None}, "length", limit
        if flaw in {"think", "no-think"}:
            answer = {"content": "<think>7 and 5</think>42" if flaw == "think" else "42"}
        return "200 OK", answer, None if flaw == "no-reason" else "stop", 11
    if "BANANA" in body:
        text = {"markup": "BANANA<|im_end|>", "deaf-system": "Paris"}.get(flaw, "BANANA")
        return "500 No system" if flaw == "no-system" else "200 OK", {"content": text}, "stop", 3
    if '"role":"tool"' in body:
        return "500 No turn" if flaw == "no-turn" else "200 OK", {"content": "It is 23 degrees."}, "stop", 6
    if '"tools":' in body and flaw != "no-call":
        arguments = {"bad-call": "{city: Paris", "other-call": '{"town": "Paris"}'}.get(flaw, '{"city": "Paris"}')
        call = {"id": "call_1", "type": "function", "function": {"name": "get_temperature", "arguments": arguments}}
        return "200 OK", {"content": None, "tool_calls": [call]}, "tool_calls", 12
    if '"response_format":' in body:
        return "200 OK", {"content": "Paris" if flaw == "no-json" else '{"capital": "Paris"}'}, "stop", 6
    if flaw == "empty":
        return "200 OK", {"content": ""}, "stop", 0
    if flaw == "hidden" and limit < 20:
        return "200 OK", {"content": None}, "length", limit
    return "200 OK", {"content": f"from {os.getpid()}"}, "stop", 4


def stream_completion(connection: socket.socket, body: str, flaw: str) -> None:
    """Stream an answer in chunks until its end, or until the client goes away."""
    finish, tokens = said(body, flaw)[2:]
    parts = [{"choices": [{"index": 0, "delta": {"content": "1,"}}]}] * tokens
    ends = [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}]
    usage = [{"choices": [], "usage": {"completion_tokens": tokens}}] if flaw != "no-usage" else []
    errors = [{"error": {"message": "broken"}}] if flaw == "error" else []
    connection.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    state["streams"] += 1
    state["left"] = tokens > 500  # the client that asks for so much leaves
    try:
        send_chunk(connection, b": begins\n" if flaw == "comment" else b": begins\n\n")
        for number, event in enumerate([*parts, *errors, *ends, *usage]):
            if flaw == "cut" and number > tokens // 2:
                return
            send_chunk(connection, f"data: {json.dumps(event)}\n\n".encode())
            time.sleep(0.002)
        if flaw != "no-done":
            send_chunk(connection, b"data: [DONE]\n\n")
        connection.sendall(b"0\r\n\r\n")
    finally:
        time.sleep(0.2 if flaw == "one-at-a-time" else 0)
        state["streams"] -= 1


def send_chunk(connection: socket.socket, data: bytes) -> None:
    connection.sendall(b"%x\r\n%s\r\n" % (len(data), data))


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
