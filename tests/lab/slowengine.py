"""mlx_lm.server that takes longer to start, and notes the prompts that it answered.

Installed by tests/benchmarks/lost.py as the engine's program, with the engine's Python. The load of a large model is
the time that it stands for.
"""

import io
import json
import os
import sys
import time

SECONDS = float(os.environ.get("SLOW_ENGINE_SECONDS", "0"))
ANSWERS = os.environ.get("SLOW_ENGINE_ANSWERS", os.devnull)

if "--help" not in sys.argv:
    time.sleep(SECONDS)

from mlx_lm import server  # noqa: E402  # after the pause, as the weights of a large model are

answer = server.APIHandler.do_POST
respond = server.APIHandler.send_response


def do_POST(handler):  # type: ignore[no-untyped-def]
    data = handler.rfile.read(int(handler.headers["Content-Length"]))
    handler.rfile = io.BytesIO(data)
    answer(handler)
    if handler.answered == 200:
        with open(ANSWERS, "a", encoding="utf-8") as lines:
            lines.write(f"{json.loads(data)['messages'][-1]['content']}\n")


def send_response(handler, code, message=None):  # type: ignore[no-untyped-def]
    handler.answered = code
    respond(handler, code, message)


server.APIHandler.do_POST = do_POST
server.APIHandler.send_response = send_response
sys.exit(server.main())
