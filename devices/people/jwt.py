"""The tokens of a login, short enough for the 255 bytes that a query of CoAP may have (RFC 7252, 5.10)."""

from __future__ import annotations

from rest_framework_simplejwt import tokens
from rest_framework_simplejwt.settings import api_settings


class AccessToken(tokens.AccessToken):
    """Has no number of its own: only refresh tokens are ended one by one."""

    def set_jti(self) -> None:
        self.payload[api_settings.JTI_CLAIM] = ""


class RefreshToken(tokens.RefreshToken):
    access_token_class = AccessToken
