"""Who is behind an access token and what they may see: a JWT in, a Person out; no cookies, no protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from django.contrib.auth import get_user_model
from rest_framework_simplejwt.authentication import JWTAuthentication
from rest_framework_simplejwt.exceptions import AuthenticationFailed, InvalidToken, TokenError
from rest_framework_simplejwt.utils import get_md5_hash_password

from devices.exceptions import Unauthorized
from devices.models import Membership
from devices.people.jwt import AccessToken


class Login(NamedTuple):
    """A user, and a digest of the password that the user had at the login: another password ends it."""

    user_id: int
    password: str


@dataclass(frozen=True, slots=True)
class Person:
    """`expires_at` of the token in epoch seconds; `organizations`: uuid -> the person's role there."""

    login: Login
    expires_at: float
    organizations: Mapping[str, str]


def person(token: str) -> Person:
    """The person whose access token this is; Unauthorized with a sentence that says why not."""
    try:
        access = AccessToken(token)  # type: ignore[arg-type]  # annotated as a token, takes its text
        user = JWTAuthentication().get_user(access)
    except TokenError:
        raise Unauthorized("The access token is not valid or has expired.") from None
    except (AuthenticationFailed, InvalidToken):
        raise Unauthorized(
            "The user of the access token does not exist, is not active, or has a new password."
        ) from None
    login = Login(user.pk, get_md5_hash_password(user.password))
    return Person(login, float(access["exp"]), organizations_of([login]).get(login, {}))


def organizations_of(logins: Collection[Login]) -> dict[Login, dict[str, str]]:
    """Login -> organizations of the user, uuid -> role; missing are users who are not active, and logins that a new password
    ended. Two queries."""
    ids = {login.user_id for login in logins}
    passwords = get_user_model().objects.filter(pk__in=ids, is_active=True).values_list("pk", "password")
    current = {Login(user_id, get_md5_hash_password(password)) for user_id, password in passwords}
    roles: dict[int, dict[str, str]] = {login.user_id: {} for login in current}
    memberships = Membership.objects.filter(user_id__in=list(roles))
    for user_id, organization, role in memberships.values_list("user_id", "organization__uuid", "role"):
        roles[user_id][str(organization)] = role
    return {login: roles[login.user_id] for login in current.intersection(logins)}
