"""Device tokens: issue them, check them by digest, and derive the broker password of a token.

A token is `aemos_<prefix>_<secret>`. The prefix finds the row. The secret is derived from the prefix with a key that only
the server holds, so that a lost broker can be given every device's credentials again without a visit to each device; the
row holds the HMAC of the whole token, which is what requests are checked against (docs/adr/0003-device-tokens.md).
"""

from __future__ import annotations

import base64
import hmac
import secrets
import string

from django.conf import settings

_ALPHABET = string.ascii_lowercase + string.digits
PREFIX_LENGTH = 14  # 36**14 is about 2**72: never guessed, and unique without a check


def new_prefix() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(PREFIX_LENGTH))


def token_for(prefix: str) -> str:
    """The whole token of a prefix. Only for handing it out once, and for the broker."""
    secret = base64.urlsafe_b64encode(_hmac(b"secret", prefix)).decode().rstrip("=")
    return f"aemos_{prefix}_{secret}"


def prefix_of(token: str) -> str:
    """The prefix of a well-formed token, else the empty string."""
    parts = token.split("_", 2)
    if len(parts) != 3 or parts[0] != "aemos" or len(parts[1]) != PREFIX_LENGTH:
        return ""
    return parts[1]


def digest_of(token: str) -> str:
    return _hmac(b"digest", token).hex()


def matches(token: str, digest: str) -> bool:
    return hmac.compare_digest(digest_of(token), digest)


def _hmac(purpose: bytes, text: str) -> bytes:
    key = settings.DEVICE_TOKEN_KEY.encode()
    return hmac.digest(key, purpose + b":" + text.encode(), "sha256")
