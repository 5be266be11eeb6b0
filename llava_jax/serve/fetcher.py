"""Pictures by address, from the hosts of a list only: by https, at public addresses, in bounded time and memory."""

import asyncio
import http.cookiejar
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import urljoin

import httpx2

from llava_jax.errors import UsageError
from llava_jax.serve.fields import MAX_BODY_BYTES, Refused, refuse

FETCH_SECS = 15.0  # that all pictures of a request may take
MAX_PICTURES = 16  # of a request that are fetched; in bytes they are bounded as a body
MAX_REDIRECTS = 3
FETCHES = 8  # at once, of all requests together
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# A name of the internet; no address in any notation ends with a letter's label but 0x7f.
_ENTRY = re.compile(rf"(http://)?((?:{_LABEL}\.)+(?!0x){_LABEL})(?::([0-9]{{1,5}}))?", re.ASCII)
# Neither a user nor a fragment, backslash, blank or control character: no two parsers differ on what is left.
_URL = re.compile(
    r"(https?)://([a-z0-9.-]{1,253})(?::([0-9]{1,5}))?(/[!-\"$-\[\]-~]{0,2000})", re.ASCII | re.IGNORECASE
)
_PORTS = {"https": 443, "http": 80}
_UNICAST = ipaddress.ip_network("2000::/3")  # of IPv6; beyond are mapped and translated IPv4 addresses
# What Python 3.11 or a newer one takes for global: protocols' own (Oracle's cloud has its metadata there), relays,
# Azure's metadata, Teredo, 6to4 (an IPv4 address within), and examples.
_CLOSED = tuple(map(ipaddress.ip_network, (
    "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2002::/16", "3fff::/20",
)))  # fmt: skip


class _Lost(Exception):
    """Why a picture is not to be had."""


class Host(NamedTuple):
    """A host that may be asked for pictures. scheme: "https" or "http"."""

    scheme: str
    name: str
    port: int

    @property
    def netloc(self) -> str:
        """The name, with the port unless it is the scheme's own."""
        return self.name if self.port == _PORTS[self.scheme] else f"{self.name}:{self.port}"


def hosts(text: str) -> tuple[Host, ...]:
    """The hosts of a list such as "example.com,http://pictures.example.com:8080".

    Raises:
      UsageError: an entry is no name of a host.
    """
    return tuple(_host(entry) for entry in text.split(","))


def _host(entry: str) -> Host:
    match = _ENTRY.fullmatch(entry.strip().lower())
    if match is None or match[2].rpartition(".")[2].isdigit() or not 0 < int(match[3] or 443) < 2**16:
        raise UsageError(f"--picture-hosts {entry!r}: want names such as example.com or example.com:8443, joined by "
                         "commas; http://example.com where a host has no https")  # fmt: skip
    scheme = "http" if match[1] else "https"
    return Host(scheme, match[2], int(match[3] or _PORTS[scheme]))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not private, shared, loopback, link-local, multicast, reserved, a
    cloud's metadata, or IPv6 around an IPv4 address."""
    one = ipaddress.ip_address(address)
    if one.version == 6 and one not in _UNICAST:
        return False
    return one.is_global and not one.is_multicast and not any(one in network for network in _CLOSED)


class Fetcher:
    """Fetches pictures from some hosts. On the event loop."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = tuple(hosts)
        # Without the environment's proxies, which would look names up by themselves, without cookies, and without
        # connections that are kept: two names of one address would share them.
        cookies = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx2.AsyncClient(timeout=None, limits=limits, cookies=cookies, trust_env=False,
                                        verify=ssl.create_default_context())  # fmt: skip
        self._open = asyncio.Semaphore(FETCHES)
        self._resolvers = ThreadPoolExecutor(FETCHES, thread_name_prefix="resolver")  # a lost one ends by itself

    async def close(self) -> None:
        """Ends the connections."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        await self._http.aclose()

    def check(self, url: str, field: str) -> None:
        """Raises Refused unless the address is of a host of the list."""
        if self._place(url) is None:
            names = " or ".join(f"{host.scheme}://{host.netloc}/..." for host in self.hosts)
            refuse(field, url, f"a data: URL, or an address of a host that this server asks ({names})")

    async def fetch(self, urls: Mapping[str, str], take: Callable[[int], None]) -> dict[str, bytes]:
        """The content of each address.

        Args:
          urls: addresses that `check` let pass, with the field of each.
          take: called with the length of each piece before it is kept; may raise.

        Raises:
          Refused: names the field of the first picture that is not to be had.
        """
        found = dict[str, bytes]()
        total = 0

        def count(size: int) -> None:
            nonlocal total
            total += size
            if total > MAX_BODY_BYTES:
                raise _Lost(f"the pictures are longer than {MAX_BODY_BYTES:,} bytes together")
            take(size)

        if len(urls) > MAX_PICTURES:
            raise Refused(f"messages: {len(urls)} addresses of pictures, want at most {MAX_PICTURES}", "messages")
        try:
            async with asyncio.timeout(FETCH_SECS):
                for url in urls:
                    async with self._open:
                        found[url] = await self._follow(url, count)
        except (TimeoutError, _Lost) as error:
            problem = str(error) or f"it did not come within {FETCH_SECS:g} s"
            field = urls[url]
            raise Refused(f"{field}: {url[:200]!r}: {problem}; its bytes can be sent as a data: URL", field,
                          code="invalid_image_url") from None  # fmt: skip
        return found

    def _place(self, url: str) -> tuple[Host, str] | None:
        """The host of the list that an address names, and the path there."""
        match = _URL.fullmatch(url)
        if match is None:
            return None
        scheme = match[1].lower()
        host = Host(scheme, match[2].lower(), int(match[3] or _PORTS[scheme]))
        return (host, match[4]) if host in self.hosts else None

    async def _follow(self, url: str, count: Callable[[int], None]) -> bytes:
        for _ in range(1 + MAX_REDIRECTS):
            place = self._place(url)
            if place is None:
                raise _Lost(f"it redirects to {url[:200]!r}, which is of no host that this server asks")
            content = await self._get(*place, count)
            if isinstance(content, bytes):
                return content
            try:
                url = urljoin(url, content)
            except ValueError:  # of brackets that enclose no address
                raise _Lost("it redirects to what is no address") from None
        raise _Lost(f"it redirects more than {MAX_REDIRECTS} times")

    async def _get(self, host: Host, path: str, count: Callable[[int], None]) -> bytes | str:
        """The content at a path, or the address that it redirects to.

        The name is looked up once: the address that is dialled is the one that was checked.
        """
        headers = {"Host": host.netloc, "Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "llava_jax"}
        problem = "it has no address"
        for address in await self._addresses(host):
            url = f"{host.scheme}://{f'[{address}]' if ':' in address else address}:{host.port}{path}"
            named = {"sni_hostname": host.name}
            try:
                async with self._http.stream("GET", url, headers=headers, extensions=named) as response:
                    return await _content(response, count)
            except httpx2.ConnectError as error:
                problem = str(error)
            except (httpx2.HTTPError, ValueError) as error:  # ValueError: headers that its parts cannot read
                raise _Lost(f"the answer is no HTTP ({type(error).__name__})") from None
        raise _Lost(f"no connection to {host.name}: {problem[:120]}")

    async def _addresses(self, host: Host) -> list[str]:
        """The addresses of a host, all of which are public."""
        loop = asyncio.get_running_loop()
        what = (host.name, host.port, socket.AF_UNSPEC, socket.SOCK_STREAM)
        try:
            found = await loop.run_in_executor(self._resolvers, socket.getaddrinfo, *what)
        except OSError:
            raise _Lost(f"the name {host.name} is not known here") from None
        addresses = [str(one[4][0]) for one in found]
        if not all(map(is_public, addresses)):
            raise _Lost(f"{host.name} is at an address that is not public")
        return addresses


async def _content(response: httpx2.Response, count: Callable[[int], None]) -> bytes | str:
    if response.status_code in (301, 302, 303, 307, 308) and "location" in response.headers:
        return response.headers["location"]
    if response.status_code != 200:
        raise _Lost(f"the answer has status {response.status_code}")
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise _Lost("the answer is packed, though it was asked for as it is")
    content = bytearray()
    async for piece in response.aiter_raw():
        count(len(piece))
        content += piece
    return bytes(content)
