"""The second factor of a login: codes of an authenticator app (TOTP, RFC 6238), and recovery codes for when that is lost."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import qrcode
import qrcode.image.svg
from django.db import transaction
from django_otp import match_token, user_has_device
from django_otp.plugins.otp_static.models import StaticDevice, StaticToken
from django_otp.plugins.otp_totp.models import TOTPDevice

RECOVERY_CODES = 8


def is_on(user: Any) -> bool:
    return bool(user_has_device(user))


def accepts(user: Any, code: str) -> bool:
    """Whether the code is the app's of this moment, or a recovery code that was not used before. Each is good for once."""
    return match_token(user, code.replace(" ", "")) is not None


def proposed(user: Any) -> TOTPDevice:
    """What the app is to be given; it counts for nothing until `confirm` has seen a code of it."""
    found, _ = TOTPDevice.objects.get_or_create(user=user, confirmed=False, defaults={"name": "authenticator app"})
    return found


def picture(device: TOTPDevice) -> str:
    """The QR code of a device for an <img>, as a data URL of an SVG."""
    svg = BytesIO()
    qrcode.make(device.config_url, image_factory=qrcode.image.svg.SvgPathFillImage, box_size=12).save(svg)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"


def as_text(device: TOTPDevice) -> str:
    """The secret for who cannot scan, in groups of four."""
    key = base64.b32encode(device.bin_key).decode().rstrip("=")
    return " ".join(key[at : at + 4] for at in range(0, len(key), 4))


def confirm(user: Any, code: str) -> list[str]:
    """Switches the second factor on, if the code is right; gives the recovery codes, which are not shown again."""
    device = TOTPDevice.objects.filter(user=user, confirmed=False).first()
    if device is None or not device.verify_token(code.replace(" ", "")):
        return []
    with transaction.atomic():
        _forget(user, but=device.pk)
        device.confirmed = True
        device.save()
        recovery = StaticDevice.objects.create(user=user, name="recovery codes")
        codes = [StaticToken.random_token() for _ in range(RECOVERY_CODES)]
        StaticToken.objects.bulk_create([StaticToken(device=recovery, token=each) for each in codes])
    return codes


def remove(user: Any) -> bool:
    """Switches the second factor off; whether it was on."""
    was_on = is_on(user)
    with transaction.atomic():
        _forget(user)
    return was_on


def _forget(user: Any, *, but: int | None = None) -> None:
    TOTPDevice.objects.filter(user=user).exclude(pk=but).delete()
    StaticDevice.objects.filter(user=user).delete()
