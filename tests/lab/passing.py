"""A proxy program for ProxyUseFdpass: connects, and passes the connection over its standard output."""

import socket
import sys

with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as made, socket.socket(fileno=1) as parent:
    socket.send_fds(parent, [b"x"], [made.fileno()])
