"""A minimal websocket client (RFC 6455): enough to read a ComfyUI server's events with the standard library."""

import base64
import os
import socket
import struct

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class WebSocket:
    """Connects on construction. `receive` gives one message at a time; ConnectionError when the server is gone."""

    def __init__(self, address, path, timeout=30.0):
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=timeout)
        self.buffer = b""
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall((f"GET {path} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n").encode())
        while b"\r\n\r\n" not in self.buffer:
            self.fill()
        header, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        status = header.split(b"\r\n", 1)[0].decode()
        if " 101 " not in status + " ":
            raise ConnectionError(f"{address} refused a websocket: {status}")

    def receive(self, timeout=None):
        """The next message, str or bytes; TimeoutError when none arrives within `timeout` seconds."""
        self.socket.settimeout(timeout)
        message, kind = b"", None
        while True:
            final, opcode, payload = self.frame()
            if opcode == PING:
                self.send(PONG, payload)
            elif opcode == CLOSE:
                raise ConnectionError("the server closed the websocket")
            elif opcode != PONG:
                kind = opcode or kind
                message += payload
                if final:
                    return message.decode() if kind == TEXT else message

    def frame(self):
        """One frame: whether it ends its message, its opcode (0 continues the one before) and its payload."""
        first, second = self.read(2)
        length = second & 0x7F
        if length == 126:
            length, = struct.unpack("!H", self.read(2))
        elif length == 127:
            length, = struct.unpack("!Q", self.read(8))
        return bool(first & 0x80), first & 0x0F, self.read(length)

    def send(self, opcode, payload):
        """One final frame with a payload under 126 bytes, masked as a client must."""
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self.socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

    def read(self, count):
        while len(self.buffer) < count:
            self.fill()
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def fill(self):
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.buffer += data

    def close(self):
        try:
            self.send(CLOSE, b"")
        except OSError:
            pass
        self.socket.close()
