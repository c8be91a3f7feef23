"""Tells clients how their videos ended: signed requests to the addresses that they gave (Standard Webhooks).

Clients choose the addresses, so no request may reach what only the server can reach: the address that a name leads to
is checked at the moment of the connection, and redirects are not followed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import random
import socket
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from tccp.errors import StorageError, TccpError
from tccp.serving.store import JobStore
from tccp.serving.store.job_store import Delivery

logger = logging.getLogger(__name__)

_PREFIX = "whsec_"
_GIVEN_UP_S = 86400.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 3 * 3600.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RefusedAddress(OSError):
    """An address is private, of this machine, or otherwise not of the public internet."""


@dataclass(frozen=True)
class WebhookRules:
    """poll_s: between looks for webhooks that are due. timeout_s: of one request.

    allow_loopback: for tests, whose receivers run on this machine.
    """

    poll_s: float = 1.0
    timeout_s: float = 10.0
    allow_loopback: bool = False


async def deliver_forever(store: JobStore, secret: str, rules: WebhookRules = WebhookRules()) -> None:
    """Sends webhooks that are due until it is cancelled. Several processes may do it: each event is sent by one.

    A request that is not answered 2xx is repeated with growing pauses for up to a day. secret: as `key_of_secret`.
    """
    key = key_of_secret(secret)
    timeout = aiohttp.ClientTimeout(total=rules.timeout_s)
    connector = aiohttp.TCPConnector(socket_factory=_guard(rules.allow_loopback), force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as http:
        while True:
            try:
                due = await asyncio.to_thread(store.due_deliveries, 3 * rules.timeout_s)
                await asyncio.gather(*(_deliver(http, store, key, one) for one in due))
            except StorageError as error:
                logger.warning("webhooks: %s", error)
                due = []
            if not due:
                await asyncio.sleep(rules.poll_s)


def key_of_secret(secret: str) -> bytes:
    """The key of a secret: `whsec_` and base64, or any other text as it is. Raises TccpError if it is too short."""
    if secret.startswith(_PREFIX):
        try:
            key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            raise TccpError(f"the webhooks' secret starts with {_PREFIX}, but base64 does not follow") from None
    else:
        key = secret.encode()
    if len(key) < 16:
        raise TccpError(f"the webhooks' secret has {len(key)} bytes: give 16 or more")
    return key


def signature(key: bytes, event_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: HMAC-SHA256 of id, timestamp and body."""
    signed = hmac.digest(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(signed).decode()}"


def wait_s(attempts: int, age_s: float) -> float | None:
    """Seconds until the next attempt; None if the event is too old for one. age_s: of the event."""
    pause_s = min(_FIRST_WAIT_S * 4 ** (attempts - 1), _LONGEST_WAIT_S)
    return None if age_s + pause_s > _GIVEN_UP_S else pause_s


def body_of(delivery: Delivery) -> bytes:
    """The same in every attempt."""
    event = {"id": delivery.id, "object": "event", "type": delivery.kind, "created_at": int(delivery.created_at)}
    return json.dumps({**event, "data": {"id": delivery.job_id}}).encode()


async def _deliver(http: aiohttp.ClientSession, store: JobStore, key: bytes, delivery: Delivery) -> None:
    body, timestamp = body_of(delivery), int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "TCCP",
        "webhook-id": delivery.id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(key, delivery.id, timestamp, body),
    }
    gone = False
    try:
        # What the receiver says besides the status is not read.
        async with http.post(delivery.url, data=body, headers=headers, allow_redirects=False) as answer:
            problem = None if 200 <= answer.status < 300 else f"it answered with status {answer.status}"
            gone = answer.status == 410
    except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        await asyncio.to_thread(store.delivered, delivery.id)
        return
    age_s = await asyncio.to_thread(store.now) - delivery.created_at
    pause_s = None if gone else wait_s(delivery.attempts, age_s)
    logger.info("webhook %s of %s: %s", delivery.id, delivery.job_id, problem)
    jittered = None if pause_s is None else pause_s * random.uniform(0.8, 1.2)
    await asyncio.to_thread(store.delivery_failed, delivery.id, problem, jittered)


def _guard(allow_loopback: bool) -> Any:
    """Makes sockets for connections to public addresses only. Every connection asks it, whatever the URL says."""

    def made(address: Any) -> socket.socket:
        family, kind, protocol, _, place = address
        if not is_public(place[0]) and not (allow_loopback and ipaddress.ip_address(place[0]).is_loopback):
            raise RefusedAddress(f"{place[0]} is no address of the public internet")
        return socket.socket(family=family, type=kind, proto=protocol)

    return made


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where an IPv6 address stands for an IPv4 one."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved
