"""Pages whose address somebody else wrote down, read from this machine.

A submission must not make a teacher's machine ask its own network: only hosts with a public address are connected to, behind a
redirect as well. The address that was looked at is the one that is connected to, so that a name cannot lead elsewhere when it
is asked a second time. No key, token or cookie is sent, no proxy asked; an answer ends after some seconds and some bytes.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from course_lib.chat.api_client import check_url
from course_lib.errors import CourseError, InputError

SECONDS = 15.0  # for an answer and the redirects before it
SECONDS_TO_CONNECT = 5.0
REDIRECTS = 5
MOST = 2**20  # bytes of a body
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses as a network without IPv4 writes them, RFC 6052


@dataclass(frozen=True)
class Answer:
    """`body` has at most as many bytes as were wanted. Names of `headers` are in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def fetch(
    url: str,
    *,
    post: bytes | None = None,
    byte_range: tuple[int, int] | None = None,
    most: int = MOST,
    seconds: float = SECONDS,
    private: bool = False,
) -> Answer:
    """GET `url`, or POST JSON to it, and return what is answered, whatever its status.

    Args:
        byte_range: first and last byte of a file; a server may send all of it instead, with status 200.
        most: bytes of the body.
        seconds: until the answer has to be there, redirects included.
        private: connect to this machine and its network, too.

    Raises:
        InputError: it is no address.
        CourseError: nothing answers in time, what answers is no web server, or it is not public.
    """
    headers = {"User-Agent": "course-homework"}
    if post is not None:
        headers["Content-Type"] = "application/json"
    if byte_range is not None:
        headers["Range"] = f"bytes={byte_range[0]}-{byte_range[1]}"
    ends = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        check_url(url)
        host = urlsplit(url).hostname or ""
        try:
            answer = _ask(url, post, headers, most, ends, private)
        except socket.gaierror:
            raise CourseError(f"{host}: there is no such host, or no network here") from None
        except TimeoutError:
            raise CourseError(f"{host} does not answer in time") from None
        except ssl.SSLCertVerificationError as error:
            raise CourseError(f"{host}: its certificate is not trusted ({error.verify_message})") from None
        except ConnectionRefusedError:
            raise CourseError(f"no server answers at {host}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            said = " ".join(str(error).split())[:100] or type(error).__name__
            raise CourseError(f"{host} gives no answer that can be read ({said})") from None
        if answer.status not in (301, 302, 303, 307, 308) or "location" not in answer.headers:
            return answer
        if post is not None:
            raise CourseError(f"{host} sends on to another address: give that one")
        url = urljoin(url, answer.headers["location"])
    raise CourseError(f"{host} sends on more than {REDIRECTS} times")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and not of this machine, its network, or a special use."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) % 2**32) if ip in NAT64 else None)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _ask(url: str, post: bytes | None, headers: dict[str, str], most: int, ends: float, private: bool) -> Answer:
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise InputError("the address holds a user name or a password: leave them out")
    host, secure = str(parts.hostname), parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(host, port)
    with _connect(host, port, ends, private) as plain:
        stream = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
        with stream:
            connection.sock = _Timed(stream, ends)
            connection.request("GET" if post is None else "POST", path, body=post, headers=headers)
            response = connection.getresponse()
            told = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, told, response.read(most))


def _connect(host: str, port: int, ends: float, private: bool) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    allowed = [one for one in found if private or is_public(str(one[4][0]))]
    if not allowed:
        raise CourseError(f"{host} is an address of this machine or its own network, which nobody else can reach")
    for number, (family, kind, protocol, _, address) in enumerate(allowed, start=1):
        opened = socket.socket(family, kind, protocol)
        opened.settimeout(min(SECONDS_TO_CONNECT, _left(ends)))
        try:
            opened.connect(address)
        except OSError:
            opened.close()
            if number == len(allowed):
                raise
        else:
            return opened
    raise AssertionError  # the loop returns or raises


class _Timed(io.RawIOBase):
    """A socket as http.client uses one, which ends at a moment: a time-out for each read would let a slow sender go on for ever."""

    def __init__(self, opened: socket.socket, ends: float) -> None:
        self._opened, self._ends = opened, ends

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._opened.settimeout(_left(self._ends))
        return self._opened.recv_into(buffer)

    def sendall(self, data: bytes) -> None:
        self._opened.settimeout(_left(self._ends))
        self._opened.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Timed(self._opened, self._ends))  # http.client closes this one before it has read all


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
